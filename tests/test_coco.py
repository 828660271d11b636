"Guards for effdet_nb.data.coco: every fault is named, every table is a bijection."
import json

import pytest
from hypothesis import given, strategies as st

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import CocoError, load_coco


def good():
    return dict(images=[dict(id=i, file_name=f'{i}.jpg', height=60, width=80) for i in (1, 2)],
                annotations=[dict(id=10 + i, image_id=1, category_id=1 + i % 2, bbox=[1, 2, 30, 20]) for i in range(4)],
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
    (lambda d: d.pop('images'), '"images" is missing'),
    (lambda d: d.update(annotations={}), '"annotations" is not a list'),
    (lambda d: d.update(categories=None), '"categories" is not a list'),
    (lambda d: d.update(categories=[]), 'category_id 1 is not in categories: 2 boxes'),
    (_drop('images', 1, 'width'), 'images[1] has no width'),
    (_drop('images', 0, 'file_name'), 'images[0] has no file_name'),
    (_drop('annotations', 2, 'bbox'), 'annotations[2] has no bbox'),
    (_drop('annotations', 2, 'image_id'), 'annotations[2] has no image_id'),
    (_drop('categories', 0, 'name'), 'categories[0] has no name'),
    (lambda d: d['images'].append(7), 'images[2] has no id, file_name, height, width'),
    (_set('images', 0, height=0), 'height is 0; need a whole number of pixels'),
    (_set('images', 0, width=80.5), 'width is 80.5'),
    (_set('images', 0, width=float('nan')), 'width is nan'),
    (_set('images', 0, width=float('inf')), 'width is inf'),
    (_set('images', 0, width='80'), "width is '80'"),
    (_set('images', 0, file_name=3), 'file_name is 3'),
    (_set('images', 0, id=2), 'images: 1 ids occur more than once (id 2: 2 times)'),
    (_set('images', 0, id=[1]), 'is neither a number nor text'),
    (_set('annotations', 0, bbox=[1, 2, 3]), 'annotations[0] (id 10): bbox is [1, 2, 3]'),
    (_set('annotations', 0, bbox=[1, 2, 3, '4']), 'need four numbers'),
    (_set('annotations', 0, bbox='1 2 3 4'), 'need four numbers'),
    (_set('annotations', 0, id=11), 'annotations: 1 ids occur more than once'),
    (_set('annotations', 0, image_id=9), 'image_id 9 is not in images: 1 box would be lost'),
    (_set('annotations', 0, image_id='1'), 'image_id 1 is not in images'),
    (_set('annotations', 0, category_id=5), 'category_id 5 is not in categories: 1 box'),
    (_set('annotations', 0, category_id=[1]), 'category_id [1] is not in categories'),
    (_set('categories', 0, id=2), 'categories: 1 ids occur more than once'),
    (_set('categories', 0, id='cat'), "id is 'cat'"),
    (_set('categories', 0, id=-1), 'id is -1'),
]


@pytest.mark.parametrize('change,message', faults, ids=[m[:40] for _, m in faults])
def test_every_fault_is_an_error_that_names_it(tmp_path, change, message):
    data = good()
    change(data)
    with pytest.raises(CocoError) as e: load(tmp_path, data)
    assert message in str(e.value) and 'x.json' in str(e.value)
    assert isinstance(e.value, ValueError)


@pytest.mark.parametrize('raw,message', [
    (b'', 'not valid JSON'), (b'{"images": [', 'line 1'), (b'\xff\xfe\x00\x01', 'not valid JSON'),
    (b'[]', 'top level is a list'), (b'{"images": [1,]}', 'line 1, column'), (b'\x89PNG\r\n', 'UTF-8')])
def test_files_that_are_not_json_are_rejected(tmp_path, raw, message):
    with pytest.raises(CocoError, match=message): load(tmp_path, None, raw)


def test_a_folder_and_a_missing_file_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match='is a folder'): load_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file'): load_coco(tmp_path/'no.json')


def test_all_problems_are_reported_at_once_and_twenty_are_shown(tmp_path):
    data = good()
    data['annotations'] = [dict(id=i, image_id=1, category_id=1, bbox=[]) for i in range(50)]
    with pytest.raises(CocoError) as e: load(tmp_path, data)
    assert len(e.value.problems) == 50 and str(e.value).count('bbox is') == 20 and '30 more' in str(e.value)


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
