"A real D0 leaves home: equal to Keras in every ending, precision and batch; sealed, described, refused when wrong."
import json
import os
import subprocess

import numpy as np
import onnx
import pytest
from PIL import Image

from effdet_nb.detector.nms import NmsOptions
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.images import to_channels
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_toy_image
from effdet_nb.export import export as chapter
from effdet_nb.export.export import TOLERANCES, count_matching_detections, compare_with_keras, nms_detections, export, verify_export, nms_options_from_spec
from effdet_nb.export.onnx_graph import get_metadata, anchors_from_metadata, convert_to_onnx
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from effdet_nb.export.quantize import calibrate
from effdet_nb.export.runtimes import OnnxDetector, load_detector
from effdet_nb.detector.detections import Detections
from effdet_nb.weights.model_file import load_etlt
from effdet_nb.train.spec import Spec
from onnx_toy import run_onnxruntime, noise_images, toy_onnx_model

HW = 128, 160
SLIM = {'stem_conv': 16, 'block2a_expand_conv': 40, 'block3b_expand_conv': 72, 'block5b_se_reduce': 8, 'block6c_expand_conv': 200}


def lively(widths={}, name='efficientdet-d0', channels=3):
    "A fresh detector with statistics of drawn pictures and a loud last layer, so that its answers differ from place to place."
    from effdet_nb.detector.efficientdet import Arch, build
    arch = Arch(name, image_hw=HW, num_classes=4, widths=widths, channels=channels)
    model = build(arch)
    for layer in model.layers:
        if hasattr(layer, 'moving_mean'): layer.momentum = 0.
    model(to_channels(np.stack([make_toy_image(seed=i, image_hw=HW).image for i in range(6)]), channels), training=True)
    for layer in model.layers:
        if hasattr(layer, 'moving_mean'): layer.moving_variance.assign(np.maximum(layer.moving_variance, np.mean(layer.moving_variance))) # nobody shouts from noise
    kernel = model.get_layer('class-predict').pointwise_kernel
    kernel.assign(kernel*150)
    return model, arch


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A pruned detector, saved with a key; its graph; pictures."
    import keras
    from effdet_nb.weights.model_file import save_detector
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp('home')
    model, arch = lively(SLIM)
    classes = ClassTable.from_categories([dict(id=i, name=n) for i, n in enumerate(SHAPE_NAMES, 1)], num_classes=4)
    save_detector(folder/'slim.tlt', model, arch, classes, 'Geheim', step=5, spec='eval_config { min_score_thresh: 0.3 max_detections_per_image: 50 }')
    raw, floats, stored = convert_to_onnx(folder/'slim.tlt', 'Geheim')
    images = np.stack([make_toy_image(seed=s, image_hw=HW).image for s in (21, 22, 23)])
    return dict(folder=folder, path=folder/'slim.tlt', raw=raw, floats=floats, model=model, classes=classes, images=images, stored=stored)


def test_raw_outputs_equal_keras_at_any_batch(home):
    want = home['model'](home['images'])
    for n in (1, 2, 3):
        got = run_onnxruntime(home['raw'], home['images'][:n])
        for k in ('cls_logits', 'box_deltas'): np.testing.assert_allclose(got[k], np.array(want[k])[:n], atol=2e-3, rtol=1e-3)


def test_boxes_equal_keras(home):
    from effdet_nb.detector.predictor import KerasDetector
    from effdet_nb.detector.efficientdet import arch_from_dict
    keras_detector = lambda **how: KerasDetector(home['model'], arch_from_dict(home['stored'].meta['arch']), home['classes'], nms_options=NmsOptions(**how))(home['images'])
    soft = dict(method='gaussian')
    hard = dict(score_threshold=.3, max_detections=30)
    for proto, how in ((home['raw'], soft), (home['raw'], hard), (add_onnx_nms(home['raw'], score_threshold=.3, max_detections=30), hard), (add_trt_nms(home['raw'], .3, 30), hard)):
        mine = how if get_metadata(proto)['nms']['kind'] == 'none' else {}
        for a, b in zip(OnnxDetector(proto.SerializeToString(), **mine)(home['images']), keras_detector(**how)):
            assert len(a) == len(b) > 5
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-3)
            same = [(c == b.classes) & (abs(box-b.boxes).max(1) < .1) & (abs(s-b.scores) < 1e-3) for box, s, c in zip(a.boxes, a.scores, a.classes)]
            assert np.mean([s.any() for s in same]) == 1        # whatever the order of equals


