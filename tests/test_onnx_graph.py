"Suppression in a graph: standard operators equal our post-processing, the plugin's node is TAO's; graph passes."
import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.detector.bifpn import Upsample
from effdet_nb.detector.nms import NmsOptions, postprocess
from effdet_nb.export.metadata import anchors_from_metadata, get_metadata, set_metadata
from effdet_nb.export.onnx_graph import (
    add_initializer, fold_batch_norms, get_batch_dim, graph_initializers, name_by_position, remove_noop_reshapes,
    replace_nodes, resize_to_gather)
from effdet_nb.export.onnx_nms import (
    NMS_BUILDERS, add_nms, add_onnx_nms, add_trt_nms, anchors_to_center_size, efficient_nms_reference, strip_nms)
from effdet_nb.export.runtimes import OnnxDetector
from onnx_toy import noise_images, run_onnxruntime, toy_onnx_model


def check_equal_to_postprocess(proto, raw, images, **options):
    "Detections of a graph are those of our post-processing on its raw outputs; the rest is padding."
    outputs, raw_outputs = run_onnxruntime(proto, images), run_onnxruntime(raw, images)
    anchors = anchors_from_metadata(get_metadata(raw))
    for i in range(len(images)):
        logits, deltas = (raw_outputs[name][i] for name in ('cls_logits', 'box_deltas'))
        expected = postprocess(logits, deltas, anchors, NmsOptions(**options))
        boxes, scores, classes = (outputs[f'detection_{name}'][i] for name in ('boxes', 'scores', 'classes'))
        n = int(outputs['num_detections'][i, 0])
        assert n == len(expected)
        np.testing.assert_allclose(scores[:n], expected.scores, atol=1e-6)
        np.testing.assert_array_equal(classes[:n], expected.classes)
        np.testing.assert_allclose(boxes[:n], expected.boxes, atol=1e-3)
        for rows in (boxes, scores, classes): assert not rows[n:].any(), 'padding is zero'


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), num_classes=st.integers(1, 5), threshold=st.sampled_from([.001, .2, .6, .99]),
       iou=st.sampled_from([.3, .5, .8]), max_detections=st.sampled_from([1, 7, 100]))
def test_standard_operators_equal_our_postprocessing(seed, num_classes, threshold, iou, max_detections):
    raw = toy_onnx_model(num_classes, seed=seed)
    options = dict(score_threshold=threshold, iou_threshold=iou, max_detections=max_detections, top_k=500)
    check_equal_to_postprocess(add_onnx_nms(raw, **options), raw, noise_images(2, seed=seed), **options)


@pytest.mark.parametrize('opset', range(13, 19))
def test_every_opset_suppresses_alike(opset):
    raw = toy_onnx_model(opset=opset)
    proto = add_onnx_nms(raw, score_threshold=.3)
    onnx.checker.check_model(proto, full_check=True)
    check_equal_to_postprocess(proto, raw, noise_images(), score_threshold=.3, top_k=3000)


def test_no_detections_and_a_very_large_limit():
    low_scores = toy_onnx_model(spread=.01)
    outputs = run_onnxruntime(add_onnx_nms(low_scores, score_threshold=.9), noise_images())
    assert outputs['num_detections'].tolist() == [[0], [0]] and not outputs['detection_boxes'].any()
    outputs = run_onnxruntime(add_onnx_nms(toy_onnx_model(), max_detections=10**6), noise_images())
    assert outputs['detection_boxes'].shape[1] == 3000              # no more than are considered


@pytest.mark.parametrize('batch', ['batch', 3])
@pytest.mark.parametrize('add', [add_onnx_nms, add_trt_nms])
def test_outputs_are_those_of_tao(batch, add):
    proto = add(toy_onnx_model(batch=batch), max_detections=20)
    assert get_batch_dim(proto) == batch
    outputs = []
    for o in proto.graph.output:
        tensor = o.type.tensor_type
        outputs.append((o.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]))
    float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    assert outputs == [
        ('num_detections', int32, [batch, 1]), ('detection_boxes', float32, [batch, 20, 4]),
        ('detection_scores', float32, [batch, 20]), ('detection_classes', int32, [batch, 20])]


def test_the_plugin_node_is_as_tao_writes_it():
    proto = add_trt_nms(toy_onnx_model(), score_threshold=.001)
    node = proto.graph.node[-1]
    assert (node.op_type, node.domain, node.name) == ('EfficientNMS_TRT', '', 'nms/non_maximum_suppression')
    assert list(node.input) == ['box_deltas', 'cls_logits', 'nms/anchors:0']
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == dict(
        plugin_version=b'1', background_class=-1, max_output_boxes=100, score_threshold=np.float32(.001),
        iou_threshold=.5, score_activation=1, box_coding=1)
    anchors = graph_initializers(proto.graph)['nms/anchors:0']
    assert anchors.shape == (1, 3069, 4) and anchors.dtype == np.float32
    np.testing.assert_allclose(anchors[0, 0], [4, 4, 32, 32])       # P3, first location: centre 4, side 4 strides of 8


