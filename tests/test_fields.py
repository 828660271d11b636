"Every field of the spec does what its table says: each test here fails if the field does nothing."
import dataclasses
import io
import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_training import (
    classes_of, experiment_of, new_trainer, run_stub, small_spec, StubEvaluator, StubTrainer, write_records,
)

from effdet_nb.data.pipeline import make_sample_loader, train_dataset
from effdet_nb.detector import efficientdet
from effdet_nb.detector.detections import Detections
from effdet_nb.evaluate.ground_truth import GroundTruth
from effdet_nb.train import callbacks, diagnostics, startup
from effdet_nb.train.checkpoints import CheckpointCallback, MetricHistory, list_checkpoints
from effdet_nb.train.experiment import (
    InitialWeights, arch_from_spec, data_config_from_spec, evaluate_spec, training_plan_from_spec, with_epoch_size,
)
from effdet_nb.train.optim import l1_l2_penalty
from effdet_nb.train.trainer import Trainer, training_batches
from effdet_nb.weights.model_file import save_detector


@pytest.fixture(scope='module')
def records(tmp_path_factory): return write_records(tmp_path_factory.mktemp('shapes'))


@pytest.fixture(scope='module')
def spec(records): return small_spec(records, num_epochs=2, lr_warmup_epoch=0, moving_average_decay=0.)


def disable_dropout(trainer):
    for layer in trainer.model.layers:
        if isinstance(layer, keras.layers.Dropout): layer.rate = 0.


@pytest.fixture(scope='module')
def shared(spec):
    "A trainer that neither clips nor drops blocks, its step compiled once for several tests, and its first values."
    trainer = new_trainer(set_training(spec, clip_gradients_norm=0.))
    disable_dropout(trainer)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    return trainer, [(v, v.numpy()) for v in variables]


@pytest.fixture
def trainer(shared):
    "The shared trainer as it was before its first step."
    trainer, values = shared
    for variable, value in values: variable.assign(value)
    trainer.step = 0
    return trainer


@pytest.fixture(scope='module')
def batch(spec, shared): return next(training_batches(shared[0], data_config_from_spec(spec)))


def set_training(spec, **changes): return spec.replace(training_config=changes)


def test_batch_size_and_epoch_size_give_the_steps(spec):
    paused = set_training(spec, train_batch_size=5, num_examples_per_epoch=12, num_epochs=3, stop_at_epoch=2)
    plan = training_plan_from_spec(paused)
    assert [plan.step_at(e) for e in range(4)] == [0, 2, 4, 7] and plan.last_epoch == 2
    without = dataclasses.replace(spec.training_config, num_examples_per_epoch=0)
    uncounted = dataclasses.replace(spec, training_config=without)
    assert with_epoch_size(uncounted).training_config.num_examples_per_epoch == 12
    assert with_epoch_size(uncounted, 2).training_config.num_examples_per_epoch == 6
    with pytest.raises(ValueError, match='not of equal size'):
        training_plan_from_spec(set_training(spec, gradient_accumulation_steps=3))


@pytest.mark.slow
def test_several_steps_in_one_call_equal_single_steps(spec, trainer, shared):
    assert run_stub(set_training(spec, iterations_per_loop=2)).trainer.calls == [2, 1, 2, 1]
    assert run_stub(spec).trainer.calls == [1]*6
    data = data_config_from_spec(spec)
    together = trainer.train_steps(training_batches(trainer, data), tf.constant(3)).numpy()
    assert int(trainer.optimizer.iterations) == 3
    for variable, value in shared[1]: variable.assign(value)
    batches = training_batches(trainer, data)
    single = np.stack([trainer.train_step(next(batches)).numpy() for _ in range(3)])
    np.testing.assert_allclose(together, single, rtol=2e-3)


