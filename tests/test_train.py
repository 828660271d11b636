"Training keeps its promises: it resumes exactly, counts right, keeps what it should, and says what is wrong."
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.convert import dataset_convert
from effdet_nb.train import trainer as S, fit as T
from effdet_nb.train.fit import resolve_arch
from effdet_nb.detector import efficientdet as detector
from effdet_nb.weights.model_file import load_keras_detector
from effdet_nb.weights.model_file import load_keras_model
from effdet_nb.weights.model_file import load_model_file
from effdet_nb.train.spec import Spec, SpecError


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    make_toy_dataset(folder/'shapes', num_train=12, num_val=4, image_hw=(128, 128), seed=0)
    for split in ('train', 'val'): dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder, split, num_shards=2, workers=1)
    return folder


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    "The same wiring with one block per stage and one layer per head: tracing takes a third of the time."
    monkeypatch.setitem(detector.VARIANTS, 'efficientdet-d0', (128, .35, .3, 16, 1, 1))


@pytest.fixture
def spec(records):
    return Spec().replace(
        dataset_config=dict(training_file_pattern=f'{records}/train-*', validation_file_pattern=f'{records}/val-*',
                            validation_json_file=f'{records}/shapes/val.json', num_classes=4, image_size='128,128', max_instances_per_image=20),
        training_config=dict(train_batch_size=4, num_examples_per_epoch=12, num_epochs=3, learning_rate=.05, lr_warmup_epoch=1, lr_warmup_init=.005,
                             checkpoint_period=1, moving_average_decay=.9),
        eval_config=dict(eval_batch_size=3, eval_epoch_cycle=3), augmentation_config=dict(rand_hflip=True, random_crop_min_scale=.7, random_crop_max_scale=1.3))


def test_a_resumed_run_equals_an_uninterrupted_one(spec, tmp_path):
    straight = T.train(spec, tmp_path/'a')
    T.train(spec.replace(training_config=dict(stop_at_epoch=1)), tmp_path/'b')
    resumed = T.train(spec, tmp_path/'b')
    a, b = (load_model_file(tmp_path/x/'model.step-9.tlt') for x in 'ab')
    for group in ('weights', 'ema', 'optimizer'):
        ours, theirs = getattr(a, group), getattr(b, group)
        assert set(ours) == set(theirs) and ours
        for k in ours: np.testing.assert_allclose(theirs[k], ours[k], rtol=2e-3, atol=2e-4, err_msg=k)
    assert [r['step'] for r in resumed] == [r['step'] for r in straight] == [3, 6, 9]
    np.testing.assert_allclose([r['loss'] for r in resumed], [r['loss'] for r in straight], rtol=1e-3)


def test_a_finished_run_changes_nothing_when_started_again(spec, tmp_path):
    T.train(spec.replace(training_config=dict(num_epochs=1)), tmp_path)
    before = (tmp_path/'model.step-3.tlt').read_bytes()
    again = T.train(spec.replace(training_config=dict(num_epochs=1)), tmp_path)
    assert len(again) == 1 and (tmp_path/'model.step-3.tlt').read_bytes() == before


