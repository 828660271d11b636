"""Conversion beside copying the same files with `cp`, and masks beside the obvious way (decode each mask, trace it with scikit-image).

    python bench/convert.py --data FOLDER [--files 16000] [--rounds 3]

FOLDER holds `bccd/` and `coco_mini/`, each with images/ and train.json. Masks need an interpreter with scikit-image and pycocotools
(pip install scikit-image pycocotools pillow), given by --peer or the environment variable PEER_PYTHON; without one they are left out.
"""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from effdet_nb.data.convert import dataset_convert
from time_interleaved import time_interleaved, print_timings

PEER_SCRIPT = r'''
import io, json, sys, time
import numpy as np
from PIL import Image
from pycocotools import mask as M
from skimage.measure import find_contours
images = json.load(open(sys.argv[1]))
start, outside, count = time.perf_counter(), 0, 0
for h, w, annotations in images:
    for bbox, s in annotations:
        rle = M.merge(M.frPyObjects(s, h, w)) if isinstance(s, list) else M.frPyObjects(s, h, w) if isinstance(s['counts'], list) else s
        pixels = M.decode(rle)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, 'PNG')
        x, y, bw, bh = bbox
        for c in find_contours(pixels, .5):
            if c[:, 0].min() < y-1 or c[:, 1].min() < x-1 or c[:, 0].max() > y+bh+1 or c[:, 1].max() > x+bw+1: outside += 1; break
        count += 1
print(json.dumps(dict(seconds=time.perf_counter()-start, masks=count, outside=outside)))
'''


def repeat_dataset(source, target, files):
    "Copies a data set until it has so many pictures; returns its COCO file."
    data = json.loads((source/'train.json').read_text())
    by_image = {i['id']: [] for i in data['images']}
    for a in data['annotations']: by_image[a['image_id']].append(a)
    images, annotations = [], []
    (target/'images').mkdir(parents=True)
    for k in range(files):
        info = data['images'][k % len(data['images'])]
        name = f'{k:06d}{Path(info["file_name"]).suffix}'
        shutil.copyfile(source/'images'/info['file_name'], target/'images'/name)
        images.append(dict(info, id=k+1, file_name=name))
        annotations += [dict(a, id=len(annotations)+n, image_id=k+1) for n, a in enumerate(by_image[info['id']])]
    (target/'all.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=data['categories'])))
    return target/'all.json'


def compare_with_cp(source, files, rounds):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        annotations = repeat_dataset(source, folder/'in', files)
        size = sum(p.stat().st_size for p in (folder/'in'/'images').iterdir())

        def cp():
            shutil.rmtree(folder/'cp', ignore_errors=True)
            subprocess.run(['cp', '-r', folder/'in'/'images', folder/'cp'], check=True)

        def convert(workers=None):
            shutil.rmtree(folder/'out', ignore_errors=True)
            dataset_convert(folder/'in'/'images', annotations, folder/'out', 'all', 256, workers=workers)
        print(f'{files:,} files of {size/files/1024:.0f} kB on average, {os.cpu_count()} cores')
        print_timings('copying or converting', time_interleaved({'cp -r': cp, 'dataset_convert': convert}, rounds, 1), 'cp -r')


def compare_with_find_contours(source, peer, repeats):
    import time
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        annotations = repeat_dataset(source, folder/'in', repeats)
        data = json.loads(annotations.read_text())
        by_image = {i['id']: [] for i in data['images']}
        for a in data['annotations']: by_image[a['image_id']].append((a['bbox'], a['segmentation']))
        (folder/'masks.json').write_text(json.dumps([(i['height'], i['width'], by_image[i['id']]) for i in data['images']]))
        ratios = []
        for _ in range(3):
            theirs = json.loads(subprocess.run([peer, '-c', PEER_SCRIPT, folder/'masks.json'], capture_output=True, text=True, check=True).stdout)
            seconds = {}
            for masks in (False, True):
                start = time.perf_counter()
                summary = dataset_convert(folder/'in'/'images', annotations, folder/f'out{masks}', 'all', 4, include_masks=masks, workers=1)
                seconds[masks] = time.perf_counter()-start
            ratios.append((theirs['seconds']/(seconds[True]-seconds[False]), theirs['seconds']/seconds[True]))
            print(f'{theirs["masks"]:,} masks: contours {theirs["seconds"]:.2f} s ({theirs["outside"]} outside); ours {seconds[True]-seconds[False]:.2f} s ({len(summary.masks_outside_box)} outside), '
                  f'whole conversion {seconds[True]:.2f} s')
        print('masks are {:.1f} times as fast as contours, one process each; the whole conversion, pictures included, {:.1f} times'.format(*(sorted(r)[1] for r in zip(*ratios))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(__file__).resolve().parents[2]/'shared'/'data')
    parser.add_argument('--files', type=int, default=16000)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    parser.add_argument('--skip', nargs='*', default=[], choices=['cp', 'masks'])
    args = parser.parse_args()
    if 'cp' not in args.skip: compare_with_cp(args.data/'bccd', args.files, args.rounds)
    if 'masks' in args.skip: return
    if args.peer: compare_with_find_contours(args.data/'coco_mini', args.peer, 70)
    else: print('masks: no --peer or PEER_PYTHON, see --help')


if __name__ == '__main__': main()
