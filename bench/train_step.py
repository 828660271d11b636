"""One training step of EfficientDet-D0 at 512 pixels, batch 4, beside effdet's (channels_last, float32), turn by turn.

    python bench/train_step.py [--peer PYTHON] [--rounds 9]

Both get the same images and boxes and do everything from there: targets, forward pass, losses, backward pass, clipping,
SGD with momentum (ours the moving average too). The peer runs in a Python of its own, named by --peer or PEER_PYTHON;
make one with
    python -m venv peer && peer/bin/pip install torch torchvision effdet==0.4.1
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

SIDE, BATCH, BOXES, CLASSES = 512, 4, 7, 90


def random_batch():
    "The same images and boxes for both: uint8 [4, 512, 512, 3], boxes yxyx [4, 7, 4], channels [4, 7]."
    import numpy as np
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, SIDE/2, (BATCH, BOXES, 2)), rng.uniform(24, SIDE/2, (BATCH, BOXES, 2))
    boxes = np.concatenate([corner, corner+size], -1).astype('float32')
    channels = rng.integers(0, CLASSES-1, (BATCH, BOXES)).astype('int32')
    return rng.integers(0, 255, (BATCH, SIDE, SIDE, 3), np.uint8), boxes, channels


def make_trainer():
    "A trainer of D0 with fresh weights."
    from effdet_nb.train.experiment import arch_from_spec, training_plan_from_spec
    from effdet_nb.train.spec import Spec
    from effdet_nb.train.trainer import Trainer
    dataset = dict(num_classes=CLASSES, image_size=f'{SIDE},{SIDE}')
    training = dict(train_batch_size=BATCH, num_examples_per_epoch=400, num_epochs=10, learning_rate=.01)
    spec = Spec().replace(dataset_config=dataset, training_config=training)
    return Trainer(arch_from_spec(spec), training_plan_from_spec(spec))


def make_package_step():
    "Our step, as a function that returns the loss."
    import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
    import tensorflow as tf

    from effdet_nb.accel.cpu_session import keep_freed_memory
    from effdet_nb.detector.efficientdet import arch_anchors
    from effdet_nb.detector.targets import assign
    keep_freed_memory()           # as `train` does
    trainer = make_trainer()
    anchors = tf.constant(arch_anchors(trainer.arch))
    images, boxes, channels = map(tf.constant, random_batch())

    @tf.function
    def targets(): return [assign(anchors, boxes[i], channels[i]) for i in range(BATCH)]

    def step():
        cls, box, num = map(tf.stack, zip(*targets()))
        batch = dict(images=images, cls_targets=cls, box_targets=box, num_positives=num)
        return float(trainer.train_step(batch)[0])
    return step


def make_effdet_step():
    "The peer's step, as a function that returns the loss."
    import torch
    from effdet import DetBenchTrain, EfficientDet, get_efficientdet_config
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = get_efficientdet_config('tf_efficientdet_d0')
    net = EfficientDet(config, pretrained_backbone=False)
    bench = DetBenchTrain(net, create_labeler=True).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(bench.parameters(), lr=.01, momentum=.9)
    images, boxes, channels = random_batch()
    x = ((torch.from_numpy(images).permute(0, 3, 1, 2).float()-120)/58).contiguous(memory_format=torch.channels_last)
    target = dict(bbox=torch.from_numpy(boxes), cls=torch.from_numpy(channels).float()+1)

    def step():
        optimizer.zero_grad()
        loss = bench(x, target)['loss']
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), 10)
        optimizer.step()
        return float(loss)
    return step


def peak_memory_mb():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024


def run_worker(implementation):
    "Takes a step for each line on stdin; prints seconds, loss and peak memory after an @."
    start = time.perf_counter()
    step = dict(ours=make_package_step, effdet=make_effdet_step)[implementation]()
    while True:
        loss = step()
        print(f'@ {time.perf_counter()-start} {loss} {peak_memory_mb()}', flush=True)
        if not sys.stdin.readline(): return
        start = time.perf_counter()


class Worker:
    "One of the two in a process of its own. A result is [seconds, loss, peak MB]; the first one includes building."
    def __init__(self, python, implementation):
        environment = os.environ | dict(TF_CPP_MIN_LOG_LEVEL='3', PYTHONWARNINGS='ignore')
        stderr = subprocess.DEVNULL if implementation=='ours' else None
        self.process = subprocess.Popen([python, __file__, '--serve', implementation], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, stderr=stderr, env=environment)
        self.first_result = self.read_result()

    def read_result(self):
        for line in self.process.stdout:
            if line.startswith('@'): return [float(v) for v in line.split()[1:]]
        return sys.exit(f'the process ended with {self.process.wait()}')

    def step(self):
        print(file=self.process.stdin, flush=True)
        return self.read_result()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def print_table(workers, results):
    print('| who | median s | fastest s | images/s | build and first step s | peak MB |\n|---|---|---|---|---|---|')
    for name, mine in results.items():
        seconds, build, peak_mb = [r[0] for r in mine], workers[name].first_result[0], mine[-1][2]
        median = statistics.median(seconds)
        print(f'| {name} | {median:.2f} | {min(seconds):.2f} | {BATCH/median:.2f} | {build:.1f} | {peak_mb:.0f} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--serve', choices=['ours', 'effdet'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: return run_worker(args.serve)
    workers = {'ours': Worker(sys.executable, 'ours')}
    if args.peer: workers['effdet'] = Worker(args.peer, 'effdet')
    else: print('no peer: see --help for how to make one')
    for worker in workers.values(): worker.step()
    results = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items(): results[name].append(worker.step())
    print_table(workers, results)
    if args.peer:
        ratio = statistics.median(e[0]/o[0] for e, o in zip(results['effdet'], results['ours']))
        print(f"\nours is {ratio:.2f} times as fast (median of the rounds' ratios)")
    for worker in workers.values(): worker.close()


if __name__ == '__main__': main()
