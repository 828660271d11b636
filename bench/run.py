"""What a training run costs beside its steps: the time until the first one, the wait for images, a checkpoint.

    python bench/run.py [--side 512] [--batch 4] [--steps 8]

D0 on drawn images, by the command line, in a process of its own; then five checkpoints in this process.
"""
import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleave import time_call


def write_toy_records(folder, side, num_images):
    "Writes records of drawn images."
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.detector.toy_data import make_toy_dataset
    shapes = make_toy_dataset(folder/'shapes', num_train=num_images, num_val=1, image_hw=(side, side), seed=0)
    dataset_convert(shapes/'train', shapes/'train.json', folder/'records', 'train', num_shards=2, workers=1)


def spec_text(folder, side, batch, steps): return f'''
model_config {{ model_name: "efficientdet-d0" }}
dataset_config {{
  training_file_pattern: "{folder}/records/train-*" num_classes: 4 image_size: "{side},{side}"
}}
training_config {{
  train_batch_size: {batch} num_examples_per_epoch: {batch*steps} num_epochs: 1 learning_rate: 0.01
  logging_frequency: 1
}}
eval_config {{ eval_after_training: False }}'''


def run_train_command(folder):
    "Runs effdet_train; returns its lines as (seconds since the start, text)."
    command = [Path(sys.executable).with_name('effdet_train'), '-e', folder/'spec.txt', '-d', folder/'run']
    start, lines = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout: lines.append((time.perf_counter()-start, line.strip()))
    if process.returncode: sys.exit(f'effdet_train ended with {process.returncode}: {lines[-1:]}')
    return lines


def time_checkpoints(folder):
    "Median seconds of five checkpoints of a new run, and the megabytes of one."
    import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
    from effdet_nb.train.checkpoints import MetricHistory, save_checkpoint
    from effdet_nb.train.experiment import class_table, resolve_experiment
    from effdet_nb.train.spec import Spec
    from effdet_nb.train.trainer import Trainer
    spec = Spec.load(folder/'spec.txt')
    experiment = resolve_experiment(spec)
    trainer = Trainer(experiment.arch, experiment.training)
    history, classes, path = MetricHistory(trainer.metric_names), class_table(experiment.data), folder/'model.tlt'
    seconds = [time_call(lambda: save_checkpoint(path, trainer, history, classes)) for _ in range(5)]
    return statistics.median(seconds), path.stat().st_size/1e6


def input_wait(lines):
    "What the run says about waiting for images."
    found = [re.search(r'\d+% waiting for input', text) for _, text in lines]
    return next((m[0] for m in reversed(found) if m), 'the run does not say how long it waited for input')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(side=512, batch=4, steps=8).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_toy_records(folder, args.side, args.batch*2)
        (folder/'spec.txt').write_text(spec_text(folder, args.side, args.batch, args.steps))
        lines = run_train_command(folder)
        seconds, megabytes = time_checkpoints(folder)
    times = [t for t, text in lines if re.match(r'step \d', text)]
    step = statistics.median(after-before for before, after in zip(times, times[1:]))
    print('| until | seconds | in steps |\n|---|---|---|')
    print(f'| the first step is done | {times[0]:.1f} | {times[0]/step:.0f} |')
    print(f'| a further step | {step:.2f} | 1 |')
    print(f'| a checkpoint of {megabytes:.0f} MB is written | {seconds:.2f} | {seconds/step:.2f} |')
    print(f'\n{input_wait(lines)}')


if __name__ == '__main__': main()
