"What is written for DeepStream agrees with the file it is written for, and the reader of outputs reads what the graph answers."
import configparser
import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from effdet_nb.export.deepstream import nvinfer_config, write_deepstream
from effdet_nb.export.onnx_graph import get_metadata
from effdet_nb.export.onnx_nms import add_onnx_nms, add_trt_nms
from onnx_toy import run_onnxruntime, noise_images, toy_onnx_model

# the part of DeepStream's headers that the reader uses, as NVIDIA documents it
HEADER = r'''
#include <vector>
struct NvDsInferDims { unsigned int numDims; unsigned int d[8]; unsigned int numElements; };
struct NvDsInferLayerInfo { int dataType; NvDsInferDims inferDims; int bindingIndex; const char *layerName; void *buffer; int isInput; };
struct NvDsInferNetworkInfo { unsigned int width, height, channels; };
struct NvDsInferParseDetectionParams { unsigned int numClassesConfigured; std::vector<float> perClassPreclusterThreshold, perClassPostclusterThreshold; };
struct NvDsInferObjectDetectionInfo { unsigned int classId; float left, top, width, height, detectionConfidence, rotation_angle; };
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(f)
'''
CALLER = r'''
#include "nvdsinfer_effdet_nb.cpp"
extern "C" int call(int *n, float *boxes, float *scores, int *channels, unsigned w, unsigned h, unsigned classes, float threshold, float *out) {
    auto layer = [](const char *name, void *buffer) { NvDsInferLayerInfo l{}; l.layerName = name; l.buffer = buffer; return l; };
    std::vector<NvDsInferLayerInfo> layers{layer("detection_scores", scores), layer("num_detections", n), layer("detection_classes", channels), layer("detection_boxes", boxes)};
    NvDsInferParseDetectionParams params{classes, std::vector<float>(classes, threshold), {}};
    std::vector<NvDsInferObjectDetectionInfo> objects;
    if (!NvDsInferParseEffdetNb(layers, NvDsInferNetworkInfo{w, h, 3}, params, objects)) return -1;
    for (auto &o : objects) { *out++ = o.classId; *out++ = o.detectionConfidence; *out++ = o.left; *out++ = o.top; *out++ = o.width; *out++ = o.height; }
    return objects.size();
}'''


@pytest.mark.parametrize('end', [add_trt_nms, add_onnx_nms])
@pytest.mark.parametrize('batch', ['batch', 4])
def test_the_settings_are_those_of_the_file(tmp_path, end, batch):
    proto = end(toy_onnx_model(image_hw=(128, 256), batch=batch))
    write_deepstream(get_metadata(proto), tmp_path/'a.onnx', tmp_path/'deep'/'er')
    said = configparser.ConfigParser()
    said.read(tmp_path/'deep'/'er'/'nvinfer_config.txt')
    p = said['property']
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert p['infer-dims'].split(';') == [str(n) for n in shape[1:]] and p['network-input-order'] == '1'
    assert p['output-blob-names'].split(';') == [o.name for o in proto.graph.output]
    assert p['onnx-file'] == 'a.onnx' and int(p['batch-size']) == (4 if batch == 4 else 1)
    assert float(said['class-attrs-all']['pre-cluster-threshold']) >= get_metadata(proto)['nms']['score_threshold']
    lines = (tmp_path/'deep'/'er'/'labels.txt').read_text().splitlines()
    assert len(lines) == int(p['num-detected-classes']) == 3 and lines[:2] == ['thing 1', 'thing 2']
    assert p['labelfile-path'] == 'labels.txt'
    assert p['custom-lib-path'] in (tmp_path/'deep'/'er'/'README.md').read_text()
    assert p['parse-bbox-func-name'] in (tmp_path/'deep'/'er'/'nvdsinfer_effdet_nb.cpp').read_text()


def test_sealed_and_int8_files_go_by_an_engine():
    meta = get_metadata(add_trt_nms(toy_onnx_model()))
    for name, kind in (('a.etlt', 'fp32'), ('a.onnx', 'int8')):
        text = nvinfer_config(meta | dict(data_type=kind), name)
        assert 'onnx-file' not in text and 'model-engine-file=a.engine' in text


@pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')
def test_the_reader_compiles_and_reads(tmp_path):
    proto = add_onnx_nms(toy_onnx_model(), score_threshold=.3)
    write_deepstream(get_metadata(proto), 'a.onnx', tmp_path)
    (tmp_path/'nvdsinfer_custom_impl.h').write_text(HEADER); (tmp_path/'call.cpp').write_text(CALLER)
    subprocess.run(['g++', '-shared', '-fPIC', '-std=c++17', '-Wall', '-Werror', 'call.cpp', '-o', 'call.so'],
                   cwd=tmp_path, check=True)
    call = ctypes.CDLL(str(tmp_path/'call.so')).call
    out = run_onnxruntime(proto, noise_images(1))
    n, boxes, scores, channels = (np.ascontiguousarray(out[k][0])
                                  for k in ('num_detections', 'detection_boxes', 'detection_scores',
                                            'detection_classes'))
    read, at = np.zeros((len(scores), 6), np.float32), lambda a: a.ctypes.data_as(ctypes.c_void_p)
    found = call(at(n), at(boxes), at(scores), at(channels), 128, 128, 3, ctypes.c_float(.5), at(read))
    seen = np.clip(boxes, 0, 128)
    want = [(c, s, x1, y1, x2-x1, y2-y1) for c, s, (y1, x1, y2, x2) in list(zip(channels, scores, seen))[:int(n[0])]
            if s >= .5 and y2 > y1 and x2 > x1]
    assert found == len(want) > 5
    np.testing.assert_allclose(read[:found], want, rtol=1e-5, atol=1e-4)
