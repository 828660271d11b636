"""The input pipeline with targets beside the D0 training step it feeds, and beside effdet's loader, at 512 pixels.

    python bench/pipeline.py --data FOLDER [--batches 12]

FOLDER holds `bccd/` with images/ and train.json. effdet's loader (its transforms, collation and anchor labeler as
create_loader combines them, 2 workers; pixels stay bytes in both) needs a Python with it, named by --peer or
PEER_PYTHON: pip install torch torchvision effdet==0.4.1. Without one it is left out.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

BATCH = 8

PEER_SCRIPT = r'''
import json, sys, time
import torch
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
dataset.transform = transforms_coco_train(512, use_prefetcher=True)   # create_loader without its part for GPUs
loader = torch.utils.data.DataLoader(dataset, shuffle=True, batch_size=batch, num_workers=2, drop_last=True,
                                     collate_fn=DetectionFastCollate(anchor_labeler=labeler))

def endless():
    while True: yield from loader

batch_iterator = endless()
next(batch_iterator), next(batch_iterator)
start = time.perf_counter()
for _ in range(batches): next(batch_iterator)
print(json.dumps(batches*batch/(time.perf_counter()-start)))
'''


def spec_text(folder): return f'''
training_config {{ train_batch_size: {BATCH}  num_examples_per_epoch: 205  num_epochs: 10 }}
dataset_config {{ num_classes: 4  image_size: "512,512"  training_file_pattern: "{folder}/train-*" }}
augmentation_config {{ rand_hflip: True }}
model_config {{ model_name: "efficientdet-d0" }}'''


def make_trainer(spec):
    "A trainer with fresh weights, and its batches."
    from effdet_nb.train.experiment import arch_from_spec, data_config_from_spec, training_plan_from_spec
    from effdet_nb.train.trainer import Trainer, training_batches
    trainer = Trainer(arch_from_spec(spec), training_plan_from_spec(spec))
    return trainer, training_batches(trainer, data_config_from_spec(spec))


def images_per_second(function, repeats):
    "How many images a function does a second that does one batch a call."
    start = time.perf_counter()
    for _ in range(repeats): function()
    return BATCH*repeats/(time.perf_counter()-start)


def pipeline_images_per_second(batches, num_batches):
    "Speed of the pipeline alone."
    for _ in range(4): next(batches)
    return images_per_second(lambda: next(batches), num_batches)


def train_step_images_per_second(trainer, batch, num_steps):
    "Speed of the training step on one batch."
    def step(): trainer.train_step(batch).numpy()
    step()
    return images_per_second(step, num_steps)


def peer_images_per_second(peer_python, data, num_batches):
    "Speed of effdet's loader."
    command = [peer_python, '-c', PEER_SCRIPT, data/'images', data/'train.json', str(BATCH), str(num_batches)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode: sys.exit(f'effdet: {out.stderr[-2000:]}')
    return json.loads(out.stdout.splitlines()[-1])


def compare_with_peer(args, data, batches):
    "Times both loaders in turns; returns our speed, the median of the rounds."
    ours, ratios = [], []
    for _ in range(args.rounds):
        ours.append(pipeline_images_per_second(batches, args.batches))
        text = f'input pipeline with targets: {ours[-1]:.1f} images/s'
        if args.peer:
            theirs = peer_images_per_second(args.peer, data, args.batches)
            ratios.append(ours[-1]/theirs)
            text += f'; effdet: {theirs:.1f}, ratio {ratios[-1]:.1f}'
        print(text, flush=True)
    if ratios: print(f'beside effdet: {statistics.median(ratios):.1f} times, the median of {len(ratios)} rounds')
    else: print('effdet: no --peer or PEER_PYTHON, see --help')
    return statistics.median(ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path(__file__).resolve().parents[2]/'shared'/'data')
    parser.add_argument('--batches', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    args = parser.parse_args()
    import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.train.spec import Spec
    data = args.data/'bccd'
    with tempfile.TemporaryDirectory() as folder:
        dataset_convert(data/'images', data/'train.json', folder, 'train', 8)
        trainer, batches = make_trainer(Spec.parse(spec_text(folder)))
        speed = compare_with_peer(args, data, batches)
        if not args.steps: return
        step = train_step_images_per_second(trainer, next(batches), args.steps)
        print(f'D0 training step at 512 pixels, batch {BATCH}: {step:.2f} images/s; '
              f'the pipeline is {speed/step:.1f} times as fast')


if __name__ == '__main__': main()
