"Rare inputs of the data and evaluation modules: each is used, or named in an error that says what to do."
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_pipeline import damaged_set, make_config

from effdet_nb.accel.cpu_session import no_remapping
from effdet_nb.data import conversion, pipeline as D, record, tile_dataset as tiles
from effdet_nb.data.record_checks import check_box_counts
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.image_files import upright_size
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.record_index import Records
from effdet_nb.data.sources import convert_sources
from effdet_nb.data.split import split_dataset
from effdet_nb.data.tfrecord import decode_example, load_sidecar, make_example, parse_example, read_records
from effdet_nb.detector.images import read_image
from effdet_nb.detector.tiles import Tiling
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.evaluate.evaluate import coco_metrics, describe_counts
from effdet_nb.evaluate.ground_truth import GroundTruth
from effdet_nb.evaluate.inspect_results import plot_precision_recall
from effdet_nb.evaluate.predict import load_coco_results

CLASSES = ClassTable((1,), ('cat',), 2)


@pytest.fixture
def toys(tmp_path):
    make_toy_dataset(tmp_path, num_train=4, num_val=1, image_hw=(64, 64), edge_cases=False)
    return tmp_path


@pytest.mark.parametrize('error', [Image.DecompressionBombError('179 million pixels'), SyntaxError('broken PNG file'),
                                   MemoryError()])
def test_a_picture_of_the_worst_image_that_cannot_be_drawn_does_not_end_the_conversion(error, toys, monkeypatch):
    labels = json.loads((toys/'train.json').read_text())
    labels['annotations'] += [labels['annotations'][0] | dict(id=999)]
    (toys/'train.json').write_text(json.dumps(labels))
    def fail(*_): raise error
    monkeypatch.setattr(conversion, 'draw_invalid_boxes', fail)
    result = dataset_convert(toys/'train', toys/'train.json', toys/'rec', 'train', num_shards=1, workers=1)
    assert json.loads((toys/'rec'/'train_records.json').read_text()).get('complete', True)
    assert result.num_images==4 and not (toys/'rec'/'train_report.png').exists()


HALF = b'Exif\0\0II*\0' + struct.pack('<IHHHIIIII', 8, 1, 0x112, 5, 1, 26, 0, 5, 2)      # its orientation is 5/2


@pytest.mark.parametrize('ending', ['png', 'webp', 'jpg'])
@pytest.mark.parametrize('exif', [b'Exif\0\0garbage!', HALF], ids=['garbage', 'fraction'])
def test_an_image_with_a_damaged_exif_block_is_used(exif, ending, tmp_path):
    (tmp_path/'images').mkdir()
    path = tmp_path/'images'/f'a.{ending}'
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(path, exif=exif)
    assert upright_size(path)==(40, 60) and read_image(path, upright=True).shape==(40, 60, 3)
    (tmp_path/'images'/'a.txt').write_text('0 .5 .5 .2 .2\n')
    (tmp_path/'data.yaml').write_text('names: [cat]\n')
    result = convert_sources([tmp_path], (), tmp_path/'rec', 'train', num_shards=1)
    assert result.num_images==1 and not result.dropped_images


def test_crowds_count_as_objects_only_where_they_are_used():
    scan = SimpleNamespace(boxes_per_image=np.array([5, 1]), num_images=2, image_index=np.array([0]*5+[1]),
                           is_crowd=np.array([False]*2+[True]*3+[False]), image_name=str)
    assert not [*check_box_counts(scan, 'training', 3, skip_crowd=True)]
    problem, = check_box_counts(scan, 'training', 3)
    assert 'the most is 5' in problem.message and 'Set it to 5' in problem.message


def test_validating_records_skips_damaged_ones_if_the_settings_say_so(tmp_path, capsys):
    pattern = damaged_set(tmp_path)
    with pytest.raises(Exception, match='.'): D.make_sample_loader(make_config(pattern)).validate_records()
    loader = D.make_sample_loader(make_config(pattern, skip_corrupt=True))
    loader.validate_records()
    assert loader.skipped_records and 'skip_corrupt' in capsys.readouterr().err


def test_lists_of_a_record_without_its_crowds_have_one_length():
    example = dict(boxes=np.eye(2, 4), labels=np.arange(2), is_crowd=np.array([True, False]), area=np.ones(2),
                   names=['a', 'b'], masks=[])
    D._drop_crowds(example)
    assert example['names']==['b'] and len(example['boxes'])==1 and example['masks']==[]


def test_only_the_whole_message_of_an_exception_is_recognised():
    def fail(): raise ValueError('0')
    with pytest.raises(ValueError, match='0'): D._recording_failures(fail)()
    text = 'OOM when allocating tensor with shape[16,100]'
    assert D.pipeline_error_message(RuntimeError(text))==text
    assert D.pipeline_error_message(RuntimeError('{{node x}} ValueError: 0\n at line 3'))=='0'


@pytest.mark.parametrize('key, values', [('is_crowd', [1]), ('class/text', [b'a']), ('area', [1., 2., 3.])])
def test_lists_of_unequal_length_in_a_record_are_named(key, values, toys):
    dataset_convert(toys/'train', toys/'train.json', toys/'rec', 'train', num_shards=1, workers=1)
    records = map(parse_example, read_records(next((toys/'rec').glob('train-*'))))
    features = next(r for r in records if len(r['image/object/class/label'])==2)
    if key=='area': values = [*features['image/object/area'], 1.]
    with pytest.raises(ValueError, match=rf'r1: {len(values)} values of image/object/{key} for'):
        decode_example(make_example(features | {f'image/object/{key}': values}), 'r1')


