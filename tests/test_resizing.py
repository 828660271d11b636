"Letterboxed or stretched: training, evaluation, inference and exported files resize as the model file says."
import json
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effdet_nb.app.model_evaluation import evaluate_model_file, set_resize
from effdet_nb.data import augment as A
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.pipeline import train_dataset
from effdet_nb.data.scan import scan_records
from effdet_nb.data.record_index import Records
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.efficientdet import Arch, arch_from_dict, arch_to_dict
from effdet_nb.detector.images import (RESIZE_MODES, boxes_to_original, letterbox, read_image, read_resized,
                                       resize_options, resize_scale, resize_to_input)
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_toy_dataset
from effdet_nb.evaluate.evaluate import evaluate
from effdet_nb.evaluate.ground_truth import GroundTruth, images_by_id, open_eval_dataset, samples_from_coco
from effdet_nb.evaluate.predict import predict_samples
from effdet_nb.export.deepstream import nvinfer_config, readme_text
from effdet_nb.export.export import export
from effdet_nb.export.formats import random_detector
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train.experiment import check_spec_changes, changed_fields, resolve_experiment
from effdet_nb.train.overfit import fixed_batch
from effdet_nb.train.spec import Spec
from effdet_nb.weights.encryption import ModelFileError
from effdet_nb.weights.model_file import save_detector

sides = st.integers(1, 3000)
sizes = st.tuples(sides, sides)


@given(sizes, st.tuples(st.integers(16, 900), st.integers(16, 900)), st.sampled_from(RESIZE_MODES))
def test_corners_return_to_where_they_were(hw, input_hw, resize):
    scale, scaled_hw = resize_scale(hw, input_hw, resize)
    assert scaled_hw[0] <= input_hw[0] and scaled_hw[1] <= input_hw[1]
    boxes = np.float32([[0, 0, *hw], [hw[0]/3, hw[1]/4, hw[0]/2, hw[1]]])
    inside = boxes*np.tile(scale, 2)
    assert (inside[:, 2:] < np.add(scaled_hw, 1.001)).all()
    np.testing.assert_allclose(boxes_to_original(inside, scale, hw), boxes, rtol=1e-5, atol=1e-3)


def drawn(hw, box):
    "A black image with one white box."
    image = np.zeros((*hw, 3), np.uint8)
    y1, x1, y2, x2 = box
    image[y1:y2, x1:x2] = 255
    return image


def found(image):
    "The box of the white pixels of an image, as `drawn` painted it; an edge of grey pixels counts by its share."
    rows, columns = (image[..., 0].max(axis)/255 for axis in (1, 0))
    y1, x1 = (np.flatnonzero(line)[0]+1-line[line > 0][0] for line in (rows, columns))
    y2, x2 = (np.flatnonzero(line)[-1]+line[line > 0][-1] for line in (rows, columns))
    return np.array([y1, x1, y2, x2])


@settings(max_examples=40)
@given(st.tuples(st.integers(40, 400), st.integers(40, 400)), st.sampled_from([(128, 128), (96, 200), (160, 64)]),
       st.sampled_from(RESIZE_MODES), st.data())
