"The data check finds each mistake in records or a spec, with its number and what to do; good data passes."
import json
import re
import shutil

import numpy as np
import pytest

from effdet_nb.app.dataset_page import initial_weights_note
from effdet_nb.data import check as C
from effdet_nb.data.anchor_fit import best_size_iou
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.record_checks import check_classes
from effdet_nb.data.pipeline import DataConfig
from effdet_nb.data.record_index import Records, index_tfrecord
from effdet_nb.data.scan import scan_records
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.detector.anchors import all_anchors
from effdet_nb.train.experiment import data_config_from_spec
from effdet_nb.train.spec import Spec
from test_pipeline import api_record, noise_image, write_shards


pytestmark = pytest.mark.filterwarnings('ignore:.*is given twice')      # a test spec overrides by repeating


@pytest.fixture(scope='module')
def toy_dataset(tmp_path_factory):
    folder = make_toy_dataset(tmp_path_factory.mktemp('check'), 20, 8, (128,160))
    for tag in ('train','val'): dataset_convert(folder/tag, folder/f'{tag}.json', folder/'rec', tag, num_shards=2)
    return folder


def make_spec(folder, more='', training='', rec='rec'):
    return Spec.parse(f'''training_config {{ train_batch_size: 4 {training} }}
        dataset_config {{ num_classes: 4  image_size: "256,320"  training_file_pattern: "{folder}/{rec}/train-*"
        validation_file_pattern: "{folder}/{rec}/val-*"  validation_json_file: "{folder}/val.json" {more} }}''')


def settings(spec):
    "What training hands to the check."
    training = spec.training_config
    return dict(config=data_config_from_spec(spec), epoch_size=training.num_examples_per_epoch,
                batch_size=training.train_batch_size, eval_samples=spec.eval_config.eval_samples)


def check_spec(spec, **kw):
    return C.check_records(**settings(spec), anchors=all_anchors(spec.dataset_config.image_hw), **kw)
def problem_text(check): return '\n'.join(map(str, check.problems))


def test_good_data_has_no_problems(toy_dataset):
    check = check_spec(make_spec(toy_dataset), decode_images=True, verify_checksums=True)
    assert check.problems == [] and repr(check).endswith('no problems') and check.scans['training'].num_records == 20
    assert C.check_before_training(**settings(make_spec(toy_dataset))).problems == []


mistakes = {
    'too few channels': (dict(more='num_classes: 2'), 1, r'num_classes 2: 3 categories do not fit'),
    'too many objects': (dict(more='max_instances_per_image: 2'), 1,
                         r'\d+ training images have more than 2 objects, the most is (\d+) in \d+.jpg \(id \d+\). '
                         r'Set it to \1'),
    'no such records': (dict(rec='nowhere'), 2, r'training_file_pattern: no file matches'),
    'a folder instead of a pattern': (dict(more='training_file_pattern: "{}/rec"'), 1,
                                      r'training_file_pattern: ".*/rec" is a folder. Write the names of the records '
                                      r'with \*, such as ".*/rec/train-\*" or ".*/rec/val-\*"'),
    'file of another set': (dict(more='validation_file_pattern: "{}/rec/train-*"'), 2,
                            r'12 of 20 validation images are not in val.json, such as 000009.jpg'),
    'a part of the validation': (dict(more='validation_file_pattern: "{}/rec/val-00000*"'), 0,
                                 r'4 of its 8 images have no record'),
    'a part of the shards': (dict(more='training_file_pattern: "{}/rec/train-00001*"'), 0,
                             r'"train-00001\*" matches 1 of 2 shards'),
    'epoch too long': (dict(training='num_examples_per_epoch: 14700'), 0,
                       r'14,700, but there are 20 training images: an epoch reads each 735.0 times'),
    'batch too large': (dict(training='train_batch_size: 64'), 0, r'64 is more than the 20 training images'),
    'no annotation file': (dict(more='validation_json_file: "{}/no.json"'), 1,
                           r'validation_json_file: .*no.json: no such file'),
}


@pytest.mark.parametrize('change, num_errors, message', mistakes.values(), ids=mistakes)
def test_a_mistake_in_the_spec_is_found(toy_dataset, change, num_errors, message):
    check = check_spec(make_spec(toy_dataset, **{k: v.replace('{}', str(toy_dataset)) for k,v in change.items()}))
    assert re.search(message, problem_text(check)), problem_text(check)
    assert len(check.errors) == num_errors
    if num_errors:
        with pytest.raises(ValueError, match='the data does not fit the spec'):
            C.check_before_training(**settings(make_spec(toy_dataset,
                                                         **{k: v.replace('{}', str(toy_dataset))
                                                            for k,v in change.items()})))