@pytest.mark.parametrize('kind', NMS_BUILDERS)
def test_stripping_undoes_every_kind_of_suppression(kind):
    raw = toy_onnx_model()
    stripped = strip_nms(add_nms(raw, kind))
    onnx.checker.check_model(stripped, full_check=True)
    assert get_metadata(stripped) == get_metadata(raw)
    a, b = (run_onnxruntime(proto, noise_images())['cls_logits'] for proto in (stripped, raw))
    np.testing.assert_array_equal(a, b)


def test_a_graph_of_another_program_cannot_be_stripped():
    with pytest.raises(ValueError, match='was not exported by effdet_nb'): strip_nms(onnx.ModelProto())


def test_adding_suppression_leaves_the_network_unchanged():
    raw = toy_onnx_model()
    before = raw.SerializeToString(deterministic=True)
    for kind in NMS_BUILDERS: add_nms(raw, kind)
    assert raw.SerializeToString(deterministic=True) == before


def test_metadata_replaces_the_one_before_and_leaves_that_of_others():
    proto = toy_onnx_model()
    proto.metadata_props.add(key='author', value='a person')
    set_metadata(set_metadata(proto, dict(a=1)), dict(b=[2]))
    assert get_metadata(proto) == dict(b=[2])
    assert {p.key for p in proto.metadata_props} == {'author', 'effdet_nb'}
    assert get_metadata(onnx.ModelProto()) == {}


def parse_graph(text, **constants):
    "A graph of opset 17 with constants."
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for name, value in constants.items(): add_initializer(proto.graph, name, value)
    return proto


TWO_BATCH_NORMS = '''g (float[2,3,5,5] input) => (float[2,4,5,5] z) {{
  a = Conv(input, w, c)
  b = BatchNormalization<epsilon = 0.001>(a, scale, shift, mean, var)
  d = Conv(input, w)
  e = BatchNormalization<epsilon = 0.001>(d, scale, shift, mean, var)
  y = Add(b, e)
  z = Add(y, {also})
}}'''

@pytest.mark.parametrize('also_read, num_left', [('y', 0), ('a', 1)])
def test_batch_norms_are_folded_only_where_no_other_node_reads_the_convolution(also_read, num_left):
    rng = np.random.default_rng(0)
    constants = dict(
        scale=rng.uniform(.5, 2, 4), shift=rng.normal(size=4), mean=rng.normal(size=4), var=rng.uniform(.1, 2, 4),
        w=rng.normal(size=(4, 3, 1, 1)), c=rng.normal(size=4))
    constants = {name: np.float32(value) for name, value in constants.items()}
    x = rng.normal(size=(2, 3, 5, 5))
    def make_graph(): return parse_graph(TWO_BATCH_NORMS.format(also=also_read), **constants)
    folded = fold_batch_norms(make_graph())
    assert sum(n.op_type == 'BatchNormalization' for n in folded.graph.node) == num_left
    np.testing.assert_allclose(run_onnxruntime(folded, x)['z'], run_onnxruntime(make_graph(), x)['z'], atol=1e-5)
    assert {t.name for t in folded.graph.initializer} <= {name for n in folded.graph.node for name in n.input}


def test_only_reshapes_that_change_nothing_are_removed():
    proto = parse_graph('''g (float[7,2,3] input) => (float[7,6] y) {
      a = Relu(input)
      b = Reshape(a, same)
      c = Relu(b)
      y = Reshape(c, flat)
    }''', same=np.int64([7, 2, 3]), flat=np.int64([7, 6]))
    x = np.random.default_rng(0).normal(size=(7, 2, 3))
    before = run_onnxruntime(proto, x)['y']
    simplified = remove_noop_reshapes(proto)
    assert [n.op_type for n in simplified.graph.node] == ['Relu', 'Relu', 'Reshape']
    np.testing.assert_array_equal(run_onnxruntime(simplified, x)['y'], before)
    first = replace_nodes(simplified, list(simplified.graph.node)[:1])
    assert [n.op_type for n in first.graph.node] == ['Relu'] and not first.graph.initializer


def area(box): return np.prod(box[2:]-box[:2])


def overlap(a, b):
    "Intersection over union of two boxes, y1 x1 y2 x2."
    inter = np.prod(np.maximum(np.minimum(a[2:], b[2:])-np.maximum(a[:2], b[:2]), 0))
    return inter/(area(a)+area(b)-inter)


def decode(deltas, anchors):
    "Boxes of box_coding 1, as NVIDIA describes it."
    yc, xc, h, w = anchors.astype(np.float64).T
    ty, tx, th, tw = deltas.astype(np.float64).T
    cy, cx, bh, bw = ty*h+yc, tx*w+xc, np.exp(th)*h, np.exp(tw)*w
    return np.stack([cy-bh/2, cx-bw/2, cy+bh/2, cx+bw/2], -1)


