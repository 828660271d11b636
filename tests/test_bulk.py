"Bulk inference: one row per image whatever happens to it, and the same results as on one machine."
import json
import sys
from dataclasses import replace

import onnx
import pytest
from PIL import Image

from effdet_nb.app.bulk import _from_row, _load_once, infer_bulk, predict_and_save
from effdet_nb.export.onnx_nms import add_onnx_nms
from effdet_nb.app.infer import infer
from effdet_nb.app.inference_files import rename_classes
from effdet_nb.core.console import read_status
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.nms import NmsOptions
from onnx_toy import toy_onnx_model


@pytest.fixture
def model_and_images(tmp_path):
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    (tmp_path/'in'/'deep').mkdir(parents=True)
    for name, i in (('0.png', 0), ('1.png', 1), ('2.png', 2), ('deep/3.png', 3)):
        Image.new('RGB', (100+i, 60), (60*i, 0, 0)).save(tmp_path/'in'/name)
    (tmp_path/'in'/'bad.jpg').write_bytes(b'?')
    return tmp_path


def test_one_image_is_one_row(model_and_images):
    folder = model_and_images
    model_path, labels = str(folder/'a.onnx'), folder/'l'/'0.txt'
    row = predict_and_save((str(folder/'in'/'0.png'), str(folder/'p'/'0.png'), str(labels)), model_path, {1: 'eins'})
    row = json.loads(json.dumps(row))
    assert len(row['ids']) == len(labels.read_text().splitlines()) > 0
    assert Image.open(folder/'p'/'0.png').size == (100, 60)
    row = predict_and_save((str(folder/'in'/'bad.jpg'), None, None), model_path, {})
    assert 'bad.jpg' in row['error']


def test_an_error_of_the_detector_ends_the_run_and_is_no_row(model_and_images, monkeypatch):
    class BrokenDetector:
        image_hw, classes = (64, 64), ClassTable.from_categories([dict(id=1, name='a')])
        def __call__(self, images): raise ValueError('the network has diverged')

    job = (str(model_and_images/'in'/'0.png'), None, None)
    for is_parallel in (False, True):
        broken = BrokenDetector()
        broken.is_parallel = is_parallel
        monkeypatch.setattr('effdet_nb.app.bulk._load_once', lambda *_: broken)
        with pytest.raises(ValueError, match='diverged'): predict_and_save(job, 'a.onnx', {})


def test_a_worker_opens_the_model_once_whatever_the_order_of_keywords(model_and_images):
    job, model_path = (str(model_and_images/'in'/'0.png'), None, None), str(model_and_images/'a.onnx')
    _load_once.cache_clear()
    predict_and_save(job, model_path, {}, score_threshold=.5, max_detections=9, class_agnostic=False)
    predict_and_save(job, model_path, {}, class_agnostic=False, max_detections=9, score_threshold=.5)
    predict_and_save(job, model_path=model_path, names={1: 'eins'}, max_detections=9)
    assert _load_once.cache_info().misses == 1


def test_only_the_main_process_warns_of_a_label_map(model_and_images, capsys):
    "A worker would repeat the warning for every image."
    job, model_path = (str(model_and_images/'in'/'0.png'), None, None), str(model_and_images/'a.onnx')
    assert predict_and_save(job, model_path, {40: 'x'})['ids']
    assert 'warning' not in capsys.readouterr().err
    rename_classes(ClassTable.from_categories([dict(id=1, name='a')]), {40: 'x'}, 'maps/labels.txt')
    assert 'warning: maps/labels.txt names 1 categories' in capsys.readouterr().err


