"""How far our numbers are from the reference's (google/automl, float32): prints a Markdown table.

    python bench/parity.py FOLDER

FOLDER holds d0_weights.npz, d0_forward_512.npz, anchors_512x512.npz, targets_512.npz, losses_512.npz and
postprocess_small.npz.
"""
import re
import sys
from pathlib import Path

import numpy as np

import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
import tensorflow as tf

from effdet_nb.accel.fast_focal import fast_focal_loss
from effdet_nb.detector.anchors import all_anchors, decode_boxes
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.detector.loss import detection_loss
from effdet_nb.detector.nms import NmsOptions, postprocess
from effdet_nb.detector.targets import assign
from effdet_nb.weights.pretrained import SourceWeights, load_pretrained

LEVELS = range(3, 8)


def max_abs_difference(a, b):
    return float(np.abs(np.asarray(a, 'f8')-np.asarray(b, 'f8')).max())


def max_relative_difference(a, b):
    a, b = np.asarray(a, 'f8'), np.asarray(b, 'f8')
    return float((np.abs(a-b)/np.abs(b)).max())


class Reference:
    "The folder of reference files and the rows of the table."
    def __init__(self, folder):
        self.folder, self.rows = Path(folder), []

    def load(self, name): return np.load(self.folder/name, allow_pickle=False)

    def add_row(self, what, ours, theirs, difference):
        self.rows.append(f'| {what} | {ours} | {theirs} | {difference:.1g} |')


def reference_model(reference):
    "D0 with the reference's weights."
    weights = reference.load('d0_weights.npz')
    arrays = {re.sub('^efficientnet-b0', 'backbone', k.replace('|', '/')): weights[k] for k in weights.files}
    model = build(Arch())
    load_pretrained(model, SourceWeights('d0', 'reference', 'google', arrays), Arch())
    return model


def compare_forward(reference):
    "The outputs of D0 at every level."
    expected = reference.load('d0_forward_512.npz')
    image = expected[next(k for k in expected.files if expected[k].dtype == np.uint8)].reshape(1, 512, 512, 3)
    outputs, start = reference_model(reference)(image), 0
    for level, side, stride in zip(LEVELS, (64, 32, 16, 8, 4), (7, 5, 1, 1, 1)):
        end = start+9*side*side
        for name, key, channels, statistic in (('class', 'cls_logits', 90, 1), ('box', 'box_deltas', 4, 4)):
            ours = np.array(outputs[key])[0, start:end].reshape(1, side, side, 9*channels)
            theirs = expected[f'{name}_{level}']
            difference = max_abs_difference(ours[:, ::stride, ::stride].reshape(theirs.shape), theirs)
            reference.add_row(f'D0 forward, {name} outputs of P{level}, mean absolute value',
                              f'{np.abs(ours).mean():.4f}', f'{expected[f"stats_{level}"][statistic]:.4f}', difference)
        start = end


def compare_anchors(reference):
    "The anchors with both tables of aspect ratios."
    expected = reference.load('anchors_512x512.npz')
    exact = ((1., 1.), (2**.5, 2**-.5), (2**-.5, 2**.5))
    tables = {'1.4 : 0.7': (all_anchors((512, 512)), expected['anchors_ratios_1p4_0p7']),
              '2 : 1': (all_anchors((512, 512), exact), expected['anchors'])}
    for what, (ours, theirs) in tables.items():
        reference.add_row(f'anchors, ratios {what}, last corner', f'{ours[-1, -1]:.4f}', f'{theirs[-1, -1]:.4f}',
                          max_abs_difference(ours, theirs))


def compare_targets(reference):
    "The targets of six images."
    expected = reference.load('targets_512.npz')
    anchors = reference.load('anchors_512x512.npz')['anchors']

    def all_levels(case, kind, width):
        return np.concatenate([expected[f'case{case}_{kind}_targets_{l}'].reshape(-1, width) for l in LEVELS])

    for case in range(6):
        boxes, classes = expected[f'case{case}_gt_boxes_abs_yxyx'], expected[f'case{case}_gt_classes_1based']-1
        cls, box, num_positives = map(np.asarray, assign(anchors, boxes, classes))
        assert (cls == all_levels(case, 'cls', 1)[:, 0]).all()
        reference.add_row(f'targets of case {case}, positives (classes equal everywhere), box targets',
                          int(num_positives), int(expected[f'case{case}_num_positives']),
                          max_abs_difference(box, all_levels(case, 'box', 4)))


