"Training keeps its promises: it resumes exactly, counts right, keeps what it should, and says what is wrong."
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_training import experiment_of, new_trainer, small_spec, write_records

from effdet_nb.train import distributed, trainer as trainer_module
from effdet_nb.train.checkpoints import MetricHistory, latest_checkpoint
from effdet_nb.train.distributed import make_strategy
from effdet_nb.train.experiment import data_config_from_spec
from effdet_nb.train.fit import train
from effdet_nb.train.spec import Spec, SpecError
from effdet_nb.train.startup import initialize_weights
from effdet_nb.train.trainer import Trainer, training_batches
from effdet_nb.weights.model_file import load_keras_detector, load_model_file


@pytest.fixture(scope='module')
def records(tmp_path_factory): return write_records(tmp_path_factory.mktemp('shapes'))


@pytest.fixture(scope='module')
def spec(records):
    "Three epochs of three steps; the last is evaluated."
    spec = small_spec(
        records, num_epochs=3, lr_warmup_epoch=1, lr_warmup_init=.005, checkpoint_period=1, moving_average_decay=.9)
    return spec.replace(
        eval_config=dict(eval_batch_size=3, eval_epoch_cycle=3),
        augmentation_config=dict(rand_hflip=True, random_crop_min_scale=.7, random_crop_max_scale=1.3))


@pytest.fixture(scope='module')
def trained(spec, tmp_path_factory):
    "The folder of a run that nothing interrupted, and its history."
    folder = tmp_path_factory.mktemp('trained')
    return folder, train(spec, folder)


def set_training(spec, **changes): return spec.replace(training_config=changes)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(spec, trained, tmp_path):
    folder, history = trained
    train(set_training(spec, stop_at_epoch=1), tmp_path)
    resumed = train(spec, tmp_path)
    a, b = (load_model_file(f/'model.step-9.tlt') for f in (folder, tmp_path))
    for group in ('weights', 'ema', 'optimizer'):
        straight, continued = getattr(a, group), getattr(b, group)
        assert set(straight) == set(continued) and straight
        for k in straight: np.testing.assert_allclose(continued[k], straight[k], rtol=2e-3, atol=2e-4, err_msg=k)
    assert [r['step'] for r in resumed] == [r['step'] for r in history] == [3, 6, 9]
    np.testing.assert_allclose([r['loss'] for r in resumed], [r['loss'] for r in history], rtol=1e-3)


def test_a_finished_run_changes_nothing_when_started_again(spec, trained):
    folder, history = trained
    before = {p.name: p.read_bytes() for p in folder.glob('*.tlt')}
    assert len(train(spec, folder)) == len(history) == 3
    assert {p.name: p.read_bytes() for p in folder.glob('*.tlt')} == before


def test_files_of_a_run(spec, tmp_path):
    spec = set_training(spec, keep_checkpoint_max=2, iterations_per_loop=2)
    train(spec, tmp_path, key='secret')
    assert {p.name for p in tmp_path.glob('*.tlt')} == {'model.step-6.tlt', 'model.step-9.tlt', 'model.best.tlt'}
    for name in ('history.csv', 'history.png', 'spec.txt', 'environment.json', 'status.json'):
        assert (tmp_path/name).stat().st_size
    assert Spec.load(tmp_path/'spec.txt', 'train').training_config == spec.training_config
    tags = {value.tag for file in (tmp_path/'tensorboard').iterdir()
            for event in tf.compat.v1.train.summary_iterator(str(file)) for value in event.summary.value}
    expected = {'first_batch', 'predictions', 'step/loss', 'step/gradient_stem', 'step/gradient_class',
                'step/images_per_second', 'epoch/AP', 'epoch/lr'}
    assert expected <= tags
    lines = [json.loads(line) for line in (tmp_path/'status.json').read_text().splitlines()]
    assert lines[0]['status'] == 'STARTED' and lines[-1]['status'] == 'SUCCESS' and 0 <= lines[-1]['kpi']['AP'] <= 1
    assert {'time_per_epoch', 'eta', 'max_epoch'} <= set(lines[1])
    assert not any('secret' in p.read_text(errors='ignore') for p in tmp_path.iterdir() if p.is_file())
    detector = load_keras_detector(tmp_path/'model.best.tlt', 'secret')
    assert detector.classes.class_name(0) == 'circle'
    assert detector.meta['step'] == 9 and 'AP50' in detector.meta['scores']


