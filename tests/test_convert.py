"Conversion: every fault is named and counted, nothing is lost, half-written or done twice."
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from effdet_nb.data import convert, shards, workers
from effdet_nb.data.coco import CocoDataset
from effdet_nb.data.coco_json import CocoError
from effdet_nb.data.convert import choose_num_shards, dataset_convert
from effdet_nb.data.faults import ConversionReport, Fault, worst_image_id
from effdet_nb.data.masks import mask_png
from effdet_nb.data.sources import convert_sources
from effdet_nb.data.image_files import image_fault, probe_image, without_wrong_sizes
from effdet_nb.data.tile_dataset import tile_dataset
from effdet_nb.data.validate import validate_box
from effdet_nb.detector.images import EXIF_ORIENTATION
from effdet_nb.detector.tiles import Tiling
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.tfrecord import (FEATURE_TYPES, decode_example, find_record_files, load_sidecar, parse_example,
                                    read_records)


# --- boxes ---

finite = st.floats(-1e6, 1e6)


@given(st.tuples(finite, finite, finite, finite), st.booleans())
def test_kept_boxes_lie_inside_their_image(bbox, clip):
    box, wrong = validate_box(bbox, (100, 150), clip)
    if box is None: assert wrong
    else:
        y1, x1, y2, x2 = box
        assert -1e-5 <= y1 < y2 <= 100 + 1e-5 and -1e-5 <= x1 < x2 <= 150 + 1e-5
        assert wrong in (None, Fault.OUT_OF_BOUNDS)
        x, y, w, h = bbox
        assert clip or min(x, y, 150 - x - w, 100 - y - h) >= -1 - 1e-5


@pytest.mark.parametrize('bbox, fault', [
    ([0, 0, 150, 100], None), ([0, 0, 150.005, 100], None), ([0, 0, 150.02, 100], 'out of bounds'),
    ([-.02, 0, 9, 9], 'out of bounds'), ([0, -1, 9, 9], 'out of bounds'), ([0, 99, 9, 2], 'out of bounds'),
    ([1, 1, 0, 5], 'no size'), ([1, 1, 5, 0], 'no size'), ([1, 1, -5, 5], 'no size'), ([1, 1, 5, 1e-12], 'no size'),
    ([float('nan'), 1, 5, 5], 'not finite'), ([1, 1, float('inf'), 5], 'not finite'), ([149.7, 0, .1 + .2, 9], None)])
def test_boxes_with_a_fault_are_left_out(bbox, fault): assert validate_box(bbox, (100, 150))[1] == fault


# --- pictures and masks ---

@given(st.integers(1, 400), st.integers(1, 400), st.data())
@settings(max_examples=40, deadline=None)
def test_a_mask_png_has_the_pixels_of_the_mask(h, w, data):
    from pycocotools import mask as M
    y, x = data.draw(st.integers(0, h)), data.draw(st.integers(0, w))
    pixels = np.zeros((h, w), np.uint8, order='F')
    pixels[y:y + data.draw(st.integers(0, h)), x:x + data.draw(st.integers(0, w))] = 1
    with Image.open(io.BytesIO(mask_png(M.encode(pixels)))) as im:
        assert im.mode == 'L' and np.array_equal(np.asarray(im), pixels)


jpeg_options = [{}, dict(progressive=True), dict(optimize=True), dict(comment=b'mine'), dict(icc_profile=b'x'*300),
                dict(mode='L'),
                dict(mode='CMYK'), dict(subsampling=0), dict(restart_marker_rows=1)]


