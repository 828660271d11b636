"Pruning: the rule against a plain restatement, cutting against the network, the file against all that opens files."
import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.backbone import backbone_blocks
from effdet_nb.detector.efficientdet import VARIANTS, Arch, arch_to_dict, build
from effdet_nb.detector.predictor import KerasDetector
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.prune.channel_groups import abstract_model, channel_graph, params_and_macs, prune_weights, scope_of
from effdet_nb.prune.latency import network_to_onnx, profile_onnx
from effdet_nb.prune.prune import check_pruning_settings, plan_pruning, protected_groups, prune, saved_norms
from effdet_nb.prune.pruning_plan import (
    EQUALIZATION_CRITERIA, NORMALIZERS, PruningPlan, find_threshold, group_norms, normalize_norms, select_channels)
from effdet_nb.train import fit
from effdet_nb.train.checkpoints import MetricHistory, optimizer_state
from effdet_nb.train.experiment import resolve_arch, resolve_experiment
from effdet_nb.train.startup import initialize_weights, read_initial_weights
from effdet_nb.train.spec import Spec
from effdet_nb.train.trainer import Trainer, dtype_policy_scope
from effdet_nb.weights.encryption import DamagedFileError
from effdet_nb.weights.model_file import (
    load_keras_model, load_model_file, save_model_file, set_weights_by_path, weights_by_path)

SHAPES = 'circle', 'square', 'triangle'
CLASSES = ClassTable.from_categories([{'id': i, 'name': n} for i, n in enumerate(SHAPES, 1)], 3)
ARCH = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=3)
LITE = [name for name in VARIANTS if 'lite0' in name]


def set_batch_statistics(model, seed=0):
    "Gives a model batch statistics, so that its outputs depend on the image; returns an image."
    images = np.random.default_rng(seed).integers(0, 255, (4, *model.input.shape[1:])).astype('uint8')
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization): layer.momentum = 0.
    model(images, training=True)
    return images[:1]


def copy_weights(weights): return {path: value.copy() for path, value in weights.items()}


def scale_channels(weights, graph, seed=0):
    "Weights in which some channels have become small, as in a trained network."
    rng, weights = np.random.default_rng(seed), copy_weights(weights)
    for group in graph.groups:
        factors = 10**rng.uniform(-2.5, 0, group.size)
        for path, axis in group.producers.values(): np.moveaxis(weights[path], axis, -1)[...] *= factors
    return weights


def removed(group, kept): return np.setdiff1d(np.arange(group.size), kept[group.name])


def zero_removed(weights, graph, kept):
    "Weights in which the channels to remove are zero: their filters, biases and batch-norm shifts."
    weights = copy_weights(weights)
    for group in graph.groups:
        for path, axis in group.weight_axes:
            is_filter = (path, axis) in group.producers.values()
            if is_filter or (axis == 0 and 'variance' not in path):
                np.moveaxis(weights[path], axis, -1)[..., removed(group, kept)] = 0
    return weights


def change_readers_of_removed(weights, graph, kept):
    "Weights in which what the kernels do with removed channels is another thing."
    weights = copy_weights(weights)
    for group in graph.groups:
        for path, axis in group.weight_axes:
            is_filter = (path, axis) in group.producers.values()
            if axis == 2 and not is_filter and 'depthwise' not in path:
                np.moveaxis(weights[path], axis, -1)[..., removed(group, kept)] += 1
    return weights


def run(model, image): return np.concatenate([np.array(output)[0] for output in model(image).values()], 1)


def pruned_arch(arch, graph, kept):
    return replace(arch, widths={name: len(kept[g.name]) for g in graph.groups for name in g.producers})


def num_params(graph, num_channels): return sum(params for params, _ in params_and_macs(graph, num_channels).values())


@pytest.fixture(scope='module')
def model(): return build(ARCH)


@pytest.fixture(scope='module')
def scratch_model(): return build(ARCH)


@pytest.fixture(scope='module')
def graph(model): return channel_graph(model)


