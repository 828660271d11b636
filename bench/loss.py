"""Focal loss, forward and backward, on the CPU: the textbook formulas against ours, equal to rounding.

    python bench/loss.py [--batch 4] [--rounds 9]
"""
import argparse
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np

import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
import tensorflow as tf
from interleave import print_timings, time_interleaved

from effdet_nb.accel.fast_focal import fast_focal_loss
from effdet_nb.detector.loss import sigmoid_focal_loss

ALPHA, GAMMA = .25, 1.5
NUM_ANCHORS, NUM_CLASSES = 49_104, 90


def textbook_focal_loss(logits, targets):
    "One-hot labels, probabilities, a power, and TensorFlow's cross-entropy."
    labels = tf.one_hot(targets, logits.shape[-1])
    p = tf.sigmoid(logits)
    p_true = labels*p + (1-labels)*(1-p)
    weight = labels*ALPHA + (1-labels)*(1-ALPHA)
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return tf.reduce_sum(weight * (1-p_true)**GAMMA * cross_entropy)


def elementwise_focal_loss(logits, targets):
    return tf.reduce_sum(sigmoid_focal_loss(logits, tf.one_hot(targets, logits.shape[-1]), ALPHA, GAMMA))


def package_focal_loss(logits, targets): return fast_focal_loss(logits, targets, ALPHA, GAMMA)


def with_gradient(loss):
    "A compiled function for a loss and its gradient."
    @tf.function
    def loss_and_gradient(logits, targets):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            total = loss(logits, targets)
        return total, tape.gradient(total, logits)
    return loss_and_gradient


def random_batch(batch_size):
    "Logits and class targets; two anchors in a thousand are positive."
    rng = np.random.default_rng(0)
    shape = (batch_size, NUM_ANCHORS)
    logits = rng.standard_normal((*shape, NUM_CLASSES), 'float32')*1.5 - 3
    targets = np.where(rng.random(shape) < .002, rng.integers(0, NUM_CLASSES, shape), -1)
    return tf.constant(logits), tf.constant(targets, tf.int32)


def check_agreement(variants, logits, targets):
    "Checks that all variants give the same loss and gradient."
    expected, expected_gradient = variants['textbook'](logits, targets)
    for name, variant in variants.items():
        total, gradient = variant(logits, targets)
        difference = float(tf.reduce_max(abs(gradient-expected_gradient)))
        assert abs(float(total/expected)-1) < 1e-5 and difference < 1e-5, f'{name} differs from the textbook'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()
    logits, targets = random_batch(args.batch)
    losses = {'textbook': textbook_focal_loss, 'elementwise': elementwise_focal_loss, 'ours': package_focal_loss}
    variants = {name: with_gradient(loss) for name, loss in losses.items()}
    check_agreement(variants, logits, targets)
    print(f'{args.batch} x 49,104 x 90 logits, tensorflow {tf.__version__}, {os.cpu_count()} cores')
    def waits(variant): return lambda: variant(logits, targets)[1][0, 0, 0].numpy()
    seconds = time_interleaved({name: waits(variant) for name, variant in variants.items()}, args.rounds)
    print_timings('forward and backward', seconds, 'textbook')


if __name__ == '__main__': main()