@pytest.mark.parametrize('options', jpeg_options)
def test_every_kind_of_jpeg_keeps_its_bytes(tmp_path, options):
    mode = options.get('mode', 'RGB')
    Image.new(mode, (37, 23), 90).save(tmp_path/'a.jpg', **{k: v for k, v in options.items() if k != 'mode'})
    image = probe_image(tmp_path/'a.jpg')
    assert image.data == (tmp_path/'a.jpg').read_bytes() and image.file_format == 'jpeg'
    assert image.original_hw == (23, 37)
    assert [reason.detail for reason in image.warnings] == ([] if mode == 'RGB' else [mode])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_jpeg_header_is_read_or_has_a_fault(tmp_path_factory, data):
    out = io.BytesIO()
    Image.new('RGB', (37, 23), 90).save(out, 'JPEG')
    raw = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))): raw[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp()/'header.jpg'
    path.write_bytes(raw)
    try: assert len(probe_image(path).original_hw) == 2
    except Exception as e: assert image_fault(e) in (Fault.NOT_AN_IMAGE, Fault.FILE_DAMAGED)


# --- conversion ---

@pytest.fixture(scope='session')
def toy_dataset_once(tmp_path_factory): return make_toy_dataset(tmp_path_factory.mktemp('toy_dataset'), 14, 4)


@pytest.fixture
def toy_dataset(tmp_path, toy_dataset_once):
    folder = Path(shutil.copytree(toy_dataset_once, tmp_path/'toy_dataset'))
    return folder/'train', folder/'train.json', tmp_path/'out'


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def examples(files): return [decode_example(r) for f in files for r in read_records(f)]
def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*')) if Path(folder).exists() else None


def test_every_image_and_box_is_in_the_records(toy_dataset):
    images, annotations, out = toy_dataset
    truth = json.loads(annotations.read_text())
    summary = dataset_convert(images, annotations, out, tag='t', num_shards=3)
    assert listing(out) == ['t-00000-of-00003.tfrecord', 't-00001-of-00003.tfrecord', 't-00002-of-00003.tfrecord',
                            't_records.json', 't_report.json', 't_report.png', 't_warnings.json']
    for k, f in enumerate(summary.files):
        assert [decode_example(r)['source_id'] for r in read_records(f)] == [str(i['id'])
                                                                             for i in truth['images'][k::3]]
    for e in examples(summary.files):
        info = next(i for i in truth['images'] if str(i['id']) == e['source_id'])
        anns = [a for a in truth['annotations'] if a['image_id'] == info['id'] and a['bbox'][0] + a['bbox'][2] <= 128]
        assert e['image'] == (images/info['file_name']).read_bytes() and e['filename'] == info['file_name']
        assert e['format'] == ('png' if info['file_name'].endswith('png') else 'jpeg')
        assert (e['height'], e['width']) == (128, 128)
        x, y, w, h = np.array([a['bbox'] for a in anns]).reshape(-1, 4).T
        np.testing.assert_allclose(e['boxes'], np.stack([y, x, y + h, x + w], -1), atol=1e-4)
        assert e['labels'].tolist() == [a['category_id'] for a in anns]
        assert e['is_crowd'].tolist() == [bool(a['iscrowd']) for a in anns]
        np.testing.assert_allclose(e['area'], [a['area'] for a in anns])
    raw = parse_example(next(read_records(summary.files[0])))
    assert set(raw) == set(FEATURE_TYPES) - {'image/object/mask'}
    assert raw['image/key/sha256'] == [hashlib.sha256(raw['image/encoded'][0]).hexdigest().encode()]


def test_workers_and_repeats_give_the_same_bytes(toy_dataset, tmp_path):
    images, annotations, out = toy_dataset
    digests = []
    for i, num_workers in enumerate((1, 2, 3, 1)):
        dataset_convert(images, annotations, tmp_path/str(i), num_shards=5, include_masks=True, workers=num_workers)
        digests.append({n: hashlib.sha256((tmp_path/str(i)/n).read_bytes()).hexdigest()
                        for n in listing(tmp_path/str(i))})
    assert digests[0] == digests[1] == digests[2] == digests[3] and len(digests[0]) == 9


def test_a_script_without_main_guard_may_use_workers(toy_dataset, tmp_path):
    images, annotations, out = toy_dataset
    script = tmp_path/'script.py'
    script.write_text(f'''
from effdet_nb.data.convert import dataset_convert
print("once")
summary = dataset_convert({str(images)!r}, {str(annotations)!r}, {str(out)!r}, num_shards=4, workers=2)
print(summary.num_images)
''')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.split() == ['once', '14'], done.stderr


def test_masks_are_in_the_records(toy_dataset):
    images, annotations, out = toy_dataset
    summary = dataset_convert(images, annotations, out, include_masks=True, num_shards=1)
    for e in examples(summary.files):
        assert len(e['masks']) == len(e['boxes'])
        for png, area in zip(e['masks'], e['area']):
            mask = np.asarray(Image.open(io.BytesIO(png)))
            assert mask.shape == (128, 128) and set(np.unique(mask)) <= {0, 1}
            assert abs(int(mask.sum()) - area) <= max(20, .08*area)
    assert not summary.masks_outside_box


def test_the_warnings_log_has_the_form_of_tao(toy_dataset):
    images, annotations, out = toy_dataset

    def damage(d):
        d['images'][0]['id'] = 200365
        for a in d['annotations']:
            if a['image_id'] == 1: a['image_id'] = 200365
        first = d['annotations'][0]
        first['bbox'][0] = -4
        d['annotations'][1] |= dict(segmentation=[[5, 5, 100, 5, 100, 100]], bbox=[5, 5, 20, 95])
        d['annotations'].append(first | dict(id=918, bbox=[121, 5, 9, 9]))
    edit(annotations, damage)
    summary = dataset_convert(images, annotations, out, include_masks=True, num_shards=2)
    log = json.loads((out/'train_warnings.json').read_text())
    assert log['200365'] == {'box': [1, 918], 'mask': [2]} and set(log) == {'200365', '4'} and log['4']['mask'] == []
    assert summary.dropped_boxes['out of bounds'][0][0] in (200365, 4)
    assert len(summary.dropped_boxes['out of bounds']) == 3
    assert summary.masks_outside_box == [(200365, 2)]
    assert 'masks outside their box (kept)' in repr(summary)


def test_without_warnings_there_is_no_log_and_an_old_one_is_removed(toy_dataset):
    images, annotations, out = toy_dataset
    dataset_convert(images, annotations, out, num_shards=2)
    assert (out/'train_warnings.json').exists()
    edit(annotations,
         lambda d: d.update(annotations=[a for a in d['annotations'] if a['bbox'][0] + a['bbox'][2] <= 128]))
    assert dataset_convert(images, annotations, out, num_shards=2).warnings_file is None
    assert not (out/'train_warnings.json').exists()


def test_missing_crowd_and_area_are_derived(toy_dataset):
    images, annotations, out = toy_dataset
    edit(annotations, lambda d: [a.pop(k) for a in d['annotations'] for k in ('area', 'iscrowd')])
    for e in examples(dataset_convert(images, annotations, out, num_shards=1).files):
        np.testing.assert_allclose(e['area'], np.prod(e['boxes'][:, 2:] - e['boxes'][:, :2], -1), rtol=1e-4)
        assert not e['is_crowd'].any()


names = {
    'backslash': (lambda name: 'train\\'+name, 1), 'capital letters': (str.upper, 1),
    'percent encoding': (lambda name: name.replace('.', '%2E'), 1), 'absolute path': (lambda name: '/home/me/'+name, 1),
    'drive': (lambda name: 'D:\\data\\train\\'+name, 1), 'point': (lambda name: './/images/'+name, 1),
    'another file': (lambda name: 'x'+name, 0)}


@pytest.mark.parametrize('change, num_found', names.values(), ids=names)
def test_a_file_under_another_name_is_found_and_named(toy_dataset, change, num_found):
    images, annotations, out = toy_dataset
    expected = examples(dataset_convert(images, annotations, out, num_shards=1).files)
    edit(annotations, lambda d: d['images'][1].update(file_name=change(d['images'][1]['file_name'])))
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert len(summary.notes.get('file found under another name', ()))==num_found
    assert len(summary.dropped_images.get('file missing', ()))==1-num_found
    if num_found: assert [e['filename'] for e in examples(summary.files)]==[e['filename'] for e in expected]


def test_a_file_in_a_folder_with_composed_accents_is_found(toy_dataset):
    images, annotations, out = toy_dataset
    (images/'caf\u00e9').mkdir()
    (images/'000002.jpg').rename(images/'caf\u00e9'/'a b.jpg')
    edit(annotations, lambda d: d['images'][1].update(file_name='cafe\u0301/a%20b.jpg'))
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert summary.num_images==14 and summary.report.notes[Fault.NAME_DIFFERS, '']


@pytest.mark.parametrize('copies, file_names', [
    (['a/2.jpg', 'b/2.jpg'], ['2.jpg']),                # two files could be meant
    (['b/2.jpg'], ['a/2.jpg']),                         # a file of another folder
    (['2.jpg'], ['a/2.jpg', 'b/2.jpg']),                # two entries would share a file
    (['2.jpg'], ['2.jpg', '2.JPG'])])
def test_a_file_is_not_guessed(toy_dataset, copies, file_names):
    images, annotations, out = toy_dataset
    (images/'000002.jpg').rename(images/'x')
    for name in copies:
        (images/name).parent.mkdir(exist_ok=True)
        shutil.copy(images/'x', images/name)
    def rename(d):
        for i, name in enumerate(file_names): d['images'][1+i]['file_name'] = name
    edit(annotations, rename)
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert not summary.notes.get('file found under another name')
    assert len(summary.dropped_images['file missing'])==len([n for n in file_names if n not in copies])


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_an_image_annotated_upright_is_stored_upright(tmp_path, orientation, file_format):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[5:20, 8:30] = 255                                                           # an upright white box
    stored = {5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels), 7: np.rot90(pixels, 2).transpose(1, 0, 2),
              8: np.rot90(pixels, 3)}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    options = dict(lossless=True) if file_format=='WEBP' else {}
    Image.fromarray(stored).save(tmp_path/'a', file_format, exif=exif, **options)
    image = dict(id=1, file_name='a', height=40, width=60)
    annotation = dict(id=1, image_id=1, category_id=1, bbox=[8, 5, 22, 15], area=330, iscrowd=0)
    (tmp_path/'a.json').write_text(json.dumps(dict(images=[image], annotations=[annotation],
                                                   categories=[dict(id=1, name='white')])))
    summary = dataset_convert(tmp_path, tmp_path/'a.json', tmp_path/'out', num_shards=1)
    example, = examples(summary.files)
    assert (example['height'], example['width'], example['format'])==(40, 60, 'png')
    (y1, x1, y2, x2), = np.round(example['boxes']).astype(int)
    found = np.asarray(Image.open(io.BytesIO(example['image']))).astype(int)
    assert found[y1:y2, x1:x2].mean()>250 and found.sum()<found[y1:y2, x1:x2].sum()*1.1
    if file_format!='TIFF': assert 'turned upright by its EXIF flag' in summary.notes   # Pillow turns a TIFF itself
    assert 'turned by an EXIF flag, which is ignored' not in summary.notes


@pytest.mark.parametrize('orientation, size', [
    *((orientation, size) for orientation in (1, 3, 6) for size in ({}, dict(height=60, width=100))),
    (6, dict(height=100, width=60))])
