"What is written for DeepStream agrees with its file, and the output parser reads what the graph returns."
import configparser
import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from effdet_nb.detector.boxes import clip_boxes
from effdet_nb.export.deepstream import labels_text, nvinfer_config, readme_text, write_deepstream
from effdet_nb.export.metadata import get_metadata
from effdet_nb.export.onnx_nms import NMS_OUTPUTS, add_onnx_nms, add_trt_nms
from onnx_toy import noise_images, run_onnxruntime, toy_onnx_model

# the part of DeepStream's headers that the parser uses, as NVIDIA documents it
HEADER = r'''
#include <vector>
struct NvDsInferDims { unsigned int numDims; unsigned int d[8]; unsigned int numElements; };
struct NvDsInferLayerInfo {
    int dataType; NvDsInferDims inferDims; int bindingIndex; const char *layerName; void *buffer; int isInput; };
struct NvDsInferNetworkInfo { unsigned int width, height, channels; };
struct NvDsInferParseDetectionParams {
    unsigned int numClassesConfigured; std::vector<float> perClassPreclusterThreshold, perClassPostclusterThreshold; };
struct NvDsInferObjectDetectionInfo {
    unsigned int classId; float left, top, width, height, detectionConfidence, rotation_angle; };
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(f)
'''
CALLER = r'''
#include "nvdsinfer_effdet_nb.cpp"
extern "C" int call(int *n, float *boxes, float *scores, int *channels, unsigned w, unsigned h, unsigned classes,
                    float threshold, float *out) {
    auto layer = [](const char *name, void *buffer) {
        NvDsInferLayerInfo l{}; l.layerName = name; l.buffer = buffer; return l; };
    std::vector<NvDsInferLayerInfo> layers{layer("detection_scores", scores), layer("num_detections", n),
                                           layer("detection_classes", channels), layer("detection_boxes", boxes)};
    NvDsInferParseDetectionParams params{classes, std::vector<float>(classes, threshold), {}};
    std::vector<NvDsInferObjectDetectionInfo> objects;
    if (!NvDsInferParseEffdetNb(layers, NvDsInferNetworkInfo{w, h, 3}, params, objects)) return -1;
    for (auto &o : objects) {
        *out++ = o.classId; *out++ = o.detectionConfidence;
        *out++ = o.left; *out++ = o.top; *out++ = o.width; *out++ = o.height; }
    return objects.size();
}'''


@pytest.mark.parametrize('add_nms', [add_trt_nms, add_onnx_nms])
@pytest.mark.parametrize('batch', ['batch', 4])
def test_the_settings_are_those_of_the_file(tmp_path, add_nms, batch):
    proto, folder = add_nms(toy_onnx_model(image_hw=(128, 256), batch=batch)), tmp_path/'deep'/'er'
    write_deepstream(get_metadata(proto), tmp_path/'a.onnx', folder)
    config = configparser.ConfigParser()
    config.read(folder/'nvinfer_config.txt')
    settings = config['property']
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    channels_first = [str(n) for n in (shape[3], *shape[1:3])]
    assert settings['infer-dims'].split(';') == channels_first and settings['network-input-order'] == '1'
    assert settings['output-blob-names'].split(';') == [o.name for o in proto.graph.output]
    assert settings['onnx-file'] == 'a.onnx' and int(settings['batch-size']) == (4 if batch == 4 else 1)
    default = .5 if add_nms is add_trt_nms else .3
    assert float(config['class-attrs-all']['pre-cluster-threshold']) == default
    labels = (folder/'labels.txt').read_text().splitlines()
    assert int(settings['num-detected-classes']) == 3 and labels == ['thing 1', 'thing 2']
    assert settings['labelfile-path'] == 'labels.txt'
    assert settings['custom-lib-path'] in (folder/'README.md').read_text()
    assert settings['parse-bbox-func-name'] in (folder/'nvdsinfer_effdet_nb.cpp').read_text()


@pytest.mark.parametrize('threshold', [0., .05, .3, .77])
@pytest.mark.parametrize('add_nms', [add_trt_nms, add_onnx_nms])
def test_the_lowest_score_is_the_one_that_was_given(add_nms, threshold):
    meta = get_metadata(add_nms(toy_onnx_model()))
    assert nvinfer_config(meta, 'a.onnx', threshold).endswith(f'pre-cluster-threshold={threshold}\n')


@pytest.mark.parametrize('name, data_type', [('a.etlt', 'fp32'), ('a.onnx', 'int8')])
def test_etlt_and_int8_files_need_an_engine(name, data_type):
    meta = get_metadata(add_trt_nms(toy_onnx_model()))
    text = nvinfer_config(meta | dict(data_type=data_type), name)
    assert 'onnx-file' not in text and 'model-engine-file=a.engine' in text


@pytest.mark.parametrize('channels, color_format', [(3, '0'), (1, '2')])
def test_a_grey_network_gets_grey_frames(channels, color_format):
    meta = get_metadata(add_trt_nms(toy_onnx_model(image_hw=(128, 256))))
    meta['arch']['channels'] = channels
    settings = nvinfer_config(meta, 'a.onnx').splitlines()
    assert f'infer-dims={channels};128;256' in settings and f'model-color-format={color_format}' in settings
    assert f'128 x 256 x {channels} |' in readme_text(meta, 'a.onnx', False)


def pointer(array): return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')
def test_the_output_parser_compiles_and_reads_the_outputs_of_the_graph(tmp_path):
    proto = add_onnx_nms(toy_onnx_model(), score_threshold=.3)
    write_deepstream(get_metadata(proto), 'a.onnx', tmp_path)
    (tmp_path/'nvdsinfer_custom_impl.h').write_text(HEADER)
    (tmp_path/'call.cpp').write_text(CALLER)
    command = ['g++', '-shared', '-fPIC', '-std=c++17', '-Wall', '-Werror', 'call.cpp', '-o', 'call.so']
    subprocess.run(command, cwd=tmp_path, check=True)
    call = ctypes.CDLL(str(tmp_path/'call.so')).call
    outputs = run_onnxruntime(proto, noise_images(1))
    n, boxes, scores, channels = (np.ascontiguousarray(outputs[name][0]) for name in NMS_OUTPUTS)
    objects = np.zeros((len(scores), 6), np.float32)
    pointers = [pointer(a) for a in (n, boxes, scores, channels)]
    num_objects = call(*pointers, 128, 128, 3, ctypes.c_float(.5), pointer(objects))
    expected = []
    for channel, score, (y1, x1, y2, x2) in zip(channels[:n[0]], scores, clip_boxes(boxes, (128, 128))):
        if score >= .5 and y2 > y1 and x2 > x1: expected.append((channel, score, x1, y1, x2-x1, y2-y1))
    assert num_objects == len(expected) > 5
    np.testing.assert_allclose(objects[:num_objects], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name, line', [('car\nred', 'car red'), ('a\r\nb', 'a b'), ('x\u2028y', 'x y'),
                                        ('tab\tname', 'tab name'), ('p;q', 'p,q')])
def test_every_class_is_one_line_of_the_labels(name, line):
    meta = dict(arch=dict(num_classes=4), classes=dict(ids=[1, 3], names=[name, 'last'], num_classes=4))
    assert labels_text(meta)==f'{line}\nid 2\nlast\n'
