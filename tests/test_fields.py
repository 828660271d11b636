"Every field of the spec does what its table says: each test here fails if the field does nothing."
import dataclasses
import io
import sys
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.convert import dataset_convert
from effdet_nb.train import experiment, fit as B, checkpoints as saving, trainer as S, fit as T, diagnostics as trouble, callbacks as watch
from effdet_nb.detector import efficientdet as detector
from effdet_nb.train.spec import Spec


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    make_toy_dataset(folder/'shapes', num_train=12, num_val=4, image_hw=(128, 128), seed=0)
    for split in ('train', 'val'): dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder, split, num_shards=2, workers=1)
    return folder


@pytest.fixture(autouse=True)
def small_network(monkeypatch): monkeypatch.setitem(detector.VARIANTS, 'efficientdet-d0', (128, .35, .3, 16, 1, 1))


@pytest.fixture
def spec(records):
    return Spec().replace(
        dataset_config=dict(training_file_pattern=f'{records}/train-*', validation_file_pattern=f'{records}/val-*', validation_json_file=f'{records}/shapes/val.json', num_classes=4, image_size='128,128', max_instances_per_image=20),
        training_config=dict(train_batch_size=4, num_examples_per_epoch=12, num_epochs=2, learning_rate=.05, lr_warmup_epoch=0, moving_average_decay=0.))


def trainer_of(spec, **changes):
    spec = spec.replace(training_config=changes)
    keras.utils.set_random_seed(spec.training_config.tf_random_seed)
    return S.Trainer(spec, B.resolve_arch(spec)[0])


class Fake:
    "A trainer of numbers, without a network: what the loop around the step does is seen in milliseconds."
    run_steps, log_metrics, run_epoch, epoch_row, fit, should_evaluate = (getattr(S.Trainer, n) for n in ('run_steps', 'log_metrics', 'run_epoch', 'epoch_row', 'fit', 'should_evaluate'))
    flush_metrics, check_finite, warn_no_positives = S.Trainer.flush_metrics, S.Trainer.check_finite, S.Trainer.warn_no_positives
    metric_names = ['loss', 'cls_loss', 'box_loss', 'reg_loss', 'gradient_norm', 'positives']
    ema, optimizer, group_names, num_replicas = None, None, [], 1

    def __init__(self, spec):
        self.spec, self.config, self.training_schedule = spec, spec.training_config, S.make_training_schedule(spec)
        self.step, self.history, self.epoch_sums, self.metric_buffer, self.last_metrics, self.calls, self.evaluations = 0, [], None, [], None, [], []
        self.model, self.lr_schedule = types.SimpleNamespace(stop_training=False), lambda step: .1
    def row(self): return np.float32([1, 1, 1, 0, 1, 1])
    def train_step(self, batch): self.calls.append(1); return self.row()
    def train_steps(self, batches, n): self.calls.append(int(n)); return np.stack([self.row()]*int(n))
    def run_evaluation(self, classes): self.evaluations.append(len(self.history)+1); self.last_eval_time = time.monotonic(); return {'AP': .5, 'AP50': .5}
    def save(self, path, *a, **k): path.write_text('saved'); return path


def run(spec, folder=None, **changes):
    fake = Fake(spec.replace(training_config=changes))
    callbacks = keras.callbacks.CallbackList([saving.CheckpointCallback(fake, folder, None)] if folder else [])
    fake.fit(iter(lambda: {}, None), None, callbacks)
    return fake


def test_batch_sizes_and_counts_make_the_steps(spec):
    plan = S.make_training_schedule(spec.replace(training_config=dict(train_batch_size=5, num_examples_per_epoch=12, num_epochs=3, stop_at_epoch=2)))
    assert [plan.step_at(e) for e in range(4)] == [0, 2, 4, 7] and plan.last_epoch == 2
    left_out = dataclasses.replace(spec, training_config=dataclasses.replace(spec.training_config, num_examples_per_epoch=0))
    assert S.with_epoch_size(left_out).training_config.num_examples_per_epoch == 12 and S.with_epoch_size(left_out, 2).training_config.num_examples_per_epoch == 6
    with pytest.raises(ValueError, match='not of equal size'): S.make_training_schedule(spec.replace(training_config=dict(gradient_accumulation_steps=3)))


