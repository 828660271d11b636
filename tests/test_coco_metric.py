"The metric: equal to pycocotools on whatever can be thought up, and fast enough to be asked often."
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from effdet_nb.evaluate.coco_metric import DetectionColumns, GroundTruthColumns, average_precision, coco_match, rank_detections, pycocotools_average_precision, pairs_in_group


def case(seed, num_images, num_classes, num_boxes, num_found, grid):
    "Random boxes: crowds, areas unlike the box, empty pictures and classes, equal scores; on a coarse grid also equal boxes and IoUs exactly at a threshold."
    rng = np.random.default_rng(seed)
    def boxes(n): return np.concatenate([rng.uniform(0, 60, (n, 2)), rng.uniform(0, 110, (n, 2))], 1)
    bbox = boxes(num_boxes)
    copied = rng.integers(0, max(num_boxes, 1), num_found)
    found = np.abs(bbox[copied]+rng.normal(0, 5, (num_found, 4))) if num_boxes else boxes(num_found)
    image, cls = rng.integers(0, num_images, num_boxes), rng.integers(0, num_classes, num_boxes)
    stray = rng.random(num_found)<.3
    at = lambda column, top: np.where(stray | (num_boxes==0), rng.integers(0, top, num_found), column[copied] if num_boxes else 0)
    if grid: bbox, found = np.round(bbox/10)*10, np.round(found/10)*10
    return (DetectionColumns(at(image, num_images), at(cls, num_classes), found, rng.integers(0, 30, num_found)/30),
            GroundTruthColumns(image, cls, bbox, bbox[:, 2]*bbox[:, 3]*rng.choice([1, .4], num_boxes), rng.random(num_boxes)<.15))


def agree(found, sought, num_classes, num_images):
    (ours, c), (theirs, d) = average_precision(found, sought, num_classes), pycocotools_average_precision(found, sought, num_classes, num_images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(c.precision, d.precision)
    np.testing.assert_array_equal(c.recall, d.recall)
    return ours


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32-1), st.integers(1, 5), st.integers(1, 4), st.integers(0, 40), st.integers(0, 120), st.booleans())
@example(0, 1, 1, 0, 0, False)      # nothing at all
@example(0, 2, 2, 0, 9, False)      # nothing to find
@example(0, 2, 2, 9, 0, False)      # nothing found
@example(1, 1, 1, 30, 400, True)    # far more than a hundred of one class in one picture, boxes twice and thrice
def test_equal_to_pycocotools(seed, num_images, num_classes, num_boxes, num_found, grid):
    agree(*case(seed, num_images, num_classes, num_boxes, num_found, grid), num_classes, num_images)


def test_crowds_only_and_everything_equal():
    found, sought = case(3, 3, 2, 20, 60, True)
    assert agree(found, sought._replace(crowd=np.ones(20, bool)), 2, 3)[0]==-1
    agree(found._replace(score=np.full(60, .5)), sought, 2, 3)
    agree(found._replace(bbox=np.repeat(found.bbox[:1], 60, 0)), sought._replace(bbox=np.repeat(found.bbox[:1], 20, 0)), 2, 3)


def test_iou_exactly_at_each_threshold():
    "A box of 100 by t: IoU is t, to the last bit or one beside it."
    t = np.round(np.arange(.5, 1, .05), 2)
    n, zero = len(t), np.zeros(len(t), int)
    bbox = np.stack([zero, zero, np.full(n, 100.), 100*t], 1)
    found = DetectionColumns(np.arange(n), zero, bbox, np.linspace(.9, .1, n))
    agree(found, GroundTruthColumns(np.arange(n), zero, np.tile([0, 0, 100., 100.], (n, 1)), np.full(n, 1e4), np.zeros(n, bool)), 1, n)


def test_pairs_in_pieces_are_the_same_pairs():
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.integers(0, 20, 100)), rng.integers(0, 25, 60)
    whole = [(i, j) for i in range(100) for j in range(60) if a[i]==b[j]]
    for piece in (1, 7, 10**6):
        pieces = list(pairs_in_group(a, b, piece))
        assert [(i, j) for p in pieces for i, j in zip(*(o.tolist() for o in p))]==whole
        assert piece>1 or len(pieces)>50


def test_matching_does_not_depend_on_other_pictures():
    found, sought = case(5, 4, 2, 40, 150, False)
    order, _ = rank_detections(found, 2)
    found = DetectionColumns(*(o[order] for o in found))
    whole = coco_match(found, sought, 2)
    for i in range(4):
        f, s = found.image_index==i, sought.image_index==i
        alone = coco_match(DetectionColumns(*(o[f] for o in found)), GroundTruthColumns(*(o[s] for o in sought)), 2)
        np.testing.assert_array_equal(np.where(alone<0, -1, np.flatnonzero(s)[alone]), whole[f])


def test_importing_is_light():
    code = "import sys, effdet_nb.evaluate.coco_metric; print([m for m in ('tensorflow', 'keras', 'matplotlib', 'pycocotools') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'


@pytest.mark.slow
def test_many_boxes_stay_small_and_quick():
    "A tenth of COCO's validation set: equal, and ten times as fast at least (bench/metric.py measures it whole)."
    import time
    rng = np.random.default_rng(0)
    n, m = 50_000, 3_600
    image, cls = rng.integers(0, 500, m), rng.integers(0, 20, m)
    bbox = np.concatenate([rng.uniform(0, 600, (m, 2)), np.exp(rng.uniform(2, 6, (m, 2)))], 1)
    copied = rng.integers(0, m, n)
    found = DetectionColumns(image[copied], cls[copied], np.abs(bbox[copied]*rng.normal(1, .1, (n, 4))), rng.random(n).round(4))
    sought = GroundTruthColumns(image, cls, bbox, bbox[:, 2]*bbox[:, 3], np.zeros(m, bool))
    seconds = []
    for way in (average_precision, pycocotools_average_precision):
        start = time.process_time()
        way(found, sought, 20)
        seconds.append(time.process_time()-start)
    assert seconds[0]*10 < seconds[1]
    agree(found, sought, 20, 500)
