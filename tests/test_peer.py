"""Variants and sizes that the reference numbers do not cover, beside a second implementation: effdet on PyTorch.

Random weights are carried over by name; the outputs, and the anchors, must be the same. Run by
`PEER_PYTHON=another/bin/python pytest tests/test_peer.py`, where the other Python has torch and effdet
(pip install torch effdet==0.4.1)."""
import os
import subprocess

import numpy as np
import pytest

from effdet_nb.detector.efficientdet import Arch, arch_anchors, build, pixel_mean_std, get_variant
from effdet_nb.weights.name_map import parse_layer_name

PEER = os.environ.get('PEER_PYTHON')
RATIOS = ((1., 1.), (1.4, .7), (.7, 1.4))     # effdet's

CODE = '''
import sys, numpy as np, torch
from effdet import EfficientDet, get_efficientdet_config
from effdet.anchors import Anchors
data = np.load(sys.argv[1])
config = get_efficientdet_config('tf_' + sys.argv[2].replace('-', '_'))
config.image_size, config.num_classes = tuple(data['image'].shape[1:3]), 3
model = EfficientDet(config, pretrained_backbone=False).eval()
state = {k: v for k, v in model.state_dict().items()}
wanted = {k for k in state if 'num_batches' not in k}
given = {k[2:] for k in data.files if k.startswith('w|')}
assert given == wanted, (sorted(given - wanted)[:5], sorted(wanted - given)[:5])
model.load_state_dict({**state, **{k: torch.from_numpy(data['w|' + k]).reshape(state[k].shape) for k in given}})
with torch.no_grad(): classes, boxes = model(torch.from_numpy(data['image']).permute(0, 3, 1, 2))
def rows(levels, width): return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, width) for x in levels], 1).numpy()
np.savez(sys.argv[3], cls=rows(classes, 3), box=rows(boxes, 4), anchors=Anchors.from_config(config).boxes.numpy())
'''


def names(arch, weights):
    "{our path: effdet's name}."
    blocks, stages = {}, {}
    for w in weights:
        kind, n = parse_layer_name(w.split('/')[0], arch)
        if 'i' in n and 'block' in w: blocks.setdefault(w.split('_')[0], n['second'] == '')
    first, where = dict(blocks), {}
    for b in blocks:
        stage = int(b[5])-1
        where[b], stages[stage] = (stage, stages.get(stage, 0)), stages.get(stage, 0)+1
    leaf = {'kernel': 'weight', 'depthwise_kernel': 'conv_dw.weight', 'pointwise_kernel': 'conv_pw.weight',
            'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var',
            'bias': 'bias'}

    def one(path):
        layer, variable = path.split('/')
        kind, n = parse_layer_name(layer, arch)
        end = leaf.get(variable)
        separable = 'conv_pw.bias' if variable == 'bias' else end
        if layer.startswith('block'):
            b = layer.split('_')[0]
            plain = dict(dwconv='conv_dw', bn='bn1', project_conv='conv_pw', project_bn='bn2')
            full = dict(expand_conv='conv_pw', expand_bn='bn1', dwconv='conv_dw', bn='bn2', project_conv='conv_pwl',
                        project_bn='bn3')
            part = dict(se_reduce='se.conv_reduce', se_expand='se.conv_expand') | (plain if first[b] else full)
            return 'backbone.blocks.{}.{}.'.format(*where[b]) + f'{part[kind]}.{end}'
        if kind in ('stem_conv', 'stem_bn'): return f'backbone.{dict(stem_conv="conv_stem", stem_bn="bn1")[kind]}.{end}'
        if kind in ('p6', 'p6_bn'): return f'fpn.resample.3.conv.{"bn" if kind.endswith("bn") else "conv"}.{end}'
        if kind in ('resample', 'resample_bn'):
            part = 'bn' if kind.endswith('bn') else 'conv'
            return 'fpn.cell.{cell}.fnode.{node}.combine.resample.{j}.conv.'.format(**n) + f'{part}.{end}'
        if kind == 'weighted_fusion': return 'fpn.cell.{cell}.fnode.{node}.combine.edge_weights'.format(**n)
        if kind == 'after_combine_dw_conv':
            return 'fpn.cell.{cell}.fnode.{node}.after_combine.conv.'.format(**n) + separable
        if kind == 'bifpn_bn': return 'fpn.cell.{cell}.fnode.{node}.after_combine.conv.bn.'.format(**n) + end
        if kind == 'hidden': return '{net}_net.conv_rep.{i}.'.format(**n) + separable
        if kind == 'hidden_bn': return '{net}_net.bn_rep.{i}.{l}.bn.'.format(**n) + end
        if kind == 'predict': return f'{n["net"]}_net.predict.{separable}'
        raise KeyError(path)
    return {w: one(w) for w in weights}


def turned(path, a):
    "A kernel with its axes in PyTorch's order."
    if a.ndim != 4: return a
    return a.transpose(2, 3, 0, 1) if 'depthwise' in path or 'dwconv' in path else a.transpose(3, 2, 0, 1)


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason='needs another Python that has torch and effdet, named by PEER_PYTHON')
@pytest.mark.parametrize('name, hw',
                         [('d0', (333, 500)), ('d1', (160, 224)), ('d7x', (256, 256)), ('d6', (129, 192)),
                          ('lite0', (320, 320)), ('lite2', (200, 301)), ('lite3x', (160, 192))])
def test_effdet_says_the_same(name, hw, tmp_path):
    arch, rng = Arch(f'efficientdet-{name}', hw, 3, aspects=RATIOS), np.random.default_rng(0)
    model = build(arch)
    for w in model.weights:     # fresh weights say nearly nothing: let statistics, fusion and predictions vary
        if 'moving_mean' in w.path: w.assign(rng.normal(0, .1, w.shape))
        if 'moving_variance' in w.path: w.assign(rng.uniform(.7, 1.5, w.shape))
        if 'gamma' in w.path or 'weighted_fusion' in w.path: w.assign(rng.uniform(.5, 1.5, w.shape))
        if 'predict/pointwise' in w.path: w.assign(rng.normal(0, .1, w.shape))
    image = rng.integers(0, 256, (1, *hw, 3)).astype('uint8')
    mean, std = (np.float32(x) for x in pixel_mean_std(get_variant(arch.name).lite))
    weights = {w.path: np.array(w) for w in model.weights}
    theirs = names(arch, weights)
    np.savez(tmp_path/'in.npz', image=(image-mean)/std, **{'w|'+theirs[k]: turned(k, v) for k, v in weights.items()})
    (tmp_path/'run.py').write_text(CODE)
    ran = subprocess.run([PEER, tmp_path/'run.py', tmp_path/'in.npz', arch.name, tmp_path/'out.npz'],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    out, peer = model(image), np.load(tmp_path/'out.npz')
    for ours, key in (('cls_logits', 'cls'), ('box_deltas', 'box')):
        scale = np.abs(peer[key]).std()
        assert scale > 1e-3
        print(name, hw, key, peer[key].shape,
              f'difference {np.abs(np.array(out[ours])-peer[key]).max():.1e}, spread {scale:.2g}')
        np.testing.assert_allclose(np.array(out[ours]), peer[key], atol=2e-5)
    np.testing.assert_allclose(arch_anchors(arch), peer['anchors'], rtol=1e-6, atol=1e-4)
