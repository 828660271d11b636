"Post-processing equals the reference and the textbook, and refuses bad inputs."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.detector.boxes import iou
from effdet_nb.detector.anchors import decode_boxes
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.nms import NmsOptions, nms, postprocess, postprocess_batch, sigmoid, soft_nms, top_k_pairs

VARIANTS = {'hard': dict(method='hard', score_threshold=0.), 'hard_s0.3': dict(method='hard', score_threshold=.3),
            'gaussian': dict(method='gaussian',
                             score_threshold=.001), 'gaussian_s0.3': dict(method='gaussian', score_threshold=.3),
            'hard_top500': dict(method='hard', score_threshold=0., top_k=500)}


@pytest.fixture(scope='module')
def oracle(shared_dir): return np.load(shared_dir/'oracle'/'postprocess_small.npz', allow_pickle=False)


def reference_outputs(oracle, i):
    "Class logits, box deltas and anchors of image i of the reference."
    c = int(oracle['num_classes'])
    return (np.concatenate([oracle[f'class_{l}'][i].reshape(-1, c) for l in range(3, 8)]),
            np.concatenate([oracle[f'box_{l}'][i].reshape(-1, 4) for l in range(3, 8)]), oracle['anchors'])


@pytest.mark.parametrize('image', [0, 1])
def test_decoded_boxes_and_scores_equal_the_reference(oracle, image):
    logits, deltas, anchors = reference_outputs(oracle, image)
    np.testing.assert_allclose(decode_boxes(deltas, anchors), oracle['pre_boxes'][image], atol=2e-4)
    np.testing.assert_allclose(sigmoid(logits.max(1)), oracle['pre_scores'][image], atol=1e-6)
    a, c = top_k_pairs(logits, 500)
    np.testing.assert_allclose(sigmoid(logits[a, c]), oracle['pre_top500_scores'][image], atol=1e-6)
    np.testing.assert_array_equal(c, oracle['pre_top500_classes'][image])


@pytest.mark.parametrize('image', [0, 1])
@pytest.mark.parametrize('scope', ['global', 'per_class'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_equals_the_reference(oracle, image, scope, variant):
    out = postprocess(*reference_outputs(oracle, image),
                      NmsOptions(per_class=scope=='per_class', **{'top_k': 0, **VARIANTS[variant]}))
    key, (h, w) = f'{scope}_{variant}_', oracle['image_size_hw']
    n = int(oracle[key+'valid'][image])
    assert len(out) == n
    boxes = np.clip(out.boxes, 0, (h, w, h, w)) if scope=='global' else out.boxes   # the reference clips only there
    np.testing.assert_allclose(boxes*oracle['image_scales'][image], oracle[key+'boxes'][image][:n], atol=5e-4)
    np.testing.assert_allclose(out.scores, oracle[key+'scores'][image][:n], atol=2e-6)
    np.testing.assert_array_equal(out.classes+1, oracle[key+'classes'][image][:n])


@pytest.mark.parametrize('image', [0, 1])
def test_all_pairs_per_class_equal_combined_nms(oracle, image):
    logits, deltas, anchors = reference_outputs(oracle, image)
    out = postprocess(logits, deltas, anchors, NmsOptions(score_threshold=0., top_k=logits.size))
    np.testing.assert_allclose(np.clip(out.boxes, 0, 128)*oracle['image_scales'][image],
                               oracle['combined_boxes'][image], atol=5e-4)
    np.testing.assert_allclose(out.scores, oracle['combined_scores'][image], atol=2e-6)
    np.testing.assert_array_equal(out.classes+1, oracle['combined_classes'][image])


@pytest.mark.parametrize('image', [0, 1])
@pytest.mark.parametrize('name', ['hard', 'gaussian'])
def test_growing_boxes_by_a_pixel_gives_the_inclusive_pixel_numbers(oracle, image, name):
    logits, deltas, anchors = reference_outputs(oracle, image)
    a, c = top_k_pairs(logits, 0)
    boxes, scores = decode_boxes(deltas, anchors), sigmoid(logits[a, c])
    grown = boxes+np.float32([0, 0, 1, 1])
    kept, left = soft_nms(grown, scores, c) if name=='gaussian' else (lambda k: (k, scores[k]))(nms(grown, scores, c))
    want = oracle[f'np_{name}_detections_id_x1y1x2y2_score_class'][image]
    np.testing.assert_allclose(left, want[:, 5], atol=2e-6)
    np.testing.assert_allclose(boxes[kept][:, [1, 0, 3, 2]]*oracle['image_scales'][image], want[:, 1:5], atol=5e-4)
    np.testing.assert_array_equal(c[kept]+1, want[:, 6])


def textbook_nms(boxes, scores, classes, weight, threshold, n):
    "The textbook, one class at a time, merged and sorted in the end."
    found = []
    for c in np.unique(classes):
        left = {int(i): np.float32(scores[i]) for i in np.flatnonzero(classes==c)}
        while left:
            i = max(left, key=lambda j: (left[j], -j))
            s = left.pop(i)
            if not s>threshold: break
            found.append((-s, i))
            for j in left: left[j] *= np.float32(weight(np.float32(iou(boxes[i:i+1], boxes[j:j+1])[0, 0])))
    found = sorted(found)[:n]
    return [i for _, i in found], [-s for s, _ in found]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32-1), st.integers(0, 40), st.integers(1, 4), st.integers(1, 50),
       st.sampled_from([0., .2, .6]))
