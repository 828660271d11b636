"The schedule's formula, decay on kernels only, the average that survives resume and replicas."

import math
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from keras import ops

from effdet_nb.train import optim as O


def config(**changes):
    usual = dict(
        num_epochs=300,
        lr_warmup_epoch=5.0,
        lr_warmup_init=5e-5,
        learning_rate=0.1,
        momentum=0.9,
        clip_gradients_norm=5.0,
    )
    return SimpleNamespace(**usual | changes)


def formula(step, c, steps_per_epoch):
    warm, total = int(c.lr_warmup_epoch * steps_per_epoch), int(c.num_epochs * steps_per_epoch)
    if step < warm:
        return c.lr_warmup_init + step / warm * (c.learning_rate - c.lr_warmup_init)
    return 0.5 * c.learning_rate * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


@settings(max_examples=50, deadline=None)
@given(st.integers(6, 400), st.floats(0, 5), st.floats(1, 3000), st.floats(0, 1))
def test_schedule_follows_the_formula(epochs, warmup, steps_per_epoch, share):
    c = config(num_epochs=epochs, lr_warmup_epoch=warmup)
    schedule = O.make_lr_schedule(c, steps_per_epoch)
    step = int(share * schedule.total_steps)
    assert float(schedule(step)) == pytest.approx(formula(step, c, steps_per_epoch), rel=1e-4, abs=1e-7)
    assert float(schedule(schedule.total_steps)) == 0 == float(schedule(schedule.total_steps * 3))


def test_schedule_without_warmup_starts_at_the_peak():
    schedule = O.make_lr_schedule(config(lr_warmup_epoch=0), 10)
    assert float(schedule(0)) == pytest.approx(0.1) and float(schedule(1)) < 0.1


def test_warmup_longer_than_the_training_warns_and_stays_finite():
    with pytest.warns(UserWarning, match='never reached'):
        schedule = O.make_lr_schedule(config(num_epochs=5), 7.5)
    assert np.isfinite(np.asarray(schedule(np.arange(100)))).all()


def test_a_spec_of_the_project_makes_schedule_and_optimizer():
    from effdet_nb.train.spec import Spec

    c = Spec.parse(
        'training_config { num_epochs: 10 lr_warmup_epoch: 1 lr_warmup_init: 0.001 learning_rate: 0.1 '
        'clip_gradients_norm: 0 momentum: 0 }'
    ).training_config
    assert O.make_lr_schedule(c, 4.5).get_config() == pytest.approx(
        dict(peak=0.1, warmup_init=0.001, warmup_steps=4, total_steps=45)
    )
    optimizer = O.make_optimizer(c, 0.1)
    assert optimizer.global_clipnorm is None and optimizer.momentum == 0


def test_zero_is_zero_and_the_loop_may_clip_by_itself():
    assert O.make_optimizer(config(), 0.1).global_clipnorm == 5
    assert O.make_optimizer(config(clip_gradients_norm=0), 0.1).global_clipnorm is None
    assert O.make_optimizer(config(), 0.1, clip=False).global_clipnorm is None


def test_optimizer_and_schedule_can_be_saved():
    optimizer = O.make_optimizer(config(), O.WarmupCosine(0.1, 0.001, 5, 50))
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()


def test_own_clipping_equals_the_optimizers():
    gradients = [np.float32([[3, -20]]), np.float32([7, 1, 40])]
    with_keras, by_hand = ([keras.Variable(np.zeros_like(g)) for g in gradients] for _ in range(2))
    O.make_optimizer(config(), 0.1).apply([ops.convert_to_tensor(g) for g in gradients], with_keras)
    clipped, norm = O.clip_by_global_norm([ops.convert_to_tensor(g) for g in gradients], 5.0)
    O.make_optimizer(config(), 0.1, clip=False).apply(clipped, by_hand)
    assert float(norm) == pytest.approx(np.sqrt(9 + 400 + 49 + 1 + 1600))
    assert float(O.global_norm(clipped)) == pytest.approx(5)
    for a, b in zip(with_keras, by_hand):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.fixture
def net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name='conv'),
            keras.layers.BatchNormalization(name='bn'),
            keras.layers.Activation('swish'),
            keras.layers.DepthwiseConv2D(3, name='dw'),
            keras.layers.SeparableConv2D(2, 3, name='sep'),
            keras.layers.Dropout(0.5),
        ]
    )


