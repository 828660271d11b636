"The fast training step on a CPU: values, gradients and running statistics stay those of the Keras layers."
import ast
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings, strategies as st

from effdet_nb.accel import cpu_convolutions, cpu_layers
from effdet_nb.accel.cpu_layers import FastLayers, FusedBatchNorm, FusedNormLayers, training_forward
from effdet_nb.detector.backbone import Block, LayerFactory, inverted_residual
from effdet_nb.detector.efficientdet import Arch, build

BLOCK = Block('a_', kernel=3, stride=1, expand_ratio=6, input_filters=8, output_filters=8)
TINY = Arch('efficientdet-tiny', (128, 128), 3)
FAST_FUNCTIONS = {'pointwise_conv2d': cpu_convolutions, 'depthwise_conv2d': cpu_convolutions,
                  'memory_efficient_swish': cpu_layers, 'memory_efficient_excite': cpu_layers,
                  'fused_conv_norm_swish': cpu_layers}       # name -> module in which it is looked up
# On a machine with a GPU the fast step is not used. CI has none, so these are never skipped there.
cpu_only = pytest.mark.skipif(not cpu_layers.tf_on_cpu(), reason='the fast step is not used beside a GPU')


def make_block(layers=FusedNormLayers, **settings):
    "One inverted residual as a model."
    features = keras.Input((None, None, 8))
    return keras.Model(features, inverted_residual(layers({}, **settings), features, BLOCK))


def fast_block(model, **settings):
    "The same block through the fast factory."
    make = FastLayers({}, model=model, **settings)
    return lambda x: inverted_residual(make, x, BLOCK)


def randomize(model):
    "Weights of which none is 0 or 1."
    rng = np.random.default_rng(0)
    model.set_weights([w+rng.uniform(.1, .5, w.shape) for w in model.get_weights()])
    return model.get_weights()


def value_and_gradients(function, inputs, weights=()):
    "The value of a function, and the gradients of its sum of squares."
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = function(*inputs)
        loss = tf.reduce_sum(tf.cast(value, 'float32')**2)
    return [value, *tape.gradient(loss, [*inputs, *weights])]


def compiled_gradients(function, x, weights, mode):
    "Value and gradients, eager, as a graph or compiled by XLA."
    def run(x): return value_and_gradients(function, [x], weights)
    if mode != 'eager': run = tf.function(run, jit_compile=mode == 'xla')
    return [np.asarray(g) for g in run(x)]


def assert_all_close(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance*max(np.abs(b).max(), 1e-6))


def forbid_fast_functions(monkeypatch):
    for name,module in FAST_FUNCTIONS.items(): monkeypatch.setattr(module, name, None)


@cpu_only
@pytest.mark.parametrize('lite', [False, True])
@pytest.mark.parametrize('mode', ['eager', 'graph', 'xla'])
def test_a_block_has_the_values_gradients_and_statistics_of_keras(mode, lite):
    model, x = make_block(LayerFactory, lite=lite), tf.random.normal((2, 9, 7, 8), seed=1)
    weights = randomize(model)
    theirs = compiled_gradients(partial(model, training=True), x, model.trainable_weights, mode)+model.get_weights()
    model.set_weights(weights)
    ours = compiled_gradients(fast_block(model, lite=lite), x, model.trainable_weights, mode)+model.get_weights()
    assert_all_close(ours, theirs)


@cpu_only
def test_a_detector_has_the_outputs_gradients_and_statistics_of_keras():
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3)).astype('uint8')
    model = build(TINY, layers=FusedNormLayers)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout): layer.rate = 0.
    weights = model.get_weights()

    def run(forward):
        model.set_weights(weights)
        with tf.GradientTape() as tape:
            outputs = forward(images)
            loss = sum(tf.reduce_mean(y**2) for y in outputs.values())
        return [*outputs.values(), *tape.gradient(loss, model.trainable_weights), *model.get_weights()]

    ours, theirs = run(training_forward(model, TINY)), run(partial(model, training=True))
    assert_all_close(ours[:2], theirs[:2], 1e-3)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3*max(np.abs(b).max(), 1e-3))


def test_layers_of_every_factory_have_the_same_weights_in_the_same_order():
    plain, fused = build(TINY), build(TINY, layers=FusedNormLayers)
    assert [w.path for w in plain.weights] == [w.path for w in fused.weights]
    assert [w.path for w in plain.trainable_weights] == [w.path for w in fused.trainable_weights]
    training_forward(fused, TINY)
    assert all(w.path.count('/') == 1 for w in fused.weights)       # `layer/weight`, as files name them


