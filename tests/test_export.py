"An exported detector equals Keras with every kind of suppression, precision and batch; a wrong one is refused."
import json
import os
import subprocess

import keras
import numpy as np
import onnx
import pytest
from PIL import Image

from effdet_nb.app.cli import effdet_export
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.detector.images import to_channels
from effdet_nb.detector.nms import NmsOptions
from effdet_nb.detector.predictor import KerasDetector
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_toy_image
from effdet_nb.export import export as chapter, verify
from effdet_nb.export.export import export, saved_nms_settings
from effdet_nb.export.formats import check_saved_model_path
from effdet_nb.export.metadata import anchors_from_metadata, get_metadata
from effdet_nb.export.onnx_graph import copy_proto, model_to_onnx
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from effdet_nb.export.quantize import calibrate, has_zero_points
from effdet_nb.export.runtimes import OnnxDetector, load_detector, load_onnx_bytes
from effdet_nb.export.tensorrt import convert_precision
from effdet_nb.export.verify import (
    TOLERANCES, compare_with_keras, count_matching_detections, expected_detections, verify_export)
from effdet_nb.train.spec import Spec
from effdet_nb.weights.model_file import ModelFile, load_etlt, load_model_file, save_detector
from onnx_toy import noise_images, run_onnxruntime, toy_onnx_model

HW = 128, 160
PRUNED_WIDTHS = {'stem_conv': 8, 'block2a_expand_conv': 40, 'block3a_expand_conv': 30, 'block5a_se_reduce': 3,
                 'block6b_expand_conv': 200}


def varied_detector(widths=None, name='efficientdet-tiny', channels=3):
    "A fresh detector with statistics of drawn images and large class weights: its outputs vary over the image."
    arch = Arch(name, image_hw=HW, num_classes=4, widths=widths or {}, channels=channels)
    model = build(arch)
    norms = [layer for layer in model.layers if hasattr(layer, 'moving_mean')]
    for layer in norms: layer.momentum = 0.
    images = np.stack([make_toy_image(seed=i, image_hw=HW).image for i in range(6)])
    model(to_channels(images, channels), training=True)
    for layer in norms:     # no channel gets its values from rounding errors
        variance = layer.moving_variance
        variance.assign(np.maximum(variance, np.mean(variance)))
    kernel = model.get_layer('class-predict').pointwise_kernel
    kernel.assign(kernel*150)
    return model, arch


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A pruned detector, saved with a key; its graph; images."
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp('exported')/'slim.tlt'
    model, arch = varied_detector(PRUNED_WIDTHS)
    classes = ClassTable.from_categories([dict(id=i, name=n) for i, n in enumerate(SHAPE_NAMES, 1)], num_classes=4)
    spec = 'eval_config { min_score_thresh: 0.3 max_detections_per_image: 50 }'
    save_detector(path, model, arch, classes, 'Geheim', step=5, spec=spec)
    raw, float_model = model_to_onnx(load_model_file(path, 'Geheim'))
    images = np.stack([make_toy_image(seed=s, image_hw=HW).image for s in (21, 22, 23)])
    return dict(path=path, raw=raw, float_model=float_model, model=model, arch=arch, classes=classes, images=images)


def test_raw_outputs_equal_keras_at_any_batch(exported):
    expected = exported['model'](exported['images'])
    for n in (1, 2, 3):
        outputs = run_onnxruntime(exported['raw'], exported['images'][:n])
        for name in ('cls_logits', 'box_deltas'):
            np.testing.assert_allclose(outputs[name], np.array(expected[name])[:n], atol=2e-3, rtol=1e-3)


SOFT = dict(method='gaussian')
HARD = dict(score_threshold=.3, max_detections=30)

def check_same_detections(a, b):
    "Every detection has a match on the other side, whatever the order of ties."
    assert len(a) == len(b) > 5
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-3)
    for box, score, channel in zip(a.boxes, a.scores, a.classes):
        is_match = (b.classes == channel) & (abs(b.boxes-box).max(1) < .1) & (abs(b.scores-score) < 1e-3)
        assert is_match.any()


