"LiteRT files for phones: opened by MediaPipe's own detector and by LiteRT, in three precisions."
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from effdet_nb.app.cli import effdet_export
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_toy_dataset, make_toy_image
from effdet_nb.export.export import export
from effdet_nb.export.formats import create_interpreter, random_detector, silent_output
from effdet_nb.export.mobile import float_operators, mobile_labels, mobile_limits, read_tflite
from effdet_nb.export.quantize import record_images
from effdet_nb.export.runtimes import LiteRtDetector, TrtDetector, load_detector
from effdet_nb.weights.model_file import load_model_file, save_detector

MEDIAPIPE = '''
import json, sys
import mediapipe
from mediapipe.tasks.python import BaseOptions, vision
model, *images = sys.argv[1:]
options = vision.ObjectDetectorOptions(BaseOptions(model_asset_path=model), score_threshold=.01, max_results=20)
rows = []
with vision.ObjectDetector.create_from_options(options) as detector:
    for path in images:
        found = detector.detect(mediapipe.Image.create_from_file(path)).detections
        rows.append([(d.bounding_box.origin_y, d.bounding_box.origin_x, d.bounding_box.height, d.bounding_box.width,
                      d.categories[0].score, d.categories[0].category_name) for d in found])
print('RESULT' + json.dumps(rows))
'''


