"""Answers bench/inference.py from an environment that has effdet: reads lines `way count`, runs them, prints the seconds.

Ways: `effdet` pictures from disk to boxes, `effdet_ort` and `effdet_openvino` the bare forward of effdet's own export,
`ours_openvino` that of our file. The first line on stdin is JSON: folder, pictures, size, classes, ours.
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


def main():
    torch.set_num_threads(2)
    a = json.loads(sys.stdin.readline())
    config = get_efficientdet_config('tf_efficientdet_d0')
    config.num_classes, config.image_size = a['classes'], (a['size'], a['size'])
    net = EfficientDet(config, pretrained_backbone=False).eval()
    bench, resize = DetBenchPredict(net).eval(), ResizePad((a['size'], a['size']), interpolation='bilinear', fill_color=(124, 116, 104))
    mean, std = (torch.tensor(v).view(3, 1, 1)*255 for v in ((.485, .456, .406), (.229, .224, .225)))
    file = Path(a['folder'])/'effdet.onnx'
    pictures, x = a['pictures'], np.random.default_rng(0).random((1, 3, a['size'], a['size']), 'float32')
    with torch.inference_mode(): torch.onnx.export(net, torch.from_numpy(x), str(file), dynamo=False, opset_version=17, input_names=['input'])

    def picture(path):
        image, notes = resize(Image.open(path).convert('RGB'), {})
        pixels = (torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() - mean)/std
        info = dict(img_scale=torch.tensor([notes['img_scale']]), img_size=torch.tensor([[640., 480.]]))
        with torch.inference_mode(): return bench(pixels[None], info).numpy()

    def bare(path, shape):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        feed = {session.get_inputs()[0].name: np.zeros(shape, np.float32)+100}
        return lambda _: session.run(None, feed)

    def openvino(path, shape):
        import openvino
        core = openvino.Core()
        model = core.read_model(str(path))
        model.reshape(list(shape))
        request = core.compile_model(model, 'CPU').create_infer_request()
        feed = np.zeros(shape, np.float32)+100
        return lambda _: request.infer([feed])

    nchw, nhwc = (1, 3, a['size'], a['size']), (1, a['size'], a['size'], 3)
    makers = dict(effdet=lambda: picture, effdet_ort=lambda: bare(file, nchw), effdet_openvino=lambda: openvino(file, nchw), ours_openvino=lambda: openvino(a['ours'], nhwc))
    made = {}
    print('ready', flush=True)
    for line in sys.stdin:
        way, count = line.split()
        try:
            if way not in made: made[way] = makers[way]()
            start = time.perf_counter()
            for i in range(int(count)): made[way](pictures[i % len(pictures)])
            print(time.perf_counter()-start, flush=True)
        except Exception as e: print(f'failed: {type(e).__name__}: {e}'.replace('\n', ' ')[:300], flush=True)


if __name__ == '__main__': main()
