"""COCO's numbers: whole arrays (effdet_nb) beside pycocotools and, if it is installed, faster-coco-eval.

Each implementation runs in a process of its own, from arrays to the twelve numbers, so that its memory can be measured.
The numbers must be equal.

    python bench/metric.py                                   # minutes, nearly all of them pycocotools
    python bench/metric.py --images 500 --boxes 3600 --detections 50000
    pip install faster-coco-eval                             # to compare with it as well
"""
import argparse
import contextlib
import importlib.util
import io
import json
import resource
import subprocess
import sys
import time

import numpy as np

from effdet_nb.evaluate.coco_metric import DetectionColumns, GroundTruthColumns, average_precision

NUM_CLASSES = 80


def random_ground_truth(rng, num_images, num_boxes, num_classes):
    "Images with few classes each, boxes of all sizes, one crowd in a hundred."
    frequency = rng.dirichlet(np.full(num_classes, .5))
    image = np.sort(rng.integers(0, num_images, num_boxes))
    favourites = rng.choice(num_classes, (num_images, 3), p=frequency)
    favourite = favourites[image, rng.integers(0, 3, num_boxes)]
    cls = np.where(rng.random(num_boxes)<.8, favourite, rng.choice(num_classes, num_boxes, p=frequency))
    corner = rng.uniform(0, 639, (num_boxes, 2))
    size = np.exp(rng.uniform(np.log(8), np.log(400), (num_boxes, 2)))
    bbox = np.round(np.concatenate([corner, size], 1), 2)
    area = bbox[:, 2]*bbox[:, 3]*rng.uniform(.4, 1, num_boxes)
    return GroundTruthColumns(image, cls, bbox, area, rng.random(num_boxes)<.01)


def random_detections(rng, truth, num_images, num_detections, num_classes):
    "Detections near boxes (six in ten) and anywhere; of those near a box, two in ten have a random class."
    image, cls, bbox = (np.asarray(column) for column in truth[:3])
    i, is_near = rng.integers(0, len(image), num_detections), rng.random(num_detections)<.6
    near = bbox[i]+bbox[i][:, [2, 3, 2, 3]]*rng.normal(0, .15, (num_detections, 4))
    corner, size = rng.uniform(0, 640, (num_detections, 2)), np.exp(rng.uniform(2, 6, (num_detections, 2)))
    box = np.where(is_near[:, None], near, np.concatenate([corner, size], 1))
    box[:, 2:] = np.abs(box[:, 2:])+1
    score = np.round(rng.random(num_detections)**2, 4)
    at = np.where(is_near, image[i], rng.integers(0, num_images, num_detections))
    is_right = is_near & (rng.random(num_detections)<.8)
    label = np.where(is_right, cls[i], rng.choice(num_classes, num_detections))
    order = np.lexsort((-score, at))
    box = box.astype(np.float32).astype(float)
    return DetectionColumns(at[order], label[order], box[order], score[order])


def random_coco_data(num_images, num_boxes, num_detections, num_classes=NUM_CLASSES, seed=0):
    "Random detections and ground truth."
    rng = np.random.default_rng(seed)
    truth = random_ground_truth(rng, num_images, num_boxes, num_classes)
    return random_detections(rng, truth, num_images, num_detections, num_classes), truth


def to_coco_dicts(detections, ground_truth, num_images, num_classes):
    "What the other implementations take: annotations and results as lists of dicts. Making them is not timed."
    boxes = zip(*(column.tolist() for column in ground_truth))
    annotations = [dict(id=n, image_id=i, category_id=k+1, bbox=b, area=a, iscrowd=int(c))
                   for n, (i, k, b, a, c) in enumerate(boxes, 1)]
    truth = dict(images=[dict(id=i) for i in range(num_images)], annotations=annotations,
                 categories=[dict(id=k) for k in range(1, num_classes+1)])
    columns = zip(*(column.tolist() for column in detections))
    return truth, [dict(image_id=i, category_id=k+1, bbox=b, score=s) for i, k, b, s in columns]


def run_cocoeval(coco_class, eval_class, truth, results):
    "The twelve numbers by pycocotools' interface."
    with contextlib.redirect_stdout(io.StringIO()):
        gt = coco_class()
        gt.dataset = truth
        gt.createIndex()
        evaluation = eval_class(gt, gt.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(x) for x in evaluation.stats[:12]]


def run_implementation(implementation, args):
    "Runs one implementation in this process; prints seconds, memory and the numbers as JSON."
    detections, truth = random_coco_data(args.images, args.boxes, args.detections)
    if implementation=='effdet_nb':
        start = time.perf_counter()
        numbers = [float(x) for x in average_precision(detections, truth, NUM_CLASSES)[0]]
    else:
        dicts = to_coco_dicts(detections, truth, args.images, NUM_CLASSES)
        if implementation=='pycocotools':
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        else: from faster_coco_eval import COCO, COCOeval_faster as COCOeval
        start = time.perf_counter()
        numbers = run_cocoeval(COCO, COCOeval, *dicts)
    seconds = time.perf_counter()-start
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
    print(json.dumps(dict(seconds=seconds, megabytes=megabytes, numbers=numbers)))


def run_process(implementation, args):
    "Runs one implementation in a process of its own; returns what it measured."
    sizes = [f'--{name}={getattr(args, name)}' for name in ('images', 'boxes', 'detections')]
    command = [sys.executable, __file__, f'--implementation={implementation}', *sizes]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(images=5000, boxes=36_000, detections=500_000).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--implementation', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.implementation: return run_implementation(args.implementation, args)
    others = ['pycocotools'] + ['faster-coco-eval']*bool(importlib.util.find_spec('faster_coco_eval'))
    measured = {}
    for name in ('effdet_nb', *others, 'effdet_nb'):      # ours first and last: the slower one counts
        result = run_process(name, args)
        if name not in measured or result['seconds']>measured[name]['seconds']: measured[name] = result
    reference = measured['pycocotools']
    for name, result in measured.items():
        np.testing.assert_allclose(result['numbers'], reference['numbers'], rtol=0, atol=1e-9, err_msg=name)
    print(f'{args.images:,} images, {args.boxes:,} boxes, {args.detections:,} detections; '
          f'all twelve numbers equal to 1e-9, AP {reference["numbers"][0]:.6f}\n')
    print('| COCO metric | seconds | of pycocotools | peak memory MB |\n|---|---|---|---|')
    for name, result in measured.items():
        share = reference['seconds']/result['seconds']
        print(f'| {name} | {result["seconds"]:.1f} | 1/{share:.1f} | {result["megabytes"]:.0f} |')


if __name__=='__main__': main()