def test_a_drawn_box_is_where_the_numbers_say(hw, input_hw, resize, data):
    y1, x1 = (data.draw(st.integers(0, side//2)) for side in hw)
    y2, x2 = (data.draw(st.integers(start+side//4, side)) for start, side in zip((y1, x1), hw))
    resized = resize_to_input(drawn(hw, (y1, x1, y2, x2)), input_hw, (0, 0, 0), resize)
    back = boxes_to_original(found(resized.image)[None], resized.scale, hw)[0]
    tolerance = 1.2*np.maximum(1/np.tile(resized.scale, 2), 1)       # a pixel of the input, or of the image
    assert (abs(back-[y1, x1, y2, x2]) <= tolerance).all()


@pytest.mark.parametrize('hw', [(97, 300), (300, 97), (128, 128), (1, 7)])
def test_stretching_fills_the_input_and_letterboxing_is_as_before(hw):
    image = np.full((*hw, 3), 200, np.uint8)
    assert (resize_to_input(image, (128, 96), resize='stretch').image == 200).all()
    old, scale = letterbox(image, (128, 96))
    new = resize_to_input(image, (128, 96))
    assert (new.image == old).all() and new.scale == (scale, scale)


def test_a_large_jpeg_is_stretched_like_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    for hw in ((801, 1203), (1203, 500), (640, 2000)):
        Image.fromarray(pixels).resize(hw[::-1], Image.Resampling.BICUBIC).save(tmp_path/'a.jpg', quality=95)
        full = resize_to_input(read_image(tmp_path/'a.jpg'), (120, 160), resize='stretch')
        quick = read_resized(tmp_path/'a.jpg', (120, 160), resize='stretch')
        assert quick.scale == full.scale and abs(quick.image.astype(int)-full.image).mean() < 2


@pytest.mark.parametrize('value', ['crop', '', 'Letterbox', None])
def test_an_unknown_way_is_refused(value):
    with pytest.raises(ValueError, match='letterbox and stretch are allowed'): resize_scale((3, 4), (5, 6), value)


@pytest.mark.parametrize('hw', [(60, 200), (200, 60), (90, 91)])
def test_training_without_jitter_resizes_as_evaluation_does(hw):
    box = (hw[0]//4, hw[1]//4, hw[0]//2, hw[1]//2)
    image, boxes = drawn(hw, box), tf.constant([box], tf.float32)
    for resize in RESIZE_MODES:
        made, moved, _ = A.crop_resize_pad(image, boxes, tf.constant([0]), (96, 128), 1., (0., 0.), resize=resize)
        expected = resize_to_input(image, (96, 128), resize=resize)
        difference = abs(made.numpy().astype(int)-expected.image)
        assert difference.max() == 0 if resize == 'stretch' else difference.mean() < 2  # it cuts off parts of a pixel
        assert abs(moved.numpy()[0]-np.multiply(box, np.tile(expected.scale, 2))).max() < 1


@pytest.mark.parametrize('seed', range(6))
def test_augmented_boxes_lie_on_their_objects_when_stretched(seed):
    hw, box = (110, 260), (20, 50, 80, 200)
    made, moved, _ = A.augment(drawn(hw, box), tf.constant([box], tf.float32), tf.constant([0]), (128, 128),
                               (5, seed), True, .6, 1.4, pad_rgb=(0, 0, 0), resize='stretch')
    assert abs(found(made.numpy())-moved.numpy()[0]).max() < 2.5


INPUT_HW = 128, 160
SPEC = '''dataset_config {{ training_file_pattern: "{0}/train*.tfrecord" validation_file_pattern: "{0}/val*.tfrecord"
  num_classes: 4 image_size: "128,160" resize: "stretch" }}
model_config {{ model_name: "efficientdet-tiny" }}
training_config {{ train_batch_size: 2 num_epochs: 1 }} eval_config {{ eval_batch_size: 4 }}'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Wide toy images as records, a random detector for stretched images, and its exported files."
    folder = tmp_path_factory.mktemp('resizing')
    make_toy_dataset(folder/'shapes', num_train=4, num_val=4, image_hw=(64, 160))
    for split in ('train', 'val'):
        dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder/'records', split, num_shards=1)
    (folder/'spec.txt').write_text(SPEC.format(folder/'records'))
    keras.utils.set_random_seed(1)
    arch = Arch('efficientdet-tiny', image_hw=INPUT_HW, num_classes=4, resize='stretch')
    classes = ClassTable.from_categories([{'id': i, 'name': n} for i, n in enumerate(SHAPE_NAMES, 1)], num_classes=4)
    save_detector(folder/'m.tlt', random_detector(arch), arch, classes)
    for name in ('m.onnx', 'm.etlt', 'm.tflite'): export(folder/'m.tlt', folder/name)
    export(folder/'m.tlt', folder/'raw.tflite', nms='none')
    export(folder/'m.tlt', folder/'saved'/'saved_model.pb')
    return folder


FILES = 'm.tlt', 'm.onnx', 'm.etlt', 'm.tflite', 'raw.tflite'


@pytest.mark.parametrize('name', FILES)
def test_every_file_says_and_obeys_its_resizing(folder, name):
    detector = load_detector(folder/name, score_threshold=.01)
    assert resize_options(detector)['resize'] == 'stretch'
    path = sorted((folder/'shapes'/'val').glob('*'))[0]
    whole = detector(str(path), threshold=.01)
    stretched = detector(read_resized(path, INPUT_HW, resize='stretch').image[None])[0]
    expected = boxes_to_original(stretched.boxes, (2, 1), (64, 160))
    kept = [i for i in range(len(stretched)) if stretched.classes[i] < 3 and np.ptp(expected[i].reshape(2, 2), 0).all()]
    np.testing.assert_allclose(whole.boxes, expected[kept], atol=1e-3)
    assert len(whole) > 10


@pytest.mark.parametrize('path', ['raw.tflite.json', 'saved/effdet_nb.json'])
def test_metadata_beside_a_file_says_it(folder, path):
    meta = json.loads((folder/path).read_text())
    assert meta['input']['resize'] == meta['arch']['resize'] == 'stretch'


def test_deepstream_stretches_too(folder):
    meta = load_detector(folder/'m.onnx').meta
    assert 'maintain-aspect-ratio=0' in nvinfer_config(meta, 'm.onnx')
    assert 'stretched' in readme_text(meta, 'm.onnx', False)
    old = meta | dict(arch={k: v for k, v in meta['arch'].items() if k != 'resize'})
    assert 'maintain-aspect-ratio=1\nsymmetric-padding=0' in nvinfer_config(old, 'm.onnx')


def test_a_file_from_before_is_letterboxed():
    old = {k: v for k, v in arch_to_dict(Arch('efficientdet-tiny')).items() if k != 'resize'}
    assert arch_from_dict(old).resize == 'letterbox'


@pytest.mark.parametrize('value', ['fill', 1, None])
def test_a_forged_way_in_a_file_is_refused(tmp_path, value):
    arch = Arch('efficientdet-tiny', (128, 128), 4, resize=value)
    classes = ClassTable.from_categories([dict(id=1, name='a')], 4)
    save_detector(tmp_path/'m.tlt', random_detector(arch), arch, classes)
    with pytest.raises(ModelFileError, match='arch.resize = .*must be letterbox or stretch'):
        load_detector(tmp_path/'m.tlt')


class Recorder:
    "A detector that stores the images it is given."
    image_hw, classes, resize = INPUT_HW, None, 'stretch'

    def forward(self, images):
        self.images = images
        return images

    def decode(self, images): return [Detections([[0, 0, 128, 160]], [.9], [0]) for _ in images]


def test_evaluation_stretches_and_maps_back():
    detector, image = Recorder(), drawn((50, 200), (10, 20, 40, 180))
    (_, found_boxes), = predict_samples(detector, [(image, GroundTruth(1, [], []))])
    np.testing.assert_array_equal(detector.images[0], resize_to_input(image, INPUT_HW, resize='stretch').image)
    np.testing.assert_allclose(found_boxes.boxes, [[0, 0, 50, 200]])


class RectangleFinder:
    "A detector that finds the white rectangle of a black image exactly."
    image_hw, classes = (120, 160), ClassTable((1,), ('thing',), 2)

    def forward(self, images): return images

    def decode(self, images):
        edges = [np.nonzero(image[...,0]>200) for image in images]
        return [Detections([[y.min(), x.min(), y.max()+1, x.max()+1]], [.9], [0]) for y,x in edges]


@pytest.mark.parametrize('labelled_hw', [(120, 160), (480, 640), (60, 80), (240, 160)])
def test_images_that_were_scaled_after_labelling_are_evaluated_in_the_size_of_their_labels(tmp_path, labelled_hw):
    file_boxes = np.array([[20, 30, 60, 90], [8, 8, 100, 40]])                # y1 x1 y2 x2
    ratio = np.divide(labelled_hw, (120, 160))
    coco = dict(categories=[dict(id=1, name='thing')], images=[], annotations=[])
    for i,box in enumerate(file_boxes, 1):
        Image.fromarray(drawn((120, 160), box)).save(tmp_path/f'{i}.png')
        y1,x1,y2,x2 = (box*np.tile(ratio, 2)).tolist()
        coco['images'].append(dict(id=i, file_name=f'{i}.png', height=labelled_hw[0], width=labelled_hw[1]))
        coco['annotations'].append(dict(id=i, image_id=i, category_id=1, bbox=[x1, y1, x2-x1, y2-y1]))
    labels = tmp_path/'labels.json'
    labels.write_text(json.dumps(coco))
    dataset_convert(tmp_path, labels, tmp_path/'records', 'val', num_shards=1, workers=1)
    records = f'{tmp_path}/records/val-*'
    for samples in (open_eval_dataset(records), open_eval_dataset(records, labels),
                    [*samples_from_coco(labels, tmp_path)]):
        metrics = evaluate(RectangleFinder(), samples)
        assert metrics['AP']==1
        np.testing.assert_allclose(metrics.results[0][1].boxes, file_boxes[:1]*np.tile(ratio, 2))
        assert images_by_id(samples, [1])[1].shape[:2]==labelled_hw           # so that boxes are drawn in their place


def test_a_spec_that_stretches_trains_on_what_evaluation_sees(folder):
    experiment = resolve_experiment(Spec.load(folder/'spec.txt', 'train'))
    assert experiment.arch.resize == experiment.data.resize == 'stretch'
    still = replace(experiment.data, hflip=False, min_scale=1., max_scale=1.)
    batch = next(iter(train_dataset(still, 4)))
    images = [read_resized(source, INPUT_HW, resize='stretch').image
              for source, _ in open_eval_dataset(str(folder/'records'/'train*'), '')]
    for image in batch['images'].numpy(): assert min(abs(image.astype(int)-other).mean() for other in images) < 1


def test_overfitting_uses_the_same_pixels(folder):
    from effdet_nb.data.pipeline import make_sample_loader
    experiment = resolve_experiment(Spec.load(folder/'spec.txt', 'train'))
    batch = fixed_batch(make_sample_loader(experiment.data), [0, 1], experiment.arch)
    sources = [source for source, _ in open_eval_dataset(str(folder/'records'/'train*'), '')]
    for image, source in zip(batch['images'].numpy(), sources):
        expected = read_resized(source, INPUT_HW, resize='stretch').image
        assert abs(image.astype(int)-expected).mean() < 1


def test_box_sizes_are_checked_as_the_network_sees_them(folder):
    scan = scan_records(Records.from_files(sorted((folder/'records').glob('train*.tfrecord'))))
    np.testing.assert_allclose(scan.scaled_box_sizes(INPUT_HW, 'stretch'), scan.box_sizes*[2, 1])
    np.testing.assert_allclose(scan.scaled_box_sizes(INPUT_HW), scan.box_sizes)


def test_a_run_does_not_continue_with_another_way():
    old, new = Spec.parse(''), Spec.parse('dataset_config { resize: "stretch" }')
    with pytest.raises(ValueError, match=r'dataset_config.resize was "letterbox" and is "stretch"'):
        check_spec_changes(changed_fields(old, new), {}, {}, 'model.step-4.tlt')


@pytest.mark.parametrize('value', ['"crop"', '"STRETCH"', '""'])
def test_a_wrong_value_in_a_spec_is_named_with_the_allowed_ones(value):
    with pytest.raises(ValueError, match='resize: .*must be "letterbox" or "stretch"'):
        Spec.parse(f'dataset_config {{ num_classes: 4 resize: {value} }}', task='evaluate')


def test_evaluating_as_the_client_sees_images(folder):
    "The option gives the AP of a detector whose images are resized that way, and says so."
    samples = open_eval_dataset(str(folder/'records'/'val*'), '')
    result = evaluate_model_file(folder/'m.onnx', samples, resize='letterbox')
    detector = load_detector(folder/'m.onnx')
    set_resize(detector, 'letterbox')
    assert dict(result.metrics) == dict(evaluate(detector, samples))
    assert result.settings_line().endswith('. Resizing: letterbox; trained with stretch')
    assert result.to_dict()['resize'] == 'letterbox; trained with stretch'
    assert evaluate_model_file(folder/'m.onnx', samples, resize='stretch').resize == ''


def test_detections_in_a_file_have_no_resizing(folder, tmp_path):
    (tmp_path/'d.json').write_text('[]')
    with pytest.raises(ValueError, match='no image is resized. Leave --resize out'):
        evaluate_model_file(tmp_path/'d.json', [], resize='stretch')
