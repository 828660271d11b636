"Identities that must hold for any boxes."
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from effdet_nb.detector.boxes import (
    _draw_caption, area, as_boxes, caption_height, clip_boxes, draw_boxes, flip_boxes, iou, xywh_to_yxyx, yxyx_to_xywh)


def integer_boxes(low=-50, high=250):
    "A strategy for up to 12 boxes with whole corners, in order, so that float32 is exact."
    def order(corners): return np.concatenate([corners.min(1), corners.max(1)], -1).astype(np.float32)
    def corners(count): return arrays(np.int32, (count, 2, 2), elements=st.integers(low, high))
    return st.integers(0, 12).flatmap(corners).map(order)


@given(integer_boxes())
def test_conversion_to_coco_order_is_reversible(boxes):
    assert np.array_equal(xywh_to_yxyx(yxyx_to_xywh(boxes)), boxes)


@given(integer_boxes(), integer_boxes())
def test_iou_is_symmetric_bounded_and_counts_pixels(a, b):
    overlap = iou(a, b)
    assert overlap.shape == (len(a), len(b)) and overlap.dtype == np.float32
    assert np.array_equal(overlap, iou(b, a).T)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    if overlap.size:
        np.testing.assert_allclose(overlap[0, 0], pixel_iou(a[0], b[0]), rtol=1e-5)


def pixel_iou(a, b):
    "IoU of two boxes with whole corners, by counting pixels."
    masks = np.zeros((2, 300, 300), bool)
    for mask, (y1, x1, y2, x2) in zip(masks, np.stack([a, b]).astype(int)+50):
        mask[y1:y2, x1:x2] = True
    union = (masks[0] | masks[1]).sum()
    return (masks[0] & masks[1]).sum()/union if union else 0


@given(integer_boxes())
def test_iou_with_itself_is_one(boxes):
    solid = boxes[area(boxes) > 0]
    assert (np.diag(iou(solid, solid)) == 1).all()


@given(integer_boxes())
def test_flipping_twice_changes_nothing_and_flipping_keeps_iou(boxes):
    assert np.array_equal(flip_boxes(flip_boxes(boxes, 200), 200), boxes)
    np.testing.assert_allclose(iou(flip_boxes(boxes, 200), flip_boxes(boxes, 200)), iou(boxes, boxes))


@given(integer_boxes())
def test_clipped_boxes_are_inside_and_clipping_is_idempotent(boxes):
    inside = clip_boxes(boxes, (100, 150))
    assert (inside >= 0).all() and (inside[:, 0::2] <= 100).all() and (inside[:, 1::2] <= 150).all()
    assert np.array_equal(clip_boxes(inside, (100, 150)), inside)
    assert (area(inside) <= area(boxes)).all()


@pytest.mark.parametrize('empty', [[], (), np.zeros((0, 4)), np.zeros((0, 4), int)])
def test_every_function_accepts_no_boxes(empty):
    converted = (as_boxes(empty), xywh_to_yxyx(empty), yxyx_to_xywh(empty))
    for out in (*converted, clip_boxes(empty, (9, 9)), flip_boxes(empty, 9)):
        assert out.shape == (0, 4) and out.dtype == np.float32
    assert area(empty).shape == (0,) and iou(empty, empty).shape == (0, 0)


@given(integer_boxes(-1000, 1000))
def test_drawing_accepts_any_box_and_does_not_change_the_image(boxes):
    image = np.full((40, 60, 3), 127, np.uint8)
    out = draw_boxes(image, boxes, np.arange(len(boxes)), np.linspace(0, 1, len(boxes)), ['a'])
    assert out.shape == image.shape and out.dtype == np.uint8 and (image == 127).all()


@pytest.mark.parametrize('image_hw', [(300, 400), (480, 640), (1800, 2400), (60, 1000)])
@pytest.mark.parametrize('name', ['a', 'kangaroo', 'a name that is longer than most'])
def test_captions_are_inside_the_image_and_apart_where_there_is_room(image_hw, name):
    from PIL import Image, ImageDraw, ImageFont
    height, width = image_hw
    draw, font = ImageDraw.Draw(Image.new('RGB', (width, height))), ImageFont.load_default(size=12)
    corners = [(0, 0), (0, width-5), (height-5, 0), (height-5, width-5), (height//2, width//2), (height//2, width//2)]
    used = []
    for y, x in corners:
        box = y, x, y+20, x+30
        used.append(_draw_caption(draw, name, box, (255, 0, 0), font, (width, height), used))
    y1, x1, y2, x2 = np.transpose(used)
    assert (y1 >= 0).all() and (y2 <= height).all() and (x1 >= 0).all() and (x2 <= width).all()
    assert iou(used[4:5], used[5:]).max() == 0          # two boxes at the same place


@pytest.mark.parametrize('side, height', [(400, 40), (200, 25), (240, 30), (30, 20)])
def test_captions_are_an_eighth_of_a_typical_box_within_limits(side, height):
    boxes = [[0, 0, side, 2*side]]*3 + [[0, 0, 5, 5]]
    assert caption_height(boxes, 40) == height and caption_height([], 40) == 40


def test_functions_do_not_change_their_input():
    boxes = np.float32([[-5, -5, 500, 500]])
    before = boxes.copy()
    clip_boxes(boxes, (10, 10)), flip_boxes(boxes, 10), iou(boxes, boxes), yxyx_to_xywh(boxes)
    assert np.array_equal(boxes, before)
