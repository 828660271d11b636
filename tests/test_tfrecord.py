"Guards for effdet_nb.data.tfrecord: bytes TensorFlow agrees with, nothing lost, nothing half-written."
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from effdet_nb.data.coco import CocoError
from effdet_nb.data.shapes import draw_dataset
from effdet_nb.data.tfrecord import (KEYS, dataset_convert, judge_box, load_sidecar, make_example, masked_crc, parse_example, read_example,
                                     read_records, record_files, write_records)


# --- the format ---

@given(st.lists(st.binary(max_size=300), max_size=8))
@settings(max_examples=40, deadline=None)
def test_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp('r')/'a.tfrecord'
    shard = write_records(path, records)
    assert list(read_records(path)) == records and shard.records == len(records)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and shard.size == path.stat().st_size


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_goes_unnoticed(tmp_path_factory, data):
    records = [b'first', b'second record', bytes(range(50))]
    path = tmp_path_factory.mktemp('r')/'a.tfrecord'
    write_records(path, records)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        ends = {0} | set(np.cumsum([len(r) + 16 for r in records]).tolist())  # a cut between records looks like a shorter file; the sidecar knows better
        raw = raw[:data.draw(st.integers(0, len(raw)).filter(lambda n: n not in ends))]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match='a.tfrecord, record'): list(read_records(path))


def test_crc_of_a_published_vector():
    "RFC 3720 B.4: 32 zero bytes have CRC-32C 0x8a9136aa; the mask is rotate right by 15, add a constant."
    crc = 0x8a9136aa
    assert masked_crc(bytes(32)) == ((crc >> 15 | crc << 17 & 0xffffffff) + 0xa282ead8) & 0xffffffff


@pytest.mark.parametrize('raw,message', [(b'\x1f\x8b\x08' + bytes(40), 'gzip'), (b'{"images": [], "x": 3}', 'no TFRecord file'), (b'abc', 'ends after 3 of 12'),
                                         (struct.pack('<Q', 1 << 40) + bytes(4), 'no TFRecord file')])
def test_files_that_are_no_records(tmp_path, raw, message):
    (tmp_path/'x').write_bytes(raw)
    with pytest.raises(ValueError, match=message): list(read_records(tmp_path/'x'))


values = st.one_of(st.lists(st.binary(max_size=9), min_size=1, max_size=4), st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4),
                   st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4))


@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_examples_come_back_and_are_deterministic(features):
    data = make_example(features)
    assert parse_example(data) == features
    assert make_example(dict(reversed(features.items()))) == data


@given(st.binary(max_size=60))
def test_parsing_nonsense_never_crashes(data):
    try: assert isinstance(parse_example(data), dict)
    except ValueError as e: assert 'tf.train.Example' in str(e)


def test_foreign_records_may_lack_area_and_crowd():
    e = read_example(make_example({'image/encoded': b'x', 'image/height': 10, 'image/width': 20, 'image/source_id': 'a7', 'image/object/bbox/xmin': [.5], 'image/object/bbox/xmax': [1.],
                                   'image/object/bbox/ymin': [0.], 'image/object/bbox/ymax': [.5], 'image/object/class/label': [3]}))
    assert e['boxes'].tolist() == [[0, 10, 5, 20]] and e['area'].tolist() == [50] and e['is_crowd'].tolist() == [False] and e['source_id'] == 'a7'
    with pytest.raises(ValueError, match='shard 3: has no image/encoded, image/width'): read_example(make_example({'image/height': 3}), 'shard 3')
    with pytest.raises(ValueError, match='equally long'): read_example(make_example({'image/encoded': b'x', 'image/height': 1, 'image/width': 1, 'image/object/class/label': [3]}))