@pytest.mark.parametrize('add_nms, options', [
    (None, SOFT), (None, HARD), (add_onnx_nms, HARD), (add_trt_nms, HARD)], ids=['soft', 'hard', 'onnx', 'trt'])
def test_boxes_equal_keras_by_every_kind_of_suppression(exported, add_nms, options):
    proto = add_nms(exported['raw'], **options) if add_nms else exported['raw']
    file = OnnxDetector(proto.SerializeToString(), **({} if add_nms else options))
    options = NmsOptions(**options)
    detector = KerasDetector(exported['model'], exported['arch'], exported['classes'], nms_options=options)
    for a, b in zip(file(exported['images']), detector(exported['images'])): check_same_detections(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [dict(name='efficientdet-d0'), dict(name='efficientdet-lite0'),
                                  dict(name='efficientdet-tiny', channels=1)], ids=str)
def test_a_whole_d0_a_lite_and_a_grey_network_are_exported_too(kind, exported, tmp_path):
    "D0 with all its filters, one for phones, one for grey images; all of them with rectangular images."
    model, arch = varied_detector(**kind)
    save_detector(tmp_path/'a.tlt', model, arch, exported['classes'])
    detector = KerasDetector(model, arch, exported['classes'], nms_options=NmsOptions(score_threshold=.3))
    for file in ('a.onnx', 'a.etlt'):
        result = export(tmp_path/'a.tlt', tmp_path/file, score_threshold=.3)
        assert max(result.difference.values()) < 1e-4 and result.agreement.matched == result.agreement.total > 20
        for a, b in zip(load_detector(tmp_path/file)(exported['images']), detector(exported['images'])):
            assert len(a) == len(b) > 0
            np.testing.assert_allclose(np.sort(a.scores), np.sort(b.scores), atol=1e-3)


def shape_of(info): return [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]


def test_the_graph_has_no_superfluous_operators(exported):
    proto = exported['raw']
    ops = [n.op_type for n in proto.graph.node]
    assert not {'BatchNormalization', 'Shape', 'Slice', 'Cast', 'Tile'} & set(ops)
    assert ops.count('Reshape') == 10 and ops.count('Transpose') == 1+10
    assert [(o.domain, o.version) for o in proto.opset_import] == [('', 17)]
    onnx.checker.check_model(proto, full_check=True)
    num_anchors = len(anchors_from_metadata(get_metadata(proto)))
    assert {i.name: shape_of(i) for i in [*proto.graph.input, *proto.graph.output]} == dict(
        input=['batch', *HW, 3], cls_logits=['batch', num_anchors, 4], box_deltas=['batch', num_anchors, 4])


@pytest.fixture
def traced(exported, monkeypatch):
    "Export without tracing again."
    def reuse(model_file, batch_size, opset): return copy_proto(exported['raw']), exported['float_model']
    monkeypatch.setattr(chapter, 'model_to_onnx', reuse)
    return exported


def export_traced(traced, path, **options): return export(traced['path'], path, 'Geheim', **options)


def test_the_file_name_decides_what_is_written(traced, tmp_path):
    plain, sealed = (export_traced(traced, tmp_path/name) for name in ('a/b.onnx', 'c.etlt'))
    thresholds = dict(max_detections=50, iou_threshold=.5)
    assert plain.meta['nms'] == dict(kind='onnx', score_threshold=.001, top_k=3000, **thresholds)
    assert sealed.meta['nms'] == dict(kind='efficient_nms_trt', score_threshold=.3, **thresholds)
    assert max(plain.difference.values()) < 1e-4 and 'batch any' in repr(plain)
    for result in (plain, sealed):
        assert result.agreement.matched == result.agreement.total > 20
        assert 'random detections as in our post-processing' in repr(result)
    assert get_metadata(onnx.load(tmp_path/'a'/'b.onnx')) == plain.meta
    assert (tmp_path/'c.etlt').read_bytes()[:4] == bytes(4)
    proto = onnx.load_model_from_string(load_etlt(tmp_path/'c.etlt', 'Geheim'))
    assert proto.graph.node[-1].op_type == 'EfficientNMS_TRT'
    for path in (tmp_path/'a'/'b.onnx', tmp_path/'c.etlt'):
        assert b'Geheim' not in path.read_bytes() and b'min_score_thresh' not in path.read_bytes()
    a = load_detector(tmp_path/'a'/'b.onnx', score_threshold=.4)(traced['images'])
    b = load_detector(tmp_path/'c.etlt', 'Geheim', score_threshold=.4)(traced['images'])
    for x, y in zip(a, b): check_same_detections(x, y)


