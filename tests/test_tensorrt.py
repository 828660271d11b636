"Engines: what is passed to TensorRT, in which order, and what lies beside the engine. TensorRT itself is a double."
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from effdet_nb.export.metadata import get_metadata
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from effdet_nb.export.tensorrt import BatchSizes, build_engine, convert_precision, gen_trt_engine
from effdet_nb.weights.model_file import save_etlt
from onnx_toy import noise_images, run_onnxruntime, toy_onnx_model


class Calls(list):
    "Records the calls of functions, as (name, *arguments)."
    def function(self, name, result=None):
        def call(*args):
            self.append((name, *args))
            return result
        return call

    def named(self, name): return [call for call in self if call[0] == name]


def fake_tensorrt(version='10.9', errors=(), builds=True):
    "A double of the tensorrt module, and the calls to it."
    calls, names = Calls(), SimpleNamespace
    profile = names(set_shape=calls.function('set_shape'))
    config = names(set_memory_pool_limit=calls.function('set_memory_pool_limit'),
                   add_optimization_profile=calls.function('add_optimization_profile'))
    builder = names(
        create_network=calls.function('create_network', 'network'), create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=calls.function('build', memoryview(b'plan') if builds else None))
    parser = names(parse=calls.function('parse', not errors), num_errors=len(errors), get_error=lambda i: errors[i])
    class Logger:
        VERBOSE, WARNING, ERROR = 0, 1, 2
        def __init__(self, level): calls.append(('Logger', level))
    flags = {'STRONGLY_TYPED': 1} if version.startswith('1') else {}
    trt = names(
        __version__=version, Logger=Logger, Builder=lambda logger: builder, OnnxParser=lambda network, logger: parser,
        init_libnvinfer_plugins=lambda logger, name: calls.append(('plugins', name)),
        NetworkDefinitionCreationFlag=names(**flags), MemoryPoolType=names(WORKSPACE='workspace'),
        profile=profile, config=config)
    return trt, calls


@pytest.mark.parametrize('version, flags', [('10.3', 2), ('11.4', 2), ('99', 0)])
def test_calls_to_tensorrt_come_in_the_documented_order(version, flags):
    trt, calls = fake_tensorrt(version)
    assert build_engine(b'graph', (128, 256), BatchSizes(1, 4, 8), workspace_gb=.5, verbose=True, trt=trt) == b'plan'
    shapes = (1, 128, 256, 3), (4, 128, 256, 3), (8, 128, 256, 3)
    assert calls == [
        ('Logger', 0), ('plugins', ''), ('create_network', flags), ('parse', b'graph'),
        ('set_memory_pool_limit', 'workspace', 2**29), ('set_shape', 'input', *shapes),
        ('add_optimization_profile', trt.profile), ('build', 'network', trt.config)]


def test_a_fixed_batch_gets_no_profile_and_only_warnings_are_logged():
    trt, calls = fake_tensorrt()
    build_engine(b'graph', (128, 128), is_dynamic=False, trt=trt)
    assert not calls.named('set_shape') and not calls.named('add_optimization_profile') and calls[0] == ('Logger', 1)


def test_errors_of_tensorrt_are_reported():
    trt, _ = fake_tensorrt(errors=['no op X', 'no op Y'])
    with pytest.raises(ValueError, match='TensorRT 10.9 cannot read the graph: no op X; no op Y'):
        build_engine(b'', (8, 8), trt=trt)
    trt, _ = fake_tensorrt(builds=False)
    with pytest.raises(RuntimeError, match='could not build'): build_engine(b'', (8, 8), trt=trt)