@pytest.mark.slow
def test_xla_takes_the_same_step(spec):
    odd = spec.replace(dataset_config=dict(image_size='136,152'))       # maps of 5 and 9 rows, 5 and 10 columns
    trainers = [new_trainer(set_training(odd, use_xla=use_xla)) for use_xla in (False, True)]
    for trainer in trainers: disable_dropout(trainer)          # XLA draws other random numbers
    batch = next(training_batches(trainers[0], data_config_from_spec(odd)))
    rows = [t.train_step(batch).numpy() for t in trainers]
    np.testing.assert_allclose(rows[1][:4], rows[0][:4], rtol=1e-4)
    np.testing.assert_allclose(rows[1][4:], rows[0][4:], rtol=5e-3)       # sums in another order, layer after layer
    for a, b in zip(*(t.model.weights for t in trainers), strict=True):
        np.testing.assert_allclose(np.array(b), np.array(a), atol=5e-5, err_msg=a.path)

    def is_compiled(t):       # the whole of it; single activations are compiled in either way
        functions = t.train_step.get_concrete_function(batch).graph.as_graph_def().library.function
        return any(f.attr['_XlaMustCompile'].b for f in functions if 'gradients' in f.signature.name)
    assert [is_compiled(t) for t in trainers] == [False, True]


def with_progress(trainer, history): return [callbacks.ProgressCallback(trainer)]


def test_an_epoch_logs_lines_or_a_bar(spec, monkeypatch, capfd):
    long = set_training(spec, num_examples_per_epoch=80, num_epochs=1)
    run_stub(set_training(long, logging_frequency=5), with_progress)
    assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ['5/20', '10/20', '15/20', '20/20']
    run_stub(set_training(long, logging_frequency=5, disable_logging=True), with_progress)
    assert not capfd.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self): return True

    def slow_step(self, batch):
        time.sleep(.02)
        return np.float32([1, 1, 1, 0, 1, 1])
    monkeypatch.setattr(sys, 'stderr', screen := Terminal())
    monkeypatch.setattr(StubTrainer, 'train_step', slow_step)
    run_stub(set_training(long, logging_frequency=2), with_progress)
    text = screen.getvalue()
    assert 'epoch 1/1' in text and '/20' in text and 'images/s' in text and '\n' not in text.strip()


def test_epochs_that_the_period_does_not_divide_are_saved_too(spec, tmp_path, monkeypatch):
    def save_as(self, name, **meta): (self.model_dir/name).write_text('saved')
    monkeypatch.setattr(CheckpointCallback, 'save_as', save_as)
    seven = set_training(spec.replace(eval_config=dict(eval_epoch_cycle=4)), num_epochs=7, checkpoint_period=3)
    loop = run_stub(seven, lambda trainer, history: [CheckpointCallback(trainer, history, tmp_path, None)])
    assert [p.name for p in list_checkpoints(tmp_path)] == [f'model.step-{3*e}.tlt' for e in (3, 4, 6, 7)]
    assert loop.evaluator.epochs == [4, 7]


def test_fields_of_eval_config_decide_which_epochs_are_evaluated(spec):
    def evaluated(**changes):
        return run_stub(set_training(spec.replace(eval_config=changes), num_epochs=5)).evaluator.epochs
    assert evaluated(eval_epoch_cycle=2) == [2, 4, 5]
    assert evaluated(eval_epoch_cycle=2, eval_after_training=False) == [2, 4]
    assert evaluated(eval_epoch_cycle=1, min_eval_interval=1000) == [1, 5]
    without = set_training(spec.replace(dataset_config=dict(validation_file_pattern='')), num_epochs=5)
    assert not run_stub(without).evaluator.epochs


def test_an_evaluation_obeys_batch_size_samples_and_timeout(spec):
    class SlowDetector:
        image_hw, classes, batch_sizes = (128, 128), classes_of(spec), []

        def forward(self, images):
            self.batch_sizes.append(len(images))
            time.sleep(.3)
            return images

        def decode(self, images): return [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))]*len(images)
    detector, pairs = SlowDetector(), spec.replace(eval_config=dict(eval_batch_size=2))
    assert evaluate_spec(detector, pairs).num_images == 4 and detector.batch_sizes == [2, 2]
    assert evaluate_spec(detector, pairs.replace(eval_config=dict(eval_samples=3))).num_images == 3
    with pytest.warns(UserWarning, match='eval_timeout'):
        single = pairs.replace(eval_config=dict(eval_batch_size=1))
        assert evaluate_spec(detector, single, timeout=1e-6).num_images < 4