def test_an_exported_file_of_default_settings_suppresses_as_its_model_does(exported, tmp_path):
    raw = add_onnx_nms(exported['raw'])
    model = KerasDetector(exported['model'], exported['arch'], exported['classes'])
    assert OnnxDetector(raw.SerializeToString()).nms_options == model.nms_options == NmsOptions()
    for a, b in zip(OnnxDetector(raw.SerializeToString())(exported['images']), model(exported['images'])):
        assert count_matching_detections([a], [b], max(HW)).matched >= .98*len(b) > 0


def test_arguments_take_precedence_over_the_spec(traced, tmp_path):
    result = export_traced(traced, tmp_path/'a.etlt', score_threshold=.02, max_detections=7, iou_threshold=.6)
    assert result.meta['nms'] == dict(
        kind='efficient_nms_trt', score_threshold=.02, max_detections=7, iou_threshold=.6)
    raw = export_traced(traced, tmp_path/'b.onnx', nms='none', max_detections=7)
    assert raw.meta['nms'] == dict(kind='none', max_detections=7, score_threshold=.001)
    assert load_detector(raw.path).nms_options == NmsOptions(max_detections=7)


@pytest.mark.parametrize('threshold', [0., .0001, .009, .4, 1.])
@pytest.mark.parametrize('kind', ['onnx', 'efficient_nms_trt', 'none'])
def test_a_threshold_is_kept_as_it_was_given(kind, threshold):
    from effdet_nb.export.onnx_nms import add_nms
    proto = add_nms(toy_onnx_model(), kind, score_threshold=threshold)
    assert get_metadata(proto)['nms']['score_threshold'] == threshold
    if kind == 'efficient_nms_trt':
        attribute, = (a for a in proto.graph.node[-1].attribute if a.name == 'score_threshold')
        assert attribute.f == np.float32(threshold)
    assert OnnxDetector(proto.SerializeToString()).nms_options.score_threshold == threshold


def initializer(proto, name): return next(t for t in proto.graph.initializer if t.name == name)


def change_initializer(tensor, function):
    "Replaces a constant of a graph."
    from onnx.numpy_helper import from_array, to_array
    tensor.CopyFrom(from_array(np.asarray(function(to_array(tensor)), np.float32), tensor.name))


def test_a_network_that_differs_is_never_written(traced, tmp_path, monkeypatch):
    def convert(model_file, batch_size, opset):
        proto = copy_proto(traced['raw'])
        largest = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
        change_initializer(largest, lambda weights: weights*1.02)
        return proto, traced['float_model']
    monkeypatch.setattr(chapter, 'model_to_onnx', convert)
    with pytest.raises(ValueError, match='not written.*differs from the Keras model'):
        export_traced(traced, tmp_path/'a.onnx')
    assert not list(tmp_path.iterdir())


def set_attribute(name, value):
    "Makes a function that changes an attribute of the last node of a graph."
    def change(proto):
        attribute = next(a for a in proto.graph.node[-1].attribute if a.name == name)
        attribute.CopyFrom(onnx.helper.make_attribute(name, value))
        return proto
    return change


def move_anchors(proto):
    change_initializer(initializer(proto, 'nms/anchors:0'), lambda anchors: anchors+4)
    return proto


def raise_iou_threshold(proto):
    change_initializer(initializer(proto, 'nms/iou_threshold'), lambda threshold: [.9])
    return proto


