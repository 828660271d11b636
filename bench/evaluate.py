"""A whole evaluation beside the bare forward passes of the same network on the same images.

Whole: JPEG files to `Metrics` - decode, resize, network, suppression, COCO's numbers. Bare: the network alone, on
batches that are ready in memory. What the network needs is the floor; the ratio says what the rest adds. Both run in
one process, turn by turn, after one round each to build graphs.

    python bench/evaluate.py --images FOLDER --annotations FILE.json                    # D0, 512 pixels, random weights
    python bench/evaluate.py --images FOLDER --annotations FILE.json --model model.tlt  # or a file: .tlt, .onnx

Without options it draws 64 images of 640 x 480. With random weights every anchor is a candidate, so suppression has as
much to do as it can have.
"""
import argparse
import statistics
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from interleave import median_ratio, time_call, time_interleaved

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco
from effdet_nb.evaluate.evaluate import coco_metrics, evaluate
from effdet_nb.evaluate.ground_truth import samples_from_coco
from effdet_nb.evaluate.predict import resize_sample, predict_samples


def draw_toy_images(num_images):
    "Draws images the size of photographs; returns their folder and COCO file."
    from effdet_nb.detector.toy_data import make_toy_dataset
    folder = make_toy_dataset(Path(tempfile.mkdtemp())/'shapes', num_train=1, num_val=num_images, image_hw=(480, 640))
    return folder/'val', folder/'val.json'


def random_detector(classes, side):
    "EfficientDet-D0 with fresh weights."
    import keras

    from effdet_nb.accel.cpu_session import predict_with_tensorflow
    from effdet_nb.detector.efficientdet import Arch, build
    from effdet_nb.detector.predictor import KerasDetector
    keras.utils.set_random_seed(0)
    arch = Arch(num_classes=classes.num_classes, image_hw=(side, side))
    return KerasDetector(build(arch), arch, classes, predict_fn=predict_with_tensorflow)


def open_detector(model, classes, side):
    "The detector in a file, or a random one."
    if not model: return random_detector(classes, side)
    from effdet_nb.export.runtimes import load_detector
    return load_detector(model)


def make_batches(detector, samples, batch_size):
    "The samples as batches of images of the network's size."
    images = [resize_sample(s, detector.image_hw)[0].image for s in samples]
    return [np.stack(images[i:i+batch_size]) for i in range(0, len(images), batch_size)]


def print_parts(detector, samples, batches, batch_size):
    "Times the parts of an evaluation one after the other."
    outputs = [detector.forward(b) for b in batches]
    results = list(predict_samples(detector, samples, batch_size))
    parts = {'decode and resize': lambda: [resize_sample(s, detector.image_hw, detector.pad_rgb) for s in samples],
             'suppression': lambda: [detector.decode(o) for o in outputs],
             'metric': lambda: coco_metrics(results, detector.classes)}
    for name, part in parts.items(): print(f'  {name}: {time_call(part):.2f} s alone')


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=Path)
    parser.add_argument('--annotations', type=Path)
    parser.add_argument('--model')
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--num', type=int, default=64, help='images; the first of the file')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--parts', action='store_true', help='time the parts one after the other as well')
    return parser.parse_args()


def main():
    args = read_arguments()
    folder, file = (args.images, args.annotations) if args.images else draw_toy_images(args.num)
    coco = load_coco(file)
    detector = open_detector(args.model, ClassTable.from_categories(coco.categories), args.size)
    samples = list(islice(samples_from_coco(coco, folder), args.num))
    batches = make_batches(detector, samples, args.batch_size)
    variants = {'bare forward': lambda: [detector.forward(b) for b in batches],
                'whole evaluate': lambda: evaluate(detector, samples, batch_size=args.batch_size)}
    seconds = time_interleaved(variants, rounds=args.rounds, warmup=1)
    height, width = detector.image_hw
    print(f'{len(samples)} images, {height} x {width}, {type(detector).__name__}, batch {args.batch_size}')
    for name, s in seconds.items(): print(f'{name}: median {statistics.median(s):.2f} s, fastest {min(s):.2f} s')
    ratio = median_ratio(seconds['bare forward'], seconds['whole evaluate'])
    print(f'whole / bare: {ratio:.2f} (median of the rounds)')
    if args.parts: print_parts(detector, samples, batches, args.batch_size)


if __name__=='__main__': main()