def test_several_steps_in_one_call_do_the_same(spec):
    assert run(spec, iterations_per_loop=2).calls == [2, 1, 2, 1] and run(spec).calls == [1]*6
    one, three = trainer_of(spec), trainer_of(spec, iterations_per_loop=3)
    batches = S.training_batches(one)
    rows = np.stack([one.train_step(next(batches)).numpy() for _ in range(3)])
    np.testing.assert_allclose(three.train_steps(S.training_batches(three), tf.constant(3)).numpy(), rows, rtol=2e-3)
    assert int(three.optimizer.iterations) == 3


@pytest.mark.slow
def test_xla_takes_the_same_step(spec, monkeypatch):
    monkeypatch.setattr(detector.Variant, 'drop_connect', 0.)          # XLA draws other random numbers
    spec = spec.replace(dataset_config=dict(image_size='136,152'))      # maps of 5 and 9 rows, 5 and 10 columns: copies of unequal number
    ways = [trainer_of(spec, use_xla=x) for x in (False, True)]
    batch = next(S.training_batches(ways[0]))
    rows = [t.train_step(batch).numpy() for t in ways]
    np.testing.assert_allclose(rows[1][:4], rows[0][:4], rtol=1e-4)
    np.testing.assert_allclose(rows[1][4:], rows[0][4:], rtol=5e-3)       # sums in another order, once more for each layer backwards
    for a, b in zip(*(t.model.weights for t in ways), strict=True): np.testing.assert_allclose(np.array(b), np.array(a), atol=5e-5, err_msg=a.path)
    def compiled(t):       # the whole of it; single activations are compiled in either way
        functions = t.train_step.get_concrete_function(batch).graph.as_graph_def().library.function
        return any(f.attr['_XlaMustCompile'].b for f in functions if 'gradients' in f.signature.name)
    assert [compiled(t) for t in ways] == [False, True]


def test_what_is_said_while_an_epoch_runs(spec, monkeypatch, capfd):
    long = dict(num_examples_per_epoch=80, num_epochs=1)
    run(spec, logging_frequency=5, **long)
    assert [l.split()[1] for l in capfd.readouterr().err.splitlines()] == ['5/20', '10/20', '15/20', '20/20']
    run(spec, disable_logging=True, **long)
    assert not capfd.readouterr().err
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr(sys, 'stderr', screen := Terminal())
    monkeypatch.setattr(Fake, 'train_step', lambda self, batch: (time.sleep(.02), self.row())[1])
    run(spec, logging_frequency=2, **long)
    assert 'epoch 1/1' in screen.getvalue() and '/20' in screen.getvalue() and 'images/s' in screen.getvalue() and '\n' not in screen.getvalue().strip()


def test_epochs_that_the_cycle_does_not_divide(spec, tmp_path):
    fake = run(spec.replace(eval_config=dict(eval_epoch_cycle=4)), tmp_path, num_epochs=7, checkpoint_period=3)
    assert [p.name for p in saving.list_checkpoints(tmp_path)] == [f'model.step-{3*e}.tlt' for e in (3, 4, 6, 7)] and fake.evaluations == [4, 7]


def test_when_an_epoch_is_evaluated(spec):
    evaluated = lambda **e: run(spec.replace(eval_config=e), num_epochs=5).evaluations
    assert evaluated(eval_epoch_cycle=2) == [2, 4, 5]
    assert evaluated(eval_epoch_cycle=2, eval_after_training=False) == [2, 4]
    assert evaluated(eval_epoch_cycle=1, min_eval_interval=1000) == [1, 5]
    assert not run(spec.replace(dataset_config=dict(validation_file_pattern='')), num_epochs=5).evaluations


def test_evaluation_in_time(spec, monkeypatch):
    seen = []
    class Slow:
        image_hw, classes = (128, 128), experiment.class_table_from_spec(spec)
        def __call__(self, images): seen.append(len(images)); time.sleep(.3); return [T.Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))]*len(images)
    few = spec.replace(eval_config=dict(eval_batch_size=2))
    assert experiment.evaluate_spec(Slow(), few).num_images == 4 and seen == [2, 2]
    assert experiment.evaluate_spec(Slow(), few.replace(eval_config=dict(eval_samples=3))).num_images == 3
    with pytest.warns(UserWarning, match='eval_timeout'): assert experiment.evaluate_spec(Slow(), few.replace(eval_config=dict(eval_batch_size=1)), timeout=1e-6).num_images < 4