@pytest.mark.parametrize('data_type', ['fp32', 'fp16'])
@pytest.mark.parametrize('add_nms', [add_trt_nms, add_onnx_nms])
def test_the_graph_passed_on_has_its_precision_and_its_suppression(tmp_path, data_type, add_nms):
    proto = add_nms(toy_onnx_model(), score_threshold=.3, max_detections=17)
    save_etlt(tmp_path/'a.etlt', proto.SerializeToString(), 'k')
    trt, calls = fake_tensorrt()
    path = gen_trt_engine(tmp_path/'a.etlt', tmp_path/'deep'/'b.engine', 'k', data_type, max_batch_size=4, trt=trt)
    assert path.read_bytes() == b'plan'
    meta = json.loads((tmp_path/'deep'/'b.engine.json').read_text())
    assert meta == get_metadata(proto) | dict(data_type=data_type, max_batch_size=4, tensorrt='10.9')
    parsed = onnx.load_model_from_string(calls.named('parse')[0][1])
    assert parsed.graph.node[-1].op_type == proto.graph.node[-1].op_type
    assert get_metadata(parsed)['nms'] == get_metadata(proto)['nms']
    is_half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in parsed.graph.initializer)
    assert is_half == (data_type == 'fp16')
    assert calls.named('set_shape') == [('set_shape', 'input', (1, 128, 128, 3), (4, 128, 128, 3), (4, 128, 128, 3))]
    if add_nms is add_onnx_nms: check_same_detections(proto, parsed)


def check_same_detections(proto, other):
    a, b = (run_onnxruntime(p, noise_images()) for p in (proto, other))
    assert a['num_detections'].tolist() == b['num_detections'].tolist()
    np.testing.assert_allclose(a['detection_scores'], b['detection_scores'], atol=5e-3)


def test_a_file_with_a_fixed_batch_decides_the_batch_of_its_engine(tmp_path):
    onnx.save(add_trt_nms(toy_onnx_model(batch=4)), tmp_path/'a.onnx')
    trt, calls = fake_tensorrt()
    path = gen_trt_engine(tmp_path/'a.onnx', trt=trt)
    assert path == tmp_path/'a.engine' and not calls.named('set_shape')
    assert json.loads((tmp_path/'a.engine.json').read_text())['batch_size'] == 4
    with pytest.raises(ValueError, match='batches of 4 only'):
        gen_trt_engine(tmp_path/'a.onnx', max_batch_size=2, trt=trt)


def test_a_failed_build_writes_nothing(tmp_path):
    onnx.save(add_trt_nms(toy_onnx_model()), tmp_path/'a.onnx')
    for failure in (dict(errors=['no']), dict(builds=False)):
        trt, _ = fake_tensorrt(**failure)
        with pytest.raises((ValueError, RuntimeError)): gen_trt_engine(tmp_path/'a.onnx', trt=trt)
    with pytest.raises(ValueError, match='this is a folder'):
        gen_trt_engine(tmp_path/'a.onnx', tmp_path, trt=fake_tensorrt()[0])
    assert [p.name for p in tmp_path.iterdir()] == ['a.onnx']


@pytest.mark.parametrize('options, error, words', [
    (dict(data_type='int8'), ValueError, 'cal_image_dir'),
    (dict(data_type='int8', cal_image_dir='.'), FileNotFoundError, 'no images'),
    (dict(min_batch_size=3, max_batch_size=2), ValueError, 'min_batch_size <= opt'),
    (dict(data_type='int4'), ValueError, 'fp32, fp16, int8')])
def test_invalid_options_are_refused(tmp_path, monkeypatch, options, error, words):
    onnx.save(add_trt_nms(toy_onnx_model()), tmp_path/'a.onnx')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words): gen_trt_engine('a.onnx', trt=fake_tensorrt()[0], **options)


def test_only_exported_files_become_engines(tmp_path):
    (tmp_path/'x.engine').write_bytes(b'?')
    with pytest.raises(ValueError, match='Export the .tlt first'):
        gen_trt_engine(tmp_path/'x.engine', trt=fake_tensorrt()[0])
    without_metadata = toy_onnx_model()
    del without_metadata.metadata_props[:]
    with pytest.raises(ValueError, match='trtexec'): convert_precision(without_metadata, 'fp16')
