"Targets: the numbers of a peer implementation, digit by digit, and a slow and plain second implementation."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.detector import targets as T
from effdet_nb.accel import grid_targets as G
from effdet_nb.detector.anchors import all_anchors


def plain_assign(anchors, boxes, classes):
    "The rule as one would tell it, one object at a time."
    def area(b): return (b[:, 2]-b[:, 0]) * (b[:, 3]-b[:, 1])
    best, row = np.full(len(anchors), -1., 'float32'), np.full(len(anchors), -1)
    forced = {}
    for i, (box, channel) in enumerate(zip(boxes, classes)):
        if channel < 0 or (box[2:] <= box[:2]).any(): continue
        shared = np.minimum(anchors[:, 2:], box[2:]) - np.maximum(anchors[:, :2], box[:2])
        overlap = np.prod(np.maximum(shared, 0), axis=1)
        iou = overlap / (area(anchors) + area(box[None]) - overlap)
        row[(iou >= .5) & (iou > best)] = i
        best = np.maximum(best, iou)
        if iou.max() > 0: forced.setdefault(int(iou.argmax()), i)
    for anchor, i in forced.items(): row[anchor] = i
    return np.where(row >= 0, np.append(classes, -1)[row], -1), row


def run(*args): return tuple(np.asarray(o) for o in T.assign(*args))


@pytest.fixture(scope='module')
def oracle(shared_dir):
    return np.load(shared_dir/'oracle/targets_512.npz'), np.load(shared_dir/'oracle/anchors_512x512.npz')['anchors']


def all_levels(numbers, case, kind, width):
    "The peer's targets of an image, level after level."
    parts = [numbers[f'case{case}_{kind}_targets_{level}'] for level in range(3, 8)]
    return np.concatenate([part.reshape(-1, width) for part in parts])


@pytest.mark.parametrize('case', range(6))
@pytest.mark.parametrize('padding', [0, 79])
def test_targets_equal_the_peers(oracle, case, padding):
    numbers, anchors = oracle
    boxes, classes = numbers[f'case{case}_gt_boxes_abs_yxyx'], numbers[f'case{case}_gt_classes_1based']-1
    boxes = np.pad(boxes, [(0, padding), (0, 0)], constant_values=-1)
    padded_classes = np.pad(classes, (0, padding), constant_values=-1)
    cls, box, count = run(anchors, boxes, padded_classes)
    np.testing.assert_array_equal(cls, all_levels(numbers, case, 'cls', 1)[:, 0])
    np.testing.assert_allclose(box, all_levels(numbers, case, 'box', 4), atol=2e-5)
    assert count == numbers[f'case{case}_num_positives']
    np.testing.assert_array_equal(cls, plain_assign(anchors, boxes, padded_classes)[0])


side = st.sampled_from([0., 4., 8., 12., 16., 24., 32.])        # a coarse grid, so that ties are common
boxes_and_classes = st.lists(st.tuples(side, side, side, side, st.integers(-1, 3)), max_size=8)
anchors_drawn = st.lists(st.tuples(side, side, st.sampled_from([4., 8., 16.]), st.sampled_from([4., 8., 16.])),
                         min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(anchors_drawn, boxes_and_classes)
def test_any_boxes_give_what_the_plain_rule_gives(anchors, objects):
    anchors = np.float32([(y, x, y+h, x+w) for y, x, h, w in anchors])
    boxes = np.float32([(y, x, y+h, x+w) for y, x, h, w, _ in objects]).reshape(-1, 4)
    classes = np.int32([o[4] for o in objects])
    cls, box, count = run(anchors, boxes, classes)
    expected, row = plain_assign(anchors, boxes, classes)
    np.testing.assert_array_equal(cls, expected)
    assert count == (expected >= 0).sum() and np.isfinite(box).all() and (box[expected < 0] == 0).all()
    size = anchors[:, 2:] - anchors[:, :2]
    for i in np.flatnonzero(expected >= 0):
        centre = anchors[i, :2] + size[i]/2 + box[i, :2]*size[i]
        half = np.exp(box[i, 2:])*size[i]/2
        np.testing.assert_allclose(np.concatenate([centre-half, centre+half]), boxes[row[i]], atol=1e-3)


def test_an_object_that_overlaps_no_anchor_makes_none_positive():
    anchors = np.float32([[0, 0, 8, 8], [8, 8, 16, 16]])
    # the last would have the area -64
    for box in [4, 4, 4, 9], [100, 100, 120, 120], [-50, -50, -20, -20], [9, 9, 3, 3], [9, 1, 1, 9]:
        cls, box, count = run(anchors, np.float32([box]), np.int32([2]))
        assert count == 0 and (cls == -1).all() and np.isfinite(box).all()
        np.testing.assert_array_equal(T.anchor_iou(np.float32([box]), anchors), 0)


def test_exactly_one_half_is_enough():
    anchors = np.float32([[0, 0, 8, 16], [0, 0, 8, 8], [0, 0, 8, 7.9]])
    assert run(anchors, np.float32([[0, 0, 8, 16]]), np.int32([3]))[0].tolist() == [3, 3, -1]


def test_works_inside_tf_data_with_a_changing_number_of_objects():
    import tensorflow as tf
    anchors = np.float32([[y, x, y+16, x+16] for y in range(0, 64, 8) for x in range(0, 64, 8)])
    images = [(np.float32([[8, 8, 24, 24]]*n).reshape(-1, 4), np.arange(n, dtype='int32')) for n in (2, 0, 1)]
    kinds = tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.int32)
    data = tf.data.Dataset.from_generator(lambda: iter(images),
                                          output_signature=kinds).map(lambda b, c: T.assign(anchors, b, c))
    for (boxes, classes), made in zip(images, data):
        for got, want in zip(made, run(anchors, boxes, classes)): np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('jit', [False, True])