def mediapipe_detections(model, images):
    "What MediaPipe's ObjectDetector finds: per image, rows of y, x, height, width, score and label."
    command = [sys.executable, '-c', MEDIAPIPE, str(model), *map(str, images)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.split('RESULT')[1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small random detector for three shapes, its exported files, and two images of the network's size."
    folder = tmp_path_factory.mktemp('mobile')
    keras.utils.set_random_seed(1)
    arch = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=4)
    classes = ClassTable.from_categories([{'id': i, 'name': n} for i, n in enumerate(SHAPE_NAMES, 1)], num_classes=4)
    save_detector(folder/'m.tlt', random_detector(arch), arch, classes)
    (folder/'images').mkdir()
    for seed in range(12):
        Image.fromarray(make_toy_image(seed=seed, image_hw=(128, 128)).image).save(folder/'images'/f'{seed:02}.png')
    export(folder/'m.tlt', folder/'fp32.tflite')
    export(folder/'m.tlt', folder/'fp16.tflite', data_type='fp16')
    export(folder/'m.tlt', folder/'int8.tflite', data_type='int8', cal_image_dir=folder/'images', batches=12)
    return folder


def images_of(folder): return sorted((folder/'images').glob('*.png'))[:3]


def as_pixels(paths): return np.stack([np.asarray(Image.open(path)) for path in paths])


def same_detections(found, own, score_difference):
    "Which detections of MediaPipe are ours too. It rounds a box down, and clips its corner and its size."
    corners, sizes = np.maximum(own.boxes[:, :2], 0), np.minimum(own.boxes[:, 2:]-own.boxes[:, :2], 128)
    places, labels = np.concatenate([corners, sizes], 1), np.array([SHAPE_NAMES[c] for c in own.classes])
    for y, x, height, width, score, label in found:
        differences = abs(places-[y, x, height, width]).max(1)
        yield ((differences < 1.01) & (abs(own.scores-score) < score_difference) & (labels == label)).any()


@pytest.mark.parametrize(('precision', 'score_difference', 'share'), [('fp32', 2e-3, 1.), ('int8', .05, .8)])
def test_mediapipe_finds_what_we_find(folder, precision, score_difference, share):
    "The images have the size of the network, so nothing is resized. In 8 bits, two interpreters round differently."
    pytest.importorskip('mediapipe', reason='needs mediapipe: pip install mediapipe')
    model, paths = folder/f'{precision}.tflite', images_of(folder)
    ours = load_detector(model)(as_pixels(paths))
    for found, own in zip(mediapipe_detections(model, paths), ours):
        same = [*same_detections(found, own, score_difference)]
        assert len(same) >= 15 and np.mean(same) >= share


def test_four_outputs_in_their_order_from_a_uint8_image(folder):
    interpreter = create_interpreter(folder/'fp32.tflite')
    entry = interpreter.get_input_details()[0]
    assert entry['dtype'] == np.uint8 and entry['shape'].tolist() == [1, 128, 128, 3]
    outputs = interpreter.get_output_details()
    assert [o['shape'].tolist() for o in outputs] == [[1, 100, 4], [1, 100], [1, 100], [1]]
    assert {o['dtype'] for o in outputs} == {np.float32}


def test_labels_have_no_idle_channel(folder):
    with zipfile.ZipFile(folder/'fp32.tflite') as archive:
        assert archive.read('labels.txt').decode().split('\n') == list(SHAPE_NAMES)
        assert json.loads(archive.read('effdet_nb.json'))['nms']['kind'] == 'tflite'


def test_only_the_ending_of_an_int8_file_computes_in_floating_point(folder):
    tables = read_tflite((folder/'int8.tflite').read_bytes())
    ending = ['DEQUANTIZE', 'DEQUANTIZE', 'LOGISTIC', 'TFLite_Detection_PostProcess']
    assert float_operators(tables) == ending
    assert all(n > 0 for tensor in tables.subgraphs[0].tensors for n in tensor.shape)       # fixed shapes
    assert len(float_operators(read_tflite((folder/'fp32.tflite').read_bytes()))) > 100


@pytest.mark.parametrize(('precision', 'tolerance'), [('fp32', 1e-3), ('fp16', .01)])
def test_a_file_finds_what_the_model_finds(folder, precision, tolerance):
    images = as_pixels(images_of(folder))
    for own, file in zip(load_detector(folder/'m.tlt')(images), load_detector(folder/f'{precision}.tflite')(images)):
        own_scores, file_scores = (np.sort(d.scores[d.classes < 3])[::-1][:20] for d in (own, file))
        assert abs(own_scores-file_scores).max() < tolerance


def test_thresholds_are_kept(folder):
    export(folder/'m.tlt', folder/'few.tflite', max_detections=7, score_threshold=.02)
    found = load_detector(folder/'few.tflite')(as_pixels(images_of(folder)))
    assert {len(d) for d in found} == {7} and min(d.scores.min() for d in found) > .02


def test_a_file_without_suppression_is_opened_too(folder):
    export(folder/'m.tlt', folder/'raw.tflite', nms='none')
    images = as_pixels(images_of(folder))
    own, raw = load_detector(folder/'m.tlt')(images), load_detector(folder/'raw.tflite', max_detections=5)(images)
    assert [len(d) for d in raw] == [5]*len(images)
    np.testing.assert_allclose(raw[0].scores, own[0].scores[:5], atol=1e-4)


@pytest.mark.parametrize(('output', 'options', 'message'), [
    ('a.onnx', dict(nms='tflite'), 'is the ending of a .tflite file'),
    ('a.tflite', dict(nms='onnx'), 'Leave --nms and --data_type out'),
    ('a.tflite', dict(nms='none', data_type='fp16'), 'Leave --nms and --data_type out'),
    ('a.tflite', dict(max_batch_size=4), 'one image at a time'),
    ('a.tflite', dict(data_type='int8'), 'Give --cal_image_dir'),
    ('a.tflite', dict(iou_threshold=0), 'values above 0 only'),
    ('a.tflite', dict(iou_threshold=0., data_type='fp16'), 'values above 0 only'),
    ('a.tflite', dict(cal_cache_file='new.json'), 'Leave it out'),
    ('a.tflite', dict(cal_cache_file=__file__, data_type='int8'), 'Leave it out'),
    ('a.tflite', dict(cal_cache_file=__file__, data_type='int8', cal_image_dir='images'), 'Leave it out'),
])
def test_what_a_file_cannot_be_is_said(folder, output, options, message):
    with pytest.raises(ValueError, match=message): export(folder/'m.tlt', folder/output, **options)
    assert not (folder/output).exists()


# What programs on phones do not take

@pytest.mark.parametrize(('name', 'channels', 'data_type', 'words'), [
    *((f'efficientdet-{name}', 3, 'int8', ['swish']) for name in ('d0', 'd4', 'd7x', 'tiny')),
    *((f'efficientdet-{name}', 3, 'fp16', []) for name in ('d0', 'd7', 'lite4')),
    *((f'efficientdet-{name}', 3, 'int8', []) for name in ('lite0', 'lite2', 'lite3x')),
    *(('efficientdet-lite0', 1, data_type, ['num_channels: 3']) for data_type in ('fp32', 'fp16', 'int8')),
    ('efficientdet-d1', 1, 'int8', ['num_channels: 3', 'efficientdet-lite0']),
])
def test_limits_of_a_variant_are_listed(name, channels, data_type, words):
    limits = mobile_limits(Arch(name, channels=channels), data_type)
    assert len(limits) == len(words) and all(word in limit for word, limit in zip(words, limits))


@pytest.mark.slow
@pytest.mark.parametrize('limit', [1, 3_000, 100_000])
def test_a_file_may_have_any_limit_on_its_boxes(folder, tmp_path, limit):
    agreement = export(folder/'m.tlt', tmp_path/'a.tflite', max_detections=limit).agreement
    assert agreement.matched >= .99*agreement.total > 0


@pytest.fixture(scope='module')
def grey(folder):
    "A detector for greyscale images, exported by the command, and what the command printed on stderr."
    stored = load_model_file(folder/'m.tlt')
    arch = replace(stored.arch, channels=1, mean_rgb=None, std_rgb=None, pad_rgb=None)
    save_detector(folder/'grey.tlt', build(arch), arch, stored.classes)
    with redirect_stderr(io.StringIO()) as printed:
        effdet_export(model_path=str(folder/'grey.tlt'), output_path=str(folder/'grey.tflite'))
    return SimpleNamespace(path=folder/'grey.tflite', printed=printed.getvalue())


def test_the_command_warns_of_what_phones_do_not_take(grey):
    line, = (line for line in grey.printed.splitlines() if 'greyscale' in line)
    assert 'grey.tflite: takes greyscale images' in line and 'Train with num_channels: 3' in line


def test_mediapipe_does_not_open_a_file_for_greyscale_images(folder, grey):
    pytest.importorskip('mediapipe', reason='needs mediapipe: pip install mediapipe')
    with pytest.raises(AssertionError, match='depth = 3 or 4'): mediapipe_detections(grey.path, images_of(folder))


@pytest.mark.slow
@pytest.mark.parametrize(('hw', 'precision'), [((128, 192), 'fp32'), ((200, 136), 'int8'), ((136, 320), 'fp16')])
def test_mediapipe_takes_any_size(folder, tmp_path, hw, precision):
    pytest.importorskip('mediapipe', reason='needs mediapipe: pip install mediapipe')
    stored = load_model_file(folder/'m.tlt')
    arch = replace(stored.arch, image_hw=hw)
    save_detector(tmp_path/'m.tlt', random_detector(arch), arch, stored.classes)
    Image.fromarray(make_toy_image(seed=3, image_hw=hw).image).save(tmp_path/'a.png')
    export(tmp_path/'m.tlt', tmp_path/'m.tflite', data_type=precision, cal_image_dir=folder/'images', batches=12)
    found, = mediapipe_detections(tmp_path/'m.tflite', [tmp_path/'a.png'])
    own = load_detector(tmp_path/'m.tflite')(as_pixels([tmp_path/'a.png']))[0]
    scores = [score for *_, score, _ in found]
    assert len(scores) >= 10
    np.testing.assert_allclose(scores[:10], own.scores[:10], atol=.05)


def test_a_file_for_greyscale_images_is_opened_here(folder, grey):
    assert len(load_detector(grey.path)(as_pixels(images_of(folder)))) == 3


@pytest.mark.parametrize('names', [('red\ncell', 'b', 'c'), ('a', 'b\u2028b', 'c\r\n'), ('a\x85a', ' b ', 'c\tc')])
def test_a_line_break_in_a_class_name_moves_no_other_name(names):
    classes = ClassTable.from_categories([dict(id=i, name=name) for i, name in enumerate(names, 1)])
    labels = mobile_labels(classes)
    assert labels == [' '.join(name.split()) for name in names] == '\n'.join(labels).splitlines()


@pytest.mark.parametrize('damage', [lambda data: data[:2000], lambda data: data[:8], lambda data: data[:-100]])
def test_a_damaged_or_foreign_file_is_one_sentence(folder, tmp_path, damage):
    (tmp_path/'x.tflite').write_bytes(damage((folder/'fp32.tflite').read_bytes()))
    with pytest.raises(ValueError, match='x.tflite: '): LiteRtDetector(tmp_path/'x.tflite')


@pytest.mark.parametrize(('meta', 'message'), [
    (b'{', 'not JSON'), (b'[' * 100_000, 'not JSON'), (b'[]', 'metadata'), (b'{}', 'metadata'), (b'null', 'metadata'),
    (b'{"nms": {}}', 'description'), (b' ' * (2**24+1), 'at most')])
def test_metadata_that_is_not_ours_is_one_sentence(folder, tmp_path, meta, message):
    path = tmp_path/'x.tflite'
    path.write_bytes((folder/'fp32.tflite').read_bytes().split(b'PK\x03\x04')[0])
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive: archive.writestr('effdet_nb.json', meta)
    with pytest.raises(ValueError, match='x.tflite: ') as error: LiteRtDetector(path)
    assert message in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize('meta', ['{', '[]', '{}', '{"nms": 3}'])
def test_the_metadata_of_an_engine_is_checked_before_it_is_used(tmp_path, meta):
    (tmp_path/'x.engine').write_bytes(b'engine')
    (tmp_path/'x.engine.json').write_text(meta)
    with pytest.raises(ValueError, match='metadata|description'): TrtDetector(tmp_path/'x.engine')


# Calibration with the training records, and a silent converter

@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "Twelve toy images as records."
    folder = tmp_path_factory.mktemp('records')
    make_toy_dataset(folder/'shapes', num_train=12, num_val=1, image_hw=(128, 128))
    dataset_convert(folder/'shapes'/'train', folder/'shapes'/'train.json', folder, 'train', num_shards=3)
    return folder


@pytest.mark.parametrize('name', ['a.tflite', 'a.onnx', 'a.etlt'])
@pytest.mark.slow
def test_int8_is_calibrated_with_the_training_records(folder, records, tmp_path, name):
    pattern = f'{records}/train*.tfrecord'
    export(folder/'m.tlt', tmp_path/name, data_type='int8', cal_records=pattern, batches=12)
    assert load_detector(tmp_path/name).meta['data_type'] == 'int8'
    (tmp_path/'images').mkdir()
    for i, data in enumerate(record_images(pattern, 12)): (tmp_path/'images'/f'{i:02}.png').write_bytes(data)
    export(folder/'m.tlt', tmp_path/'b'/name, data_type='int8', cal_image_dir=tmp_path/'images', batches=12)
    image = as_pixels(images_of(folder)[:1])
    own, other = (load_detector(tmp_path/path)(image)[0] for path in (name, f'b/{name}'))
    np.testing.assert_array_equal(own.boxes, other.boxes)      # the same images give the same file


@pytest.mark.parametrize('count', [1, 5, 12, 100])
def test_images_are_taken_evenly_from_all_records(records, count):
    images = record_images(f'{records}/train*.tfrecord', count)
    assert len(images) == len(set(images)) == min(count, 12)


def test_no_images_at_all_is_one_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match='Give --cal_image_dir, a spec with training records, or a --cal_cache_file'):
        export(folder/'m.tlt', tmp_path/'a.tflite', data_type='int8')
    (tmp_path/'empty').mkdir()
    (tmp_path/'file').write_text('not a folder')
    for name, words in (('empty', 'no images'), ('missing', 'no such folder'), ('file', 'no such folder')):
        with pytest.raises(FileNotFoundError, match=f'cal_image_dir .*{name}: {words}.* Give a folder of images'):
            export(folder/'m.tlt', tmp_path/'a.tflite', data_type='int8', cal_image_dir=tmp_path/name)
    with pytest.raises(FileNotFoundError, match='nothing'):
        export(folder/'m.tlt', tmp_path/'a.tflite', data_type='int8', cal_records=f'{tmp_path}/nothing*.tfrecord')
    assert not [*tmp_path.glob('a.*')]


