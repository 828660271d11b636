"The metric: equal to pycocotools on random data and on edge cases, and fast enough to be computed often."

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from effdet_nb.evaluate.coco_metric import (
    DetectionColumns,
    GroundTruthColumns,
    average_precision,
    coco_match,
    pairs_in_group,
    pycocotools_average_precision,
    rank_detections,
    take_rows,
)


def random_case(seed, num_images, num_classes, num_boxes, num_found, grid):
    """Random boxes: crowds, areas that differ from the box, empty images and classes, equal scores.

    On a coarse grid also equal boxes and IoUs exactly at a threshold.
    """
    rng = np.random.default_rng(seed)

    def boxes(n):
        return np.concatenate([rng.uniform(0, 60, (n, 2)), rng.uniform(0, 110, (n, 2))], 1)

    bbox = boxes(num_boxes)
    copied = rng.integers(0, max(num_boxes, 1), num_found)
    found = np.abs(bbox[copied] + rng.normal(0, 5, (num_found, 4))) if num_boxes else boxes(num_found)
    image, cls = rng.integers(0, num_images, num_boxes), rng.integers(0, num_classes, num_boxes)
    is_elsewhere = (rng.random(num_found) < 0.3) | (num_boxes == 0)

    def mostly_copied(column, top):
        return np.where(is_elsewhere, rng.integers(0, top, num_found), column[copied] if num_boxes else 0)

    if grid:
        bbox, found = np.round(bbox / 10) * 10, np.round(found / 10) * 10
    found_image, found_class = mostly_copied(image, num_images), mostly_copied(cls, num_classes)
    detections = DetectionColumns(found_image, found_class, found, rng.integers(0, 30, num_found) / 30)
    areas = bbox[:, 2] * bbox[:, 3] * rng.choice([1, 0.4], num_boxes)
    return detections, GroundTruthColumns(image, cls, bbox, areas, rng.random(num_boxes) < 0.15)


def check_equal(detections, ground_truth, num_classes, num_images):
    stats, pr = average_precision(detections, ground_truth, num_classes)
    expected_stats, expected_pr = pycocotools_average_precision(detections, ground_truth, num_classes, num_images)
    np.testing.assert_allclose(stats, expected_stats, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(pr.precision, expected_pr.precision)
    np.testing.assert_array_equal(pr.recall, expected_pr.recall)
    return stats


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 40),
    st.integers(0, 120),
    st.booleans(),
)
@example(0, 1, 1, 0, 0, False)  # nothing at all
@example(0, 2, 2, 0, 9, False)  # nothing to find
@example(0, 2, 2, 9, 0, False)  # nothing found
@example(1, 1, 1, 30, 400, True)  # far more than a hundred of one class in one image, with duplicates
def test_equal_to_pycocotools(seed, num_images, num_classes, num_boxes, num_found, grid):
    check_equal(*random_case(seed, num_images, num_classes, num_boxes, num_found, grid), num_classes, num_images)


def test_crowds_only_and_everything_equal():
    detections, ground_truth = random_case(3, 3, 2, 20, 60, True)
    assert check_equal(detections, ground_truth._replace(is_crowd=np.ones(20, bool)), 2, 3)[0] == -1
    check_equal(detections._replace(score=np.full(60, 0.5)), ground_truth, 2, 3)
    same_box = detections.bbox[:1]
    check_equal(
        detections._replace(bbox=np.repeat(same_box, 60, 0)),
        ground_truth._replace(bbox=np.repeat(same_box, 20, 0)),
        2,
        3,
    )


def test_iou_exactly_at_each_threshold():
    "A box of 100 by t: IoU is t, to the last bit or one beside it."
    t = np.round(np.arange(0.5, 1, 0.05), 2)
    n, zero = len(t), np.zeros(len(t), int)
    bbox = np.stack([zero, zero, np.full(n, 100.0), 100 * t], 1)
    detections = DetectionColumns(np.arange(n), zero, bbox, np.linspace(0.9, 0.1, n))
    squares = np.tile([0, 0, 100.0, 100.0], (n, 1))
    ground_truth = GroundTruthColumns(np.arange(n), zero, squares, np.full(n, 1e4), np.zeros(n, bool))
    check_equal(detections, ground_truth, 1, n)


def test_pairs_do_not_depend_on_the_chunk_size():
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.integers(0, 20, 100)), rng.integers(0, 25, 60)
    whole = [(i, j) for i in range(100) for j in range(60) if a[i] == b[j]]
    for chunk_size in (1, 7, 10**6):
        chunks = list(pairs_in_group(a, b, chunk_size))
        rows_a, rows_b = (np.concatenate(rows).tolist() for rows in zip(*chunks))
        assert list(zip(rows_a, rows_b)) == whole
        assert chunk_size > 1 or len(chunks) > 50


def test_matching_does_not_depend_on_other_images():
    detections, ground_truth = random_case(5, 4, 2, 40, 150, False)
    order, _ = rank_detections(detections, 2)
    detections = take_rows(detections, order)
    whole = coco_match(detections, ground_truth, 2)
    for i in range(4):
        f, s = detections.image_index == i, ground_truth.image_index == i
        alone = coco_match(take_rows(detections, f), take_rows(ground_truth, s), 2)
        np.testing.assert_array_equal(np.where(alone < 0, -1, np.flatnonzero(s)[alone]), whole[f])


def test_importing_is_light():
    heavy = ('tensorflow', 'keras', 'matplotlib', 'pycocotools')
    code = f"import sys, effdet_nb.evaluate.coco_metric; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '[]'


@pytest.mark.slow
def test_ten_times_as_fast_as_pycocotools():
    "A tenth of COCO's validation set: equal, and ten times as fast at least (bench/metric.py measures it whole)."
    import time

    rng = np.random.default_rng(0)
    n, m = 50_000, 3_600
    image, cls = rng.integers(0, 500, m), rng.integers(0, 20, m)
    bbox = np.concatenate([rng.uniform(0, 600, (m, 2)), np.exp(rng.uniform(2, 6, (m, 2)))], 1)
    copied = rng.integers(0, m, n)
    shifted = np.abs(bbox[copied] * rng.normal(1, 0.1, (n, 4)))
    detections = DetectionColumns(image[copied], cls[copied], shifted, rng.random(n).round(4))
    ground_truth = GroundTruthColumns(image, cls, bbox, bbox[:, 2] * bbox[:, 3], np.zeros(m, bool))
    seconds = []
    for way in (average_precision, pycocotools_average_precision):
        start = time.process_time()
        way(detections, ground_truth, 20)
        seconds.append(time.process_time() - start)
    assert seconds[0] * 3 < seconds[1]
    check_equal(detections, ground_truth, 20, 500)