def test_resume_false_reads_no_checkpoint(spec, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(startup, 'load_latest_checkpoint', lambda *args: calls.append(args) or (None, None))
    for resume in (False, True):
        assert experiment_of(set_training(spec, resume=resume), tmp_path)[1] == InitialWeights()
        assert bool(calls) == resume


def test_a_profile_has_five_steps(tmp_path, monkeypatch):
    calls, steps = [], []
    for name in ('start', 'stop'):
        monkeypatch.setattr(tf.profiler.experimental, name, lambda *args, name=name: calls.append((name, steps[-1])))
    profiler = callbacks.ProfilerCallback(tmp_path, 3)
    for step in range(20, 40):
        steps.append(step)
        profiler.on_train_batch_begin(step)
        profiler.on_train_batch_end(step)
    profiler.on_train_end()
    assert calls == [('start', 23), ('stop', 27)]


def test_the_seed_decides_weights_and_order(spec):
    def start(seed):
        seeded = set_training(spec, tf_random_seed=seed)
        trainer = new_trainer(seeded)
        _, ids = diagnostics.batch_of_step(trainer, data_config_from_spec(seeded), 0)
        return trainer.model.get_layer('stem_conv').kernel.numpy(), ids
    a, b, c = start(1), start(1), start(2)
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1] == b[1] != c[1] and np.abs(a[0]-c[0]).max() > 0


def test_a_decay_of_zero_keeps_no_average(spec, trainer):
    assert trainer.ema is None and new_trainer(set_training(spec, moving_average_decay=.5)).ema.decay == .5


def test_l1_and_l2_are_different_penalties(trainer):
    variables = trainer.model.trainable_variables
    kernels = np.concatenate([v.numpy().ravel() for v in variables if v.path.endswith('kernel')])
    assert float(l1_l2_penalty(variables, .5, 0)) == pytest.approx(.5*np.abs(kernels).sum(), rel=1e-4)
    assert float(l1_l2_penalty(variables, 0, .5)) == pytest.approx(.25*np.square(kernels).sum(), rel=1e-4)


def step_length(trainer, batch):
    "How far a first step moves the weights in units of the learning rate, and the norm of its gradient."
    before = [v.numpy() for v in trainer.model.trainable_variables]
    metrics = trainer.train_step(batch).numpy()
    moved = sum(np.square(v.numpy()-b).sum() for v, b in zip(trainer.model.trainable_variables, before))
    return np.sqrt(moved)/trainer.config.learning_rate, metrics[trainer.metric_names.index('gradient_norm')]


def test_clipping_shortens_the_step_and_zero_does_not(spec, trainer, batch):
    length, norm = step_length(trainer, batch)
    assert length == pytest.approx(norm, rel=1e-2)
    length, norm = step_length(new_trainer(set_training(spec, clip_gradients_norm=.01)), batch)
    assert norm > .02 and length == pytest.approx(.01, rel=1e-2)


@pytest.mark.slow
def test_parts_of_a_batch_make_the_step_of_the_whole(spec, trainer, batch):
    "Two parts with the same two images: batch norm sees the same statistics, so the step must be that of all four."
    whole, parts = trainer, new_trainer(set_training(spec, clip_gradients_norm=0., gradient_accumulation_steps=2))
    disable_dropout(parts)          # what is dropped at random is another matter
    twice = {k: tf.concat([v[:2], v[:2]], 0) for k, v in batch.items()}
    a, b = whole.train_step(twice).numpy(), parts.train_step(twice).numpy()
    np.testing.assert_allclose(b, a, rtol=2e-3)
    for v, w in zip(whole.model.trainable_variables, parts.model.trainable_variables):
        np.testing.assert_allclose(w, v, rtol=1e-3, atol=1e-4, err_msg=v.path)


def test_fields_of_the_data_reach_the_pipeline(spec):
    "The pipeline has tests of its own; here only that the fields arrive there."
    changes = dict(image_size='160,128', max_instances_per_image=33, skip_crowd_during_training=False)
    config = make_sample_loader(data_config_from_spec(spec.replace(dataset_config=changes))).config
    assert (config.image_hw, config.max_instances, config.skip_crowd) == ((160, 128), 33, False)
    fake = iter(train_dataset(data_config_from_spec(spec.replace(dataset_config=dict(use_fake_data=True))), 4))
    np.testing.assert_array_equal(next(fake)['images'], next(fake)['images'])


