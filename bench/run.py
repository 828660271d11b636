"""What a training run costs beside its steps: the time until the first one, the wait for images, a checkpoint.

    python bench/run.py [--side 512] [--batch 4] [--steps 8]

D0 on drawings, by the command line, in a process of its own; a checkpoint is written five times in another.
"""
import argparse, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path


def write_toy_records(folder, side, count):
    "Writes drawings as records."
    import effdet_nb   # first: it sets the switches that TensorFlow reads # noqa: F401
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.detector.toy_data import make_toy_dataset
    make_toy_dataset(folder/'shapes', num_train=count, num_val=1, image_hw=(side, side), seed=0)
    images, annotations = folder/'shapes'/'train', folder/'shapes'/'train.json'
    dataset_convert(images, annotations, folder/'records', 'train', num_shards=2, workers=1)


def spec_text(folder, side, batch, steps):
    "The spec of a run of one epoch over the records of a folder."
    return f'''model_config {{ model_name: "efficientdet-d0" }}
dataset_config {{
  training_file_pattern: "{folder}/records/train-*"
  num_classes: 4
  image_size: "{side},{side}"
}}
training_config {{
  train_batch_size: {batch}
  num_examples_per_epoch: {batch*steps}
  num_epochs: 1
  learning_rate: 0.01
  logging_frequency: 1
}}
eval_config {{ eval_after_training: False }}'''


def run_train_command(folder):
    "Runs effdet_train; returns its lines with the seconds at which they came."
    command = [Path(sys.executable).with_name('effdet_train'), '-e', folder/'spec.txt', '-d', folder/'run']
    start, lines = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout: lines.append((time.perf_counter()-start, line.strip()))
    if process.returncode: raise SystemExit(f'effdet_train ended with {process.returncode}: {lines[-1:]}')
    return lines


def time_checkpoints(folder):
    "Returns the median seconds of five checkpoints of a run, and the megabytes of one."
    from effdet_nb.train.checkpoints import MetricHistory, save_checkpoint
    from effdet_nb.train.experiment import class_table, resolve_experiment
    from effdet_nb.train.spec import Spec
    from effdet_nb.train.trainer import Trainer
    experiment = resolve_experiment(Spec.load(folder/'spec.txt'))
    trainer, classes = Trainer(experiment.arch, experiment.training), class_table(experiment.data)
    history, seconds = MetricHistory(trainer.metric_names), []
    for i in range(5):
        start = time.perf_counter()
        path = save_checkpoint(folder/f'{i}.tlt', trainer, history, classes, spec_text=experiment.spec_text)
        seconds.append(time.perf_counter()-start)
    return statistics.median(seconds), Path(path).stat().st_size/1e6


def input_wait(lines):
    "Returns what the last epoch says about waiting for input."
    for _, line in reversed(lines):
        if match := re.search(r'\d+% waiting for input', line): return match[0]
    return 'the wait for input is not known'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, default=512)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--steps', type=int, default=8)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    write_toy_records(folder, args.side, args.batch*2)
    (folder/'spec.txt').write_text(spec_text(folder, args.side, args.batch, args.steps))
    lines = run_train_command(folder)
    step_times = [seconds for seconds, line in lines if re.match(r'step \d', line)]
    step = statistics.median(b-a for a, b in zip(step_times, step_times[1:]))
    saving, megabytes = time_checkpoints(folder)
    print('| until | seconds | in steps |\n|---|---|---|')
    print(f'| the first logged step is done | {step_times[0]:.1f} | {step_times[0]/step:.0f} |')
    print(f'| a further step | {step:.2f} | 1 |')
    print(f'| a checkpoint of {megabytes:.0f} MB is written | {saving:.2f} | {saving/step:.2f} |')
    print(f'\n{input_wait(lines)}')


if __name__ == '__main__': main()