def test_decay_is_for_kernels_only_and_l1_is_not_l2(net):
    assert [v.path.split('/', 1)[1] for v in O.kernel_variables(net.trainable_variables)] == [
        'conv/kernel',
        'dw/kernel',
        'sep/depthwise_kernel',
        'sep/pointwise_kernel',
    ]
    import tensorflow as tf

    for l1, l2 in (0.3, 0), (0, 0.3), (0.2, 0.1):
        with tf.GradientTape() as tape:
            penalty = O.l1_l2_penalty(net.trainable_variables, l1, l2)
        slopes = dict(
            zip(
                [v.path for v in net.trainable_variables],
                tape.gradient(penalty, [v.value for v in net.trainable_variables]),
            )
        )
        for v in net.trainable_variables:
            w = v.numpy()
            if 'kernel' in v.name:
                np.testing.assert_allclose(slopes[v.path], l1 * np.sign(w) + l2 * w, rtol=1e-5, atol=1e-7)
            else:
                assert slopes[v.path] is None


def test_average_covers_weights_and_statistics_and_follows_the_rule(net):
    import tensorflow as tf

    ema, variables = O.Ema(net.variables, 0.99), net.variables
    assert any('seed' in v.path for v in variables) and not any('seed' in path for path in ema.paths)
    assert {path.split('/')[-1] for path in ema.paths} >= {'kernel', 'gamma', 'moving_mean', 'moving_variance'}
    step_of = tf.function(lambda step: ema.update(variables, step))
    want = {v.path: v.numpy().astype('f8') for v in O.float_variables(variables)}
    rng = np.random.default_rng(0)
    for step in range(30):
        for v in O.float_variables(variables):
            v.assign(rng.normal(size=v.shape))
        step_of(tf.constant(step, tf.int64))
        keep = min(0.99, (1 + step) / (10 + step))
        for v in O.float_variables(variables):
            want[v.path] = keep * want[v.path] + (1 - keep) * v.numpy()
    for path, array in ema.to_dict().items():
        np.testing.assert_allclose(array, want[path], atol=1e-5)


def test_stored_average_continues_bit_for_bit(net):
    straight = O.Ema(net.weights, 0.999)

    def go(ema, steps):
        for step in steps:
            rng = np.random.default_rng(step)
            for v in O.float_variables(net.weights):
                v.assign(rng.normal(size=v.shape))
            ema.update(net.weights, step)

    go(straight, range(5))
    resumed = O.Ema(net.weights, 0.999)
    resumed.load_dict({k: v.copy() for k, v in straight.to_dict().items()})
    go(straight, range(5, 10))
    go(resumed, range(5, 10))
    for path, array in straight.to_dict().items():
        np.testing.assert_array_equal(array, resumed.to_dict()[path])


def test_swapping_lends_and_gives_back(net):
    ema = O.Ema(net.weights, 0.9)
    for v in O.float_variables(net.weights):
        v.assign(v.numpy() + 1)
    before, average = [v.numpy().copy() for v in net.weights], ema.to_dict()
    with pytest.raises(ZeroDivisionError), ema.swapped_into(net.weights):
        for v in O.float_variables(net.weights):
            np.testing.assert_array_equal(v, average[v.path])
        raise ZeroDivisionError
    for v, was in zip(net.weights, before):
        np.testing.assert_array_equal(v, was)


def test_foreign_average_is_refused(net):
    ema = O.Ema(net.weights, 0.9)
    good = ema.to_dict()
    path = next(p for p in good if p.endswith('conv/kernel'))
    for bad in {k: v for k, v in good.items() if k != path}, good | {path: good[path][..., :1]}:
        with pytest.raises(ValueError, match=f'1 of {len(good)} variables.*{path}'):
            ema.load_dict(bad)


TWO_DEVICES = '''
import tensorflow as tf
cpu, two = tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()]*2
tf.config.set_logical_device_configuration(cpu, two)
import keras, numpy as np
from effdet_nb.train.optim import Ema
strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])
with strategy.scope():
    norm = keras.layers.BatchNormalization(synchronized=True)
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), norm])
    ema = Ema(net.weights, .9)
    optimizer = keras.optimizers.SGD(.1)
    optimizer.build(net.trainable_variables)
@tf.function
def step(i):
    def one():
        optimizer.apply([tf.ones_like(v) for v in net.trainable_variables], net.trainable_variables)
        ema.update(net.weights, i)
    strategy.run(one)
start = ema.to_dict()
step(tf.constant(0))
for v in net.weights:
    expected = .1*start[v.path] + .9*v.numpy()
    np.testing.assert_allclose(ema.to_dict()[v.path], expected, rtol=1e-5, atol=1e-6)
copies = [np.asarray(c) for c in strategy.experimental_local_results(ema.flat_weights.value)]
assert len(copies) == 2 and (copies[0] == copies[1]).all()
weight = net.weights[0]
with ema.swapped_into(net.weights): np.testing.assert_allclose(np.asarray(weight), ema.to_dict()[weight.path])
print('equal')
'''


def test_average_works_on_two_devices():
    done = subprocess.run([sys.executable, '-c', TWO_DEVICES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip().endswith('equal'), done.stderr[-2000:]


def test_chapter_needs_no_tensorflow_by_name():
    from pathlib import Path

    assert 'tensorflow' not in Path(O.__file__).read_text()
