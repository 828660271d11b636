"Values at the edge of what options and files allow: one sentence before the work, and no file is lost."

import json
import sys
from types import SimpleNamespace

import pytest
from test_split import make_dataset, split

from effdet_nb.app.cli import effdet_export
from effdet_nb.app.compare import effdet_compare
from effdet_nb.app.dataset_page import check_dataset
from effdet_nb.app.html import check_page_path, write_html_page
from effdet_nb.app.video import VideoWriter
from effdet_nb.core.files import exclusive_lock
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.shards import output_lock
from effdet_nb.data.split import split_dataset
from effdet_nb.data.tile_dataset import tile_dataset
from effdet_nb.detector.tiles import Tiling
from effdet_nb.evaluate.predict import load_coco_results
from effdet_nb.export import browser
from effdet_nb.export.export import export
from effdet_nb.train.spec import Spec
from effdet_nb.weights.import_weights import import_weights
from effdet_nb.weights.pretrained import WeightsError


# --- an output does not replace a file of another kind

FILES = {'history.csv': 'epoch,loss\n1,2\n', 'labels.json': '{"images": []}', 'notes.txt': '\n<html> is a word',
         'model.tlt': 'PK\x03\x04'}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('command', [
    lambda path: effdet_compare(runs=[str(path.parent)], output_path=str(path)),
    lambda path: check_dataset(Spec(), path), check_page_path], ids=['compare', 'check', 'path'])
def test_a_page_replaces_no_file_that_is_no_page(command, name, tmp_path, capsys):
    (tmp_path/name).write_text(FILES[name])
    with pytest.raises((ValueError, SystemExit)) as error: command(tmp_path/name)
    message = capsys.readouterr().err if error.type is SystemExit else str(error.value)
    assert f'{name}: exists, is no HTML page and would be replaced' in message
    assert (tmp_path/name).read_text() == FILES[name]


@pytest.mark.parametrize('text', ['<!doctype html>', '\n <!DOCTYPE HTML>\n<html>', ''])
def test_a_page_replaces_an_earlier_page(text, tmp_path):
    (tmp_path/'page.html').write_text(text)
    write_html_page(check_page_path(tmp_path/'page.html'), 'title', {})
    assert 'title' in (tmp_path/'page.html').read_text()


# --- two commands at once

def test_two_splits_at_once_do_not_mix_their_parts(tmp_path):
    make_dataset(tmp_path, [f'{i}' for i in range(6)], lambda i: [1])
    earlier = split(tmp_path, near='skip').files
    before = {path: path.read_bytes() for path in earlier.values()}
    with output_lock(tmp_path/'out', 'split'), pytest.raises(ValueError, match='another process is writing "split"'):
        split(tmp_path, near='skip', seed=3)
    assert {path: path.read_bytes() for path in earlier.values()} == before
    assert sum(split(tmp_path, near='skip', seed=3).num_images.values()) == 6


def test_two_web_pages_at_once_do_not_mix_their_models(tmp_path, monkeypatch):
    settings = dict(name='toy', lowest=.1)
    monkeypatch.setattr(browser, '_settings_and_graph', lambda path, name, key: (settings, b''))
    monkeypatch.setattr(browser, 'fetch_ort_web', dict)
    monkeypatch.setattr(browser, 'page_scripts', lambda pairs, files: {'a.js': 'new'})
    (tmp_path/'a.js').write_text('of another page')
    message = 'another process is writing a page'
    with exclusive_lock(tmp_path/'.page.lock', ''), pytest.raises(ValueError, match=message):
        browser.write_browser_page(['m.onnx'], tmp_path)
    assert (tmp_path/'a.js').read_text() == 'of another page'
    assert browser.write_browser_page(['m.onnx'], tmp_path).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.js', 'index.html']


def test_a_model_that_cannot_be_opened_is_reported_before_the_runtime_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, 'fetch_ort_web', lambda: pytest.fail('was fetched'))
    with pytest.raises(FileNotFoundError, match='no such file'):
        browser.write_browser_page([tmp_path/'none.onnx'], tmp_path/'page')


# --- numbers

@pytest.mark.parametrize('seed', [-1, -7, -10**20])
def test_a_negative_seed_is_refused(seed, tmp_path):
    with pytest.raises(SourceError, match=f'--seed {seed}: must be 0 or more'):
        split_dataset('labels.json', None, tmp_path/'out', seed=seed)