def test_all_ways_to_the_records_turn_an_image_alike(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.effect_noise((100, 60), 60).convert('RGB').save(tmp_path/'a.jpg', exif=exif)
    annotation = dict(id=1, image_id=1, category_id=1, bbox=[8, 5, 20, 30], area=600, iscrowd=0)
    path = tmp_path/'c.json'
    path.write_text(json.dumps(dict(images=[dict(id=1, file_name='a.jpg', **size)], annotations=[annotation],
                                    categories=[dict(id=1, name='car')])))
    tiles = tile_dataset(tmp_path, path, tmp_path/'tiles', Tiling((640, 640)))
    sources = [(path, tmp_path, {}), (path, tmp_path, {'car': 'van'}), (tiles.annotations_file, tiles.image_dir, {})]
    results = [convert_sources(source, folder, tmp_path/'out', f't{i}', num_shards=1, workers=1, class_map=class_map)
               for i,(source,folder,class_map) in enumerate(sources)]
    [[one], [two], [three]] = [examples(result.files) for result in results]
    is_upright = orientation==6 and size.get('height')!=60
    assert (one['height'], one['width'])==((100, 60) if is_upright else (60, 100))
    assert one['boxes'].round(3).tolist()==[[5, 8, 35, 28]]
    for other in (two, three):
        assert np.allclose(other['boxes'], one['boxes'], atol=1e-3)
        assert (other['height'], other['width'])==(one['height'], one['width'])
    assert two['image']==one['image'] and results[1].notes.keys()-results[0].notes.keys()==set()


@pytest.mark.parametrize('orientation', [None, 1, 2, 3, 4])
def test_an_image_with_exchanged_sides_is_left_out(toy_dataset, orientation):
    images, annotations, out = toy_dataset
    exif = Image.Exif()
    if orientation: exif[0x112] = orientation
    Image.new('RGB', (128, 100)).save(images/'000002.jpg', exif=exif)
    edit(annotations, lambda d: d['images'][1].update(height=128, width=100))
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert summary.dropped_images=={'sides exchanged in the labels': [(2, '000002.jpg')]}
    assert summary.num_images==13


def test_records_of_another_file_are_not_overwritten(toy_dataset, tmp_path):
    images, annotations, out = toy_dataset
    (tmp_path/'other').mkdir()
    other = tmp_path/'other'/'train.json'
    shutil.copy(annotations, other)
    dataset_convert(images, annotations, out, num_shards=2)
    dataset_convert(images, other, out, num_shards=2)                                   # the same contents
    edit(other, lambda d: d['annotations'].pop())
    assert dataset_convert(images, other, out, num_shards=3).num_images==14             # the same file, edited
    before = {n: (out/n).read_bytes() for n in listing(out)}
    edit(annotations, lambda d: d['annotations'].clear())
    with pytest.raises(ValueError, match='records of another file with the tag train, .*other/train.json, which would'):
        dataset_convert(images, annotations, out, num_shards=3)
    assert {n: (out/n).read_bytes() for n in listing(out) if not n.startswith('.')}=={
        n: data for n, data in before.items() if not n.startswith('.')}


def test_categories_of_one_name_are_counted_apart(toy_dataset):
    images, annotations, out = toy_dataset
    edit(annotations, lambda d: [c.update(name='shape') for c in d['categories'][:2]])
    expected = sum(a['bbox'][0] + a['bbox'][2] <= 128 for a in json.loads(annotations.read_text())['annotations'])
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert summary.num_boxes==expected and {'shape (id 1)', 'shape (id 2)'} < {*summary.boxes_by_name}
    report = json.loads((out/'train_report.json').read_text())
    assert report['boxes']==sum(report['boxes_by_category'].values())


def test_other_formats_and_unusual_images_are_noted(toy_dataset):
    images, annotations, out = toy_dataset
    with Image.open(images/'000001.jpg') as im:
        im.save(images/'a.bmp'), im.convert('L').save(images/'g.jpg'), im.resize((64, 64)).save(images/'s.jpg')
        exif = Image.Exif()
        exif[0x112] = 6
        im.save(images/'e.jpg', exif=exif)
    edit(annotations,
         lambda d: [d['images'][5 + i].update(file_name=n) for i, n in enumerate(('a.bmp', 'g.jpg', 's.jpg', 'e.jpg'))])
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert summary.notes == {'BMP turned into PNG': ['a.bmp'], 'L instead of RGB, converted when read': ['g.jpg'],
                             'labels and file disagree about the size': ['s.jpg'],
                             'turned by an EXIF flag, which is ignored': ['e.jpg']}
    bmp = next(e for e in examples(summary.files) if e['filename'] == 'a.bmp')
    assert bmp['format'] == 'png'
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bmp['image']))), np.asarray(Image.open(images/'a.bmp')))


def truncate(path): path.write_bytes(path.read_bytes()[:-200])


nan, inf = float('nan'), float('inf')


def box(i=0, **kw): return lambda images, d: d['annotations'][i].update(kw)
def entry(i=0, **kw): return lambda images, d: d['images'][i].update(kw)
def remove_file(name): return lambda images, d: (images/name).unlink()
def file(name, change): return lambda images, d: change(images/name)
def copy(part, i=0, **kw): return lambda images, d: d[part].append({**d[part][i], **kw})
def drop_key(part, key, i=0): return lambda images, d: d[part][i].pop(key)


def shrink(path):
    with Image.open(path) as im: small = im.resize((64, 64))
    small.save(path)


def add_exif_rotation(path):
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(path) as im: im.load()
    im.save(path, exif=exif)


def as_mode(mode, **kw):
    def change(path):
        with Image.open(path) as im: other = im.convert(mode)
        if mode == 'I;16': other = Image.fromarray(np.asarray(other) << 8)
        other.save(path, **kw)
    return change


