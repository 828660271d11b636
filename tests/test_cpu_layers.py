"Layers with a way back of their own: what they answer and learn stays that of Keras' layers."
import keras, numpy as np, pytest, tensorflow as tf
from hypothesis import given, settings, strategies as st
from keras import layers as keras_layers
from effdet_nb.accel import cpu_layers as layers
from effdet_nb.detector.backbone import Block, LayerFactory, inverted_residual


def block(name='a_', **kw):
    inp = keras.Input((None, None, 8))
    return keras.Model(inp, inverted_residual(LayerFactory({}, **kw), inp, Block(name, 3, 1, 6, 8, 8)))


def slopes(f, xs, weights=()):
    "What `f` answers, and the gradients of its square."
    with tf.GradientTape() as tape:
        tape.watch(xs)
        loss = tf.reduce_sum(tf.cast(y := f(*xs), 'float32')**2)
    return [y, *tape.gradient(loss, [*xs, *weights])]


def gradients(model, x, compiled):
    def run(x): return slopes(lambda x: model(x, training=True), [x], model.trainable_weights)
    return [np.asarray(tf.cast(g, 'float32')) for g in (tf.function(run, jit_compile=compiled == 'xla') if compiled else run)(x)]


# Never skipped on a machine without a GPU, and so never in CI.
ours_only = pytest.mark.skipif(not layers.tf_on_cpu(), reason="what is tested here is not used beside a GPU, where TensorFlow's and Keras' own gradients are taken")
OURS = dict(Swish='Activation', Squeeze='GlobalAveragePooling2D', Excite='Multiply', Conv='Conv2D', DepthwiseConv='DepthwiseConv2D', SeparableConv='SeparableConv2D')
WAYS = ('pointwise_conv2d', 'depthwise_conv2d', 'memory_efficient_swish', 'fused_conv_bn_swish', 'memory_efficient_excite')


def kept(monkeypatch):
    "The same layers, which keep what they saw and go Keras' way back."
    for ours, theirs in OURS.items():
        def call(self, x, training=None, theirs=getattr(keras_layers, theirs)): return theirs.call(self, x)
        monkeypatch.setattr(getattr(layers, ours), 'call', call)


def shaken(model):
    "Weights of which none is 0 or 1."
    rng = np.random.default_rng(0)
    model.set_weights([w+rng.uniform(.1, .5, w.shape) for w in model.get_weights()])
    return model.get_weights()


@pytest.mark.parametrize('compiled', ['', 'graph', 'xla'])
def test_a_block_learns_the_same(monkeypatch, compiled):
    "Answer, gradients, and what the norms remember."
    keras.utils.set_random_seed(0)
    model, x = block(), tf.random.normal((2, 9, 7, 8), seed=1)
    weights = shaken(model)
    ours = gradients(model, x, compiled) + model.get_weights()
    model.set_weights(weights)
    kept(monkeypatch)
    theirs = gradients(model, x, compiled) + model.get_weights()
    for a, b in zip(ours, theirs, strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4*np.abs(b).max())


@pytest.mark.parametrize('policy', ['mixed_bfloat16', 'mixed_float16'])
def test_half_precision_goes_keras_way(monkeypatch, policy):
    for name in WAYS: monkeypatch.setattr(layers, name, None)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try: found = gradients(block('b_'), tf.random.normal((2, 8, 8, 8), seed=1), 'graph')
    finally: keras.config.set_dtype_policy(before)
    assert all(np.isfinite(g).all() for g in found) and any(g.any() for g in found[2:])


@ours_only
def test_it_is_made_again_only_while_training_and_only_behind_a_norm_that_learns(monkeypatch):
    seen = []
    monkeypatch.setattr(layers, 'memory_efficient_swish', lambda y, recipe: seen.append(recipe[0].shape[-1]) or (tf.nn.silu(y), None))
    monkeypatch.setattr(layers, 'fused_conv_bn_swish', lambda x, w, y, scale, shift: seen.append(tuple(w.shape)) or tf.nn.silu(y*scale+shift))
    model, x = block('c_'), tf.random.normal((1, 8, 8, 8), seed=1)
    model(x, training=False)
    assert seen == []
    model(x, training=True)
    assert seen == [(1, 1, 8, 48), 48]     # behind the widening and behind the depthwise convolution
    for layer in model.layers: layer.trainable = False
    model(x, training=True)
    assert len(seen) == 2