@pytest.mark.slow
@pytest.mark.parametrize('kind', [dict(), dict(name='efficientdet-lite0'), dict(channels=1)], ids=str)
def test_whole_lite_and_grey_networks_leave_home_too(kind, home, tmp_path):
    "A D0 with all its filters, one for phones, one that sees grey; all of them rectangles."
    from effdet_nb.detector.predictor import KerasDetector
    from effdet_nb.weights.model_file import save_detector
    model, arch = lively(**kind)
    save_detector(tmp_path/'a.tlt', model, arch, home['classes'])
    for file in ('a.onnx', 'a.etlt'):
        made = export(tmp_path/'a.tlt', tmp_path/file, score_threshold=.3)
        assert max(made.difference.values()) < 1e-4 and made.agreement[0] == made.agreement[1] > 20
        for a, b in zip(load_detector(tmp_path/file)(home['images']), KerasDetector(model, arch, home['classes'], nms_options=NmsOptions(score_threshold=.3))(home['images'])):
            assert len(a) == len(b) > 0
            np.testing.assert_allclose(np.sort(a.scores), np.sort(b.scores), atol=1e-3)


def test_the_graph_is_tidy(home):
    ops = [n.op_type for n in home['raw'].graph.node]
    assert not {'BatchNormalization', 'Shape', 'Slice', 'Cast', 'Tile'} & set(ops)
    assert ops.count('Reshape') == 10 and ops.count('Transpose') == 1+10
    assert [(o.domain, o.version) for o in home['raw'].opset_import] == [('', 17)]
    onnx.checker.check_model(home['raw'], full_check=True)
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in [*home['raw'].graph.input, *home['raw'].graph.output]}
    assert shapes == dict(input=['batch', *HW, 3], cls_logits=['batch', len(anchors_from_metadata(get_metadata(home['raw']))), 4], box_deltas=['batch', len(anchors_from_metadata(get_metadata(home['raw']))), 4])


@pytest.fixture
def quick(home, monkeypatch):
    "Export without tracing again."
    copy = lambda: onnx.ModelProto.FromString(home['raw'].SerializeToString())
    monkeypatch.setattr(chapter, 'convert_to_onnx', lambda path, key, batch, opset: (copy(), home['floats'], home['stored']))
    return home


def test_export_writes_what_the_name_asks_for(quick, tmp_path):
    plain = export(quick['path'], tmp_path/'a'/'b.onnx', 'Geheim')
    sealed = export(quick['path'], tmp_path/'c.etlt', 'Geheim')
    assert plain.meta['nms'] == dict(kind='onnx', score_threshold=.001, max_detections=50, iou_threshold=.5, top_k=3000)
    assert sealed.meta['nms'] == dict(kind='efficient_nms_trt', score_threshold=.3, max_detections=50, iou_threshold=.5)
    assert max(plain.difference.values()) < 1e-4 and 'batch any' in repr(plain)
    for made in (plain, sealed): assert made.agreement[0] == made.agreement[1] > 20 and 'drawn detections as our post-processor finds them' in repr(made)
    assert get_metadata(onnx.load(tmp_path/'a'/'b.onnx')) == plain.meta
    assert (tmp_path/'c.etlt').read_bytes()[:4] == bytes(4)
    assert onnx.load_model_from_string(load_etlt(tmp_path/'c.etlt', 'Geheim')).graph.node[-1].op_type == 'EfficientNMS_TRT'
    for p in (tmp_path/'a'/'b.onnx', tmp_path/'c.etlt'): assert b'Geheim' not in p.read_bytes() and b'min_score_thresh' not in p.read_bytes()
    a, b = (load_detector(p, 'Geheim' if p.suffix == '.etlt' else '', score_threshold=.4)(quick['images']) for p in (tmp_path/'a'/'b.onnx', tmp_path/'c.etlt'))
    for x, y in zip(a, b): np.testing.assert_allclose(x.boxes, y.boxes, atol=1e-2)


def test_arguments_beat_the_spec(quick, tmp_path):
    made = export(quick['path'], tmp_path/'a.etlt', score_threshold=.02, max_detections=7, iou_threshold=.6)
    assert made.meta['nms'] == dict(kind='efficient_nms_trt', score_threshold=.02, max_detections=7, iou_threshold=.6)
    assert export(quick['path'], tmp_path/'b.onnx', nms='none').meta['nms'] == dict(kind='none')