def test_ctrl_c_saves_the_steps_done(spec, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(spec, tmp_path, callbacks=[Interrupt()])
    assert latest_checkpoint(tmp_path).name == 'model.step-4.tlt'
    assert json.loads((tmp_path/'status.json').read_text().splitlines()[-1])['status'] == 'FAILURE'
    assert [r['step'] for r in train(spec, tmp_path)] == [3, 6, 9]


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_remedy(spec, tmp_path):
    wild = set_training(
        spec, learning_rate=1e12, lr_warmup_epoch=0, clip_gradients_norm=0, num_epochs=20, logging_frequency=1)
    with pytest.raises(ValueError, match='lower training_config.learning_rate') as e: train(wild, tmp_path)
    message = str(e.value)
    step = int(message.split(':')[0].removeprefix('step '))
    parts = ('at learning rate', 'images ', 'gradients: stem ', 'class ', f'bad_batch.step-{step}.npz')
    for part in parts: assert part in message
    ids = message.split('images ')[1].split(';')[0].split(', ')
    with np.load(tmp_path/f'bad_batch.step-{step}.npz') as batch: assert len(batch['images']) == len(ids) == 4
    for p in tmp_path.glob('model.step-*.tlt'):
        assert all(np.isfinite(v).all() for v in load_model_file(p).weights.values())


def test_a_keras_callback_works_unchanged(spec, tmp_path):
    rows = []
    stop = keras.callbacks.EarlyStopping(monitor='loss', patience=1, min_delta=99)
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: rows.append((epoch, logs['loss'])))
    history = train(spec, tmp_path, callbacks=[stop, record])
    assert len(history) == 2 and rows == [(i, r['loss']) for i, r in enumerate(history)]
    assert latest_checkpoint(tmp_path).name == 'model.step-6.tlt'


def test_starting_from_weights_loads_those_that_fit(spec, trained):
    file = trained[0]/'model.step-9.tlt'
    other = set_training(spec.replace(dataset_config=dict(num_classes=6)), checkpoint=str(file))
    experiment, initial = experiment_of(other)
    trainer, history = Trainer(experiment.arch, experiment.training), MetricHistory([])
    start = initialize_weights(trainer, history, initial)
    assert '4 classes in the file, 6 in the model: class-predict is re-initialised' in start    # without a setting
    trainer.config = set_training(other, skip_checkpoint_variables='-predict').training_config
    counts = [line.split() for line in initialize_weights(trainer, history, initial).splitlines() if '_net' in line]
    assert counts == [['class_net', '23', '3'], ['box_net', '23', '3']]
    stored = load_model_file(file)
    np.testing.assert_array_equal(trainer.model.get_layer('stem_conv').kernel.numpy(), stored.ema['stem_conv/kernel'])


def test_frozen_layers_do_not_change(spec):
    trainer = new_trainer(spec.replace(model_config=dict(freeze_blocks='[0,1]', freeze_bn=True)))
    def is_frozen(path): return path.startswith(('stem_', 'block1a_')) or path.startswith('block') and '_bn/' in path
    before = {v.path: v.numpy() for v in trainer.model.weights}
    batches = training_batches(trainer, data_config_from_spec(spec))
    for _ in range(2): trainer.train_step(next(batches))
    after = {v.path: v.numpy() for v in trainer.model.weights}
    for k in filter(is_frozen, before): np.testing.assert_array_equal(after[k], before[k], err_msg=k)
    assert np.abs(after['block7a_project_conv/kernel']-before['block7a_project_conv/kernel']).max() > 0


def test_asking_for_gpus_that_are_not_there_is_an_error():
    n = len(tf.config.list_physical_devices('GPU'))
    with pytest.raises(ValueError, match=f'TensorFlow sees {n} GPU'): make_strategy(n+2)


@pytest.mark.parametrize('gpus, gpu_index, words', [
    (0, None, '^--gpus 0: must be a whole number, 1 or more'), (-1, None, '^--gpus -1'), (2., None, '^--gpus 2.0'),
    (2, [0, 0], r'^--gpu_index \[0, 0\]: must be whole numbers from 0, each of them once'),
    (1, -1, '^--gpu_index -1: must be'), (1, ['0'], '^--gpu_index'),
    (2, 0, '^--gpus 2 --gpu_index 0: the index must name as many GPUs'), (3, [0, 1], '^--gpus 3 --gpu_index'),
    (1, 2, '^--gpus 1 --gpu_index 2: TensorFlow sees 2 GPU')])
def test_gpus_that_cannot_be_meant_are_one_sentence(gpus, gpu_index, words):
    with pytest.raises(ValueError, match=words): distributed._gpu_names(gpus, gpu_index, ['GPU:0', 'GPU:1'])


