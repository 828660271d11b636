"Splitting: shares, classes, groups and near copies, for random datasets."
import json
import random
import shlex
import time
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from effdet_nb.data.coco import load_coco
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.faults import ConversionReport
from effdet_nb.data.image_groups import image_signature, join_groups, near_duplicates, source_of
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.split import SplitResult, assign_groups, split_dataset


def photo(seed, hw=(48, 64)):
    "A random image that is smooth like a photo."
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(hw[::-1], Image.Resampling.BICUBIC)


def make_dataset(folder, names, classes_of, suffix='jpg'):
    "Images with one box for each of their classes, and labels.json."
    images,annotations = [],[]
    for i,name in enumerate(names, 1):
        path = folder/'images'/f'{name}.{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
        images.append(dict(id=i, file_name=f'{name}.{suffix}', height=48, width=64))
        for k in classes_of(i): annotations.append(dict(id=len(annotations)+1, image_id=i, category_id=k, area=100,
                                                        bbox=[k, 2, 10, 10], iscrowd=0))
    categories = [dict(id=k, name=f'class {k}') for k in range(1, 5)]
    path = folder/'labels.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def split(folder, **options):
    return split_dataset(folder/'labels.json', folder/'images', folder/'out', **options)


def names_in(path): return {image['file_name'] for image in json.loads(path.read_text())['images']}


@settings(max_examples=60)
@given(st.integers(0, 2**32-1), st.integers(3, 60), st.sampled_from([(.8, .2), (.7, .15, .15), (.5, .5)]))
def test_every_class_is_in_every_part_if_enough_groups_have_it(seed, num_groups, shares):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (num_groups, 3)) * (rng.random((num_groups, 3))<.4)
    parts = assign_groups(counts, np.ones(num_groups), shares, seed)
    assert sorted({*parts.tolist()})<=[*range(len(shares))] and len(parts)==num_groups
    rarest = min(range(3), key=lambda c: (counts[:,c]>0).sum() or 999)
    if (counts[:,rarest]>0).sum()>=len(shares):
        assert {*parts[counts[:,rarest]>0].tolist()}=={*range(len(shares))}
    assert (parts==assign_groups(counts, np.ones(num_groups), shares, seed)).all()


@pytest.mark.parametrize('shares', [(.8, .2), (.7, .2, .1)])
def test_parts_get_their_share_of_images_and_boxes(shares):
    rng = np.random.default_rng(0)
    counts = rng.poisson([2, .5, .05], (2000, 3))
    parts = assign_groups(counts, np.ones(2000), shares)
    assert np.allclose(np.bincount(parts)/2000, shares, atol=.02)
    boxes = np.array([counts[parts==p].sum(0) for p in range(len(shares))])
    assert np.allclose(boxes/counts.sum(0), np.array(shares)[:,None], atol=.03)


def test_a_split_is_reproducible_and_loses_nothing(tmp_path):
    make_dataset(tmp_path, [f'{i:03}' for i in range(40)], lambda i: [1] + [2]*(i%3==0) + [3]*(i in (4, 9, 30)))
    result = split(tmp_path, val=.2, test=.1, near='skip')
    first = {name: path.read_bytes() for name,path in result.files.items()}
    parts = [names_in(path) for path in result.files.values()]
    assert sum(map(len, parts))==40==len(set.union(*parts))
    totals = {name: sum(row) for name,row in result.boxes.items()}
    assert totals=={'class 1': 40, 'class 2': 13, 'class 3': 3, 'class 4': 0}
    assert all(result.boxes['class 3']) and [a[:2] for a in result.absent]==[('class 4', p) for p in result.files]
    assert {name: path.read_bytes() for name,path in split(tmp_path, val=.2, test=.1, near='skip').files.items()}==first
    other = split(tmp_path, val=.2, test=.1, near='skip', seed=1)
    assert {name: path.read_bytes() for name,path in other.files.items()}!=first
    for path in other.files.values():
        coco = load_coco(path)
        assert [c['name'] for c in coco.categories]==['class 1', 'class 2', 'class 3', 'class 4']
        converted = dataset_convert(tmp_path/'images', path, tmp_path/'rec', num_shards=1, workers=1, strict=True)
        assert converted.num_boxes==coco.num_annotations


