"Kinds of errors: every wrong detection has one, correcting them never lowers AP, and empty inputs work."

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from effdet_nb.evaluate.error_analysis import (
    ERROR_KINDS,
    analyze_errors,
    best_threshold,
    calibration_curve,
    classify_errors,
    confusion_matrix,
    error_breakdown,
    match_detections,
    mean_ap,
    num_gt_per_class,
)
from effdet_nb.evaluate.coco_metric import DetectionColumns, GroundTruthColumns, average_precision, take_rows
from test_coco_metric import random_case

CASES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 80),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(CASES, st.sampled_from([0.3, 0.5, 0.75]))
@example((0, 1, 1, 0, 0, False), 0.5)
@example((0, 2, 2, 0, 9, False), 0.5)
@example((0, 2, 2, 9, 0, False), 0.5)
def test_every_error_has_one_kind_and_correcting_it_never_lowers_ap(c, iou):
    detections, ground_truth = random_case(*c)
    matches = match_detections(detections, ground_truth, c[2], iou)
    kind, intended = classify_errors(matches)
    wrong = matches.is_counted & ~matches.is_tp
    assert set(kind[wrong]) <= set(ERROR_KINDS) - {'missed'} and set(kind[~wrong]) <= {''}
    assert (intended >= 0).tolist() == np.isin(kind, ['location', 'classification']).tolist()
    breakdown = error_breakdown(matches)
    assert [r['kind'] for r in breakdown] == list(ERROR_KINDS) and all(-1e-12 <= r['cost'] <= 1 for r in breakdown)
    assert sum(r['count'] for r in breakdown if r['kind'] != 'missed') == wrong.sum()


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_costs_start_from_cocos_ap50(c):
    detections, ground_truth = random_case(*c)
    matches, num_gt = match_detections(detections, ground_truth, c[2]), num_gt_per_class(ground_truth, c[2])
    counted = take_rows(matches.detections, matches.is_counted)
    ap50 = mean_ap(counted.class_index, counted.score, matches.is_tp[matches.is_counted], num_gt)
    np.testing.assert_allclose(ap50, average_precision(detections, ground_truth, c[2])[0][1], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(CASES, st.floats(0, 1))
def test_the_confusion_matrix_counts_every_true_box_and_every_strong_detection_once(c, threshold):
    detections, ground_truth = random_case(*c)
    matches = match_detections(detections, ground_truth, c[2])
    counts = confusion_matrix(matches, threshold)
    np.testing.assert_array_equal(counts[:-1].sum(1), num_gt_per_class(ground_truth, c[2]))
    strong = matches.is_counted & (matches.detections.score >= threshold)
    np.testing.assert_array_equal(
        counts[:, :-1].sum(0), np.bincount(matches.detections.class_index[strong], minlength=c[2])
    )
    assert np.diag(counts)[:-1].sum() >= (matches.is_tp & strong).sum() and counts[-1, -1] == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30), st.integers(1, 30))
def test_no_other_threshold_has_a_better_f1(rows, extra):
    score, right = np.array([s / 10 for s, _ in rows]), np.array([r for _, r in rows])
    num = int(right.sum()) + extra
    best = best_threshold(score, right, num)
    if not right.any():
        assert best['threshold'] is None
        return

    def f1(keep):
        return 2 * right[keep].sum() / (keep.sum() + num)

    assert best['F1'] == pytest.approx(max(f1(score >= t) for t in score), abs=1e-12)
    if best['threshold'] > 0:
        for keep in (score >= best['threshold'], score > best['threshold']):
            assert f1(keep) == pytest.approx(best['F1'], abs=1e-12)


def test_a_class_that_is_never_found_has_a_cost():
    "One class of two is never found: finding it is worth half an AP."
    bbox = np.array([[0, 0, 40, 40], [100, 0, 40, 40.0]])
    ground_truth = GroundTruthColumns(np.zeros(2, int), np.array([0, 1]), bbox, np.full(2, 1600.0), np.zeros(2, bool))
    detections = DetectionColumns(np.zeros(1, int), np.zeros(1, int), bbox[:1], np.array([0.9]))
    assert {r['kind']: r['cost'] for r in analyze_errors(detections, ground_truth, 2)['errors']}[
        'missed'
    ] == pytest.approx(0.5)


def test_of_several_boxes_meant_for_one_object_the_best_is_corrected():
    "Two loose boxes for one cat: the best becomes right, the other is removed; if the cat was found anyway, both are."
    ground_truth = one_square()
    loose = [[20, 0, 40, 40], [0, 20, 40, 40]]

    def count_and_cost(detections):
        errors = analyze_errors(detections, ground_truth, 1)['errors']
        return {r['kind']: (r['count'], round(r['cost'], 6)) for r in errors}

    only = one_class([*loose], [0.9, 0.8])
    assert count_and_cost(only)['location'] == (2, 1.0) and count_and_cost(only)['missed'] == (0, 0.0)
    found_too = one_class([*loose, [0, 0, 40, 40]], [0.9, 0.8, 0.7])
    assert count_and_cost(found_too)['location'] == (2, round(1 - 1 / 3, 6))


def one_square():
    zero = np.zeros(1, int)
    return GroundTruthColumns(zero, zero, np.array([[0, 0, 40, 40.0]]), np.full(1, 1600.0), np.zeros(1, bool))


def one_class(bbox, scores):
    zeros = np.zeros(len(scores), int)
    return DetectionColumns(zeros, zeros, np.array(bbox, float), np.array(scores))


def test_calibration_bins_hold_their_scores():
    detections = one_class([[0, 0, 40, 40], [200, 0, 40, 40], [300, 0, 40, 40]], [1.0, 0.31, 0.39])
    c = calibration_curve(match_detections(detections, one_square(), 1))
    bins = [(b['low'], b['count'], round(b['score'], 6), b['right']) for b in c['bins']]
    assert bins == [(0.3, 2, 0.35, 0.0), (0.9, 1, 1.0, 1.0)]
    assert c['error'] == pytest.approx(2 * 0.35 / 3)


def test_an_iou_threshold_of_zero_is_refused():
    detections, ground_truth = random_case(0, 1, 1, 2, 2, False)
    with pytest.raises(ValueError, match='iou_threshold 0'):
        match_detections(detections, ground_truth, 1, 0)
