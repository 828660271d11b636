"""Serves bench/inference.py from an environment that has effdet: reads lines `variant count`, prints the seconds.

Variants: `effdet` images from disk to boxes, `effdet_ort` and `effdet_openvino` the bare forward of effdet's own
export, `ours_openvino` that of our file. The first line on stdin is JSON: folder, images, size, num_classes, ours.
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from effdet import DetBenchPredict, EfficientDet, get_efficientdet_config
from effdet.data.transforms import ResizePad
from PIL import Image

MEAN, STD = (torch.tensor(v).view(3, 1, 1)*255 for v in ((.485, .456, .406), (.229, .224, .225)))


def make_network(size, num_classes):
    "effdet's D0 with fresh weights."
    config = get_efficientdet_config('tf_efficientdet_d0')
    config.num_classes, config.image_size = num_classes, (size, size)
    return EfficientDet(config, pretrained_backbone=False).eval()


def export(net, path, size):
    "Exports the bare network."
    x = np.random.default_rng(0).random((1, 3, size, size), 'float32')
    with torch.inference_mode():
        torch.onnx.export(net, torch.from_numpy(x), str(path), dynamo=False, opset_version=17, input_names=['input'])


def disk_to_boxes(net, size):
    "A function from an image file to boxes."
    bench = DetBenchPredict(net).eval()
    resize = ResizePad((size, size), interpolation='bilinear', fill_color=(124, 116, 104))

    def detect(path):
        image, notes = resize(Image.open(path).convert('RGB'), {})
        pixels = (torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() - MEAN)/STD
        info = dict(img_scale=torch.tensor([notes['img_scale']]), img_size=torch.tensor([[640., 480.]]))
        with torch.inference_mode(): return bench(pixels[None], info).numpy()
    return detect


def run_onnxruntime(path, shape):
    "A function that runs a graph on constant pixels in ONNX Runtime."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: np.full(shape, 100, np.float32)}
    return lambda _: session.run(None, feed)


def run_openvino(path, shape):
    "A function that runs a graph on constant pixels in OpenVINO."
    import openvino
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(shape))
    request = core.compile_model(model, 'CPU').create_infer_request()
    feed = np.full(shape, 100, np.float32)
    return lambda _: request.infer([feed])


def main():
    torch.set_num_threads(2)
    setup = json.loads(sys.stdin.readline())
    images, size, file = setup['images'], setup['size'], Path(setup['folder'])/'effdet.onnx'
    net = make_network(size, setup['num_classes'])
    export(net, file, size)
    channels_first, channels_last = (1, 3, size, size), (1, size, size, 3)
    factories = dict(effdet=lambda: disk_to_boxes(net, size),
                     effdet_ort=lambda: run_onnxruntime(file, channels_first),
                     effdet_openvino=lambda: run_openvino(file, channels_first),
                     ours_openvino=lambda: run_openvino(setup['ours'], channels_last))
    variants = {}
    print('ready', flush=True)
    for line in sys.stdin:
        name, count = line.split()
        try:
            if name not in variants: variants[name] = factories[name]()
            start = time.perf_counter()
            for i in range(int(count)): variants[name](images[i % len(images)])
            print(time.perf_counter()-start, flush=True)
        except Exception as e: print(f'failed: {type(e).__name__}: {e}'.replace('\n', ' ')[:300], flush=True)


if __name__ == '__main__': main()