@pytest.fixture(scope='module')
def trained(model, graph, tmp_path_factory):
    "An encrypted checkpoint with plain and averaged weights; which channels are small differs between the two."
    path = tmp_path_factory.mktemp('trained')/'model.step-7.tlt'
    weights, ema = (scale_channels(weights_by_path(model), graph, seed) for seed in (1, 2))
    meta = dict(arch=arch_to_dict(ARCH), classes=CLASSES.to_dict(), kind='checkpoint', step=7, epoch=1.,
                history=[{'epoch': 1, 'loss': 2.}], spec='', scores={'AP': .5})
    save_model_file(path, weights, meta, 'key', ema=ema, optimizer={'momentum': np.ones(3)})
    return path


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1), st.integers(1, 17), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_the_selected_channels_are_those_of_a_plain_restatement_of_the_rule(norms, threshold, granularity, least):
    norms = np.array(norms)
    kept = select_channels(norms, threshold, granularity, least)
    gone = np.setdiff1d(np.arange(len(norms)), kept)
    assert (np.diff(kept) > 0).all() and len(kept) >= min(least, len(norms))
    assert set(np.flatnonzero(norms > threshold)) <= set(kept)                # nothing above the threshold is lost
    if len(gone): assert norms[gone].max() <= norms[kept].min()               # nothing smaller stays in its place
    assert len(kept) == len(norms) or len(kept) % granularity == 0
    needed = max((norms > threshold).sum(), min(least, len(norms)))
    assert len(kept) - needed < granularity                                   # and no more than rounding needs


@given(st.integers(0, 2**32-1), st.sampled_from(['max', 'L2']), st.sampled_from(list(EQUALIZATION_CRITERIA)))
@settings(max_examples=50, deadline=None)
def test_criteria_lie_between_intersection_and_union_and_norms_between_0_and_1(seed, normalizer, criterion):
    rng = np.random.default_rng(seed)
    layers = np.stack([normalize_norms(rng.lognormal(size=9), normalizer) for _ in range(3)])
    norms, least, most = (EQUALIZATION_CRITERIA[c](layers) for c in (criterion, 'intersection', 'union'))
    assert (least <= norms*(1+1e-12)).all() and (norms <= most*(1+1e-12)).all()
    assert 0 <= norms.min() and norms.max() <= 1+1e-12


def expected_groups(graph, width, depth, cells, hidden):
    "The producers of every group, from the wiring in the papers."
    blocks = backbone_blocks(width, depth)
    groups = {frozenset([b.name+'se_reduce']) for b in blocks}
    groups |= {expected_inside(b.name) for b in blocks if b.expand_ratio != 1}
    groups |= {expected_stage(stage, [b.name for b in blocks if b.name[5] == stage]) for stage in '1234567'}
    groups.add(frozenset(['stem_conv', 'block1a_dwconv', 'block1a_se_expand']))
    fusions = {f'after_combine_dw_conv_{n}_{cell}' for n in range(5, 13) for cell in range(cells)}
    groups.add(frozenset(laterals_of(graph) | fusions))
    return groups | {frozenset([f'{head}-{i}']) for head in ('class', 'box') for i in range(hidden)}


def expected_inside(name):
    "The expanded channels of a block."
    return frozenset(name+layer for layer in ('expand_conv', 'dwconv', 'se_expand'))


def expected_stage(stage, blocks):
    "Projections of one stage are joined by its residual sums; in stage 1 the next block has no expansion between."
    group = {name+'project_conv' for name in blocks}
    if stage == '1': group |= {name+suffix for name in blocks[1:] for suffix in ('dwconv', 'se_expand')}
    return frozenset(group)


def laterals_of(graph):
    "The 1x1 convolutions that bring a feature map to the width of the pyramid."
    p3_to_p5 = {f'bifpn{node}_0' for node in ('0_0_3', '3_0_0', '2_0_1', '4_0_1', '1_0_2', '5_0_2')}
    return (p3_to_p5 | {'p6'}) & set(graph.layers)


@pytest.mark.parametrize('name, width, depth, cells, hidden', [
    ('efficientdet-d0', 1., 1., 3, 3), (ARCH.name, .35, .3, 1, 1), ('efficientdet-d1', 1., 1.1, 4, 3)])