# what is done to the file -> where the summary must have it, under which reason, with which items
faults = {
    'box beyond the right edge': (box(bbox=[100, 5, 40, 9]), 'dropped_boxes', 'out of bounds', [(1, 1)]),
    'box beyond the lower edge': (box(bbox=[5, 100, 9, 40]), 'dropped_boxes', 'out of bounds', [(1, 1)]),
    'negative x': (box(bbox=[-2, 5, 9, 9]), 'dropped_boxes', 'out of bounds', [(1, 1)]),
    'negative y': (box(bbox=[5, -1.5, 9, 9]), 'dropped_boxes', 'out of bounds', [(1, 1)]),
    'zero width': (box(bbox=[5, 5, 0, 9]), 'dropped_boxes', 'no size', [(1, 1)]),
    'negative height': (box(bbox=[5, 5, 9, -2]), 'dropped_boxes', 'no size', [(1, 1)]),
    'NaN': (box(bbox=[nan, 5, 9, 9]), 'dropped_boxes', 'not finite', [(1, 1)]),
    'infinite': (box(bbox=[5, 5, inf, 9]), 'dropped_boxes', 'not finite', [(1, 1)]),
    'three numbers': (box(bbox=[5, 5, 9]), 'dropped_boxes', 'not four numbers', [(1, 1)]),
    'no bbox': (drop_key('annotations', 'bbox'), 'dropped_boxes', 'incomplete', [(1, 1)]),
    'annotation twice': (copy('annotations'), 'dropped_boxes', 'annotation stands twice', [(1, 1)]),
    'annotation id shared': (copy('annotations', bbox=[5, 5, 9, 9]), 'notes', 'annotation id of different objects',
                             [1]),
    'unknown category': (box(category_id=7), 'dropped_boxes', 'unknown category', [(1, 1)]),
    'category is a list': (box(category_id=[1]), 'dropped_boxes', 'unknown category', [(1, 1)]),
    'unknown image': (box(image_id=99), 'dropped_boxes', 'unknown image', [(99, 1)]),
    'image id twice': (copy('images', 1, file_name='000001.jpg'), 'dropped_images', 'image id used twice',
                       [(2, '000001.jpg')]),
    'image without file name': (drop_key('images', 'file_name', 1), 'dropped_images', 'incomplete', [(2, None)]),
    'file name is a number': (entry(1, file_name=3), 'dropped_images', 'file name is no text', [(2, 3)]),
    'missing picture': (remove_file('000002.jpg'), 'dropped_images', 'file missing', [(2, '000002.jpg')]),
    'not an image': (file('000002.jpg', lambda p: p.write_bytes(b'hello')), 'dropped_images', 'not an image',
                      [(2, '000002.jpg')]),
    'empty picture': (file('000002.jpg', lambda p: p.write_bytes(b'')), 'dropped_images', 'not an image',
                      [(2, '000002.jpg')]),
    'broken jpeg': (file('000002.jpg', truncate), 'dropped_images', 'file damaged', [(2, '000002.jpg')]),
    'broken png': (file('000005.png', truncate), 'dropped_images', 'file damaged', [(5, '000005.png')]),
    'size disagrees': (file('000002.jpg', shrink), 'notes', 'labels and file disagree about the size', ['000002.jpg']),
    'size missing': (drop_key('images', 'width', 1), 'notes', 'size missing in the labels', ['000002.jpg']),
    'size is text': (entry(1, height='128'), 'notes', 'size written as text', ['000002.jpg']),
    'size is text twice': (entry(1, height='128', width='128'), 'notes', 'size written as text', ['000002.jpg']),
    'size is zero twice': (entry(1, height=0, width=0), 'notes', 'size missing in the labels', ['000002.jpg']),
    'box is text': (box(bbox=['5', '5', '9.5', '9']), 'notes', 'bbox written as text', [1]),
    'nothing': (lambda images, d: d['annotations'].append(None), 'dropped_boxes', 'incomplete', [(None, None)]),
    'same box': (copy('annotations', id=99), 'notes', 'same box under two ids', [99]),
    'category without name': (lambda images, d: d['categories'][0].update(name=None), 'notes',
                              'category without a name, named after its id', ['category 1']),
    'EXIF': (file('000002.jpg', add_exif_rotation), 'notes', 'turned by an EXIF flag, which is ignored',
             ['000002.jpg']),
    'grey': (file('000002.jpg', as_mode('L')), 'notes', 'L instead of RGB, converted when read', ['000002.jpg']),
    'CMYK': (file('000002.jpg', as_mode('CMYK')), 'notes', 'CMYK instead of RGB, converted when read', ['000002.jpg']),
    '16 bit': (file('000005.png', as_mode('I;16')), 'notes', 'I;16 instead of RGB, converted when read',
               ['000005.png']),
    'BMP': (file('000002.jpg', as_mode('RGB', format='BMP')), 'notes', 'BMP turned into PNG', ['000002.jpg']),
    'WebP': (file('000002.jpg', as_mode('RGB', format='WEBP')), 'notes', 'WEBP turned into PNG', ['000002.jpg']),
    'no crowd flag': (drop_key('annotations', 'iscrowd'), 'notes', 'iscrowd missing, taken as 0', [1]),
    'no area': (drop_key('annotations', 'area'), 'notes', 'area missing, taken from the box', [1]),
    'area is NaN': (box(area=nan), 'notes', 'area missing, taken from the box', [1]),
    'no mask': (box(3, segmentation=[]), 'notes', 'no usable mask, an empty one written', [4]),
    'odd mask': (box(3, segmentation='x'), 'notes', 'no usable mask, an empty one written', [4]),
    'mask of numbers': (box(3, segmentation=[3, 4]), 'notes', 'no usable mask, an empty one written', [4]),
    'mask of another size': (box(3, segmentation=dict(size=[9, 9], counts=[81])), 'notes',
                             'no usable mask, an empty one written', [4]),
    'short polygon': (box(3, segmentation=[[5, 5, 9, 9], [0, 0, 60, 0, 60, 60]]), 'notes',
                      'polygons of fewer than three points, left out', [4]),
}


@pytest.mark.parametrize('damage,where,reason,items', faults.values(), ids=faults)
def test_every_fault_is_reported_and_costs_no_more_than_it_must(toy_dataset, damage, where, reason, items):
    images, annotations, out = toy_dataset
    # without the toy_dataset oddity
    edit(annotations,
         lambda d: d.update(annotations=[a for a in d['annotations'] if a['bbox'][0] + a['bbox'][2] <= 128]))
    edit(annotations, lambda d: damage(images, d))
    summary = dataset_convert(images, annotations, out, num_shards=2, include_masks=True)
    assert getattr(summary, where) == {reason: items}
    lost_images = len(items) if where == 'dropped_images' and reason != 'image id used twice' else 0
    left_out = sum(map(len, summary.dropped_boxes.values()))
    assert summary.num_images == 14 - lost_images == len(examples(summary.files))
    assert sum(summary.boxes_by_name.values()) == len(json.loads(annotations.read_text())['annotations']) - left_out
    said = repr(summary)
    assert reason in said and f'{len(items):>9,}  such as' in said
    report = json.loads((out/'train_report.json').read_text())
    of_it, = (o for o in report['reasons'] if o['reason'] == reason)
    assert of_it['count'] == len(items) and report['images'] == summary.num_images
    if where != 'notes': assert of_it['cure'] and of_it['serious']
    serious = [o for o in report['reasons'] if o['serious']]
    if serious:
        before = {n: (out/n).read_bytes() for n in listing(out)}
        with pytest.raises(ValueError, match='--strict allows none. Nothing was written') as e:
            dataset_convert(images, annotations, out, num_shards=3, include_masks=True, strict=True)
        assert reason in str(e.value) and {n: (out/n).read_bytes() for n in listing(out)} == before
    else:
        assert dataset_convert(images, annotations, out, num_shards=2, strict=True, include_masks=True).num_images == 14


hopeless = {
    'all pictures missing': (lambda i, a: shutil.rmtree(i) or i.mkdir(), FileNotFoundError,
                             'all 14 images are missing, such as 000001.jpg'),
    'malformed JSON': (lambda i, a: a.write_text('{"images": ['), CocoError, 'not valid JSON'),
    'no list': (lambda i, a: edit(a, lambda d: d.pop('categories')), CocoError, '"categories" is missing'),
    'no images': (lambda i, a: edit(a, lambda d: d.update(images=[], annotations=[])), ValueError, 'no images'),
    'no annotations file': (lambda i, a: a.unlink(), FileNotFoundError, 'train.json: no such file'),
    'no box left': (lambda i, a: edit(a, lambda d: [o.update(bbox=[5, 5, 0, 0]) for o in d['annotations']]), ValueError,
                    'nothing usable is left, 14 images with 0 boxes'),
    'only images without file name': (lambda i, a: edit(a, lambda d: [o.pop('file_name') for o in d['images']]),
                                      CocoError, 'none of the 14 images can be used: images.0. has no file_name'),
    'corners': (lambda i, a: edit(a, lambda d: [o.update(bbox=[30+k, 40, 120, 90+k])
                                                for k, o in enumerate(d['annotations'])]),
                CocoError, 'look like corners'),
    'no picture left': (lambda i, a: [p.write_bytes(b'x') for p in i.iterdir()], ValueError,
                        'nothing usable is left, 0 images'),
}