@cpu_only
def test_a_model_trained_fast_is_the_same_function_built_plain():
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3)).astype('uint8')
    fused, plain = build(TINY, layers=FusedNormLayers), build(TINY)
    forward = training_forward(fused, TINY)
    for _ in range(3):
        with tf.GradientTape() as tape: loss = sum(tf.reduce_mean(y**2) for y in forward(images).values())
        gradients = tape.gradient(loss, fused.trainable_weights)
        for weight, gradient in zip(fused.trainable_weights, gradients): weight.assign_sub(.01*gradient)
    plain.set_weights(fused.get_weights())
    ours, theirs = fused(images, training=False), plain(images, training=False)
    for name in ours: np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('policy', ['mixed_bfloat16', 'mixed_float16'])
def test_half_precision_trains_with_keras_layers(monkeypatch, policy):
    forbid_fast_functions(monkeypatch)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try: model = build(TINY, layers=FusedNormLayers)
    finally: keras.config.set_dtype_policy(before)
    assert training_forward(model, TINY).func is model


def test_a_gpu_trains_with_keras_layers(monkeypatch):
    monkeypatch.setattr(cpu_layers, 'tf_on_cpu', lambda: False)
    model = build(TINY, layers=FusedNormLayers)
    assert training_forward(model, TINY).func is model


@cpu_only
@pytest.mark.parametrize('change', ['frozen', 'synchronized'])
def test_a_norm_that_does_not_learn_from_its_batch_alone_is_keras_own(monkeypatch, change):
    for name,module in FAST_FUNCTIONS.items():
        if module is cpu_layers: monkeypatch.setattr(module, name, None)
    model, x = make_block(), tf.random.normal((2, 9, 7, 8), seed=1)
    randomize(model)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            if change == 'frozen': layer.trainable = False
            else: layer.synchronized = True
    ours = compiled_gradients(fast_block(model), x, model.trainable_weights, 'graph')
    assert_all_close(ours, compiled_gradients(partial(model, training=True), x, model.trainable_weights, 'graph'))


@cpu_only
def test_only_a_widening_convolution_is_fused_with_its_norm(monkeypatch):
    shapes = []
    def record(conv, norm, x):
        shapes.append(tuple(conv.kernel.shape))
        return tf.nn.silu(norm(conv(x), training=True))
    monkeypatch.setattr(cpu_layers, 'fused_conv_norm_swish', record)
    fast_block(make_block())(tf.random.normal((1, 8, 8, 8), seed=1))
    assert shapes == [(1, 1, 8, 48)]
    model = build(TINY, layers=FusedNormLayers)
    training_forward(model, TINY)(np.zeros((2, 128, 128, 3), 'uint8'))
    assert all(kernel[:2] == (1, 1) and kernel[3] >= 2*kernel[2] for kernel in shapes)


# What a step keeps: which operations of the backward pass read a feature map of the forward pass.

def consumers(tensor):
    "The operations that read a tensor, past those that only hand it on."
    found = []
    for op in tensor.consumers():
        if not op.type.startswith('Identity'): found.append(op)
        else: found += consumers(op.outputs[[i is tensor for i in op.inputs].index(True)])
    return found


def step_graph(forward, weights):
    "The graph of a training step of a block."
    def run(x): return value_and_gradients(lambda: forward(x), [], weights)[1:]
    return tf.function(run).get_concrete_function(tf.TensorSpec((2, 8, 8, 8))).graph


def readers(graph, wanted):
    "The sorted types of the operations that read the first output of each wanted operation."
    return [sorted(op.type for op in consumers(found.outputs[0])) for found in graph.get_operations() if wanted(found)]


def is_wide_norm(op): return op.type == 'FusedBatchNormV3' and op.outputs[0].shape[-1] == 48


@cpu_only
def test_the_input_of_swish_is_not_kept():
    model = make_block()
    graph = step_graph(fast_block(model), model.trainable_weights)
    # of two norms; the one after the expansion is not computed
    assert readers(graph, is_wide_norm) == [['Mul', 'Sigmoid']]
    graph = step_graph(partial(model, training=True), model.trainable_weights)
    found = readers(graph, is_wide_norm)
    assert len(found) == 2 and all(len(types) > 2 or 'SiluGrad' in types for types in found), found


@cpu_only
def test_the_output_of_swish_is_not_kept_for_excitation():
    "Only the mean and the product read it, and no operation of the backward pass."
    model = make_block()
    graph = step_graph(fast_block(model), model.trainable_weights)
    def is_swish(op):
        types = sorted(i.op.type for i in op.inputs)
        return op.type == 'Mul' and types == ['FusedBatchNormV3', 'Sigmoid'] and op.outputs[0].shape[-1] == 48
    assert readers(graph, is_swish) == [['Mean', 'Mul']]


def test_nothing_is_set_as_an_attribute_on_a_tensor():
    "Attributes are assigned on `self` only."
    code = ''.join(Path(module.__file__).read_text() for module in (cpu_convolutions, cpu_layers))
    for node in ast.walk(ast.parse(code)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        for target in targets:
            assert not isinstance(target, ast.Attribute) or target.value.id == 'self', ast.unparse(node)
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == 'setattr')


