"""AP, size and time of a model as LiteRT and ONNX files, letterboxed and stretched.

    python bench/mobile.py -e spec.txt -m model.best.tlt [--folder files] [--no_ap]

The files take turns, so that other programs slow all of them alike; compare the ratios, not the milliseconds.
"""
import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from interleave import median_ratio, time_interleaved

from effdet_nb.app.model_evaluation import set_resize
from effdet_nb.export.export import export
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train.experiment import evaluate_spec
from effdet_nb.train.spec import Spec

FILES = [('model.onnx', 'fp32'), ('model.onnx', 'int8'), ('model.tflite', 'fp32'), ('model.tflite', 'fp16'),
         ('model.tflite', 'int8')]


def exported_files(folder, model, calibration):
    "Exports a model to every file that a folder does not contain yet."
    paths = {}
    for name, precision in FILES:
        path = paths[f'{Path(name).suffix}, {precision}'] = Path(folder)/precision/name
        if not path.is_file(): export(model, path, data_type=precision, batches=100, cal_records=calibration)
    return paths


def print_ap(paths, spec):
    "Prints AP on the validation images of a spec, resized in both ways, and size of each file."
    print('| file | AP letterboxed | AP stretched | MB |\n|---|--:|--:|--:|', flush=True)
    for name, path in paths.items():
        detector, ap = load_detector(path), []
        for resize in ('letterbox', 'stretch'):
            set_resize(detector, resize)
            ap.append(f"{evaluate_spec(detector, spec)['AP']:.3f}")
        print(f"| {name} | {' | '.join(ap)} | {path.stat().st_size/1e6:.1f} |", flush=True)


def print_times(paths, threads, rounds):
    "Prints the time of each file for one image, suppression included, and its ratio to ONNX Runtime in 32 bits."
    detectors = {name: load_detector(path, threads=threads) for name, path in paths.items()}
    hw = next(iter(detectors.values())).image_hw
    image = np.random.default_rng(0).integers(0, 255, (1, *hw, 3)).astype(np.uint8)
    seconds = time_interleaved({name: partial(detector, image) for name, detector in detectors.items()}, rounds)
    baseline = next(iter(seconds))
    print(f'\n| file, {threads} thread{"s"*(threads > 1)} | median ms | fastest ms | time / that of `{baseline}` |')
    print('|---|--:|--:|--:|')
    for name, times in seconds.items():
        ratio = median_ratio(seconds[baseline], times)
        print(f'| {name} | {1e3*statistics.median(times):.1f} | {1e3*min(times):.1f} | {ratio:.2f} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('-e', '--spec', required=True)
    parser.add_argument('-m', '--model', required=True)
    parser.add_argument('--rounds', type=int, default=100)
    parser.add_argument('--folder', help='keeps the exported files, and uses those that are there already')
    parser.add_argument('--no_ap', action='store_true', help='times only')
    args = parser.parse_args()
    spec = Spec.load(args.spec, 'evaluate')
    with tempfile.TemporaryDirectory() as temporary:
        paths = exported_files(args.folder or temporary, args.model, spec.dataset_config.training_file_pattern)
        if not args.no_ap: print_ap(paths, spec)
        for threads in (1, 2): print_times(paths, threads, args.rounds)


if __name__ == '__main__': main()