@pytest.mark.parametrize('damage,error,message', hopeless.values(), ids=hopeless)
@pytest.mark.parametrize('earlier', [False, True], ids=['fresh', 'over-an-earlier-one'])
def test_a_conversion_that_fails_leaves_everything_as_it_was(toy_dataset, damage, error, message, earlier):
    images, annotations, out = toy_dataset
    out = out/'deep'/'er'
    if earlier: dataset_convert(images, annotations, out, num_shards=3, include_masks=True)
    before = {n: (out/n).read_bytes() for n in listing(out)} if earlier else None
    damage(images, annotations)
    with pytest.raises(error, match=message):
        dataset_convert(images, annotations, out, num_shards=2, include_masks=True)
    if earlier: assert {n: (out/n).read_bytes() for n in listing(out)} == before
    else: assert not out.parents[0].exists()


def test_workers_report_all_faults(toy_dataset):
    images, annotations, out = toy_dataset
    for n in (1, 6, 9): (images/f'{n:06d}.jpg').write_bytes(b'x')
    (images/'000003.jpg').unlink()
    edit(annotations,
         lambda d: [box(i, bbox=[0, 0, 999, 9])(images, d) for i, a in enumerate(d['annotations'])
                    if a['image_id'] == 7])
    summary = dataset_convert(images, annotations, out, num_shards=4, workers=2)
    assert {k: len(v) for k, v in summary.dropped_images.items()} == {'not an image': 3, 'file missing': 1}
    assert summary.num_images == 10
    assert {i for i, _ in summary.dropped_boxes['out of bounds']} == {4, 7}
    assert {i for i, _ in summary.dropped_boxes['of an image left out']} == {1, 3, 6, 9} - {2}
    with Image.open(out/'train_report.png') as im: assert im.size == (166, 166)             # image 7 or 4, and a margin
    assert 'not an image' in repr(summary) and summary.counts['images_left_out'] == 4


def test_the_report_shows_the_image_with_the_most_faults(toy_dataset):
    images, annotations, out = toy_dataset
    edit(annotations, lambda d: [a.update(bbox=[-20, -20, 30, 30]) for a in d['annotations'] if a['image_id'] == 9])
    many = dataset_convert(images, annotations, out, num_shards=1)
    assert worst_image_id(many.report) == 9
    report_png = np.asarray(Image.open(out/'train_report.png')).astype(int)
    red = (report_png[..., 0] > 180) & (report_png[..., 1] < 80)
    # outlines in the margin, where the boxes are
    assert red[:19].any() and red[:, :19].any()
    edit(annotations,
         lambda d: d.update(annotations=[a for a in d['annotations'] if min(a['bbox']) >= 0
                                         and a['bbox'][0] + a['bbox'][2] <= 128]))
    dataset_convert(images, annotations, out, num_shards=1)
    assert not (out/'train_report.png').exists()


@pytest.mark.parametrize('bbox,kept', [([-.5, 5, 20, 20], [5, 0, 25, 19.5]),
                                       ([100, 120, 28.01, 9], [120, 100, 128, 128]),
                                       ([10, -1, 20, 20], [0, 10, 19, 30]), ([-.9, 3, .5, 9], None)])
def test_a_box_within_a_pixel_of_the_edge_is_cut_and_counted(toy_dataset, bbox, kept):
    images, annotations, out = toy_dataset
    edit(annotations, lambda d: d['annotations'][0].update(bbox=bbox))
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert ((1, 1) in summary.clipped_boxes) == bool(kept)
    first = next(e for e in examples(summary.files) if e['source_id'] == '1')
    if kept: np.testing.assert_allclose(first['boxes'][0], kept, atol=1e-4)
    else: assert (1, 1) in summary.dropped_boxes['out of bounds']


def test_clip_keeps_what_remains_of_a_box_and_strict_accepts_it(toy_dataset):
    images, annotations, out = toy_dataset
    edit(annotations, lambda d: d['annotations'][0].update(bbox=[-5, 110, 30, 40]))
    summary = dataset_convert(images, annotations, out, num_shards=1, clip=True, strict=True)
    assert (1, 1) in summary.clipped_boxes and len(summary.clipped_boxes) == 2 and not summary.dropped_boxes
    first = next(e for e in examples(summary.files) if e['source_id'] == '1')
    np.testing.assert_allclose(first['boxes'][0], [110, 0, 128, 25], atol=1e-4)
    assert json.loads((out/'train_warnings.json').read_text())['1'] == {'box': [1], 'mask': []}


@pytest.mark.parametrize('kw,message',
                         [(dict(num_shards=0), 'num_shards: 0'), (dict(tag='a/b'), 'tag'), (dict(tag=''), 'tag'),
                          (dict(tag='a*'), 'tag'), (dict(workers=0), 'workers: 0'), (dict(tag='..'), 'tag'),
                          (dict(tag='.t'), 'tag'), (dict(num_shards=10_001), 'num_shards: 10001'),
                          (dict(num_shards=10**9), 'num_shards'), (dict(num_shards=-5), 'num_shards')])
def test_bad_arguments_are_rejected_before_anything_is_written(toy_dataset, kw, message):
    with pytest.raises(ValueError, match=message): dataset_convert(*toy_dataset, **kw)
    assert not toy_dataset[2].exists()


def test_an_output_path_that_is_a_file_is_rejected(toy_dataset):
    images, annotations, out = toy_dataset
    out.write_text('mine')
    for path in (out, out/'deeper'):
        with pytest.raises(ValueError, match='is a file'): dataset_convert(images, annotations, path)
    assert out.read_text() == 'mine'
    with pytest.raises(FileNotFoundError, match='no such folder'):
        dataset_convert(images/'no', annotations, out.parent/'o')


def test_the_number_of_shards_follows_the_images_unless_given(toy_dataset, capsys):
    images, annotations, out = toy_dataset
    assert len(dataset_convert(images, annotations, out, tag='auto').files) == 14
    assert 'fewer than 256 images' in capsys.readouterr().err
    assert [choose_num_shards('t', None, n) for n in (1, 16, 255, 256, 100_000)] == [1, 16, 255, 256, 256]
    given = dataset_convert(images, annotations, out, tag='given', num_shards=20)
    assert '6 of the 20 shards will be empty, since there are 14 images' in capsys.readouterr().err
    assert len(given.files) == 20 and given.files[19].stat().st_size == 0 and list(read_records(given.files[19])) == []
    assert load_sidecar(out/'given-*').num_images == 14


def test_shards_of_two_conversions_do_not_mix(toy_dataset):
    images, annotations, out = toy_dataset
    dataset_convert(images, annotations, out, num_shards=6)
    dataset_convert(images, annotations, out, num_shards=2)                 # ours: replaced
    assert [n for n in listing(out) if n.endswith('tfrecord')] == ['train-00000-of-00002.tfrecord',
                                                                   'train-00001-of-00002.tfrecord']
    (out/'train-00000-of-00009.tfrecord').write_bytes(b'')                  # somebody else's: kept, refused
    with pytest.raises(ValueError, match='train-00000-of-00009.tfrecord is of another conversion'):
        dataset_convert(images, annotations, out, num_shards=3)
    assert (out/'train-00000-of-00009.tfrecord').exists() and load_sidecar(out/'train-*-of-00002*').num_images == 14


