"Engines: what is handed to TensorRT, in which order, and what lies beside the engine. TensorRT itself is a stand-in."
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from effdet_nb.export.tensorrt import BatchSizes, build_engine, gen_trt_engine, convert_precision
from effdet_nb.export.onnx_graph import get_metadata
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from effdet_nb.weights.model_file import save_etlt
from onnx_toy import run_onnxruntime, noise_images, toy_onnx_model


def stand_in(version='10.9', errors=(), builds=True):
    "TensorRT as a list of what was said to it."
    heard, typed = [], {'STRONGLY_TYPED': 1} if version.startswith('1') else {}
    def tell(name, answer=None):
        def method(*a): heard.append((name, *a)); return answer
        return method
    profile = SimpleNamespace(set_shape=tell('set_shape'))
    config = SimpleNamespace(set_memory_pool_limit=tell('set_memory_pool_limit'), add_optimization_profile=lambda p: heard.append(('add_optimization_profile', p is profile)))
    builder = SimpleNamespace(create_network=tell('create_network', 'network'), create_builder_config=lambda: config, create_optimization_profile=lambda: profile,
                              build_serialized_network=lambda n, c: heard.append(('build', n, c is config)) or (memoryview(b'plan') if builds else None))
    parser = SimpleNamespace(parse=lambda data: heard.append(('parse', data)) or not errors, num_errors=len(errors), get_error=lambda i: errors[i])
    Logger = type('Logger', (), dict(VERBOSE=0, WARNING=1, ERROR=2, __init__=lambda self, level: heard.append(('Logger', level))))
    return SimpleNamespace(__version__=version, Logger=Logger, Builder=lambda l: builder, OnnxParser=lambda n, l: parser, init_libnvinfer_plugins=lambda l, n: heard.append(('plugins', n)),
                           NetworkDefinitionCreationFlag=SimpleNamespace(**typed), MemoryPoolType=SimpleNamespace(WORKSPACE='workspace')), heard


@pytest.mark.parametrize('version,flags', [('10.3', 2), ('11.4', 2), ('99', 0)])
def test_the_conversation(version, flags):
    trt, heard = stand_in(version)
    assert build_engine(b'graph', (128, 256), BatchSizes(1, 4, 8), workspace_gb=.5, verbose=True, trt=trt) == b'plan'
    assert heard == [('Logger', 0), ('plugins', ''), ('create_network', flags), ('parse', b'graph'), ('set_memory_pool_limit', 'workspace', 2**29),
                     ('set_shape', 'input', (1, 128, 256, 3), (4, 128, 256, 3), (8, 128, 256, 3)), ('add_optimization_profile', True), ('build', 'network', True)]
    trt, heard = stand_in(version)
    build_engine(b'graph', (128, 128), is_dynamic=False, trt=trt)
    assert not [h for h in heard if h[0] in ('set_shape', 'add_optimization_profile')] and heard[0] == ('Logger', 1)


def test_what_tensorrt_refuses_is_said():
    with pytest.raises(ValueError, match='TensorRT 10.9 cannot read the graph: no op X; no op Y'): build_engine(b'', (8, 8), trt=stand_in(errors=['no op X', 'no op Y'])[0])
    with pytest.raises(RuntimeError, match='could not build'): build_engine(b'', (8, 8), trt=stand_in(builds=False)[0])


@pytest.mark.parametrize('data_type', ['fp32', 'fp16'])
@pytest.mark.parametrize('end', [add_trt_nms, add_onnx_nms])
def test_the_graph_handed_over_has_its_precision_and_its_ending(tmp_path, data_type, end):
    proto = end(toy_onnx_model(), score_threshold=.3, max_detections=17)
    save_etlt(tmp_path/'a.etlt', proto.SerializeToString(), 'k')
    trt, heard = stand_in()
    made = gen_trt_engine(tmp_path/'a.etlt', tmp_path/'deep'/'b.engine', 'k', data_type, max_batch_size=4, trt=trt)
    assert made.read_bytes() == b'plan'
    beside = json.loads((tmp_path/'deep'/'b.engine.json').read_text())
    assert beside == get_metadata(proto) | dict(data_type=data_type, max_batch_size=4, tensorrt='10.9')
    given = onnx.load_model_from_string(next(h[1] for h in heard if h[0] == 'parse'))
    assert given.graph.node[-1].op_type == proto.graph.node[-1].op_type and get_metadata(given)['nms'] == get_metadata(proto)['nms']
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in given.graph.initializer) == (data_type == 'fp16')
    assert next(h for h in heard if h[0] == 'set_shape')[1:] == ('input', (1, 128, 128, 3), (4, 128, 128, 3), (4, 128, 128, 3))
    if end is add_onnx_nms:
        a, b = (run_onnxruntime(p, noise_images()) for p in (proto, given))
        assert a['num_detections'].tolist() == b['num_detections'].tolist()
        np.testing.assert_allclose(a['detection_scores'], b['detection_scores'], atol=5e-3)


def test_fixed_batches_need_no_profile(tmp_path):
    onnx.save(add_trt_nms(toy_onnx_model(batch=4)), tmp_path/'a.onnx')
    trt, heard = stand_in()
    made = gen_trt_engine(tmp_path/'a.onnx', trt=trt)
    assert made == tmp_path/'a.engine' and not [h for h in heard if h[0] == 'set_shape']
    assert json.loads((tmp_path/'a.engine.json').read_text())['batch_size'] == 4
    with pytest.raises(ValueError, match='batches of 4 only'): gen_trt_engine(tmp_path/'a.onnx', max_batch_size=2, trt=trt)


def test_nothing_is_written_when_it_fails(tmp_path):
    onnx.save(add_trt_nms(toy_onnx_model()), tmp_path/'a.onnx')
    for how in (dict(errors=['no']), dict(builds=False)):
        with pytest.raises((ValueError, RuntimeError)): gen_trt_engine(tmp_path/'a.onnx', trt=stand_in(**how)[0])
    with pytest.raises(ValueError, match='this is a folder'): gen_trt_engine(tmp_path/'a.onnx', tmp_path, trt=stand_in()[0])
    assert [p.name for p in tmp_path.iterdir()] == ['a.onnx']


def test_requests_that_cannot_be(tmp_path):
    trt = stand_in()[0]
    onnx.save(add_trt_nms(toy_onnx_model()), tmp_path/'a.onnx')
    with pytest.raises(ValueError, match='cal_image_dir'): gen_trt_engine(tmp_path/'a.onnx', data_type='int8', trt=trt)
    with pytest.raises(FileNotFoundError, match='no pictures'): gen_trt_engine(tmp_path/'a.onnx', data_type='int8', cal_image_dir=tmp_path, trt=trt)
    with pytest.raises(ValueError, match='min_batch_size <= opt'): gen_trt_engine(tmp_path/'a.onnx', min_batch_size=3, max_batch_size=2, trt=trt)
    with pytest.raises(ValueError, match='fp32, fp16, int8'): gen_trt_engine(tmp_path/'a.onnx', data_type='int4', trt=trt)
    (tmp_path/'x.engine').write_bytes(b'?')
    with pytest.raises(ValueError, match='Export the .tlt first'): gen_trt_engine(tmp_path/'x.engine', trt=trt)
    nameless = toy_onnx_model(); del nameless.metadata_props[:]
    with pytest.raises(ValueError, match='trtexec'): convert_precision(nameless, 'fp16')
