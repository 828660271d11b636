"Guards for the kinds of mistakes: every wrong detection has one kind, mending never hurts, and nothing falls over on the edges."
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from effdet_nb.evaluate.error_analysis import ERROR_KINDS, best_threshold, calibration_curve, confusion_matrix, classify_errors, error_breakdown, analyze_errors, match_detections, mean_ap, num_gt_per_class
from effdet_nb.evaluate.coco_metric import DetectionColumns, GroundTruthColumns, average_precision
from test_coco_metric import case

CASES = st.tuples(st.integers(0, 2**32-1), st.integers(1, 4), st.integers(1, 4), st.integers(0, 30), st.integers(0, 80), st.booleans())


@settings(max_examples=60, deadline=None)
@given(CASES, st.sampled_from([.3, .5, .75]))
@example((0, 1, 1, 0, 0, False), .5)
@example((0, 2, 2, 0, 9, False), .5)
@example((0, 2, 2, 9, 0, False), .5)
def test_every_mistake_has_one_kind_and_mending_never_hurts(c, iou):
    found, sought = case(*c)
    j = match_detections(found, sought, c[2], iou)
    kind, meant = classify_errors(j)
    wrong = j.is_counted & ~j.is_tp
    assert set(kind[wrong])<=set(ERROR_KINDS)-{'missed'} and set(kind[~wrong])<={''}
    assert (meant>=0).tolist()==np.isin(kind, ['location', 'classification']).tolist()
    split = error_breakdown(j)
    assert [r['kind'] for r in split]==list(ERROR_KINDS) and all(-1e-12<=r['cost']<=1 for r in split)
    assert sum(r['count'] for r in split if r['kind']!='missed')==wrong.sum()


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_the_price_list_starts_from_coco_s_own_number(c):
    found, sought = case(*c)
    j, num = match_detections(found, sought, c[2]), num_gt_per_class(sought, c[2])
    np.testing.assert_allclose(mean_ap(j.detections.class_index[j.is_counted], j.detections.score[j.is_counted], j.is_tp[j.is_counted], num), average_precision(found, sought, c[2])[0][1], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(CASES, st.floats(0, 1))
def test_the_square_holds_every_true_box_and_every_strong_detection_once(c, threshold):
    found, sought = case(*c)
    j = match_detections(found, sought, c[2])
    square = confusion_matrix(j, threshold)
    np.testing.assert_array_equal(square[:-1].sum(1), num_gt_per_class(sought, c[2]))
    strong = j.is_counted & (j.detections.score>=threshold)
    np.testing.assert_array_equal(square[:, :-1].sum(0), np.bincount(j.detections.class_index[strong], minlength=c[2]))
    assert np.diag(square)[:-1].sum()>=(j.is_tp & strong).sum() and square[-1, -1]==0


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30), st.integers(1, 30))
def test_no_other_threshold_has_a_better_f1(rows, extra):
    score, right = np.array([s/10 for s, _ in rows]), np.array([r for _, r in rows])
    num = int(right.sum())+extra
    best = best_threshold(score, right, num)
    if not right.any(): assert best['threshold'] is None; return
    f1 = lambda keep: 2*right[keep].sum()/(keep.sum()+num)
    assert best['F1']==pytest.approx(max(f1(score>=t) for t in score), abs=1e-12)
    for keep in (score>=best['threshold'], score>best['threshold']) if best['threshold']>0 else (): assert f1(keep)==pytest.approx(best['F1'], abs=1e-12)


def test_an_overlooked_class_is_priced():
    "One class of two is never found: finding it, or not having to, is worth half an AP."
    sought = GroundTruthColumns(np.zeros(2, int), np.array([0, 1]), np.array([[0, 0, 40, 40], [100, 0, 40, 40.]]), np.full(2, 1600.), np.zeros(2, bool))
    found = DetectionColumns(np.zeros(1, int), np.zeros(1, int), sought.bbox[:1], np.array([.9]))
    assert {r['kind']: r['cost'] for r in analyze_errors(found, sought, 2)['errors']}['missed']==pytest.approx(.5)


def test_tide_s_own_rules_for_a_box_meant_by_several():
    "Two loose boxes mean one cat: the surest becomes right, the other vanishes; if the cat was found anyway, both vanish."
    sought = GroundTruthColumns(np.zeros(1, int), np.zeros(1, int), np.array([[0, 0, 40, 40.]]), np.full(1, 1600.), np.zeros(1, bool))
    loose = [[20, 0, 40, 40], [0, 20, 40, 40]]
    only = DetectionColumns(np.zeros(2, int), np.zeros(2, int), np.array(loose, float), np.array([.9, .8]))
    cost = lambda f: {r['kind']: (r['count'], round(r['cost'], 6)) for r in analyze_errors(f, sought, 1)['errors']}
    assert cost(only)['location']==(2, 1.) and cost(only)['missed']==(0, 0.)
    found_too = DetectionColumns(np.zeros(3, int), np.zeros(3, int), np.array([*loose, [0, 0, 40, 40]], float), np.array([.9, .8, .7]))
    assert cost(found_too)['location']==(2, round(1-1/3, 6))


def test_scores_count_in_their_bins():
    found = DetectionColumns(np.zeros(3, int), np.zeros(3, int), np.array([[0, 0, 40, 40], [200, 0, 40, 40], [300, 0, 40, 40.]]), np.array([1., .31, .39]))
    sought = GroundTruthColumns(np.zeros(1, int), np.zeros(1, int), found.bbox[:1], np.full(1, 1600.), np.zeros(1, bool))
    c = calibration_curve(match_detections(found, sought, 1))
    assert [(b['low'], b['count'], round(b['score'], 6), b['right']) for b in c['bins']]==[(.3, 2, .35, 0.), (.9, 1, 1., 1.)]
    assert c['error']==pytest.approx(2*.35/3)


def test_a_threshold_that_means_nothing_is_refused():
    found, sought = case(0, 1, 1, 2, 2, False)
    with pytest.raises(ValueError, match='iou_threshold 0'): match_detections(found, sought, 1, 0)