@pytest.mark.parametrize('pattern', [r'^(.*)_\d+', r'cam\d', '^[^_]+'])
def test_images_of_one_source_stay_together(pattern, tmp_path):
    names = [f'day{d}/cam{c}_{i:02}' for d in range(2) for c in range(4) for i in range(5)]
    make_dataset(tmp_path, names, lambda i: [1+i%2])
    result = split(tmp_path, val=.3, pattern=pattern, near='skip')
    sources = [{source_of(name, pattern) for name in names_in(path)} for path in result.files.values()]
    assert not sources[0] & sources[1] and all(sources)


def test_copies_and_near_copies_are_found_and_stay_together(tmp_path):
    make_dataset(tmp_path, [f'{i:02}' for i in range(30)], lambda i: [1])
    pairs = [(0, 20), (3, 21), (5, 22), (9, 23)]
    changes = [lambda image: image, lambda image: image.resize((128, 96)), lambda image: image.point(lambda v: v*.93),
               lambda image: image.resize((60, 45)).resize((64, 48))]
    for (a,b),change in zip(pairs, changes):
        change(Image.open(tmp_path/'images'/f'{a:02}.jpg')).save(tmp_path/'images'/f'{b:02}.jpg', quality=70)
    (tmp_path/'images'/'20.jpg').write_bytes((tmp_path/'images'/'00.jpg').read_bytes())
    expected = [(f'{a:02}.jpg', f'{b:02}.jpg') for a,b in pairs]
    for seed in range(4):
        result = split(tmp_path, val=.4, seed=seed)
        assert result.duplicates==expected and result.num_apart==0 and result.num_groups==26
        for path in result.files.values(): assert all((a in names_in(path))==(b in names_in(path)) for a,b in expected)
    results = [split(tmp_path, val=.4, seed=seed, near='report') for seed in range(6)]
    apart = max(results, key=lambda result: result.num_apart)
    assert apart.num_apart>0 and 'in different parts' in repr(apart)
    assert split(tmp_path, near='skip').duplicates==[]


def test_different_images_are_not_near(tmp_path):
    "Photos, and images with little in them: flat ones with one object at different places."
    images = [photo(seed) for seed in range(40)]
    for x in range(0, 50, 12):
        pixels = np.full((48, 64, 3), 200, np.uint8)
        pixels[10:24,x:x+10] = 30
        images.append(Image.fromarray(pixels))
    for i,image in enumerate(images): image.save(tmp_path/f'{i:02}.png')
    signatures = [image_signature(path) for path in sorted(tmp_path.iterdir())]
    assert near_duplicates(signatures)==[]


def test_images_of_16_bits_are_compared_by_their_upper_bits(tmp_path):
    for i in range(4):                                                          # no pixel is below 1,000
        pixels = 1000 + 240*np.asarray(photo(i).convert('L'), np.uint16)
        Image.fromarray(pixels).save(tmp_path/f'{i}.png')
    Image.fromarray(pixels+100).save(tmp_path/'4.png')                          # a copy of the last
    signatures = [image_signature(path) for path in sorted(tmp_path.iterdir())]
    assert near_duplicates(signatures)==[(3, 4)]


def test_the_search_by_quarters_finds_what_comparing_all_pairs_finds():
    rng = random.Random(0)
    base = photo(0)
    signature = image_signature_of(base)
    signatures = []
    for _ in range(120):
        bits = signature.bits
        for bit in rng.sample(range(64), rng.randint(0, 5)): bits ^= 1<<bit
        signatures.append(type(signature)(bits, signature.thumbnail))
    every = [(i, j) for i in range(120) for j in range(i+1, 120) if signatures[i].is_near(signatures[j])]
    found = near_duplicates(signatures)
    assert join_groups(120, found)==join_groups(120, every) and 0<len(every)<120*119/2
    assert {*found}<={*every} and len(found)==119-max(join_groups(120, every))