def test_shards_of_unknown_origin_are_not_replaced_by_shards_of_the_same_names(toy_dataset):
    images, annotations, out = toy_dataset
    dataset_convert(images, annotations, out, num_shards=2)
    before = {path.name: path.read_bytes() for path in out.glob('*.tfrecord')}
    (out/'train_records.json').unlink()                                     # as in a folder of TAO's records
    with pytest.raises(ValueError, match='2 files such as train-00000-of-00002.tfrecord are of another conversion'):
        dataset_convert(images, annotations, out, num_shards=2)
    assert {path.name: path.read_bytes() for path in out.glob('*.tfrecord')} == before


@pytest.mark.parametrize('options', [{}, dict(class_map={'circle': 'ball'})], ids=['plain', 'with-a-map'])
@pytest.mark.parametrize('name', ['train_records.json', 'train_warnings.json', 'train_report.json', 'train_report.png'])
def test_files_beside_the_shards_replace_no_file_of_the_user(toy_dataset, name, options):
    images, annotations, out = toy_dataset
    out.mkdir()
    source = shutil.copy(annotations, out/name) if name.endswith('.json') else annotations
    shutil.copy(annotations, out/name)
    with pytest.raises(ValueError, match=f'{name}: exists and was not written by dataset_convert'):
        convert_sources(source, images, out, 'train', num_shards=2, **options)
    assert (out/name).read_bytes()==annotations.read_bytes() and listing(out)==[name]


def test_files_beside_the_shards_replace_those_of_earlier_conversions(toy_dataset):
    images, annotations, out = toy_dataset
    dataset_convert(images, annotations, out, num_shards=2)
    before = listing(out)
    assert {'train_warnings.json', 'train_report.png'} < {*before}
    sidecar = out/'train_records.json'
    contents = json.loads(sidecar.read_text())
    del contents['annotations_path'], contents['annotations_sha256']                   # written by an earlier version
    sidecar.write_text(json.dumps(contents))
    assert dataset_convert(images, annotations, out, num_shards=2).num_images==14 and listing(out)==before
    for path in (sidecar, *out.glob('*.tfrecord')): path.unlink()                       # as the messages advise
    assert dataset_convert(images, annotations, out, num_shards=2).num_images==14 and listing(out)==before


def test_boxes_of_categories_of_one_name_are_added_before_names_are_compared():
    report = ConversionReport(boxes_by_category=Counter({1:76, 2:1, 9:0}))
    counts = convert._boxes_by_name({1:'raccoon', 2:'racoon', 9:'raccoon'}, report)
    assert counts == {'raccoon':76, 'racoon':1}
    convert.note_similar_names(counts, report)
    assert '--map_classes racoon=raccoon' in sum(report.notes.values(), [])


def test_the_sidecar_describes_the_shards(toy_dataset):
    images, annotations, out = toy_dataset
    summary = dataset_convert(images, annotations, out, num_shards=3)
    known = load_sidecar(out/'train*')
    assert known.num_images == 14
    assert list(known.files) == [str(f) for f in summary.files] == find_record_files(out/'train*')
    found = examples(summary.files)
    assert known.max_boxes == max(len(e['boxes']) for e in found)
    assert sum(known.boxes_by_category.values()) == sum(len(e['boxes']) for e in found)
    assert [known.classes.class_name(c) for c in range(3)] == ['circle', 'square', 'triangle']
    assert known.classes.num_classes == 4
    for s in json.loads((out/'train_records.json').read_text())['shards']:
        assert hashlib.sha256((out/s['file']).read_bytes()).hexdigest() == s['sha256']
    assert str(out.parent) not in (out/'train_records.json').read_text()
    truncate(summary.files[1])
    with pytest.raises(ValueError, match='train-00001-of-00003.tfrecord: .* bytes, but'): load_sidecar(out/'train*')
    (out/'train_records.json').unlink()
    assert load_sidecar(out/'train*') is None and load_sidecar(out/'nothing*') is None


def test_two_conversions_can_share_a_pattern_if_their_classes_agree(toy_dataset):
    images, annotations, out = toy_dataset
    for tag in ('a', 'b'): dataset_convert(images, annotations, out, tag=tag, num_shards=2)
    assert load_sidecar(out/'[ab]-*').num_images == 28
    edit(annotations, lambda d: d['categories'][0].update(name='disc'))
    dataset_convert(images, annotations, out, tag='b', num_shards=2)
    with pytest.raises(ValueError, match='different categories'): load_sidecar(out/'[ab]-*')


def test_status_json_has_success_and_failure(toy_dataset, tmp_path):
    images, annotations, out = toy_dataset
    dataset_convert(images, annotations, out, num_shards=2, results_dir=tmp_path/'res')
    events = [json.loads(o) for o in (tmp_path/'res'/'status.json').read_text().splitlines()]
    assert [e['status'] for e in events] == ['STARTED', 'RUNNING', 'SUCCESS']
    assert events[1]['kpi']['images'] == 14 and events[1]['kpi']['boxes_left_out'] == 1
    annotations.unlink()
    with pytest.raises(FileNotFoundError):
        dataset_convert(images, annotations, out, num_shards=2, results_dir=tmp_path/'bad')
    assert json.loads((tmp_path/'bad'/'status.json').read_text().splitlines()[-1])['status'] == 'FAILURE'


def copies(annotations, n):
    "Makes the 14 pictures n."
    data = json.loads(annotations.read_text())
    boxes = {i: [a for a in data['annotations'] if a['image_id'] == i] for i in range(1, 15)}
    images = [dict(data['images'][i % 14], id=i + 1) for i in range(n)]
    annotations.write_text(json.dumps(dict(images=images,
                                           annotations=[dict(a, id=i*100 + k, image_id=i + 1) for i in range(n)
                                                        for k, a in enumerate(boxes[i % 14 + 1])],
                                           categories=data['categories'])))


@pytest.mark.skipif(sys.platform == 'win32', reason='signals differ')
@pytest.mark.parametrize('how', ['SIGINT', 'SIGKILL'])
def test_an_interrupted_conversion_continues_to_the_same_bytes(toy_dataset, tmp_path, how, capsys):
    images, annotations, out = toy_dataset
    copies(annotations, 1500)
    code = f'''
from effdet_nb.data.convert import dataset_convert
dataset_convert({str(images)!r}, {str(annotations)!r}, {str(out)!r}, workers=2, num_shards=32)
'''
    run = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, start_new_session=True,
                           # a shell starts background jobs deaf to it, and so their children
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 60
    while len(list(out.glob('.train.part/train-0*.json'))) < 3 and time.time() < deadline: time.sleep(.01)
    os.killpg(run.pid, getattr(signal, how))
    error = run.communicate(timeout=60)[1]
    assert run.returncode != 0 and (how == 'SIGKILL' or 'continue from the complete shards' in error)
    hidden = {'.train.part', '.train.lock'} if how == 'SIGKILL' else {'.train.part'}
    assert {p.name for p in out.iterdir()} == hidden                                    # nothing under a final name
    done = {p.name: p.with_suffix('.tfrecord').stat().st_ino for p in (out/'.train.part').glob('train-0*.json')}
    assert 3 <= len(done) < 32
    summary = dataset_convert(images, annotations, out, num_shards=32, workers=2)
    assert f'continuing, {len(done)} of 32 shards were complete' in capsys.readouterr().err
    # not written again
    assert all((out/n.replace('.json', '.tfrecord')).stat().st_ino == inode for n, inode in done.items())
    straight = dataset_convert(images, annotations, tmp_path/'straight', num_shards=32, workers=1)
    for n in listing(out): assert (out/n).read_bytes() == (tmp_path/'straight'/n).read_bytes(), n
    assert listing(out) == listing(tmp_path/'straight') and repr(summary) == repr(straight)


