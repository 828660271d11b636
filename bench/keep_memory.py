"""Batch norm and swish, forward and backward, on 4 x 256 x 256 x 48 numbers: memory given back to the system after each operation, and memory kept.

    python bench/keep_memory.py
"""
import statistics, subprocess, sys, time


def run_worker(keep):
    "Times one pass for each line on stdin."
    import effdet_nb   # first: it sets the switches that TensorFlow reads
    import tensorflow as tf
    from effdet_nb.accel.cpu_session import keep_freed_memory
    if keep and not keep_freed_memory(): sys.exit('the C library of this system has no such switch')
    x = tf.random.normal([4, 256, 256, 48]); scale = tf.ones([48])

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.silu(tf.raw_ops.FusedBatchNormV3(x=x, scale=scale, offset=scale, mean=[], variance=[], is_training=True)[0])
        return tf.reduce_sum(tape.gradient(y, x))
    float(run(x))
    while sys.stdin.readline():
        start = time.perf_counter()
        float(run(x))
        print(time.perf_counter()-start, flush=True)


def main():
    workers = {name: subprocess.Popen([sys.executable, __file__, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for name in ('given back', 'kept')}
    def once(w): w.stdin.write('\n'); w.stdin.flush(); return float(w.stdout.readline())
    for w in workers.values(): once(w)
    seconds = {name: [] for name in workers}
    for _ in range(15):
        for name, w in workers.items(): seconds[name].append(once(w))
    for name, mine in seconds.items(): print(f'{name}: median {1e3*statistics.median(mine):.0f} ms, fastest {1e3*min(mine):.0f} ms')
    print(f"kept is {statistics.median(a/b for a,b in zip(*seconds.values())):.2f} times as fast (median of the rounds' ratios)")
    for w in workers.values(): w.stdin.close(); w.wait()


if __name__ == '__main__': run_worker(sys.argv[1]=='kept') if len(sys.argv) > 1 else main()