def image_signature_of(image, path=None):
    import tempfile
    with tempfile.NamedTemporaryFile(suffix='.png') as f:
        image.save(f.name)
        return image_signature(f.name)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=30))
def test_groups_are_the_connected_components(count, pairs):
    pairs = [(i%count, j%count) for i,j in pairs]
    groups = join_groups(count, pairs)
    assert all(groups[i]==groups[j] for i,j in pairs)
    assert max(groups)+1>=count-len({p for p in pairs if p[0]!=p[1]})
    assert groups[0]==0 and all(b<=max(groups[:i])+1 for i,b in enumerate(groups) if i)


@pytest.mark.parametrize('options, message', [
    (dict(val=0), '--val 0'), (dict(val=.6, test=.4), '--test 0.4'), (dict(val=20), '--val 20'),
    (dict(test=-1), '--test -1'), (dict(pattern='\\.jpg'), 'cannot be divided into 2 parts'),
    (dict(pattern='('), 'not a regular expression'), (dict(pattern='video'), 'matches no image'),
    (dict(class_map={'clas 1': ''}), 'Did you mean class 1?')])
def test_wrong_settings_are_explained_and_write_nothing(options, message, tmp_path):
    make_dataset(tmp_path, ['a', 'b', 'c'], lambda i: [1])
    with pytest.raises(SourceError) as e: split(tmp_path, **{'near': 'skip', **options})
    assert message in str(e.value) and not (tmp_path/'out').exists()


def test_a_file_that_was_not_written_by_a_split_is_not_replaced(tmp_path):
    path = make_dataset(tmp_path, ['a', 'b', 'c'], lambda i: [1])
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'val.json').write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match='was not written by this command'): split(tmp_path)
    assert (tmp_path/'out'/'val.json').read_bytes()==path.read_bytes() and not (tmp_path/'out'/'train.json').exists()


def test_two_images_make_two_parts_and_one_does_not(tmp_path):
    make_dataset(tmp_path, ['a', 'b'], lambda i: [1])
    assert sorted(split(tmp_path).num_images.values())==[1, 1]
    make_dataset(tmp_path, ['a', 'b', 'c'], lambda i: [i])
    assert sorted(split(tmp_path, val=.1, test=.1).num_images.values())==[1, 1, 1]
    make_dataset(tmp_path, ['a', 'b'], lambda i: [])
    assert sorted(split(tmp_path).num_images.values())==[1, 1]
    make_dataset(tmp_path, ['a'], lambda i: [1])
    with pytest.raises(SourceError, match='1 image in 1 group kept together cannot be divided'): split(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32-1), st.integers(2, 40), st.integers(1, 4))
def test_pairs_join_the_groups_of_all_near_pairs(seed, count, num_scenes):
    "Chains of images, each near to the one before, with unreadable images between them."
    rng = random.Random(seed)
    scenes = [image_signature_of(photo(i)) for i in range(num_scenes)]
    signatures = []
    for _ in range(count):
        base = rng.choice(scenes)
        bits = base.bits
        for bit in rng.sample(range(64), rng.randint(0, 3)): bits ^= 1<<bit
        signatures.append(rng.choice([None, type(base)(bits, base.thumbnail)]))
    near = [(i, j) for j in range(count) for i in range(j)
            if signatures[i] and signatures[j] and signatures[i].is_near(signatures[j])]
    found = near_duplicates(signatures)
    assert {*found}<={*near} and join_groups(count, found)==join_groups(count, near)
    assert len(found)==count-1-max(join_groups(count, near))


