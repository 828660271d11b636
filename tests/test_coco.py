"Guards for effdet_nb.data.coco and the two chapters before it: every fault is named, every table is a bijection."
import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco, load_coco_lenient, report_annotation_issues
from effdet_nb.data.coco_json import CocoError
from effdet_nb.data.faults import Fault


def good():
    return dict(images=[dict(id=i, file_name=f'{i}.jpg', height=60, width=80) for i in (1, 2)],
                annotations=[dict(id=10 + i, image_id=1, category_id=1 + i % 2, bbox=[1 + i, 2, 30, 20])
                             for i in range(4)],
                categories=[dict(id=1, name='cat'), dict(id=2, name='dog')])


def load(tmp_path, data, raw=None):
    path = tmp_path/'x.json'
    path.write_bytes(json.dumps(data).encode() if raw is None else raw)
    return load_coco(path)


def test_order_and_empty_images_are_kept(tmp_path):
    data = good()
    data['images'].reverse()
    coco = load(tmp_path, data)
    assert [i['id'] for i in coco.images] == [2, 1]
    assert coco.annotations[2] == [] and [a['id'] for a in coco.annotations[1]] == [10, 11, 12, 13]
    assert coco.num_annotations == 4


def _set(part, i, **kw):
    def change(d): d[part][i].update(kw)
    return change
def _drop(part, i, key):
    def change(d): del d[part][i][key]
    return change


faults = [
    (_drop('images', 0, 'file_name'), 'images[0] has no file_name', 1, 0),
    (_drop('annotations', 2, 'bbox'), 'annotations[2] has no bbox', 2, 3),
    (_drop('annotations', 2, 'image_id'), 'annotations[2] has no image_id', 2, 3),
    (_drop('categories', 0, 'id'), 'categories[0] has no id', 2, 2),
    (lambda d: d['images'].append(7), 'images[2] has no id, file_name', 2, 4),
    (lambda d: d['annotations'].append(None), 'annotations[4] has no id, image_id, category_id, bbox', 2, 4),
    (_set('images', 0, file_name=3), 'file_name is 3', 1, 0),
    (_set('images', 0, file_name='a\0.jpg'), 'need text', 1, 0),
    (_set('images', 0, file_name='\ud800.jpg'), 'need text', 1, 0),
    (_set('images', 0, id=2), 'images: 1 ids occur more than once (id 2: 2 times)', 1, 0),
    (_set('images', 0, id='2'), 'images: 1 ids occur more than once (id 2: 2 times)', 1, 0),
    (_set('images', 0, id=[1]), 'id is [1]; need a number or text', 1, 0),
    (_set('images', 0, id=1.5), 'id is 1.5; need a number or text', 1, 0),
    (_set('annotations', 0, bbox=[1, 2, 3]), 'annotations[0] (id 10): bbox is [1, 2, 3]', 2, 3),
    (_set('annotations', 0, bbox=[1, 2, 3, 'four']), 'need four numbers', 2, 3),
    (_set('annotations', 0, bbox='1 2 3 4'), 'need four numbers', 2, 3),
    (_set('annotations', 0, bbox=[1, 2, 3, True]), 'need four numbers', 2, 3),
    (_set('annotations', 0, image_id=9), 'image_id 9 is not in images: 1 box would be lost', 2, 3),
    (_set('annotations', 0, image_id={}), 'image_id {} is not in images', 2, 3),
    (_set('annotations', 0, category_id=5), 'category_id 5 is not in categories: 1 box', 2, 3),
    (_set('annotations', 0, category_id=[1]), 'category_id [1] is not in categories', 2, 3),
    (_set('categories', 0, id=2), 'categories: 1 ids occur more than once', 2, 2),
    (_set('categories', 0, id='cat'), "id is 'cat'", 2, 2),
    (_set('categories', 0, id=-1), 'id is -1', 2, 2),
    (_set('categories', 0, id=2**64), 'id is 18446744073709551616', 2, 2),
    (lambda d: d['annotations'].append(d['annotations'][0]), 'annotations: 1 ids occur more than once', 2, 4)]

