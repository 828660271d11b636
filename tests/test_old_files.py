"""Files written by earlier code still open, continue and export.

The files in tests/fixtures were written at commit ea326e9, before the modules moved to the parts of the book: a pruned
efficientdet-d0 for 128 x 128 pixels with a spread-out class head (plain.tlt, sealed.tlt, and sealed.etlt exported from
it), a checkpoint after step 4 of 6 of a retraining of the same network (checkpoint.tlt, spec.txt), and what that code
computed from them (expected.npz: two images, every 16th row of both outputs, and the detections of the exported graph
in the first image). The key is "fixture".
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.export.export import export
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train.fit import train
from effdet_nb.train.spec import Spec
from effdet_nb.weights.encryption import WrongKeyError
from effdet_nb.weights.model_file import load_keras_detector, load_model_file

FIXTURES = Path(__file__).parent / 'fixtures'
KEY = 'fixture'
MODEL_FILES = [('plain.tlt', ''), ('sealed.tlt', KEY)]


@pytest.fixture(scope='module')
def expected():
    return np.load(FIXTURES / 'expected.npz', allow_pickle=False)


@pytest.mark.parametrize('name, key', MODEL_FILES)
def test_an_old_model_file_gives_the_same_outputs(expected, name, key):
    outputs = load_keras_detector(FIXTURES / name, key).forward(expected['images'])
    for output in ('cls_logits', 'box_deltas'):
        rows = np.asarray(outputs[output])[:, ::16]
        np.testing.assert_allclose(rows, expected[output], rtol=1e-4, atol=1e-5, err_msg=output)


def check_detections(found, expected):
    "The detections of the exported graph, in any order among equal scores."
    np.testing.assert_allclose(found.scores, expected['onnx_scores'], rtol=1e-4, atol=1e-6)
    rows = np.column_stack([found.boxes, 1000 * found.classes])
    expected_rows = np.column_stack([expected['onnx_boxes'], 1000 * expected['onnx_classes']])
    distances = np.abs(rows[:, None] - expected_rows).max(-1)
    is_tied = expected['onnx_scores'] <= expected['onnx_scores'][-1] * (
        1 + 1e-4
    )  # the cut at 100 may choose another of these
    assert (distances.min(0)[~is_tied] < 0.01).all() and (~is_tied).sum() > 50


@pytest.mark.parametrize('name, key', MODEL_FILES)
@pytest.mark.slow
def test_an_old_model_file_exports_to_onnx(expected, tmp_path, name, key):
    result = export(FIXTURES / name, tmp_path / 'model.onnx', key)
    check_detections(load_detector(result.path)(expected['images'])[0], expected)


def test_an_old_exported_file_gives_the_same_detections(expected):
    check_detections(load_detector(FIXTURES / 'sealed.etlt', KEY)(expected['images'])[0], expected)


def test_an_old_file_refuses_a_wrong_key():
    for path in ('sealed.tlt', 'checkpoint.tlt'):
        with pytest.raises(WrongKeyError, match='another key'):
            load_model_file(FIXTURES / path, 'another')
    with pytest.raises(WrongKeyError, match='another key'):
        load_detector(FIXTURES / 'sealed.etlt', 'another')


@pytest.mark.slow
def test_an_old_checkpoint_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_toy_dataset('shapes', num_train=8, num_val=2, image_hw=(128, 128), seed=0)
    for split in ('train', 'val'):
        dataset_convert(f'shapes/{split}', f'shapes/{split}.json', 'records', split, num_shards=1, workers=1)
    Path('run').mkdir()
    shutil.copy(FIXTURES / 'checkpoint.tlt', 'run/model.step-4.tlt')
    shutil.copy(FIXTURES / 'sealed.tlt', 'pruned.tlt')  # the spec names it; the weights come from the checkpoint
    spec = Spec.load(FIXTURES / 'spec.txt').replace(training_config=dict(stop_at_epoch=0))
    last_epoch = train(spec, 'run', KEY)[-1]
    assert last_epoch['epoch'] == 3 and abs(last_epoch['loss'] - 1.79197) < 1e-3
    assert load_model_file('run/model.step-6.tlt', KEY).meta['step'] == 6
