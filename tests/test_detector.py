"The network against the reference: parameter counts of every variant, and one whole forward pass."
import json
import re

import numpy as np
import pytest

from effdet_nb.model.backbone import backbone_blocks
from effdet_nb.model.bifpn import NODES
from effdet_nb.model.detector import SCALING, Arch, build


def reference_name(path):
    "The reference's name of one of our variables (D0)."
    layer, var = path.rsplit('/', 1)
    blocks = [b.name for b in backbone_blocks()]
    if layer in ('stem_conv', 'stem_bn'): return f'efficientnet-b0|stem|{dict(stem_conv="conv2d", stem_bn="tpu_batch_normalization")[layer]}|{var}'
    if m := re.match(r'(block\d[a-z]_)(.*)', layer):
        i, first = blocks.index(m[1]), m[1] == 'block1a_'
        names = {'expand_conv': 'conv2d', 'expand_bn': 'tpu_batch_normalization', 'dwconv': 'depthwise_conv2d', 'bn': f'tpu_batch_normalization{"" if first else "_1"}',
                 'se_reduce': 'se|conv2d', 'se_expand': 'se|conv2d_1', 'project_conv': 'conv2d' if first else 'conv2d_1', 'project_bn': f'tpu_batch_normalization_{1 if first else 2}'}
        return f'efficientnet-b0|blocks_{i}|{names[m[2]]}|{"depthwise_kernel" if m[2] == "dwconv" else var}'
    if layer in ('p6', 'p6_bn'): return f'resample_p6|{dict(p6="conv2d", p6_bn="bn")[layer]}|{var}'
    if m := re.match(r'bifpn(\d)_(\d)_(\d+)_(\d)(_bn)?$', layer):
        return f'fpn_cells|cell_{m[4]}|fnode{m[1]}|resample_{m[2]}_{m[3]}_{int(m[1])+5}|{"bn" if m[5] else "conv2d"}|{var}'
    if m := re.match(r'(after_combine_dw_conv|bifpn_bn)_(\d+)_(\d)', layer):
        return f'fpn_cells|cell_{m[3]}|fnode{int(m[2])-5}|op_after_combine{m[2]}|{"bn" if m[1] == "bifpn_bn" else "conv"}|{var}'
    if m := re.match(r'(class|box)-', layer): return f'{m[1]}_net|{layer}|{var}'
    raise KeyError(path)


def load_reference(model, weights):
    for v in model.weights:
        if m := re.match(r'weighted_fusion_(\d+)_(\d+)/weights', v.path):
            node = f'fpn_cells|cell_{m[2]}|fnode{int(m[1])-5}|WSM'
            v.assign(np.array([weights[node+s] for s in ('', '_1', '_2')[:v.shape[0]]]))
        else: v.assign(weights[reference_name(v.path)].reshape(v.shape))


def test_the_forward_pass_equals_the_reference(shared):
    ref, weights = np.load(shared/'oracle'/'d0_forward_512.npz', allow_pickle=False), np.load(shared/'oracle'/'d0_weights.npz', allow_pickle=False)
    model = build(Arch(num_classes=90))
    load_reference(model, weights)
    image = ref[[k for k in ref.files if ref[k].dtype == np.uint8][0]]
    out = model(image.reshape(1, 512, 512, 3))
    sizes, start = [64, 32, 16, 8, 4], 0
    for level, n in zip(range(3, 8), sizes):
        stride = int(ref[f'stride_{level}']) if f'stride_{level}' in ref.files else (7, 5, 1, 1, 1)[level-3]
        for name, key, c in (('class', 'cls_logits', 90), ('box', 'box_deltas', 4)):
            ours = np.array(out[key])[0, start:start+n*n*9].reshape(1, n, n, 9*c)
            theirs = ref[f'{name}_{level}']
            np.testing.assert_allclose(ours[:, ::stride, ::stride].reshape(theirs.shape), theirs, atol=2e-4, err_msg=f'{name} of P{level}')
        start += n*n*9


@pytest.mark.parametrize('d', range(6))
def test_parameter_counts_of_every_variant(shared, d):
    ref = json.loads((shared/'oracle'/'arch.json').read_text())[f'd{d}']
    model = build(Arch(f'efficientdet-d{d}', (128, 128), 90))
    count = lambda ws: sum(int(np.prod(w.shape)) for w in ws)
    assert count(model.trainable_weights) == ref['trainable_params']
    assert count(model.weights) == ref['total_params']
    side, _, _, filters, cells, repeats = SCALING[f'efficientdet-d{d}']
    assert (side, filters, cells, repeats) == (ref['image_size'], ref['fpn_num_filters'], ref['fpn_cell_repeats'], ref['box_class_repeats'])


def test_every_layer_of_a_pruned_description_gets_its_width():
    widths = {'stem_conv': 24, 'block2a_expand_conv': 40, 'block2b_expand_conv': 48, 'block2a_se_reduce': 2}
    model = build(Arch(image_hw=(128, 128), num_classes=3, widths=widths))
    for name, n in widths.items(): assert model.get_layer(name).output.shape[-1] == n
    assert model.get_layer('block2b_dwconv').output.shape[-1] == 48


def test_the_pyramid_listens_to_levels_that_exist():
    for i, (level, inputs) in enumerate(NODES): assert max(inputs) < i+5 and 3 <= level <= 7
