"""What a training run costs beside its steps: the time until the first one, the wait for pictures, a checkpoint.

    python bench/run.py [--side 512] [--batch 4] [--steps 8]

D0 on drawn pictures, by the command line, in a process of its own; the checkpoint is written five times by `Trainer.save` in another.
"""
import argparse, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path


def write_toy_records(folder, side, count):
    "Drawn pictures as records, and the spec of a run over them."
    import effdet_nb   # first: it sets the switches that TensorFlow reads
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.detector.toy_data import make_toy_dataset
    make_toy_dataset(folder/'shapes', num_train=count, num_val=1, image_hw=(side, side), seed=0)
    dataset_convert(folder/'shapes'/'train', folder/'shapes'/'train.json', folder/'records', 'train', num_shards=2, workers=1)


def spec_text(folder, side, batch, steps):
    return f'''model_config {{ model_name: "efficientdet-d0" }}
dataset_config {{ training_file_pattern: "{folder}/records/train-*" num_classes: 4 image_size: "{side},{side}" }}
training_config {{ train_batch_size: {batch} num_examples_per_epoch: {batch*steps} num_epochs: 1 learning_rate: 0.01 logging_frequency: 1 }}
eval_config {{ eval_after_training: False }}'''


def run_train_command(folder):
    "Runs effdet_train; the seconds at which its lines came, and the lines."
    start, lines = time.perf_counter(), []
    with subprocess.Popen([Path(sys.executable).with_name('effdet_train'), '-e', folder/'spec.txt', '-d', folder/'run'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for line in p.stdout: lines.append((time.perf_counter()-start, line.strip()))
    if p.returncode: raise SystemExit(f'effdet_train ended with {p.returncode}: {lines[-1:]}')
    return lines


def time_checkpoints(folder):
    "Seconds of five checkpoints of a run, and the size of one."
    from effdet_nb.data.classes import ClassTable
    from effdet_nb.train.trainer import Trainer
    import effdet_nb.train.checkpoints
    from effdet_nb.train.experiment import arch_from_spec
    from effdet_nb.train.spec import Spec
    spec = Spec.load(folder/'spec.txt')
    trainer, classes, seconds = Trainer(spec, arch_from_spec(spec)), ClassTable.from_categories([{'id': i, 'name': str(i)} for i in (1,2,3)], 4), []
    for i in range(5):
        start = time.perf_counter()
        path = trainer.save(folder/f'{i}.tlt', classes)
        seconds.append(time.perf_counter()-start)
    return statistics.median(seconds), Path(path).stat().st_size/1e6


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--side', type=int, default=512); p.add_argument('--batch', type=int, default=4); p.add_argument('--steps', type=int, default=8)
    a = p.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_toy_records(folder, a.native_side, a.batch*2)
    (folder/'spec.txt').write_text(spec_text(folder, a.native_side, a.batch, a.num_steps))
    lines = run_train_command(folder)
    steps = [t for t,line in lines if re.match(r'step \d', line)]
    step = statistics.median(b-a for a,b in zip(steps, steps[1:]))
    wait = next((m[1] for _,line in reversed(lines) if (m := re.search(r'(\d+% waiting for input)', line))), 'not said')
    saving, mb = time_checkpoints(folder)
    print(f'| until | seconds | in steps |\n|---|---|---|\n| the first step is done | {steps[0]:.1f} | {steps[0]/step:.0f} |\n| a further step | {step:.2f} | 1 |\n| a checkpoint of {mb:.0f} MB is written | {saving:.2f} | {saving/step:.2f} |\n\n{wait}')


if __name__ == '__main__': main()
