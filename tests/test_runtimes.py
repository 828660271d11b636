"Exported files as detectors: any suppression, any batch, no TensorFlow, and an error for every other file."
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from effdet_nb.export import runtimes as runtime
from effdet_nb.export.metadata import get_metadata, anchors_from_metadata
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from effdet_nb.export.runtimes import CudaMemory, OnnxDetector, TrtDetector, model_file_type, load_detector
from effdet_nb.detector.nms import NmsOptions, postprocess_batch
from effdet_nb.weights.model_file import save_etlt, save_model_file
from onnx_toy import run_onnxruntime, noise_images, toy_onnx_model

ROOT = Path(__file__).resolve().parents[1]


def assert_same(a, b, box=1e-3):
    assert [len(d) for d in a] == [len(d) for d in b]
    for x, y in zip(a, b):
        np.testing.assert_allclose(x.boxes, y.boxes, atol=box)
        np.testing.assert_allclose(x.scores, y.scores, atol=1e-6)
        np.testing.assert_array_equal(x.classes, y.classes)


def test_a_file_without_nms_gives_exactly_the_detections_of_postprocess():
    raw, images = toy_onnx_model(), noise_images(3)
    out, anchors = run_onnxruntime(raw, images), anchors_from_metadata(get_metadata(raw))
    for changes in ({}, dict(method='gaussian'), dict(score_threshold=0., per_class=False, max_detections=5)):
        want = postprocess_batch(out['cls_logits'], out['box_deltas'], anchors, NmsOptions(**changes))
        assert_same(OnnxDetector(raw.SerializeToString(), **changes)(images), want, 0)


@pytest.mark.parametrize('end', [lambda r: r, add_onnx_nms, add_trt_nms])
def test_fixed_batches_are_padded_and_split(end):
    images = noise_images(7)
    free = OnnxDetector(end(toy_onnx_model()).SerializeToString())
    fixed = OnnxDetector(end(toy_onnx_model(batch=3)).SerializeToString())
    for n in (0, 1, 3, 7): assert_same(fixed(images[:n]), free(images[:n]))
    assert len(free(images)) == 7


def test_an_onnx_file_follows_the_detector_protocol(tmp_path):
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    d = OnnxDetector(tmp_path/'a.onnx', threads=1)
    assert d.image_hw == (128, 128) and d.classes.names == ('thing 1', 'thing 2') and d.meta['step'] == 3
    for wrong in (np.zeros((1, 64, 128, 3), np.uint8), np.zeros((1, 128, 128, 3), np.float32),
                  np.zeros((128, 128, 3), np.uint8), np.zeros((1, 3, 128, 128), np.uint8)):
        with pytest.raises(ValueError, match='needs uint8'): d(wrong)


def test_a_higher_threshold_gives_the_first_detections():
    data, images = add_onnx_nms(toy_onnx_model(), score_threshold=.1).SerializeToString(), noise_images()
    every, few = OnnxDetector(data)(images), OnnxDetector(data, score_threshold=.7, max_detections=9)(images)
    assert_same(few, [d[d.scores > .7][:9] for d in every])
    same_options = OnnxDetector(data, method='hard', per_class=True, iou_threshold=.5)
    assert same_options.nms_options == NmsOptions(score_threshold=.1)
    for bad in (dict(method='gaussian'), dict(score_threshold=.05), dict(max_detections=101), dict(iou_threshold=.6),
                dict(per_class=False), dict(sigma=.3)):
        with pytest.raises(ValueError, match='Export it again'): OnnxDetector(data, **bad)