@pytest.mark.parametrize('val_ids, is_error', [('ab', True), ('b', True), ('bc', False), ('c', None)])
def test_validation_images_that_are_training_images_are_found(val_ids, is_error, tmp_path):
    check = check_spec(api_record_spec(tmp_path, [api_record(k) for k in 'ab'], [api_record(k) for k in val_ids]))
    found = [p for p in check.problems if 'in the training set as well' in p.message]
    assert [p.is_error for p in found]==([] if is_error is None else [is_error])
    assert all(f'such as image {min(set("ab") & set(val_ids))}' in p.message for p in found)


@pytest.mark.parametrize('num_classes, ids, expected', [
    (5, [1], '1 category: 2 is enough'),
    (4, [1, 2], '2 categories: 3 is enough'),
    (9, [0, 7], '2 categories: 3 is enough'), (9, [1, 7], '2 categories: 8 is enough'),
    (3, [1, 2], None), (3, [0, 7], None), (2, [1, 2], None)])
def test_channels_without_a_category_are_a_note(num_classes, ids, expected, tmp_path):
    draw_toy(tmp_path, ids)
    result = dataset_convert(tmp_path/'images', tmp_path/'a.json', tmp_path/'rec', 'train', num_shards=1, workers=1)
    scan = scan_records(Records.from_files(result.files))
    problems = [*check_classes(scan, f'{tmp_path}/rec/train-*', num_classes)]
    assert not any(p.is_error for p in problems) and len(problems)==(expected is not None)
    if expected: assert problems[0].message.endswith(expected) and f'is {num_classes}, but' in problems[0].message


def draw_toy(folder, ids):
    "Writes an image with one box of each category."
    (folder/'images').mkdir()
    (folder/'images'/'a.jpg').write_bytes(noise_image(1))
    boxes = [dict(id=i, image_id=1, category_id=k, bbox=[2, 2, 9, 9]) for i,k in enumerate(ids)]
    categories = [dict(id=k, name=f'c{k}') for k in ids]
    (folder/'a.json').write_text(json.dumps(dict(images=[dict(id=1, file_name='a.jpg')], annotations=boxes,
                                                 categories=categories)))


def api_record_spec(folder, records, val=None, more=''):
    write_shards(folder, records, 1)
    if val: write_shards(folder, val, 1, 'val')
    validation = f'validation_file_pattern: "{folder}/val-*"' if val else ''
    return Spec.parse(f'''training_config {{ train_batch_size: 1 }} dataset_config {{ num_classes: 3
        image_size: "128,128" training_file_pattern: "{folder}/train-*" {validation} {more} }}''')


