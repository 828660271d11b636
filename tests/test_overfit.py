"Guards of overfitting on purpose: what is trained on, how it can end, and the command."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_training import small_spec, write_records

from effdet_nb.app import cli
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.pipeline import make_sample_loader, train_dataset
from effdet_nb.data.record_index import Records, require_record_files
from effdet_nb.data.scan import scan_records
from effdet_nb.train import overfit as O
from effdet_nb.train.experiment import arch_from_spec, data_config_from_spec


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return write_records(tmp_path_factory.mktemp('overfit'))


@pytest.fixture(scope='module')
def spec(folder): return small_spec(folder, train_batch_size=8, learning_rate=.08)


def scan_of(spec):
    return scan_records(Records.from_files(require_record_files(spec.dataset_config.training_file_pattern)))


def result(losses, AP50=0., matched=(True,), rate=.01, out_of_time=False, size=40.):
    sizes = np.full((len(matched),2), size)
    return O.OverfitResult(rate, 8, losses, {'AP': AP50/2, 'AP50': AP50}, sizes, np.array(matched), out_of_time)


FALLEN, FLAT = [2.]+[.2]*9, [2.]+[1.9]*9


@pytest.mark.parametrize('run,outcome,advice', [
    (result(FALLEN, .9), O.Outcome.LEARNED, 'does not show whether the labels are right'),
    (result(FLAT, .95), O.Outcome.LEARNED, 'can work'),
    (result([2.,float('nan')]), O.Outcome.DIVERGED, 'became nan in step 2'),
    (result([2.,float('inf')], rate=3.), O.Outcome.DIVERGED, 'learning rate 3 for 8 images'),
    (result(FLAT, rate=1e-5), O.Outcome.STUCK, '1e-05 for 8 images per step, is low: 0.01 to 0.05'),
    (result(FLAT, rate=2.), O.Outcome.STUCK, '2 for 8 images per step, is high'),
    (result([2.,float('nan')], rate=.001), O.Outcome.DIVERGED, 'not too high, so check clip_gradients_norm'),
    (result(FLAT, rate=.05), O.Outcome.STUCK, '95% of its first value. The learning rate is not far'),
    (result([2.]+[3.]*9, rate=.05), O.Outcome.STUCK, 'The loss rose to 150% of its first value'),
    (result(FALLEN, .89), O.Outcome.NOT_LEARNED, 'AP50 on the same images is 0.89'),
    (result(FALLEN, .4, [False,True,True], size=3.), O.Outcome.NO_ANCHOR, '1 of 3 boxes match no anchor'),
    (result(FLAT, .1, [False]*4, size=5.), O.Outcome.NO_ANCHOR, '5 x 5 pixels'),
    (result(FLAT, .1, [False]*4, rate=1e-5), O.Outcome.NO_ANCHOR, '1e-05 for 8 images per step, is low: 0.01 to 0.05'),
    (result(FLAT, .1, out_of_time=True), O.Outcome.OUT_OF_TIME, 'after 10 steps'),
    (result(FLAT, .1, out_of_time=True, rate=1e-5), O.Outcome.OUT_OF_TIME, 'is low'),
    (result(FALLEN, .5, rate=1e-5), O.Outcome.NOT_LEARNED, 'is low'),
    (replace(result(FALLEN, .5, rate=.08), num_images=64), O.Outcome.NOT_LEARNED, '10 steps may be too few'),
])
def test_each_end_has_its_outcome_and_advice(run, outcome, advice):
    assert run.outcome==outcome and advice in O.overfit_advice(run)
    assert repr(run).endswith(O.overfit_advice(run)) and O.overfit_advice(run) not in run.summary()


@pytest.mark.parametrize('num_steps,seconds,advice', [
    (10, 120., '100 steps need --minutes 20'), (50, 120., '100 steps need --minutes 4'),
    (99, 60., '100 steps need --minutes 2'), (120, 60., '200 steps need --minutes 2'),
    (40, None, 'Allow more time with --minutes')])
def test_out_of_time_says_how_much_time_is_needed(num_steps, seconds, advice):
    run = replace(result([2.]*num_steps, .1, out_of_time=True), seconds=seconds)
    assert advice in O.overfit_advice(run)


def test_too_many_images_for_the_memory_are_named_with_a_remedy_that_helps():
    class Run:
        plan,arch = SimpleNamespace(batch_size=64), SimpleNamespace(image_hw=(512,512))
        def run(self, *_): raise tf.errors.ResourceExhaustedError(None, None, 'OOM')
    Run.plan.config = SimpleNamespace(gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match='out of memory with 64 images in one step. Take fewer images') as e:
        O._run_in_memory(Run(), 10, 1.)
    assert 'batch' not in str(e.value)


def test_chosen_images_have_objects_and_cover_the_categories(spec):
    scan = scan_of(spec)
    for num in (2, 3, 5, 100):
        numbers = O.choose_images(scan, num)
        rows = [int(np.flatnonzero(scan.record_index==number)[0]) for number in numbers]
        assert len({*numbers})==len(numbers)<=num and all(scan.boxes_per_image[row] for row in rows)
        if num>=3: assert {*scan.labels[np.isin(scan.image_index, rows)].tolist()}=={*scan.labels.tolist()}
    assert O.choose_images(scan, 5)==O.choose_images(scan, 5)


