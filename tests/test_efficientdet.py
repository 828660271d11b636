"""The network against the reference: every number of every variant.

The forward pass is in test_import_weights.py, on imported weights."""
import json

import keras
import numpy as np
import pytest

from effdet_nb.detector.anchors import feature_size
from effdet_nb.detector.backbone import backbone_blocks
from effdet_nb.detector.bifpn import fpn_nodes
from effdet_nb.detector.efficientdet import (VARIANTS, Arch, arch_anchors, build, component_costs,
                                             feature_extractor,
    get_variant, published_variants)
from effdet_nb.train.experiment import arch_from_spec
from effdet_nb.train.fields import MODEL_NAMES
from effdet_nb.train.spec import Spec


PUBLISHED = 'd0 d1 d2 d3 d4 d5 d6 d7 d7x lite0 lite1 lite2 lite3 lite3x lite4'.split()


@pytest.mark.parametrize('v',
                         [v if v in ('d0', 'lite0') else pytest.param(v, marks=pytest.mark.slow) for v in PUBLISHED])
def test_parameter_counts_of_every_variant(shared_dir, v):
    ref = json.loads((shared_dir/'oracle'/'arch.json').read_text())[v]
    model = build(Arch(f'efficientdet_{v}', (128, 128), 90))
    def count(ws):
        return sum(int(np.prod(w.shape)) for w in ws)
    assert count(model.trainable_weights) == ref['trainable_params']
    assert count(model.weights) == ref['total_params']
    # ours keeps the weights of a node together, the reference apart
    fused = sum(w.path.startswith('weighted_fusion') for w in model.weights)
    parts = sum(w.shape[0] for w in model.weights if w.path.startswith('weighted_fusion'))
    assert len(model.weights)-fused+parts == ref['num_variables']
    assert len(model.trainable_weights)-fused+parts == ref['num_trainable_variables']


@pytest.mark.parametrize('v', PUBLISHED)
def test_every_number_of_a_variant_is_the_references(shared_dir, v):
    every = json.loads((shared_dir/'oracle'/'arch.json').read_text())
    ref, arch, s = every[v], Arch(f'EfficientDet_{v.upper()}'), get_variant(f'efficientdet-{v}')
    assert list(every) == PUBLISHED == [n.removeprefix('efficientdet-') for n in published_variants()]
    assert set(MODEL_NAMES) == set(VARIANTS)
    assert (s.native_side, s.fpn_filters, s.fpn_cells, s.head_repeats) == (ref['image_size'], ref['fpn_num_filters'],
                                                                           ref['fpn_cell_repeats'],
                                                                           ref['box_class_repeats'])
    assert (arch.anchor_scale, arch.levels[0], arch.levels[-1], arch.num_scales) == (ref['anchor_scale'],
                                                                                     ref['min_level'], ref['max_level'],
                                                                                     ref['num_scales'])
    np.testing.assert_allclose(arch.mean_rgb, np.broadcast_to(ref['mean_rgb'], 3))
    np.testing.assert_allclose(arch.std_rgb, np.broadcast_to(ref['stddev_rgb'], 3), rtol=1e-6)
    assert (s.family == 'weighted') == (ref['fpn_weight_method'] is None)
    assert s.lite == (ref['act_type'] == 'relu6') == (not ref['backbone_global']['use_se'])
    np.testing.assert_allclose(1-s.drop_connect, ref['backbone_global']['survival_prob'] or 1.)
    blocks = backbone_blocks(s.width, s.depth, s.drop_connect, s.lite)
    assert [(b.kernel, b.stride, b.expand_ratio, b.output_filters)
            for b in blocks] == [(r['kernel'], r['stride'][0], r['expand'], r['out']) for r in ref['backbone_blocks']]
    # a lite network's first block reads the unscaled stem
    assert [b.input_filters for b in blocks[1:]] == [r['inp'] for r in ref['backbone_blocks'][1:]]
    np.testing.assert_allclose([b.drop_rate for b in blocks],
                               [s.drop_connect*i/len(blocks) for i in range(len(blocks))])


