"Files of detections: tables, JSON and COCO results, read with the tools that users read them with."
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from effdet_nb.app.infer import infer
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.nms import NmsOptions
from effdet_nb.evaluate.ground_truth import samples_from_coco
from effdet_nb.evaluate.predict import load_coco_results
from effdet_nb.evaluate.result_files import (CSV_COLUMNS, AnnotationIds, choose_result_file, coco_result_list,
                                             write_csv_results)

NAMES = ['plain', 'with, comma', 'with "quotes"', 'línea\nnueva', '=1+1']


class FullImageDetector:
    "Finds one object of each class, as large as its input."
    image_hw, meta, nms_options = (64, 64), {}, NmsOptions(per_class=True)

    def __init__(self, names):
        self.classes = ClassTable.from_categories([dict(id=i, name=name) for i, name in enumerate(names, 1)])

    def __call__(self, images):
        n = len(self.classes.names)
        return [Detections([[0, 0, 64, 64]]*n, np.linspace(.9, .6, n), range(n)) for _ in images]


@pytest.fixture
def images(tmp_path):
    for name in ('day1/a.jpg', 'day2/a.jpg', 'day2/b é.png', 'empty.png'):
        (tmp_path/'in'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 30)).save(tmp_path/'in'/name)
    return tmp_path/'in'


def annotation_file(path, names, files):
    "A COCO file whose ids are neither those of the model nor those of a list."
    images = [dict(id=100+i, file_name=name, width=40, height=30) for i, name in enumerate(files)]
    categories = [dict(id=50+i, name=name) for i, name in enumerate(names)]
    annotations = [dict(id=1, image_id=100, category_id=50, bbox=[0, 0, 40, 30], area=1200, iscrowd=0)]
    path.write_text(json.dumps(dict(images=images, categories=categories, annotations=annotations)))
    return path