def test_the_fast_loop_equals_the_textbook(seed, n, num_classes, max_detections, threshold):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 40, (n, 2))
    boxes = np.concatenate([corner, corner+rng.integers(0, 30, (n, 2))], 1).astype(np.float32)   # some are empty
    scores, classes = rng.permutation(n).astype(np.float32)/max(n, 1), rng.integers(0, num_classes, n)
    kept = nms(boxes, scores, classes, .45, threshold, max_detections)
    assert kept.tolist() == textbook_nms(boxes, scores, classes, lambda o: o<=.45, threshold, max_detections)[0]
    kept, left = soft_nms(boxes, scores, classes, .5, threshold, max_detections)
    want_left = textbook_nms(boxes, scores, classes, lambda o: np.exp(-o*o/.5), threshold, max_detections)[1]
    np.testing.assert_allclose(left, want_left, atol=1e-5)
    assert (np.diff(left)<=0).all() and len(set(kept.tolist()))==len(kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32-1), st.integers(1, 60), st.integers(1, 6), st.integers(1, 400), st.booleans())
def test_the_shortcut_picks_the_same_pairs_as_sorting(seed, num_anchors, num_classes, k, ties):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-3, 3, (num_anchors, num_classes))
              if ties else rng.normal(size=(num_anchors, num_classes))).astype(np.float32)
    a, c = top_k_pairs(logits, k)
    # equals: the first wins
    np.testing.assert_array_equal(a*num_classes+c, np.argsort(-logits.ravel(), kind='stable')[:k])


def test_equal_scores_keep_the_earlier_box():
    boxes = np.float32([[0, 0, 10, 10]]*3)
    assert nms(boxes, [.5, .5, .5]).tolist() == [0]
    assert nms(boxes, [.5, .5, .5], [2, 1, 0]).tolist() == [0, 1, 2]


def test_without_classes_boxes_of_all_classes_compete():
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 10]])
    assert nms(boxes, [.4, .9], [0, 1]).tolist() == [1, 0] and nms(boxes, [.4, .9]).tolist() == [1]


def test_tiny_and_empty_inputs_are_accepted():
    anchors = np.float32([[0, 0, 8, 8]])
    assert len(postprocess(np.zeros((1, 2)), np.zeros((1, 4)), anchors)) == 2        # fewer pairs than top_k
    assert len(postprocess(np.zeros((0, 2)), np.zeros((0, 4)), anchors[:0])) == 0
    assert len(postprocess(np.zeros((1, 2)), np.zeros((1, 4)), anchors, NmsOptions(max_detections=0))) == 0
    assert len(nms(np.zeros((0, 4)), [])) == 0 and len(soft_nms(np.zeros((0, 4)), [])[0]) == 0


def test_inputs_are_not_changed():
    boxes, scores = np.float32([[0, 0, 10, 10], [0, 1, 10, 11]]), np.float32([.9, .8])
    soft_nms(boxes, scores)
    assert scores.tolist() == np.float32([.9, .8]).tolist()


@pytest.mark.parametrize('change, words', [
    (dict(anchors=np.zeros((3, 4))), 'another image size'),
    (dict(box_deltas=np.full((2, 4), np.nan)),
     '8 of 8 box_deltas are NaN'), (dict(cls_logits=np.float32([[0, np.nan], [0, 0]])), '1 of 4 cls_logits are NaN')])
def test_bad_inputs_are_refused_with_the_reason(change, words):
    good = dict(cls_logits=np.zeros((2, 2)), box_deltas=np.zeros((2, 4)),
                anchors=np.float32([[0, 0, 8, 8], [8, 8, 16, 16]]))
    with pytest.raises(ValueError, match=words): postprocess(**{**good, **change})


def test_an_unknown_nms_method_is_refused():
    with pytest.raises(ValueError, match='must be one of hard, gaussian'): NmsOptions('soft')


def test_batch_sizes_must_agree():
    with pytest.raises(ValueError, match='cls_logits of 2 images and box_deltas of 1'):
        postprocess_batch(np.zeros((2, 1, 2)), np.zeros((1, 1, 4)), np.zeros((1, 4)))


def test_detections_need_one_score_and_class_per_box():
    with pytest.raises(ValueError, match='1 boxes, 2 scores and 1 classes'): Detections([[0, 0, 1, 1]], [.5, .5], [0])