def test_without_beam_the_error_says_what_to_install(model_and_images, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    with pytest.raises(ImportError, match=r'effdet_nb\[beam\]'):
        infer_bulk(model_and_images/'a.onnx', model_and_images/'in', model_and_images/'out')


def test_a_missing_folder_is_a_failure_in_the_status_file(model_and_images, monkeypatch):
    monkeypatch.setattr('effdet_nb.app.bulk._import_beam', lambda: None)
    folder = model_and_images
    (folder/'empty').mkdir()
    for source in ('gone', 'empty', 'in/*.gif'):
        with pytest.raises(FileNotFoundError): infer_bulk(folder/'a.onnx', folder/source, folder/'out')
        assert read_status(folder/'out')[-1]['status'] == 'FAILURE'


def run_in_a_loop(beam, jobs, rows, options, model_path, names, limits):
    "A loop in place of the pipeline."
    rows.write_text('\n'.join(json.dumps(predict_and_save(job, model_path, names, **limits)) for job in jobs))


@pytest.fixture
def without_beam(monkeypatch):
    monkeypatch.setattr('effdet_nb.app.bulk._import_beam', lambda: None)
    monkeypatch.setattr('effdet_nb.app.bulk._run_pipeline', run_in_a_loop)


def test_images_are_turned_upright(model_and_images, without_beam, capsys):
    folder = model_and_images
    (folder/'turned').mkdir()
    flag = Image.Exif()
    flag[0x112] = 6
    Image.new('RGB', (100, 60)).save(folder/'turned'/'a.jpg', exif=flag)
    for upright, image_hw in ((False, (60, 100)), (True, (100, 60))):
        summary = infer_bulk(folder/'a.onnx', folder/'turned', folder/f'out{upright}', upright=upright)
        assert summary.predictions[0].image_hw == image_hw and summary.predictions[0].orientation == 6
        assert ('--upright' in capsys.readouterr().err) == (not upright)


def test_an_unreadable_image_is_a_failure_in_the_status_file(model_and_images, without_beam):
    folder = model_and_images
    (folder/'mixed').mkdir()
    Image.new('RGB', (100, 60)).save(folder/'mixed'/'a.png')
    (folder/'mixed'/'b.png').write_bytes(b'no image')
    summary = infer_bulk(folder/'a.onnx', folder/'mixed', folder/'out')
    last = read_status(folder/'out')[-1]
    assert (last['status'], last['message']) == ('FAILURE', summary.failure)
    assert summary.failure.startswith('1 of 2 images could not be read')


def test_only_the_listed_images_are_processed(model_and_images, without_beam):
    folder = model_and_images
    for names in (['0.png'], ['deep/3.png', '1.png']):
        images = [dict(id=i, file_name=name, height=60, width=100) for i, name in enumerate(names)]
        coco = dict(images=images, annotations=[], categories=[dict(id=1, name='a')])
        (folder/'part.json').write_text(json.dumps(coco))
        summary = infer_bulk(folder/'a.onnx', folder/'in', folder/'out', only=folder/'part.json')
        assert {str(p.path.relative_to(folder/'in')) for p in summary.predictions} == set(names)


class Crowd:
    "A detector of 150 boxes of class a and five of class b, with lower scores."
    image_hw, classes, nms_options = (64, 64), ClassTable.from_categories([dict(id=1, name='a'),
                                                                           dict(id=2, name='b')]), NmsOptions()

    def set_nms_options(self, **changes): self.nms_options = replace(self.nms_options, **changes)

    def __call__(self, images):
        found = Detections([[0, 0, 9, 9]]*155, [.9]*150+[.8]*5, [0]*150+[1]*5)
        return [found[:self.nms_options.max_detections] for _ in images]


@pytest.mark.parametrize('options, expected', [
    (dict(), dict(a=100)), (dict(classes=['b']), dict(b=5)), (dict(classes=['b'], max_detections=2), dict(b=2)),
    (dict(classes=['a']), dict(a=100))])
def test_chosen_classes_are_not_displaced_by_others(model_and_images, without_beam, monkeypatch, options, expected):
    monkeypatch.setattr('effdet_nb.export.runtimes.load_detector', lambda *_: Crowd())
    _load_once.cache_clear()
    summary = infer_bulk('a.tlt', model_and_images/'in'/'0.png', model_and_images/'out', **options)
    _load_once.cache_clear()
    assert dict(summary.boxes_per_class) == expected


def test_classes_of_a_file_with_suppression_are_one_warning(model_and_images, without_beam, capsys):
    folder = model_and_images
    name = _load_once(str(folder/'a.onnx'), .5, None, False).classes.names[0]
    summary = infer_bulk(folder/'a.onnx', folder/'in', folder/'out', classes=[name])
    assert set(summary.boxes_per_class) <= {name}
    assert capsys.readouterr().err.count('best boxes of all classes') == 1


def test_a_row_of_an_older_run_has_no_orientation(model_and_images):
    job, model_path = (str(model_and_images/'in'/'0.png'), None, None), str(model_and_images/'a.onnx')
    row = predict_and_save(job, model_path, {})
    del row['orientation']
    assert _from_row(row, _load_once(model_path, .5, None, False).classes).orientation == 1


def files_below(folder):
    return {p.relative_to(folder) for p in folder.rglob('*') if p.is_file() and p.name != 'found.jsonl'}


def test_the_pipeline_gives_the_results_of_one_machine(model_and_images):
    pytest.importorskip('apache_beam', reason='needs the extra [beam]')
    folder = model_and_images
    many = infer_bulk(folder/'a.onnx', folder/'in', folder/'many', recursive=True)
    one = infer(folder/'a.onnx', folder/'in', results_dir=folder/'one', recursive=True)
    assert one.counts == dict(images=4, boxes=one.boxes_per_class.total(), unreadable=1)
    assert many.counts == one.counts and many.boxes_per_class == one.boxes_per_class
    assert files_below(folder/'many') == files_below(folder/'one')
    a, b = (json.loads((folder/name/'detections.json').read_text()) for name in ('many', 'one'))
    assert a['images'] == b['images'] and a['categories'] == b['categories']
    assert [o['bbox'] for o in a['annotations']] == [o['bbox'] for o in b['annotations']]
    for p in (folder/'one'/'labels').rglob('*.txt'):
        assert p.read_text() == (folder/'many'/p.relative_to(folder/'one')).read_text()
