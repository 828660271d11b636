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

import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
import tensorflow as tf
from interleave import print_timings, time_interleaved

from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.detector.toy_data import make_toy_image
from effdet_nb.export.onnx_graph import convert_to_onnx
from effdet_nb.export.onnx_nms import add_onnx_nms
from effdet_nb.export.runtimes import OnnxDetector
from effdet_nb.weights.model_file import load_keras_detector, save_detector


def make_detectors(arch):
    "One set of fresh weights three times: in Keras, exported without suppression, exported with it."
    categories = [dict(id=i, name=f'c{i}') for i in range(1, arch.num_classes)]
    classes = ClassTable.from_categories(categories, num_classes=arch.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'a.tlt'
        save_detector(path, build(arch), arch, classes)
        raw = convert_to_onnx(path)[0]
        keras_detector = load_keras_detector(path)
    return keras_detector, OnnxDetector(raw.SerializeToString()), OnnxDetector(add_onnx_nms(raw).SerializeToString())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(size=512, batch=1, classes=90, rounds=11).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    arch = Arch(image_hw=(args.size, args.size), num_classes=args.classes)
    keras_detector, raw, with_nms = make_detectors(arch)
    graph = tf.function(lambda x: keras_detector.model(x, training=False))
    images = np.stack([make_toy_image(seed=i, image_hw=arch.image_hw).image for i in range(args.batch)])
    def keras_logits(): return graph(images)['cls_logits'].numpy()
    difference = np.abs(raw.forward(images)['cls_logits']-keras_logits()).max()
    assert difference < 1e-3, f'both must give the same logits, they differ by {difference}'
    print(f'D0 {args.size}x{args.size}, {args.classes} classes, batch {args.batch}, fresh weights; '
          f'tensorflow {tf.__version__}, onnx {onnx.__version__}, {os.cpu_count()} cores')
    network = {'Keras': keras_logits, 'ONNX Runtime': lambda: raw.forward(images)}
    print_timings('network alone', time_interleaved(network, args.rounds), 'Keras')
    whole = {'Keras + NumPy NMS': lambda: keras_detector(images), 'ONNX Runtime + NumPy NMS': lambda: raw(images),
             'ONNX Runtime, NMS inside': lambda: with_nms(images)}
    print_timings('from pixels to boxes', time_interleaved(whole, args.rounds), 'Keras + NumPy NMS')


if __name__ == '__main__': main()
