"Labels whose images are in another folder, in part, or in the folder of another source."
import json, re
import numpy as np, pytest
from PIL import Image
from effdet_nb.data.faults import Fault, Reason, describe_issues
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.label_set import LabelSet
from effdet_nb.data import sources
from effdet_nb.data.shards import sha256_of
from effdet_nb.data.sources import convert_sources, read_sources
from effdet_nb.data.split import part_shares, split_dataset
from effdet_nb.data.tile_dataset import tile_dataset
from effdet_nb.detector.tiles import Tiling

XML = ('<annotation><filename>{}.jpg</filename><size><width>80</width><height>60</height></size><object>'
       '<name>car</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>'
       '</annotation>')
LABELME = ('{{"shapes": [{{"label": "car", "shape_type": "rectangle", "points": [[5,5],[20,30]]}}],'
           ' "imagePath": "{}.jpg"}}')
KITTI = 'car 0 0 0 5 5 20 30 0 0 0 0 0 0 0\n'


def draw(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i,name in enumerate(names): Image.fromarray(np.full((60,80,3), 9*i+10, np.uint8)).save(folder/f'{name}.jpg')


def coco(names):
    images = [dict(id=i, file_name=f'{name}.jpg', height=60, width=80) for i,name in enumerate(names, 1)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[5,5,15,25]) for i in range(1, len(names)+1)]
    return json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=1, name='car')]))


def write_labels(folder, kind, names):
    "Writes labels of a format; returns the path to give to -a."
    folder.mkdir(parents=True)
    texts = dict(voc=('xml', XML), labelme=('json', LABELME), yolo=('txt', '0 .5 .5 .2 .2\n'), kitti=('txt', KITTI))
    if kind=='coco': (folder/'a.json').write_text(coco(names))
    else:
        ending,text = texts[kind]
        for name in names: (folder/f'{name}.{ending}').write_text(text.format(name))
    return folder/'a.json' if kind=='coco' else folder


KINDS = 'voc', 'yolo', 'kitti', 'labelme', 'coco'

@pytest.mark.parametrize('kind', KINDS)
def test_a_source_whose_images_are_elsewhere_is_named(kind, tmp_path):
    draw(tmp_path/'first', ['a', 'b'])
    here = write_labels(tmp_path/'here', 'voc', ['a', 'b'])
    there = write_labels(tmp_path/'there', kind, ['x', 'y', 'z'])
    message = f'{there}: .*none of its 3 images is in {tmp_path}/first, such as x.*Give one --image_dir for each source'
    for paths in ([here, there], [there, here]):
        with pytest.raises(SourceError, match=message): read_sources(paths, tmp_path/'first')
    with pytest.raises(SourceError, match='Give the folder of the images with --image_dir'):
        read_sources(there, tmp_path/'first')
    draw(tmp_path/'second', ['y'])
    labels = read_sources([here, there], [tmp_path/'first', tmp_path/'second'])
    assert len(labels.images)==(5 if kind=='coco' else 3)         # a COCO file with sizes is compared when converted


@pytest.mark.parametrize('kind', ['yolo', 'voc'])
@pytest.mark.parametrize('others', [['c'], ['b', 'c', 'd'], []])
def test_images_without_labels_are_counted_once(kind, others, tmp_path):
    draw(tmp_path/'images', ['a', *others])
    labels = read_sources(write_labels(tmp_path/'labels', kind, ['a', 'gone']), tmp_path/'images')
    fault = Fault.NO_LABEL_FILE if kind=='yolo' else Fault.NO_XML_FILE
    assert labels.report.notes.get(Reason(fault), [])==[f'{name}.jpg' for name in others]
    assert len(labels.images)==(1+len(others) if kind=='yolo' else 1)


@pytest.mark.parametrize('order', [('yolo', 'voc'), ('voc', 'yolo')])
def test_images_that_the_other_source_labels_are_not_called_unlabelled(order, tmp_path):
    draw(tmp_path/'images', 'abc')
    names = dict(yolo='a', voc='b')
    paths = [write_labels(tmp_path/kind, kind, names[kind]) for kind in order]
    notes = read_sources(paths, tmp_path/'images').report.notes
    assert [notes[Reason(fault)] for fault in (Fault.NO_LABEL_FILE, Fault.NO_XML_FILE)]==[['c.jpg'], ['c.jpg']]


