"Guards of the loss chapter: the numbers of a peer implementation, stability at the edges, and the hand-written slope."
import numpy as np
import pytest

from effdet_nb.detector import loss as L
from effdet_nb.accel import fast_focal


@pytest.fixture(scope='module')
def oracle(shared_dir): return np.load(shared_dir/'oracle/losses_512.npz'), np.load(shared_dir/'oracle/targets_512.npz')


@pytest.fixture(scope='module')
def levels(oracle):
    "What the network said and should have said on each level, remade from the recipe in the file."
    numbers, targets = oracle
    made = {}
    for level in range(3, 8):
        rng, side = np.random.RandomState(100+level), 512//2**level
        logits = (rng.standard_normal((2, side, side, 810))*1.5 - 3).astype('f4')
        boxes = (rng.standard_normal((2, side, side, 36))*.3).astype('f4')
        def part(kind, *shape, level=level):
            cases = [targets[f'case{case}_{kind}_targets_{level}'] for case in numbers['case_ids']]
            return np.stack(cases).reshape(2, -1, *shape)
        made[level] = logits.reshape(2, -1, 90), boxes.reshape(2, -1, 4), part('cls').astype('int32'), part('box', 4)
    np.testing.assert_array_equal(made[7][0].reshape(-1), numbers['logits_level7'].reshape(-1))
    np.testing.assert_allclose(made[3][0].reshape(-1)[:32], numbers['logits_level3_head'], rtol=1e-6)
    np.testing.assert_allclose(made[3][1].reshape(-1)[:32], numbers['boxout_level3_head'], rtol=1e-6)
    return made


@pytest.mark.parametrize('level', range(3, 8))
def test_each_level_equals_the_peers(oracle, levels, level):
    numbers, (logits, boxes, cls, box) = oracle[0], levels[level]
    normalizer = float(numbers['num_positives_sum_plus_1'])
    for smoothing in '0', '0.1':
        np.testing.assert_allclose(float(fast_focal.fast_focal_loss(logits, cls,
                                                                    label_smoothing=float(smoothing)))/normalizer,
                                   numbers[f'focal_ls{smoothing}_level{level}'], rtol=2e-6)
    np.testing.assert_allclose(float(L.box_loss(boxes, box))/(4*normalizer), numbers[f'huber_level{level}'], rtol=1e-5)


def test_total_equals_the_peers(oracle, levels):
    numbers = oracle[0]
    all_levels = [np.concatenate(parts, axis=1) for parts in zip(*levels.values())]
    positives = np.int32([oracle[1][f'case{case}_num_positives'] for case in numbers['case_ids']])
    for share in positives, positives.sum():       # one count for each image, or already summed over replicas
        made = L.detection_loss(*all_levels, share, num_classes=90)
        np.testing.assert_allclose(float(made['cls']), numbers['focal_ls0_total'], rtol=2e-6)
        np.testing.assert_allclose(float(made['box']), numbers['huber_total'], rtol=1e-5)
        np.testing.assert_allclose(float(made['total']), numbers['det_loss_total_ls0'], rtol=2e-6)


def test_single_elements_equal_the_peers(oracle):
    numbers = oracle[0]
    x, y = numbers['elem_x'], numbers['elem_y']
    np.testing.assert_allclose(L.sigmoid_focal_loss(x, y), numbers['elem_focal_norm1'], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(L.sigmoid_focal_loss(x, y, label_smoothing=.1), numbers['elem_focal_ls0.1_norm1'],
                               rtol=2e-5, atol=1e-7)
    import tensorflow as tf
    logits, targets = tf.constant(x[:, None]), np.where(y > 0, 0, -1).astype('int32')
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = fast_focal.fast_focal_loss(logits, targets)
    np.testing.assert_allclose(tape.gradient(total, logits)[:, 0], numbers['elem_focal_grad'], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('jit', [False, True])
def test_loss_and_slope_stay_finite_at_the_edges(kind, jit):
    import tensorflow as tf
    x = tf.cast(np.float32([-6e4, -200, -88, -1e-3, 0, 1e-3, 88, 200, 6e4])[:, None], kind)

    @tf.function(jit_compile=jit)
    def both(x, targets):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = fast_focal.fast_focal_loss(x, targets, label_smoothing=.1)
        return total, tape.gradient(total, x)

    for channel in -1, 0:
        total, slope = both(x, tf.fill([9], channel))
        assert np.isfinite(total) and np.isfinite(slope.numpy().astype('f4')).all()
        assert slope.dtype == kind and total.dtype == 'float32'


def test_compiled_and_scaled_gradient_equals_the_definitions():
    import tensorflow as tf
    rng = np.random.default_rng(3)
    logits = tf.constant(rng.normal(-2, 2, (3, 50, 5)), tf.float32)
    targets = np.where(rng.random((3, 50)) < .2, rng.integers(0, 5, (3, 50)), -1).astype('int32')
    onehot = np.eye(6, dtype='f4')[targets][..., :5]

    def slope(loss):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            total = 7*loss()/3
        return tape.gradient(total, logits)

    want = slope(lambda: tf.reduce_sum(L.sigmoid_focal_loss(logits, onehot, .3, 1.7, .05)))
    for jit in False, True:
        @tf.function(jit_compile=jit)
        def fast_slope(): return slope(lambda: fast_focal.fast_focal_loss(logits, targets, .3, 1.7, .05))
        np.testing.assert_allclose(fast_slope(), want, atol=2e-6)


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match='3 channels, num_classes is 4.*same spec'):
        L.detection_loss(np.zeros((1, 1, 3), 'f4'), None, None, None, None, num_classes=4)


def test_chapter_needs_no_tensorflow_by_name():
    from pathlib import Path
    assert 'tensorflow' not in Path(L.__file__).read_text()
