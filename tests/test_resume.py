"Killed at any moment and started again, a run ends with the same bits."
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_training import classes_of, experiment_of, new_trainer, small_spec, write_records

from effdet_nb.core import files
from effdet_nb.train import checkpoints as checkpoints_module, fit as fit_module
from effdet_nb.train.checkpoints import CheckpointCallback, MetricHistory, latest_checkpoint, list_checkpoints
from effdet_nb.train.diagnostics import DeferredSignals
from effdet_nb.train.fit import Evaluator, TrainingLoop
from effdet_nb.train.startup import initialize_weights
from effdet_nb.train.trainer import enable_determinism, training_batches
from effdet_nb.weights.model_file import load_model_file, read_meta


@pytest.fixture(scope='module')
def records(tmp_path_factory): return write_records(tmp_path_factory.mktemp('shapes'), num_train=10, num_val=2)


@pytest.fixture(scope='module')
def spec(records):
    "Ten images in batches of four: an epoch ends after 2, 5, 7, 10 steps."
    spec = small_spec(
        records, num_examples_per_epoch=10, num_epochs=4, lr_warmup_epoch=1, lr_warmup_init=.005, checkpoint_period=1,
        keep_checkpoint_max=2, moving_average_decay=.9, logging_frequency=3, deterministic=True)
    return spec.replace(
        eval_config=dict(eval_batch_size=2, eval_epoch_cycle=2),
        augmentation_config=dict(rand_hflip=True, random_crop_min_scale=.7, random_crop_max_scale=1.3))


@pytest.fixture(scope='module', autouse=True)
def deterministic():
    from tensorflow.python.framework import config
    config.enable_op_determinism()
    yield
    config.disable_op_determinism()


class Killed(BaseException): "The power is gone: nothing catches this, nothing is saved."


class KillAt(keras.callbacks.Callback):
    "Ends the run after a step as if the power had gone."
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, step, logs=None):
        if step+1 == self.step: raise Killed


class Process:
    "A run whose network is built and compiled once and wiped for each start, as a new process would find it."
    def __init__(self, spec):
        self.spec, self.classes, self.trainer = spec, classes_of(spec), new_trainer(spec)
        t = self.trainer
        self.variables = [*t.model.variables, *t.optimizer.variables, t.ema.flat_weights]
        self.fresh = [v.numpy() for v in self.variables]

    def begin(self, folder):
        "Wipes the network, then initialises it from a folder as `train` does; returns the metrics of the run."
        files._remove_stale_parts_once.cache_clear()
        for v in self.variables: v.assign(tf.ones_like(v)*tf.cast(77, v.dtype))   # what is not restored does harm
        self.trainer.step, history = 99, MetricHistory(self.trainer.metric_names)
        if not list_checkpoints(folder):
            for v, value in zip(self.variables, self.fresh): v.assign(value)
            self.trainer.step = 0
        experiment, initial = experiment_of(self.spec, folder)
        initialize_weights(self.trainer, history, initial, experiment.spec_text)
        return history

    def checkpoints(self, folder, history):
        return CheckpointCallback(self.trainer, history, folder, self.classes, spec_text=self.spec.to_text())

    def loop(self, folder, history, callbacks=(), signals=None):
        "The loop of `train`, with the given callbacks."
        experiment, _ = experiment_of(self.spec)
        evaluator = Evaluator(self.trainer, history, experiment.data, experiment.evaluation, self.classes)
        return TrainingLoop(self.trainer, history, callbacks, evaluator, signals)

    def start(self, folder, callbacks=()):
        "Runs to the end, from the newest checkpoint of a folder if there is one; returns the history."
        history = self.begin(folder)
        loop = self.loop(folder, history, [self.checkpoints(folder, history), *callbacks])
        return loop.run(training_batches(self.trainer, experiment_of(self.spec)[0].data))


@pytest.fixture(scope='module')
def process(spec): return Process(spec)


TIMES = {'seconds', 'eta', 'images_per_second', 'input_wait'}


def without_times(history): return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


@pytest.fixture(scope='module')
def uninterrupted(process, tmp_path_factory):
    "The folder of a run that nothing interrupted, and its history without times."
    folder = tmp_path_factory.mktemp('uninterrupted')
    return folder, without_times(process.start(folder))


def check_same_bits(a, b, name):
    a, b = load_model_file(a/name), load_model_file(b/name)
    for group in ('weights', 'ema', 'optimizer'):
        x, y = getattr(a, group), getattr(b, group)
        assert x and set(x) == set(y)
        for k in x: np.testing.assert_array_equal(x[k], y[k], err_msg=f'{group} {k}')
    assert without_times(a.meta['history']) == without_times(b.meta['history'])


def test_deterministic_leaves_graphs_as_they_were_written():
    "TensorFlow's rewriting adds in an order that differs between processes: one in three parted from the others."
    from tensorflow.python.framework import config
    try:
        enable_determinism()
        assert config.is_op_determinism_enabled()
        assert tf.config.optimizer.get_experimental_options()['disable_meta_optimizer']
    finally:
        tf.config.optimizer.set_experimental_options({'disable_meta_optimizer': False})


def half_written(path, *args, **kwargs):
    "Stands for `save_detector` in a process that is killed while it writes."
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    (path.parent/f'.{path.name}.12345678.part').write_bytes(b'half')
    raise Killed


def killed_evaluation(*args, **kwargs): raise Killed


