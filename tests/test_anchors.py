"Anchors against the reference implementation, and the properties of their coding."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.detector.boxes import iou
from effdet_nb.detector.anchors import all_anchors, decode_boxes, encode_boxes, feature_size
from effdet_nb.data.anchor_fit import measure_anchor_fit


def test_anchors_equal_the_reference(shared_dir):
    ref = np.load(shared_dir/'oracle'/'anchors_512x512.npz', allow_pickle=False)
    np.testing.assert_array_equal(all_anchors((512, 512)), ref['anchors_ratios_1p4_0p7'])      # bit for bit
    exact = ((1., 1.), (2**.5, 2**-.5), (2**-.5, 2**.5))
    np.testing.assert_array_equal(all_anchors((512, 512), exact), ref['anchors'])


@settings(deadline=None)
@given(st.integers(128, 700), st.integers(128, 700))
def test_one_row_per_cell_and_shape_for_any_size(h, w):
    cells = sum(np.prod(feature_size((h, w), l)) for l in range(3, 8))
    a = all_anchors((h, w))
    assert a.shape == (9*cells, 4) and (a[:, 2:] > a[:, :2]).all()


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 500), st.floats(0, 500), st.floats(.5, 400), st.floats(.5, 400)]), min_size=1,
                max_size=20))
def test_decode_undoes_encode(rows):
    rows = np.array(rows, np.float32)
    boxes = np.concatenate([rows[:, :2], rows[:, :2]+rows[:, 2:]], 1)
    anchors = all_anchors((128, 128))[:len(boxes)]
    np.testing.assert_allclose(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-3, atol=1e-2)


def test_fit_counts_by_size_and_suggests_only_what_helps():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 60, (40, 2)), rng.uniform(4, 60, (40, 1))
    boxes = np.concatenate([corner, corner+side], 1)
    fit = measure_anchor_fit(boxes, (128, 128))
    assert sum(n for n, _, _ in fit.by_size().values()) == 40 and 0 <= fit.matched_share <= 1
    want = [max(iou(b[None], all_anchors((128, 128)))[0]) for b in boxes]
    np.testing.assert_allclose(fit.iou, want, atol=1e-5)
    if fit.suggestion:
        assert measure_anchor_fit(boxes, (128, 128),
                                  **fit.suggestion).matched_share == fit.suggested_share > fit.matched_share
    assert measure_anchor_fit(all_anchors((128, 128))[:50], (128, 128)).suggestion is None


def test_no_boxes_are_refused():
    with pytest.raises(ValueError, match='no boxes'): measure_anchor_fit([], (128, 128))
