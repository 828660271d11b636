"Killed at any moment and started again, a run ends with the same bits."
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.convert import dataset_convert
from effdet_nb.train import experiment, fit as B, checkpoints as saving, fit as T
from effdet_nb.train.trainer import enable_determinism
from effdet_nb.train.trainer import make_training_schedule
from effdet_nb.detector import efficientdet as detector
from effdet_nb.weights.model_file import load_model_file, read_meta
from effdet_nb.train.spec import Spec

TINY = (128, .35, .3, 16, 1, 1)


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    make_toy_dataset(folder/'shapes', num_train=10, num_val=2, image_hw=(128, 128), seed=0)
    for split in ('train', 'val'): dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder, split, num_shards=2, workers=1)
    return folder


@pytest.fixture(autouse=True)
def small_network(monkeypatch): monkeypatch.setitem(detector.VARIANTS, 'efficientdet-d0', TINY)


@pytest.fixture(scope='module')
def spec(records):
    "Ten pictures in fours: an epoch ends after 2, 5, 7, 10 steps."
    return Spec().replace(
        dataset_config=dict(training_file_pattern=f'{records}/train-*', validation_file_pattern=f'{records}/val-*', validation_json_file=f'{records}/shapes/val.json',
                            num_classes=4, image_size='128,128', max_instances_per_image=20),
        training_config=dict(train_batch_size=4, num_examples_per_epoch=10, num_epochs=4, learning_rate=.05, lr_warmup_epoch=1, lr_warmup_init=.005,
                             checkpoint_period=1, keep_checkpoint_max=2, moving_average_decay=.9, logging_frequency=3, deterministic=True),
        eval_config=dict(eval_batch_size=2, eval_epoch_cycle=2), augmentation_config=dict(rand_hflip=True, random_crop_min_scale=.7, random_crop_max_scale=1.3))


@pytest.fixture
def deterministic():
    from tensorflow.python.framework import config
    config.enable_op_determinism()
    yield
    config.disable_op_determinism()


def test_deterministic_means_graphs_as_they_were_written():
    "TensorFlow's rewriting adds in an order that differs between processes: one in three parted from the others."
    from tensorflow.python.framework import config
    try:
        enable_determinism()
        assert config.is_op_determinism_enabled() and tf.config.optimizer.get_experimental_options()['disable_meta_optimizer']
    finally:
        config.disable_op_determinism()
        tf.config.optimizer.set_experimental_options({'disable_meta_optimizer': False})


class Killed(BaseException): "The power is gone: nobody catches this, nothing is saved."


class Kill(keras.callbacks.Callback):
    "Pulls the plug after a step, while a file is written, or before an evaluation."
    def __init__(self, step): super().__init__(); self.step = step
    def on_train_batch_end(self, step, logs=None):
        if step+1 == self.step: raise Killed


class Process:
    "A run whose moving parts are built once and wiped for each start, as a new process would have them."
    def __init__(self, spec):
        keras.utils.set_random_seed(spec.training_config.tf_random_seed)
        self.spec, self.trainer = spec, T.Trainer(spec, B.resolve_arch(spec)[0])
        t = self.trainer
        self.variables = [*t.model.variables, *t.optimizer.variables, t.ema.flat_weights]
        self.missing = [v.numpy() for v in self.variables]

    def start(self, folder, callbacks=()):
        t = self.trainer
        for v in self.variables: v.assign(tf.ones_like(v)*tf.cast(77, v.dtype))         # whatever is not restored spoils the result
        t.step, t.history, t.epoch_sums, t.metric_buffer = 99, ['spoilt'], [1.]*7, []
        if not saving.list_checkpoints(folder):
            for v, value in zip(self.variables, self.missing): v.assign(value)
            t.step, t.history, t.epoch_sums = 0, [], None
        t.initialize(folder)
        classes = experiment.class_table_from_spec(self.spec)
        calls = keras.callbacks.CallbackList([saving.CheckpointCallback(t, folder, classes), *callbacks], model=t.model)
        return t.fit(T.training_batches(t), classes, calls)


def same_files(a, b, name):
    a, b = load_model_file(a/name), load_model_file(b/name)
    for group in ('weights', 'ema', 'optimizer'):
        ours, theirs = getattr(a, group), getattr(b, group)
        assert ours and set(ours) == set(theirs)
        for k in ours: np.testing.assert_array_equal(ours[k], theirs[k], err_msg=f'{group} {k}')
    return a, b


TIMES = {'seconds', 'eta', 'images_per_second', 'input_wait'}
def numbers(history): return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


@pytest.mark.slow
def test_killed_at_any_step_it_ends_the_same(spec, tmp_path, deterministic, monkeypatch):
    "Twenty random kill points in seven runs, some of them while a checkpoint is being written or an evaluation runs."
    process, rng = Process(spec), random.Random(4)
    straight = numbers(process.start(tmp_path/'straight'))
    assert [r['step'] for r in straight] == [2, 5, 7, 10]
    for i, num in enumerate((3, 3, 3, 3, 3, 3, 2)):
        folder, how = tmp_path/f'{i}', ('step', 'write', 'step', 'evaluate', 'step', 'write', 'evaluate')[i]
        for kill in sorted(rng.sample(range(1, 10), num)):
            with monkeypatch.context() as m:
                if how == 'write' and kill >= 5:
                    def half(path, *a, **k):
                        Path(path).parent.mkdir(exist_ok=True); (Path(path).parent/f'.{Path(path).name}.12345678.part').write_bytes(b'half'); raise Killed
                    m.setattr(saving, 'save_detector', half)
                if how == 'evaluate' and kill >= 5: m.setattr(T, 'evaluate_spec', lambda *a, **k: (_ for _ in ()).throw(Killed()))
                try: process.start(folder, [Kill(kill)] if how == 'step' or kill < 5 else [])
                except Killed: pass
        again = numbers(process.start(folder))
        assert again == straight, (i, how)
        a, b = same_files(tmp_path/'straight', folder, 'model.step-10.tlt')
        assert numbers(a.meta['history']) == numbers(b.meta['history'])
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path/'straight').iterdir())     # no .part left, the same two kept
        same_files(tmp_path/'straight', folder, 'model.best.tlt')