@pytest.mark.slow
def test_the_converter_prints_nothing(folder, records, tmp_path, capfd):
    for options in (dict(data_type='int8', cal_records=f'{records}/train*.tfrecord'), dict(nms='none')):
        export(folder/'m.tlt', tmp_path/'a.tflite', **options)
    out, err = capfd.readouterr()
    assert 'fully_quantize' not in err and out == ''


def test_silence_ends_with_the_conversion(capfd):
    with pytest.raises(RuntimeError), silent_output():
        os.write(2, b'hidden')
        print('hidden')
        raise RuntimeError
    os.write(2, b'shown')
    assert capfd.readouterr() == ('', 'shown')


# The scripts of the tutorial about a Raspberry Pi

SCRIPTS = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'/'device'


def run_script(name, *words):
    "What a script prints: rows of a label, a score, and left, top, right and bottom in pixels."
    command = [sys.executable, str(SCRIPTS/name), *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    pattern = re.compile(r'^(\w+) ([\d.]+): left (-?\d+), top (-?\d+), right (-?\d+), bottom (-?\d+)$', re.M)
    return [(label, *map(float, numbers)) for label, *numbers in pattern.findall(ran.stdout)]


@pytest.mark.parametrize(('resize', 'hw'), [('letterbox', (90, 200)), ('stretch', (150, 70))])
def test_the_script_for_litert_prints_our_detections(folder, tmp_path, resize, hw):
    pytest.importorskip('ai_edge_litert', reason='needs LiteRT: pip install ai-edge-litert')
    stored = load_model_file(folder/'m.tlt')
    save_detector(tmp_path/'m.tlt', stored.build_model(), replace(stored.arch, resize=resize), stored.classes)
    export(tmp_path/'m.tlt', tmp_path/'m.tflite')
    Image.fromarray(make_toy_image(seed=3, image_hw=(200, 200)).image[:hw[0], :hw[1]]).save(tmp_path/'a.png')
    rows = run_script('detect_litert.py', tmp_path/'m.tflite', tmp_path/'a.png', .02)
    ours = load_detector(tmp_path/'m.tflite')(str(tmp_path/'a.png'), threshold=.02)
    assert len(ours) > 5
    matched = 0
    for box, score, label in zip(ours.boxes, ours.scores, ours.class_names):
        clipped = [(row, np.clip(row[2:], 0, [hw[1], hw[0], hw[1], hw[0]])) for row in rows if row[0] == label]
        matched += any(abs(row[1]-score) < .02 and abs(sides-box[[1, 0, 3, 2]]).max() < 2 for row, sides in clipped)
    assert matched >= .9*len(ours)


def test_the_script_for_mediapipe_prints_what_its_detector_finds(folder):
    pytest.importorskip('mediapipe', reason='needs mediapipe: pip install mediapipe')
    path = images_of(folder)[0]
    rows = run_script('detect_mediapipe.py', folder/'int8.tflite', path, .01)
    found, = mediapipe_detections(folder/'int8.tflite', [path])
    places = {(label, x, y) for y, x, _, _, _, label in found}
    assert len(rows) >= 15 and places <= {(label, left, top) for label, _, left, top, *_ in rows}


@pytest.mark.parametrize('streams', ['2>&-', '>&- 2>&-', '2>/dev/null'])
def test_output_of_libraries_is_discarded_without_a_stream(tmp_path, streams):
    code = f'from effdet_nb.export.formats import silent_output\nwith silent_output(): open({str(tmp_path/"a")!r}, "w")'
    command = f'{sys.executable} -c {shlex.quote(code)} {streams}'
    assert subprocess.run(command, shell=True).returncode==0 and (tmp_path/'a').exists()