def test_batch_norms_have_the_references_constants(shared_dir):
    ref = json.loads((shared_dir/'oracle'/'arch.json').read_text())['d0']
    norms = [l for l in build(Arch(image_hw=(128, 128), num_classes=2)).layers
             if isinstance(l, keras.layers.BatchNormalization)]
    assert {l.epsilon for l in norms} == {ref['fpn_bn_eps']} == {ref['backbone_global']['bn_eps']}
    # the reference has .99 everywhere, which suits long runs; here only maps of P6 and P7 are that coarse
    assert {l.momentum for l in norms if '-bn-6' in l.name or '-bn-7' in l.name} == {ref['fpn_bn_momentum']}
    assert {l.momentum for l in norms if '-bn-5' in l.name or l.name.startswith('block')} == {.9}


def test_a_p8_is_one_level_more():
    hw = 300, 260
    arch = Arch('efficientdet-tiny', hw, 2, max_level=8)
    num_anchors = 9*sum(np.prod(feature_size(hw, level)) for level in range(3, 9))
    assert build(arch).output['box_deltas'].shape[1] == len(arch_anchors(arch)) == num_anchors


def test_a_plain_sum_has_no_fusion_weights():
    for variant in ('d6', 'd7', 'd7x', 'lite0', 'lite4'): assert get_variant(variant).family != 'weighted'
    model = build(Arch('efficientdet-lite0', (128, 128), 2))
    assert not [w.path for w in model.weights if 'weighted_fusion' in w.path]


def test_spec_fields_shape_the_model():
    spec = Spec().replace(model_config=dict(model_name='efficientdet_d7', aspect_ratios='[(1.0, 1.0), (2.0, 0.5)]',
                                            num_scales=2),
                          dataset_config=dict(num_classes=3, image_size='128,160', num_channels=1))
    arch = arch_from_spec(spec)
    assert (arch.name, arch.anchor_scale, len(arch.aspects), arch.num_scales,
            arch.channels) == ('efficientdet-d7', 5., 2, 2, 1)
    assert arch_from_spec(spec.replace(model_config=dict(anchor_scale=3.5))).anchor_scale == 3.5
    small = arch_from_spec(spec.replace(model_config=dict(model_name='efficientdet-d0')))
    model = build(small)
    assert model.get_layer('class-predict').filters == 2*2*3
    assert model.output['box_deltas'].shape[1] == len(arch_anchors(small))
    assert model.input.shape[-1] == 1
    for name, level, fine in (('efficientdet-d0', 8, False), ('efficientdet-d7x', 7, False),
                              ('efficientdet-d7x', 8, True), ('efficientdet-d0', 7, True)):
        found = spec.replace(model_config=dict(model_name=name, max_level=level)).problems()
        assert (not any('max_level' in p for p in found)) == fine, (name, level)


def test_the_summary_adds_up():
    model = build(Arch(num_classes=90))
    costs = component_costs(model)
    assert sum(p for p, _ in costs.values()) == model.count_params()
    assert 2.48e9 < sum(m for _, m in costs.values()) < 2.5e9
    assert all(w in repr(model)
               for w in ('backbone', 'BiFPN', 'class_net', 'box_net', '512x512 colour', '49,104 anchors'))
    assert [tuple(m.shape[1:3]) for m in feature_extractor(model).output] == [(64, 64), (32, 32), (16, 16), (8, 8),
                                                                              (4, 4)]


def test_every_layer_of_a_pruned_description_gets_its_width():
    widths = {'stem_conv': 24, 'block2a_expand_conv': 40, 'block2b_expand_conv': 48, 'block2a_se_reduce': 2}
    model = build(Arch(image_hw=(128, 128), num_classes=3, widths=widths))
    for name, n in widths.items(): assert model.get_layer(name).output.shape[-1] == n
    assert model.get_layer('block2b_dwconv').output.shape[-1] == 48


def test_inputs_of_pyramid_nodes_exist():
    for i, (level, inputs) in enumerate(fpn_nodes()): assert max(inputs) < i+5 and 3 <= level <= 7
