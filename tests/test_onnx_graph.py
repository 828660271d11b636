"The endings of an exported graph: standard operators equal our post-processor, the plugin's node is TAO's, a graph knows itself."
import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.export.onnx_graph import get_batch_dim, set_metadata, get_metadata, remove_noop_reshapes, fold_batch_norms, replace_nodes, anchors_from_metadata
from effdet_nb.export.onnx_nms import NMS_BUILDERS, anchors_to_center_size, efficient_nms_reference, add_onnx_nms, add_trt_nms, add_nms, strip_nms
from effdet_nb.detector.nms import NmsOptions, postprocess
from onnx_toy import run_onnxruntime, noise_images, toy_onnx_model


def equal_to_postprocess(proto, raw, images, **how):
    found, plain = run_onnxruntime(proto, images), run_onnxruntime(raw, images)
    anchors = anchors_from_metadata(get_metadata(raw))
    for i in range(len(images)):
        d = postprocess(plain['cls_logits'][i], plain['box_deltas'][i], anchors, NmsOptions(**how))
        n = int(found['num_detections'][i, 0])
        assert n == len(d)
        np.testing.assert_allclose(found['detection_scores'][i, :n], d.scores, atol=1e-6)
        np.testing.assert_array_equal(found['detection_classes'][i, :n], d.classes)
        np.testing.assert_allclose(found['detection_boxes'][i, :n], d.boxes, atol=1e-3)
        for k in ('scores', 'classes', 'boxes'): assert not found[f'detection_{k}'][i, n:].any(), 'padding is zero'


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), num_classes=st.integers(1, 5), threshold=st.sampled_from([.001, .2, .6, .99]),
       iou=st.sampled_from([.3, .5, .8]), n=st.sampled_from([1, 7, 100]))
def test_standard_operators_equal_the_postprocessor(seed, num_classes, threshold, iou, n):
    raw = toy_onnx_model(num_classes, seed=seed)
    how = dict(score_threshold=threshold, iou_threshold=iou, max_detections=n, top_k=500)
    equal_to_postprocess(add_onnx_nms(raw, **how), raw, noise_images(2, seed=seed), **how)


@pytest.mark.parametrize('opset', range(13, 19))
def test_every_opset_ends_the_same(opset):
    raw = toy_onnx_model(opset=opset)
    proto = add_onnx_nms(raw, score_threshold=.3)
    onnx.checker.check_model(proto, full_check=True)
    equal_to_postprocess(proto, raw, noise_images(), score_threshold=.3, top_k=3000)


def test_a_silent_network_and_a_very_large_limit():
    quiet = toy_onnx_model(spread=.01)
    found = run_onnxruntime(add_onnx_nms(quiet, score_threshold=.9), noise_images())
    assert found['num_detections'].tolist() == [[0], [0]] and not found['detection_boxes'].any()
    # no more than enter
    assert run_onnxruntime(add_onnx_nms(toy_onnx_model(), max_detections=10**6),
                           noise_images())['detection_boxes'].shape[1] == 3000


@pytest.mark.parametrize('batch', ['batch', 3])
def test_outputs_are_those_of_tao(batch):
    raw = toy_onnx_model(batch=batch)
    for proto in (add_onnx_nms(raw, max_detections=20), add_trt_nms(raw, max_detections=20)):
        assert get_batch_dim(proto) == batch
        outs = [(o.name, o.type.tensor_type.elem_type,
                 [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim]) for o in proto.graph.output]
        F, I = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
        assert outs == [('num_detections', I, [batch, 1]), ('detection_boxes', F, [batch, 20, 4]),
                        ('detection_scores', F, [batch, 20]), ('detection_classes', I, [batch, 20])]