def test_a_table_keeps_every_name_and_number(images, tmp_path):
    infer(FullImageDetector(NAMES), images, out_label_path=tmp_path/'new'/'all.csv', recursive=True)
    with open(tmp_path/'new'/'all.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0])==CSV_COLUMNS and len(rows)==4*len(NAMES)
    assert [row['class'] for row in rows[:5]]==NAMES and {row['image'] for row in rows}=={
        str(images/name) for name in ('day1/a.jpg', 'day2/a.jpg', 'day2/b é.png', 'empty.png')}
    assert [float(rows[0][k]) for k in ('x1', 'y1', 'x2', 'y2', 'score')]==[0, 0, 40, 30, .9]
    assert [p.name for p in (tmp_path/'new').iterdir()]==['all.csv']            # no label files beside it


@pytest.mark.parametrize('name,file_format', [('out.json', None), ('folder', 'json'), ('x/out.json', 'json')])
def test_json_lists_images_without_objects_too(images, tmp_path, name, file_format):
    infer(FullImageDetector(NAMES), images, out_label_path=tmp_path/name, recursive=True, label_format=file_format,
          score_threshold=.95)
    path = tmp_path/name if name.endswith('.json') else tmp_path/name/'detections.json'
    contents = json.loads(path.read_text())
    assert len(contents['images'])==4 and contents['annotations']==[]
    assert [c['name'] for c in contents['categories']]==NAMES


def test_pycocotools_evaluates_the_results(images, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = annotation_file(tmp_path/'truth.json', NAMES, ['day1/a.jpg', 'day2/a.jpg', 'b é.png'])
    infer(FullImageDetector(NAMES), images, out_label_path=tmp_path/'results.json', recursive=True,
          annotations_file=truth)
    assert '1 of 4 images are not in' in capsys.readouterr().err
    results = json.loads((tmp_path/'results.json').read_text())
    assert {r['image_id'] for r in results}=={100, 101, 102} and {r['category_id'] for r in results}=={*range(50, 55)}
    coco = COCO(str(truth))
    evaluation = COCOeval(coco, coco.loadRes(str(tmp_path/'results.json')), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert np.isclose(evaluation.stats[0], 1)       # the only object is found with the right ids


def test_our_evaluation_reads_the_results_too(images, tmp_path):
    truth = annotation_file(tmp_path/'truth.json', NAMES, ['day1/a.jpg', 'day2/a.jpg', 'b é.png'])
    infer(FullImageDetector(NAMES), images/'day1', out_label_path=tmp_path/'r.json', annotations_file=truth)
    truths = [truth for _, truth in samples_from_coco(truth, images)]
    classes = ClassTable.from_categories([dict(id=50+i, name=name) for i, name in enumerate(NAMES)])
    loaded = load_coco_results(tmp_path/'r.json', truths, classes)
    assert {truth.image_id: len(detections) for truth, detections in loaded}=={100: 5, 101: 0, 102: 0}


def class_table(**ids): return ClassTable.from_categories([dict(id=k, name=name) for name, k in ids.items()])


@pytest.mark.parametrize('names,model,expected,warns', [
    (['Katze', 'Hund'], dict(cat=50, dog=51), {50: 50, 51: 51}, True),
    (['person', 'car'], dict(person=50, vehicle=51), {50: 50, 51: 51}, True),           # one was renamed
    (['person', 'car', 'bus'], dict(car=1, bus=2), {1: 51, 2: 52}, False),
    (['person', 'car'], dict(person=51, car=50), {51: 50, 50: 51}, False)])
def test_ids_of_a_model_are_used_with_a_warning_where_names_differ(tmp_path, capsys, names, model, expected, warns):
    truth = annotation_file(tmp_path/'truth.json', names, ['a.jpg'])
    assert AnnotationIds(truth).category_ids(class_table(**model))==expected
    assert ('Check that these are the same classes' in capsys.readouterr().err)==warns


@pytest.mark.parametrize('names,model', [
    (['Katze', 'Hund'], dict(cat=1, dog=51)), (['dog', 'person', 'bird'], dict(cat=50, dog=51)),
    (['person', 'car', 'bus'], dict(bus=50, van=51)), (['b', 'a'], dict(a=50, b=51, c=52))])
def test_ids_of_other_classes_are_refused(tmp_path, names, model):
    truth = annotation_file(tmp_path/'truth.json', names, ['a.jpg'])
    with pytest.raises(ValueError, match='are not those of the model'):
        AnnotationIds(truth).category_ids(class_table(**model))


@pytest.mark.parametrize('listed,paths,image_ids,warning', [
    (['train/a.jpg'], ['in/train/a.jpg', 'in/val/a.jpg'], [100], '1 of 2 images are not in'),
    (['a.jpg'], ['day1/a.jpg', 'day2/a.jpg'], [100, 100], 'day1/a.jpg and day2/a.jpg are both image 100'),
    (['d/a.jpg', 'b.jpg'], ['d/a.jpg', 'x/b.jpg'], [100, 101], None)])
def test_an_image_of_the_same_name_in_another_folder_does_not_pass_silently(tmp_path, capsys, listed, paths, image_ids,
                                                                           warning):
    truth = annotation_file(tmp_path/'truth.json', ['x'], listed)
    table = class_table(x=50)
    found = Detections([[0, 0, 9, 9]], [.5], [0], class_table=table)
    predictions = [SimpleNamespace(path=path, detections=found, image_hw=(30, 40)) for path in paths]
    results = coco_result_list(predictions, table, AnnotationIds(truth))
    assert [r['image_id'] for r in results]==image_ids
    printed = capsys.readouterr().err
    assert warning in printed if warning else printed==''


@pytest.mark.parametrize('labelled_hw,bbox', [
    ((30, 40), [0, 0, 40, 30]), ((60, 80), [0, 0, 80, 60]), ((15, 21), [0, 0, 21, 15]),
    ((40, 30), [0, 0, 40, 30]), ((0, 0), [0, 0, 40, 30]),           # turned, and unknown
    ((60, 60), [0, 0, 60, 60])])                                    # stretched
def test_results_are_in_pixels_of_the_labels(images, tmp_path, labelled_hw, bbox):
    truth = annotation_file(tmp_path/'truth.json', NAMES, ['day1/a.jpg'])
    data = json.loads(truth.read_text())
    data['images'][0].update(height=labelled_hw[0], width=labelled_hw[1])
    data['annotations'] = []
    truth.write_text(json.dumps(data))
    infer(FullImageDetector(NAMES), images, out_label_path=tmp_path/'r.json', label_format='coco',
          annotations_file=truth, only=truth)
    assert {tuple(r['bbox']) for r in json.loads((tmp_path/'r.json').read_text())}=={tuple(bbox)}


def test_a_size_of_labels_that_cannot_be_true_is_not_used(tmp_path):
    truth = annotation_file(tmp_path/'truth.json', ['x'], ['a.jpg', 'b.jpg'])
    data = json.loads(truth.read_text())
    data['images'][0].update(height=15, width=20)                   # its box has 40 x 30 pixels
    data['images'][1].update(height=1000, width=1020)
    truth.write_text(json.dumps(data))
    ids = AnnotationIds(truth)
    assert ids.scale(100, (30, 40))==(1, 1)
    assert ids.scale(101, (1020, 1000))==(1, 1) and ids.scale(101, (500, 510))==(2, 2)


@pytest.mark.parametrize('path,found', [
    ('day1/a.jpg', 100), ('/data/x/day2/a.jpg', 101), ('./day2/../day2/a.jpg', 101), ('elsewhere/a.jpg', None),
    ('day2\\a.jpg', 101), ('c.jpg', 102), ('./c.jpg', 102), ('/data/day3/c.jpg', 102), ('a.jpg', None),
    ('other/c.jpg', None), ('/c.jpg', 102), ('day1/c.jpg', None), ('3/c.jpg', None), ('C.jpg', 102)])
def test_images_are_found_by_the_end_of_their_path(tmp_path, path, found):
    ids = AnnotationIds(annotation_file(tmp_path/'t.json', ['x'], ['day1/a.jpg', 'day2/a.jpg', 'day3/c.jpg']))
    assert ids.image_id(path)==found


@pytest.mark.parametrize('listed,path,found', [
    (['A.JPG'], 'in/a.jpg', 100), (['\u00e9.jpg'], 'in/e\u0301.jpg', 100),
    (['my%20photo.jpg'], 'in/my photo.jpg', 100),
    (['1a2b3c4d-a.jpg'], 'in/a.jpg', 100), (['day1/1a2b3c4d-a.jpg'], 'in/day2/a.jpg', None),
    (['/home/x/train/a.jpg'], 'in/a.jpg', 100), ([r'C:\x\a.jpg'], 'in/a.jpg', 100),
    (['../x/a.jpg'], 'in/a.jpg', 100),
    (['https://x/a.jpg?token=1'], 'in/a.jpg', 100), (['train/a.jpg'], 'in/a.jpg', None),
    (['/x/1/a.jpg', '/x/2/a.jpg'], 'in/a.jpg', None), (['/x/1/a.jpg', '/x/2/a.jpg'], '/x/2/a.jpg', 101),
    (['a.jpg', 'A.jpg'], 'in/A.jpg', 101), (['1a2b3c4d-a.jpg', 'a.jpg'], 'in/a.jpg', 101),
    (['1a2b3c4d-a.jpg', 'a.jpg'], 'in/1a2b3c4d-a.jpg', 100)])
def test_names_that_conversion_finds_have_their_ids(tmp_path, listed, path, found):
    assert AnnotationIds(annotation_file(tmp_path/'t.json', ['x'], listed)).image_id(path)==found


@pytest.mark.parametrize('arguments,message', [
    (('x.csv', 'json'), 'do not fit together'), (('x.txt', 'csv'), 'do not fit together'),
    (('x.json', 'kitti'), 'do not fit together'), (('labels', 'coco'), '--annotations_file'),
    (('x.csv', None, 'truth.json'), '--format coco'), ((None, 'json'), 'no path')])
def test_contradictions_are_refused_before_the_work(arguments, message):
    with pytest.raises(ValueError, match=message): choose_result_file(*arguments)


def test_a_folder_at_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path/'x.csv').mkdir()
    with pytest.raises(ValueError, match='this is a folder'): choose_result_file(tmp_path/'x.csv')


def test_no_predictions_give_a_table_of_one_line(tmp_path):
    write_csv_results(tmp_path/'x.csv', [])
    assert (tmp_path/'x.csv').read_text()==','.join(CSV_COLUMNS)+'\n'
    classes = ClassTable.from_categories([dict(id=1, name='x')])
    ids = SimpleNamespace(category_ids=lambda table: {1: 1})
    assert coco_result_list([], classes, ids)==[]