@pytest.mark.parametrize('name, spoil', [
    ('a.etlt', set_attribute('iou_threshold', .9)), ('a.etlt', set_attribute('max_output_boxes', 3)),
    ('a.etlt', move_anchors), ('a.onnx', raise_iou_threshold)], ids=['iou', 'max', 'anchors', 'onnx'])
def test_a_suppression_that_differs_from_its_metadata_is_never_written(traced, tmp_path, monkeypatch, name, spoil):
    add_nms = chapter.add_nms
    monkeypatch.setattr(chapter, 'add_nms', lambda raw, kind, **options: spoil(add_nms(raw, kind, **options)))
    with pytest.raises(ValueError, match='not written, because its suppression'): export_traced(traced, tmp_path/name)
    assert not list(tmp_path.iterdir())


def detections(*rows):
    "Detections of one image, from (y1, score, class)."
    boxes = [[y, 0, y+9, 9] for y, _, _ in rows]
    return [Detections(boxes, [score for _, score, _ in rows], [channel for _, _, channel in rows])]


@pytest.mark.parametrize('a, b, matched, total', [
    ([(0, .9, 1), (50, .5, 0)], [(50, .5, 0), (0, .9, 1)], 2, 2),     # in another order
    ([(0, .9, 1)], [(0, .9, 2)], 0, 1), ([(0, .9, 1)], [(2, .9, 1)], 0, 1), ([(0, .9, 1)], [(0, .8, 1)], 0, 1),
    ([], [(0, .9, 1)], 0, 1), ([], [], 0, 0)])
def test_agreement_counts_detections_with_the_same_class_box_and_score(a, b, matched, total):
    assert count_matching_detections(detections(*a), detections(*b), 100) == (matched, total)


def test_the_plugin_is_compared_with_as_many_candidates_as_it_considers():
    raw = toy_onnx_model(num_classes=8, spread=1.)
    plugin = add_trt_nms(raw, score_threshold=.01)
    meta, outputs = get_metadata(plugin), run_onnxruntime(raw, noise_images(1))
    for kind, top_k in (('efficient_nms_trt', 4096), ('onnx', NmsOptions.top_k)):
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, 'postprocess_batch', lambda *args: asked.append(args[-1].top_k))
            expected_detections(meta | dict(nms=meta['nms'] | dict(kind=kind)), outputs)
        assert asked == [top_k]


@pytest.mark.parametrize('file, batch, num_images', [
    ('a.tflite', 1, 4), ('a/saved_model.pb', None, 4), ('a/saved_model.pb', 2, 2)])
def test_tensorflows_formats_are_compared_on_several_images(exported, monkeypatch, tmp_path, file, batch, num_images):
    compared = []
    def run(model, pixels, path, batch_size, is_saved_model):
        compared.append(len(pixels))
        raise InterruptedError
    monkeypatch.setattr(chapter, '_write_and_run', run)
    with pytest.raises(InterruptedError):
        chapter.export_tensorflow(load_model_file(exported['path'], 'Geheim'), tmp_path/file, batch)
    assert compared == [num_images]


def test_a_calibration_cache_of_older_code_is_refused_with_one_sentence(tmp_path):
    "The fingerprint is the one that the code of commit ea326e9 computed for plain.tlt."
    cache = tmp_path/'cal.json'
    cache.write_text(json.dumps(dict(network='41671ccbfdcfb560', ranges={'input': [0., 255.]})))
    with pytest.raises(ValueError, match='or by an earlier version of effdet_nb. Delete it') as e:
        calibrate(toy_onnx_model(), None, cache)
    assert '\n' not in str(e.value)


def test_a_file_without_suppression_contains_the_anchors(traced, tmp_path):
    proto = onnx.load(export_traced(traced, tmp_path/'a.onnx', nms='none').path)
    onnx.checker.check_model(proto, full_check=True)
    anchors = run_onnxruntime(proto, traced['images'])['anchors']
    np.testing.assert_array_equal(anchors, anchors_from_metadata(get_metadata(proto)))
    assert len(load_detector(tmp_path/'a.onnx')(traced['images'])) == 3