faults = {
    'unknown ids': (lambda: [api_record('a', labels=[7]), api_record('b', labels=[0]), api_record('c')], 1,
                    r'2 boxes have category ids that have no channel \(0, 7\), the channels are for 1 to 2. '
                    r'Set num_classes to 8'),
    'ids from 0': (lambda: [api_record('a', labels=[0]), api_record('b', labels=[1])], 1,
                   r'1 box has category ids that have no channel \(0\), the channels are for 1 to 2. Ids below 1'),
          # no num_classes is large enough
    'all empty': (lambda: [api_record(k, boxes=()) for k in 'abc'], 1, r'none of the 3 images has an object'),
    'mostly empty': (lambda: [api_record(k, boxes=() if k != 'a' else ((.1,.2,.5,.6),)) for k in 'abc'], 0,
                     r'2 of 3 images \(67%\) have no object'),
    'no area': (lambda: [api_record('a', boxes=((.1,.2,.1,.6),))], 1, r'1 box has no area, such as one in image a'),
    'outside': (lambda: [api_record('a', boxes=((.1,.2,1.4,.6),))], 0, r'1 box extends beyond the image'),
    'copies': (lambda: [api_record('a'), api_record('a2', encoded=noise_image(hash('a')%1000)), api_record('b')], 0,
               r'1 of 3 images is an exact copy of another, such as image a2 of image a'),
    'pixels': (lambda: [api_record('a', boxes=((10,20,30,45),)*2, hw=(60,60)), api_record('b')], 1,
               r'2 of 3 boxes are far outside their image, such as one in image a, so they look like pixels'),
    'pixels in part': (lambda: [api_record('a', boxes=((0,0,60,60),(1,2,1.5,50),(.1,.2,.3,.4)), hw=(60,60))], 1,
                       r'2 of 3 boxes are far outside their image'),
    'fractions': (lambda: [api_record('a', boxes=((.001,.002,.01,.012),)*2, hw=(60,60))], 1,
                  r'2 boxes are smaller than a pixel, such as one in image a'),
    'not finite': (lambda: [api_record('a', boxes=((.1,float('nan'),.3,.6),(.1,.1,.5,.5)))], 1,
                   r'1 of 1 record is damaged: \S+, record 0: image/object/bbox/xmin of object 0 is nan, '
                   r'which no object in an image has'),
    'copies with other boxes': (lambda: [api_record('a'), api_record('b', boxes=((.3,.3,.6,.6),),
                                         encoded=noise_image(hash('a')%1000)), api_record('c')], 1,
                                r'1 of 3 images is a copy of another with other boxes, such as image b of image a'),
    'copies that were labelled twice': (lambda: [api_record('a', boxes=((.3,.3,.6,.6),)), api_record(
        'b', boxes=((.3,.32,.6,.58),), encoded=noise_image(hash('a')%1000)), api_record('c')], 0,
        r'1 of 3 images is an exact copy of another, such as image b of image a'),
    'tiny': (lambda: [api_record('a', boxes=((.1,.1,.11,.11),)*2, hw=(256,256))], 1,
             r'2 of 2 boxes \(100%\) are smaller than 2 pixels at 128x128'),
    'small': (lambda: [api_record('a', boxes=((.1,.1,.17,.17),)*2, hw=(60,60))], 0,
              r'2 of 2 boxes \(100%\) are too small for the smallest anchor \(32 pixels\) .* median is 9 pixels. Raise '
              r'image_size to "320,320", cut the images into tiles \(effdet_tile\), or lower model_config.anchor'),
    'small and thin': (lambda: [api_record('a', boxes=((.1,.1,.11,.2),)*2, hw=(300,300))], 0,
                       r'2 of 2 boxes .* too small .* Cut the images into tiles'),
    'small and without area': (lambda: [api_record('a', boxes=((.1,.1,.1,.14), (.1,.1,.17,.17)), hw=(60,60))], 1,
                               r'1 box has no area'),
    'thin': (lambda: [api_record('a', boxes=((.1,.1,.2,.95),), hw=(60,60))], 0,
             r'1 of 1 box \(100%\) is longer than any anchor .* beyond 8.5 to 1. Add such a pair to aspect_ratios'),
    'damaged': (lambda: [api_record('a'), b'\x0anothing'], 1,
                r'1 of 2 records is damaged: train-00000-of-00001, record 1: not a tf.train.Example'),
}


@pytest.mark.parametrize('records, num_errors, message', faults.values(), ids=faults)
def test_a_fault_in_the_records_is_found(tmp_path, records, num_errors, message):
    check = check_spec(api_record_spec(tmp_path, records()))
    assert re.search(message, problem_text(check)), problem_text(check)
    assert len(check.errors) == num_errors, problem_text(check)


@pytest.mark.parametrize('crowds, more, num_errors, num_notes', [
    ([[1], [1]], '', 1, 0), ([[1], [1]], 'skip_crowd_during_training: False', 0, 1), ([[1], [0]], '', 0, 0)])
def test_a_split_of_crowds_is_found(tmp_path, crowds, more, num_errors, num_notes):
    check = check_spec(api_record_spec(tmp_path, [api_record(k, crowd=c) for k, c in zip('ab', crowds)], more=more))
    found = [p for p in check.problems if 'boxes are crowds' in p.message]
    assert [p.is_error for p in found]==[True]*num_errors + [False]*num_notes


def test_validation_crowds_are_an_error(tmp_path):
    records = [api_record(k, crowd=[1]) for k in 'ab']
    check = check_spec(api_record_spec(tmp_path, [api_record('c')], records, 'skip_crowd_during_training: False'))
    assert 'problem  validation: all 2 boxes are crowds' in problem_text(check)


def test_damaged_records_are_no_error_if_they_are_skipped(tmp_path):
    spec = api_record_spec(tmp_path, [api_record('a'), b'\x0anothing'], more='skip_corrupt: True')
    check = check_spec(spec)
    assert not check.errors and 'skip_corrupt leaves them out' in problem_text(check)