notes = [
    (_drop('images', 1, 'width'), 'width is None; need whole numbers of pixels'),
    (_set('images', 0, height=0), 'height is 0, width is 80; need whole numbers of pixels'),
    (_set('images', 0, width=80.5), 'width is 80.5'),
    (_set('images', 0, width=float('nan')), 'width is nan'),
    (_set('images', 0, width=float('inf')), 'width is inf'),
    (_set('images', 0, width=10**9), 'width is 1000000000'),
    (_set('images', 0, width='80'), 'images[0]: its size is text; need numbers'),
    (_set('images', 0, width='80', height='60'), 'images[0]: its size is text; need numbers'),
    (_set('images', 0, file_name='2.jpg'), 'images[0]: its file 2.jpg has 2 entries (2 such entries)'),
    (_set('annotations', 0, id=11), 'annotations: 1 ids occur more than once'),
    (_set('annotations', 0, bbox=['1', '2', '3.5', '4']), 'annotations[0]: its bbox is text; need numbers'),
    (_set('annotations', 0, category_id=2, bbox=[2, 2, 30, 20]),
     'annotations[1]: an earlier annotation has the same box and category'),
    (_set('annotations', 0, area='n/a'), 'annotations[0] has no usable area (4 such entries)'),
    (_set('annotations', 0, iscrowd=-1), 'annotations[0] has no usable iscrowd (4 such entries)'),
    (lambda d: [a.update(iscrowd=1) for a in d['annotations']], 'annotations[0] is a crowd (4 such entries)'),
    (_drop('categories', 0, 'name'), 'categories[0] has no name'),
    (_set('categories', 0, name=''), 'categories[0] has no name'),
    (_set('categories', 0, name='dog'), 'categories[1]: another category has the name dog too'),
    (_drop('images', 1, 'height'), 'need whole numbers of pixels')]

useless = [
    (lambda d: d.pop('images'), '"images" is missing'),
    (lambda d: d.update(annotations={}), '"annotations" is not a list'),
    (lambda d: d.update(categories=None), '"categories" is not a list'),
    (lambda d: d.update(categories=[]), 'none of the 4 annotations can be used: category_id 1 is not in categories'),
    (lambda d: [i.update(path=i.pop('file_name')) for i in d['images']], 'none of the 2 images can be used'),
    (lambda d: [i.update(filename=i.pop('file_name')) for i in d['images']],
     'images[0] has no file_name, but "filename"; rename it (2 such entries)'),
    (lambda d: [a.update(bbox=[]) for a in d['annotations']], 'none of the 4 annotations can be used')]


def read(tmp_path, data):
    path = tmp_path/'x.json'
    path.write_text(json.dumps(data))
    return load_coco_lenient(path)


@pytest.mark.parametrize('change,message,num_images,num_boxes', faults, ids=[fault[1][:40] for fault in faults])
def test_an_entry_that_cannot_be_used_is_left_out_once(tmp_path, change, message, num_images, num_boxes):
    data = good()
    change(data)
    data['annotations'].append(dict(id=99, image_id=2, category_id=2, bbox=[5, 5, 9, 9]))
    coco, issues = read(tmp_path, data)
    assert message in '\n'.join(issue.message for issue, _ in issues)
    report = report_annotation_issues(issues)
    assert len(coco.images)==num_images and coco.num_annotations==num_boxes + 1
    assert num_images + sum(map(len, report.dropped_images.values()))==len(data['images'])
    assert num_boxes + 1 + sum(map(len, report.dropped_boxes.values()))==len(data['annotations'])


@pytest.mark.parametrize('change,message', notes, ids=[note[1][:40] for note in notes])
def test_an_entry_that_can_be_used_is_kept_and_its_fault_is_noted(tmp_path, change, message):
    data = good()
    change(data)
    coco, issues = read(tmp_path, data)
    assert message in '\n'.join(issue.message for issue, _ in issues)
    assert all(issue.is_recoverable for issue, _ in issues)
    assert (len(coco.images), coco.num_annotations, len(coco.categories))==(2, 4, 2)


@pytest.mark.parametrize('change,message', useless, ids=[fault[1][:40] for fault in useless])
def test_a_file_without_usable_entries_is_an_error_with_the_reason(tmp_path, change, message):
    data = good()
    change(data)
    with pytest.raises(CocoError) as e: read(tmp_path, data)
    assert message in str(e.value) and 'x.json' in str(e.value)
    assert isinstance(e.value, ValueError)


