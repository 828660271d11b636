"""How far our numbers are from the reference's (google/automl, float32): prints the table of the detector page.

    python bench/parity.py FOLDER      # FOLDER holds d0_weights.npz, d0_forward_512.npz, anchors_512x512.npz, targets_512.npz, losses_512.npz, postprocess_small.npz
"""
import re
import sys
from pathlib import Path

import numpy as np
import effdet_nb   # first: it sets the switches that TensorFlow reads
import tensorflow as tf

from effdet_nb.detector import loss as L, targets as T
from effdet_nb.accel import fast_focal
from effdet_nb.detector.anchors import all_anchors, decode_boxes
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.detector.nms import NmsOptions, postprocess
from effdet_nb.weights.pretrained import SourceWeights, load_pretrained

folder = Path(sys.argv[1])
load_reference = lambda name: np.load(folder/name, allow_pickle=False)
max_abs_difference = lambda a, b: float(np.abs(np.asarray(a, 'f8')-np.asarray(b, 'f8')).max())
max_relative_difference = lambda a, b: float((np.abs(np.asarray(a, 'f8')-np.asarray(b, 'f8'))/np.abs(np.asarray(b, 'f8'))).max())
rows = []


def add_row(what, ours, reference, difference): rows.append(f'| {what} | {ours} | {reference} | {difference:.1g} |' if difference else f'| {what} | {ours} | {reference} | 0 |')


weights, ref = load_reference('d0_weights.npz'), load_reference('d0_forward_512.npz')
model = build(Arch())
load_pretrained(model, SourceWeights('d0', 'reference', 'google', {re.sub('^efficientnet-b0', 'backbone', k.replace('|', '/')): weights[k] for k in weights.files}), Arch())
image = ref[next(k for k in ref.files if ref[k].dtype == np.uint8)].reshape(1, 512, 512, 3)
out, start = model(image), 0
for level, n, stride in zip(range(3, 8), (64, 32, 16, 8, 4), (7, 5, 1, 1, 1)):
    for name, key, c in (('class', 'cls_logits', 90), ('box', 'box_deltas', 4)):
        ours = np.array(out[key])[0, start:start+9*n*n].reshape(1, n, n, 9*c)
        theirs = ref[f'{name}_{level}']
        add_row(f'D0 forward, {name} outputs of P{level}, mean absolute value', f'{np.abs(ours).mean():.4f}', f'{ref[f"stats_{level}"][1 if name == "class" else 4]:.4f}', max_abs_difference(ours[:, ::stride, ::stride].reshape(theirs.shape), theirs))
    start += 9*n*n

ref = load_reference('anchors_512x512.npz')
exact = ((1., 1.), (2**.5, 2**-.5), (2**-.5, 2**.5))
for what, a, b in (('1.4 : 0.7', all_anchors((512, 512)), ref['anchors_ratios_1p4_0p7']), ('2 : 1', all_anchors((512, 512), exact), ref['anchors'])):
    add_row(f'anchors, ratios {what}, last corner', f'{a[-1, -1]:.4f}', f'{b[-1, -1]:.4f}', max_abs_difference(a, b))

ref, anchors = load_reference('targets_512.npz'), ref['anchors']
for i in range(6):
    part = lambda kind, width: np.concatenate([ref[f'case{i}_{kind}_targets_{l}'].reshape(-1, width) for l in range(3, 8)])
    cls, box, n = map(np.asarray, T.assign(anchors, ref[f'case{i}_gt_boxes_abs_yxyx'], ref[f'case{i}_gt_classes_1based']-1))
    assert (cls == part('cls', 1)[:, 0]).all()
    add_row(f'targets of case {i}, positives (classes equal everywhere), box targets', int(n), int(ref[f'case{i}_num_positives']), max_abs_difference(box, part('box', 4)))

numbers = load_reference('losses_512.npz')
made = []
for level in range(3, 8):
    rng, side = np.random.RandomState(100+level), 512//2**level
    logits, boxes = (rng.standard_normal((2, side, side, 810))*1.5-3).astype('f4'), (rng.standard_normal((2, side, side, 36))*.3).astype('f4')
    part = lambda kind, *shape: np.stack([ref[f'case{c}_{kind}_targets_{level}'] for c in numbers['case_ids']]).reshape(2, -1, *shape)
    made.append((logits.reshape(2, -1, 90), boxes.reshape(2, -1, 4), part('cls').astype('int32'), part('box', 4)))
loss = L.detection_loss(*(np.concatenate(p, 1) for p in zip(*made)), np.int32([ref[f'case{c}_num_positives'] for c in numbers['case_ids']]))
for what, key, theirs in (('focal loss (relative)', 'cls', 'focal_ls0_total'), ('Huber loss (relative)', 'box', 'huber_total'), ('total loss (relative)', 'total', 'det_loss_total_ls0')):
    add_row(what, f'{float(loss[key]):.5f}', f'{float(numbers[theirs]):.5f}', max_relative_difference(loss[key], numbers[theirs]))
x, y = tf.constant(numbers['elem_x'][:, None]), numbers['elem_y']
with tf.GradientTape() as tape:
    tape.watch(x)
    total = fast_focal.fast_focal_loss(x, np.where(y > 0, 0, -1).astype('int32'))
grad = np.array(tape.gradient(total, x))[:, 0]
add_row('gradient of the focal loss, sum of 64 (largest difference absolute)', f'{grad.sum():.4f}', f'{numbers["elem_focal_grad"].sum():.4f}', max_abs_difference(grad, numbers['elem_focal_grad']))

o = load_reference('postprocess_small.npz')
raw = lambda i: (np.concatenate([o[f'class_{l}'][i].reshape(-1, int(o['num_classes'])) for l in range(3, 8)]), np.concatenate([o[f'box_{l}'][i].reshape(-1, 4) for l in range(3, 8)]), o['anchors'])
add_row('decoded boxes, pixels, first corner', f'{decode_boxes(raw(0)[1], raw(0)[2])[0, 0]:.3f}', f'{o["pre_boxes"][0][0, 0]:.3f}', max(max_abs_difference(decode_boxes(raw(i)[1], raw(i)[2]), o['pre_boxes'][i]) for i in (0, 1)))
for scope in ('global', 'per_class'):
    for method, threshold in (('hard', 0.), ('gaussian', .001)):
        found = [postprocess(*raw(i), NmsOptions(method, scope == 'per_class', score_threshold=threshold, top_k=0)) for i in (0, 1)]
        valid = [int(v) for v in o[f'{scope}_{method}_valid']]
        add_row(f'{scope} {method} suppression, detections; scores', sum(map(len, found)), sum(valid), max(max_abs_difference(f.scores, o[f'{scope}_{method}_scores'][i][:valid[i]]) for i, f in enumerate(found)))
print('\n'.join(['| what | ours | reference | largest difference |', '|---|--:|--:|--:|', *rows]))