def test_a_compiled_batch_equals_its_images(jit):
    import tensorflow as tf
    rng = np.random.default_rng(1)
    anchors = np.float32([[y, x, y+16, x+16] for y in range(0, 64, 8) for x in range(0, 64, 8)])
    start = rng.uniform(0, 40, (3, 5, 2))
    boxes, classes = np.concatenate([start, start+rng.uniform(4, 24, (3, 5, 2))],
                                    -1).astype('float32'), rng.integers(-1, 4, (3, 5)).astype('int32')
    batch = tf.function(lambda b, c: T.assign_batch(anchors, b, c), jit_compile=jit)(boxes, classes)
    for i in range(3):
        for got, want in zip(batch, run(anchors, boxes[i], classes[i])):
            np.testing.assert_allclose(got[i], want, atol=1e-6)


def test_chapter_needs_no_tensorflow_by_name():
    from pathlib import Path
    assert 'tensorflow' not in Path(T.__file__).read_text()


def sizes_and_places(draw, hw):
    "Boxes of all kinds: tiny, huge, thin, cut at the edge, outside, equal to one another."
    rng = np.random.default_rng(draw)
    count, (height, width) = rng.integers(0, 30), hw
    centre = rng.uniform(-.1, 1.1, (count, 2))*hw
    size = np.exp(rng.uniform(np.log(.01 if draw%5 == 1 else 3), np.log(height), (count, 2)))
    if draw%5 == 2: size[:, 0] = np.exp(rng.uniform(-3, 3, count))
    boxes = np.concatenate([centre-size/2, centre+size/2], 1)
    if draw%5 != 3: boxes = np.clip(boxes, 0, [height, width]*2)
    if draw%5 == 4:
        boxes = np.round(boxes/8)*8
        boxes[:count//2] = boxes[count//2:count//2*2]
    classes = rng.integers(0, 5, count)
    classes[rng.random(count) < .1] = -1
    return boxes.astype('float32'), classes.astype('int32')


@pytest.mark.parametrize('hw', [(256, 256), (128, 192), (200, 333)])
def test_targets_on_the_grid_equal_those_of_the_table(hw):
    anchors = all_anchors(hw)
    grid = G.anchor_grid(anchors)
    for draw in range(40):
        boxes, classes = sizes_and_places(draw, hw)
        for quick, full in zip(G.assign_on_grid(grid, boxes, classes), run(anchors, boxes, classes)):
            assert quick.dtype == full.dtype
            tolerance = 2e-5 if quick.ndim == 2 else 0         # box targets; classes and counts are exact
            np.testing.assert_allclose(quick, full, rtol=0, atol=tolerance, err_msg=f'draw {draw}')


@pytest.mark.parametrize('case', range(6))
def test_targets_on_the_grid_equal_the_peers(oracle, case):
    numbers, anchors = oracle
    boxes, classes = numbers[f'case{case}_gt_boxes_abs_yxyx'], numbers[f'case{case}_gt_classes_1based']-1
    cls, box, count = G.assign_on_grid(G.anchor_grid(anchors), boxes, classes)
    np.testing.assert_array_equal(cls, all_levels(numbers, case, 'cls', 1)[:, 0])
    np.testing.assert_allclose(box, all_levels(numbers, case, 'box', 4), atol=2e-5)
    assert count == numbers[f'case{case}_num_positives']


@pytest.mark.parametrize('image_hw, shapes',
                         [((128, 128), {}), ((256, 384), dict(num_scales=1)),
                          ((512, 512), dict(aspects=((1., 1.), (2., .5)), num_scales=2, anchor_scale=3.))])
def test_grids_of_any_anchors(image_hw, shapes):
    anchors = all_anchors(image_hw, **shapes)
    grid = G.anchor_grid(anchors)
    assert len(grid.first_anchor) == 5 and (grid.grid_hw[0] == np.array(image_hw)//8).all()
    np.testing.assert_allclose(G.rebuild_anchors(grid), anchors, atol=1e-3)
    with pytest.raises(ValueError, match='do not form grids'): G.anchor_grid(anchors[np.r_[1, 0, 2:len(anchors)]])
    with pytest.raises(ValueError, match='do not form grids'): G.anchor_grid(anchors[:-1])
