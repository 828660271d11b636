"""One detector, bare and to the boxes: Keras against the exported file in ONNX Runtime, on the CPU.

    python bench/runtime.py [--size 512] [--batch 1] [--classes 90] [--rounds 11]

(Not called onnx.py, which would hide the package of that name from itself.)
"""
import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import onnx
import effdet_nb   # first: it sets the switches that TensorFlow reads
import tensorflow as tf

from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.toy_data import make_toy_image
from effdet_nb.export.onnx_graph import convert_to_onnx
from effdet_nb.export.onnx_nms import add_onnx_nms
from effdet_nb.export.runtimes import OnnxDetector
from effdet_nb.weights.model_file import load_keras_detector, save_detector
from effdet_nb.detector.efficientdet import Arch, build
from time_interleaved import time_interleaved, print_timings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(size=512, batch=1, classes=90, rounds=11).items(): parser.add_argument(f'--{name}', type=int, default=value)
    a = parser.parse_args()
    arch = Arch(image_hw=(a.size, a.size), num_classes=a.classes)
    table = ClassTable.from_categories([dict(id=i, name=f'c{i}') for i in range(1, a.classes)], num_classes=a.classes)
    with tempfile.TemporaryDirectory() as folder:
        save_detector(Path(folder)/'a.tlt', build(arch), arch, table)
        raw, _, _ = convert_to_onnx(Path(folder)/'a.tlt')
        keras_detector = load_keras_detector(Path(folder)/'a.tlt')
    graph = tf.function(lambda x: keras_detector.model(x, training=False))
    bare, final = OnnxDetector(raw.SerializeToString()), OnnxDetector(add_onnx_nms(raw).SerializeToString())
    images = np.stack([make_toy_image(seed=i, image_hw=(a.size, a.size)).image for i in range(a.batch)])
    gap = np.abs(bare.forward(images)['cls_logits']-graph(images)['cls_logits'].numpy()).max()
    assert gap < 1e-3, f'both must say the same, they differ by {gap}'
    print(f'D0 {a.size}x{a.size}, {a.classes} classes, batch {a.batch}, fresh weights; tensorflow {tf.__version__}, onnx {onnx.__version__}, {os.cpu_count()} cores')
    print_timings('network alone', time_interleaved({'Keras': lambda: graph(images)['cls_logits'].numpy(), 'ONNX Runtime': lambda: bare.forward(images)}, a.rounds), 'Keras')
    ways = {'Keras + NumPy NMS': lambda: keras_detector(images), 'ONNX Runtime + NumPy NMS': lambda: bare(images), 'ONNX Runtime, NMS inside': lambda: final(images)}
    print_timings('from pixels to boxes', time_interleaved(ways, a.rounds), 'Keras + NumPy NMS')


if __name__ == '__main__': main()
