"Whatever conversion keeps, Pillow and TensorFlow decode alike; other files are refused by name."
import io
import json
import os
import random
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.faults import Fault
from effdet_nb.data.image_files import OutsideFolder, image_fault, image_path, probe_image
from effdet_nb.data.pipeline import decode_image
from effdet_nb.data.tfrecord import decode_example, read_records
from effdet_nb.detector import images as detector_images
from effdet_nb.detector.images import read_image, read_resized
from effdet_nb.detector.toy_data import make_toy_image

slow = pytest.mark.slow


def picture(mode='RGB', size=(90, 61)):
    image = Image.fromarray(make_toy_image(3, (96, 128)).image).resize(size)
    return image.convert(mode)


def encoded(file_format, mode='RGB', **options):
    out = io.BytesIO()
    picture(mode).save(out, file_format, **options)
    return out.getvalue()


def tiff(pixels, bits, sample_format=1):
    "An uncompressed grey TIFF file of unusual depth; Pillow cannot write all of them."
    height, width = pixels.shape
    if bits == 12:
        text = ''.join(f'{v:012b}' for v in pixels.ravel())
        data = bytes(int(text[i:i+8].ljust(8, '0'), 2) for i in range(0, len(text), 8))
    else: data = pixels.tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 134), (277, 3, 1),
            (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b''.join(struct.pack('<HHIHH', tag, kind, 1, v, 0) if kind == 3 else struct.pack('<HHII', tag, kind, 1, v)
                       for tag, kind, v in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + struct.pack('<I', 0) + data


# --- one rule for depth, colour model and size ---

GREY = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
forms = {
    'jpeg': encoded('JPEG', quality=60), 'progressive': encoded('JPEG', progressive=True),
    'grey jpeg': encoded('JPEG', 'L'), 'cmyk': encoded('JPEG', 'CMYK', quality=95),
    'jpeg 4:4:4': encoded('JPEG', subsampling=0),
    'png': encoded('PNG'), 'palette': encoded('PNG', 'P'), 'alpha': encoded('PNG', 'RGBA'),
    'one bit': encoded('PNG', '1'),
    'grey alpha': encoded('PNG', 'LA'), 'gif': encoded('GIF', 'P'), 'bmp': encoded('BMP'), 'webp': encoded('WEBP'),
    'cmyk tiff': encoded('TIFF', 'CMYK'), 'tiff 8': tiff(GREY, 8), 'tiff 12': tiff(GREY.astype('<u2') << 4, 12),
    'tiff 16': tiff(GREY.astype('<u2') << 8, 16),
}


@pytest.mark.parametrize('form', forms)
def test_training_sees_the_pixels_that_inference_sees(tmp_path, form):
    (tmp_path/'image').write_bytes(forms[form])
    seen = read_image(tmp_path/'image').astype(int)
    stored = probe_image(tmp_path/'image')
    trained = decode_image(stored.data).numpy().astype(int)
    assert stored.original_hw == seen.shape[:2] == trained.shape[:2]
    assert np.abs(seen - trained).max() <= (1 if 'cmyk' in form else 0)
    assert seen.max() > 200 and seen.min() < 60 and 40 < seen.mean() < 220      # neither black nor white
    if form.startswith('tiff'): np.testing.assert_array_equal(seen, np.repeat(GREY[..., None], 3, -1))


@pytest.mark.parametrize('data,fault', [
    (tiff(GREY.astype('<u4'), 32), Fault.UNSUPPORTED_PIXELS),
    (tiff(GREY.astype('<f4'), 32, 3), Fault.UNSUPPORTED_PIXELS),
    (tiff(GREY.astype('<i2'), 16, 2), Fault.UNSUPPORTED_PIXELS),
    (b'', Fault.NOT_AN_IMAGE), (b'GIF89a', Fault.NOT_AN_IMAGE)])
def test_pixels_without_a_defined_brightness_are_refused_everywhere(tmp_path, data, fault):
    (tmp_path/'image').write_bytes(data)
    with pytest.raises(Exception) as e: probe_image(tmp_path/'image')
    assert image_fault(e.value) == fault
    for read in (read_image, lambda path: read_resized(path, (64, 64))):
        with pytest.raises(ValueError, match='image: not readable as an image'): read(tmp_path/'image')


@pytest.mark.parametrize('highest,is_dark', [(255, True), (4095, True), (4096, False), (65535, False), (0, False)])
def test_pixels_that_use_few_of_16_bits_are_reported(tmp_path, highest, is_dark):
    pixels = np.linspace(0, highest, 30).astype(np.uint16).reshape(5, 6)
    Image.fromarray(pixels).save(tmp_path/'a.png')
    Image.fromarray(pixels).save(tmp_path/'a.tiff')
    for name in ('a.png', 'a.tiff'):
        found = {warning.fault for warning in probe_image(tmp_path/name).warnings}
        assert (Fault.DARK_16_BITS in found) == is_dark


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'TIFF', 'BMP'])
def test_one_limit_of_pixels_for_all_commands(tmp_path, monkeypatch, file_format):
    assert detector_images.MAX_PIXELS == 2*Image.MAX_IMAGE_PIXELS == 178_956_970
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    picture().save(tmp_path/'big', file_format)
    with pytest.raises(Image.DecompressionBombError) as e: probe_image(tmp_path/'big')
    assert image_fault(e.value) == Fault.TOO_LARGE
    for read in (read_image, lambda path: read_resized(path, (64, 64))):
        with pytest.raises(ValueError, match='more than 178,956,970 pixels.* tiles') as e: read(tmp_path/'big')
        assert 'bomb' not in str(e.value)


