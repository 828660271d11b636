"""COCO's numbers: whole arrays (effdet_nb) beside pycocotools and, if it is installed, faster-coco-eval.

Each way runs in a process of its own, from arrays to the twelve numbers, so that its memory can be told. The numbers must be equal.

    python bench/metric.py                                   # 5,000 images, 36,000 boxes, 500,000 detections: some minutes, nearly all of them pycocotools
    python bench/metric.py --images 500 --boxes 3600 --detections 50000
    pip install faster-coco-eval                             # to see it as well
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from effdet_nb.evaluate.coco_metric import DetectionColumns, GroundTruthColumns, average_precision


def random_coco_data(images, boxes, detections, classes=80, seed=0):
    "Pictures with few classes each, boxes of all sizes, one crowd in a hundred; detections near boxes (six in ten) and anywhere."
    r = np.random.default_rng(seed)
    often = r.dirichlet(np.full(classes, .5))
    image = np.sort(r.integers(0, images, boxes))
    favourite = r.choice(classes, (images, 3), p=often)
    cls = np.where(r.random(boxes)<.8, favourite[image, r.integers(0, 3, boxes)], r.choice(classes, boxes, p=often))
    bbox = np.round(np.concatenate([r.uniform(0, 639, (boxes, 2)), np.exp(r.uniform(np.log(8), np.log(400), (boxes, 2)))], 1), 2)
    sought = GroundTruthColumns(image, cls, bbox, bbox[:, 2]*bbox[:, 3]*r.uniform(.4, 1, boxes), r.random(boxes)<.01)
    i, near = r.integers(0, boxes, detections), r.random(detections)<.6
    shaken = bbox[i]+bbox[i][:, [2, 3, 2, 3]]*r.normal(0, .15, (detections, 4))
    box = np.where(near[:, None], shaken, np.concatenate([r.uniform(0, 640, (detections, 2)), np.exp(r.uniform(2, 6, (detections, 2)))], 1))
    box[:, 2:] = np.abs(box[:, 2:])+1
    score = np.round(r.random(detections)**2, 4)
    at, named = np.where(near, image[i], r.integers(0, images, detections)), np.where(near & (r.random(detections)<.8), cls[i], r.choice(classes, detections, p=often))
    order = np.lexsort((-score, at))
    return DetectionColumns(at[order], named[order], box.astype(np.float32).astype(float)[order], score[order]), sought


def to_coco_dicts(found, sought, images, classes):
    "What the other two want: annotations and results as lists of dicts. Making them is not timed."
    truth = dict(images=[dict(id=i) for i in range(images)], categories=[dict(id=k) for k in range(1, classes+1)],
                 annotations=[dict(id=n, image_id=i, category_id=k+1, bbox=b, area=a, iscrowd=int(c)) for n, (i, k, b, a, c) in enumerate(zip(*(o.tolist() for o in sought)), 1)])
    return truth, [dict(image_id=i, category_id=k+1, bbox=b, score=s) for i, k, b, s in zip(*(o.tolist() for o in found))]


def run_implementation(way, args):
    "Runs one way in this process and prints seconds, memory and the numbers as JSON."
    found, sought = random_coco_data(args.images, args.boxes, args.detections)
    if way=='effdet_nb':
        start = time.perf_counter()
        numbers, _ = average_precision(found, sought, 80)
    else:
        truth, results = to_coco_dicts(found, sought, args.images, 80)
        if way=='pycocotools':
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        else: from faster_coco_eval import COCO, COCOeval_faster as COCOeval
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            gt = COCO()
            gt.dataset = truth
            gt.createIndex()
            e = COCOeval(gt, gt.loadRes(results), 'bbox')
            e.evaluate(), e.accumulate(), e.summarize()
        numbers = [float(x) for x in e.stats[:12]]
    print(json.dumps(dict(seconds=time.perf_counter()-start, megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3, numbers=numbers)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('images', 5000), ('boxes', 36_000), ('detections', 500_000)): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--way', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way: return run_implementation(args.way, args)
    ways = ['effdet_nb', 'pycocotools'] + ['faster-coco-eval']*bool(importlib.util.find_spec('faster_coco_eval'))
    size = [f'--{k}={getattr(args, k)}' for k in ('images', 'boxes', 'detections')]
    told = {}
    for way in (*ways, 'effdet_nb'):                             # ours first and last: the slower of the two counts
        out = json.loads(subprocess.run([sys.executable, __file__, f'--way={way}', *size], check=True, capture_output=True, text=True).stdout)
        told[way] = max(told.get(way, out), out, key=lambda o: o['seconds'])
    for way, t in told.items(): np.testing.assert_allclose(t['numbers'], told['pycocotools']['numbers'], rtol=0, atol=1e-9, err_msg=way)
    print(f'{args.images:,} images, {args.boxes:,} boxes, {args.detections:,} detections; all twelve numbers equal to 1e-9, AP {told["pycocotools"]["numbers"][0]:.6f}\n')
    print('| COCO metric | seconds | of pycocotools | peak memory MB |\n|---|---|---|---|')
    for way, t in told.items(): print(f'| {way} | {t["seconds"]:.1f} | 1/{told["pycocotools"]["seconds"]/t["seconds"]:.1f} | {t["megabytes"]:.0f} |')


if __name__=='__main__': main()