def test_resume_false_starts_anew(spec, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(B, 'load_latest_checkpoint', lambda *a: called.append(a) or (None, None))
    for resume in (False, True):
        fake = types.SimpleNamespace(config=spec.replace(training_config=dict(resume=resume)).training_config)
        assert S.Trainer.initialize(fake, tmp_path) == 'starting from random weights' and bool(called) == resume


def test_a_profile_of_five_steps(spec, tmp_path, monkeypatch):
    calls, at = [], []
    for name in ('start', 'stop'): monkeypatch.setattr(tf.profiler.experimental, name, lambda *a, name=name: calls.append((name, at[-1])))
    profile = watch.ProfilerCallback(tmp_path, 3)
    for step in range(20, 40): at.append(step); profile.on_train_batch_begin(step); profile.on_train_batch_end(step)
    profile.on_train_end()
    assert calls == [('start', 23), ('stop', 27)]


def test_the_seed_decides_weights_and_order(spec):
    def start(seed):
        t = trainer_of(spec, tf_random_seed=seed)
        return t.model.get_layer('stem_conv').kernel.numpy(), t.batch_at(0)[1]
    a, b, c = start(1), start(1), start(2)
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1] == b[1] != c[1] and np.abs(a[0]-c[0]).max() > 0


def test_ema_zero_keeps_none(spec):
    assert trainer_of(spec).ema is None and trainer_of(spec, moving_average_decay=.5).ema.decay == .5


def test_l1_and_l2_are_two_things(spec):
    trainer = trainer_of(spec)
    kernels = [v.numpy().ravel() for v in trainer.model.trainable_variables if v.path.endswith('kernel')]
    from effdet_nb.train.optim import l1_l2_penalty
    assert float(l1_l2_penalty(trainer.model.trainable_variables, .5, 0)) == pytest.approx(.5*np.abs(np.concatenate(kernels)).sum(), rel=1e-4)
    assert float(l1_l2_penalty(trainer.model.trainable_variables, 0, .5)) == pytest.approx(.25*np.square(np.concatenate(kernels)).sum(), rel=1e-4)


def step_length(spec, **changes):
    trainer = trainer_of(spec, momentum=0., learning_rate=.01, **changes)
    before = [v.numpy() for v in trainer.model.trainable_variables]
    row = dict(zip(trainer.metric_names, trainer.train_step(next(S.training_batches(trainer))).numpy()))
    return np.sqrt(sum(np.square(v.numpy()-b).sum() for v, b in zip(trainer.model.trainable_variables, before)))/.01, row['gradient_norm']


def test_clipping_shortens_the_step_and_zero_does_not(spec):
    length, norm = step_length(spec, clip_gradients_norm=.01)
    assert norm > .02 and length == pytest.approx(.01, rel=1e-2)
    length, norm = step_length(spec, clip_gradients_norm=0.)
    assert length == pytest.approx(norm, rel=1e-2)


def test_parts_of_a_batch_make_the_step_of_the_whole(spec):
    "Two parts of the same two pictures: batch norm sees the same statistics, so the step must be that of all four at once."
    whole, parts = trainer_of(spec), trainer_of(spec, gradient_accumulation_steps=2)
    for layer in (*whole.model.layers, *parts.model.layers):
        if isinstance(layer, keras.layers.Dropout): layer.rate = 0.     # what is dropped at random is another matter
    batch = {k: tf.concat([v[:2], v[:2]], 0) for k, v in next(S.training_batches(whole)).items()}
    a, b = whole.train_step(batch).numpy(), parts.train_step(batch).numpy()
    np.testing.assert_allclose(b, a, rtol=2e-3)
    for v, w in zip(whole.model.trainable_variables, parts.model.trainable_variables): np.testing.assert_allclose(w, v, rtol=1e-3, atol=1e-4, err_msg=v.path)