# --- damaged files ---

def damaged(data, rng):
    "Cuts a file, or changes some of its bytes."
    if rng.random() < .25: return data[:rng.randrange(len(data))]
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        position = rng.randrange(len(data))
        data[position] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(data)


def repaired_checksums(png):
    "Gives the chunks of a damaged PNG valid checksums, as far as its structure allows."
    import zlib
    position, out = 8, png[:8]
    while position+12 <= len(png):
        length = struct.unpack('>I', png[position:position+4])[0]
        body = png[position+4:position+8+length]
        out += png[position:position+4] + body + struct.pack('>I', zlib.crc32(body))
        position += 12+length
    return out + png[position:]


def with_pixel_stream(png, change):
    "Changes the compressed pixels of a PNG, whose chunks get valid checksums."
    start = png.index(b'IDAT')-4
    length, = struct.unpack('>I', png[start:start+4])
    pixels = change(png[start+8:start+8+length])
    changed = png[:start] + struct.pack('>I', len(pixels)) + b'IDAT' + pixels + bytes(4) + png[start+12+length:]
    return repaired_checksums(changed)


@pytest.mark.parametrize('lost', [1, 2, 4, 5, 8])
@pytest.mark.parametrize('form', ['png', 'palette'])
def test_a_png_whose_pixels_lack_their_end_is_damaged(tmp_path, form, lost):
    path = tmp_path/'image'
    def flip_bit(pixels): return pixels[:-lost] + bytes([pixels[-lost]^1]) + pixels[len(pixels)+1-lost:]
    for change, is_kept in [(lambda pixels: pixels, True), (lambda pixels: pixels+bytes(lost), True),
                            (lambda pixels: pixels[:-lost], False), (flip_bit, False)]:
        path.write_bytes(with_pixel_stream(forms[form], change))
        if is_kept: assert decode_image(probe_image(path).data).shape == read_image(path).shape
        else:
            with pytest.raises(OSError, match='of the pixels is missing|pixels are damaged|broken|truncated') as e:
                probe_image(path)
            assert image_fault(e.value) == Fault.FILE_DAMAGED


@pytest.mark.filterwarnings('ignore')       # Pillow's, about damaged TIFF files
@pytest.mark.parametrize('count', [60, pytest.param(2000, marks=slow)])
@pytest.mark.parametrize('form', [
    'jpeg', 'progressive', 'grey jpeg', 'cmyk', 'png', 'palette', 'repaired png', 'tiff 16', 'gif'])
def test_what_is_kept_of_damaged_files_both_programs_decode(tmp_path, form, count):
    rng, kept, failed = random.Random(form), 0, 0
    path = tmp_path/'image'
    for _ in range(count):
        data = damaged(forms[form.removeprefix('repaired ')], rng)
        path.write_bytes(repaired_checksums(data) if form == 'repaired png' else data)
        try: stored = probe_image(path)
        except Exception as e:
            assert isinstance(image_fault(e), Fault) and image_fault(e) != Fault.FILE_MISSING
            continue
        kept += 1
        try: assert decode_image(stored.data).shape == read_image(stored.data).shape == (*stored.original_hw, 3)
        except tf.errors.InvalidArgumentError: failed += 1
    assert failed == 0
    assert kept or 'png' in form or form == 'palette'      # every byte of a PNG has a checksum


# --- where files may be, and what they may be ---

@pytest.mark.parametrize('name', [
    '../a.jpg', 'x/../../a.jpg', '/etc/passwd', '..', './..//a.jpg', 'x/../../images2/a.jpg'])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(OutsideFolder, match='leads out of'): image_path(tmp_path/'images', name)