def test_files_of_a_run(spec, tmp_path):
    spec = spec.replace(training_config=dict(keep_checkpoint_max=2, iterations_per_loop=2))
    T.train(spec, tmp_path, key='secret')
    assert {p.name for p in tmp_path.glob('*.tlt')} == {'model.step-6.tlt', 'model.step-9.tlt', 'model.best.tlt'}
    for name in ('history.csv', 'history.png', 'spec.txt', 'environment.json', 'status.json'): assert (tmp_path/name).stat().st_size
    assert Spec.load(tmp_path/'spec.txt', 'train').training_config == spec.training_config
    tags = {v.tag for f in (tmp_path/'tensorboard').iterdir() for e in tf.compat.v1.train.summary_iterator(str(f)) for v in e.summary.value}
    assert {'first_batch', 'predictions', 'step/loss', 'step/gradient_stem', 'step/images_per_second', 'epoch/AP', 'epoch/lr'} <= tags
    lines = [json.loads(l) for l in (tmp_path/'status.json').read_text().splitlines()]
    assert lines[0]['status'] == 'STARTED' and lines[-1]['status'] == 'SUCCESS' and 0 <= lines[-1]['kpi']['AP'] <= 1 and {'time_per_epoch', 'eta', 'max_epoch'} <= set(lines[1])
    assert not any('secret' in p.read_text(errors='ignore') for p in tmp_path.iterdir() if p.is_file())
    detector = load_keras_detector(tmp_path/'model.best.tlt', 'secret')
    assert detector.classes.class_name(0) == 'circle' and detector.meta['step'] == 9 and 'AP50' in detector.meta['scores']


def test_ctrl_c_saves_what_was_done(spec, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            if step == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train(spec, tmp_path, callbacks=[Stop()])
    assert T.latest_checkpoint(tmp_path).name == 'model.step-4.tlt'
    assert json.loads((tmp_path/'status.json').read_text().splitlines()[-1])['status'] == 'FAILURE'
    assert [r['step'] for r in T.train(spec, tmp_path)] == [3, 6, 9]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_cure(spec, tmp_path):
    wild = spec.replace(training_config=dict(learning_rate=1e12, lr_warmup_epoch=0, clip_gradients_norm=0, num_epochs=20, logging_frequency=1))
    with pytest.raises(ValueError, match='lower training_config.learning_rate') as e: T.train(wild, tmp_path)
    step = int(str(e.value).split(':')[0].removeprefix('step '))
    for said in ('at learning rate', 'images ', 'gradients: stem ', 'class ', f'bad_batch.step-{step}.npz', 'the last checkpoint is intact'): assert said in str(e.value)
    named = str(e.value).split('images ')[1].split(';')[0].split(', ')
    with np.load(tmp_path/f'bad_batch.step-{step}.npz') as batch: assert len(batch['images']) == len(named) == 4
    for p in tmp_path.glob('model.step-*.tlt'): assert all(np.isfinite(v).all() for v in load_model_file(p).weights.values())


def test_a_callback_of_keras_works_as_it_is(spec, tmp_path):
    rows = []
    calls = [keras.callbacks.EarlyStopping(monitor='loss', patience=1, min_delta=99), keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: rows.append((epoch, logs['loss'])))]
    history = T.train(spec, tmp_path, callbacks=calls)
    assert len(history) == 2 and rows == [(i, r['loss']) for i, r in enumerate(history)] and T.latest_checkpoint(tmp_path).name == 'model.step-6.tlt'


def test_starting_from_weights_takes_what_fits(spec, tmp_path):
    one = dict(num_epochs=1)
    T.train(spec.replace(training_config=one), tmp_path/'a')
    trained = tmp_path/'a'/'model.step-3.tlt'
    other = spec.replace(dataset_config=dict(num_classes=6), training_config=one | dict(checkpoint=str(trained)))
    trainer = T.Trainer(other, resolve_arch(other)[0])
    assert '4 classes there, 6 here: class-predict is re-initialised' in trainer.initialize(tmp_path/'b')    # nothing to be set for that
    skipping = other.replace(training_config=dict(skip_checkpoint_variables='-predict'))
    trainer.config = skipping.training_config
    assert [l.split() for l in trainer.initialize(tmp_path/'c').splitlines() if '_net' in l] == [['class_net', '23', '3'], ['box_net', '23', '3']]
    model, _, stored = load_keras_model(trained)
    np.testing.assert_array_equal(trainer.model.get_layer('stem_conv').kernel.numpy(), stored.ema['stem_conv/kernel'])


