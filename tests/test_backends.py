"The model and its losses are pure Keras: another backend gives the same numbers, and gradients."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effdet_nb.detector.loss import detection_loss
from effdet_nb.detector.targets import assign
from effdet_nb.weights.model_file import weights_by_path
from effdet_nb.detector.efficientdet import Arch, arch_anchors, build

HW = (133, 160)     # odd on purpose: padding and nearest neighbours are where backends part


def other_python(backend):
    "An interpreter that can import Keras and a backend: this one, or that of the environment variable PEER_PYTHON."
    for python in filter(None, (os.environ.get('PEER_PYTHON'), sys.executable)):
        env = os.environ | {'KERAS_BACKEND': backend, 'PYTHONPATH': str(Path(__file__).resolve().parents[1])}
        if subprocess.run([python, '-c', f'import {backend}, keras, fastcore'], env=env,
                          capture_output=True).returncode == 0:
            return python, env
    pytest.skip(f'needs {backend}, keras and fastcore, here or in the interpreter that PEER_PYTHON names '
                f'(pip install {backend} keras fastcore)')


CODE = '''
import json, sys
import numpy as np, keras
assert keras.backend.backend() == sys.argv[1] and 'tensorflow' not in sys.modules
from effdet_nb.detector.efficientdet import Arch, arch_anchors, build
from effdet_nb.detector.loss import detection_loss
from effdet_nb.detector.targets import assign
data = np.load(sys.argv[2])
model = build(Arch(sys.argv[3], (133, 160), 3))
for w in model.weights: w.assign(data['w|' + w.path])
out = model(data['image'], training=False)
t = assign(arch_anchors(Arch(sys.argv[3], (133, 160), 3)), data['boxes'], data['classes'])
loss = detection_loss(out['cls_logits'], out['box_deltas'], t[0][None], t[1][None], t[2][None])
grad = float('nan')
if sys.argv[1] == 'torch':
    loss['total'].backward()
    grad = float(model.get_layer('class-predict').bias.value.grad.abs().sum())
cls, box = (keras.ops.convert_to_numpy(out[k]) for k in ('cls_logits', 'box_deltas'))
np.savez(sys.argv[4], cls=cls, box=box, loss=float(loss['total']), grad=grad)
assert 'tensorflow' not in sys.modules
'''


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['torch', 'jax'])
@pytest.mark.parametrize('name', ['efficientdet-d0', 'efficientdet-lite0'])
def test_another_backend_gives_the_same_numbers(backend, name, tmp_path):
    python, env = other_python(backend)
    import tensorflow as tf
    rng, arch = np.random.default_rng(0), Arch(name, HW, 3)
    model = build(arch)
    for w in model.weights:
        if 'moving_mean' in w.path: w.assign(rng.normal(0, .1, w.shape))
        if 'pointwise' in w.path: w.assign(np.array(w)*2)
    image, boxes, classes = rng.integers(0, 256,
                                         (1, *HW, 3)).astype('uint8'), np.float32([[10, 20, 70, 90],
                                                                                   [60, 10, 130, 60]]), np.int32([0, 2])
    t = assign(arch_anchors(arch), boxes, classes)
    with tf.GradientTape() as tape:
        out = model(image, training=False)
        loss = detection_loss(out['cls_logits'], out['box_deltas'], t[0][None], t[1][None], t[2][None])['total']
    grad = np.abs(tape.gradient(loss, model.get_layer('class-predict').bias)).sum()
    np.savez(tmp_path/'in.npz', image=image, boxes=boxes, classes=classes,
             **{'w|'+k: v for k, v in weights_by_path(model).items()})
    (tmp_path/'run.py').write_text(CODE)
    ran = subprocess.run([python, tmp_path/'run.py', backend, tmp_path/'in.npz', name, tmp_path/'out.npz'], env=env,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = np.load(tmp_path/'out.npz')
    np.testing.assert_allclose(theirs['cls'], out['cls_logits'], atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(theirs['box'], out['box_deltas'], atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(theirs['loss'], loss, rtol=1e-4)
    if backend == 'torch': np.testing.assert_allclose(theirs['grad'], grad, rtol=1e-3)
