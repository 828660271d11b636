"""Focal loss, forward and backward, on the CPU: the textbook formulas against ours, equal to rounding.

    python bench/loss.py [--batch 4] [--rounds 9]
"""
import argparse
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import effdet_nb   # first: it sets the switches that TensorFlow reads
import tensorflow as tf

from effdet_nb.detector.loss import sigmoid_focal_loss
from effdet_nb.accel.fast_focal import fast_focal_loss
from time_interleaved import time_interleaved, print_timings

ALPHA, GAMMA = .25, 1.5


def textbook_focal_loss(logits, targets):
    "One-hot labels, probabilities, a power, and TensorFlow's cross-entropy."
    labels = tf.one_hot(targets, logits.shape[-1])
    p = tf.sigmoid(logits)
    truth = labels*p + (1-labels)*(1-p)
    weight = labels*ALPHA + (1-labels)*(1-ALPHA)
    return tf.reduce_sum(weight * (1-truth)**GAMMA * tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


def elementwise_focal_loss(logits, targets): return tf.reduce_sum(sigmoid_focal_loss(logits, tf.one_hot(targets, logits.shape[-1]), ALPHA, GAMMA))
def package_focal_loss(logits, targets): return fast_focal_loss(logits, targets, ALPHA, GAMMA)


def with_gradient(loss):
    @tf.function
    def both(logits, targets):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            total = loss(logits, targets)
        return total, tape.gradient(total, logits)
    return both


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=9)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = tf.constant(rng.standard_normal((a.batch, 49_104, 90), 'float32')*1.5 - 3)
    targets = np.where(rng.random((a.batch, 49_104)) < .002, rng.integers(0, 90, (a.batch, 49_104)), -1)
    targets = tf.constant(targets, tf.int32)
    ways = {name: with_gradient(loss) for name, loss in {'textbook': textbook_focal_loss, 'focal_elements': elementwise_focal_loss, 'focal_loss': package_focal_loss}.items()}
    total, slope = ways['textbook'](logits, targets)
    for way in ways.values():
        value, gradient = way(logits, targets)
        assert abs(float(value/total)-1) < 1e-5 and float(tf.reduce_max(abs(gradient-slope))) < 1e-5, 'all ways must agree'
    print(f'{a.batch} x 49,104 x 90 logits, tensorflow {tf.__version__}, {os.cpu_count()} cores')
    print_timings('forward and backward', time_interleaved({name: lambda way=way: way(logits, targets)[1][0, 0, 0].numpy() for name, way in ways.items()}, a.rounds), 'textbook')


if __name__ == '__main__': main()
