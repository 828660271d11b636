"Guards for effdet_nb.detector.boxes: identities that must hold for any boxes."
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from effdet_nb.detector.boxes import area, as_boxes, clip_boxes, draw_boxes, flip_boxes, iou, xywh_to_yxyx, yxyx_to_xywh


def some_boxes(low=-50, high=250):
    "Any number of boxes with whole corners, in order, so that float32 is exact."
    def sort(corners): return np.concatenate([corners.min(1), corners.max(1)], -1).astype(np.float32)
    return st.integers(0, 12).flatmap(lambda n: arrays(np.int32, (n, 2, 2), elements=st.integers(low, high))).map(sort)


@given(some_boxes())
def test_coco_order_and_back(boxes):
    assert np.array_equal(xywh_to_yxyx(yxyx_to_xywh(boxes)), boxes)


@given(some_boxes(), some_boxes())
def test_iou_is_symmetric_bounded_and_counts_pixels(a, b):
    overlap = iou(a, b)
    assert overlap.shape == (len(a), len(b)) and overlap.dtype == np.float32
    assert np.array_equal(overlap, iou(b, a).T)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    for i, j in zip(*np.nonzero(overlap >= 0)):
        pixels = [np.zeros((300, 300), bool) for _ in range(2)]
        for p, (y1, x1, y2, x2) in zip(pixels, np.stack([a[i], b[j]]).astype(int) + 50): p[y1:y2, x1:x2] = True
        union = (pixels[0] | pixels[1]).sum()
        np.testing.assert_allclose(overlap[i, j], (pixels[0] & pixels[1]).sum() / union if union else 0, rtol=1e-5)
        break


@given(some_boxes())
def test_iou_with_itself_is_one(boxes):
    solid = boxes[area(boxes) > 0]
    assert (np.diag(iou(solid, solid)) == 1).all()


@given(some_boxes())
def test_flip_twice_is_nothing_and_keeps_overlaps(boxes):
    assert np.array_equal(flip_boxes(flip_boxes(boxes, 200), 200), boxes)
    np.testing.assert_allclose(iou(flip_boxes(boxes, 200), flip_boxes(boxes, 200)), iou(boxes, boxes))


@given(some_boxes())
def test_clip_stays_inside_and_is_idempotent(boxes):
    inside = clip_boxes(boxes, (100, 150))
    assert (inside >= 0).all() and (inside[:, 0::2] <= 100).all() and (inside[:, 1::2] <= 150).all()
    assert np.array_equal(clip_boxes(inside, (100, 150)), inside)
    assert (area(inside) <= area(boxes)).all()


@pytest.mark.parametrize('empty', [[], (), np.zeros((0, 4)), np.zeros((0, 4), int)])
def test_no_boxes_are_fine_everywhere(empty):
    for out in (as_boxes(empty), clip_boxes(empty, (9, 9)), flip_boxes(empty, 9), xywh_to_yxyx(empty), yxyx_to_xywh(empty)):
        assert out.shape == (0, 4) and out.dtype == np.float32
    assert area(empty).shape == (0,) and iou(empty, empty).shape == (0, 0)


@given(some_boxes(-1000, 1000))
def test_drawing_survives_any_box_and_leaves_the_picture_alone(boxes):
    image = np.full((40, 60, 3), 127, np.uint8)
    out = draw_boxes(image, boxes, np.arange(len(boxes)), np.linspace(0, 1, len(boxes)), ['a'])
    assert out.shape == image.shape and out.dtype == np.uint8 and (image == 127).all()


def test_functions_leave_their_input_alone():
    boxes = np.float32([[-5, -5, 500, 500]])
    before = boxes.copy()
    clip_boxes(boxes, (10, 10)), flip_boxes(boxes, 10), iou(boxes, boxes), yxyx_to_xywh(boxes)
    assert np.array_equal(boxes, before)