def test_images_are_decoded_on_request(tmp_path):
    spec = api_record_spec(tmp_path, [api_record('a'), api_record('b', encoded=noise_image(2)[:200])])
    assert not check_spec(spec).errors
    text = problem_text(check_spec(spec, decode_images=True))
    assert '1 of 2 records is damaged: train-00000-of-00001, record 1: its image cannot be decoded' in text


def test_missing_and_changed_shards_are_found(toy_dataset, tmp_path):
    rec = shutil.copytree(toy_dataset/'rec', tmp_path/'rec')
    shutil.copy(toy_dataset/'val.json', tmp_path/'val.json')
    (rec/'train-00000-of-00002.tfrecord').unlink()
    text = problem_text(check_spec(make_spec(tmp_path)))
    assert '1 of 2 shards is missing, such as train-00000-of-00002.tfrecord' in text
    shutil.copy(toy_dataset/'rec'/'train-00000-of-00002.tfrecord', rec)
    shard = rec/'train-00001-of-00002.tfrecord'
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    text = problem_text(check_spec(make_spec(tmp_path), verify_checksums=True))
    assert 'train-00001-of-00002.tfrecord is not the file that was written' in text


@pytest.mark.parametrize('damage, message', [
    ('cut', r'val-00000-of-00002.tfrecord: [\d,]+ bytes, but [\d,]+ were written'),
    ('sidecar', r'val_records.json: not written by dataset_convert'),
    ('other classes', r'these 2 conversions have different categories')])
@pytest.mark.parametrize('with_training', [True, False], ids=['both splits', 'validation'])
def test_shards_without_a_usable_class_table_are_in_the_report(toy_dataset, tmp_path, damage, message, with_training):
    rec = shutil.copytree(toy_dataset/'rec', tmp_path/'rec')
    shard = rec/'val-00000-of-00002.tfrecord'
    if damage=='cut': shard.write_bytes(shard.read_bytes()[:index_tfrecord(shard)[0].sum()+4])    # after a record
    if damage=='sidecar': (rec/'val_records.json').write_text('{"shards": [{}]}')
    if damage=='other classes':
        labels = json.loads((toy_dataset/'val.json').read_text())
        labels['categories'].append(dict(id=9, name='star'))
        (tmp_path/'more.json').write_text(json.dumps(labels))
        dataset_convert(toy_dataset/'val', tmp_path/'more.json', rec, 'val-more', num_shards=1)
    training = f'{rec}/train-*' if with_training else ''
    check = C.check_records(DataConfig(training, f'{rec}/val-*', num_classes=4))
    assert [p.source for p in check.errors]==['dataset_config.validation_file_pattern']
    assert re.search(message, check.errors[0].message)


def test_an_image_is_no_copy_of_itself(tmp_path):
    box = [[.1, .1, .1, .5]]                                                     # without a width, so without an area
    records = [api_record('a', boxes=box), api_record('b'), api_record('b')]
    check = check_spec(api_record_spec(tmp_path, records))
    assert '1 of 3 images is an exact copy of another' in problem_text(check)
    assert 'with other boxes' not in problem_text(check)


def test_a_repeated_image_id_in_validation_is_found(tmp_path):
    spec = api_record_spec(tmp_path, [api_record('a')], [api_record('1'), api_record('1', hw=(50,60))])
    (tmp_path/'val.json').write_text(json.dumps(dict(images=[dict(id=1, file_name='a', height=40, width=60)],
                                                     annotations=[], categories=[dict(id=1, name='x')])))
    spec = spec.replace(dataset_config=dict(validation_json_file=str(tmp_path/'val.json')))
    assert '1 image has the image id of another one' in problem_text(check_spec(spec))


def test_a_sample_is_spread_over_all_records(toy_dataset):
    check = check_spec(make_spec(toy_dataset), limit=4)
    scan = check.scans['training']
    assert scan.record_index.tolist() == [0, 6, 12, 19] and scan.num_records == 20
    assert '(looked at 4 of 20)' in repr(check)


def test_best_size_iou_is_the_iou_of_boxes_on_one_centre():
    from effdet_nb.detector.boxes import iou
    rng = np.random.default_rng(0)
    sides, anchors = rng.uniform(1, 200, (50,2)), rng.uniform(1, 200, (9,2))
    def centred(s):
        return np.concatenate([-s/2, s/2], 1)
    np.testing.assert_allclose(best_size_iou(sides, anchors), iou(centred(sides), centred(anchors)).max(1), rtol=1e-4)
    assert len(best_size_iou(np.zeros((0,2)), anchors)) == 0