@pytest.mark.parametrize('kind', ['voc', 'yolo', 'labelme'])
def test_strict_names_the_labels_that_were_given(kind, tmp_path):
    draw(tmp_path/'images', 'ab')
    path = write_labels(tmp_path/'labels', kind, ['a', 'b', 'gone'])
    with pytest.raises(ValueError, match=f'^{re.escape(str(path))}: .*--strict allows none'):
        convert_sources(path, tmp_path/'images', tmp_path/'out', 'train', strict=True, num_shards=1, workers=1)
    assert not (tmp_path/'out'/'train_coco.json').exists()


def test_a_coco_file_away_from_its_images_asks_for_their_folder(tmp_path):
    path = write_labels(tmp_path/'split', 'coco', 'abc')
    with pytest.raises(FileNotFoundError, match='all 3 images are missing.*give the folder of the images with --image'):
        convert_sources(path, (), tmp_path/'out')


@pytest.mark.parametrize('kind, expected', [
    ('voc', 'b.xml:1 of b.jpg'), ('kitti', 'b.txt:1 of b.jpg'), ('coco', 'annotation 2 of b.jpg')])
def test_a_conversion_after_a_split_names_the_label_file_and_the_image(kind, expected, tmp_path):
    draw(tmp_path/'images', 'abcd')
    path = write_labels(tmp_path/'labels', kind, 'abcd')
    for file in [path] if kind=='coco' else [path/f'b.{"xml" if kind=="voc" else "txt"}']:
        text = file.read_text()
        box = '"image_id": 2, "category_id": 1, "bbox": [5, 5, {}'
        for old,new in [(box.format(15), box.format(999)), ('<xmax>20', '<xmax>999'), ('20 30', '999 30')]:
            text = text.replace(old, new)
        file.write_text(text)
    split = split_dataset(path, tmp_path/'images', tmp_path/'split', near='skip')
    results = [convert_sources(part, tmp_path/'images', tmp_path/'out', name, num_shards=1, workers=1)
               for name,part in split.files.items()]
    lines = [line for result in results for line in repr(result).splitlines() if 'out of bounds' in line]
    assert len(lines)==1 and lines[0].endswith(expected if kind!='coco' else 'of b.jpg')
    direct = convert_sources(path, tmp_path/'images', tmp_path/'direct', 'all', num_shards=1, workers=1)
    assert f'such as {expected}' in repr(direct)


@pytest.mark.parametrize('same, expected', [(['a', 'b'], 2), (['a'], 1), ([], 0)])
def test_the_same_images_in_two_sources_are_reported(same, expected, tmp_path):
    paths = []
    for part in ('one', 'two'):
        draw(tmp_path/part/'images', 'abc')
        paths.append(write_labels(tmp_path/part/'labels', 'voc', 'abc'))
        for name in {*'abc'}-{*same}: draw_other(tmp_path/part/'images'/f'{name}.jpg', part)
    notes = read_sources(paths, [tmp_path/part/'images' for part in ('one', 'two')]).report.notes
    found = notes.get(Reason(Fault.SAME_IMAGE), [])
    assert sorted(found)==[f'two/images/{name}.jpg and one/images/{name}.jpg' for name in same] and len(found)==expected


def draw_other(path, part): Image.fromarray(np.full((60,80,3), len(part)*ord(part[0])%255, np.uint8)).save(path)


@pytest.mark.parametrize('names, expected', [
    (['Kangaroo', 'kangaroo'], ['Kangaroo=kangaroo']), (['red cell', 'Red Cell', 'dog'], ["'Red Cell=red cell'"]),
    (['CAR', 'Car', 'bus'], ['Car=CAR']), (['car', 'cart'], [])])