@pytest.mark.parametrize('change', [
    lambda d: [a.update(image_id=str(a['image_id'])) for a in d['annotations']],
    lambda d: [a.update(image_id=float(a['image_id'])) for a in d['annotations']],
    lambda d: [a.update(category_id=str(a['category_id'])) for a in d['annotations']],
    lambda d: [i.update(id=float(i['id'])) for i in d['images']],
    lambda d: [c.update(id=f"{c['id']}.0") for c in d['categories']],
    lambda d: [a.update(id=float(a['id'])) for a in d['annotations']],
    lambda d: [a.update(bbox=[*map(str, a['bbox'])]) for a in d['annotations']],
    lambda d: [i.update(height='60', width=80.) for i in d['images']]])
def test_values_that_differ_only_in_type_are_equal(tmp_path, change):
    data = good()
    expected, _ = read(tmp_path, data)
    change(data)
    assert read(tmp_path, data)[0]==expected


def test_ids_of_images_keep_their_type(tmp_path):
    data = good()
    for image in data['images']: image['id'] = f"{image['id']}"
    coco, issues = read(tmp_path, data)
    assert [*coco.annotations]==['1', '2'] and coco.annotations['1'][0]['image_id']=='1'
    assert [issue.fault for issue, _ in issues]==[Fault.CROWD_MISSING, Fault.AREA_MISSING]


def test_flags_and_areas_have_one_type(tmp_path):
    values = {'iscrowd': [0, 1, '0', '1', True, 1., None, -1, 'yes', []],
              'area': [5, '5', 5.5, -1, float('nan'), float('inf'), 1e308, 10**400, 'N/A', {}]}
    data = good()
    data['annotations'] = [dict(id=i, image_id=1, category_id=1, bbox=[i, 2, 30, 20], iscrowd=crowd, area=area)
                           for i, (crowd, area) in enumerate(zip(*values.values()))]
    annotations = read(tmp_path, data)[0].annotations[1]
    assert [a['iscrowd'] for a in annotations]==[0, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert [a['area'] for a in annotations]==[5, 5, 5.5] + [None]*7


def boxes_as(change, count=12, hw=(300, 400)):
    "A file with boxes of which each has been changed: x y width height, and the width and height of the image."
    rng, (h, w) = np.random.default_rng(0), hw
    sides = rng.uniform(5, 80, (count, 2))
    start = rng.uniform(0, np.subtract([w, h], sides))
    boxes = np.concatenate([start, sides], 1).tolist()
    return dict(images=[dict(id=1, file_name='a.jpg', height=h, width=w)], categories=[dict(id=1, name='cat')],
                annotations=[dict(id=i, image_id=1, category_id=1, bbox=change(*box, w, h))
                             for i, box in enumerate(boxes)])


mistakes = {
    'corners': (lambda x, y, w, h, W, H: [x, y, x+w, y+h], 'look like corners'),
    'corners, rounded up': (lambda x, y, w, h, W, H: [int(x), int(y), int(x+w)+1, int(y+h)+1], 'look like corners'),
    'fractions': (lambda x, y, w, h, W, H: [x/W, y/H, w/W, h/H], 'look like fractions'),
    'corners as fractions': (lambda x, y, w, h, W, H: [x/W, y/H, (x+w)/W, (y+h)/H], 'look like fractions'),
    'fractions as text': (lambda x, y, w, h, W, H: [str(x/W), str(y/H), str(w/W), str(h/H)], 'look like fractions')}


@pytest.mark.parametrize('change,message', mistakes.values(), ids=mistakes)
def test_boxes_of_another_form_are_recognised(tmp_path, change, message):
    with pytest.raises(CocoError, match=message): read(tmp_path, boxes_as(change))


@pytest.mark.parametrize('change', [
    lambda x, y, w, h, W, H: [x, y, w, h], lambda x, y, w, h, W, H: [0, 0, W, H],
    lambda x, y, w, h, W, H: [x, y, w+300, h], lambda x, y, w, h, W, H: [0, 0, 1.5, 1.5]])
def test_boxes_of_the_right_form_are_not_suspected(tmp_path, change):
    assert read(tmp_path, boxes_as(change))[0].num_annotations==12


def test_a_file_without_annotations_has_images_without_objects(tmp_path):
    for absent in ({}, dict(annotations=None)):
        data = {name: entries for name, entries in good().items() if name!='annotations'} | absent
        coco, issues = read(tmp_path, data)
        assert len(coco.images)==2 and coco.num_annotations==0
        assert report_annotation_issues(issues).notes=={(Fault.NO_ANNOTATIONS, ''): ['x.json']}


def test_loading_describes_what_is_left_out(tmp_path, capsys):
    data = good()
    data['annotations'][0]['category_id'] = 77
    load(tmp_path, data)
    assert 'x.json: boxes left out: unknown category: 1, such as annotation 10 of 1.jpg' in capsys.readouterr().err


@pytest.mark.parametrize('raw,message', [
    (b'', 'not valid JSON'), (b'{"images": [', 'line 1'), (b'\xff\xfe\x00\x01', 'not valid JSON'),
    (b'[]', 'top level is a list'), (b'{"images": [1,]}', 'line 1, column'),
    (b'['*50_000, 'nested too deeply'), (b'{"images": [' + b'9'*5000 + b']}', 'digits'), (b'\x89PNG\r\n', 'UTF-8')])
def test_files_that_are_not_json_are_rejected(tmp_path, raw, message):
    with pytest.raises(CocoError, match=message): load(tmp_path, None, raw)


def test_a_folder_and_a_missing_file_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match='is a folder'): load_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file'): load_coco(tmp_path/'no.json')