def readers(model, wanted):
    "The kinds of operations that read the answers of those operations of a step that are `wanted`."
    def run(x): return slopes(lambda: model(x, training=True), [], model.trainable_weights)[1:]
    graph = tf.function(run).get_concrete_function(tf.TensorSpec((2, 8, 8, 8))).graph
    found = [op for op in graph.get_operations() if wanted(op)]
    def consumers(t):
        "Past those that only hand it on."
        return [r for op in t.consumers() for r in (consumers(op.outputs[[i is t for i in op.inputs].index(True)]) if op.type.startswith('Identity') else [op])]
    return [sorted(r.type for r in consumers(op.outputs[0])) for op in found]


def is_norm(op): return op.type == 'FusedBatchNormV3' and 'project' not in op.name


def is_swish(op): return op.type == 'Mul' and '_activation_1/mul' in op.name and 'expand' not in op.name


@ours_only
def test_what_swish_saw_is_not_kept(monkeypatch):
    "Nothing on the way back reads the answer of a batch norm; it does with Keras' own swish."
    assert readers(block('d_'), is_norm) == [[], ['Mul', 'Sigmoid']]     # behind a product it is not even computed
    kept(monkeypatch)
    found = readers(block('e_'), is_norm)
    assert len(found) == 2 and all(len(r) > 2 for r in found)


@ours_only
def test_what_was_excited_is_not_kept(monkeypatch):
    "Only the average and the product read swish's answer; the way back does too with Keras' own layers."
    assert readers(block('i_'), is_swish) == [['Mean', 'Mul']]
    monkeypatch.setattr(layers.Excite, 'call', lambda self, x: keras_layers.Multiply.call(self, x))
    assert readers(block('j_'), is_swish) == [['Mean', 'Mul', 'Mul']]