def test_the_fixed_batch_is_a_training_batch_without_augmentation(spec):
    plain = spec.replace(augmentation_config=dict(random_crop_min_scale=1., random_crop_max_scale=1.))
    config = data_config_from_spec(plain)
    loader = make_sample_loader(config)
    batch = O.fixed_batch(loader, [0,5,7], arch_from_spec(spec))
    trained = [image for step in train_dataset(config, 4).take(3).as_numpy_iterator() for image in step['images']]
    for image in batch['images'].numpy(): assert any(np.array_equal(image, other) for other in trained)
    counts = (batch['cls_targets'].numpy()>=0).sum(1)
    assert (counts==batch['num_positives'].numpy()).all() and (counts>0).all()


@pytest.mark.parametrize('batch,num,rate', [(16,8,.05), (8,8,.1), (2,4,.2)])
def test_the_learning_rate_follows_the_number_of_images(spec, batch, num, rate):
    config = O.overfit_spec(spec.replace(training_config=dict(train_batch_size=batch, learning_rate=.1)), num)
    assert config.training_config.learning_rate==pytest.approx(rate) and config.training_config.train_batch_size==num


def test_the_command_reports_images_that_are_learned(spec, tmp_path, capsys):
    path = tmp_path/'spec.txt'
    path.write_text(spec.to_text())
    cli.effdet_check(experiment_spec_file=str(path), overfit=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith('learned: The objects are found')
    assert any(line.startswith('training:') for line in lines)


@pytest.mark.parametrize('num,minutes', [(0,2), (-3,2), (8,0), (8,float('nan'))])
def test_the_command_rejects_numbers_that_make_no_sense(num, minutes, capsys):
    with pytest.raises(SystemExit): cli.effdet_check(experiment_spec_file='spec.txt', overfit=num, minutes=minutes)
    assert 'at least 1 image' in capsys.readouterr().err.splitlines()[-1]


def with_annotations(folder, name, change):
    "Converts the drawings again with changed boxes."
    data = json.loads((folder/'shapes'/'train.json').read_text())
    for annotation in data['annotations']: annotation['bbox'] = change(annotation['bbox'])
    (folder/f'{name}.json').write_text(json.dumps(data))
    dataset_convert(folder/'shapes'/'train', folder/f'{name}.json', folder/name, 'train', num_shards=1)
    return f'{folder/name}/train-*'


@pytest.mark.slow
def test_boxes_of_two_pixels_are_explained_by_the_anchors(spec, folder):
    pattern = with_annotations(folder, 'tiny', lambda box: [v/20 for v in box])
    run = O.overfit(spec.replace(dataset_config=dict(training_file_pattern=pattern)), 4, max_steps=50)
    assert run.outcome==O.Outcome.NO_ANCHOR and not run.is_matched.any() and run.box_sizes.max()<8


@pytest.mark.slow
def test_images_without_their_objects_are_not_learned(spec, folder):
    for path in (folder/'shapes'/'train').iterdir():
        target = folder/'grey'/path.name
        target.parent.mkdir(exist_ok=True)
        Image.new('RGB', Image.open(path).size, (90,90,90)).save(target)
    dataset_convert(folder/'grey', folder/'shapes'/'train.json', folder/'grey_records', 'train', num_shards=1)
    grey = spec.replace(dataset_config=dict(training_file_pattern=f'{folder}/grey_records/train-*'))
    run = O.overfit(grey, 4, max_steps=75)
    assert run.outcome in (O.Outcome.STUCK, O.Outcome.NOT_LEARNED) and run.metrics['AP50']<.3


@pytest.mark.slow
def test_time_and_rate_are_blamed_for_good_data(spec):
    assert O.overfit(spec, 4, seconds=.001).outcome==O.Outcome.OUT_OF_TIME
    slow = O.overfit(spec.replace(training_config=dict(learning_rate=1e-4)), 4, max_steps=20)
    assert slow.outcome==O.Outcome.STUCK and 'is low' in repr(slow)
    hot = spec.replace(training_config=dict(learning_rate=1e4, clip_gradients_norm=0.))
    assert O.overfit(hot, 4, max_steps=60).outcome in (O.Outcome.DIVERGED, O.Outcome.STUCK)


def test_the_batch_is_padded_as_in_evaluation(folder):
    "Of a lite variant, whose padding is not ImageNet's mean colour; the input is wider than the images."
    spec = small_spec(folder, train_batch_size=8).replace(
        model_config=dict(model_name='efficientdet-lite0'), dataset_config=dict(image_size='128,256'))
    arch, loader = arch_from_spec(spec), make_sample_loader(data_config_from_spec(spec))
    images = O.fixed_batch(loader, O.choose_images(scan_of(spec), 2), arch)['images'].numpy()
    assert {tuple(image[-1,-1]) for image in images} == {arch.pad_rgb} == {(127, 127, 127)}
