"Odd sizes, rectangles and grey cameras, from records to the exported file."
import numpy as np
import pytest
from PIL import Image

from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.convert import dataset_convert
from effdet_nb.export.export import export
from effdet_nb.app.infer import infer
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train import fit as T
from effdet_nb.prune.channel_groups import channel_graph
from effdet_nb.prune.prune import prune
from effdet_nb.detector.anchors import all_anchors, feature_size
from effdet_nb.detector.bifpn import nearest_indices
from effdet_nb.weights.model_file import load_keras_detector
from effdet_nb.detector.efficientdet import Arch, arch_anchors, match_channels, build
from effdet_nb.detector.images import to_channels
from effdet_nb.train.spec import Spec


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "Drawn scenes; half of the images are stored as grey PNG."
    folder = tmp_path_factory.mktemp('shapes')
    make_toy_dataset(folder/'shapes', num_train=4, num_val=2, image_hw=(150, 200), seed=0)
    for split in ('train', 'val'):
        for p in sorted((folder/'shapes'/split).iterdir())[::2]: Image.open(p).convert('L').save(p)
        dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder, split, num_shards=1, workers=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name, size, channels',
                         [('efficientdet-tiny', '157,203', 3), ('efficientdet-lite0', '128,192', 1)])
def test_odd_and_grey_go_all_the_way(records, tmp_path, name, size, channels):
    spec = Spec().replace(
        dataset_config=dict(training_file_pattern=f'{records}/train-*', validation_file_pattern=f'{records}/val-*',
                            validation_json_file=f'{records}/shapes/val.json',
                            num_classes=4, image_size=size, num_channels=channels, max_instances_per_image=20),
        training_config=dict(train_batch_size=2, num_epochs=1, learning_rate=.01,
                             lr_warmup_epoch=0), eval_config=dict(eval_batch_size=2,
                                                                  eval_epoch_cycle=1),
                          model_config=dict(model_name=name))
    history = T.train(spec, tmp_path/'run')
    assert np.isfinite(history[0]['loss']) and 'AP' in history[0]
    path = next((tmp_path/'run').glob('model.step-*.tlt'))
    keras_one = load_keras_detector(path)
    assert keras_one.model.input.shape[1:] == (*keras_one.image_hw, channels)
    exported = export(path, tmp_path/'m.onnx', nms='none')
    onnx_one = load_detector(exported.path)
    images = np.random.default_rng(0).integers(0, 256, (2, *keras_one.image_hw, 3)).astype('uint8')
    for k, a in keras_one.forward(images).items(): np.testing.assert_allclose(onnx_one.forward(images)[k], a, atol=2e-3)
    grey = to_channels(images, 1)
    # a camera may hand over one channel
    for one in (keras_one, onnx_one):
        np.testing.assert_allclose(one.forward(grey)['cls_logits'], one.forward(np.repeat(grey, 3, -1))['cls_logits'],
                                   atol=1e-5)
    infer(tmp_path/'m.onnx', records/'shapes'/'val', tmp_path/'out', tmp_path/'labels', score_threshold=.001)
    assert len(list((tmp_path/'out').iterdir())) == 2
    prune(path, tmp_path/'pruned.tlt', pruning_threshold=.9, min_num_filters=8)
    pruned, whole = (one.forward(images) for one in (load_keras_detector(tmp_path/'pruned.tlt'), keras_one))
    assert pruned['box_deltas'].shape == whole['box_deltas'].shape


@pytest.mark.parametrize('hw', [(333, 500), (129, 511), (160, 288), (544, 960)])
def test_every_row_of_an_odd_network_has_its_anchor(hw):
    arch = Arch('efficientdet-tiny', hw, 2)
    model = build(arch)
    assert model.output['cls_logits'].shape[1] == len(arch_anchors(arch)) == 9*sum(np.prod(feature_size(hw, l))
                                                                                   for l in range(3, 8))
    a = all_anchors(hw)
    rows, cols = feature_size(hw, 3)
    centres = (a[:, :2]+a[:, 2:])/2
    # half a stride, which is a fraction, per axis
    np.testing.assert_allclose(centres[0], (hw[0]/rows/2, hw[1]/cols/2), rtol=1e-5)
    np.testing.assert_allclose(centres[9*rows*cols-1], (hw[0]-hw[0]/rows/2, hw[1]-hw[1]/cols/2), rtol=1e-5)


@pytest.mark.parametrize('n, wanted', [(n, m) for n in (1, 2, 3, 5, 6, 11, 21, 42) for m in (n, 2*n-1, 2*n) if m])
def test_cells_are_repeated_as_tensorflows_resize_does(n, wanted):
    import tensorflow as tf
    row = np.arange(n, dtype='float32').reshape(1, n, 1, 1)
    theirs = tf.compat.v1.image.resize_nearest_neighbor(row, [wanted, 1])
    np.testing.assert_array_equal(nearest_indices(n, wanted), np.array(theirs).ravel().astype(int))


def test_both_ways_of_becoming_grey_agree():
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype('uint8')
    # a half may be rounded either way
    assert np.abs(to_channels(images, 1).astype(int)-np.array(match_channels(images, 1)).astype(int)).max() <= 1
    grey = np.arange(256, dtype='uint8').reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(match_channels(np.repeat(grey, 3, -1), 1), grey)


def test_channel_groups_of_a_lite_network():
    graph = channel_graph(build(Arch('efficientdet-lite0', (128, 128), 3)))
    assert {'stem_conv', 'p6', 'class-0'} <= {n for g in graph.groups for n in g.producers}
    assert all(g.size > 0 for g in graph.groups)