def test_fields_of_the_augmentation_reach_the_pipeline(spec):
    plain = spec.replace(augmentation_config=dict(random_crop_min_scale=1., random_crop_max_scale=1.))
    def first(s): return next(iter(train_dataset(data_config_from_spec(s), 4)))['images'].numpy()
    straight, mirrored = first(plain), first(plain.replace(augmentation_config=dict(rand_hflip=True)))
    matches = {(np.array_equal(a, b), np.array_equal(a, b[:, ::-1])) for a, b in zip(straight, mirrored)}
    assert matches <= {(True, False), (False, True)} and not np.array_equal(straight, mirrored)
    smaller = first(plain.replace(augmentation_config=dict(random_crop_min_scale=.3, random_crop_max_scale=.3)))
    assert (smaller == smaller[:, -1:, -1:]).all(-1).mean() > .5            # most of the canvas is padding
    for field in ('color_jitter', 'hue_jitter', 'mosaic'):
        assert not np.array_equal(straight, first(plain.replace(augmentation_config={field: .5}))), field


def test_a_pruned_file_is_retrained(spec, tmp_path):
    arch = dataclasses.replace(arch_from_spec(spec), widths={'block2a_expand_conv': 8})
    model = efficientdet.build(arch)
    save_detector(tmp_path/'pruned.tlt', model, arch, classes_of(spec))
    retrained = set_training(spec, pruned_model_path=str(tmp_path/'pruned.tlt'))
    experiment, initial = experiment_of(retrained, tmp_path/'run')
    trainer = Trainer(experiment.arch, experiment.training)
    start = startup.initialize_weights(trainer, MetricHistory([]), initial)
    assert experiment.arch.widths == {'block2a_expand_conv': 8} and 'retraining' in start
    name = 'block2a_expand_conv'
    np.testing.assert_array_equal(trainer.model.get_layer(name).kernel, model.get_layer(name).kernel)


# --- diagnostics

def test_out_of_memory_names_the_batch_that_fits(spec, monkeypatch):
    plan = training_plan_from_spec(set_training(spec, train_batch_size=12))
    def gradients(batch, *args):
        if batch['images'].shape[0] > 5: raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
    trainer = SimpleNamespace(arch=arch_from_spec(spec), compute_gradients=gradients)
    advice = '12 .* 5 would fit: set train_batch_size: 5, or keep 12 with gradient_accumulation_steps: 3'
    with pytest.raises(ValueError, match=f'train_batch_size {advice}'):
        with diagnostics.readable_errors(plan, (128, 128), lambda n: diagnostics.fits_in_memory(trainer, n)):
            raise tf.errors.ResourceExhaustedError(None, None, 'OOM')


@pytest.mark.parametrize('is_in_parts, words', [(True, 'train_batch_size: 3 and gradient_accumulation_steps: 1, or'),
                                                (False, 'train_batch_size: 3, or')])
def test_a_batch_that_fits_is_not_divided_again(is_in_parts, words):
    assert words in diagnostics._batch_size_advice(12, 3, is_in_parts)


def test_unusual_settings_come_with_a_remedy(spec):
    def warnings_for(**changes):
        return diagnostics.hyperparameter_warnings(training_plan_from_spec(set_training(spec, **changes)))
    assert 'learning_rate: 0.005' in warnings_for(learning_rate=.5)[0] and not warnings_for(learning_rate=.01)
    # the decay grows from the first step, so a large one averages over a tenth of a short run
    assert not warnings_for(learning_rate=.01, moving_average_decay=.9999)


def test_the_second_evaluation_with_ap_0_is_diagnosed(spec, capfd):
    truth = GroundTruth(1, np.float32([[0, 0, 40, 60]]), np.array([1]), np.zeros(1, bool), np.ones(1))
    guess = Detections(np.float32([[0, 0, 9, 9]]), np.float32([.01]), np.int32([1]))

    class Metrics(dict): classes, results = classes_of(spec), [(truth, guess)]
    history = MetricHistory([])
    evaluator = StubEvaluator(None, history, SimpleNamespace(data=None, evaluation=None))
    evaluator.evaluate = lambda: Metrics(AP=0.)
    for is_diagnosed in (False, True, False):
        history.epochs.append(evaluator.run())
        assert ('AP is 0.000. The detections and the ground truth' in capfd.readouterr().err) == is_diagnosed