def test_a_camera_that_does_not_move_takes_no_quadratic_time_or_memory():
    signature = image_signature_of(photo(0))
    rng = random.Random(0)
    signatures = [type(signature)(signature.bits ^ 1<<rng.randrange(3), signature.thumbnail) for _ in range(3000)]
    start = time.process_time()
    assert len(near_duplicates(signatures))==2999
    assert time.process_time()-start<10                     # comparing 4.5 million pairs one by one takes 30 seconds


@pytest.mark.parametrize('part, as_list', [('train', False), ('val', True), ('test', True)])
def test_a_part_is_not_split_into_its_own_place(part, as_list, tmp_path):
    make_dataset(tmp_path, [f'{i}' for i in range(12)], lambda i: [1])
    files = split(tmp_path, val=.3, test=.3, near='skip').files
    before = {path: path.read_bytes() for path in files.values()}
    path = tmp_path/'x'/'..'/'out'/f'{part}.json'
    (tmp_path/'x').mkdir()
    with pytest.raises(SourceError, match='is to be split'):
        split_dataset([path] if as_list else str(path), tmp_path/'images', tmp_path/'out', near='skip')
    assert before=={path: path.read_bytes() for path in files.values()}
    assert split_dataset(path, tmp_path/'images', tmp_path/'out2', near='skip').num_images['train']>0


def test_a_new_split_leaves_no_part_of_an_earlier_one(tmp_path):
    make_dataset(tmp_path, [f'{i:02}' for i in range(20)], lambda i: [1])
    earlier = split(tmp_path, test=.2, near='skip').files
    result = split(tmp_path, near='skip')
    assert sorted(path.name for path in (tmp_path/'out').iterdir())==['train.json', 'val.json']
    assert not earlier['test'].exists() and sum(result.num_images.values())==20


@pytest.mark.parametrize('kept', [
    '{"images": []}', '{"info": {"made_by": "effdet_nb", "sources": ["a"]}, "images": []}'])
def test_a_file_that_is_no_part_stays(tmp_path, kept):
    make_dataset(tmp_path, ['a', 'b', 'c'], lambda i: [1])
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'test.json').write_text(kept)
    split(tmp_path, near='skip')
    assert (tmp_path/'out'/'test.json').read_text()==kept
    (tmp_path/'out'/'val.json').write_text(kept)
    with pytest.raises(SourceError, match='was not written by this command'): split(tmp_path, near='skip')


@pytest.mark.parametrize('first, second', [({}, {}), (dict(test=.2), {}), ({}, dict(test=.2))])
def test_an_interrupted_split_leaves_no_parts_that_share_images(tmp_path, monkeypatch, first, second):
    from effdet_nb.data import split as module
    make_dataset(tmp_path, [f'{i:02}' for i in range(20)], lambda i: [1])
    split(tmp_path, near='skip', **first)
    write = module.write_coco
    def write_one(path, *args, **info):
        if path.name!='train.json': raise KeyboardInterrupt
        write(path, *args, **info)
    monkeypatch.setattr(module, 'write_coco', write_one)
    with pytest.raises(KeyboardInterrupt): split(tmp_path, near='skip', seed=5, **second)
    assert [path.name for path in (tmp_path/'out').iterdir()]==['train.json']


@pytest.mark.parametrize('options', [dict(class_map={'clas 1': ''}), dict(near='skip', pattern='video'), dict(val=2)])
def test_wrong_settings_leave_an_earlier_split_as_it_is(tmp_path, options):
    make_dataset(tmp_path, [f'{i}' for i in range(9)], lambda i: [1])
    before = {path: path.read_bytes() for path in split(tmp_path, test=.2, near='skip').files.values()}
    with pytest.raises(SourceError): split(tmp_path, **options)
    assert before=={path: path.read_bytes() for path in (tmp_path/'out').iterdir()}