def test_asked_to_stop_in_the_middle_of_an_epoch_it_saves_there(spec, tmp_path, deterministic):
    "SIGTERM during step 4: the step is finished, saved, and the rest of the epoch is added to what was there."
    process = Process(spec)
    straight = numbers(process.start(tmp_path/'straight'))

    class Term(keras.callbacks.Callback):
        def on_train_batch_begin(self, step, logs=None):
            if step == 3: trainer.run_steps = lambda *a: (signal.raise_signal(signal.SIGTERM), T.Trainer.run_steps(trainer, *a))[1]
    trainer, folder = process.trainer, tmp_path/'stopped'
    with pytest.raises(KeyboardInterrupt, match='terminated'), T.DeferredSignals() as patience:
        for v, value in zip(process.variables, process.missing): v.assign(value)
        trainer.step, trainer.history, trainer.epoch_sums = 0, [], None
        calls = keras.callbacks.CallbackList([saver := saving.CheckpointCallback(trainer, folder, experiment.class_table_from_spec(spec)), Term()], model=trainer.model)
        trainer.fit(T.training_batches(trainer), experiment.class_table_from_spec(spec), calls, patience)
    del trainer.run_steps
    saver.write()
    assert saving.latest_checkpoint(folder).name == 'model.step-4.tlt' and read_meta(folder/'model.step-4.tlt')['sums'][0] == 2
    assert numbers(process.start(folder)) == straight
    same_files(tmp_path/'straight', folder, 'model.step-10.tlt')


RUN = '''
import sys
from effdet_nb.detector import efficientdet as detector
detector.SCALING['efficientdet-d0'] = (128, .35, .3, 16, 1, 1)
from effdet_nb.train.fit import train
from effdet_nb.train.spec import Spec
train(Spec.load('spec.txt'), sys.argv[1])
'''


def start(folder, name):
    return subprocess.Popen([sys.executable, 'run.py', name], cwd=folder, env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_same(spec, tmp_path):
    "Real processes and real SIGKILLs, one as soon as a checkpoint is there, one a random while later."
    (tmp_path/'run.py').write_text(RUN); (tmp_path/'spec.txt').write_text(spec.to_text())
    runs = [start(tmp_path, name) for name in ('straight', 'killed')]
    while not saving.list_checkpoints(tmp_path/'killed') and runs[1].poll() is None: time.sleep(.05)
    time.sleep(random.random()); runs[1].kill(); runs[1].wait()
    second = start(tmp_path, 'killed')
    before = (tmp_path/'killed'/'status.json').stat().st_size
    while (tmp_path/'killed'/'status.json').stat().st_size == before and second.poll() is None: time.sleep(.05)
    time.sleep(5*random.random()); second.kill(); second.wait()
    for r in (runs[0], start(tmp_path, 'killed')): assert r.communicate()[1] is not None and r.returncode == 0
    a, b = same_files(tmp_path/'straight', tmp_path/'killed', 'model.step-10.tlt')
    assert numbers(a.meta['history']) == numbers(b.meta['history'])


def test_a_full_disk_leaves_the_checkpoint_before(spec, tmp_path):
    process = Process(spec.replace(training_config=dict(num_epochs=1)))
    process.start(tmp_path)
    saver = saving.CheckpointCallback(process.trainer, tmp_path, experiment.class_table_from_spec(spec))
    process.trainer.step = 3
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match='could not be written .* the checkpoints before it are whole'): saver.write()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before); signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in saving.list_checkpoints(tmp_path)] == ['model.step-2.tlt'] and not list(tmp_path.glob('.*'))
    load_model_file(tmp_path/'model.step-2.tlt')


def test_what_may_change_on_the_way(spec, tmp_path):
    process = Process(spec.replace(training_config=dict(num_epochs=1)))
    process.start(tmp_path)
    trainer = process.trainer
    trainer.spec = spec.replace(training_config=dict(num_epochs=9, learning_rate=.01))
    trainer.training_schedule = make_training_schedule(trainer.spec)
    told = trainer.initialize(tmp_path)
    assert 'continuing from' in told and 'training_config.learning_rate 0.05 -> 0.01' in told and 'num_epochs 1 -> 9' in told
    trainer.spec = spec.replace(dataset_config=dict(num_classes=5), model_config=dict(anchor_scale=3.))
    with pytest.raises(ValueError, match='num_classes was 4 and is 5; model_config.anchor_scale was 4.0 and is 3.0.* start another --model_dir'): trainer.initialize(tmp_path)
    trainer.spec, trainer.training_schedule = spec, make_training_schedule(spec.replace(training_config=dict(train_batch_size=5)))
    with pytest.raises(ValueError, match='global batch was 4 and is 5'): trainer.initialize(tmp_path)
