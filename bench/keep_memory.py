"""Batch norm and swish, forward and backward, on 4 x 256 x 256 x 48 numbers, with and without keeping freed memory.

    python bench/keep_memory.py
"""
import statistics
import subprocess
import sys
import time

from interleave import median_ratio


def make_pass():
    "A function that does one forward and backward pass."
    import tensorflow as tf
    x = tf.random.normal([4, 256, 256, 48])
    scale = tf.ones([48])

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            norm = tf.raw_ops.FusedBatchNormV3(x=x, scale=scale, offset=scale, mean=[], variance=[], is_training=True)
            y = tf.nn.silu(norm[0])
        return tf.reduce_sum(tape.gradient(y, x))

    return lambda: float(run(x))


def run_worker(enabled):
    "Times one pass for each line on stdin."
    import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
    from effdet_nb.accel.cpu_session import keep_freed_memory
    if enabled and not keep_freed_memory(): sys.exit('the C library of this system has no such switch')
    run = make_pass()
    run()
    while sys.stdin.readline():
        start = time.perf_counter()
        run()
        print(time.perf_counter()-start, flush=True)


def start_worker(name):
    return subprocess.Popen([sys.executable, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)


def time_worker(worker):
    "Seconds of one pass of a worker."
    print(file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def main():
    workers = {name: start_worker(name) for name in ('given back', 'kept')}
    for worker in workers.values(): time_worker(worker)
    seconds = {name: [] for name in workers}
    for _ in range(15):
        for name, worker in workers.items(): seconds[name].append(time_worker(worker))
    for name, mine in seconds.items():
        print(f'{name}: median {1e3*statistics.median(mine):.0f} ms, fastest {1e3*min(mine):.0f} ms')
    ratio = median_ratio(seconds['kept'], seconds['given back'])
    print(f"kept is {ratio:.2f} times as fast (median of the rounds' ratios)")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


if __name__ == '__main__':
    if len(sys.argv) > 1: run_worker(sys.argv[1]=='kept')
    else: main()