def test_not_a_number_counts_as_a_difference(exported):
    raw = copy_proto(exported['raw'])
    bias = next(t for t in raw.graph.initializer if t.dims == [36])
    change_initializer(bias, lambda b: np.full(36, np.nan))
    with pytest.raises(ValueError, match='diverged'):
        verify_export(raw, exported['float_model'], exported['images'], 'x.onnx')


def test_half_precision_halves_the_file_and_stays_close(traced, tmp_path):
    result = export_traced(traced, tmp_path/'a.onnx', data_type='fp16')
    half_size = sum(2*np.prod(t.dims) for t in traced['raw'].graph.initializer)
    assert 1e-6 < result.difference['score'] <= TOLERANCES['fp16']
    assert result.path.stat().st_size < 1.2*half_size + 2e5
    assert result.meta['data_type'] == 'fp16' and len(load_detector(result.path)(traced['images'])) == 3


@pytest.fixture(scope='module')
def calibration_dir(tmp_path_factory):
    "A folder with images in a subfolder, and a calibration cache once one was written."
    folder = tmp_path_factory.mktemp('calibration')
    (folder/'deep').mkdir()
    for s in range(3): Image.fromarray(make_toy_image(seed=s, image_hw=(90, 200)).image).save(folder/'deep'/f'{s}.png')
    return folder


def test_int8_is_the_same_from_images_and_from_the_cache(traced, calibration_dir, tmp_path):
    cache = tmp_path/'cache'/'cal.json'
    options = dict(data_type='int8', nms='none', cal_cache_file=cache)
    result = export_traced(traced, tmp_path/'a.onnx', cal_image_dir=calibration_dir, batches=2, **options)
    proto = onnx.load(result.path)
    num_dequantized = sum(n.op_type == 'DequantizeLinear' for n in proto.graph.node)
    assert num_dequantized > 100 and get_metadata(proto)['data_type'] == 'int8'
    assert export_traced(traced, tmp_path/'b.onnx', **options).path.read_bytes() == result.path.read_bytes()
    a, b = (run_onnxruntime(p, traced['images'])['box_deltas'].ravel() for p in (traced['raw'], proto))
    assert np.corrcoef(a, b)[0, 1] > .9
    check_predictions_are_float(proto)
    check_only_inputs_are_rounded(proto)
    assert not has_zero_points(proto)
    contents = json.loads(cache.read_text()) | dict(network='another')
    (tmp_path/'other.json').write_text(json.dumps(contents))
    (tmp_path/'bad.json').write_text('TRT-100400-EntropyCalibration2\n')
    for name, words in (('other', 'other weights'), ('bad', 'not a calibration cache')):
        with pytest.raises(ValueError, match=words): calibrate(traced['raw'], None, tmp_path/f'{name}.json')


@pytest.mark.parametrize('nms, suffix, has_zeros', [
    ('onnx', 'onnx', True), ('none', 'onnx', False), ('efficient_nms_trt', 'onnx', False),
    ('efficient_nms_trt', 'etlt', False)])
def test_only_files_for_onnx_runtime_have_zero_points(traced, calibration_dir, tmp_path, nms, suffix, has_zeros):
    path = tmp_path/f'a.{suffix}'
    export_traced(traced, path, data_type='int8', nms=nms, cal_image_dir=calibration_dir, batches=1)
    proto = onnx.load_model_from_string(load_onnx_bytes(path, 'Geheim'))
    assert has_zero_points(proto) == has_zeros
    check_only_inputs_are_rounded(proto)
    if not has_zeros: return
    with pytest.raises(ValueError, match='Export the .tlt again with --nms efficient_nms_trt'): convert_precision(proto)


