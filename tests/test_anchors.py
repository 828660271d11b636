"Anchors against the reference implementation, and the properties of their coding."
import numpy as np
from hypothesis import given, settings, strategies as st

from effdet_nb.model.anchors import all_anchors, decode, encode, feature_size


def test_anchors_equal_the_reference(shared):
    ref = np.load(shared/'oracle'/'anchors_512x512.npz', allow_pickle=False)
    np.testing.assert_allclose(all_anchors((512, 512)), ref['anchors_ratios_1p4_0p7'], atol=1e-3)
    exact = ((1., 1.), (2**.5, 2**-.5), (2**-.5, 2**.5))
    np.testing.assert_allclose(all_anchors((512, 512), exact), ref['anchors'], atol=1e-3)


@settings(deadline=None)
@given(st.integers(128, 700), st.integers(128, 700))
def test_one_row_per_cell_and_shape_for_any_size(h, w):
    cells = sum(np.prod(feature_size((h, w), l)) for l in range(3, 8))
    a = all_anchors((h, w))
    assert a.shape == (9*cells, 4) and (a[:, 2:] > a[:, :2]).all()


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 500), st.floats(0, 500), st.floats(.5, 400), st.floats(.5, 400)]), min_size=1, max_size=20))
def test_decode_undoes_encode(rows):
    rows = np.array(rows, np.float32)
    boxes = np.concatenate([rows[:, :2], rows[:, :2]+rows[:, 2:]], 1)
    anchors = all_anchors((128, 128))[:len(boxes)]
    np.testing.assert_allclose(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-3, atol=1e-2)