def test_a_wrong_graph_is_never_written(quick, tmp_path, monkeypatch):
    def spoiled(path, key, batch, opset):
        raw = onnx.ModelProto.FromString(quick['raw'].SerializeToString())
        weight = max(raw.graph.initializer, key=lambda t: len(t.raw_data))
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)*np.float32(1.02), weight.name))
        return raw, quick['floats'], quick['stored']
    monkeypatch.setattr(chapter, 'convert_to_onnx', spoiled)
    with pytest.raises(ValueError, match='not written.*differs from the Keras model'): export(quick['path'], tmp_path/'a.onnx')
    assert not list(tmp_path.iterdir())


def test_a_wrong_ending_is_never_written(quick, tmp_path, monkeypatch):
    "An attribute, an anchor or a threshold of the ending that is not what the description says."
    def other(proto, **change):
        for a in proto.graph.node[-1].attribute:
            if a.name in change: a.CopyFrom(onnx.helper.make_attribute(a.name, change[a.name]))
        return proto
    def moved(proto):
        t = next(t for t in proto.graph.initializer if t.name == 'nms/anchors:0')
        t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t)+np.float32(4), t.name))
        return proto
    def loose(proto):
        t = next(t for t in proto.graph.initializer if t.name == 'nms/iou_threshold')
        t.CopyFrom(onnx.numpy_helper.from_array(np.float32([.9]), t.name))
        return proto
    real = chapter.add_nms
    for name, spoil in (('a.etlt', lambda p: other(p, iou_threshold=.9)), ('a.etlt', lambda p: other(p, max_output_boxes=3)), ('a.etlt', moved), ('a.onnx', loose)):
        monkeypatch.setattr(chapter, 'add_nms', lambda raw, kind, **how: spoil(real(raw, kind, **how)))
        with pytest.raises(ValueError, match='not written, because its ending'): export(quick['path'], tmp_path/name)
    assert not list(tmp_path.iterdir())


def test_agreement_counts_partners():
    d = lambda *rows: [Detections([[y, 0, y+9, 9] for y, _, _ in rows], [s for _, s, _ in rows], [c for _, _, c in rows])]
    assert count_matching_detections(d((0, .9, 1), (50, .5, 0)), d((50, .5, 0), (0, .9, 1)), 100) == (2, 2)
    assert count_matching_detections(d((0, .9, 1)), d((0, .9, 2)), 100) == count_matching_detections(d((0, .9, 1)), d((2, .9, 1)), 100) == count_matching_detections(d((0, .9, 1)), d((0, .8, 1)), 100) == (0, 1)
    assert count_matching_detections(d(), d((0, .9, 1)), 100) == (0, 1) and count_matching_detections(d(), d(), 100) == (0, 0)


def test_the_anchors_are_in_a_file_without_ending(quick, tmp_path):
    proto = onnx.load(export(quick['path'], tmp_path/'a.onnx', nms='none').path)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_array_equal(run_onnxruntime(proto, quick['images'])['anchors'], anchors_from_metadata(get_metadata(proto)))
    assert len(load_detector(tmp_path/'a.onnx')(quick['images'])) == 3


SPEC = """model_config {{ model_name: "efficientdet-d0" }}
dataset_config {{ training_file_pattern: "{0}/val-*" validation_file_pattern: "{0}/val-*" validation_json_file: "{1}/val.json" num_classes: 4 image_size: "128,128" }}
training_config {{ train_batch_size: 8 num_examples_per_epoch: 87 num_epochs: 8 learning_rate: 0.1 lr_warmup_epoch: 1 lr_warmup_init: 0.01 moving_average_decay: 0.9
  clip_gradients_norm: 5.0 checkpoint_period: 100 tf_random_seed: 42 }}
eval_config {{ eval_batch_size: 8 eval_epoch_cycle: 100 }}"""

def test_nan_is_a_difference(home):
    raw = onnx.ModelProto.FromString(home['raw'].SerializeToString())
    bias = next(t for t in raw.graph.initializer if t.dims == [36])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(36, np.nan, np.float32), bias.name))
    with pytest.raises(ValueError, match='diverged'): verify_export(raw, home['floats'], home['images'], 'x.onnx')


def test_half_precision(quick, tmp_path):
    made = export(quick['path'], tmp_path/'a.onnx', data_type='fp16')
    assert 1e-6 < made.difference['score'] <= TOLERANCES['fp16'] and made.path.stat().st_size < 1.2*sum(2*np.prod(t.dims) for t in quick['raw'].graph.initializer) + 2e5
    assert made.meta['data_type'] == 'fp16' and len(load_detector(made.path)(quick['images'])) == 3


