"""Target assignment on the CPU by three exact methods: all pairs, padded or not, and only the pairs that can matter.

    python bench/targets.py [--rounds 15]
"""
import argparse
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np

import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
import tensorflow as tf
from interleave import print_timings, time_interleaved

from effdet_nb.accel.grid_targets import anchor_grid, assign_on_grid
from effdet_nb.detector.anchors import all_anchors
from effdet_nb.detector.targets import assign


def random_boxes(rng, num_boxes):
    "Boxes of 10 to 200 pixels on a 512-pixel image, and their channels."
    centre = rng.uniform(20, 490, (num_boxes, 2))
    half = np.exp(rng.uniform(np.log(10), np.log(200), (num_boxes, 2)))/2
    boxes = np.concatenate([centre-half, centre+half], axis=1)
    return boxes.astype('float32'), rng.integers(0, 80, num_boxes).astype('int32')


def pad_boxes(boxes, classes, max_boxes=100):
    "Boxes and channels with rows of -1 added up to `max_boxes`."
    missing = max_boxes-len(boxes)
    return np.pad(boxes, [(0, missing), (0, 0)], constant_values=-1), np.pad(classes, (0, missing), constant_values=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    rounds = parser.parse_args().rounds
    anchors, rng = all_anchors((512, 512)), np.random.default_rng(0)
    grid = anchor_grid(anchors)
    signature = tf.TensorSpec([None, 4]), tf.TensorSpec([None], tf.int32)
    assign_all = tf.function(lambda boxes, classes: assign(anchors, boxes, classes), input_signature=signature)
    print(f'{len(anchors):,} anchors, tensorflow {tf.__version__}, {os.cpu_count()} cores')
    for num_boxes in 1, 7, 20, 100:
        boxes, classes = random_boxes(rng, num_boxes)
        exact = [tf.constant(a) for a in (boxes, classes)]
        padded = [tf.constant(a) for a in pad_boxes(boxes, classes)]
        expected = assign_all(*exact)
        for a, b in zip(expected, assign_all(*padded)):
            assert (a.numpy() == b.numpy()).all(), 'padding must change nothing'
        for a, b in zip(expected, assign_on_grid(grid, boxes, classes)):
            assert np.allclose(a, b, atol=2e-5), 'looking at fewer pairs must change nothing'
        variants = {'padded to 100 rows': lambda padded=padded: assign_all(*padded),
                    'true count': lambda exact=exact: assign_all(*exact),
                    'on the grid (one core)': lambda boxes=boxes, classes=classes: assign_on_grid(grid, boxes, classes)}
        print_timings(f'{num_boxes} objects', time_interleaved(variants, rounds), 'padded to 100 rows')


if __name__ == '__main__': main()