def test_tensorflow_reads_the_same(tmp_path):
    tf = pytest.importorskip('tensorflow')
    data = draw_dataset(tmp_path/'s', 6, 4)
    summary = dataset_convert(data/'train', data/'train.json', tmp_path/'r', num_shards=2, include_masks=True)
    ours = [r for f in summary.files for r in read_records(f)]
    theirs = [r.numpy() for r in tf.data.TFRecordDataset([str(f) for f in summary.files])]
    assert ours == theirs                                           # framing and checksums agree
    for data in ours:
        mine, reference = parse_example(data), tf.train.Example.FromString(data)
        assert mine.keys() == reference.features.feature.keys() == KEYS.keys()
        for key, kind in KEYS.items():
            value = reference.features.feature[key]
            assert value.WhichOneof('kind') == dict(bytes='bytes_list', float='float_list', int='int64_list')[kind]
            assert list(getattr(value, value.WhichOneof('kind')).value) == mine[key]
        assert tf.io.decode_image(mine['image/encoded'][0]).shape == (128, 128, 3)
    with tf.io.TFRecordWriter(str(tmp_path/'tf.tfrecord')) as w:
        for r in ours: w.write(r)
    write_records(tmp_path/'ours.tfrecord', ours)
    assert (tmp_path/'tf.tfrecord').read_bytes() == (tmp_path/'ours.tfrecord').read_bytes()


def test_no_tensorflow_is_imported():
    code = 'import sys, effdet_nb.data.tfrecord; sys.exit(any(m in sys.modules for m in ("tensorflow", "keras", "matplotlib", "pycocotools")))'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# --- boxes ---

finite = st.floats(-1e6, 1e6)


@given(st.tuples(finite, finite, finite, finite), st.booleans())
def test_judged_boxes_lie_inside(bbox, clip):
    box, wrong = judge_box(bbox, (100, 150), clip)
    if box is None: assert wrong
    else:
        y1, x1, y2, x2 = box
        assert -1e-5 <= y1 < y2 <= 100 + 1e-5 and -1e-5 <= x1 < x2 <= 150 + 1e-5
        assert (wrong == '') or (clip and wrong == 'out of bounds')


@pytest.mark.parametrize('bbox,wrong', [([0, 0, 150, 100], ''), ([0, 0, 150.01, 100], 'out of bounds'), ([-.01, 0, 9, 9], 'out of bounds'), ([0, -1, 9, 9], 'out of bounds'),
                                        ([0, 99, 9, 2], 'out of bounds'), ([1, 1, 0, 5], 'no size'), ([1, 1, 5, 0], 'no size'), ([1, 1, -5, 5], 'no size'), ([1, 1, 5, 1e-12], 'no size'),
                                        ([float('nan'), 1, 5, 5], 'not finite'), ([1, 1, float('inf'), 5], 'not finite'), ([149.7, 0, .1 + .2, 9], '')])
def test_boxes_left_out(bbox, wrong): assert judge_box(bbox, (100, 150))[1] == wrong


# --- conversion ---

@pytest.fixture(scope='session')
def drawn_once(tmp_path_factory): return draw_dataset(tmp_path_factory.mktemp('drawn'), 14, 4)