def test_int8_from_pictures_and_from_the_cache(quick, tmp_path):
    (tmp_path/'deep').mkdir()
    for s in range(3): Image.fromarray(make_toy_image(seed=s, image_hw=(90, 200)).image).save(tmp_path/'deep'/f'{s}.png')
    made = export(quick['path'], tmp_path/'a.onnx', data_type='int8', cal_image_dir=tmp_path, cal_cache_file=tmp_path/'cache'/'cal.json', nms='none', batches=2)
    proto = onnx.load(made.path)
    ops = [n.op_type for n in proto.graph.node]
    assert ops.count('DequantizeLinear') > 200 and get_metadata(proto)['data_type'] == 'int8'
    again = export(quick['path'], tmp_path/'b.onnx', data_type='int8', cal_cache_file=tmp_path/'cache'/'cal.json', nms='none')
    assert again.path.read_bytes() == made.path.read_bytes()
    held = json.loads((tmp_path/'cache'/'cal.json').read_text())
    held['network'] = 'another'; (tmp_path/'other.json').write_text(json.dumps(held)); (tmp_path/'bad.json').write_text('TRT-100400-EntropyCalibration2\n')
    for name, words in (('other', 'other weights'), ('bad', 'not a calibration cache')):
        with pytest.raises(ValueError, match=words): calibrate(quick['raw'], None, tmp_path/f'{name}.json')
    # the answers stay close where the network is not on the edge
    a, b = (run_onnxruntime(p, quick['images'])['box_deltas'].ravel() for p in (quick['raw'], proto))
    assert np.corrcoef(a, b)[0, 1] > .9
    # the last layers stay float: no weight of theirs was rounded
    made_by = {o: n.op_type for n in proto.graph.node for o in n.output}
    last = [n for n in proto.graph.node if n.op_type == 'Conv' and 'predict' in n.output[0]]
    assert last and not [n for n in last if made_by.get(n.input[1]) == 'DequantizeLinear']


@pytest.mark.parametrize('wrong,words', [(dict(output_path='a.txt'), 'must be .onnx'), (dict(output_path='a.pb'), 'a/saved_model.pb'), (dict(output_path='a.tflite', data_type='int8', cal_image_dir='.'), 'fp32 without ending only'), (dict(output_path='a.tflite', nms='onnx'), 'fp32 without ending only'), (dict(data_type='int4'), 'fp32, fp16, int8'), (dict(opset=12), '13 to 18'), (dict(opset=19), '13 to 18'),
    (dict(max_batch_size=0), 'at least 1'), (dict(nms='soft'), 'Allowed: onnx'), (dict(data_type='int8'), 'cal_image_dir'), (dict(nms='none', score_threshold=.3), 'nms "none"')])
def test_what_cannot_be_is_refused_at_the_door(monkeypatch, tmp_path, wrong, words):
    monkeypatch.setattr(chapter, 'convert_to_onnx', lambda *a: pytest.fail('too late'))
    with pytest.raises(ValueError, match=words): export(**dict(model_path='a.tlt', output_path=tmp_path/'a.onnx') | wrong)


def test_folders_are_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(chapter, 'convert_to_onnx', lambda *a: pytest.fail('too late'))
    (tmp_path/'a.onnx').mkdir()
    with pytest.raises(ValueError, match='this is a folder'): export('a.tlt', tmp_path/'a.onnx')


def test_thresholds_of_specs():
    meta = lambda text: dict(spec=Spec.parse(text).to_text())
    assert nms_options_from_spec({}, 'onnx') == {} == nms_options_from_spec(meta(''), 'none')
    assert nms_options_from_spec(meta(''), 'efficient_nms_trt') == {}
    assert nms_options_from_spec(meta('eval_config { min_score_thresh: 0.0 }'), 'efficient_nms_trt') == dict(max_detections=100, score_threshold=.4)  # as TAO: 0 counts as not said
    assert nms_options_from_spec(meta('eval_config { min_score_thresh: 0.0001 }'), 'onnx') == dict(max_detections=100)


def test_compare_measures(monkeypatch):
    raw, images = toy_onnx_model(), noise_images(2)
    out = run_onnxruntime(raw, np.resize(images, (7, 128, 128, 3)))
    assert compare_with_keras(raw, lambda x, training: out, images) == dict(score=0., box=0.)
    off = compare_with_keras(raw, lambda x, training: out | dict(box_deltas=out['box_deltas']+np.float32([.01, 0, 0, 0])), images)
    assert off['score'] == 0 and .01 < off['box'] < .1
    for batch in (1, 3, 9):
        fixed = toy_onnx_model(batch=batch)
        assert max(compare_with_keras(fixed, lambda x, training: run_onnxruntime(raw, x), images).values()) < 1e-6


