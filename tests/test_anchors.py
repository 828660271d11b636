"Anchors equal the reference implementation, and box coding is invertible."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.data.anchor_fit import measure_anchor_fit
from effdet_nb.detector.anchors import all_anchors, decode_boxes, encode_boxes, feature_size
from effdet_nb.detector.boxes import area, iou


def test_anchors_equal_the_reference(shared_dir):
    ref = np.load(shared_dir/'oracle'/'anchors_512x512.npz', allow_pickle=False)
    np.testing.assert_array_equal(all_anchors((512, 512)), ref['anchors_ratios_1p4_0p7'])      # bit for bit
    exact = ((1., 1.), (2**.5, 2**-.5), (2**-.5, 2**.5))
    np.testing.assert_array_equal(all_anchors((512, 512), exact), ref['anchors'])


@settings(deadline=None)
@given(st.integers(128, 700), st.integers(128, 700))
def test_any_size_has_one_anchor_per_location_and_shape(h, w):
    num_locations = sum(np.prod(feature_size((h, w), level)) for level in range(3, 8))
    anchors = all_anchors((h, w))
    assert anchors.shape == (9*num_locations, 4) and (anchors[:, 2:] > anchors[:, :2]).all()


position, side = st.floats(0, 500), st.floats(.5, 400)


@settings(deadline=None)
@given(st.lists(st.tuples(position, position, side, side), min_size=1, max_size=20))
def test_decoding_inverts_encoding(rows):
    rows = np.array(rows, np.float32)
    boxes = np.concatenate([rows[:, :2], rows[:, :2]+rows[:, 2:]], 1)
    anchors = all_anchors((128, 128))[:len(boxes)]
    np.testing.assert_allclose(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-3, atol=1e-2)


def test_the_anchor_fit_counts_by_size_and_suggests_only_improvements():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 60, (40, 2)), rng.uniform(4, 60, (40, 1))
    boxes = np.concatenate([corner, corner+side], 1)
    fit = measure_anchor_fit(boxes, (128, 128))
    assert sum(n for n, _, _ in fit.by_size().values()) == 40 and 0 <= fit.matched_share <= 1
    want = [max(iou(b[None], all_anchors((128, 128)))[0]) for b in boxes]
    np.testing.assert_allclose(fit.iou, want, atol=1e-5)
    if fit.suggestion:
        improved = measure_anchor_fit(boxes, (128, 128), **fit.suggestion)
        assert improved.matched_share == fit.suggested_share > fit.matched_share
    assert measure_anchor_fit(all_anchors((128, 128))[:50], (128, 128)).suggestion is None


def test_an_anchor_fit_without_boxes_is_refused():
    with pytest.raises(ValueError, match='no boxes'): measure_anchor_fit([], (128, 128))


def test_predictions_of_a_diverged_network_have_finite_areas_and_no_warning():
    anchors = all_anchors((128, 128))
    deltas = np.full((len(anchors), 4), 200, np.float32)
    with np.errstate(all='raise'):
        boxes = decode_boxes(deltas, anchors)
        assert np.isfinite(area(boxes)).all()
        assert np.isfinite(iou(boxes[:3], anchors[:5])).all()