def loss_inputs(expected, targets):
    "Logits, deltas and targets of all levels, remade from the recipe in the file."
    levels = []
    for level in LEVELS:
        rng, side = np.random.RandomState(100+level), 512//2**level
        logits = (rng.standard_normal((2, side, side, 810))*1.5-3).astype('f4')
        deltas = (rng.standard_normal((2, side, side, 36))*.3).astype('f4')
        cls = [targets[f'case{c}_cls_targets_{level}'] for c in expected['case_ids']]
        box = [targets[f'case{c}_box_targets_{level}'] for c in expected['case_ids']]
        levels.append((logits.reshape(2, -1, 90), deltas.reshape(2, -1, 4),
                       np.stack(cls).reshape(2, -1).astype('int32'), np.stack(box).reshape(2, -1, 4)))
    return [np.concatenate(parts, 1) for parts in zip(*levels)]


def compare_losses(reference):
    "The losses of two images, and the gradient of 64 logits."
    expected, targets = reference.load('losses_512.npz'), reference.load('targets_512.npz')
    num_positives = np.int32([targets[f'case{c}_num_positives'] for c in expected['case_ids']])
    loss = detection_loss(*loss_inputs(expected, targets), num_positives)
    for what, key, name in (('focal', 'cls', 'focal_ls0_total'), ('Huber', 'box', 'huber_total'),
                            ('total', 'total', 'det_loss_total_ls0')):
        reference.add_row(f'{what} loss (relative)', f'{float(loss[key]):.5f}', f'{float(expected[name]):.5f}',
                          max_relative_difference(loss[key], expected[name]))
    logits = tf.constant(expected['elem_x'][:, None])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = fast_focal_loss(logits, np.where(expected['elem_y'] > 0, 0, -1).astype('int32'))
    ours, theirs = np.array(tape.gradient(total, logits))[:, 0], expected['elem_focal_grad']
    reference.add_row('gradient of the focal loss, sum of 64 (largest difference absolute)', f'{ours.sum():.4f}',
                      f'{theirs.sum():.4f}', max_abs_difference(ours, theirs))


def compare_postprocess(reference):
    "Decoded boxes, and detections after four kinds of suppression."
    expected = reference.load('postprocess_small.npz')
    anchors, num_classes = expected['anchors'], int(expected['num_classes'])

    def all_levels(kind, image, width):
        return np.concatenate([expected[f'{kind}_{l}'][image].reshape(-1, width) for l in LEVELS])

    raw = [(all_levels('class', i, num_classes), all_levels('box', i, 4), anchors) for i in (0, 1)]
    boxes = [decode_boxes(deltas, anchors) for _, deltas, _ in raw]
    difference = max(map(max_abs_difference, boxes, expected['pre_boxes']))
    reference.add_row('decoded boxes, pixels, first corner', f'{boxes[0][0, 0]:.3f}',
                      f'{expected["pre_boxes"][0][0, 0]:.3f}', difference)
    for scope in ('global', 'per_class'):
        for method, threshold in (('hard', 0.), ('gaussian', .001)):
            options = NmsOptions(method, scope == 'per_class', score_threshold=threshold, top_k=0)
            scores = [postprocess(*outputs, options).scores for outputs in raw]
            counts = [int(v) for v in expected[f'{scope}_{method}_valid']]
            theirs = [s[:n] for s, n in zip(expected[f'{scope}_{method}_scores'], counts)]
            reference.add_row(f'{scope} {method} suppression, detections; scores', sum(map(len, scores)), sum(counts),
                              max(map(max_abs_difference, scores, theirs)))


def main():
    reference = Reference(sys.argv[1])
    for compare in (compare_forward, compare_anchors, compare_targets, compare_losses, compare_postprocess):
        compare(reference)
    print('\n'.join(['| what | ours | reference | largest difference |', '|---|--:|--:|--:|', *reference.rows]))


if __name__ == '__main__': main()