@pytest.mark.parametrize('name, classes', [pytest.param('bccd', 4, marks=pytest.mark.slow), ('coco_mini', 91)])
def test_real_data_has_no_problems_and_a_page(shared_dir, tmp_path, name, classes):
    from effdet_nb.app.dataset_page import check_dataset
    data = shared_dir/'data'/name
    for tag in ('train','val'): dataset_convert(data/'images', data/f'{tag}.json', tmp_path/'rec', tag, num_shards=4)
    (tmp_path/'val.json').write_bytes((data/'val.json').read_bytes())
    check = check_dataset(make_spec(tmp_path, f'num_classes: {classes} image_size: "512,512"'), tmp_path/'page.html')
    assert not check.errors, problem_text(check)
    page = (tmp_path/'page.html').read_text()
    assert page.count('<image') == 24+6 and 'src="http' not in page and len(page) < 3_000_000


@pytest.mark.parametrize('names, tags', [
    (['train-00000-of-00002', 'train-00001-of-00002'], None),
    (['train-00000-of-00001', 'train-valid-00000-of-00001'], 'train (1), train-valid (1)'),
    (['a-00000-of-00001.tfrecord', 'a2-00000-of-00002.tfrecord', 'a2-00001-of-00002.tfrecord'], 'a (1), a2 (2)'),
    (['plain.tfrecord'], None)])
def test_a_pattern_that_matches_several_conversions_gets_a_note(names, tags):
    from effdet_nb.data.check import _check_tags
    notes = [str(note) for note in _check_tags([f'/x/{name}' for name in names], 'a*', 'training')]
    assert [tags in note for note in notes]==[True]*len(notes) and len(notes)==(tags is not None)


@pytest.mark.parametrize('names, is_wrong', [(['circle', 'square', 'triangle'], False), (['circle', 'square'], False),
                                             (['square', 'triangle'], True), (['triangle', 'square', 'circle'], True)])
def test_classes_with_another_id_in_validation_are_an_error(names, is_wrong, toy_dataset, tmp_path):
    labels = json.loads((toy_dataset/'val.json').read_text())
    old_ids = {c['name']: c['id'] for c in labels['categories']}
    new_ids = {old_ids[name]: i for i,name in enumerate(names, 1)}
    labels['annotations'] = [a | dict(category_id=new_ids[a['category_id']]) for a in labels['annotations']
                             if a['category_id'] in new_ids]
    labels['categories'] = [dict(id=i, name=name) for i,name in enumerate(names, 1)]
    (tmp_path/'val.json').write_text(json.dumps(labels))
    dataset_convert(toy_dataset/'val', tmp_path/'val.json', tmp_path/'rec', 'val', num_shards=1)
    more = f'validation_file_pattern: "{tmp_path}/rec/val-*" validation_json_file: "{tmp_path}/val.json"'
    check = check_spec(make_spec(toy_dataset, more))
    assert ('have another channel than in training' in problem_text(check))==is_wrong==bool(check.errors)


@pytest.mark.parametrize('fields, is_noted', [
    ('', True), ('checkpoint: "imagenet"', False), ('checkpoint: "a.tlt"', False),
    ('pruned_model_path: "a.tlt"', False)])
def test_random_weights_with_few_images_are_noted(fields, is_noted, toy_dataset):
    spec = Spec.parse(f'training_config {{ {fields} }}')
    check = check_spec(make_spec(toy_dataset))
    note = initial_weights_note(spec, check)
    assert (note is not None)==is_noted
    if is_noted: assert not note.is_error and 'Set checkpoint: "imagenet"' in note.message


@pytest.mark.parametrize('model_name, advice', [
    ('efficientdet-d0', 'Set checkpoint: "imagenet"'), ('efficientdet-lite2', 'Set checkpoint: "imagenet"'),
    ('efficientdet-lite3', 'published weights of efficientdet-lite3'), ('efficientdet-tiny', None)])
def test_the_advice_on_random_weights_is_one_that_the_variant_can_follow(model_name, advice, toy_dataset):
    spec = Spec.parse(f'model_config {{ model_name: "{model_name}" }}')
    note = initial_weights_note(spec, check_spec(make_spec(toy_dataset)))
    assert note is None if advice is None else advice in note.message