def test_classes_that_differ_only_in_case_are_a_note(names, expected, tmp_path):
    draw(tmp_path/'images', 'a')
    boxes = [dict(id=i, image_id=1, category_id=i, bbox=[5*i,5,4,9]) for i in range(1, len(names)+1)]
    categories = [dict(id=i, name=name) for i,name in enumerate(names, 1)]
    images = [dict(id=1, file_name='a.jpg', height=60, width=80)]
    (tmp_path/'a.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))
    result = convert_sources(tmp_path/'a.json', tmp_path/'images', tmp_path/'out', num_shards=1, workers=1)
    assert result.notes.get(str(Fault.CASE_DIFFERS), [])==[f'--map_classes {text}' for text in expected]


@pytest.mark.parametrize('box, fault', [([5,5,0,25], Fault.NO_SIZE), ([5,5,15,-1], Fault.NO_SIZE),
                                        ([70,5,50,25], Fault.OUT_OF_BOUNDS)])
def test_a_split_counts_boxes_as_a_conversion_does(box, fault, tmp_path):
    draw(tmp_path/'images', 'abcdef')
    path = write_labels(tmp_path/'labels', 'coco', 'abcdef')
    contents = json.loads(path.read_text())
    contents['annotations'][2]['bbox'] = box
    path.write_text(json.dumps(contents))
    split = split_dataset(path, tmp_path/'images', tmp_path/'split', near='skip')
    assert sum(split.boxes['car'])==5 and len(split.report.dropped_boxes[fault])==1
    results = [convert_sources(part, tmp_path/'images', tmp_path/'out', name, num_shards=1, workers=1)
               for name,part in split.files.items()]
    assert [result.num_boxes for result in results]==split.boxes['car']
    assert sum(len(result.report.dropped_boxes.get(fault, [])) for result in results)==1


@pytest.mark.parametrize('val, test, text', [(20, 0, '20 percent is 0.2'), (25, 10, '25 percent is 0.25'),
                                             (.2, 15, '15 percent is 0.15')])
def test_percent_in_place_of_a_share_is_explained(val, test, text):
    with pytest.raises(SourceError, match=f'each is a share from 0 to 1 \\({text}\\)'): part_shares(val, test)


def test_tiles_of_images_in_subfolders_are_reported(tmp_path):
    draw(tmp_path/'photos'/'day', 'abc')
    path = write_labels(tmp_path/'labels', 'coco', 'abc')
    result = tile_dataset(tmp_path/'photos', path, tmp_path/'tiles', Tiling((32, 32)))
    assert 'file found under another name: 3, such as day/a.jpg (a.jpg in the JSON)' in repr(result)


def halve_sizes(path):
    "Halves the sizes of the images of a COCO file, and moves a box of each beyond them."
    contents = json.loads(path.read_text())
    for image in contents['images']: image |= dict(height=30, width=40)
    for annotation in contents['annotations']: annotation['bbox'] = [40,30,30,25]
    path.write_text(json.dumps(contents))


def test_sizes_too_small_for_the_boxes_are_not_used_in_a_split_or_for_tiles(tmp_path):
    draw(tmp_path/'images', 'abcdef')
    path = write_labels(tmp_path/'labels', 'coco', 'abcdef')
    halve_sizes(path)
    names = [f'{name}.jpg' for name in 'abcdef']
    split = split_dataset(path, tmp_path/'images', tmp_path/'split', near='skip')
    assert split.report.notes[Reason(Fault.SIZE_TOO_SMALL)]==names and sum(split.boxes['car'])==6
    tiled = tile_dataset(tmp_path/'images', path, tmp_path/'tiles', Tiling((40, 40)))
    assert tiled.report.notes[Reason(Fault.SIZE_TOO_SMALL)]==names and tiled.num_objects==6
    both = read_sources([path, write_labels(tmp_path/'voc', 'voc', 'abc')], tmp_path/'images')
    assert both.report.notes[Reason(Fault.SIZE_TOO_SMALL)]==names
    assert {(image['height'], image['width']) for image in both.images}=={(60, 80)}


@pytest.mark.parametrize('failing', [['one/images'], ['one/images', 'two/images'], []])
def test_images_that_cannot_be_read_are_no_copies(failing, tmp_path, monkeypatch):
    def checksum(path):
        if any(part in str(path) for part in failing): raise PermissionError(13, 'Permission denied', str(path))
        read.append(path.name)
        return sha256_of(path)
    read,paths = [],[]
    for part in ('one', 'two'):
        draw(tmp_path/part/'images', ['a', 'b'])
        paths.append(write_labels(tmp_path/part/'labels', 'voc', ['a', 'b']))
    with open(tmp_path/'two'/'images'/'b.jpg', 'ab') as f: f.write(b'more')                   # another size
    monkeypatch.setattr(sources, 'sha256_of', checksum)
    labels = read_sources(paths, [tmp_path/part/'images' for part in ('one', 'two')])
    assert len(labels.images)==4 and 'b.jpg' not in read
    assert len(labels.report.notes.get(Reason(Fault.SAME_IMAGE), []))==(0 if failing else 1)


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
@pytest.mark.parametrize('labelled, expected', [('ab', 1), ('a', 2), ('', 2)])
def test_images_of_one_name_in_two_folders_are_told_apart(kind, labelled, expected, tmp_path):
    for part in ('one', 'two'): draw(tmp_path/part/'images', ['a', 'b', 'z'])
    paths = [write_labels(tmp_path/'one'/'labels', kind, [*labelled, 'z']),
             write_labels(tmp_path/'two'/'labels', kind, 'az')]
    notes = read_sources(paths, [tmp_path/part/'images' for part in ('one', 'two')]).report.notes
    found = notes[Reason(Fault.NO_LABEL_FILE if kind=='yolo' else Fault.NO_XML_FILE)]
    assert found.count('b.jpg')==expected and found.count('a.jpg')==('a' not in labelled) and 'z.jpg' not in found


def test_an_image_that_no_source_labels_is_counted_once(tmp_path):
    draw(tmp_path/'images', 'abc')
    paths = [write_labels(tmp_path/part, 'yolo', name) for part,name in (('one', 'a'), ('two', 'b'))]
    assert read_sources(paths, tmp_path/'images').report.notes[Reason(Fault.NO_LABEL_FILE)]==['c.jpg']


@pytest.mark.parametrize('num_missing', [1, 3, 6])
def test_images_without_files_are_left_out_with_their_boxes(num_missing, tmp_path):
    names = 'abcdefgh'
    draw(tmp_path/'images', names[num_missing:])
    labels = read_sources(write_labels(tmp_path/'labels', 'coco', names), tmp_path/'images')
    labels.leave_out_unreadable()
    ids = [*range(1, num_missing+1)]
    assert labels.report.dropped_images=={Fault.FILE_MISSING: [(i, f'{names[i-1]}.jpg') for i in ids]}
    assert labels.report.dropped_boxes=={Fault.IMAGE_LEFT_OUT: [(i, i) for i in ids]}
    assert [a['id'] for a in labels.annotations]==[*range(num_missing+1, 9)] and len(labels.images)==8-num_missing


class CountedList(list):
    "A list that counts how often it is read from its start."
    reads = 0
    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.mark.parametrize('leave_out', [lambda labels, image: labels.leave_image_out(image, Fault.NOT_LABELLED),
                                       lambda labels, image: labels._readable_hw(image)])
def test_boxes_are_not_searched_for_each_image_that_is_left_out(leave_out, tmp_path):
    draw(tmp_path, 'a')
    labels = LabelSet()
    labels.add_box(labels.add_image(tmp_path/'a.jpg'), 1, 'car', [5,5,9,9])
    labels.annotations = kept = CountedList(labels.annotations)
    for i in range(20): leave_out(labels, labels.add_image(tmp_path/f'gone{i}.jpg', (60, 80)))
    assert kept.reads==0 and len(labels.left_out)==20


def test_an_image_that_is_left_out_later_takes_its_boxes_along(tmp_path):
    draw(tmp_path, 'ab')
    labels = LabelSet()
    a,b = [labels.add_image(tmp_path/f'{name}.jpg') for name in 'ab']
    for i,image in enumerate([a, b, a, b], 1): labels.add_box(image, i, 'car', [5,5,9,9])
    labels.leave_image_out(a, Fault.LABELS_DAMAGED)
    labels.leave_image_out(a, Fault.LABELS_DAMAGED)
    assert [annotation['id'] for annotation in labels.annotations]==[2, 4]
    assert labels.report.dropped_boxes=={Fault.IMAGE_LEFT_OUT: [(1, 1), (1, 3)]}


@pytest.mark.parametrize('text, unlabelled', [('<annotation>', []), ('', []), ('<html/>', []),
                                             (None, ['b.jpg'])])
def test_an_image_with_a_damaged_xml_file_has_an_xml_file(text, unlabelled, tmp_path):
    draw(tmp_path/'images', 'ab')
    labels = write_labels(tmp_path/'labels', 'voc', 'a')
    if text is not None: (labels/'b.xml').write_text(text)
    report = read_sources(labels, tmp_path/'images').report
    assert report.notes.get(Reason(Fault.NO_XML_FILE), [])==unlabelled
    assert len(report.dropped_images[Fault.LABELS_DAMAGED])==(text is not None)


@pytest.mark.parametrize('num_sources', [1, 2, 3])
def test_ids_of_several_coco_files_do_not_look_like_lines(num_sources, tmp_path):
    draw(tmp_path/'images', 'ab')
    paths = [write_labels(tmp_path/f'{i}', 'coco', 'ab') for i in range(num_sources)]
    for i,path in enumerate(paths):
        path = path.rename(path.with_name(f'x{i}.json'))
        path.write_text(path.read_text().replace('"bbox": [5, 5, 15, 25]', '"bbox": [NaN, 5, 15, 25]', 1))
        paths[i] = path
    [issue] = [line for line in describe_issues(read_sources(paths, tmp_path/'images').report) if 'not finite' in line]
    assert f'such as annotation {"" if num_sources==1 else "x0.json#"}1 of a.jpg' in issue