def test_encrypted_files_need_their_key(tmp_path, monkeypatch):
    for name, key in (('open', ''), ('sealed', 'Ein Wort')):
        save_etlt(tmp_path/f'{name}.etlt', add_trt_nms(toy_onnx_model()).SerializeToString(), key)
    want = load_detector(tmp_path/'open.etlt')(noise_images())
    assert_same(load_detector(tmp_path/'sealed.etlt', 'Ein Wort')(noise_images()), want, 0)
    with pytest.raises(ValueError, match='no key was given'): load_detector(tmp_path/'sealed.etlt')
    with pytest.raises(ValueError, match='another key') as e: load_detector(tmp_path/'sealed.etlt', 'Zwei Worte')
    assert 'Zwei' not in str(e.value)
    monkeypatch.setenv('EFFDET_KEY', 'Ein Wort')
    assert_same(load_detector(tmp_path/'sealed.etlt')(noise_images()), want, 0)


def test_the_content_of_a_file_decides_its_type(tmp_path):
    data = toy_onnx_model().SerializeToString()
    save_model_file(tmp_path/'plain', dict(a=np.zeros(3)), {})
    save_model_file(tmp_path/'encrypted', dict(a=np.zeros(3)), {}, 'k')
    (tmp_path/'graph').write_bytes(data)
    save_etlt(tmp_path/'framed', data)
    save_etlt(tmp_path/'sealed', data, 'k')
    types = dict(plain='tlt', encrypted='tlt', graph='onnx', framed='etlt', sealed='etlt')
    for name, file_type in types.items(): assert model_file_type(tmp_path/name) == file_type
    for name in ('x.engine', 'x.tlt', 'x.etlt'):
        (tmp_path/name).write_bytes(b'????????????????')
        assert model_file_type(tmp_path/name) == name[2:]
    for name in ('x.pb', 'x.onnx', 'x'):
        (tmp_path/name).write_bytes(b'????????????????')
        with pytest.raises(ValueError, match='Allowed: .tlt'): load_detector(tmp_path/name)
    (tmp_path/'empty.onnx').write_bytes(b'')
    with pytest.raises(ValueError, match='Allowed: .tlt'): load_detector(tmp_path/'empty.onnx')
    with pytest.raises(FileNotFoundError): load_detector(tmp_path/'no.onnx')
    with pytest.raises(FileNotFoundError): load_detector(tmp_path)
    (tmp_path/'x.tlt').write_bytes(b'????????????????')
    with pytest.raises(ValueError, match='effdet_nb'): load_detector(tmp_path/'x.tlt')


@pytest.mark.parametrize('end', [add_onnx_nms, add_trt_nms])
def test_the_error_for_a_truncated_file_names_it(tmp_path, end):
    data = end(toy_onnx_model()).SerializeToString()
    for cut in (20, len(data)//2, len(data)-5):
        (tmp_path/'half.onnx').write_bytes(data[:cut])
        with pytest.raises(ValueError, match='half.onnx.*xport'): load_detector(tmp_path/'half.onnx')


def test_files_without_metadata_are_refused(tmp_path):
    proto = add_onnx_nms(toy_onnx_model())
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'a.onnx')
    with pytest.raises(ValueError, match='not exported by effdet_nb'): load_detector(tmp_path/'a.onnx')
    proto = add_trt_nms(toy_onnx_model())
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'b.onnx')
    with pytest.raises(ValueError, match='not exported by effdet_nb'): load_detector(tmp_path/'b.onnx')


def test_an_exported_file_runs_without_importing_tensorflow(tmp_path):
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    save_etlt(tmp_path/'b.etlt', add_trt_nms(toy_onnx_model()).SerializeToString(), 'k')
    code = f'''
import sys, numpy as np
from effdet_nb.export.runtimes import load_detector
x = np.zeros((1,128,128,3), np.uint8)
load_detector({str(tmp_path/'a.onnx')!r})(x)
first = [m for m in ('tensorflow','keras','tf2onnx','onnx','matplotlib') if m in sys.modules]
load_detector({str(tmp_path/'b.etlt')!r}, 'k')(x)
import effdet_nb.export.tensorrt, effdet_nb.export.export
print(first, [m for m in ('tensorflow','keras','tf2onnx','tensorrt') if m in sys.modules])'''
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (out.stdout, out.returncode) == ('[] []\n', 0), out.stderr