def test_picture_fields(spec):
    "The pipeline has tests of its own; here only that the fields arrive there."
    from effdet_nb.data.pipeline import make_sample_loader, train_dataset
    changed = spec.replace(dataset_config=dict(image_size='160,128', max_instances_per_image=33, skip_crowd_during_training=False))
    load = make_sample_loader(experiment.data_config_from_spec(changed))
    assert load.image_hw == (160, 128) and load.max_instances == 33 and load.skip_crowd is False
    def batches(s): return iter(train_dataset(experiment.data_config_from_spec(s), s.training_config.train_batch_size))
    fake = batches(spec.replace(dataset_config=dict(use_fake_data=True)))
    np.testing.assert_array_equal(next(fake)['images'], next(fake)['images'])
    plain = spec.replace(augmentation_config=dict(random_crop_min_scale=1., random_crop_max_scale=1.))
    def first(s): return next(batches(s))['images'].numpy()
    straight, mirrored, smaller = first(plain), first(plain.replace(augmentation_config=dict(rand_hflip=True))), first(plain.replace(augmentation_config=dict(random_crop_min_scale=.3, random_crop_max_scale=.3)))
    assert {(np.array_equal(a, b), np.array_equal(a, b[:, ::-1])) for a, b in zip(straight, mirrored)} <= {(True, False), (False, True)} and not np.array_equal(straight, mirrored)
    assert (smaller == smaller[:, -1:, -1:]).all(-1).mean() > .5            # most of the canvas is padding


def test_a_pruned_file_is_trained_again(spec, tmp_path):
    from effdet_nb.weights.model_file import save_detector
    arch = experiment.arch_from_spec(spec)
    arch = arch.__class__(**{**vars(arch), 'widths': {'block2a_expand_conv': 8}})
    model = detector.build(arch)
    save_detector(tmp_path/'pruned.tlt', model, arch, experiment.class_table_from_spec(spec))
    again = spec.replace(training_config=dict(pruned_model_path=str(tmp_path/'pruned.tlt')))
    got, stored = B.resolve_arch(again)
    trainer = S.Trainer(again, got)
    assert got.widths == {'block2a_expand_conv': 8} and 'retraining' in trainer.initialize(tmp_path/'run', initial_weights=stored)
    np.testing.assert_array_equal(trainer.model.get_layer('block2a_expand_conv').kernel, model.get_layer('block2a_expand_conv').kernel)


# --- trouble

def test_memory_that_ends_names_what_would_fit(spec, monkeypatch):
    trainer = trainer_of(spec, train_batch_size=12)
    def gradients(batch, *a):
        if batch['images'].shape[0] > 5: raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
    trainer.compute_gradients = gradients
    with pytest.raises(ValueError, match='train_batch_size 12 .* 5 would fit: set train_batch_size: 5, or keep 12 with gradient_accumulation_steps: 3'):
        with trouble.readable_errors(trainer.spec, trainer): raise tf.errors.ResourceExhaustedError(None, None, 'OOM')


def test_doubts_name_the_cure(spec):
    said = lambda **t: trouble.hyperparameter_warnings(s := spec.replace(training_config=t), S.make_training_schedule(s))
    assert 'learning_rate: 0.005' in said(learning_rate=.5)[0] and not said(learning_rate=.01)
    assert 'Set it to' in said(learning_rate=.01, moving_average_decay=.9999)[0]


def test_a_second_evaluation_without_any_hit_is_explained(spec, monkeypatch, capfd):
    class Metrics(dict):
        classes = experiment.class_table_from_spec(spec)
        results = [(trouble_truth(), T.Detections(np.float32([[0, 0, 9, 9]]), np.float32([.01]), np.int32([1])))]
    fake = Fake(spec)
    fake.evaluate, fake.judge = lambda classes: Metrics(AP=0.), types.MethodType(S.Trainer.run_evaluation, fake)
    for said in (False, True, False):
        row = fake.judge(None)
        fake.history.append(row)
        assert ('AP is 0, to three digits. What the evaluation saw' in capfd.readouterr().err) == said


def trouble_truth():
    from effdet_nb.evaluate.ground_truth import GroundTruth
    return GroundTruth(1, np.float32([[0, 0, 40, 60]]), np.array([1]), np.zeros(1, bool), np.ones(1))