@pytest.mark.parametrize('name', ["it's", '~x', 'a b', 'plain', '$HOME', 'a"b', 'x;y', 'naïve'])
def test_the_next_commands_can_be_pasted_into_a_shell(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = SplitResult(dict(train=Path(name)/'train.json'), Path(name), dict(train=1), {}, [], 1, [], 0,
                         ConversionReport())
    *_,head,command = repr(result).splitlines()
    assert '-i ~' not in command and head=='Next:'
    assert shlex.split(command)==['effdet_dataset_convert', '-i', name, '-a', f'{name}/train.json', '-o',
                                  f'{name}/records', '-t', 'train']


def test_all_labels_that_are_left_out_are_in_a_report(tmp_path):
    (tmp_path/'images').mkdir()
    for i in range(8):
        Image.new('RGB', (40,40), (i*20,90,90)).save(tmp_path/'images'/f'{i}.png')
        (tmp_path/'images'/f'{i}.txt').write_text(f'{0 if i else 7} .5 .5 .2 .2\n')
    (tmp_path/'images'/'classes.txt').write_text('cat\n')
    result = split_dataset(tmp_path/'images', None, tmp_path/'out', near='skip')
    report = json.loads((tmp_path/'out'/'split_report.json').read_text())
    assert [(r['count'], r['examples']) for r in report['reasons'] if 'class number' in r['reason']]==[(1, ANY)]
    assert '0.txt' in str(report['reasons']) and f'all ids and fixes: {result.report_file}' in repr(result)
    (tmp_path/'images'/'0.txt').write_text('0 .5 .5 .2 .2\n')
    assert split_dataset(tmp_path/'images', None, tmp_path/'out', near='skip').report_file is None
    assert not (tmp_path/'out'/'split_report.json').exists()


def test_labels_without_a_usable_image_say_why(tmp_path):
    for folder in ('labels', 'images'): (tmp_path/folder).mkdir()
    for name in 'abc': (tmp_path/'labels'/f'{name}.txt').write_text('0 .5 .5 .1 .1\n')
    with pytest.raises(SourceError, match='no image can be used, since none of its 3 images is in .*, such as a. Give'):
        split_dataset(tmp_path/'labels', tmp_path/'images', tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('line', ['1 .5 .5 .1 .1', '0 40 30 20 30'])
def test_labels_without_a_usable_box_are_not_split(line, tmp_path):
    for i in range(4):
        path = tmp_path/'images'/f'{i}.jpg'
        path.parent.mkdir(exist_ok=True)
        photo(i).save(path)
        (tmp_path/'labels').mkdir(exist_ok=True)
        (tmp_path/'labels'/f'{i}.txt').write_text(line)
    (tmp_path/'labels'/'classes.txt').write_text('raccoon\n')
    reason = '(?s)no box can be used.*(counts classes from 0|fractions of the image size)'
    with pytest.raises(SourceError, match=reason):
        split_dataset(tmp_path/'labels', tmp_path/'images', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_rare_class_with_nearly_the_name_of_another_is_reported(tmp_path):
    labels = make_dataset(tmp_path, [f'{i}' for i in range(1, 31)], lambda i: [2 if i==7 else 1])
    content = json.loads(labels.read_text())
    for category,name in zip(content['categories'], ('raccoon', 'racoon', 'cat', 'car')): category['name'] = name
    labels.write_text(json.dumps(content))
    assert 'such as --map_classes racoon=raccoon. If they are one class' in repr(split(tmp_path, near='skip'))


def test_images_that_lose_all_their_boxes_are_reported(tmp_path):
    labels = make_dataset(tmp_path, 'abcdef', lambda i: [1, 1] if i<5 else [])
    content = json.loads(labels.read_text())
    for annotation in content['annotations'][:3]: annotation['bbox'][2] = 0     # both boxes of one, one of another
    labels.write_text(json.dumps(content))
    text = repr(split(tmp_path, near='skip'))
    assert 'image whose boxes were all left out: 1, such as a.jpg. Training takes it as an image without' in text