def test_frozen_layers_stay(spec, tmp_path):
    frozen = spec.replace(model_config=dict(freeze_blocks='[0,1]', freeze_bn=True), training_config=dict(num_epochs=1))
    trainer = T.Trainer(frozen, resolve_arch(frozen)[0])
    keep = {v.path: v.numpy() for v in trainer.model.weights if v.path.startswith(('stem_', 'block1a_')) or v.path.startswith('block') and '_bn/' in v.path}
    move = trainer.model.get_layer('block7a_project_conv').kernel.numpy()
    batches = T.training_batches(trainer)
    for _ in range(2): trainer.train_step(next(batches))
    now = {v.path: v.numpy() for v in trainer.model.weights}
    for k, v in keep.items(): np.testing.assert_array_equal(now[k], v, err_msg=k)
    assert np.abs(now['block7a_project_conv/kernel']-move).max() > 0


def test_asking_for_gpus_that_are_not_there():
    n = len(tf.config.list_physical_devices('GPU'))
    with pytest.raises(ValueError, match=f'TensorFlow sees {n} GPU'): T.make_strategy(n+2)


def test_all_problems_of_a_spec_at_once(spec, tmp_path):
    with pytest.raises(SpecError) as e: T.train(Spec(), tmp_path/'run')
    assert len(e.value.problems) >= 2 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('policy', ['mixed_bfloat16', pytest.param('mixed_float16', marks=pytest.mark.slow)])
def test_mixed_precision_stays_finite(spec, policy, monkeypatch):
    monkeypatch.setattr(S, 'amp_policy', lambda: policy)
    trainer = T.Trainer(spec.replace(training_config=dict(amp=True)), resolve_arch(spec)[0])
    assert trainer.model.get_layer('stem_conv').compute_dtype == policy.removeprefix('mixed_')
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == 'mixed_float16')
    batches = T.training_batches(trainer)
    for _ in range(2): assert np.isfinite(trainer.train_step(next(batches)).numpy()[:4]).all()


TWO = '''
import os, sys, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()]*2)
import keras
from effdet_nb.model import detector
detector.SCALING['efficientdet-d0'] = (128, .35, .3, 16, 1, 1)
from effdet_nb.learn import train as T
from effdet_nb.train.fit import start_arch
from effdet_nb.train.spec import Spec
spec, batch = Spec.load(sys.argv[1]), int(sys.argv[2])
spec = spec.replace(training_config=dict(train_batch_size=batch, num_examples_per_epoch=3*batch))
strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1']) if batch == 2 else tf.distribute.get_strategy()
keras.utils.set_random_seed(0)
trainer = T.Trainer(spec, start_arch(spec)[0], strategy)
rng = np.random.default_rng(0)
for v in trainer.model.weights:
    if v.path.endswith('kernel'): v.assign(rng.normal(0, .1, v.shape))
batches = T.endless_batches(trainer)
parts = trainer.train_step(next(batches))
np.savez(sys.argv[3], parts=parts.numpy(), **{f'{i}': v.numpy() for i, v in enumerate(trainer.model.weights)}, ema=trainer.ema.vector.numpy())
'''


@pytest.mark.slow
def test_two_replicas_do_what_one_would_do_with_the_same_pictures(spec, tmp_path):
    (tmp_path/'spec.txt').write_text(spec.to_text()); (tmp_path/'two.py').write_text(TWO)
    env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'}
    for batch in (2, 4):
        r = subprocess.run([sys.executable, 'two.py', 'spec.txt', str(batch), f'{batch}.npz'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-3000:]
    two, one = np.load(tmp_path/'2.npz'), np.load(tmp_path/'4.npz')
    np.testing.assert_allclose(two['parts'][:4], one['parts'][:4], rtol=1e-5)
    np.testing.assert_allclose(two['parts'][4], one['parts'][4], rtol=.02)     # the gradient's length gathers the rounding of all layers
    for k in set(one.files)-{'parts'}: np.testing.assert_allclose(two[k], one[k], rtol=1e-3, atol=5e-4, err_msg=k)