def documented_plugin(logits, deltas, anchors, score_threshold, iou_threshold, max_detections):
    "NVIDIA's description of the plugin in plain loops: [(box, class, score)], best first."
    scores, boxes, kept = 1/(1+np.exp(-logits.astype(np.float64))), decode(deltas, anchors), []
    for i in np.argsort(-scores, axis=None, kind='stable'):
        a, c = np.unravel_index(i, scores.shape)
        if scores[a, c] <= score_threshold or len(kept) == max_detections: break
        rivals = [box for box, channel, _ in kept if channel == c]
        if all(overlap(boxes[a], box) <= iou_threshold for box in rivals): kept.append((boxes[a], c, scores[a, c]))
    return kept


def check_same_detections(a, boxes, scores, classes):
    np.testing.assert_allclose(a.boxes, boxes, atol=1e-2)
    np.testing.assert_allclose(a.scores, scores, atol=1e-5)
    assert a.classes.tolist() == list(classes)


def test_a_file_with_the_plugin_gives_the_documented_detections_here_too():
    raw, images = toy_onnx_model(seed=4), noise_images(2)
    proto = add_trt_nms(raw, score_threshold=.4, max_detections=30)
    outputs = run_onnxruntime(raw, images)
    anchors = anchors_to_center_size(anchors_from_metadata(get_metadata(raw)))[0]
    for i, detections in enumerate(OnnxDetector(proto.SerializeToString())(images)):
        logits, deltas = outputs['cls_logits'][i], outputs['box_deltas'][i]
        in_numpy = efficient_nms_reference(proto.graph.node[-1], deltas, logits, anchors)
        check_same_detections(detections, in_numpy.boxes, in_numpy.scores, in_numpy.classes.tolist())
        documented = documented_plugin(logits, deltas, anchors, .4, .5, 30)
        assert len(detections) == len(documented) == 30
        boxes, classes, scores = zip(*documented)
        check_same_detections(detections, boxes, scores, classes)


def test_metadata_is_plain_json_without_secrets():
    text = next(p.value for p in toy_onnx_model().metadata_props if p.key == 'effdet_nb')
    assert set(json.loads(text)) == {
        'format', 'version', 'arch', 'classes', 'step', 'epoch', 'input', 'batch_size', 'opset', 'data_type', 'nms'}


RESIZE = '''g (float[7,3,{n},2] input) => (float[7,3,{size},4] y) {{
  a = Relu(input)
  y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(a, none, scales)
}}'''

@pytest.mark.parametrize('n, size', [(1, 2), (2, 3), (3, 5), (2, 4), (6, 10), (5, 9), (4, 6), (7, 13), (20, 40)])
def test_resizing_copies_what_the_bifpn_copies(n, size):
    "Each factor a pyramid can have, in one direction at a time, against the layer itself."
    x = np.random.default_rng(n).normal(size=(7, 3, n, 2)).astype(np.float32)
    scales = np.float32([1, 1, size/n, 2])
    proto = parse_graph(RESIZE.format(n=n, size=size), none=np.float32([]), scales=scales)
    channels_last = np.maximum(x, 0).transpose(0, 2, 3, 1)
    expected = np.asarray(Upsample((size, 4))(channels_last)).transpose(0, 3, 1, 2)
    proto = resize_to_gather(proto)
    assert ('Gather' in {node.op_type for node in proto.graph.node}) == (size % n > 0)
    np.testing.assert_array_equal(run_onnxruntime(proto, x)['y'], expected)


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_names_and_order_of_constants_do_not_depend_on_counters(seed):
    "Other numbers in the names, another order of the constants, another trace: the same bytes and the same outputs."
    raw, rng = toy_onnx_model(), np.random.default_rng(seed)
    other = type(raw).FromString(raw.SerializeToString())
    numbers = {t.name: f'{t.name}__{rng.integers(999)}' for t in other.graph.initializer}
    for tensor in other.graph.initializer: tensor.name = numbers[tensor.name]
    for node in other.graph.node:
        node.name = f'{node.name or node.op_type}__{rng.integers(999)}'
        node.input[:] = [numbers.get(name, name) for name in node.input]
    tensors = [type(t).FromString(t.SerializeToString()) for t in other.graph.initializer]
    del other.graph.initializer[:]
    other.graph.initializer.extend(tensors[i] for i in rng.permutation(len(tensors)))
    other.graph.doc_string = f'trace {seed}'
    images, outputs = noise_images(), run_onnxruntime(raw, noise_images())
    a, b = name_by_position(raw), name_by_position(other)
    assert a.SerializeToString() == b.SerializeToString()
    onnx.checker.check_model(a, full_check=True)
    for name, values in run_onnxruntime(a, images).items(): np.testing.assert_array_equal(values, outputs[name])