@pytest.mark.parametrize('output, nms', [('a.onnx', 'onnx'), ('a.etlt', 'onnx')])
def test_an_engine_is_not_built_from_an_int8_file_for_onnx_runtime(tmp_path, capsys, output, nms):
    with pytest.raises(SystemExit):
        effdet_export(model_path='missing.tlt', output_path=str(tmp_path/output), nms=nms, data_type='int8',
                      engine_file=str(tmp_path/'a.engine'))
    assert 'Add --nms efficient_nms_trt' in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def check_predictions_are_float(proto):
    "No weight of a prediction layer is rounded."
    op_type_of = {name: n.op_type for n in proto.graph.node for name in n.output}
    predictions = [n for n in proto.graph.node if n.op_type == 'Conv' and 'predict' in n.output[0]]
    assert predictions
    for node in predictions: assert op_type_of.get(node.input[1]) != 'DequantizeLinear'


def check_only_inputs_are_rounded(proto):
    "Every rounded tensor is read by a convolution, so no output is rounded before its activation."
    rounded = {n.output[0] for n in proto.graph.node if n.op_type == 'DequantizeLinear'}
    assert rounded <= {name for n in proto.graph.node if n.op_type == 'Conv' for name in n.input}


@pytest.mark.parametrize('options, words', [
    (dict(output_path='a.txt'), 'must be .onnx'), (dict(output_path='a.pb'), 'a/saved_model.pb'),
    (dict(output_path='a/saved_model.pb', data_type='int8', cal_image_dir='.'), 'Leave --nms and --data_type out'),
    (dict(output_path='a.tflite', nms='onnx'), 'Leave --nms and --data_type out'),
    (dict(data_type='int4'), 'fp32, fp16, int8'), (dict(opset=12), '13 to 18'), (dict(opset=19), '13 to 18'),
    (dict(max_batch_size=0), 'at least 1'), (dict(nms='soft'), 'Allowed: onnx'),
    (dict(data_type='int8'), 'cal_image_dir'), (dict(nms='none', score_threshold=3.), 'from 0 to 1')])
def test_invalid_options_are_refused_before_the_model_is_opened(monkeypatch, tmp_path, options, words):
    monkeypatch.setattr(chapter, 'load_model_file', lambda *a: pytest.fail('opened too early'))
    with pytest.raises(ValueError, match=words):
        export(**dict(model_path='a.tlt', output_path=tmp_path/'a.onnx') | options)


def test_a_folder_as_output_is_refused_before_the_model_is_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(chapter, 'load_model_file', lambda *a: pytest.fail('opened too early'))
    (tmp_path/'a.onnx').mkdir()
    with pytest.raises(ValueError, match='this is a folder'): export('a.tlt', tmp_path/'a.onnx')


def test_the_model_file_is_opened_once(traced, monkeypatch, tmp_path):
    paths = []
    def load(path, *args):
        paths.append(path)
        return load_model_file(path, *args)
    monkeypatch.setattr(chapter, 'load_model_file', load)
    export_traced(traced, tmp_path/'a.onnx')
    assert paths == [traced['path']]


@pytest.mark.parametrize('spec, kind, settings', [
    (None, 'onnx', {}), ('', 'none', {}), ('', 'efficient_nms_trt', {}),
    ('eval_config { min_score_thresh: 0.0 }', 'efficient_nms_trt', dict(score_threshold=0.)),
    ('eval_config { min_score_thresh: 0.0001 }', 'efficient_nms_trt', dict(score_threshold=.0001)),
    ('eval_config { min_score_thresh: 0.9 }', 'efficient_nms_trt', dict(score_threshold=.9)),
    ('eval_config { min_score_thresh: 0 }', 'onnx', dict(score_threshold=0)),
    ('eval_config { min_score_thresh: 0.0001 }', 'none', dict(score_threshold=.0001)),
    ('eval_config { min_score_thresh: 0.9 }', 'onnx', dict(score_threshold=.001)),     # it can be evaluated
    ('eval_config { max_detections_per_image: 7 }', 'none', dict(max_detections=7))])
def test_thresholds_of_the_spec_in_the_model(spec, kind, settings):
    meta = {} if spec is None else dict(spec=Spec.parse(spec).to_text())
    assert saved_nms_settings(ModelFile(meta), kind) == settings