class HostMemory:
    "A stand-in for GPU memory: addresses name arrays of bytes."
    def __init__(self): self.blocks, self.last_address, self.freed = {}, 0, []

    def allocate(self, nbytes):
        self.last_address += 1
        self.blocks[self.last_address] = np.zeros(nbytes, np.uint8)
        return self.last_address

    def upload(self, address, array):
        self.blocks[address][:array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def download(self, address, array):
        array.reshape(-1).view(np.uint8)[:] = self.blocks[address][:array.nbytes]

    def free(self, address):
        self.freed.append(address)
        del self.blocks[address]


def tensorrt_on_onnxruntime(memory, largest_batch):
    "A stand-in for TensorRT whose engines are ONNX files, run by ONNX Runtime."
    import onnxruntime
    kinds = {'tensor(float)': np.float32, 'tensor(int32)': np.int32}

    class Engine:
        def __init__(self, data):
            self.session = onnxruntime.InferenceSession(data)
            self.io = {o.name: o for o in [*self.session.get_inputs(), *self.session.get_outputs()]}
            self.names, self.num_io_tensors = list(self.io), len(self.io)
        def get_tensor_name(self, i): return self.names[i]
        def get_tensor_dtype(self, name): return kinds[self.io[name].type]
        def create_execution_context(self): return Context(self)

    class Context:
        def __init__(self, engine): self.engine, self.address = engine, {}

        def set_input_shape(self, name, shape):
            self.shape = shape
            return shape[0] <= largest_batch

        def get_tensor_shape(self, name): return (self.shape[0], *self.engine.io[name].shape[1:])
        def set_tensor_address(self, name, address): self.address[name] = address
        def execute_async_v3(self, stream):
            pixels = memory.blocks[self.address['input']].view(np.float32)
            pixels = pixels[:int(np.prod(self.shape))].reshape(self.shape)
            for o, a in zip(self.engine.session.get_outputs(), self.engine.session.run(None, {'input': pixels})):
                memory.upload(self.address[o.name], a)
            return True

    class Logger:
        ERROR = 2
        def __init__(self, level): pass

    class Runtime:
        def __init__(self, logger): pass
        def deserialize_cuda_engine(self, data): return None if data.startswith(b'old') else Engine(data)

    return SimpleNamespace(__version__='10.9', Logger=Logger, Runtime=Runtime, nptype=lambda t: t,
                           init_libnvinfer_plugins=lambda *a: None)


@pytest.mark.parametrize('end', [lambda r: r, add_onnx_nms])
def test_an_engine_gives_the_detections_of_its_onnx_file(tmp_path, monkeypatch, end):
    "All of TrtDetector except the GPU: batches, memory, shapes, decoding."
    proto, memory = end(toy_onnx_model()), HostMemory()
    monkeypatch.setattr(runtime, 'import_tensorrt', lambda: tensorrt_on_onnxruntime(memory, 3))
    (tmp_path/'a.engine').write_bytes(proto.SerializeToString())
    (tmp_path/'a.engine.json').write_text(json.dumps(get_metadata(proto) | dict(max_batch_size=3)))
    engine, onnx_file = TrtDetector(tmp_path/'a.engine', memory), OnnxDetector(proto.SerializeToString())
    images = noise_images(7)
    for n in (1, 7, 2): assert_same(engine(images[:n]), onnx_file(images[:n]), 0)
    assert len(memory.blocks) == len(engine.tensor_names)       # memory is kept from call to call,
    assert memory.freed                                         # and replaced when it is too small
    is_free = get_metadata(proto)['nms']['kind'] == 'none'
    assert engine.suppresses_itself == onnx_file.suppresses_itself == (not is_free)
    if is_free:                                                 # so any kind of suppression can be chosen
        for detector in (engine, onnx_file): detector.set_nms_options(method='gaussian', score_threshold=0.)
        assert_same(engine(images[:2]), onnx_file(images[:2]), 0)
    (tmp_path/'b.engine').write_bytes(b'old')
    (tmp_path/'b.engine.json').write_text(json.dumps(get_metadata(proto)))
    with pytest.raises(ValueError, match='build it again here'): TrtDetector(tmp_path/'b.engine', memory)


def test_without_tensorrt_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    (tmp_path/'a.engine').write_bytes(b'ftrt')
    (tmp_path/'a.engine.json').write_text(json.dumps(get_metadata(toy_onnx_model())))
    with pytest.raises(ImportError, match=r'pip install "effdet_nb\[trt\]"') as e: load_detector(tmp_path/'a.engine')
    assert '\n' not in str(e.value)


def test_cuda_calls_have_the_right_arguments(monkeypatch):
    "The calls, against a library that records them."
    calls = []

    class RecordingLibrary:
        def __getattr__(self, name):
            def call(*args):
                calls.append((name, [getattr(x, 'value', x) for x in args]))
                return 0
            return call

    memory = CudaMemory.__new__(CudaMemory)
    memory.lib = RecordingLibrary()
    a = np.zeros(5, np.float32)
    memory.allocate(20)
    memory.upload(99, a)
    memory.download(99, a)
    memory.free(99)
    assert [c[0] for c in calls] == ['cudaMalloc', 'cudaMemcpy', 'cudaMemcpy', 'cudaFree']
    assert calls[1][1] == [99, a.ctypes.data, 20, 1] and calls[2][1] == [a.ctypes.data, 99, 20, 2]
    assert calls[3][1] == [99]
    monkeypatch.setattr(memory, 'lib', SimpleNamespace(cudaMalloc=lambda *a: 2), raising=False)
    with pytest.raises(RuntimeError, match='error 2'): memory.allocate(8)


def test_an_image_file_of_any_size_gives_boxes_in_its_own_pixels(tmp_path):
    from PIL import Image
    save_etlt(tmp_path/'model.etlt', add_trt_nms(toy_onnx_model()).SerializeToString(), 'k')
    Image.new('RGB', (256, 200), (90, 20, 20)).save(tmp_path/'street.jpg')
    det = load_detector(tmp_path/'model.etlt', key='k')
    d = det(str(tmp_path/'street.jpg'))
    assert d.show().get_images()[0].get_array().shape == (200, 256, 3)
    assert len(d) and (d.boxes >= 0).all() and d.boxes[:, [0, 2]].max() <= 200 and d.boxes[:, 2:].max() > 128
    assert set(d.class_names) <= {'thing 1', 'thing 2'} and d.scores.min() >= .5
    assert len(det(tmp_path/'street.jpg', threshold=.97)) < len(d)
    assert len(d.to_coco(4)) == len(d.to_kitti().splitlines()) == len(d) and d.to_coco(4)[0]['image_id'] == 4
    assert all(len(line.split()) == 16 for line in d.to_kitti().splitlines())
    assert json.loads(json.dumps(d.to_coco())) == d.to_coco()
    assert not np.array_equal(d.draw(), np.asarray(Image.open(tmp_path/'street.jpg'))) and d[:0].to_kitti() == ''


def test_to_pandas_without_pandas_says_what_to_install(monkeypatch):
    from effdet_nb.detector.detections import Detections
    monkeypatch.setitem(sys.modules, 'pandas', None)
    with pytest.raises(ImportError, match='pip install pandas'): Detections([], [], []).to_pandas()
    monkeypatch.setitem(sys.modules, 'pandas', SimpleNamespace(DataFrame=dict))
    table = Detections([[1, 2, 3, 4]], [.5], [1]).to_pandas()
    assert list(table) == ['name', 'id', 'score', 'y1', 'x1', 'y2', 'x2']
    assert table['x2'].tolist() == [4] and table['id'] == [2]


def test_anchors_of_a_file_without_ending_disturb_nobody():
    from effdet_nb.export.onnx_nms import add_anchors_output
    images = noise_images(3)
    assert_same(OnnxDetector(add_anchors_output(toy_onnx_model()).SerializeToString())(images),
         OnnxDetector(toy_onnx_model().SerializeToString())(images), 0)