@pytest.mark.parametrize('name,path', [('a.jpg', 'a.jpg'), ('x/../a.jpg', 'a.jpg'), ('./x//a.jpg', 'x/a.jpg'),
                                       ('..a.jpg', '..a.jpg'), ('...', '...')])
def test_names_inside_the_folder_are_kept(tmp_path, name, path):
    assert image_path(tmp_path, name) == str(tmp_path/path) == image_path(tmp_path, f'{tmp_path}/{name}')
    assert image_path('/', str(tmp_path/path)) == str(tmp_path/path)


@pytest.fixture
def folder(tmp_path):
    "Four usable images, and room for others."
    (tmp_path/'images').mkdir()
    for i in range(4): (tmp_path/'images'/f'{i}.jpg').write_bytes(forms['jpeg'])
    return tmp_path


def convert(folder, names, **options):
    images = [dict(id=i, file_name=name, width=90, height=61) for i, name in enumerate(names, 1)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[1, 2, 30, 20], area=600, iscrowd=0)
             for i in range(1, len(names)+1)]
    data = dict(images=images, annotations=boxes, categories=[dict(id=1, name='cat')])
    (folder/'a.json').write_text(json.dumps(data))
    return dataset_convert(folder/'images', folder/'a.json', folder/'records', num_shards=2, **options)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes')
def test_hostile_paths_cost_one_image_each(folder):
    os.mkfifo(folder/'images'/'pipe.jpg')
    os.symlink('/dev/zero', folder/'images'/'zero.jpg')
    (folder/'images'/'folder.jpg').mkdir()
    with open(folder/'images'/'sparse.jpg', 'wb') as f: f.truncate(2**40)
    (folder/'secret.jpg').write_bytes(forms['jpeg'])
    names = ['0.jpg', 'pipe.jpg', 'zero.jpg', 'folder.jpg', 'sparse.jpg', '../secret.jpg', str(folder/'secret.jpg'),
             'a\0b.jpg', 'n'*300 + '.jpg', '3.jpg']
    result = convert(folder, names)
    lost = {fault: [name for _, name in items] for fault, items in result.dropped_images.items()}
    assert sorted(lost[Fault.NOT_A_FILE]) == ['folder.jpg', 'pipe.jpg', 'sparse.jpg', 'zero.jpg']
    assert sorted(lost[Fault.OUTSIDE_FOLDER]) == sorted(['../secret.jpg', str(folder/'secret.jpg')])
    assert result.num_images == 2 and sum(map(len, lost.values())) == 8
    with pytest.raises(ValueError, match='leads out of .* Choose an image folder above'):
        convert(folder, ['../secret.jpg'])


@pytest.mark.parametrize('links', [{'1.jpg': '1.jpg'}, {'1.jpg': 'x', 'x': '1.jpg'}, {'1.jpg': './x/1.jpg', 'x': '.'}])
def test_links_that_lead_in_a_circle_are_missing_files(folder, links):
    (folder/'images'/'1.jpg').unlink(missing_ok=True)
    for name, target in links.items(): os.symlink(target, folder/'images'/name)
    result = convert(folder, ['0.jpg', '1.jpg', 'n'*300 + '.jpg'])
    missing = {name for _,name in result.dropped_images[Fault.FILE_MISSING]}
    assert missing == {'1.jpg', 'n'*300 + '.jpg'} and result.num_images == 1


@pytest.mark.parametrize('name', [b'caf\xe9.jpg', b'\xff\xfe.jpg', b'a\x80b.jpg'])
def test_names_that_are_not_utf8_are_converted(folder, name):
    os.rename(folder/'images'/'1.jpg', os.path.join(os.fsencode(folder/'images'), name))
    result = convert(folder, ['0.jpg', os.fsdecode(name)])
    assert result.num_images == 2 and not any(p.name.startswith('.') for p in (folder/'records').iterdir())
    records = [record for file in result.files for record in read_records(file)]
    assert any(name in record for record in records)
    assert {decode_example(record)['source_id'] for record in records} == {'1', '2'}


@pytest.mark.parametrize('size', [(10**6, 10**6), (2**31, 1), (-5, 10)])
def test_an_impossible_size_in_the_json_is_replaced_by_that_of_the_file(folder, size):
    convert(folder, ['0.jpg'])
    data = json.loads((folder/'a.json').read_text())
    data['images'][0].update(width=size[0], height=size[1])
    data['annotations'][0]['segmentation'] = [[1, 2, 30, 2, 30, 20]]
    (folder/'a.json').write_text(json.dumps(data))
    result = dataset_convert(folder/'images', folder/'a.json', folder/'records', num_shards=1, include_masks=True)
    record = decode_example(next(read_records(result.files[0])))
    assert (record['height'], record['width']) == (61, 90) and result.notes