@pytest.fixture
def drawn(tmp_path, drawn_once):
    folder = Path(shutil.copytree(drawn_once, tmp_path/'drawn'))
    return folder/'train', folder/'train.json', tmp_path/'out'


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def examples(files): return [read_example(r) for f in files for r in read_records(f)]
def listing(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*')) if Path(folder).exists() else None


def test_every_picture_and_box_arrives(drawn):
    images, annotations, out = drawn
    truth = json.loads(annotations.read_text())
    summary = dataset_convert(images, annotations, out, tag='t', num_shards=3)
    assert listing(out) == ['t-00000-of-00003.tfrecord', 't-00001-of-00003.tfrecord', 't-00002-of-00003.tfrecord', 't_records.json', 't_warnings.json']
    for k, f in enumerate(summary.files):
        assert [read_example(r)['source_id'] for r in read_records(f)] == [str(i['id']) for i in truth['images'][k::3]]
    for e in examples(summary.files):
        info = next(i for i in truth['images'] if str(i['id']) == e['source_id'])
        anns = [a for a in truth['annotations'] if a['image_id'] == info['id'] and a['bbox'][0] + a['bbox'][2] <= 128]
        assert e['image'] == (images/info['file_name']).read_bytes() and e['filename'] == info['file_name']
        assert e['format'] == ('png' if info['file_name'].endswith('png') else 'jpeg') and (e['height'], e['width']) == (128, 128)
        x, y, w, h = np.array([a['bbox'] for a in anns]).reshape(-1, 4).T
        np.testing.assert_allclose(e['boxes'], np.stack([y, x, y + h, x + w], -1), atol=1e-4)
        assert e['labels'].tolist() == [a['category_id'] for a in anns] and e['is_crowd'].tolist() == [bool(a['iscrowd']) for a in anns]
        np.testing.assert_allclose(e['area'], [a['area'] for a in anns])
    raw = parse_example(next(read_records(summary.files[0])))
    assert set(raw) == set(KEYS) - {'image/object/mask'} and raw['image/key/sha256'] == [hashlib.sha256(raw['image/encoded'][0]).hexdigest().encode()]


def test_workers_and_repeats_give_the_same_bytes(drawn, tmp_path):
    images, annotations, out = drawn
    digests = []
    for i, workers in enumerate((1, 2, 3, 1)):
        dataset_convert(images, annotations, tmp_path/str(i), num_shards=5, include_masks=True, workers=workers)
        digests.append({n: hashlib.sha256((tmp_path/str(i)/n).read_bytes()).hexdigest() for n in listing(tmp_path/str(i))})
    assert digests[0] == digests[1] == digests[2] == digests[3] and len(digests[0]) == 7


def test_a_script_without_main_guard_may_use_workers(drawn, tmp_path):
    images, annotations, out = drawn
    script = tmp_path/'script.py'
    script.write_text(f'from effdet_nb.data.tfrecord import dataset_convert\nprint("once")\nprint(dataset_convert({str(images)!r}, {str(annotations)!r}, {str(out)!r}, num_shards=4, workers=2).images)\n')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.split() == ['once', '14'], done.stderr


def test_masks_come_back(drawn):
    images, annotations, out = drawn
    summary = dataset_convert(images, annotations, out, include_masks=True, num_shards=1)
    for e in examples(summary.files):
        assert len(e['masks']) == len(e['boxes'])
        for png, area in zip(e['masks'], e['area']):
            mask = np.asarray(Image.open(io.BytesIO(png)))
            assert mask.shape == (128, 128) and set(np.unique(mask)) <= {0, 1} and abs(int(mask.sum()) - area) <= max(20, .08*area)
    assert not summary.masks_outside


def test_warnings_log_is_taos(drawn):
    images, annotations, out = drawn

    def spoil(d):
        d['images'][0]['id'] = 200365
        for a in d['annotations']:
            if a['image_id'] == 1: a['image_id'] = 200365
        first = d['annotations'][0]
        first['bbox'][0] = -4
        d['annotations'][1] |= dict(segmentation=[[5, 5, 100, 5, 100, 100]], bbox=[5, 5, 20, 95])
        d['annotations'].append(first | dict(id=918, bbox=[120, 5, 9, 9]))
    edit(annotations, spoil)
    summary = dataset_convert(images, annotations, out, include_masks=True, num_shards=2)
    log = json.loads((out/'train_warnings.json').read_text())
    assert log['200365'] == {'box': [1, 918], 'mask': [2]} and set(log) == {'200365', '4'} and log['4']['mask'] == []
    assert summary.dropped['out of bounds'][0][0] in (200365, 4) and len(summary.dropped['out of bounds']) == 3
    assert summary.masks_outside == [(200365, 2)]
    assert 'masks outside their box (kept)' in repr(summary)


def test_no_log_without_warnings_and_an_old_one_goes(drawn):
    images, annotations, out = drawn
    dataset_convert(images, annotations, out, num_shards=2)
    assert (out/'train_warnings.json').exists()
    edit(annotations, lambda d: d.update(annotations=[a for a in d['annotations'] if a['bbox'][0] + a['bbox'][2] <= 128]))
    assert dataset_convert(images, annotations, out, num_shards=2).warnings_file is None
    assert not (out/'train_warnings.json').exists()


def test_missing_crowd_and_area_are_derived(drawn):
    images, annotations, out = drawn
    edit(annotations, lambda d: [a.pop(k) for a in d['annotations'] for k in ('area', 'iscrowd')])
    for e in examples(dataset_convert(images, annotations, out, num_shards=1).files):
        np.testing.assert_allclose(e['area'], np.prod(e['boxes'][:, 2:] - e['boxes'][:, :2], -1), rtol=1e-4)
        assert not e['is_crowd'].any()


def test_other_formats_and_oddities_are_told(drawn):
    images, annotations, out = drawn
    with Image.open(images/'000001.jpg') as im:
        im.save(images/'a.bmp'), im.convert('L').save(images/'g.jpg'), im.resize((64, 64)).save(images/'s.jpg')
        exif = Image.Exif()
        exif[0x112] = 6
        im.save(images/'e.jpg', exif=exif)
    edit(annotations, lambda d: [d['images'][5 + i].update(file_name=n) for i, n in enumerate(('a.bmp', 'g.jpg', 's.jpg', 'e.jpg'))])
    summary = dataset_convert(images, annotations, out, num_shards=1)
    assert summary.notes == {'BMP turned into PNG': ['a.bmp'], 'L instead of RGB, converted when read': ['g.jpg'], 'JSON and file disagree about the size': ['s.jpg'],
                             'turned by an EXIF flag, which is ignored': ['e.jpg']}
    bmp = next(e for e in examples(summary.files) if e['filename'] == 'a.bmp')
    assert bmp['format'] == 'png' and np.array_equal(np.asarray(Image.open(io.BytesIO(bmp['image']))), np.asarray(Image.open(images/'a.bmp')))


def truncate(path): path.write_bytes(path.read_bytes()[:-200])


faults = {
    'missing picture': (lambda i, a: (i/'000002.jpg').unlink(), FileNotFoundError, '1 of 14 pictures are missing, such as 000002.jpg'),
    'not a picture': (lambda i, a: (i/'000002.jpg').write_bytes(b'hello'), ValueError, r'000002.jpg \(image 2\): not a picture'),
    'empty picture': (lambda i, a: (i/'000002.jpg').write_bytes(b''), ValueError, 'not a picture'),
    'broken jpeg': (lambda i, a: truncate(i/'000002.jpg'), ValueError, r'000002.jpg \(image 2\): image file is truncated'),
    'broken png': (lambda i, a: truncate(i/'000005.png'), ValueError, r'000005.png \(image 5\)'),
    'malformed JSON': (lambda i, a: a.write_text('{"images": ['), CocoError, 'not valid JSON'),
    'unknown category': (lambda i, a: edit(a, lambda d: d['annotations'][0].update(category_id=7)), CocoError, 'category_id 7 is not in categories: 1 box'),
    'no images': (lambda i, a: edit(a, lambda d: d.update(images=[], annotations=[])), ValueError, 'no images'),
    'no annotations file': (lambda i, a: a.unlink(), FileNotFoundError, 'train.json: no such file'),
    'no masks': (lambda i, a: edit(a, lambda d: d['annotations'][3].update(segmentation=[])), ValueError, 'objects have no segmentation, such as annotation 4'),
    'odd mask': (lambda i, a: edit(a, lambda d: d['annotations'][3].update(segmentation='x')), ValueError, 'annotation 4: segmentation is neither'),
    'mask size': (lambda i, a: edit(a, lambda d: d['annotations'][3].update(segmentation=dict(size=[9, 9], counts=[81]))), ValueError, r'annotation 4: mask of size \[9, 9\]'),
}


@pytest.mark.parametrize('spoil,error,message', faults.values(), ids=faults)
@pytest.mark.parametrize('earlier', [False, True], ids=['fresh', 'over-an-earlier-one'])
def test_faults_leave_everything_as_it_was(drawn, spoil, error, message, earlier):
    images, annotations, out = drawn
    out = out/'deep'/'er'
    if earlier: dataset_convert(images, annotations, out, num_shards=3, include_masks=True)
    before = {n: (out/n).read_bytes() for n in listing(out)} if earlier else None
    spoil(images, annotations)
    with pytest.raises(error, match=message): dataset_convert(images, annotations, out, num_shards=2, include_masks=True)
    if earlier: assert {n: (out/n).read_bytes() for n in listing(out)} == before
    else: assert not out.parents[0].exists()


def test_all_broken_pictures_are_named_also_by_workers(drawn):
    images, annotations, out = drawn
    for n in (1, 6, 9): (images/f'{n:06d}.jpg').write_bytes(b'x')
    with pytest.raises(ValueError, match='3 pictures cannot be converted. Nothing was written') as e: dataset_convert(images, annotations, out, num_shards=4, workers=2)
    assert all(f'{n:06d}.jpg' in str(e.value) for n in (1, 6, 9)) and not out.exists()


@pytest.mark.parametrize('kw,message', [(dict(num_shards=0), 'num_shards: 0'), (dict(tag='a/b'), 'tag'), (dict(tag=''), 'tag'), (dict(tag='a*'), 'tag'), (dict(workers=0), 'workers: 0')])
def test_bad_arguments(drawn, kw, message):
    with pytest.raises(ValueError, match=message): dataset_convert(*drawn, **kw)
    assert not drawn[2].exists()


def test_output_path_is_a_file(drawn):
    images, annotations, out = drawn
    out.write_text('mine')
    for path in (out, out/'deeper'):
        with pytest.raises(ValueError, match='is a file'): dataset_convert(images, annotations, path)
    assert out.read_text() == 'mine'
    with pytest.raises(FileNotFoundError, match='no such folder'): dataset_convert(images/'no', annotations, out.parent/'o')


def test_number_of_shards(drawn, capsys):
    images, annotations, out = drawn
    assert len(dataset_convert(images, annotations, out, tag='auto').files) == 14
    assert 'fewer than 256 pictures' in capsys.readouterr().err
    given = dataset_convert(images, annotations, out, tag='given', num_shards=20)
    assert len(given.files) == 20 and given.files[19].stat().st_size == 0 and list(read_records(given.files[19])) == []
    assert load_sidecar(out/'given-*').images == 14


def test_other_shard_counts_do_not_mix(drawn):
    images, annotations, out = drawn
    dataset_convert(images, annotations, out, num_shards=6)
    dataset_convert(images, annotations, out, num_shards=2)                 # ours: replaced
    assert [n for n in listing(out) if n.endswith('tfrecord')] == ['train-00000-of-00002.tfrecord', 'train-00001-of-00002.tfrecord']
    (out/'train-00000-of-00009.tfrecord').write_bytes(b'')                  # somebody else's: kept, refused
    with pytest.raises(ValueError, match='train-00000-of-00009.tfrecord are of another conversion'): dataset_convert(images, annotations, out, num_shards=3)
    assert (out/'train-00000-of-00009.tfrecord').exists() and load_sidecar(out/'train-*-of-00002*').images == 14


def test_sidecar(drawn):
    images, annotations, out = drawn
    summary = dataset_convert(images, annotations, out, num_shards=3)
    known = load_sidecar(out/'train*')
    assert known.images == 14 and list(known.files) == [str(f) for f in summary.files] == record_files(out/'train*')
    found = examples(summary.files)
    assert known.most_boxes == max(len(e['boxes']) for e in found) and sum(known.boxes_by_category.values()) == sum(len(e['boxes']) for e in found)
    assert [known.classes.name(c) for c in range(3)] == ['circle', 'square', 'triangle'] and known.classes.num_classes == 4
    for s in json.loads((out/'train_records.json').read_text())['shards']: assert hashlib.sha256((out/s['file']).read_bytes()).hexdigest() == s['sha256']
    assert str(out.parent) not in (out/'train_records.json').read_text()
    truncate(summary.files[1])
    with pytest.raises(ValueError, match='train-00001-of-00003.tfrecord: .* bytes, but'): load_sidecar(out/'train*')
    (out/'train_records.json').unlink()
    assert load_sidecar(out/'train*') is None and load_sidecar(out/'nothing*') is None


def test_two_conversions_one_pattern(drawn):
    images, annotations, out = drawn
    for tag in ('a', 'b'): dataset_convert(images, annotations, out, tag=tag, num_shards=2)
    assert load_sidecar(out/'[ab]-*').images == 28
    edit(annotations, lambda d: d['categories'][0].update(name='disc'))
    dataset_convert(images, annotations, out, tag='b', num_shards=2)
    with pytest.raises(ValueError, match='different categories'): load_sidecar(out/'[ab]-*')


def test_status_tells_success_and_failure(drawn, tmp_path):
    images, annotations, out = drawn
    dataset_convert(images, annotations, out, num_shards=2, results_dir=tmp_path/'res')
    events = [json.loads(o) for o in (tmp_path/'res'/'status.json').read_text().splitlines()]
    assert [e['status'] for e in events] == ['STARTED', 'RUNNING', 'SUCCESS'] and events[1]['kpi']['images'] == 14 and events[1]['kpi']['boxes_left_out'] == 1
    (images/'000001.jpg').unlink()
    with pytest.raises(FileNotFoundError): dataset_convert(images, annotations, out, num_shards=2, results_dir=tmp_path/'bad')
    assert json.loads((tmp_path/'bad'/'status.json').read_text().splitlines()[-1])['status'] == 'FAILURE'


@pytest.mark.skipif(sys.platform == 'win32', reason='signals differ')
def test_ctrl_c_leaves_nothing(drawn, tmp_path):
    images, annotations, out = drawn
    data = json.loads(annotations.read_text())
    many = [dict(data['images'][i % 14], id=i + 1) for i in range(20_000)]
    annotations.write_text(json.dumps(dict(images=many, annotations=[], categories=data['categories'])))
    code = f'from effdet_nb.data.tfrecord import dataset_convert; dataset_convert({str(images)!r}, {str(annotations)!r}, {str(out)!r}, workers=2, num_shards=64)'
    run = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell starts background jobs deaf to it, and so their children
    deadline = time.time() + 20
    while not list(out.glob('.train-*/train-0*.tfrecord')) and time.time() < deadline: time.sleep(.02)
    os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=30)[1]
    assert run.returncode != 0 and 'KeyboardInterrupt' in error and not out.exists()


