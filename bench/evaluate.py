"""A whole evaluation beside the bare forward passes of the same network on the same pictures.

Whole: JPEG files to `Metrics` - decode, resize, network, soft-NMS, COCO's numbers. Bare: the network alone, on batches that are ready in memory. What the network needs is the
floor; the ratio says what all the rest adds. Both run in one process, turn by turn, after one round each to build graphs.

    python bench/evaluate.py --images FOLDER --annotations FILE.json                    # EfficientDet-D0 at 512 pixels with random weights
    python bench/evaluate.py --images FOLDER --annotations FILE.json --model model.tlt  # or a file: .tlt, .onnx

Without options it draws 64 pictures of 640 x 480. Random weights see something everywhere, so suppression has as much to do as it can have.
"""
import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from time_interleaved import time_interleaved
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco
from effdet_nb.evaluate.ground_truth import predict_samples, letterbox_sample, samples_from_coco
from effdet_nb.evaluate.evaluate import coco_metrics, evaluate


def draw_toy_images(num):
    "Photograph-sized JPEGs of drawn shapes."
    from PIL import Image
    from effdet_nb.detector.toy_data import make_toy_dataset
    folder = make_toy_dataset(Path(tempfile.mkdtemp())/'shapes', num_train=1, num_val=num, image_hw=(480, 640))
    return folder/'val', folder/'val.json'


def random_detector(classes, size):
    "EfficientDet-D0 as it begins."
    from effdet_nb.detector.predictor import KerasDetector
    from effdet_nb.detector.efficientdet import Arch, build
    import keras
    keras.utils.set_random_seed(0)
    arch = Arch(num_classes=classes.num_classes, image_hw=(size, size))
    return KerasDetector(build(arch), arch, classes)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=Path)
    p.add_argument('--annotations', type=Path)
    p.add_argument('--model')
    p.add_argument('--size', type=int, default=512)
    p.add_argument('--batch_size', type=int, default=8)
    p.add_argument('--num', type=int, default=64, help='pictures; the first of the file')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--parts', action='store_true', help='time the parts one after the other as well')
    a = p.parse_args()
    folder, file = (a.images, a.annotations) if a.images else draw_toy_images(a.num_steps)
    coco = load_coco(file)
    if a.model:
        from effdet_nb.export.runtimes import load_detector
        detector = load_detector(a.model)
    else: detector = random_detector(ClassTable.from_categories(coco.categories), a.size)
    samples = list(islice(samples_from_coco(coco, folder), a.num_steps))
    canvases = [letterbox_sample(s, detector.image_hw)[0].image for s in samples]
    batches = [np.stack(canvases[i:i+a.batch_size]) for i in range(0, len(canvases), a.batch_size)]
    ways = {'bare forward': lambda: [detector.raw(b) for b in batches],
            'whole evaluate': lambda: evaluate(detector, samples, batch_size=a.batch_size)}
    seconds = time_interleaved(ways, rounds=a.rounds, warmup=1)
    ratio = statistics.median(w/b for b, w in zip(seconds['bare forward'], seconds['whole evaluate']))
    print(f'{len(samples)} pictures, {detector.image_hw[0]} x {detector.image_hw[1]}, {type(detector).__name__}, batch {a.batch_size}')
    for name, s in seconds.items(): print(f'{name}: median {statistics.median(s):.2f} s, fastest {min(s):.2f} s')
    print(f'whole / bare: {ratio:.2f} (median of the rounds)')
    if not a.parts: return
    outs, results = [detector.raw(b) for b in batches], list(predict_samples(detector, samples, a.batch_size))
    for name, f in {'decode and resize': lambda: [letterbox_sample(s, detector.image_hw) for s in samples], 'answers (suppression)': lambda: [detector.answers(o) for o in outs],
                    'metric': lambda: coco_metrics(results, detector.classes)}.items():
        start = time.perf_counter()
        f()
        print(f'  {name}: {time.perf_counter()-start:.2f} s alone')


if __name__=='__main__': main()
