"""Conversion beside `cp` of the same files; masks beside decoding each mask and tracing it with scikit-image.

    python bench/convert.py --data FOLDER [--files 16000] [--rounds 3]

FOLDER holds `bccd/` and `coco_mini/`, each with images/ and train.json. Masks need a Python with scikit-image and
pycocotools (pip install scikit-image pycocotools pillow), named by --peer or the environment variable PEER_PYTHON;
without one they are left out.
"""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from interleave import print_timings, time_interleaved

from effdet_nb.data.convert import dataset_convert

PEER_SCRIPT = r'''
import io, json, sys, time
from PIL import Image
from pycocotools import mask
from skimage.measure import find_contours

def decode(segmentation, h, w):
    if isinstance(segmentation, list): return mask.decode(mask.merge(mask.frPyObjects(segmentation, h, w)))
    if isinstance(segmentation['counts'], list): segmentation = mask.frPyObjects(segmentation, h, w)
    return mask.decode(segmentation)

def is_outside(contour, box):
    x, y, w, h = box
    (top, left), (bottom, right) = contour.min(0), contour.max(0)
    return top < y-1 or left < x-1 or bottom > y+h+1 or right > x+w+1

start, num_outside, num_masks = time.perf_counter(), 0, 0
for h, w, annotations in json.load(open(sys.argv[1])):
    for box, segmentation in annotations:
        pixels = decode(segmentation, h, w)
        Image.fromarray(pixels).save(io.BytesIO(), 'PNG')
        num_outside += any(is_outside(c, box) for c in find_contours(pixels, .5))
        num_masks += 1
print(json.dumps(dict(seconds=time.perf_counter()-start, masks=num_masks, outside=num_outside)))
'''


def group_annotations(data):
    "The annotations of each image id."
    groups = {image['id']: [] for image in data['images']}
    for annotation in data['annotations']: groups[annotation['image_id']].append(annotation)
    return groups


def repeat_dataset(source, target, num_files):
    "Copies a data set until it has this many images; returns its COCO file."
    data = json.loads((source/'train.json').read_text())
    groups = group_annotations(data)
    images, annotations = [], []
    (target/'images').mkdir(parents=True)
    for k in range(num_files):
        info = data['images'][k % len(data['images'])]
        name = f'{k:06d}{Path(info["file_name"]).suffix}'
        shutil.copyfile(source/'images'/info['file_name'], target/'images'/name)
        images.append(dict(info, id=k+1, file_name=name))
        for annotation in groups[info['id']]: annotations.append(dict(annotation, id=len(annotations), image_id=k+1))
    repeated = dict(images=images, annotations=annotations, categories=data['categories'])
    (target/'all.json').write_text(json.dumps(repeated))
    return target/'all.json'


def compare_with_cp(source, num_files, rounds):
    "Times `cp -r` and a conversion of the same images."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images = folder/'in'/'images'
        annotations = repeat_dataset(source, folder/'in', num_files)
        size = sum(p.stat().st_size for p in images.iterdir())

        def copy():
            shutil.rmtree(folder/'cp', ignore_errors=True)
            subprocess.run(['cp', '-r', images, folder/'cp'], check=True)

        def convert():
            shutil.rmtree(folder/'out', ignore_errors=True)
            dataset_convert(images, annotations, folder/'out', 'all', 256)

        print(f'{num_files:,} files of {size/num_files/1024:.0f} kB on average, {os.cpu_count()} cores')
        seconds = time_interleaved({'cp -r': copy, 'dataset_convert': convert}, rounds, 1)
        print_timings('copying or converting', seconds, 'cp -r')


def write_segmentations(annotations, path):
    "Writes height, width, boxes and segmentations of each image for the peer."
    data = json.loads(annotations.read_text())
    groups = group_annotations(data)
    segmentations = {i: [(a['bbox'], a['segmentation']) for a in group] for i, group in groups.items()}
    path.write_text(json.dumps([(i['height'], i['width'], segmentations[i['id']]) for i in data['images']]))


def run_peer(peer_python, segmentations):
    "Runs the peer once; returns its seconds and counts."
    command = [peer_python, '-c', PEER_SCRIPT, segmentations]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def time_conversion(annotations, out, include_masks):
    "Seconds and summary of a conversion in one process."
    start = time.perf_counter()
    images = annotations.parent/'images'
    summary = dataset_convert(images, annotations, out, 'all', 4, include_masks=include_masks, workers=1)
    return time.perf_counter()-start, summary


def compare_with_find_contours(source, peer_python, num_files, rounds=3):
    "Times masks by scikit-image's contours and by our conversion, one process each."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        annotations = repeat_dataset(source, folder/'in', num_files)
        write_segmentations(annotations, folder/'masks.json')
        mask_ratios, whole_ratios = [], []
        for _ in range(rounds):
            peer = run_peer(peer_python, folder/'masks.json')
            without, _ = time_conversion(annotations, folder/'boxes', False)
            whole, summary = time_conversion(annotations, folder/'masks', True)
            mask_ratios.append(peer['seconds']/(whole-without))
            whole_ratios.append(peer['seconds']/whole)
            print(f'{peer["masks"]:,} masks: contours {peer["seconds"]:.2f} s ({peer["outside"]} outside); '
                  f'ours {whole-without:.2f} s ({len(summary.masks_outside_box)} outside), '
                  f'whole conversion {whole:.2f} s')
        middle = rounds//2
        print(f'masks are {sorted(mask_ratios)[middle]:.1f} times as fast as contours, one process each; '
              f'the whole conversion, images included, {sorted(whole_ratios)[middle]:.1f} times')


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