# --- real pictures ---

@pytest.mark.parametrize('split,image,annotation,kept', [('train', '171', 2288, 2804), ('val', '274', 3692, 1137)])
def test_bccd_loses_one_box_and_says_which(shared, tmp_path, split, image, annotation, kept):
    data = shared/'data'/'bccd'
    summary = dataset_convert(data/'images', data/f'{split}.json', tmp_path, num_shards=4)
    assert json.loads((tmp_path/f'{split}_warnings.json').read_text()) == {image: {'box': [annotation], 'mask': []}}
    assert sum(summary.boxes.values()) == kept and {k: len(v) for k, v in summary.dropped.items()} == {'no size': 1}


@pytest.mark.parametrize('split,images,objects', [('train', 35, 425), ('val', 32, 359)])
def test_coco_mini_with_masks(shared, tmp_path, split, images, objects):
    data = shared/'data'/'coco_mini'
    summary = dataset_convert(data/'images', data/f'{split}.json', tmp_path, include_masks=True, num_shards=4)
    assert summary.images == images and sum(summary.boxes.values()) == objects and not summary.dropped and not summary.masks_outside
    found = examples(summary.files)
    assert sum(len(e['masks']) for e in found) == objects
    areas = np.array([(np.asarray(Image.open(io.BytesIO(m))).sum(), a, c) for e in found for m, a, c in zip(e['masks'], e['area'], e['is_crowd'])])
    apart = abs(areas[:, 0] - areas[:, 1]) > np.maximum(50, .1*areas[:, 1])
    assert apart.sum() <= 3 and areas[apart, 2].all()                      # three crowds with a published area that is larger than their mask
    assert max(max(e['labels'], default=0) for e in found) <= 90 and load_sidecar(tmp_path/f'{split}-*').classes.num_classes == 81
