"""Memory of converting an annotation file as large as COCO 2017's: 118,287 images, 860,001 annotations with polygons.

    python bench/scale.py [--images 118287] [--annotations 860001] [--masks]

Makes the JSON (450 MB) and a few tiny pictures that all entries share, converts them, and prints the largest memory of the process and of its largest worker.
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


def random_polygon(rng, x, y, w, h, points):
    return [round(v, 2) for _ in range(points) for v in (x+rng.random()*w, y+rng.random()*h)]


def write_coco_json(path, images, annotations, names):
    "Writes annotation by annotation, so that making the file needs no memory of its own."
    rng = random.Random(0)
    with open(path, 'w') as f:
        f.write('{"images": [')
        for i in range(images):
            f.write((', ' if i else '') + json.dumps(dict(license=3, file_name=names[i % len(names)], coco_url=f'images.example/train2017/{i:012d}.jpg', height=480, width=640, date_captured='2013-11-14 11:18:45', id=i+1)))
        f.write('], "annotations": [')
        for k in range(annotations):
            w, h = rng.uniform(5, 200), rng.uniform(5, 200)
            x, y = rng.uniform(0, 640-w), rng.uniform(0, 480-h)
            entry = dict(segmentation=[random_polygon(rng, x, y, w, h, rng.randrange(5, 55))], area=w*h/2, iscrowd=0, image_id=k*images//annotations+1, bbox=[round(v, 2) for v in (x, y, w, h)], category_id=k % 80+1, id=k+1)
            f.write((', ' if k else '') + json.dumps(entry))
        f.write('], "categories": ' + json.dumps([dict(id=c+1, name=f'class {c+1}', supercategory='thing') for c in range(80)]) + '}')


def time_conversion(folder, masks, workers):
    from effdet_nb.data.convert import dataset_convert
    start = time.perf_counter()
    summary = dataset_convert(folder/'images', folder/'coco.json', folder/'out', 'train', 256, include_masks=masks, workers=workers)
    seconds, gb = time.perf_counter()-start, [resource.getrusage(w).ru_maxrss/2**20 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f'{summary.num_images:,} images, {sum(summary.boxes_by_name.values()):,} boxes{" with masks" if masks else ""} in {seconds:.0f} s; peak memory {gb[0]:.2f} GB, largest worker {gb[1]:.2f} GB, {workers} workers: at most {gb[0]+workers*gb[1]:.2f} GB together')


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
        for i, name in enumerate(names): Image.new('RGB', (640, 480), (i*10, 90, 120)).save(folder/'images'/name, quality=30)
        write_coco_json(folder/'coco.json', args.images, args.annotations, names)
        print(f'{(folder/"coco.json").stat().st_size/1e6:,.0f} MB of JSON', flush=True)
        time_conversion(folder, args.masks, args.workers)


if __name__ == '__main__': main()
