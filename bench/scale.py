"""Memory of converting an annotation file as large as COCO 2017's: 118,287 images, 860,001 annotations with polygons.

    python bench/scale.py [--images 118287] [--annotations 860001] [--masks]

Writes the JSON (450 MB) and a few tiny images that all entries share, converts them, and prints the peak memory of the
process and of its largest worker.
"""
import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

NUM_CLASSES = 80


def random_polygon(rng, x, y, w, h, num_points):
    "A polygon inside a box, as [x1, y1, x2, y2, ...]."
    return [round(v, 2) for _ in range(num_points) for v in (x+rng.random()*w, y+rng.random()*h)]


def image_entry(i, names):
    "One image of the file, with the fields COCO has."
    return dict(license=3, file_name=names[i % len(names)], coco_url=f'images.example/train2017/{i:012d}.jpg',
                height=480, width=640, date_captured='2013-11-14 11:18:45', id=i+1)


def annotation_entry(k, rng, image_id):
    "One annotation of the file, with a random box and polygon."
    w, h = rng.uniform(5, 200), rng.uniform(5, 200)
    x, y = rng.uniform(0, 640-w), rng.uniform(0, 480-h)
    polygon = random_polygon(rng, x, y, w, h, rng.randrange(5, 55))
    return dict(segmentation=[polygon], area=w*h/2, iscrowd=0, image_id=image_id,
                bbox=[round(v, 2) for v in (x, y, w, h)], category_id=k % NUM_CLASSES+1, id=k+1)


def write_entries(file, name, entries):
    "Writes a list of entries one by one, so that the whole is never in memory."
    file.write(f'"{name}": [')
    for i, entry in enumerate(entries): file.write((', ' if i else '') + json.dumps(entry))
    file.write(']')


def write_coco_json(path, num_images, num_annotations, names):
    "Writes a COCO file entry by entry."
    rng = random.Random(0)
    images = (image_entry(i, names) for i in range(num_images))
    annotations = (annotation_entry(k, rng, k*num_images//num_annotations+1) for k in range(num_annotations))
    categories = (dict(id=c+1, name=f'class {c+1}', supercategory='thing') for c in range(NUM_CLASSES))
    with open(path, 'w') as file:
        file.write('{')
        write_entries(file, 'images', images)
        file.write(', ')
        write_entries(file, 'annotations', annotations)
        file.write(', ')
        write_entries(file, 'categories', categories)
        file.write('}')


def peak_gigabytes(who): return resource.getrusage(who).ru_maxrss/2**20


def time_conversion(folder, include_masks, workers):
    "Converts the file; prints seconds and memory."
    from effdet_nb.data.convert import dataset_convert
    start = time.perf_counter()
    summary = dataset_convert(folder/'images', folder/'coco.json', folder/'out', 'train', 256,
                              include_masks=include_masks, workers=workers)
    seconds = time.perf_counter()-start
    process, worker = peak_gigabytes(resource.RUSAGE_SELF), peak_gigabytes(resource.RUSAGE_CHILDREN)
    num_boxes = sum(summary.boxes_by_name.values())
    print(f'{summary.num_images:,} images, {num_boxes:,} boxes{" with masks" if include_masks else ""} in '
          f'{seconds:.0f} s; peak memory {process:.2f} GB, largest worker {worker:.2f} GB, {workers} workers: '
          f'at most {process+workers*worker:.2f} GB together')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=118287)
    parser.add_argument('--annotations', type=int, default=860001)
    parser.add_argument('--masks', action='store_true')
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder/'images').mkdir()
        names = [f'{i:012d}.jpg' for i in range(16)]
        for i, name in enumerate(names):
            Image.new('RGB', (640, 480), (i*10, 90, 120)).save(folder/'images'/name, quality=30)
        write_coco_json(folder/'coco.json', args.images, args.annotations, names)
        print(f'{(folder/"coco.json").stat().st_size/1e6:,.0f} MB of JSON', flush=True)
        time_conversion(folder, args.masks, args.workers)


if __name__ == '__main__': main()