def test_the_groups_are_those_of_the_papers_wiring(name, width, depth, cells, hidden):
    graph = channel_graph(abstract_model(Arch(name, (128, 128), num_classes=3)))
    assert {frozenset(g.producers) for g in graph.groups} == expected_groups(graph, width, depth, cells, hidden)
    assert len(laterals_of(graph)) == 6
    axes = [path_and_axis for g in graph.groups for path_and_axis in g.weight_axes]
    assert len(axes) == len(set(axes))                                        # no axis is cut twice


WHOLE_NETWORKS = [Arch(image_hw=(128, 128), num_classes=3),
                  *(Arch(name, (160, 224), num_classes=2) for name in ['efficientdet-d1', *LITE])]

@pytest.mark.parametrize('arch', [
    Arch(ARCH.name, (131, 197), num_classes=2),
    *(pytest.param(arch, marks=pytest.mark.slow) for arch in WHOLE_NETWORKS)])
def test_removing_channels_of_zeros_changes_nothing(arch):
    dtype = 'float64' if arch.name in LITE else 'float32'     # in float32, rounding alone reaches 1.05e-5 in lite0
    with dtype_policy_scope(dtype): check_removing_zeros(arch)


def check_removing_zeros(arch):
    keras.utils.set_random_seed(1)
    is_lite = arch.name in LITE
    model = build(arch, synchronized=is_lite)                 # fused batch norms have no float64 kernel
    graph, rng = channel_graph(model), np.random.default_rng(3)
    kept = {}
    for group in graph.groups:
        num_kept = int(rng.integers(group.size//2, group.size+1)) or 1
        kept[group.name] = np.sort(rng.permutation(group.size)[:num_kept])
    set_weights_by_path(model, zero_removed(weights_by_path(model), graph, kept))
    image = set_batch_statistics(model)
    weights, outputs = weights_by_path(model), run(model, image)
    small = build(pruned_arch(arch, graph, kept), synchronized=is_lite)
    set_weights_by_path(small, prune_weights(weights, graph, kept))
    assert np.ptp(outputs, 0).min() > .01
    np.testing.assert_allclose(run(small, image), outputs, atol=1e-6 if is_lite else 1e-5)
    assert num_params(graph, {name: len(v) for name, v in kept.items()}) == small.count_params() < model.count_params()
    set_weights_by_path(model, change_readers_of_removed(weights, graph, kept))
    np.testing.assert_array_equal(run(model, image), outputs)     # what reads zeros does not matter, to the last bit
    for name in ('p6', 'block4a_expand_conv'):                    # with other channels the outputs differ
        others = kept | {name: (kept[name]+1) % graph.sizes[name]}
        set_weights_by_path(small, prune_weights(weights, graph, others))
        assert abs(run(small, image)-outputs).max() > 1e-3


@given(st.integers(0, 2**32-1), st.floats(.01, .95), st.sampled_from([1, 2, 3, 8, 16]), st.integers(1, 40),
       st.sampled_from(list(NORMALIZERS)), st.sampled_from(list(EQUALIZATION_CRITERIA)))
@settings(max_examples=4, deadline=None)
def test_every_plan_is_what_the_cut_network_becomes(
        model, scratch_model, graph, seed, threshold, granularity, least, normalizer, criterion):
    "Random norms, every setting: plan and rule, cut and plan, both outputs agree; pruning again finds nothing."
    weights = scale_channels(weights_by_path(model), graph, seed)
    plan = PruningPlan(graph, group_norms(graph, weights, normalizer, criterion), threshold, granularity, least)
    for group in graph.groups:
        kept, norms = plan.kept_indices[group.name], plan.norms[group.name]
        assert len(kept) >= min(least, group.size) and (len(kept) % granularity == 0 or len(kept) == group.size)
        assert set(np.flatnonzero(norms > threshold)) <= set(kept)
        assert len(select_channels(norms[kept], threshold, granularity, least)) == len(kept)
    small = build(replace(ARCH, widths=plan.widths))
    zeroed = zero_removed(weights, graph, plan.kept_indices)
    shapes = {path: value.shape for path, value in prune_weights(zeroed, graph, plan.kept_indices).items()}
    assert {path: value.shape for path, value in weights_by_path(small).items()} == shapes
    assert small.count_params() == plan.params.after
    set_weights_by_path(scratch_model, zeroed)
    image = set_batch_statistics(scratch_model, seed)
    set_weights_by_path(small, prune_weights(weights_by_path(scratch_model), graph, plan.kept_indices))
    outputs = run(scratch_model, image)
    np.testing.assert_allclose(run(small, image), outputs, atol=1e-5*max(1, np.abs(outputs).max()))


def test_a_pruned_level_as_wide_as_the_pyramid_keeps_its_1x1_convolution(graph):
    width = graph.sizes['p6']
    widths = {name: width if name == 'block7a_project_conv' else g.size for g in graph.groups for name in g.producers}
    layers = {layer.name: layer for layer in abstract_model(replace(ARCH, widths=widths)).layers}
    assert layers['block7a_project_conv'].filters == layers['p6'].filters == width
    assert {'p6', 'bifpn1_0_2_0', 'bifpn5_0_2_0'} <= set(layers) and not {'bifpn0_0_3_0', 'bifpn0_0_3_1'} & set(layers)


@pytest.fixture(scope='module')
def pruned(trained, tmp_path_factory):
    "The checkpoint, pruned to 30 % of its parameters."
    return prune(trained, tmp_path_factory.mktemp('pruned')/'new'/'model.tlt', 'key', target_params=.3)


def test_remaining_weights_are_the_same_bits(trained, pruned):
    before, after = load_model_file(trained, 'key'), load_model_file(pruned.path, 'key')
    assert .27 < pruned.params.after/pruned.params.before <= .3 and after.optimizer == {}
    kept = {path_and_axis: pruned.kept_indices[g.name] for g in pruned.graph.groups for path_and_axis in g.weight_axes}
    for old, new in ((before.weights, after.weights), (before.ema, after.ema)):
        assert old.keys() == new.keys()
        for path, w in old.items():
            for axis in range(w.ndim): w = np.take(w, kept.get((path, axis), np.arange(w.shape[axis])), axis)
            assert w.dtype == new[path].dtype and w.tobytes() == new[path].tobytes()


def test_a_pruned_file_keeps_its_metadata_but_not_its_scores(trained, pruned):
    before, after = (load_model_file(path, 'key').meta for path in (trained, pruned.path))
    assert after['kind'] == 'pruned' and 'scores' not in after
    for name in ('classes', 'history', 'step'): assert after[name] == before[name]


def initial_weights(spec): return read_initial_weights(spec.training_config, spec.model_config.model_name, 'key')


@pytest.mark.parametrize('value', [8., '8', None, 0, -8, float('nan')])
@pytest.mark.parametrize('name', ['granularity', 'min_num_filters'])
def test_counts_that_are_no_whole_numbers_are_one_sentence(name, value):
    counts = dict(granularity=8, min_num_filters=16) | {name: value}
    with pytest.raises(ValueError, match=f'{name} {value}: must be a whole number, 1 or more'):
        check_pruning_settings('max', 'union', threshold=.1, scope='all', **counts)


def test_a_pruned_file_opens_as_a_detector_and_as_the_start_of_a_training(pruned):
    model, arch, stored = load_keras_model(pruned.path, 'key')
    assert model.count_params() == pruned.params.after
    for path, value in weights_by_path(model).items(): assert np.array_equal(value, stored.ema[path])
    assert KerasDetector(model, arch, CLASSES)(np.zeros((1, 128, 128, 3), np.uint8))[0].boxes.shape[1] == 4
    spec = Spec().replace(
        model_config=dict(model_name=ARCH.name), dataset_config=dict(num_classes=3, image_size='128,160'),
        training_config=dict(pruned_model_path=str(pruned.path)))
    initial = initial_weights(spec)
    arch = resolve_arch(spec, initial)
    set_weights_by_path(build(arch), initial.pruned.averaged_weights)
    assert arch.image_hw == (128, 160)


def test_pruning_leaves_the_model_alone_and_reports_in_status_json(trained, tmp_path):
    bytes_before = trained.read_bytes()
    plan = prune(trained, tmp_path/'model.tlt', 'key', target_params=.3)
    assert trained.read_bytes() == bytes_before
    events = [json.loads(line) for line in (tmp_path/'status.json').read_text().splitlines()]
    assert events[-1]['status'] == 'SUCCESS' and events[-1]['kpi']['param_count'] == plan.params.after
    assert 'key' not in str(events[1].get('message'))


def test_the_averaged_weights_decide(trained):
    stored, group = load_model_file(trained, 'key'), 'block4a_expand_conv'
    plan = plan_pruning(stored)
    kept_by_ema = select_channels(group_norms(plan.graph, stored.ema)[group])
    kept_by_raw = select_channels(group_norms(plan.graph, stored.weights)[group])
    np.testing.assert_array_equal(plan.kept_indices[group], kept_by_ema)
    assert not np.array_equal(kept_by_ema, kept_by_raw)


OTHER_RULES = dict(normalizer='L2', equalization_criterion='geometric_mean', pruning_threshold=.03,
                   pruning_granularity=5, min_num_filters=3)

@pytest.mark.parametrize('rules', [dict(), OTHER_RULES])
def test_pruning_twice_is_pruning_once(trained, tmp_path, rules):
    once = prune(trained, tmp_path/'1.tlt', 'key', **rules)
    twice = prune(once.path, tmp_path/'2.tlt', 'key', **rules)
    assert once.params.after < once.params.before
    assert twice.channels_before == twice.channels_after == once.channels_after
    a, b = (load_model_file(plan.path, 'key') for plan in (once, twice))
    assert all(np.array_equal(v, b.weights[k]) for k, v in a.weights.items()) and a.meta['arch'] == b.meta['arch']
    other = rules | dict(equalization_criterion='arithmetic_mean', pruning_threshold=.1)    # other rules: measured anew
    assert prune(twice.path, '', 'key', dry_run=True, **other).params.after < twice.params.after


def test_a_retrained_file_forgets_the_norms_it_was_pruned_by(trained, tmp_path):
    plan = prune(trained, tmp_path/'1.tlt', 'key')
    stored = load_model_file(plan.path, 'key')
    assert saved_norms(stored, plan_pruning(stored).graph, 'max', 'union')
    stored.meta['kind'] = 'checkpoint'
    assert saved_norms(stored, plan.graph, 'max', 'union') is None


def test_fresh_weights_prune_to_a_target_or_report_that_nothing_is_small_enough(model, tmp_path):
    meta = dict(arch=arch_to_dict(ARCH), classes=CLASSES.to_dict(), kind='checkpoint')
    save_model_file(tmp_path/'fresh.tlt', weights_by_path(model), meta)
    plan = prune(tmp_path/'fresh.tlt', '', dry_run=True)
    assert plan.params.before == plan.params.after and 'nothing to remove' in repr(plan)
    assert not list(tmp_path.glob('*.json'))
    third = prune(tmp_path/'fresh.tlt', tmp_path/'third.tlt', target_params=1/3)
    assert third.params.after <= third.params.before/3
    assert load_keras_model(third.path)[0].count_params() == third.params.after


@pytest.fixture(scope='module')
def plan(trained): return plan_pruning(load_model_file(trained, 'key'))


def share_left(plan, threshold, quantity):
    "The share of parameters or multiply-adds that a threshold leaves."
    plan = replace(plan, threshold=threshold)
    cost = {'params': plan.params, 'macs': plan.macs}[quantity]
    return cost.after/cost.before


@pytest.mark.parametrize('share, quantity', [(.2, 'params'), (.5, 'macs'), (.937, 'params'), (1., 'params')])
def test_the_threshold_found_is_the_lowest_that_meets_the_target(plan, share, quantity):
    threshold = find_threshold(plan, share, quantity)
    assert share_left(plan, threshold, quantity) <= share
    assert threshold < 1e-6 or share_left(plan, threshold-1e-6, quantity) > share


def test_targets_may_be_numbers_and_an_unreachable_one_is_an_error(plan):
    assert replace(plan, threshold=find_threshold(plan, 100_000)).params.after <= 100_000
    with pytest.raises(ValueError, match='cannot be reached; the least that these settings leave is'):
        find_threshold(plan, .0001)


def test_derived_layer_types_count_as_their_ancestors_and_unknown_ones_are_left_alone():
    x = keras.Input((16, 16, 3))
    y = keras.layers.BatchNormalization(name='bn')(keras.layers.Conv2D(8, 1, name='stem_conv')(x))
    y = keras.layers.ReLU(6., name='relu')(y)
    z = keras.layers.UpSampling2D(name='unknown')(keras.layers.Conv2D(4, 1, name='block')(y))
    graph = channel_graph(keras.Model(x, z))
    assert [(g.name, g.size, g.layers) for g in graph.groups] == [('stem_conv', 8, ['stem_conv', 'bn', 'relu'])]


def test_the_abstract_model_is_wired_like_the_network(model, graph):
    abstract = abstract_model(ARCH)
    assert channel_graph(abstract) == graph and abstract.count_params() == model.count_params()


def test_a_list_of_thresholds_goes_down_and_ends_at_the_least(plan):
    thresholds, params, macs, megabytes = plan.tradeoff(12).T
    assert (np.diff(thresholds) > 0).all() and (np.diff(params) <= 0).all() and (np.diff(macs) <= 0).all()
    np.testing.assert_allclose(megabytes, params*8e-6)                            # two sets of float32
    assert params[-1] == replace(plan, threshold=float(thresholds[-1])).params.after
    assert len(plan.tradeoff_table().splitlines()) == 9


def test_a_dry_run_writes_only_the_plot(trained, tmp_path):
    plot = tmp_path/'deep'/'tradeoff.png'
    prune(trained, tmp_path/'out'/'model.tlt', 'key', dry_run=True, target_macs=.4, plot=plot)
    assert [p.name for p in tmp_path.rglob('*') if p.is_file()] == ['tradeoff.png']
    assert plot.read_bytes().startswith(b'\x89PNG')
    bytes_before = trained.read_bytes()
    with pytest.raises(ValueError, match='is the model to be pruned'):
        prune(trained, '', 'key', dry_run=True, plot=trained)
    assert trained.read_bytes() == bytes_before


def test_an_existing_model_is_replaced_with_a_message_and_other_files_stay(trained, tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    for is_there in (False, True):
        prune(trained, tmp_path/'model.tlt', 'key', target_params=.5)
        assert ('exists and is replaced' in capsys.readouterr().err) == is_there
    assert (tmp_path/'notes.txt').read_text() == 'mine'


def test_the_graph_that_is_timed_has_the_shapes_of_the_network(model):
    import onnxruntime as ort
    session = ort.InferenceSession(network_to_onnx(model).SerializeToString(), providers=['CPUExecutionProvider'])
    outputs = session.run(None, {'pixels': np.ones((1, 3, 128, 128), 'float32')})
    nodes = [node for head in ('class', 'box') for node in model.get_layer(f'{head}-predict')._inbound_nodes]
    nhwc = [node.output_tensors[0].shape for node in nodes]
    assert sorted(o.shape for o in outputs) == sorted((1, c, h, w) for _, h, w, c in nhwc)
    assert all(np.isfinite(o).all() for o in outputs)


def test_a_grey_network_is_timed_on_one_channel():
    proto = network_to_onnx(abstract_model(Arch('efficientdet-tiny', (128, 128), 3, channels=1)))
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 128, 128]
    seconds, _ = profile_onnx(proto, num_runs=1)
    assert seconds > 0


def test_latency_is_measured_per_part_and_printed(trained):
    plan = prune(trained, '', 'key', dry_run=True, target_params=.3, speed=True)
    for seconds in plan.latency:
        assert set(seconds) == {'backbone', 'bifpn', 'heads', 'all'} and min(seconds.values()) > 0
        assert seconds['all'] == pytest.approx(sum(v for k, v in seconds.items() if k != 'all'))
    header, *rows = repr(plan).splitlines()[:5]
    assert header.endswith('CPU, ms per image')
    assert [row.split()[0] for row in rows] == ['backbone', 'bifpn', 'heads', 'all'] and rows[-1].count('→') == 3


def test_excluding_one_layer_protects_its_whole_group_and_nothing_else(plan):
    groups_of_layers = {
        'block2a_expand_conv': 'block2a_expand_conv', 'block2a_dwconv': 'block2a_expand_conv',
        'block6b_project_bn': 'block6a_project_conv', 'after_combine_dw_conv_9_0': 'p6', 'class-0': 'class-0',
        'block6a_se_reduce': 'block6a_se_reduce'}
    for layer, group in groups_of_layers.items(): assert protected_groups(plan.graph, [layer]) == {group}
    assert protected_groups(plan.graph, ['class-predict']) == frozenset()     # a known layer that is never pruned
    partial = replace(plan, protected=protected_groups(plan.graph, ['block4*', 'box-*']))
    for name, size in partial.channels_before.items():
        if name.startswith(('block4', 'box')): assert partial.channels_after[name] == size
    other = 'block5a_expand_conv'
    assert partial.channels_after[other] == plan.channels_after[other] < plan.channels_before[other]


def test_a_scope_limits_pruning_to_one_part(plan):
    plan = replace(plan, protected=protected_groups(plan.graph, scope='backbone'))
    assert {scope_of(g.name) for g in plan.pruned_groups()} == {'backbone'}


def test_bad_settings_are_reported_together(trained, tmp_path):
    with pytest.raises(ValueError) as e:
        prune(trained, tmp_path/'x.tlt', 'key', 'mx', 'unoin', 0, float('nan'), 0, target_params=-1)
    settings = ['normalizer', 'equalization_criterion', 'pruning_granularity', 'min_num_filters', 'pruning_threshold',
                'target_params']
    assert [line.split()[0] for line in str(e.value).splitlines()] == settings
    assert not (tmp_path/'x.tlt').exists()


@pytest.mark.parametrize('settings, words', [
    (dict(pruning_threshold=1.), 'all channels would be removed'),
    (dict(excluded_layers=['block2a_expnd_conv', 'nonsense']), 'did you mean block2a_expand_conv.*nonsense'),
    (dict(key='other'), 'another key'), (dict(target_params=.0001), 'cannot be reached')])
def test_a_bad_setting_is_refused_and_nothing_is_written(trained, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words): prune(trained, tmp_path/'x.tlt', **({'key': 'key'} | settings))
    assert not (tmp_path/'x.tlt').exists()


def test_the_model_is_never_its_own_output_and_must_be_a_model(trained, tmp_path):
    with pytest.raises(ValueError, match='is the model to be pruned'): prune(trained, trained, 'key')
    (tmp_path/'text.tlt').write_text('hello')
    with pytest.raises(ValueError, match='text.tlt'): prune(tmp_path/'text.tlt', tmp_path/'x.tlt')
    assert not (tmp_path/'x.tlt').exists()


def test_a_layer_that_is_not_a_number_is_named(graph, model):
    weights = weights_by_path(model)
    weights['block3a_expand_conv/kernel'] = weights['block3a_expand_conv/kernel']*np.nan
    with pytest.raises(ValueError, match='block3a_expand_conv: its weights are not all finite'):
        group_norms(graph, weights)


# --- retraining

@pytest.fixture(scope='module')
def spec(pruned, tmp_path_factory):
    "A spec that names the pruned file, and nothing else, as the start."
    folder = tmp_path_factory.mktemp('retrain')
    make_toy_dataset(folder/'shapes', num_train=8, num_val=2, image_hw=(128, 128), seed=0)
    dataset_convert(folder/'shapes'/'train', folder/'shapes'/'train.json', folder, 'train', num_shards=1, workers=1)
    dataset = dict(training_file_pattern=f'{folder}/train-*', num_classes=3, image_size='128,128',
                   max_instances_per_image=20)
    training = dict(
        train_batch_size=4, num_examples_per_epoch=8, num_epochs=2, learning_rate=.01, lr_warmup_epoch=1,
        lr_warmup_init=.001, checkpoint_period=1, moving_average_decay=.9, pruned_model_path=str(pruned.path),
        l2_weight_decay=0., l1_weight_decay=0.)
    return Spec().replace(model_config=dict(model_name=ARCH.name), dataset_config=dataset, training_config=training)


def start_trainer(spec, classes=None):
    "A trainer with the weights that its spec starts from, those weights, and the message about them."
    initial = initial_weights(spec)
    experiment = resolve_experiment(spec, initial)
    trainer = Trainer(experiment.arch, experiment.training)
    message = initialize_weights(trainer, MetricHistory(trainer.metric_names), initial, experiment.spec_text, classes)
    return trainer, initial, message


def test_imagenet_weights_do_not_replace_those_of_the_pruned_model(pruned, spec):
    "As in the spec of the first training, of which the retraining is a copy."
    trainer, initial, message = start_trainer(spec.replace(training_config=dict(checkpoint='imagenet')))
    assert initial.pretrained is None and message == f'retraining the pruned {pruned.path}'
    assert {name: trainer.arch.widths[name] for name in pruned.widths} == pruned.widths


def test_retraining_names_classes_that_are_not_those_of_the_pruned_model(pruned, spec):
    before = load_model_file(pruned.path, 'key').classes
    now = ClassTable(before.ids, (before.names[1], before.names[0], *before.names[2:]), before.num_classes)
    _, _, message = start_trainer(spec, now)
    changes = ', '.join(f'class {a} -> {b}' for a, b in zip(before.names, now.names) if a != b)
    assert message == f'retraining the pruned {pruned.path}; changed since pruning: {changes}' and '->' in changes
    assert 'changed since' not in start_trainer(spec, before)[2]


@pytest.mark.slow
def test_retraining_starts_from_the_pruned_file_alone_and_resumes_exactly(pruned, spec, tmp_path, capsys):
    fit.train(spec, tmp_path/'a', 'key')
    assert f'retraining the pruned {pruned.path}' in capsys.readouterr().err
    fit.train(spec.replace(training_config=dict(stop_at_epoch=1)), tmp_path/'b', 'key')
    fit.train(spec, tmp_path/'b', 'key')
    assert 'continuing from' in capsys.readouterr().err
    a, b = (load_model_file(tmp_path/folder/'model.step-4.tlt', 'key') for folder in 'ab')
    assert a.meta['kind'] == 'checkpoint' and a.optimizer
    assert {name: a.meta['arch']['widths'][name] for name in pruned.widths} == pruned.widths
    for path, value in load_model_file(pruned.path, 'key').ema.items(): assert a.ema[path].shape == value.shape
    for group in ('weights', 'ema', 'optimizer'):
        for path, value in getattr(a, group).items():
            np.testing.assert_allclose(getattr(b, group)[path], value, rtol=2e-3, atol=2e-4, err_msg=path)
    plan = prune(tmp_path/'a'/'model.step-4.tlt', '', 'key', dry_run=True, target_params=.5)
    assert plan.params.before == pruned.params.after


def test_retraining_starts_with_the_averaged_weights_a_fresh_optimizer_and_a_hint(spec, tmp_path):
    spec = spec.replace(training_config=dict(l2_weight_decay=4e-5))
    trainer, initial, message = start_trainer(spec)
    assert 'hint: l2_weight_decay 4e-05' in message and trainer.step == 0
    for name, value in optimizer_state(trainer).items(): assert 'momentum' not in name or not np.asarray(value).any()
    for weights in (weights_by_path(trainer.model), trainer.ema.to_dict()):
        for path, value in weights.items(): assert np.array_equal(value, initial.pruned.averaged_weights[path])


def test_a_checkpoint_beside_the_pruned_file_must_fit_it(pruned, spec, trained, tmp_path):
    small = load_model_file(pruned.path, 'key')
    meta = {'arch': arch_to_dict(ARCH), 'classes': small.meta['classes']}
    def save_part(name, *layers):
        weights = {path: value+1 for path, value in small.weights.items() if path.startswith(layers)}
        save_model_file(tmp_path/name, weights, meta, 'key')
        return weights
    def initialize(path):
        trainer, _, message = start_trainer(spec.replace(training_config=dict(checkpoint=str(path))))
        return message, weights_by_path(trainer.model)
    save_part('stem.tlt', 'stem')
    with pytest.raises(DamagedFileError, match='stem.tlt: its description says that class-predict has 27 filters, but'):
        initialize(tmp_path/'stem.tlt')
    weights = save_part('more.tlt', 'stem', 'class-predict', 'box-predict')
    assert {path.split('/')[0] for path in weights} == {'stem_conv', 'stem_bn', 'class-predict', 'box-predict'}
    message, loaded = initialize(tmp_path/'more.tlt')
    assert 'loaded' in message and 'more.tlt' in message and 'hint' not in message
    for path, value in loaded.items(): assert np.array_equal(value, weights.get(path, small.averaged_weights[path]))
    assert initialize(pruned.path)[0] == f'retraining the pruned {pruned.path}'       # named twice, as TAO specs do
    with pytest.raises(ValueError, match='leave checkpoint out'): initialize(trained)