@pytest.mark.skipif(sys.platform == 'win32', reason='signals differ')
def test_workers_end_when_their_parent_is_killed():
    code = '''
import os, time
from effdet_nb.data.workers import worker_pool
with worker_pool(2) as pool:
    print([pool.submit(os.getpid).result() for _ in range(2)] and "ready", flush=True)
    time.sleep(60)
'''
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'ready\n'
    run.kill()
    # the pipe closes when the last of them has gone
    assert run.communicate(timeout=20)[0] == ''


def interrupt_after(toy_dataset, num_shards, first):
    "A conversion that was stopped after its first shards."
    images, annotations, out = toy_dataset
    started = []
    whole = workers.write_shard
    def write_first_shards(job):
        if len(started) == first: raise KeyboardInterrupt
        started.append(job)
        return whole(job)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(workers, 'write_shard', write_first_shards)
        with pytest.raises(KeyboardInterrupt): dataset_convert(images, annotations, out, num_shards=num_shards)


@pytest.mark.parametrize('change',
                         ['picture', 'missing image', 'note', 'shard', 'shard of zeros', 'json', 'shards'])
def test_a_shard_is_written_again_if_its_input_has_changed(toy_dataset, tmp_path, change):
    images, annotations, out = toy_dataset
    interrupt_after(toy_dataset, 4, 2)
    part, count = out/'.train.part', 4
    if change == 'picture': file('000001.jpg', as_mode('L'))(images, None)
    if change == 'missing image': (images/'000001.jpg').unlink()
    if change == 'note': (part/'train-00000-of-00004.json').write_text('{"shard":')
    if change == 'shard': truncate(part/'train-00000-of-00004.tfrecord')
    # a power cut before the disk had it
    if change == 'shard of zeros': (p := part/'train-00000-of-00004.tfrecord').write_bytes(bytes(p.stat().st_size))
    if change == 'json': edit(annotations, lambda d: d['annotations'].pop(0))
    if change == 'shards': count = 5
    summary = dataset_convert(images, annotations, out, num_shards=count)
    straight = dataset_convert(images, annotations, tmp_path/'straight', num_shards=count)
    assert [f.read_bytes() for f in summary.files] == [f.read_bytes() for f in straight.files] and not part.exists()
    assert (out/'train_records.json').read_bytes() == (tmp_path/'straight'/'train_records.json').read_bytes()


def test_a_full_disk_keeps_finished_shards(toy_dataset, monkeypatch, capsys):
    images, annotations, out = toy_dataset
    whole = shards.write_records
    def full(path, records, **kw):
        if '00002' in path.name[:12]: raise OSError(28, 'No space left on device')
        return whole(path, records, **kw)
    monkeypatch.setattr(shards, 'write_records', full)
    with pytest.raises(OSError, match='No space left'): dataset_convert(images, annotations, out, num_shards=4)
    monkeypatch.undo()
    assert dataset_convert(images, annotations, out, num_shards=4).num_images == 14
    assert 'continuing, 2 of 4 shards' in capsys.readouterr().err


# --- beyond one machine ---

@pytest.mark.slow
def test_beam_writes_identical_records_with_two_workers(toy_dataset, tmp_path):
    pytest.importorskip('apache_beam', reason='needs the extra [beam]')
    images, annotations, out = toy_dataset
    (images/'000003.jpg').unlink()
    here = dataset_convert(images, annotations, tmp_path/'here', num_shards=5, include_masks=True, workers=1)
    beam = dataset_convert(images, annotations, out, num_shards=5, include_masks=True, workers=2, runner='local')
    assert listing(out) == listing(tmp_path/'here') and repr(beam) == repr(here)
    for n in listing(out): assert (out/n).read_bytes() == (tmp_path/'here'/n).read_bytes(), n