@given(st.sets(st.integers(0, 300), min_size=1, max_size=40), st.integers(0, 400))
def test_ids_and_channels_correspond_one_to_one(ids, extra):
    table = ClassTable.from_categories([dict(id=k, name=f'n{k}') for k in sorted(ids, reverse=True)], len(ids) + extra)
    channels = [table.channel(k) for k in table.ids]
    assert len(set(channels)) == len(ids) and all(0 <= c < table.num_classes for c in channels)
    assert [table.category_id(c) for c in channels] == sorted(ids)
    assert [table.class_name(c) for c in channels] == [f'n{k}' for k in sorted(ids)]
    everything = [table.category_id(c) for c in range(table.num_classes)]
    assert len(set(everything)) == table.num_classes       # idle channels take no category's id
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    if min(ids) >= 1 and max(ids) < table.num_classes: assert channels == [k - 1 for k in table.ids]


def test_too_few_channels_names_the_boxes():
    categories = [dict(id=k, name=str(k)) for k in range(1, 6)]
    message = r'2 ids \(4 to 5\) with 1,007 boxes would have no channel. Set dataset_config.num_classes to 6'
    with pytest.raises(ValueError, match=message):
        ClassTable.from_categories(categories, 3, {4: 1000, 5: 7, 1: 3})
    with pytest.raises(ValueError, match='no categories'): ClassTable.from_categories([])


@pytest.mark.parametrize('channel', [-1, 3])
def test_a_channel_outside_the_head_is_an_error(channel):
    with pytest.raises(ValueError, match='channels 0 to 2'): ClassTable((1, 2), ('a', 'b'), 3).category_id(channel)


def test_real_annotation_files_load(shared_dir):
    bccd, mini = (load_coco(shared_dir/'data'/n/'train.json') for n in ('bccd', 'coco_mini'))
    assert (len(bccd.images), bccd.num_annotations) == (205, 2805)
    assert (len(mini.images), mini.num_annotations) == (35, 425)
    assert sum(not a for a in mini.annotations.values()) == 1
    assert ClassTable.from_categories(bccd.categories).is_identity
    assert ClassTable.from_categories(mini.categories).channel(90) == 79
    assert ClassTable.from_categories(mini.categories, 91).channel(90) == 89


@pytest.mark.parametrize('name', ['images', 'annotations', 'categories'])
@pytest.mark.parametrize('again', [[], None, [1], {}])
def test_a_list_that_stands_twice_at_the_top_level_is_refused(tmp_path, name, again):
    text = json.dumps(good())
    for raw in (f'{text[:-1]}, "{name}": {json.dumps(again)}}}', f'{{"{name}": {json.dumps(again)}, {text[1:]}'):
        for read in (load_coco_lenient, load_coco):
            path = tmp_path/'x.json'
            path.write_text(raw)
            with pytest.raises(CocoError, match=f'"{name}" occurs twice at the top level'): read(path)


def test_the_same_words_inside_an_entry_are_no_second_list(tmp_path):
    data = good()
    for entry in data['images']: entry |= dict(annotations=[], images=1, categories='"annotations": []')
    assert load(tmp_path, data).num_annotations == 4