def test_the_plugin_node_is_as_tao_writes_it():
    proto = add_trt_nms(toy_onnx_model(), score_threshold=.001)
    node = proto.graph.node[-1]
    assert (node.op_type, node.domain, node.name) == ('EfficientNMS_TRT', '', 'nms/non_maximum_suppression')
    assert list(node.input) == ['box_deltas', 'cls_logits', 'nms/anchors:0']
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == dict(plugin_version=b'1',
                                                                                        background_class=-1,
                                                                                        max_output_boxes=100,
        score_threshold=np.float32(.01), iou_threshold=.5, score_activation=1, box_coding=1)
    anchors = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == 'nms/anchors:0'))
    assert anchors.shape == (1, 3069, 4) and anchors.dtype == np.float32
    np.testing.assert_allclose(anchors[0, 0], [4, 4, 32, 32])        # P3, first cell: centre 4, side 4 strides of 8


def test_raw_twin_undoes_every_ending():
    raw = toy_onnx_model()
    for kind in NMS_BUILDERS:
        twin = strip_nms(add_nms(raw, kind))
        onnx.checker.check_model(twin, full_check=True)
        assert get_metadata(twin) == get_metadata(raw)
        np.testing.assert_array_equal(run_onnxruntime(twin, noise_images())['cls_logits'],
                                      run_onnxruntime(raw, noise_images())['cls_logits'])
    with pytest.raises(ValueError, match='not a file exported by effdet_nb'): strip_nms(onnx.ModelProto())


def test_endings_leave_the_network_alone():
    raw = toy_onnx_model(); before = raw.SerializeToString(deterministic=True)
    for kind in NMS_BUILDERS: add_nms(raw, kind)
    assert raw.SerializeToString(deterministic=True) == before


def test_a_description_replaces_the_one_before_and_spares_others():
    proto = toy_onnx_model(); proto.metadata_props.add(key='author', value='somebody')
    set_metadata(set_metadata(proto, dict(a=1)), dict(b=[2]))
    assert get_metadata(proto) == dict(b=[2]) and {p.key for p in proto.metadata_props} == {'author', 'effdet_nb'}
    assert get_metadata(onnx.ModelProto()) == {}


def small(text, **numbers):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items())
    return proto


def test_batch_norms_fold_only_where_nobody_else_listens():
    rng = np.random.default_rng(0)
    bn = dict(scale=rng.uniform(.5, 2, 4), shift=rng.normal(size=4), mean=rng.normal(size=4), var=rng.uniform(.1, 2, 4))
    numbers = {k: np.float32(v) for k, v in (bn | dict(w=rng.normal(size=(4, 3, 1, 1)), c=rng.normal(size=4))).items()}
    text = '''g (float[2,3,5,5] input) => (float[2,4,5,5] {out}) {{
      a = Conv(input, w, c)
      b = BatchNormalization<epsilon = 0.001>(a, scale, shift, mean, var)
      d = Conv(input, w)
      e = BatchNormalization<epsilon = 0.001>(d, scale, shift, mean, var)
      y = Add(b, e)
      z = Add(y, {also})
    }}'''
    x = rng.normal(size=(2, 3, 5, 5))
    for also, left in (('y', 0), ('a', 1)):
        before = run_onnxruntime(small(text.format(out='z', also=also), **numbers), x)['z']
        folded = fold_batch_norms(small(text.format(out='z', also=also), **numbers))
        assert sum(n.op_type == 'BatchNormalization' for n in folded.graph.node) == left
        np.testing.assert_allclose(run_onnxruntime(folded, x)['z'], before, atol=1e-5)
        assert {t.name for t in folded.graph.initializer} <= {i for n in folded.graph.node for i in n.input}


def test_only_idle_reshapes_go():
    proto = small('''g (float[7,2,3] input) => (float[7,6] y) {
      a = Relu(input)
      b = Reshape(a, same)
      c = Relu(b)
      y = Reshape(c, flat)
    }''', same=np.int64([7, 2, 3]), flat=np.int64([7, 6]))
    x = np.random.default_rng(0).normal(size=(7, 2, 3))
    before = run_onnxruntime(proto, x)['y']
    tidy = remove_noop_reshapes(proto)
    assert [n.op_type for n in tidy.graph.node] == ['Relu', 'Relu', 'Reshape']
    np.testing.assert_array_equal(run_onnxruntime(tidy, x)['y'], before)
    assert [n.op_type for n in replace_nodes(tidy, list(tidy.graph.node)[:1]).graph.node] == ['Relu']
    assert not tidy.graph.initializer