def test_the_difference_from_keras_is_measured():
    raw, images = toy_onnx_model(), noise_images(2)
    outputs = run_onnxruntime(raw, np.resize(images, (7, 128, 128, 3)))
    def model(x, training): return outputs
    def moved_model(x, training): return outputs | dict(box_deltas=outputs['box_deltas']+np.float32([.01, 0, 0, 0]))
    assert compare_with_keras(raw, model, images) == dict(score=0., box=0.)
    difference = compare_with_keras(raw, moved_model, images)
    assert difference['score'] == 0 and .01 < difference['box'] < .1


@pytest.mark.parametrize('batch', [1, 3, 9])
def test_the_difference_from_keras_is_measured_at_any_fixed_batch(batch):
    raw, images = toy_onnx_model(), noise_images(2)
    def model(x, training): return run_onnxruntime(raw, x)
    assert max(compare_with_keras(toy_onnx_model(batch=batch), model, images).values()) < 1e-6


OPENVINO = '''
import sys, numpy as np, onnxruntime, openvino
file, x = sys.argv[1], np.load(sys.argv[2])
session = onnxruntime.InferenceSession(file)
names = [o.name for o in session.get_outputs()]
ours = dict(zip(names, session.run(names, {'input': x})))
theirs = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([x])
differences = [float(abs(ours[n].astype(float)-theirs[n].astype(float)).max()) for n in names]
print(differences, int(ours['num_detections'].sum()))'''

PEER_PYTHON = os.environ.get('PEER_PYTHON')

@pytest.mark.skipif(not PEER_PYTHON, reason='PEER_PYTHON must name a Python that has onnxruntime and openvino')
def test_openvino_computes_what_onnxruntime_computes(exported, tmp_path):
    "The file with standard operators, in a second runtime."
    onnx.save(add_onnx_nms(exported['raw'], score_threshold=.3), tmp_path/'a.onnx')
    np.save(tmp_path/'x.npy', exported['images'].astype(np.float32))
    command = [PEER_PYTHON, '-c', OPENVINO, tmp_path/'a.onnx', tmp_path/'x.npy']
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    differences, num_detections = json.loads(out[:out.index(']')+1]), int(out.split()[-1])
    assert num_detections > 20 and max(differences) < 1e-2


@pytest.mark.slow
def test_tensorflows_formats_give_the_same_outputs(exported, tmp_path):
    from effdet_nb.export.formats import run_saved_model, run_tflite
    expected, pixels = exported['model'](exported['images']), exported['images'].astype(np.float32)
    def export_as(path, **options): return export(exported['path'], tmp_path/path, 'Geheim', **options)
    lite = export_as('deep/a.tflite', nms='none')
    saved = export_as('served/saved_model.pb')
    again = export_as('served/saved_model.pb')        # replaces the one before
    assert saved.path == again.path == tmp_path/'served'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['deep', 'served']
    for result, outputs in ((lite, run_tflite(lite.path, pixels)), (saved, run_saved_model(saved.path, pixels))):
        assert max(result.difference.values()) < 1e-3
        for name in ('cls_logits', 'box_deltas'):
            np.testing.assert_allclose(outputs[name], expected[name], atol=2e-3, rtol=1e-3)
    for path in (tmp_path/'deep'/'a.tflite.json', tmp_path/'served'/'effdet_nb.json'):
        assert json.loads(path.read_text())['classes']['names'] == list(SHAPE_NAMES)
        assert 'Geheim' not in path.read_text()
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'thesis.txt').write_text('')
    with pytest.raises(ValueError, match='contains other files'): export_as('full/saved_model.pb')


def test_a_saved_model_cannot_replace_a_mounted_folder(tmp_path, monkeypatch):
    monkeypatch.setattr('os.path.ismount', lambda path: path==tmp_path)
    with pytest.raises(ValueError, match=f'a mounted disk or volume.*, such as {tmp_path}/model/saved_model.pb'):
        check_saved_model_path(tmp_path/'saved_model.pb')
    check_saved_model_path(tmp_path/'model'/'saved_model.pb')