# Kernels of 1 are left out: for one channel and stride 2 TensorFlow's own gradient is wrong there (the next test).
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]), st.integers(1, 4))
@settings(max_examples=25)
def test_a_depthwise_convolution_of_any_size_learns_the_same(h, w, kernel, stride, channels):
    xs = [tf.random.normal((2, h, w, channels), seed=h), tf.random.normal((kernel, kernel, channels, 1), seed=w)]
    theirs = slopes(lambda x, k: tf.nn.depthwise_conv2d(x, k, (1, stride, stride, 1), 'SAME'), xs)
    for a, b in zip(slopes(lambda x, k: layers.depthwise_conv2d(x, k, stride), xs), theirs, strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_depthwise_kernel_of_one_by_hand():
    x, k = tf.random.normal((2, 4, 8, 1), seed=1), tf.fill((1, 1, 1, 1), 2.)
    *_, slope = slopes(lambda x, k: layers.depthwise_conv2d(x, k, 2), [x, k])
    np.testing.assert_allclose(slope, tf.fill((1, 1, 1, 1), 2*2*tf.reduce_sum(x[:, ::2, ::2]**2)), rtol=1e-5)


@ours_only
@pytest.mark.parametrize('ours', [layers.Conv(6, 3, padding='same'), layers.Conv(6, 1, strides=2), layers.Conv(6, 1, groups=2),
    layers.DepthwiseConv(3), layers.DepthwiseConv(3, padding='same', dilation_rate=2), layers.SeparableConv(6, 3),
    layers.SeparableConv(6, 3, padding='same', dilation_rate=2)])
def test_where_ours_does_not_fit_the_way_back_is_keras_own(monkeypatch, ours):
    for name in ('pointwise_conv2d', 'depthwise_conv2d'): monkeypatch.setattr(layers, name, None)
    net = keras.Sequential([keras.Input((8, 8, 4)), ours])
    assert all(np.isfinite(g).all() for g in gradients(net, tf.random.normal((2, 8, 8, 4), seed=1), 'graph'))


def test_a_map_of_unknown_size_goes_keras_way():
    assert not layers.has_static_same_padding(layers.DepthwiseConv(3, padding='same'), keras.Input((None, 8, 4)))
    assert layers.has_static_same_padding(layers.DepthwiseConv(3, padding='same'), keras.Input((8, 8, 4)))


def test_an_answer_is_made_of_keras_operations(monkeypatch):
    "A network that only answers is the graph that exporters know."
    def kinds(): return [op.type for op in tf.function(block()).get_concrete_function(tf.TensorSpec((1, 8, 8, 8))).graph.get_operations()]
    ours = kinds()
    kept(monkeypatch)
    assert ours == kinds()


def test_a_gpu_goes_keras_way(monkeypatch):
    monkeypatch.setattr(layers, 'tf_on_cpu', lambda: False)
    for name in WAYS: monkeypatch.setattr(layers, name, None)
    assert all(np.isfinite(g).all() for g in gradients(block('g_'), tf.random.normal((2, 8, 8, 8), seed=1), 'graph'))


def test_all_of_it_can_be_saved(tmp_path):
    inp = keras.Input((8, 8, 8))
    model, x = keras.Model(inp, layers.SeparableConv(4, 3, padding='same')(block('h_')(inp))), tf.random.normal((1, 8, 8, 8), seed=1)
    model.save(tmp_path/'a.keras')
    np.testing.assert_array_equal(keras.models.load_model(tmp_path/'a.keras')(x), model(x))


def test_a_swish_is_a_swish():
    with pytest.raises(ValueError, match='only be swish'): layers.Swish('relu')


@pytest.mark.parametrize('kw', [dict(scale=False), dict(center=False), dict(axis=1)])
def test_a_norm_of_another_kind_is_keras_own(kw):
    x, nets = tf.random.normal((2, 5, 5, 5), seed=1), [keras.Sequential([keras.Input((5, 5, 5)), norm(**kw)]) for norm in (layers.BatchNorm, keras_layers.BatchNormalization)]
    for a, b in zip(*(gradients(net, x, '') for net in nets), strict=True): np.testing.assert_allclose(a, b, atol=1e-4)


@ours_only
@pytest.mark.parametrize('shape', [(1, 1, 8), (8, 8, 1), (8, 8, 8)])
def test_any_factor_excites_with_the_right_gradient(shape):
    inputs = [keras.Input((8, 8, 8)), keras.Input(shape)]
    def net(norm, act, excite): return keras.Model(inputs, excite([act(norm(inputs[0])), inputs[1]]))
    def run(model, xs): return slopes(lambda *xs: model(xs, training=True), xs)
    xs = [tf.random.normal((2, 8, 8, 8), seed=1), tf.random.normal((2, *shape), seed=2)]
    ours, theirs = net(layers.BatchNorm(), layers.Swish(), layers.Excite()), net(keras_layers.BatchNormalization(), keras_layers.Activation('swish'), keras_layers.Multiply())
    for a, b in zip(run(ours, xs), run(theirs, xs), strict=True): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@given(st.floats(-50, 50), st.floats(.01, 50), st.integers(1, 6))
@settings(max_examples=25)
def test_statistics_of_a_product_are_those_of_its_answer(mean, std, channels):
    x, w = (mean+std*tf.random.normal((2, 7, 5, channels), seed=channels)), tf.random.normal((1, 1, channels, 12), seed=1)
    true = tf.nn.moments(tf.nn.conv2d(tf.cast(x, 'float64'), tf.cast(w, 'float64'), 1, 'VALID'), (0, 1, 2))
    top = float(tf.reduce_max(abs(w)))*channels
    for found, t, atol in zip(layers.pointwise_batch_stats(x, w), true, (1e-5*top*(abs(mean)+std), 1e-4*(top*std)**2)): np.testing.assert_allclose(found, t, rtol=1e-3, atol=atol)
    assert (np.array(layers.pointwise_batch_stats(x, w)[1]) >= 0).all()


@ours_only
@pytest.mark.parametrize('conv, widens', [(layers.Conv(16, 1, use_bias=False), True), (layers.Conv(7, 1, use_bias=False), False), (layers.Conv(16, 1), False), (layers.Conv(16, 1, use_bias=False, activation='relu'), False)])
def test_what_counts_as_a_product(conv, widens):
    y = conv(tf.ones((1, 4, 4, 4)), training=True)
    assert hasattr(y, 'product') == widens and not hasattr(conv(tf.ones((1, 4, 4, 4))), 'product')