def plugin_by_the_book(logits, deltas, anchors, score_threshold, iou_threshold, n):
    "NVIDIA's description of box_coding 1 with score_activation, in plain loops."
    scores, found = 1/(1+np.exp(-logits.astype(np.float64))), []
    yc, xc, h, w = anchors.astype(np.float64).T
    ty, tx, th, tw = deltas.astype(np.float64).T
    cy, cx, bh, bw = ty*h+yc, tx*w+xc, np.exp(th)*h, np.exp(tw)*w
    boxes = np.stack([cy-bh/2, cx-bw/2, cy+bh/2, cx+bw/2], -1)
    for i in np.argsort(-scores, axis=None, kind='stable'):
        a, c = np.unravel_index(i, scores.shape)
        if scores[a, c] <= score_threshold or len(found) == n: break
        def overlap(b):
            lo, hi = np.maximum(boxes[a, :2], b[:2]), np.minimum(boxes[a, 2:], b[2:])
            inter = np.prod(np.maximum(hi-lo, 0)); area = lambda q: np.prod(q[2:]-q[:2])
            return inter/(area(boxes[a])+area(b)-inter)
        if all(c != k or overlap(b) <= iou_threshold for b, k, _ in found): found.append((boxes[a], c, scores[a, c]))
    return found


def test_the_plugin_file_read_by_us_is_the_plugin_by_the_book():
    from effdet_nb.export.runtimes import OnnxDetector
    raw, images = toy_onnx_model(seed=4), noise_images(2)
    proto = add_trt_nms(raw, score_threshold=.4, max_detections=30)
    out, anchors = run_onnxruntime(raw, images), anchors_to_center_size(anchors_from_metadata(get_metadata(raw)))[0]
    for i, d in enumerate(OnnxDetector(proto.SerializeToString())(images)):
        numpy_says = efficient_nms_reference(proto.graph.node[-1], out['box_deltas'][i], out['cls_logits'][i], anchors)
        np.testing.assert_allclose(numpy_says.boxes, d.boxes, atol=1e-2)
        np.testing.assert_allclose(numpy_says.scores, d.scores, atol=1e-5)
        assert numpy_says.classes.tolist() == d.classes.tolist()
        book = plugin_by_the_book(out['cls_logits'][i], out['box_deltas'][i], anchors, .4, .5, 30)
        assert len(d) == len(book) == 30
        np.testing.assert_allclose(d.boxes, [b for b, _, _ in book], atol=1e-2)
        assert d.classes.tolist() == [c for _, c, _ in book]
        np.testing.assert_allclose(d.scores, [s for _, _, s in book], atol=1e-5)


def test_metadata_is_plain_json_without_secrets():
    text = next(p.value for p in toy_onnx_model().metadata_props if p.key == 'effdet_nb')
    held = json.loads(text)
    assert set(held) == {'format', 'version', 'arch', 'classes', 'step', 'epoch', 'input', 'batch_size', 'opset',
                         'data_type', 'nms'}


@pytest.mark.parametrize('n,wanted', [(1, 2), (2, 3), (3, 5), (2, 4), (6, 10), (5, 9), (4, 6), (7, 13), (20, 40)])
def test_growing_maps_copies_what_tensorflow_copies(n, wanted):
    "Each factor a pyramid can meet, in one direction at a time, against the layer itself."
    from effdet_nb.export.onnx_graph import resize_to_gather
    from effdet_nb.detector.bifpn import Upsample
    x = np.random.default_rng(n).normal(size=(7, 3, n, 2)).astype(np.float32)
    proto = small(f'''g (float[7,3,{n},2] input) => (float[7,3,{wanted},4] y) {{
      a = Relu(input)
      y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(a, none, scales)
    }}''', none=np.float32([]), scales=np.float32([1, 1, wanted/n, 2]))
    want = np.asarray(Upsample((wanted, 4))(np.maximum(x, 0).transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
    tidy = resize_to_gather(proto)
    assert ('Gather' in {o.op_type for o in tidy.graph.node}) == (wanted % n > 0)
    np.testing.assert_array_equal(run_onnxruntime(tidy, x)['y'], want)
