"""Target assignment on the CPU: all pairs of 100 padded rows, all pairs of the true number of objects, and only the pairs that can matter; all exact.

    python bench/targets.py [--rounds 15]
"""
import argparse
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import effdet_nb   # first: it sets the switches that TensorFlow reads
import tensorflow as tf

from effdet_nb.accel.grid_targets import anchor_grid, assign_on_grid
from effdet_nb.detector.targets import assign
from effdet_nb.detector.anchors import all_anchors
from time_interleaved import time_interleaved, print_timings


def random_boxes(rng, count):
    "Boxes of 10 to 200 pixels on a 512-pixel image, and their channels."
    centre, half = rng.uniform(20, 490, (count, 2)), np.exp(rng.uniform(np.log(10), np.log(200), (count, 2)))/2
    return np.concatenate([centre-half, centre+half], axis=1).astype('float32'), rng.integers(0, 80, count).astype('int32')


def pad_boxes(boxes, classes, rows=100):
    missing = rows-len(boxes)
    return np.pad(boxes, [(0, missing), (0, 0)], constant_values=-1), np.pad(classes, (0, missing), constant_values=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    rounds = parser.parse_args().rounds
    anchors, rng = all_anchors((512, 512)), np.random.default_rng(0)
    grid = anchor_grid(anchors)
    kinds = tf.TensorSpec([None, 4]), tf.TensorSpec([None], tf.int32)
    run = tf.function(lambda boxes, classes: assign(anchors, boxes, classes), input_signature=kinds)
    print(f'{len(anchors):,} anchors, tensorflow {tf.__version__}, {os.cpu_count()} cores')
    for count in 1, 7, 20, 100:
        boxes, classes = random_boxes(rng, count)
        short, long = [tf.constant(a) for a in (boxes, classes)], [tf.constant(a) for a in pad_boxes(boxes, classes)]
        for a, b in zip(run(*short), run(*long)): assert (a.numpy() == b.numpy()).all(), 'padding must change nothing'
        for a, b in zip(run(*short), assign_on_grid(grid, boxes, classes)): assert np.allclose(a, b, atol=2e-5), 'looking in fewer places must change nothing'
        ways = {'padded to 100 rows': lambda: run(*long), 'true count': lambda: run(*short), 'where objects are (one core)': lambda: assign_on_grid(grid, boxes, classes)}
        print_timings(f'{count} objects', time_interleaved(ways, rounds), 'padded to 100 rows')


if __name__ == '__main__': main()