@pytest.mark.skipif(not os.environ.get('PEER_PYTHON'), reason='needs another Python that has onnxruntime and openvino, named by PEER_PYTHON')
def test_openvino_says_what_onnxruntime_says(home, tmp_path):
    "The file with standard operators, in a second runtime."
    onnx.save(add_onnx_nms(home['raw'], score_threshold=.3), tmp_path/'a.onnx')
    np.save(tmp_path/'x.npy', home['images'].astype(np.float32))
    code = '''
import sys, numpy as np, onnxruntime, openvino
file, x = sys.argv[1], np.load(sys.argv[2])
session = onnxruntime.InferenceSession(file)
names = [o.name for o in session.get_outputs()]
ours = dict(zip(names, session.run(names, {'input': x})))
theirs = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([x])
print([float(abs(ours[n].astype(float)-theirs[n].astype(float)).max()) for n in names], int(ours['num_detections'].sum()))'''
    out = subprocess.run([os.environ['PEER_PYTHON'], '-c', code, tmp_path/'a.onnx', tmp_path/'x.npy'], capture_output=True, text=True, check=True).stdout
    worst, found = json.loads(out[:out.index(']')+1]), int(out.split()[-1])
    assert found > 20 and max(worst) < 1e-2


@pytest.mark.slow
def test_tensorflows_formats_say_the_same(home, tmp_path):
    from effdet_nb.export.formats import run_saved_model, run_tflite
    want, pixels = home['model'](home['images']), home['images'].astype(np.float32)
    lite = export(home['path'], tmp_path/'deep'/'a.tflite', 'Geheim')
    saved = export(home['path'], tmp_path/'served'/'saved_model.pb', 'Geheim')
    again = export(home['path'], tmp_path/'served'/'saved_model.pb', 'Geheim')        # takes the place of the one before
    assert saved.path == again.path == tmp_path/'served' and sorted(p.name for p in tmp_path.iterdir()) == ['deep', 'served']
    for made, says in ((lite, run_tflite(lite.path, pixels)), (saved, run_saved_model(saved.path, pixels))):
        assert max(made.difference.values()) < 1e-3
        for k in ('cls_logits', 'box_deltas'): np.testing.assert_allclose(says[k], want[k], atol=2e-3, rtol=1e-3)
    for beside in (tmp_path/'deep'/'a.tflite.json', tmp_path/'served'/'effdet_nb.json'):
        assert json.loads(beside.read_text())['classes']['names'] == list(SHAPE_NAMES) and 'Geheim' not in beside.read_text()
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.txt').write_text('')
    with pytest.raises(ValueError, match='holds other things'): export(home['path'], tmp_path/'full'/'saved_model.pb', 'Geheim')


@pytest.mark.slow
def test_ap_of_the_file_is_that_of_the_model(shared_dir, tmp_path):
    "A minute of training on real pictures, then the same AP from .tlt and .onnx, soft and hard, and a price for 8 bits."
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.export.runtimes import quantization_ap_drop
    from effdet_nb.train.experiment import eval_dataset_from_spec
    from effdet_nb.evaluate.evaluate import evaluate
    from effdet_nb.train.fit import train
    bccd = shared_dir/'data'/'bccd'
    dataset_convert(bccd/'images', bccd/'val.json', tmp_path, 'val', 2)
    (tmp_path/'spec.txt').write_text(SPEC.format(tmp_path, bccd))
    spec = Spec.load(tmp_path/'spec.txt')
    train(spec, tmp_path/'run')
    tlt = tmp_path/'run'/'model.best.tlt'
    ap = lambda path: evaluate(load_detector(path), eval_dataset_from_spec(spec))['AP']
    for nms in ('none', 'onnx'):
        export(tlt, tmp_path/f'{nms}.onnx', nms=nms)
        a, b = ap(tlt), ap(tmp_path/f'{nms}.onnx')
        assert a > .001 and abs(a-b) < .001, (nms, a, b)
    export(tlt, tmp_path/'int8.onnx', data_type='int8', cal_image_dir=bccd/'images', batches=16)
    before, after = (float(w) for w in quantization_ap_drop(spec, tlt, tmp_path/'int8.onnx').replace(',', '').split() if w[0] == '0')
    assert abs(before-b) < .001 and after > .5*before