@pytest.mark.parametrize('contents', ['[]', '{}', '3', 'null'])
def test_a_foreign_file_beside_records_is_named(contents, toys):
    dataset_convert(toys/'train', toys/'train.json', toys/'rec', 'train', num_shards=1, workers=1)
    (toys/'rec'/'train_records.json').write_text(contents)
    files = sorted(map(str, (toys/'rec').glob('train-*')))
    with pytest.raises(ValueError, match='train_records.json: not written by dataset_convert'):
        Records.from_files(files)


SHARD = 'train-00000-of-00001.tfrecord'
DAMAGES = [
    dict(shards=None), dict(shards='x'), dict(shards=[{}]), dict(shards=[dict(file=SHARD)]),
    dict(shards=[dict(file=SHARD, records=4, size='9', sha256='')]), dict(classes=None), dict(classes={}),
    dict(classes=dict(ids=[], names=[], num_classes=1)), dict(classes=dict(ids=[1, 2], names=['a'], num_classes=3)),
    dict(classes=dict(ids=['1'], names=['a'], num_classes=2)), dict(boxes_by_category=None),
    dict(boxes_by_category={'circle': 3}), dict(boxes_by_category={'1': None}), dict(most_boxes_in_an_image=None)]


def test_a_sidecar_with_damaged_values_is_named(toys):
    dataset_convert(toys/'train', toys/'train.json', toys/'rec', 'train', num_shards=1, workers=1)
    path,pattern = toys/'rec'/'train_records.json', str(toys/'rec'/'train-*')
    contents = json.loads(path.read_text())
    assert load_sidecar(pattern).num_images==4
    missing = [{k: v for k,v in contents.items() if k not in damage} for damage in DAMAGES]
    for damaged in [*missing, *(contents | damage for damage in DAMAGES)]:
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match='train_records.json: not written by dataset'): load_sidecar(pattern)


@pytest.mark.parametrize('module', [record, tiles])
def test_an_image_for_which_there_is_no_memory_is_never_left_out(module, toys, monkeypatch):
    def fail(*_): raise MemoryError
    monkeypatch.setattr(module, 'probe_image', fail)
    def run():
        data = toys/'train', toys/'train.json', toys/'out'
        if module is tiles: tiles.tile_dataset(*data, Tiling((32, 32)), workers=1)
        else: dataset_convert(*data, 'train', num_shards=1, workers=1)
    with pytest.raises(MemoryError, match='not enough memory to read it. Use fewer workers'): run()


@pytest.mark.parametrize('side', [640_000, 10**9])
def test_tiles_of_an_image_whose_size_in_the_json_is_impossible_keep_its_boxes(side, toys):
    labels = json.loads((toys/'train.json').read_text())
    for image in labels['images']: image.update(height=side, width=side)
    (toys/'train.json').write_text(json.dumps(labels))
    tiles.tile_dataset(toys/'train', toys/'train.json', toys/'cut', Tiling((32, 32)), workers=1)
    written = json.loads(next((toys/'cut').glob('*.json')).read_text())
    assert written['annotations'] and all(min(a['bbox'][2:])>=1 for a in written['annotations'])


def test_two_images_of_one_id_are_no_ground_truth_for_detections():
    truths = [GroundTruth(1, np.array([[0., 0, 9, 9]]), np.array([1])) for _ in range(2)]
    row = dict(image_id=1, category_id=1, bbox=[0, 0, 9, 9], score=.5)
    with pytest.raises(ValueError, match='image id 1 occurs twice in the ground truth'):
        load_coco_results([row], truths, CLASSES)


def metrics_of_one_box():
    truth = GroundTruth(1, np.array([[0., 0, 9, 9]]), np.array([1]))
    row = dict(image_id=1, category_id=1, bbox=[0, 0, 9, 9], score=.5)
    return coco_metrics(load_coco_results([row], [truth], CLASSES), CLASSES)


@pytest.mark.parametrize('wrong', [dict(iou_threshold=.4), dict(iou_threshold=.97), dict(iou_threshold=1.),
                                   dict(category_ids=[7])])
def test_a_curve_that_does_not_exist_is_not_drawn(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): plot_precision_recall(metrics_of_one_box(), **wrong)


def test_one_of_a_thing_has_its_word():
    assert describe_counts(metrics_of_one_box())=='1 image, 1 box to find, 1 detection'


def test_an_unknown_way_with_duplicates_is_refused(toys):
    with pytest.raises(SourceError, match='--near_duplicates nothing: choose from together, report, skip'):
        split_dataset([toys/'train.json'], [toys/'train'], toys/'out', near='nothing')


def test_a_setting_of_tensorflow_that_nobody_changed_stays_unset():
    before = dict(tf.config.optimizer.get_experimental_options())
    with no_remapping(False): assert dict(tf.config.optimizer.get_experimental_options())==before
    assert dict(tf.config.optimizer.get_experimental_options())==before