def test_without_beam_an_error_says_how_to_install_it(toy_dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    with pytest.raises(ImportError, match=r'Apache Beam is not installed .* pip install "effdet_nb\[beam\]"'):
        dataset_convert(*toy_dataset, num_shards=2, runner='FlinkRunner')
    assert workers._beam_options('FlinkRunner', ['--flink_master=h:1'], None) == ['--runner=FlinkRunner',
                                                                                  '--flink_master=h:1']


def test_reports_of_earlier_versions_are_read():
    data = ConversionReport().to_dict()
    data['dropped_images'] = {'not a picture': [[3, 'a.jpg']]}
    data['dropped_boxes'] = {'of a picture left out': [[3, 7]], 'no size': [[4, 8]]}
    report = ConversionReport.from_dict(data)
    assert report.dropped_images == {Fault.NOT_AN_IMAGE: [(3, 'a.jpg')]}
    assert report.dropped_boxes == {Fault.IMAGE_LEFT_OUT: [(3, 7)], Fault.NO_SIZE: [(4, 8)]}
    assert Fault('JSON and file disagree about the size') is Fault.SIZE_DIFFERS
    assert Fault('sides exchanged in the JSON') is Fault.SIDES_SWAPPED
    with pytest.raises(ValueError): Fault('no such fault')



@pytest.mark.parametrize('options', [{}, {'class_map': {'cat': 'dog'}}])
def test_images_that_lose_all_their_boxes_are_reported(tmp_path, options):
    (tmp_path/'images').mkdir()
    for i in range(1, 7): Image.new('RGB', (40, 40), (i*20, 90, 90)).save(tmp_path/'images'/f'{i}.png')
    boxes = [(1, 1, [5, 5, 0, 9]), (2, 2, [50, 5, 9, 9]), (3, 3, [5, 5, 'x', 9]),                  # all lost
             (4, 4, [5, 5, 0, 9]), (4, 5, [5, 5, 9, 9]), (5, 6, [5, 5, 9, 9]), (5, 6, [5, 5, 9, 9])] # some; a copy
    content = dict(images=[dict(id=i, file_name=f'{i}.png', height=40, width=40) for i in range(1, 7)],
                   categories=[dict(id=1, name='cat')],
                   annotations=[dict(id=k, image_id=i, category_id=1, bbox=bbox, iscrowd=0) for i, k, bbox in boxes])
    (tmp_path/'labels.json').write_text(json.dumps(content))
    result = convert_sources(tmp_path/'labels.json', tmp_path/'images', tmp_path/'records', num_shards=2, **options)
    notes = {reason.fault: items for reason, items in result.report.notes.items()}
    assert sorted(notes[Fault.ALL_LEFT_OUT]) == ['1.png', '2.png', '3.png']
    assert result.num_empty_images == 4


@pytest.mark.parametrize('image_id', [1, 2, '2', None])
def test_an_entry_that_is_left_out_hides_no_image_without_boxes(tmp_path, image_id):
    for name in 'abc': Image.effect_noise((60, 50), 60).convert('RGB').save(tmp_path/f'{name}.jpg')
    images = [dict(id=11+i, file_name=f'{name}.jpg', height=50, width=60) for i,name in enumerate('abc')]
    annotations = [dict(id=i, image_id=11+i, category_id=1, bbox=[5, 5, 20*(i!=1), 9], area=1, iscrowd=0)
                   for i in range(3)]
    (tmp_path/'c.json').write_text(json.dumps(dict(
        images=[*images, dict(id=image_id, file_name=None)], annotations=annotations,
        categories=[dict(id=1, name='car')])))
    for class_map in ({}, {'car': 'van'}):
        result = convert_sources(tmp_path/'c.json', tmp_path, tmp_path/'out', f't{len(class_map)}', num_shards=1,
                                 workers=1, class_map=class_map)
        assert result.notes[str(Fault.ALL_LEFT_OUT)]==['b.jpg'] and result.counts['images_left_out']==1


def test_images_without_a_class_that_the_user_leaves_out_are_not_reported(tmp_path):
    make_toy_dataset(tmp_path, num_train=6, num_val=1, image_hw=(64, 64), seed=0)
    result = convert_sources(tmp_path/'train.json', tmp_path/'train', tmp_path/'records', class_map={'circle': ''})
    assert result.num_empty_images and Fault.ALL_LEFT_OUT not in {reason.fault for reason in result.report.notes}


# --- real pictures ---

@pytest.mark.parametrize('split,image,annotation,kept', [('train', '171', 2288, 2804), ('val', '274', 3692, 1137)])
def test_bccd_loses_one_box_and_names_it(shared_dir, tmp_path, split, image, annotation, kept):
    data = shared_dir/'data'/'bccd'
    summary = dataset_convert(data/'images', data/f'{split}.json', tmp_path, num_shards=4)
    assert json.loads((tmp_path/f'{split}_warnings.json').read_text()) == {image: {'box': [annotation], 'mask': []}}
    assert sum(summary.boxes_by_name.values()) == kept
    assert {k: len(v) for k, v in summary.dropped_boxes.items()} == {'no size': 1}


@pytest.mark.parametrize('split,images,objects', [('train', 35, 425), ('val', 32, 359)])
def test_coco_mini_converts_with_masks(shared_dir, tmp_path, split, images, objects):
    data = shared_dir/'data'/'coco_mini'
    summary = dataset_convert(data/'images', data/f'{split}.json', tmp_path, include_masks=True, num_shards=4)
    assert summary.num_images == images and sum(summary.boxes_by_name.values()) == objects
    assert not summary.dropped_boxes and not summary.masks_outside_box
    found = examples(summary.files)
    assert sum(len(e['masks']) for e in found) == objects
    areas = np.array([(np.asarray(Image.open(io.BytesIO(m))).sum(), a, c) for e in found
                      for m, a, c in zip(e['masks'], e['area'], e['is_crowd'])])
    apart = abs(areas[:, 0] - areas[:, 1]) > np.maximum(50, .1*areas[:, 1])
    # three crowds with a published area that is larger than their mask
    assert apart.sum() <= 3 and areas[apart, 2].all()
    assert max(max(e['labels'], default=0) for e in found) <= 90
    assert load_sidecar(tmp_path/f'{split}-*').classes.num_classes == 81


def dataset_of_one_size(folder, json_hw, boxes, file_hw=(60, 80)):
    "Ten images of a size, with another size in the JSON and the same boxes each."
    (folder/'images').mkdir()
    for i in range(10): Image.new('RGB', file_hw[::-1], (9*i, 90, 50)).save(folder/'images'/f'{i}.png')
    images = [dict(id=i, file_name=f'{i}.png', height=json_hw[0], width=json_hw[1]) for i in range(10)]
    annotations = [dict(id=10*i+j, image_id=i, category_id=1, bbox=bbox, area=bbox[2]*bbox[3], iscrowd=0)
                   for i in range(10) for j, bbox in enumerate(boxes(i))]
    contents = dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])
    (folder/'a.json').write_text(json.dumps(contents))
    return dataset_convert(folder/'images', folder/'a.json', folder/'out', tag='t', num_shards=1, workers=1)


@pytest.mark.parametrize('json_hw, boxes', [
    ((30, 40), lambda i: [[40, 30, 40, 30]]), ((6, 8), lambda i: [[2, 2, 3, 3], [30, 20, 10, 10]]),
    ((59, 20), lambda i: [[15+i, 10, 20, 30]]), ((30, 40), lambda i: [[50, 5, 9, 9]][:i%2])])
def test_sizes_in_the_json_that_are_too_small_for_the_boxes_stop_the_conversion(tmp_path, json_hw, boxes):
    with pytest.raises(ValueError, match=r'a.json: the boxes of .* such as .\.png, extend beyond'):
        dataset_of_one_size(tmp_path, json_hw, boxes)
    assert not [*(tmp_path/'out').glob('t-*')]
    contents = json.loads((tmp_path/'a.json').read_text())
    for image in contents['images']: del image['height'], image['width']
    (tmp_path/'a.json').write_text(json.dumps(contents))
    result = dataset_convert(tmp_path/'images', tmp_path/'a.json', tmp_path/'out', tag='t', num_shards=1, workers=1)
    assert sum(result.boxes_by_name.values()) == sum(len(boxes(i)) for i in range(10))


@pytest.mark.parametrize('json_hw, boxes', [
    ((30, 40), lambda i: [[10, 10, 35 if i == 3 else 20, 10]]),     # one sloppy box; the files were scaled up
    ((30, 40), lambda i: [[9, 9, 9, 9], [10, 10, 90, 10]]), ((120, 160), lambda i: [[90, 70, 70, 50]])])
def test_sizes_in_the_json_stay_where_boxes_do_not_show_that_they_are_wrong(tmp_path, json_hw, boxes):
    result = dataset_of_one_size(tmp_path, json_hw, boxes)
    assert 'labels and file disagree about the size' in str(result)


@pytest.mark.parametrize('beyond', [2, 5, 9])
@pytest.mark.parametrize('num_sloppy', [2, 5])
def test_boxes_a_little_beyond_the_edge_do_not_show_wrong_sizes(tmp_path, beyond, num_sloppy):
    for i in range(5): Image.new('RGB', (200, 200)).save(tmp_path/f'{i}.png')        # scaled up after labelling
    images = [dict(id=i, file_name=f'{i}.png', height=100, width=100) for i in range(5)]
    boxes = {i: [dict(bbox=[60, 10, 40+beyond*(i<num_sloppy), 30])] for i in range(5)}
    coco = CocoDataset(images, boxes, [])
    assert without_wrong_sizes(coco, tmp_path)==(coco, [])


@pytest.mark.parametrize('orientation, json_hw, kept', [
    (6, (80, 60), True), (8, (80, 60), True), (1, (60, 80), True), (6, (60, 80), False), (1, (30, 40), False)])
def test_where_sizes_are_wrong_those_of_the_upright_files_stay(tmp_path, orientation, json_hw, kept):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    for i in range(6): Image.new('RGB', (80, 60)).save(tmp_path/f'{i}.jpg', **(dict(exif=exif) if i>3 else {}))
    images = [dict(id=i, file_name=f'{i}.jpg', height=30, width=40) for i in range(4)]
    images += [dict(id=i, file_name=f'{i}.jpg', height=json_hw[0], width=json_hw[1]) for i in (4, 5)]
    coco = CocoDataset(images, {i: [dict(bbox=[10, 5, 55, 30] if i<4 else [2, 2, 9, 9])] for i in range(6)}, [])
    changed, names = without_wrong_sizes(coco, tmp_path)
    assert names==[f'{i}.jpg' for i in range(4)]
    sizes = [(image['height'], image['width']) for image in changed.images]
    assert sizes==[(None, None)]*4 + [json_hw if kept else (None, None)]*2