@pytest.mark.parametrize('path, reason', [
    ('assets/saved_model.pb', 'such as assets'),                # a folder of this name, but no SavedModel
    ('mixed/saved_model.pb', 'such as thesis.txt'),
    ('link/saved_model.pb', 'link is a link'),
    ('here/saved_model.pb', 'here is the current folder or contains it'),
])
def test_an_export_of_a_saved_model_deletes_no_other_files(path, reason, tmp_path, monkeypatch):
    (tmp_path/'assets'/'assets').mkdir(parents=True)
    for name in ('mixed', 'model', 'here'):
        (tmp_path/name).mkdir()
        (tmp_path/name/'saved_model.pb').write_text('')
    (tmp_path/'mixed'/'thesis.txt').write_text('')
    (tmp_path/'link').symlink_to('model')
    monkeypatch.chdir(tmp_path/'here')
    with pytest.raises(ValueError, match=reason): check_saved_model_path(tmp_path/path)
    with pytest.raises(ValueError, match='[.] is the current folder'): check_saved_model_path('saved_model.pb')
    check_saved_model_path(tmp_path/'model'/'saved_model.pb')


def test_a_saved_model_replaces_an_earlier_one(tmp_path):
    old,new = tmp_path/'model', tmp_path/'temporary'/'model'
    for path,text in ((old, 'old'), (new, 'new')):
        (path/'variables').mkdir(parents=True)
        (path/'saved_model.pb').write_text(text)
    (old/'variables'/'old').write_text('')
    check_saved_model_path(old/'saved_model.pb')
    chapter._publish([new], old)
    assert (old/'saved_model.pb').read_text()=='new' and not (old/'variables'/'old').exists()
    assert not new.exists()


SPEC = """model_config {{ model_name: "efficientdet-d0" }}
dataset_config {{
  training_file_pattern: "{0}/val-*" validation_file_pattern: "{0}/val-*" validation_json_file: "{1}/val.json"
  num_classes: 4 image_size: "128,128" }}
training_config {{
  train_batch_size: 8 num_examples_per_epoch: 87 num_epochs: 8
  learning_rate: 0.05 lr_warmup_epoch: 1 lr_warmup_init: 0.01
  moving_average_decay: 0.9 clip_gradients_norm: 5.0 checkpoint_period: 100 tf_random_seed: 42 }}
eval_config {{ eval_batch_size: 8 eval_epoch_cycle: 100 }}"""

@pytest.mark.slow
def test_ap_of_the_file_is_that_of_the_model(shared_dir, tmp_path):
    "A minute of training on real images, then the same AP from .tlt and .onnx, and the AP drop of 8 bits."
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.evaluate.evaluate import evaluate
    from effdet_nb.export.runtimes import quantization_ap_drop
    from effdet_nb.train.experiment import eval_dataset_from_spec
    from effdet_nb.train.fit import train
    bccd = shared_dir/'data'/'bccd'
    dataset_convert(bccd/'images', bccd/'val.json', tmp_path, 'val', 2)
    (tmp_path/'spec.txt').write_text(SPEC.format(tmp_path, bccd))
    spec = Spec.load(tmp_path/'spec.txt')
    train(spec, tmp_path/'run')
    tlt = tmp_path/'run'/'model.best.tlt'
    def ap(path): return evaluate(load_detector(path), eval_dataset_from_spec(spec))['AP']
    before = ap(tlt)
    for nms in ('none', 'onnx'):      # on toy images this network may turn rounding errors into other detections
        export(tlt, tmp_path/f'{nms}.onnx', nms=nms)
        assert before > .001 and abs(before-ap(tmp_path/f'{nms}.onnx')) < .001, nms
    export(tlt, tmp_path/'int8.onnx', data_type='int8', cal_image_dir=bccd/'images', batches=16)
    line = quantization_ap_drop(spec, tlt, tmp_path/'int8.onnx')
    reported, after = (float(word) for word in line.replace(',', '').split() if word[0] == '0')
    assert abs(reported-before) < .001 and after > .5*reported