# Kernels of 1 are left out: for one channel and stride 2 TensorFlow's own gradient is wrong there (the next test).
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]), st.integers(1, 4))
@settings(max_examples=25)
def test_a_depthwise_convolution_of_any_size_has_tensorflows_gradients(h, w, kernel, stride, channels):
    inputs = [tf.random.normal((2, h, w, channels), seed=h), tf.random.normal((kernel, kernel, channels, 1), seed=w)]
    def plain(x, k): return tf.nn.depthwise_conv2d(x, k, (1, stride, stride, 1), 'SAME')
    def fast(x, k): return cpu_convolutions.depthwise_conv2d(x, k, stride)
    pairs = zip(value_and_gradients(fast, inputs), value_and_gradients(plain, inputs), strict=True)
    for a, b in pairs: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_depthwise_kernel_of_one_by_hand():
    x, k = tf.random.normal((2, 4, 8, 1), seed=1), tf.fill((1, 1, 1, 1), 2.)
    *_, gradient = value_and_gradients(lambda x, k: cpu_convolutions.depthwise_conv2d(x, k, 2), [x, k])
    expected = tf.fill((1, 1, 1, 1), 2*2*tf.reduce_sum(x[:, ::2, ::2]**2))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


L = keras.layers

@pytest.mark.parametrize('apply, layer', [
    (cpu_convolutions.fast_conv, L.Conv2D(6, 3, padding='same')),
    (cpu_convolutions.fast_conv, L.Conv2D(6, 1, strides=2)),
    (cpu_convolutions.fast_conv, L.Conv2D(6, 1, groups=2)),
    (cpu_convolutions.fast_depthwise_conv, L.DepthwiseConv2D(3)),
    (cpu_convolutions.fast_depthwise_conv, L.DepthwiseConv2D(3, padding='same', dilation_rate=2)),
    (cpu_convolutions.fast_separable_conv, L.SeparableConv2D(6, 3)),
    (cpu_convolutions.fast_separable_conv, L.SeparableConv2D(6, 3, padding='same', dilation_rate=2))])
def test_a_convolution_without_a_fast_gradient_is_keras_own(monkeypatch, apply, layer):
    forbid_fast_functions(monkeypatch)
    x = tf.random.normal((2, 8, 8, 4), seed=1)
    np.testing.assert_array_equal(apply(layer, x), layer(x))


def test_a_feature_map_of_unknown_size_has_no_static_padding():
    conv = L.DepthwiseConv2D(3, padding='same')
    assert not cpu_convolutions.has_static_same_padding(conv, keras.Input((None, 8, 4)))
    assert cpu_convolutions.has_static_same_padding(conv, keras.Input((8, 8, 4)))


def test_inference_is_a_graph_of_keras_operations_that_exporters_know():
    def types(model):
        graph = tf.function(partial(model, training=False)).get_concrete_function(tf.TensorSpec((1, 8, 8, 8))).graph
        return {op.type for op in graph.get_operations()}
    assert types(make_block())-types(make_block(LayerFactory)) == {'FusedBatchNormV3'}


def test_a_model_with_fused_norms_can_be_saved_by_keras(tmp_path):
    model, x = make_block(), tf.random.normal((1, 8, 8, 8), seed=1)
    model.save(tmp_path/'a.keras')
    np.testing.assert_array_equal(keras.models.load_model(tmp_path/'a.keras')(x), model(x))


@pytest.mark.parametrize('settings', [dict(scale=False), dict(center=False), dict(axis=1), dict(synchronized=True)])
def test_a_norm_that_the_kernel_does_not_fit_is_keras_own(settings):
    x = tf.random.normal((2, 5, 5, 5), seed=1)
    results = []
    for norm_class in (FusedBatchNorm, L.BatchNormalization):
        net = keras.Sequential([keras.Input((5, 5, 5)), norm_class(**settings)])
        results.append(compiled_gradients(partial(net, training=True), x, net.trainable_weights, 'eager'))
    for a, b in zip(*results, strict=True): np.testing.assert_allclose(a, b, atol=1e-4)


@given(st.floats(-50, 50), st.floats(.01, 50), st.integers(1, 6))
@settings(max_examples=25)
def test_statistics_computed_from_the_input_are_those_of_the_convolution(mean, std, channels):
    x = mean+std*tf.random.normal((2, 7, 5, channels), seed=channels)
    w = tf.random.normal((1, 1, channels, 12), seed=1)
    expected = tf.nn.moments(tf.nn.conv2d(tf.cast(x, 'float64'), tf.cast(w, 'float64'), 1, 'VALID'), (0, 1, 2))
    computed = cpu_layers.pointwise_batch_stats(x, w)
    largest = float(tf.reduce_max(abs(w)))*channels
    tolerances = 1e-5*largest*(abs(mean)+std), 1e-4*(largest*std)**2
    for a, b, atol in zip(computed, expected, tolerances): np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol)
    assert (np.array(computed[1]) >= 0).all()
