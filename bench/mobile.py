"""AP, size and time of a model as LiteRT and ONNX files, letterboxed and stretched.

    python bench/mobile.py -e spec.txt -m model.best.tlt
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from effdet_nb.app.model_evaluation import set_resize
from effdet_nb.export.export import export
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train.experiment import evaluate_spec
from effdet_nb.train.spec import Spec

FILES = [('model.onnx', 'fp32'), ('model.onnx', 'int8'), ('model.tflite', 'fp32'), ('model.tflite', 'fp16'),
         ('model.tflite', 'int8')]


def milliseconds(path, threads, rounds):
    "The shortest time that a file takes for one image, suppression included."
    detector = load_detector(path, threads=threads)
    image = np.random.default_rng(0).integers(0, 255, (1, *detector.image_hw, 3)).astype(np.uint8)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        detector(image)
        times.append(time.perf_counter()-start)
    return 1000*min(times)


def measure_ap(path, spec, resize):
    "AP of a file on the validation images of a spec, resized in one way."
    detector = load_detector(path)
    set_resize(detector, resize)
    return evaluate_spec(detector, spec)['AP']


def row(path, precision, spec, rounds):
    "One line of the table."
    ap = [f'{measure_ap(path, spec, resize):.3f}' for resize in ('letterbox', 'stretch')]
    speed = [f'{milliseconds(path, threads, rounds):.1f}' for threads in (1, 2)]
    return f"| {' | '.join([path.suffix, precision, *ap, f'{path.stat().st_size/1e6:.1f}', *speed])} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('-e', '--spec', required=True)
    parser.add_argument('-m', '--model', required=True)
    parser.add_argument('--rounds', type=int, default=100)
    args = parser.parse_args()
    spec = Spec.load(args.spec, 'evaluate')
    print('| file | precision | AP letterboxed | AP stretched | MB | ms, 1 thread | ms, 2 threads |')
    print('|---|---|--:|--:|--:|--:|--:|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, precision in FILES:
            path = Path(folder)/precision/name
            export(args.model, path, data_type=precision, batches=100,
                   cal_records=spec.dataset_config.training_file_pattern)
            print(row(path, precision, spec, args.rounds), flush=True)


if __name__ == '__main__': main()
