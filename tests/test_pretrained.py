"Copying weights into a model: all that fits, nothing else, and nothing at all if something is wrong."

import json
import re

import keras
import numpy as np
import pytest

from effdet_nb.detector.efficientdet import Arch, arch_to_dict, build
from effdet_nb.weights.model_file import weights_by_path
from effdet_nb.weights.pretrained import SourceWeights, load_pretrained

HW = (128, 128)
ARCH = Arch(image_hw=HW, num_classes=90)


@pytest.fixture(scope='module')
def model():
    return build(ARCH)


@pytest.fixture(scope='module')
def google_arrays(shared_dir):
    "Google's D0 with random weights, by the names of its published checkpoint."
    data = np.load(shared_dir / 'oracle' / 'd0_weights.npz', allow_pickle=False)
    return {re.sub('^efficientnet-b0', 'backbone', name.replace('|', '/')): data[name] for name in data.files}


def test_greyscale_networks_load_colour_weights():
    grey_arch = Arch(image_hw=HW, num_classes=90, channels=1)
    colour, grey = build(ARCH), build(grey_arch)
    rng = np.random.default_rng(0)
    colour.get_layer('stem_bn').moving_mean.assign(rng.normal(size=32))
    weights = SourceWeights('c', 'colour', 'ours', weights_by_path(colour), ARCH.mean_rgb, ARCH.std_rgb)
    report = load_pretrained(grey, weights, grey_arch)
    assert 'the stem was converted from colour to greyscale images' in report.notes
    image = rng.integers(0, 256, (1, *HW, 1)).astype('uint8')
    expected, found = stem_output(colour, np.repeat(image, 3, -1)), stem_output(grey, image)
    # the last row and column see the padding
    np.testing.assert_allclose(found[:, :-1, :-1], expected[:, :-1, :-1], atol=2e-3)


def stem_output(model, images):
    return np.array(keras.Model(model.input, model.get_layer('stem_bn').output)(images))


@pytest.mark.slow
def test_another_number_of_anchors_reinitialises_both_predictors(model):
    arch = Arch(image_hw=HW, num_classes=90, num_scales=2)
    report = load_pretrained(build(arch), SourceWeights('c', 'ours', 'ours', weights_by_path(model)), arch)
    assert {path.split('/')[0] for path in report.missing} == {'class-predict', 'box-predict'}
    assert '9 anchors per location in the file, 6 in the model' in report.notes[0]


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('class_net/class-0/bias', np.full(64, np.inf, 'f4'), 'class-0/bias first'),
        (
            'box_net/box-1/pointwise_kernel',
            np.zeros((1, 1, 64, 88), 'f4'),
            r'\(1, 1, 64, 88\) in the file, \(1, 1, 64, 64\) in the model',
        ),
    ],
)
def test_a_wrong_value_or_shape_leaves_the_model_unchanged(model, google_arrays, name, value, message):
    check_refused(model, SourceWeights('bad', 'google', 'google', google_arrays | {name: value}), message)


def test_a_file_without_known_names_leaves_the_model_unchanged(model):
    check_refused(model, SourceWeights('bad', 'google', 'google', {'a/b': np.zeros(3)}), 'nothing to load')


def check_refused(model, weights, message):
    before = weights_by_path(model)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(model, weights, ARCH)
    assert '\n' not in str(error.value)
    for path, a in weights_by_path(model).items():
        np.testing.assert_array_equal(a, before[path])


OLD, GREY = (124, 116, 104), (127, 127, 127)

@pytest.mark.parametrize('role', ['checkpoint', 'pruned'])
@pytest.mark.parametrize('stored, expected', [(None, OLD), (GREY, GREY), ((1, 2, 3), (1, 2, 3))])
def test_a_run_goes_on_with_the_padding_of_its_file(role, stored, expected):
    from effdet_nb.train.experiment import InitialWeights, resolve_experiment
    from effdet_nb.train.spec import Spec
    from effdet_nb.weights.model_file import ModelFile
    description = json.loads(json.dumps(arch_to_dict(Arch('efficientdet-lite0', HW, 4))))
    if stored: description['pad_rgb'] = list(stored)
    else: del description['pad_rgb']
    spec = Spec().replace(
        model_config=dict(model_name='efficientdet-lite0'), dataset_config=dict(num_classes=4),
        training_config=dict(num_examples_per_epoch=100, train_batch_size=2))
    fresh, continued = (resolve_experiment(spec, InitialWeights(**files))
                        for files in ({}, {role: ModelFile(dict(arch=description))}))
    assert fresh.arch.pad_rgb == fresh.data.pad_rgb == GREY
    assert continued.arch.pad_rgb == continued.data.pad_rgb == expected
