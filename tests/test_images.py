"Letterboxing of any size, unreadable files, and order and prefetching of the threaded readers."
import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import skip_missing
from hypothesis import given, settings, strategies as st
from PIL import Image, features

from effdet_nb.data.image_groups import image_signature
from effdet_nb.detector.efficientdet import VARIANTS, Arch, arch_from_dict, arch_to_dict
from effdet_nb.detector.images import (EXIF_ORIENTATION, IMAGENET_MEAN_RGB, PAD_RGB, boxes_to_original, letterbox,
                                       letterbox_scale, read_image, read_orientation, read_resized,
                                       read_resized_batches, stored_orientation, threaded_map, to_channels)
from effdet_nb.weights.model_file import check_arch

side = st.integers(1, 5000)


def encode(image, file_format='png', **options):
    "The bytes of an array as an image file."
    file = io.BytesIO()
    Image.fromarray(image).save(file, file_format, **options)
    return file.getvalue()


def smooth_image(h, w, seed=0):
    "An image without sharp noise, so that two ways of scaling can be compared."
    small = np.random.default_rng(seed).integers(0, 256, (6,8,3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w,h), Image.Resampling.BICUBIC))


@given(side, side, side, side)
def test_a_scaled_image_fills_one_side_and_fits_the_other(h, w, H, W):
    scale, (nh,nw) = letterbox_scale((h,w), (H,W))
    assert 1<=nh<=H and 1<=nw<=W and (nh==H or nw==W)
    assert (nh, nw) == (max(1, min(H, h*W//w)), max(1, min(W, w*H//h)))
    assert scale == min(H/h, W/w)


@given(st.lists(st.tuples(*[st.floats(0, 1)]*4), max_size=5), side, side)
def test_boxes_map_back_to_the_original(unit, h, w):
    scale,_ = letterbox_scale((h,w), (512,640))
    unit = np.array(unit, float).reshape(-1, 2, 2)
    boxes = np.sort(unit, 1).reshape(-1, 4)*(h,w,h,w)
    assert np.allclose(boxes_to_original(boxes*scale, scale, (h,w)), boxes, atol=1e-3*max(h,w)/100+1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1,90), st.integers(1,90), st.integers(1,64), st.integers(1,64))
def test_every_size_is_scaled_and_padded(h, w, H, W):
    image = np.full((h,w,3), (200,10,50), np.uint8)
    letterboxed,_ = letterbox(image, (H,W))
    nh,nw = letterbox_scale((h,w), (H,W))[1]
    assert (letterboxed[:nh,:nw] == (200,10,50)).all()
    assert (letterboxed[nh:] == PAD_RGB).all() and (letterboxed[:,nw:] == PAD_RGB).all()


def test_the_padding_has_the_mean_colour_of_imagenet():
    assert PAD_RGB == (124, 116, 104)
    np.testing.assert_allclose(PAD_RGB, IMAGENET_MEAN_RGB, atol=.5)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('channels', [1, 3])
def test_the_padding_of_every_variant_is_zero_after_normalisation(name, channels):
    arch = Arch(name, channels=channels)
    letterboxed, _ = letterbox(np.zeros((9,16,3), np.uint8), (16,16), arch.pad_rgb)
    pixel = to_channels(letterboxed[None], channels)[0,-1,-1].astype(float)
    assert np.abs((pixel-arch.mean_rgb)/arch.std_rgb).max() < .5/min(arch.std_rgb) + 1e-6


@pytest.mark.parametrize('mean', [(0.,0.,0.), (127.5,127.5,127.5), (255.,0.,33.), (131.2,)])
def test_the_padding_follows_the_mean_of_imported_weights(mean):
    arch = Arch('efficientdet-d1', mean_rgb=mean, std_rgb=mean, channels=len(mean))
    np.testing.assert_allclose(arch.pad_rgb, np.broadcast_to(mean, 3), atol=.5)


@pytest.mark.parametrize('name', ['efficientdet-d0', 'efficientdet-lite0', 'efficientdet-lite4'])
@pytest.mark.parametrize('hw', [(300,200), (90,160), (33,400), (64,64)])
def test_a_description_without_the_padding_gives_the_inputs_of_its_time(name, hw):
    "The earlier letterbox, written out: Pillow's bilinear filter, and ImageNet's mean for every variant."
    description = arch_to_dict(Arch(name, (128,96)))
    del description['pad_rgb']
    image = np.random.default_rng(0).integers(0, 256, (*hw,3), np.uint8)
    scale, (height,width) = letterbox_scale(hw, (128,96))
    expected = np.full((128,96,3), (124,116,104), np.uint8)
    box = (0, 0, min(width/scale, hw[1]), min(height/scale, hw[0]))
    expected[:height,:width] = Image.fromarray(image).resize((width,height), Image.Resampling.BILINEAR, box)
    np.testing.assert_array_equal(letterbox(image, (128,96), arch_from_dict(description).pad_rgb)[0], expected)


@pytest.mark.parametrize('size', [(33,33), (100,64), (64,200), (480,640), (700,700)])
def test_a_jpeg_decoded_at_reduced_size_gives_the_same_image(size):
    data = encode(smooth_image(481, 643), 'jpeg', quality=95)
    full,scale = letterbox(read_image(data), size)
    quick = read_resized(data, size)
    assert (quick.scale, quick.original_hw) == ((scale,scale), (481,643))
    assert np.abs(full.astype(int)-quick.image).mean() < 2


def test_photographs_decoded_at_reduced_size_give_the_same_images(shared_dir):
    for path in sorted((shared_dir/'data/coco_mini/images').glob('*.jpg'))[:5]:
        quick = read_resized(path, (128,128))
        full,_ = letterbox(read_image(path), (128,128))
        assert np.abs(full.astype(int)-quick.image).mean() < 6


FILE_STARTS = [b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM', b'RIFF']


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(FILE_STARTS))
def test_bytes_that_are_no_image_raise_a_value_error_with_the_name(data, start):
    with pytest.raises(ValueError, match='^odd.bin: not readable as an image'):
        read_image(start+data, 'odd.bin')


@pytest.mark.parametrize('file_format', ['jpeg', 'png', 'bmp', 'webp', 'tiff', 'gif'])
def test_common_formats_are_read(file_format):
    image = read_image(encode(smooth_image(20, 30), file_format))
    assert image.shape==(20,30,3) and image.dtype==np.uint8


@pytest.mark.parametrize('cut', [.1, .5, .9])
def test_a_truncated_file_is_refused(cut):
    data = encode(smooth_image(200, 300), 'jpeg')
    with pytest.raises(ValueError, match='truncated|not readable'):
        read_resized(data[:int(len(data)*cut)], (64,64), 'cut.jpg')


@pytest.mark.parametrize('intact, damaged', [(b'pitm', b'pitn'), (b'mdat', b'mdat'+bytes(9))], ids=['head', 'pixels'])
def test_a_damaged_avif_is_left_out_like_other_files(intact, damaged, tmp_path):
    if not features.check('avif'): skip_missing('AVIF in Pillow', 'a wheel of Pillow 11.3 or later has it')
    data = encode(smooth_image(50, 60), 'avif')
    start = data.index(intact)
    (tmp_path/'bad.avif').write_bytes(data[:start]+damaged+data[start+len(damaged):])
    (tmp_path/'good.avif').write_bytes(data)
    with pytest.raises(ValueError, match='bad.avif: not readable as an image: Failed to decode'):
        read_image(tmp_path/'bad.avif')
    paths,lost = sorted(tmp_path.iterdir()),[]
    [batch] = read_resized_batches(paths, (64, 64), on_error=lambda source,error: lost.append(source))
    assert lost==[paths[0]] and [source for source,_ in batch]==[paths[1]]
    assert [read_orientation(path) for path in paths]==[1, 1]
    assert image_signature(paths[0]) is None and image_signature(paths[1]) is not None


@pytest.mark.parametrize('orientation, expected', [(6, 6), (6., 6), (2.5, 1), (9, 1), (b'6', 1)])
def test_an_orientation_is_a_number_from_1_to_8(orientation, expected):
    image = Image.new('RGB', (60, 40))
    image.getexif()[EXIF_ORIENTATION] = orientation
    found = stored_orientation(image)
    assert found==expected and isinstance(found, int)


def test_an_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x112] = 6
    assert read_image(encode(smooth_image(20, 30), 'jpeg', exif=exif)).shape == (20,30,3)


def test_threads_keep_the_order_and_raise_errors_in_place():
    def slow(i):
        time.sleep(.002*(7-i%8))
        if i==20: raise ValueError('twenty')
        return i
    results = threaded_map(slow, range(100), 4)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(ValueError, match='twenty'): next(results)


def test_a_reader_that_stops_early_stops_the_threads():
    fetched = []
    def sources():
        for i in range(1000):
            fetched.append(i)
            yield encode(smooth_image(8, 8))
    batches = read_resized_batches(sources(), (16,16), batch_size=2, workers=2)
    next(batches)
    batches.close()
    time.sleep(.05)
    assert len(fetched) < 12


def test_no_tensorflow_is_imported():
    code = '''import sys, effdet_nb.detector.images
assert "tensorflow" not in sys.modules and "keras" not in sys.modules'''
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('padding', [
    'grey', [127], [127, 127, 127, 127], [300, 0, 0], [-1, 0, 0], [1.5, 0, 0], [None]*3, {}])
def test_a_padding_that_is_no_colour_is_refused(padding):
    description = json.loads(json.dumps(arch_to_dict(Arch('efficientdet-tiny', (128,128), 3))))
    assert check_arch(description, 'a.tlt')['pad_rgb'] == [124,116,104]
    with pytest.raises(ValueError, match='arch.pad_rgb.*three numbers from 0 to 255'):
        check_arch(description | dict(pad_rgb=padding), 'a.tlt')