@pytest.mark.parametrize('workers', [0, -1, -10**9])
def test_tiles_need_a_thread(workers, tmp_path):
    with pytest.raises(ValueError, match=f'workers: {workers}; must be at least 1'):
        tile_dataset(tmp_path, tmp_path/'labels.json', tmp_path/'out', Tiling((64, 64)), workers=workers)


@pytest.mark.parametrize('every', [1, 60_000, 10**30])
def test_a_video_of_very_few_frames_has_a_rate(every):
    assert VideoWriter('out.mp4', 25/every).rate >= 1/1001


@pytest.mark.parametrize('num_classes', [0, -3, 10**8])
def test_an_impossible_number_of_classes_is_refused_before_weights_are_read(num_classes, tmp_path):
    with pytest.raises(WeightsError, match=f'num_classes: {num_classes}; must be from 1 to 100,000'):
        import_weights('imagenet', tmp_path/'out.tlt', num_classes=num_classes)


@pytest.mark.parametrize('output', ['m.onnx', 'm.tflite', 'm.etlt'])
@pytest.mark.parametrize('folder', ['missing', 'empty'])
def test_a_folder_without_calibration_images_is_reported_before_the_export(folder, output, tmp_path, monkeypatch):
    (tmp_path/'empty').mkdir()
    monkeypatch.setattr('effdet_nb.export.export.load_model_file', lambda *args: pytest.fail('was opened'))
    with pytest.raises(FileNotFoundError, match=f'{folder}: no (images|such folder)'):
        export('m.tlt', tmp_path/output, data_type='int8', cal_image_dir=tmp_path/folder)


# --- files of detections

ROW = dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4], score=.5)


@pytest.mark.parametrize('changes', [
    dict(bbox=[10**400, 1, 1, 1]), dict(bbox=[1e308, 1, 1, 1]), dict(score=10**400), dict(score=float('nan')),
    dict(bbox=[1, 2, -float('inf'), 4]), dict(score=-1e31)])
def test_a_number_that_does_not_fit_names_its_row(changes, tmp_path):
    path = tmp_path/'results.json'
    path.write_text(json.dumps([ROW, ROW | changes]))
    with pytest.raises(ValueError, match='results.json: 1 of 2 detections are not complete.*a finite score'):
        load_coco_results(path, [SimpleNamespace(image_id=1)], ClassTable((1,), ('a',), 2))


@pytest.mark.parametrize('text', ['['*100_000, '[' + '9'*5000 + ']', '{', '\x00'])
def test_a_file_of_detections_that_is_no_json_is_named(text, tmp_path):
    (tmp_path/'results.json').write_text(text)
    with pytest.raises(ValueError, match='results.json: not valid JSON'):
        load_coco_results(tmp_path/'results.json', [], ClassTable((1,), ('a',), 2))


@pytest.mark.parametrize('options', [dict(batches=0), dict(batches=-3), dict(batches=5, batch_size=-1)])
def test_calibration_needs_batches(options, tmp_path):
    with pytest.raises(ValueError, match='each must be at least 1'):
        export('m.tlt', tmp_path/'m.onnx', data_type='int8', cal_image_dir=tmp_path, **options)


@pytest.mark.parametrize('options, message', [
    (dict(engine_file='m.engine'), 'TensorRT is not installed here'),
    (dict(engine_file='folder'), 'this is a folder, but the path of a file is needed')])
def test_an_engine_that_cannot_be_built_is_reported_before_the_export(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'folder').mkdir()
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    monkeypatch.setattr('effdet_nb.export.export.export', lambda *args, **kwargs: pytest.fail('was exported'))
    with pytest.raises(SystemExit) as error: effdet_export(model_path='m.tlt', output_path='m.onnx', **options)
    assert error.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize('options, message', [
    (dict(deepstream='m.tlt/ds'), 'm.tlt is a file, so it cannot contain another'),
    (dict(data_type='int8', cal_image_dir='folder', cal_cache_file='m.tlt/cache.json'), 'm.tlt is a file'),
    (dict(data_type='int8', cal_image_dir='folder', cal_cache_file='folder'), 'folder: this is a folder')])
def test_a_second_output_that_cannot_be_written_is_reported_before_the_export(options, message, tmp_path, monkeypatch,
                                                                              capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'folder').mkdir()
    (tmp_path/'m.tlt').write_bytes(b'model')
    monkeypatch.setattr('effdet_nb.weights.model_file.read_meta', lambda *args: pytest.fail('was opened'))
    with pytest.raises(SystemExit) as error: effdet_export(model_path='m.tlt', output_path='m.onnx', **options)
    assert error.value.code == 1 and message in capsys.readouterr().err
