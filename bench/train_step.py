"""One training step of EfficientDet-D0 at 512 pixels, batch 4, beside effdet's (channels_last, float32), turn by turn.

    python bench/train_step.py [--peer PYTHON] [--rounds 9] [--profile]

Both get the same pictures and boxes and do everything from there: targets, forward, losses, backward, clipping, SGD with momentum (ours the moving average too).
The peer runs in a Python of its own, named by --peer or PEER_PYTHON; make one with
    python -m venv peer && peer/bin/pip install torch torchvision effdet==0.4.1
"""
import argparse, os, statistics, subprocess, sys, time

SIDE, BATCH, BOXES, CLASSES = 512, 4, 7, 90


def random_batch():
    "The same pictures and boxes for both: uint8 [4, 512, 512, 3], boxes yxyx [4, 7, 4], channels [4, 7]."
    import numpy as np
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, SIDE/2, (BATCH, BOXES, 2)), rng.uniform(24, SIDE/2, (BATCH, BOXES, 2))
    boxes = np.concatenate([corner, corner+size], -1).astype('float32')
    return rng.integers(0, 255, (BATCH, SIDE, SIDE, 3), np.uint8), boxes, rng.integers(0, CLASSES-1, (BATCH, BOXES)).astype('int32')


def make_package_step():
    "Our step, as a function."
    import effdet_nb   # first: it sets the switches that TensorFlow reads
    import tensorflow as tf
    from effdet_nb.accel.cpu_session import keep_freed_memory
    from effdet_nb.train.trainer import Trainer
    from effdet_nb.detector.targets import assign
    from effdet_nb.detector.efficientdet import arch_anchors
    from effdet_nb.train.experiment import resolve_experiment
    from effdet_nb.train.spec import Spec
    spec = Spec().replace(dataset_config=dict(num_classes=CLASSES, image_size=f'{SIDE},{SIDE}'),
                          training_config=dict(train_batch_size=BATCH, num_examples_per_epoch=400, num_epochs=10, learning_rate=.01))
    keep_freed_memory()           # as `train` does
    experiment = resolve_experiment(spec)
    trainer = Trainer(experiment.arch, experiment.training)
    anchors = tf.constant(arch_anchors(trainer.arch))
    images, boxes, channels = map(tf.constant, random_batch())

    @tf.function
    def targets(): return [assign(anchors, boxes[i], channels[i]) for i in range(BATCH)]

    def step():
        cls, box, num = map(tf.stack, zip(*targets()))
        return float(trainer.train_step(dict(images=images, cls_targets=cls, box_targets=box, num_positives=num))[0])
    return step


def make_effdet_step():
    "The peer's step, as a function."
    import torch
    from make_effdet_step import DetBenchTrain, EfficientDet, get_efficientdet_config
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = get_efficientdet_config('tf_efficientdet_d0')
    bench = DetBenchTrain(EfficientDet(config, pretrained_backbone=False), create_labeler=True).to(memory_format=torch.channels_last).train()
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


def run_worker(who):
    "Takes a step for each line on stdin; answers with seconds, loss and peak memory."
    start = time.perf_counter()
    step = dict(ours=make_package_step, effdet=make_effdet_step)[who]()
    while True:
        loss = step()
        print(f'@ {time.perf_counter()-start} {loss} {peak_memory_mb()}', flush=True)
        if not sys.stdin.readline(): return
        start = time.perf_counter()


class Worker:
    "One of the two in a process of its own."
    def __init__(self, python, who, env=()):
        self.process = subprocess.Popen([python, __file__, '--serve', who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL if who=='ours' else None,
                                        env=os.environ | dict(env) | dict(TF_CPP_MIN_LOG_LEVEL='3', PYTHONWARNINGS='ignore'))
        self.first = self.answer()
    def answer(self):
        for line in self.process.stdout:
            if line.startswith('@'): return [float(v) for v in line.split()[1:]]
        raise SystemExit(f'the process ended with {self.process.wait()}')
    def step(self):
        self.process.stdin.write('\n'); self.process.stdin.flush()
        return self.answer()
    def end(self): self.process.stdin.close(); self.process.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--peer', default=os.environ.get('PEER_PYTHON')); p.add_argument('--rounds', type=int, default=9); p.add_argument('--serve')
    a = p.parse_args()
    if a.serve: return run_worker(a.serve)
    workers = {'ours': Worker(sys.executable, 'ours')}
    if a.peer: workers['effdet'] = Worker(a.peer, 'effdet')
    else: print('no peer: see --help for how to make one')
    for w in workers.values(): w.step()
    rows = {name: [] for name in workers}
    for _ in range(a.rounds):
        for name, w in workers.items(): rows[name].append(w.step())
    print('| who | median s | fastest s | images/s | build and first step s | peak MB |\n|---|---|---|---|---|---|')
    for name, mine in rows.items():
        seconds = [r[0] for r in mine]
        print(f'| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {BATCH/statistics.median(seconds):.2f} | {workers[name].first[0]:.1f} | {mine[-1][2]:.0f} |')
    if 'effdet' in rows: print(f"\nours is {statistics.median(e[0]/o[0] for e,o in zip(rows['effdet'], rows['ours'])):.2f} times as fast (median of the rounds' ratios)")
    for w in workers.values(): w.end()


if __name__ == '__main__': main()
