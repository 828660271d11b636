"""The input pipeline with targets beside the D0 training step it feeds, and beside effdet's loader, at 512 pixels.

    python bench/pipeline.py --data FOLDER [--batches 12]

FOLDER holds `bccd/` with images/ and train.json. effdet's loader (its transforms, collation and anchor labeler as create_loader combines them, 2 workers; pixels stay bytes in both) needs
an interpreter with it: pip install torch torchvision effdet==0.4.1, given by --peer or PEER_PYTHON; without one it is left out.
"""
import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

PEER_SCRIPT = r'''
import json, sys, time
import torch
from functools import partial
from pathlib import Path
from effdet import get_efficientdet_config
from effdet.data.loader import DetectionFastCollate
from effdet.data.transforms import transforms_coco_train
from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import DetectionDatset
from effdet.data.parsers import create_parser
from effdet.data.parsers.parser_config import CocoParserCfg
images, annotations, batch, batches = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = get_efficientdet_config('tf_efficientdet_d0')
labeler = AnchorLabeler(Anchors.from_config(config), 3, match_threshold=.5)
dataset = DetectionDatset(Path(images), parser=create_parser('coco', cfg=CocoParserCfg(ann_filename=annotations)))
dataset.transform = transforms_coco_train(512, use_prefetcher=True)       # what create_loader does, without the part that needs a GPU
loader = torch.utils.data.DataLoader(dataset, shuffle=True, batch_size=batch, num_workers=2, collate_fn=DetectionFastCollate(anchor_labeler=labeler), drop_last=True)
def endless():
    while True: yield from loader
it = endless()
next(it), next(it)
start = time.perf_counter()
for _ in range(batches): next(it)
print(json.dumps(batches*batch/(time.perf_counter()-start)))
'''


def spec_text(folder): return f'''
training_config {{ train_batch_size: 8  num_examples_per_epoch: 205  num_epochs: 10 }}
dataset_config {{ num_classes: 4  image_size: "512,512"  training_file_pattern: "{folder}/train-*" }}
augmentation_config {{ rand_hflip: True }}
model_config {{ model_name: "efficientdet-d0" }}'''


def pipeline_images_per_second(spec, batches):
    from effdet_nb.data.pipeline import train_dataset
    from effdet_nb.train.experiment import data_config_from_spec
    from effdet_nb.accel.grid_targets import anchor_grid, assign_on_grid
    from effdet_nb.detector.anchors import all_anchors
    config = data_config_from_spec(spec)
    assign_fn = partial(assign_on_grid, anchor_grid(all_anchors(config.image_hw)))
    batch = iter(train_dataset(config, spec.training_config.train_batch_size, assign_fn))
    for _ in range(4): next(batch)
    start = time.perf_counter()
    for _ in range(batches): next(batch)
    return 8*batches/(time.perf_counter()-start)


def train_step_images_per_second(spec, steps):
    from effdet_nb.train.experiment import resolve_experiment
    from effdet_nb.train.trainer import Trainer, training_batches
    experiment = resolve_experiment(spec)
    trainer = Trainer(experiment.arch, experiment.training)
    batch = next(training_batches(trainer, experiment.data))
    import numpy as np
    np.asarray(trainer.train_step(batch))
    start = time.perf_counter()
    for _ in range(steps): np.asarray(trainer.train_step(batch))
    return 8*steps/(time.perf_counter()-start)


def peer_images_per_second(peer, data, batches):
    out = subprocess.run([peer, '-c', PEER_SCRIPT, data/'images', data/'train.json', '8', str(batches)], capture_output=True, text=True)
    if out.returncode: raise SystemExit(f'effdet: {out.stderr[-2000:]}')
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(__file__).resolve().parents[2]/'shared'/'data')
    parser.add_argument('--batches', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    args = parser.parse_args()
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.train.spec import Spec
    with tempfile.TemporaryDirectory() as folder:
        dataset_convert(args.data/'bccd'/'images', args.data/'bccd'/'train.json', folder, 'train', 8)
        spec, rounds = Spec.parse(spec_text(folder)), []
        for _ in range(args.rounds):
            ours, theirs = pipeline_images_per_second(spec, args.batches), peer_images_per_second(args.peer, args.data/'bccd', args.batches) if args.peer else None
            rounds.append((ours, theirs))
            print(f'input pipeline with targets: {ours:.1f} images/s' + (f'; effdet: {theirs:.1f}, ratio {ours/theirs:.1f}' if theirs else ''), flush=True)
        step = train_step_images_per_second(spec, args.num_steps) if args.num_steps else None
        ours = statistics.median(o for o, _ in rounds)
        if step: print(f'D0 training step at 512 pixels, batch 8: {step:.2f} images/s; the pipeline is {ours/step:.1f} times as fast')
        if args.peer: print(f'beside effdet: {statistics.median(o/t for o, t in rounds):.1f} times, the median of {len(rounds)} rounds')
        else: print('effdet: no --peer or PEER_PYTHON, see --help')


if __name__ == '__main__': main()