def test_gpus_are_chosen_by_number_or_index():
    def names(*args): return distributed._gpu_names(*args, ['GPU:0', 'GPU:1'])
    assert names(2, None) == names(2, (0, 1)) == ['GPU:0', 'GPU:1']
    assert names(1, 1) == names(1, [np.int64(1)]) == ['GPU:1'] and names(2, [1, 0]) == ['GPU:1', 'GPU:0']
    with pytest.raises(ValueError, match='^--gpus 0'): make_strategy(0)


def test_all_problems_of_a_spec_are_reported_at_once(tmp_path):
    with pytest.raises(SpecError) as e: train(Spec(), tmp_path/'run')
    assert len(e.value.problems) >= 2 and not (tmp_path/'run').exists()


def batch_variances(model, images):
    "{path: variance} of the batch statistics of a model's weights on a batch: one update that keeps nothing."
    norms = [l for l in model.layers if isinstance(l, keras.layers.BatchNormalization) and l.momentum == .9]
    for norm in norms: norm.moving_variance.assign(keras.ops.zeros_like(norm.moving_variance))
    model(images, training=True)
    return {norm.moving_variance.path: norm.moving_variance.numpy()/(1-norm.momentum) for norm in norms}


def test_after_a_short_run_the_batch_statistics_belong_to_the_averaged_weights(spec):
    trainer, data = new_trainer(set_training(spec, num_epochs=16)), data_config_from_spec(spec)
    batches = training_batches(trainer, data)
    for _ in range(45): trainer.train_step(next(batches))
    images = keras.ops.concatenate([next(batches)['images'] for _ in range(4)])
    with trainer.ema.swapped_into(trainer.model.weights):
        kept = {v.path: v.numpy().copy() for v in trainer.model.weights}
        true = batch_variances(trainer.model, images)
    ratios = np.concatenate([kept[path]/np.maximum(variance, 1e-3) for path, variance in true.items()])
    assert np.median(abs(np.log(ratios))) < .25       # with a momentum of .99 everywhere it is above .6


@pytest.mark.parametrize('policy', ['mixed_bfloat16', pytest.param('mixed_float16', marks=pytest.mark.slow)])
def test_mixed_precision_stays_finite(spec, policy, monkeypatch):
    monkeypatch.setattr(trainer_module, 'amp_policy', lambda: policy)
    trainer = new_trainer(set_training(spec, amp=True))
    assert trainer.model.get_layer('stem_conv').compute_dtype == policy.removeprefix('mixed_')
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == 'mixed_float16')
    batches = training_batches(trainer, data_config_from_spec(spec))
    for _ in range(2): assert np.isfinite(trainer.train_step(next(batches)).numpy()[:4]).all()


TWO_REPLICAS = '''
import sys, numpy as np, tensorflow as tf
cpu, two = tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()]*2
tf.config.set_logical_device_configuration(cpu, two)
import keras
from effdet_nb.train.experiment import resolve_experiment
from effdet_nb.train.trainer import Trainer, training_batches
from effdet_nb.train.spec import Spec
spec, batch = Spec.load(sys.argv[1]), int(sys.argv[2])
spec = spec.replace(training_config=dict(train_batch_size=batch, num_examples_per_epoch=3*batch))
strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1']) if batch == 2 else tf.distribute.get_strategy()
keras.utils.set_random_seed(0)
experiment = resolve_experiment(spec)
trainer = Trainer(experiment.arch, experiment.training, strategy)
rng = np.random.default_rng(0)
for v in trainer.model.weights:
    if v.path.endswith('kernel'): v.assign(rng.normal(0, .1, v.shape))
metrics = trainer.train_step(next(training_batches(trainer, experiment.data)))
weights = {str(i): v.numpy() for i, v in enumerate(trainer.model.weights)}
np.savez(sys.argv[3], metrics=metrics.numpy(), ema=trainer.ema.flat_weights.numpy(), **weights)
'''


@pytest.mark.slow
def test_two_replicas_equal_one_with_the_same_images(spec, tmp_path):
    (tmp_path/'spec.txt').write_text(spec.to_text())
    (tmp_path/'two.py').write_text(TWO_REPLICAS)
    env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'}
    for batch in (2, 4):
        command = [sys.executable, 'two.py', 'spec.txt', str(batch), f'{batch}.npz']
        r = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-3000:]
    two, one = np.load(tmp_path/'2.npz'), np.load(tmp_path/'4.npz')
    np.testing.assert_allclose(two['metrics'][:4], one['metrics'][:4], rtol=1e-5)
    # the gradient's norm gathers the rounding of all layers
    np.testing.assert_allclose(two['metrics'][4], one['metrics'][4], rtol=.02)
    for k in set(one.files)-{'metrics'}: np.testing.assert_allclose(two[k], one[k], rtol=1e-3, atol=5e-4, err_msg=k)