def start_and_kill(process, folder, how, step, monkeypatch):
    "Starts a run that is killed after a step, while it writes a file, or while it is evaluated."
    with monkeypatch.context() as m:
        if how == 'write' and step >= 5: m.setattr(checkpoints_module, 'save_detector', half_written)
        if how == 'evaluate' and step >= 5: m.setattr(fit_module, 'evaluate_data', killed_evaluation)
        try: process.start(folder, [KillAt(step)] if how == 'step' or step < 5 else [])
        except Killed: pass


@pytest.mark.slow
def test_killed_at_any_step_it_ends_the_same(process, uninterrupted, tmp_path, monkeypatch):
    "Twenty random kill points in seven runs, some of them while a checkpoint is being written or an evaluation runs."
    rng, (reference, history) = random.Random(4), uninterrupted
    assert [r['step'] for r in history] == [2, 5, 7, 10]
    ways = ('step', 'write', 'step', 'evaluate', 'step', 'write', 'evaluate')
    for i, (how, num_kills) in enumerate(zip(ways, (3, 3, 3, 3, 3, 3, 2))):
        folder = tmp_path/f'{i}'
        for step in sorted(rng.sample(range(1, 10), num_kills)): start_and_kill(process, folder, how, step, monkeypatch)
        assert without_times(process.start(folder)) == history, (i, how)
        for name in ('model.step-10.tlt', 'model.best.tlt'): check_same_bits(reference, folder, name)
        files, expected = ({p.name for p in f.iterdir()} for f in (folder, reference))
        assert files == expected     # no .part left, the same two kept


def test_terminated_in_the_middle_of_an_epoch_it_saves_there(process, uninterrupted, tmp_path):
    "SIGTERM during step 4: the step is finished, saved, and the rest of the epoch is added to its metrics."
    class Terminate(keras.callbacks.Callback):
        def on_train_batch_begin(self, step, logs=None):
            if step == 3: loop.take_steps = take_steps_and_terminate

    def take_steps_and_terminate(*args):
        signal.raise_signal(signal.SIGTERM)
        return TrainingLoop.take_steps(loop, *args)
    history = process.begin(tmp_path)
    checkpoints = process.checkpoints(tmp_path, history)
    with pytest.raises(KeyboardInterrupt, match='terminated'), DeferredSignals() as signals:
        loop = process.loop(tmp_path, history, [checkpoints, Terminate()], signals)
        loop.run(training_batches(process.trainer, experiment_of(process.spec)[0].data))
    checkpoints.save_step()
    assert latest_checkpoint(tmp_path).name == 'model.step-4.tlt'
    assert read_meta(tmp_path/'model.step-4.tlt')['sums'][0] == 2
    reference, expected = uninterrupted
    assert without_times(process.start(tmp_path)) == expected
    check_same_bits(reference, tmp_path, 'model.step-10.tlt')


RUN = '''
import sys
from effdet_nb.train.fit import train
from effdet_nb.train.spec import Spec
train(Spec.load('spec.txt'), sys.argv[1])
'''


def start_process(folder, name):
    env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'}
    command = [sys.executable, 'run.py', name]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_same(spec, tmp_path):
    "Real processes and real SIGKILLs, one as soon as a checkpoint is there, one a random while later."
    (tmp_path/'run.py').write_text(RUN)
    (tmp_path/'spec.txt').write_text(spec.to_text())
    straight, killed = tmp_path/'straight', tmp_path/'killed'
    runs = [start_process(tmp_path, name) for name in ('straight', 'killed')]
    while not list_checkpoints(killed) and runs[1].poll() is None: time.sleep(.05)
    time.sleep(random.random())
    runs[1].kill()
    runs[1].wait()
    second, before = start_process(tmp_path, 'killed'), (killed/'status.json').stat().st_size
    while (killed/'status.json').stat().st_size == before and second.poll() is None: time.sleep(.05)
    time.sleep(5*random.random())
    second.kill()
    second.wait()
    for run in (runs[0], start_process(tmp_path, 'killed')):
        assert run.communicate()[1] is not None and run.returncode == 0
    check_same_bits(straight, killed, 'model.step-10.tlt')


def test_a_full_disk_leaves_the_checkpoint_before(process, tmp_path):
    history = process.begin(tmp_path)
    checkpoints = process.checkpoints(tmp_path, history)
    process.trainer.step = 2
    checkpoints.save_step()
    process.trainer.step = 3
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match='could not be written .File too large.; model.step-2.tlt is intact'):
            checkpoints.save_step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in list_checkpoints(tmp_path)] == ['model.step-2.tlt'] and not list(tmp_path.glob('.*'))
    load_model_file(tmp_path/'model.step-2.tlt')


def test_some_fields_may_change_between_two_halves_of_a_run(process, spec, tmp_path):
    history, trainer = process.begin(tmp_path), process.trainer
    trainer.step = 2
    process.checkpoints(tmp_path, history).save_step()
    _, initial = experiment_of(spec, tmp_path)

    def start(**changes): return initialize_weights(trainer, history, initial, spec.replace(**changes).to_text())
    line = start(training_config=dict(num_epochs=9, learning_rate=.01))
    assert 'continuing from' in line
    assert 'training_config.learning_rate 0.05 -> 0.01' in line and 'num_epochs 4 -> 9' in line
    refused = 'num_classes was 4 and is 5; model_config.anchor_scale was 4.0 and is 3.0.* start another --model_dir'
    with pytest.raises(ValueError, match=refused):
        start(dataset_config=dict(num_classes=5), model_config=dict(anchor_scale=3.))
    plan = trainer.plan
    try:
        trainer.plan = replace(plan, config=replace(plan.config, train_batch_size=5))
        with pytest.raises(ValueError, match='global batch was 4 and is 5'): start()
    finally: trainer.plan = plan
