"What training forgets and makes again: gradients stay those of layers that keep everything."
import keras, numpy as np, pytest, tensorflow as tf
from effdet_nb.model import backbone
from effdet_nb.model.backbone import Block, Layers, Swish, inverted_residual


def block(name='a_', **kw):
    inp = keras.Input((None, None, 8))
    return keras.Model(inp, inverted_residual(Layers({}, **kw), inp, Block(name, 3, 1, 6, 8, 8)))


def gradients(model, x, compiled):
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, 'float32')**2)
        return [y, *tape.gradient(loss, [x, *model.trainable_weights])]
    return [np.asarray(tf.cast(g, 'float32')) for g in (tf.function(run, jit_compile=compiled == 'xla') if compiled else run)(x)]


def kept(monkeypatch):
    "The same layers, which keep what they saw."
    monkeypatch.setattr(Swish, 'call', lambda self, x: keras.layers.Activation.call(self, x))


@pytest.mark.parametrize('compiled', ['', 'graph', 'xla'])
def test_a_block_learns_the_same(monkeypatch, compiled):
    keras.utils.set_random_seed(0)
    model, x = block(), tf.random.normal((2, 9, 7, 8), seed=1)
    weights = model.get_weights()
    ours = gradients(model, x, compiled)
    model.set_weights(weights)
    kept(monkeypatch)
    for a, b in zip(ours, gradients(model, x, compiled), strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4*np.abs(b).max())


def test_half_precision_goes_through():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy('mixed_bfloat16')
    try: found = gradients(block('b_'), tf.random.normal((2, 8, 8, 8), seed=1), 'graph')
    finally: keras.config.set_dtype_policy(policy)
    assert all(np.isfinite(g).all() for g in found) and any(g.any() for g in found[2:])


def test_it_is_made_again_only_while_training_and_only_behind_a_norm_that_learns(monkeypatch):
    seen = []
    monkeypatch.setattr(backbone, 'frugal_swish', lambda y, recipe: seen.append(recipe[0].shape[-1]) or tf.nn.silu(y))
    model, x = block('c_'), tf.random.normal((1, 8, 8, 8), seed=1)
    model(x, training=False)
    assert seen == []
    model(x, training=True)
    assert seen == [48, 48]     # behind the widening and behind the depthwise convolution
    for layer in model.layers: layer.trainable = False
    model(x, training=True)
    assert len(seen) == 2


def readers(model):
    "What reads the answers of the batch norms before a swish, in the graph of a step."
    def run(x):
        with tf.GradientTape() as tape: loss = tf.reduce_sum(model(x, training=True)**2)
        return tape.gradient(loss, model.trainable_weights)
    graph = tf.function(run).get_concrete_function(tf.TensorSpec((2, 8, 8, 8))).graph
    norms = [op for op in graph.get_operations() if op.type == 'FusedBatchNormV3' and 'project' not in op.name]
    return [sorted(reader.type for reader in op.outputs[0].consumers() if not reader.type.startswith('Identity')) for op in norms]


def test_what_swish_saw_is_not_kept(monkeypatch):
    "Nothing on the way back reads the answer of a batch norm; it does with Keras' own swish."
    assert readers(block('d_')) == [['Mul', 'Sigmoid']]*2
    kept(monkeypatch)
    assert all(len(r) > 2 for r in readers(block('e_')))
