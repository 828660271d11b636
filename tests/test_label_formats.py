"""Labels of other tools: files written by the tools themselves (fixtures/labels/make.py: supervision 0.31, LabelMe 6.3,
Label Studio's converter 0.0.59) and files in the published formats of CVAT, Roboflow, VIA, FiftyOne and KITTI."""
import base64
import io
import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effdet_nb.core.files import UnsuitableFile
from effdet_nb.data.coco_json import CocoError
from effdet_nb.data.faults import Fault
from effdet_nb.data.label_formats import find_source, text_format
from effdet_nb.data.label_json import labelme_outline
from effdet_nb.data.label_set import LabelSet, SourceError
from effdet_nb.data.sources import convert_sources, ordered_names, parse_class_map, read_sources
from effdet_nb.data.tfrecord import load_sidecar, parse_example, read_records
from effdet_nb.data.yolo_yaml import find_class_names, read_yaml

FIXTURES = Path(__file__).parent/'fixtures'/'labels'
SIZES = {'a b.jpg': (60, 80), 'c.jpg': (61, 80), 'empty.jpg': (62, 80)}
EXPECTED = {('a b.jpg', 'car', 10, 5, 20, 20), ('a b.jpg', 'big dog', 40, 20, 30, 30),
            ('c.jpg', 'big dog', 10, 5, 20, 20)}


def draw_images(folder, sizes=SIZES, prefix=''):
    folder.mkdir(parents=True, exist_ok=True)
    for i,(name,hw) in enumerate(sizes.items(), 1):
        Image.new('RGB', hw[::-1], (90, 120, 90)).save(folder/(f'{prefix}{i}-{name}' if prefix else name))


def found_boxes(labels):
    "{(image, class, x, y, width, height)} with whole pixels."
    names = {image['id']: image['path'].name for image in labels.images}
    return {(names[a['image_id']], a['class_name'], *(round(v) for v in a['bbox'])) for a in labels.annotations}


def num_left_out(report): return sum(map(len, report.dropped_boxes.values()))
def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- files that the tools wrote

REAL = ['supervision/yolo', 'supervision/yolo/labels', 'supervision/yolo/data.yaml', 'supervision/voc',
        'supervision/coco.json', 'labelme', 'label_studio/tasks.json', 'label_studio/coco',
        'label_studio/coco/result.json', 'label_studio/yolo', 'label_studio/obb', 'label_studio/voc']


@pytest.mark.parametrize('place', REAL)
def test_files_of_the_tools_give_the_boxes_that_were_drawn(place, tmp_path):
    draw_images(tmp_path/'images')
    labels = read_sources(FIXTURES/place, tmp_path/'images')
    assert found_boxes(labels)==EXPECTED and not labels.report.dropped_boxes
    assert {image['path'].name for image in labels.images} >= {'a b.jpg', 'c.jpg'}


@pytest.mark.parametrize('place', ['label_studio/tasks.json', 'label_studio/min/result.json', 'label_studio/coco',
                                   'label_studio/yolo', 'label_studio/voc'])
def test_images_under_the_names_of_label_studio_are_found(place, tmp_path):
    draw_images(tmp_path/'images', prefix='0a1b2c3')
    labels = read_sources(FIXTURES/place, tmp_path/'images')
    assert {(name[9:], *rest) for name,*rest in found_boxes(labels)}==EXPECTED


@pytest.mark.parametrize('place', ['supervision/yolo', 'supervision/voc', 'labelme', 'label_studio/coco'])
def test_one_command_converts_them_with_images_beside_the_labels(place, tmp_path):
    shutil.copytree(FIXTURES/place, tmp_path/'set'/'labels')
    draw_images(tmp_path/'set'/'images')
    result = convert_sources(tmp_path/'set', None, tmp_path/'out', num_shards=1, workers=1)
    assert (result.tag, result.num_images, result.num_boxes)==('set', 3, 3)
    assert result.boxes_by_name=={'car': 1, 'big dog': 2} and not result.dropped_images


# --- published formats

def coco(file_names, first_id=1, **others):
    "A COCO file of the three boxes; ids and extra keys differ between tools."
    images = [dict(id=i, file_name=name, height=hw[0], width=hw[1], **others.get('image', {}))
              for i,(name,hw) in enumerate(zip(file_names, SIZES.values()), first_id)]
    rows = [(0, 'car', [10, 5, 20, 20]), (0, 'big dog', [40, 20, 30, 30]), (1, 'big dog', [10, 5, 20, 20])]
    categories = others.get('categories', [dict(id=1, name='car', supercategory=''), dict(id=2, name='big dog')])
    ids = {c['name']: c['id'] for c in categories}
    annotations = [dict(id=i, image_id=first_id+n, category_id=ids[name], bbox=box, area=box[2]*box[3], iscrowd=0,
                        segmentation=[], **others.get('annotation', {})) for i,(n,name,box) in enumerate(rows, 1)]
    return dict(info={}, licenses=[], categories=categories, images=images, annotations=annotations)


COCO_EXPORTS = {
    # CVAT: annotations/instances_default.json beside images/, attributes in each annotation
    'annotations/instances_default.json': coco(SIZES, annotation=dict(attributes=dict(occluded=False, rotation=0.0)),
                                               image=dict(license=0, flickr_url='', coco_url='', date_captured=0)),
    # Roboflow: one file in the folder of the images, category 0 is the name of the project
    'images/_annotations.coco.json': coco(SIZES, 0, categories=[
        dict(id=0, name='animals', supercategory='none'), dict(id=1, name='big dog', supercategory='animals'),
        dict(id=2, name='car', supercategory='animals')]),
    # FiftyOne: labels.json beside data/, no supercategory
    'labels.json': coco(SIZES, categories=[dict(id=0, name='car', supercategory=None),
                                           dict(id=1, name='big dog', supercategory=None)]),
    # VIA: file names only, ids as they come
    'via_export_coco.json': coco(SIZES, annotation=dict(segmentation_type='polygon')),
}


@pytest.mark.parametrize('name', COCO_EXPORTS)
def test_coco_files_of_labelling_tools_are_converted_as_exported(name, tmp_path):
    draw_images(tmp_path/'images')
    path = write_json(tmp_path/name, COCO_EXPORTS[name])
    for place in (path, tmp_path):
        result = convert_sources(place, None, tmp_path/'out'/place.name, 'set', num_shards=1, workers=1)
        assert (result.num_images, result.num_boxes)==(3, 3)
        assert result.boxes_by_name['car']==1 and not result.dropped_images


def via_regions(name):
    of_image = [(c, box) for n,c,*box in sorted(EXPECTED) if n==name]
    return [dict(shape_attributes=dict(name='rect', x=x, y=y, width=w, height=h), region_attributes=dict(kind=c))
            for c,(x,y,w,h) in of_image]


@pytest.mark.parametrize('is_project', [False, True])
@pytest.mark.parametrize('is_version_1', [False, True])
def test_json_of_via_is_read(is_project, is_version_1, tmp_path):
    draw_images(tmp_path/'images')
    entries = {}
    for name in SIZES:
        regions = via_regions(name)
        if is_version_1: regions = {str(i): region for i,region in enumerate(regions)}
        entries[f'{name}123'] = dict(filename=name, size=123, regions=regions, file_attributes={})
    content = dict(_via_settings={}, _via_img_metadata=entries, _via_attributes={}) if is_project else entries
    labels = read_sources(write_json(tmp_path/'via.json', content))
    assert found_boxes(labels)==EXPECTED and len(labels.images)==3


def kitti_line(name, x1, y1, x2, y2):
    return f'{name} 0.00 0 -10 {x1} {y1} {x2} {y2} -1 -1 -1 -1000 -1000 -1000 -10'


def test_kitti_is_read_and_regions_to_ignore_are_reported(tmp_path):
    draw_images(tmp_path/'image_2')
    for name in SIZES:
        rows = [(c.replace(' ', '_'), x, y, x+w, y+h) for n,c,x,y,w,h in EXPECTED if n==name]
        lines = [kitti_line(*row) for row in rows] + [kitti_line('DontCare', 1, 1, 9, 9)]
        write(tmp_path/'label_2'/f'{Path(name).stem}.txt', '\n'.join(lines))
    labels = read_sources(tmp_path/'label_2', tmp_path/'image_2')
    assert {(n, c.replace('_', ' '), *box) for n,c,*box in found_boxes(labels)}==EXPECTED
    assert len(labels.report.dropped_boxes[Fault.IGNORED_REGION])==3
    result = convert_sources(tmp_path, None, tmp_path/'out', 'kitti', num_shards=1, workers=1, strict=True)
    assert result.num_boxes==3


# --- corners of the formats

VOC = '<annotation><filename>{name}</filename>{size}{objects}</annotation>'
def voc_object(name, x1, y1, x2, y2, more=''):
    box = f'<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>'
    return f'<object><name>{name}</name>{more}{box}</object>'


def voc_boxes(tmp_path, objects, name='c.jpg', size=''):
    draw_images(tmp_path)
    write(tmp_path/'c.xml', VOC.format(name=name, size=size, objects=objects))
    return read_sources(tmp_path)


@pytest.mark.parametrize('corners, expected', [
    ((1, 1, 80, 61), [0, 0, 80, 61]), ((11, 6, 30, 25), [10, 5, 20, 20]),      # from 1
    ((0, 0, 80, 61), [0, 0, 80, 61]), ((10.5, 5, 30, 25), [10.5, 5, 19.5, 20])])  # from 0
def test_corners_of_voc_are_counted_from_1_unless_the_file_shows_otherwise(corners, expected, tmp_path):
    assert voc_boxes(tmp_path, voc_object('car', *corners)).annotations[0]['bbox']==expected


@pytest.mark.parametrize('name', ['c.jpg', 'c.png', 'D:\\work\\C.JPG', '/home/x/c.jpeg', 'c', '', 'other.jpg'])
def test_an_image_of_voc_is_found_by_the_file_name_or_else_by_the_name_of_the_label_file(name, tmp_path):
    labels = voc_boxes(tmp_path, voc_object('car', 1, 1, 9, 9), name)
    assert [image['path'].name for image in labels.images]==['c.jpg']


@pytest.mark.parametrize('size', ['', '<size><width>0</width><height>0</height></size>', '<size/>'])
def test_a_missing_size_of_voc_is_that_of_the_image(size, tmp_path):
    [image] = voc_boxes(tmp_path, voc_object('car', 1, 1, 9, 9), size=size).images
    assert (image['height'], image['width'])==(61, 80)


def test_difficult_objects_are_crowds_and_rotated_or_incomplete_ones_are_reported(tmp_path):
    objects = (voc_object('car', 1, 1, 9, 9, '<difficult>1</difficult>') + voc_object('car', 1, 1, 'x', 9)
               + voc_object('', 1, 1, 9, 9) + '<object><name>car</name></object>'
               + '<object><name>car</name><robndbox><cx>5</cx></robndbox></object>')
    labels = voc_boxes(tmp_path, objects)
    assert [a['iscrowd'] for a in labels.annotations]==[1]
    assert {fault: len(items) for fault,items in labels.report.dropped_boxes.items()}=={
        Fault.UNUSABLE_LABEL: 3, Fault.ROTATED_BOX: 1}


YOLO_LINES = [ # line, class names known, what becomes of it: a box in pixels of an image of 80 x 60, or a fault
    ('0 .5 .5 .25 .5', [30, 15, 20, 30]), ('1 .5 .5 .25 .5 .87', [30, 15, 20, 30]),
    ('\t0  .5 .5\t.25 .5 ', [30, 15, 20, 30]),
    ('0 .25 .25 .5 .25 .375 .5', [20, 15, 20, 15]),                                   # a triangle
    ('0 .25 .25 .5 .25 .5 .5 .25 .5', [20, 15, 20, 15]),                              # four upright corners
    ('0 .5 .25 .625 .4166666 .5 .5833333 .375 .4166666', Fault.ROTATED_BOX),          # a square on its corner
    ('0 .5 .5 .25', Fault.UNUSABLE_LABEL), ('0', Fault.UNUSABLE_LABEL), ('car .5 .5 .1 .1', Fault.UNUSABLE_LABEL),
    ('0.5 .5 .5 .1 .1', Fault.UNUSABLE_LABEL), ('-1 .5 .5 .1 .1', Fault.UNUSABLE_LABEL),
    ('0 .2 .2 .3 .3 .4 .4 .5', Fault.UNUSABLE_LABEL), ('2 .5 .5 .1 .1', Fault.UNNAMED_CLASS),
    ('0 40 30 20 30', Fault.NOT_A_FRACTION), ('0 nan .5 .1 .1', Fault.NOT_FINITE),
    ('0 1e999 .5 .1 .1', Fault.NOT_FINITE),
    ('0 .5 .5 0 .1', [40, 27, 0, 6])]                                                 # conversion reports "no size"


@pytest.mark.parametrize('line, expected', YOLO_LINES)
def test_a_line_of_yolo_becomes_a_box_or_is_reported_by_its_number(line, expected, tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .1 .1 .1 .1\n\n'+line)
    write(tmp_path/'classes.txt', 'car\nbig dog\n')
    labels = read_sources(tmp_path)
    boxes,faults = labels.annotations[1:],labels.report.dropped_boxes
    if isinstance(expected, list): assert np.allclose(boxes[0]['bbox'], expected, atol=1e-4) and not faults
    else: assert not boxes and {k: v for k,v in faults.items() if v}=={expected: [(1, 'a.txt:3')]}


def test_four_points_are_a_polygon_if_the_dataset_has_other_polygons(tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .25 .625 .4166666 .5 .5833333 .375 .4166666\n0 .25 .25 .5 .25 .375 .5')
    write(tmp_path/'classes.txt', 'car\nbig dog\n')
    labels = read_sources(tmp_path)
    assert [len(a['segmentation'][0]) for a in labels.annotations]==[8, 6]


def test_keypoints_of_a_pose_dataset_are_ignored(tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .25 .5 .5 .5 2 .4 .4 1')
    write(tmp_path/'data.yaml', 'names: {0: person}\nkpt_shape: [2, 3]\ntrain: images\n')
    assert [a['bbox'] for a in read_sources(tmp_path).annotations]==[[30, 15, 20, 30]]


def test_classes_of_yolo_without_names_are_numbered_and_reported(tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '10 .5 .5 .1 .1\n2 .2 .2 .1 .1')
    labels = read_sources(tmp_path)
    assert labels.all_names()==['class 2', 'class 10']
    assert [str(reason) for reason in labels.report.notes]==[str(Fault.NAMES_MISSING)]


@pytest.mark.parametrize('line, reason', [
    ('0 40 30 20 30', 'coordinates beyond 0 to 1'), ('0 nan .5 .1 .1', 'not finite')])
def test_labels_of_which_no_box_can_be_used_say_why(line, reason, tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'labels'/'a.txt', line)
    with pytest.raises(SourceError, match=f'no box can be used\n  boxes left out: {reason}'):
        ordered_names(read_sources(tmp_path/'labels', tmp_path/'images'))


def test_a_table_is_refused_by_name(tmp_path):
    path = write(tmp_path/'labels.csv', 'filename,xmin\na.jpg,3\n')
    with pytest.raises(SourceError, match='labels.csv: tables are not read.*Export COCO'): read_sources(path, tmp_path)


def test_parts_of_a_yolo_dataset_are_not_mixed_by_accident(tmp_path):
    for part in ('train', 'valid'):
        draw_images(tmp_path/part/'images', {'a.jpg': (60, 80)})
        write(tmp_path/part/'labels'/'a.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/'data.yaml', 'names: [car]\ntrain: ../train/images\nval: ../valid/images\n')
    for place in (tmp_path, path):
        with pytest.raises(SourceError, match='Convert each part on its own'): find_source(place)
    for place in (tmp_path/'train', tmp_path/'train'/'images', tmp_path/'train'/'labels'):
        labels = read_sources(place)
        assert [image['path'].parts[-3] for image in labels.images]==['train'] and labels.class_names==['car']


@pytest.mark.parametrize('text', [
    'train: /content/ds/train/images\nval: /content/ds/valid/images', 'train: C:\\ds\\train\nval: C:\\ds\\valid',
    'path: /content/ds\ntrain: train/images/\nval: ./valid/images', 'path: ../away\ntrain: images/t\nval: images/v'])
def test_parts_are_not_mixed_if_their_paths_are_those_of_another_computer(text, tmp_path):
    for part in ('train', 'valid'):
        draw_images(tmp_path/part/'images', {f'{part}1.jpg': (60, 80)})
        write(tmp_path/part/'labels'/f'{part}1.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/'data.yaml', f'names: [car]\n{text}\n')
    for place in (tmp_path, path):
        with pytest.raises(SourceError, match='onvert each part on its own: give its folder'): find_source(place)
    assert [image['path'].name for image in read_sources(tmp_path/'valid').images]==['valid1.jpg']


@pytest.mark.parametrize('text', ['/content/ds/train/images', 'D:\\x\\train', '../../ds/train/images/'])
def test_the_only_part_is_found_with_the_path_of_another_computer(text, tmp_path):
    for part in ('train', 'other'):
        draw_images(tmp_path/part/'images', {f'{part}1.jpg': (60, 80)})
        write(tmp_path/part/'labels'/f'{part}1.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/'data.yaml', f'names: [car]\ntrain: {text}\n')
    assert [image['path'].name for image in read_sources(path).images]==['train1.jpg']


def test_paths_of_parts_are_not_shortened_until_they_are_equal(tmp_path):
    draw_images(tmp_path/'images')
    for name in SIZES: write(tmp_path/'labels'/f'{Path(name).stem}.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'data.yaml', 'names: [car]\ntrain: ../train/images\nval: ../valid/images\n')
    assert len(read_sources(tmp_path).images)==3                               # of one folder, so that none are mixed


def test_folders_decide_between_images_of_the_same_name(tmp_path):
    for part in ('day', 'night'):
        draw_images(tmp_path/'images'/part, {'a.jpg': (60, 80)})
        write(tmp_path/'labels'/part/'a.txt', '0 .5 .5 .1 .1')
    labels = read_sources(tmp_path/'labels'/'night', tmp_path/'images')
    assert [image['path'].parent.name for image in labels.images]==['night']
    assert len(read_sources(tmp_path).images)==2


@pytest.mark.parametrize('kind', ['yolo', 'kitti', 'voc', 'labelme', 'label_studio'])
def test_images_that_fit_a_label_equally_well_are_reported_and_not_used(kind, tmp_path):
    draw_images(tmp_path, dict.fromkeys(('0.jpg', '1.jpg', '1.png'), (60, 80)))            # 1.png is the mask of 1.jpg
    for i in '01':
        if kind=='yolo': write(tmp_path/f'{i}.txt', '0 .5 .5 .25 .5')
        if kind=='kitti': write(tmp_path/f'{i}.txt', kitti_line('car', 30, 15, 50, 45))
        car = voc_object('car', 31, 16, 50, 45)
        if kind=='voc': write(tmp_path/f'{i}.xml', VOC.format(name=f'{i}.tif', size='', objects=car))
        if kind=='labelme': write_json(tmp_path/f'{i}.json', dict(imagePath=f'{i}.tif', shapes=[dict(
            label='car', shape_type='rectangle', points=[[30, 15], [50, 45]])]))
    if kind=='label_studio':
        value = dict(x=37.5, y=25, width=25, height=50, rotation=0, rectanglelabels=['car'])
        result = [dict(type='rectanglelabels', original_width=80, original_height=60, value=value)]
        tasks = [dict(data=dict(image=f'{i}.tif'), annotations=[dict(result=result)]) for i in '01']
        write_json(tmp_path/'t.json', tasks)
    labels = read_sources(tmp_path)
    assert [image['path'].name for image in labels.images]==['0.jpg'] and len(labels.annotations)==1
    assert {**labels.report.dropped_images}=={Fault.SEVERAL_FILES: [(2, '1.jpg and 1.png')]}
    assert [image_id for image_id,_ in labels.report.dropped_boxes[Fault.IMAGE_LEFT_OUT]]==[2]
    assert not [reason for reason in labels.report.notes if reason.fault in (Fault.NO_LABEL_FILE, Fault.NO_XML_FILE)]
    (tmp_path/'1.png').unlink()
    assert len(read_sources(tmp_path).annotations)==2


def test_a_yaml_file_with_a_byte_order_mark_names_the_classes(tmp_path):
    (tmp_path/'data.yaml').write_bytes(b'\xef\xbb\xbfnames: [cat]')
    assert find_class_names(tmp_path)[0]==('cat',)


def test_yaml_files_with_different_class_names(tmp_path):
    write(tmp_path/'a.yaml', 'names: [a, b]')
    write(tmp_path/'b.yml', 'names: [b, a]')
    with pytest.raises(SourceError, match='names in a.yaml, b.yml differ'): find_class_names(tmp_path)
    write(tmp_path/'data.yaml', 'names: [c]')
    assert find_class_names(tmp_path)[0]==('c',)


def test_a_damaged_yaml_file_beside_that_of_the_dataset_is_ignored(tmp_path):
    write(tmp_path/'chart.yaml', 'names: [{{')
    with pytest.raises(SourceError, match='chart.yaml: not valid YAML'): find_class_names(tmp_path)
    write(tmp_path/'set.yaml', 'names: [a]')
    assert find_class_names(tmp_path)[0]==('a',)


@pytest.mark.parametrize('text', ['x: !!bool foo', 'x: !!timestamp foo', 'names: !!int foo'])
def test_tags_of_other_types_are_an_error_that_names_the_file(text, tmp_path):
    write(tmp_path/'data.yaml', text)
    with pytest.raises(SourceError, match='data.yaml: not valid YAML'): read_yaml(tmp_path/'data.yaml')


@pytest.mark.parametrize('name', ['obj.names', 'dataset.yml', 'coco.yaml', '_darknet.labels'])
def test_class_names_that_git_lfs_has_not_fetched(name, tmp_path):
    write(tmp_path/name, 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345\n')
    with pytest.raises(UnsuitableFile, match='Git LFS'): find_class_names(tmp_path)


@pytest.mark.parametrize('kind', ['coco', 'yolo'])
def test_blanks_around_a_class_name_do_not_make_another_class(kind, tmp_path):
    draw_images(tmp_path, {'a.jpg': (60, 80)})
    write(tmp_path/'data.yaml', "names: ['car ', dog]\n")
    write(tmp_path/'a.txt', '0 .5 .5 .25 .5')
    path = tmp_path
    if kind=='coco':
        path = write_json(tmp_path/'c.json', dict(
            images=[dict(id=1, file_name='a.jpg', height=60, width=80)],
            annotations=[dict(id=1, image_id=1, category_id=1, bbox=[30, 15, 20, 30], area=600, iscrowd=0)],
            categories=[dict(id=1, name='car '), dict(id=2, name='dog')]))
    labels = read_sources(path)
    assert labels.all_names()==['car', 'dog'] and found_boxes(labels)=={('a.jpg', 'car', 30, 15, 20, 30)}
    options = dict(num_shards=1, workers=1)
    mapped = convert_sources(path, tmp_path, tmp_path/'out', 'a', class_map={'car': 'auto'}, **options)
    assert mapped.boxes_by_name=={'auto': 1, 'dog': 0}
    convert_sources(path, tmp_path, tmp_path/'plain', 'a', **options)
    assert load_sidecar(tmp_path/'plain'/'a-*').classes.names==('car', 'dog')


def test_images_without_label_files_are_examples_of_background(tmp_path):
    draw_images(tmp_path/'images')
    draw_images(tmp_path/'unused', {'other.jpg': (60, 80)})
    write(tmp_path/'labels'/'c.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'README.txt', 'About')
    labels = read_sources(tmp_path)
    assert len(labels.images)==3
    assert len(labels.report.notes[next(r for r in labels.report.notes if r.fault==Fault.NO_LABEL_FILE)])==2


def test_lists_of_images_select_a_part(tmp_path):
    draw_images(tmp_path/'images')
    for name in SIZES: write(tmp_path/'labels'/f'{Path(name).stem}.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'classes.txt', 'car')
    path = write(tmp_path/'train.txt', './images/c.jpg\nimages/empty.jpg\n')
    assert {image['path'].name for image in read_sources(path).images} >= {'c.jpg', 'empty.jpg'}
    shutil.copytree(FIXTURES/'supervision'/'voc', tmp_path/'voc'/'Annotations')
    draw_images(tmp_path/'voc'/'JPEGImages')
    path = write(tmp_path/'voc'/'ImageSets'/'Main'/'train.txt', 'c\nempty\n')
    assert [image['path'].name for image in read_sources(path).images]==['c.jpg', 'empty.jpg']


def test_photos_that_are_turned_by_a_flag_are_labelled_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (80, 60)).save(tmp_path/'a.jpg', exif=exif)
    write(tmp_path/'a.txt', '0 .5 .5 .5 .5')
    assert read_sources(tmp_path).annotations[0]['bbox']==[15, 20, 30, 40]
    result = convert_sources(tmp_path, None, tmp_path/'out', 'a', num_shards=1, workers=1)
    assert result.num_boxes==1 and any('upright' in note for note in result.notes)


# --- counts and errors

@pytest.mark.parametrize('place', ['supervision/yolo', 'supervision/voc', 'labelme', 'label_studio/tasks.json'])
def test_no_image_and_no_box_is_lost_if_images_are_missing_or_damaged(place, tmp_path):
    draw_images(tmp_path/'images')
    (tmp_path/'images'/'c.jpg').unlink()
    write(tmp_path/'images'/'empty.jpg', 'no image')
    labels = read_sources(FIXTURES/place, tmp_path/'images')
    assert len(labels.annotations)+num_left_out(labels.report)==3
    result = convert_sources(FIXTURES/place, tmp_path/'images', tmp_path/'out', 'x', num_shards=1, workers=1)
    assert result.num_images+sum(map(len, result.dropped_images.values()))==3
    assert result.num_boxes+sum(map(len, result.dropped_boxes.values()))==3


def mutate(data, rng):
    "Changes some bytes of a file: cut, doubled, replaced, removed."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data)+1)
        kind = rng.choice(['cut', 'flip', 'insert', 'drop'])
        if kind=='cut': del data[i:]
        elif kind=='flip' and i<len(data): data[i] = rng.randrange(256)
        elif kind=='insert': data[i:i] = rng.choice([b'"', b'-', b'9'*400, b'null', b'\n', b'<', b'\xff', b'[[['])
        else: del data[i:i+rng.randint(1, 30)]
    return bytes(data)


def check_mutated_files(seeds, tmp_path):
    draw_images(tmp_path/'images')
    places = [p for p in sorted(FIXTURES.rglob('*')) if p.is_file() and p.suffix!='.py']
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path/'mutated'
        shutil.rmtree(folder, ignore_errors=True)
        original = rng.choice(places)
        folder.mkdir()
        for name in ('data.yaml', 'classes.txt'):
            if (original.parent.parent/name).is_file(): shutil.copy(original.parent.parent/name, folder)
        (folder/original.name).write_bytes(mutate(original.read_bytes(), rng))
        try: labels = read_sources(rng.choice([folder, folder/original.name]), tmp_path/'images')
        except (SourceError, CocoError, FileNotFoundError) as e:
            assert 10<len(str(e))<1500 and str(e).strip(), seed
            continue
        except Exception as e: raise AssertionError(f'seed {seed}, {original.name}: {type(e).__name__}: {e}') from e
        for box in labels.annotations: assert np.isfinite(box['bbox']).all() and box['class_name'], seed
        json.dumps(labels.to_coco(), allow_nan=False)


def test_damaged_label_files_give_a_sentence_or_a_report(tmp_path): check_mutated_files(range(300), tmp_path)


@pytest.mark.slow
def test_many_damaged_label_files_give_a_sentence_or_a_report(tmp_path): check_mutated_files(range(300, 6000), tmp_path)


WRONG_SOURCES = [
    ({'a.txt': 'hello'}, 'no labels'), ({}, 'no labels'), ({'a.json': '{"x": 1}'}, 'no labels'),
    ({'a.xml': VOC.format(name='a', size='', objects=''), 'a.txt': '0 .5 .5 .1 .1'}, 'several formats'),
    ({'a.json': '{"images": []}', 'b.json': '{"images": []}'}, '2 COCO files'),
    ({'a.json': '{"images": [', 'data.yaml': ''}, 'not valid JSON'),
    ({'a.txt': '0 .5 .5 .1 .1', 'data.yaml': 'names: ['}, 'not valid YAML (line 1)')]


@pytest.mark.parametrize('files, message', WRONG_SOURCES)
def test_a_path_that_is_not_one_dataset_is_explained(files, message, tmp_path):
    for name,text in files.items(): write(tmp_path/name, text)
    with pytest.raises((SourceError, CocoError)) as e: read_sources(tmp_path)
    assert message in str(e.value)


@pytest.mark.parametrize('name, text, message', [
    ('a.xml', '<annotations><image/></annotations>', 'export COCO or Pascal VOC instead'), ('a.xml', '<x', 'a.xml'),
    ('a.zip', 'x', 'Unpack it'), ('a.yaml', 'nc: 3', 'no class names'),
    ('a.txt', 'About', 'Give the folder of the labels'),
    ('a.json', '[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', 'the top level is a list'),
    ('a.xml', '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>', 'a.xml')])
def test_a_file_that_is_no_labels_is_explained(name, text, message, tmp_path):
    with pytest.raises((SourceError, CocoError)) as e: read_sources(write(tmp_path/name, text))
    assert message in str(e.value)


def test_a_name_that_leads_out_of_the_image_folder_is_not_followed(tmp_path):
    draw_images(tmp_path/'private', {'secret.jpg': (60, 80)})
    draw_images(tmp_path/'set', {'inside.jpg': (60, 80)})
    shape = dict(label='car', shape_type='rectangle', points=[[1, 1], [5, 5]])
    names = ['inside.jpg', '../private/secret.jpg', str(tmp_path/'private'/'secret.jpg'), '../../../etc/passwd']
    for i,name in enumerate(names):
        write_json(tmp_path/'set'/f'x{i}.json', dict(version='5', shapes=[shape], imagePath=name))
    labels = read_sources(tmp_path/'set')
    assert [image['path'].name for image in labels.images]==['inside.jpg']
    assert len(labels.report.dropped_images[Fault.FILE_MISSING])==2 and num_left_out(labels.report)==3


# --- names and places of images

@pytest.mark.parametrize('stem', ['a_jpg.rf.0a1b2c3d', 'frame.000017', 'v1.2.final', 'Scan 1.5 mm'])
@pytest.mark.parametrize('ending', ['.jpg', '.PNG'])
def test_a_name_with_dots_finds_its_image_and_no_other(stem, ending, tmp_path):
    draw_images(tmp_path/'images', {f'{stem}{ending}': (60, 80), 'a_jpg.jpg': (60, 80), 'v1.2.jpg': (60, 80)})
    write(tmp_path/'yolo'/f'{stem}.txt', '0 .5 .5 .25 .5')
    write(tmp_path/'voc'/f'{stem}.xml', VOC.format(name=stem, size='', objects=voc_object('car', 31, 16, 50, 45)))
    for folder in ('yolo', 'voc'):
        labels = read_sources(tmp_path/folder, tmp_path/'images')
        [box] = labels.annotations
        assert [image['path'].name for image in labels.images if image['id']==box['image_id']]==[f'{stem}{ending}']
        assert box['bbox']==[30, 15, 20, 30] and not labels.report.dropped_images


@pytest.mark.parametrize('name', ['a.heic', 'C:\\x\\A.DNG', 'a.jpeg'])
def test_an_ending_from_before_conversion_is_ignored(name, tmp_path):
    draw_images(tmp_path, {'a.jpg': (60, 80)})
    shape = dict(label='car', shape_type='rectangle', points=[[1, 1], [5, 5]])
    write_json(tmp_path/'x.json', dict(version='5', shapes=[shape], imagePath=name))
    assert found_boxes(read_sources(tmp_path))=={('a.jpg', 'car', 1, 1, 4, 4)}


def notes_of(labels): return {reason.fault: sorted(items) for reason,items in labels.report.notes.items()}


@pytest.mark.parametrize('listed, boxes, background', [
    ('images/a.jpg', 1, []), ('images/a.jpg\nimages/none.jpg\n', 1, ['none.jpg']),
    ('./images/my photo.jpg\nimages/b.png', 2, []), ('images/my photo.jpg\nimages/none.jpg\nimages/gone.jpg', 1,
                                                    ['none.jpg'])])
@pytest.mark.parametrize('is_absolute', [False, True])
def test_a_list_of_images_has_its_images_and_no_others(listed, boxes, background, is_absolute, tmp_path, monkeypatch):
    draw_images(tmp_path/'images', dict.fromkeys(('a.jpg', 'b.png', 'my photo.jpg', 'none.jpg', 'v.jpg'), (60, 80)))
    for stem in ('a', 'b', 'my photo', 'v'): write(tmp_path/'labels'/f'{stem}.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'data.yaml', 'names: [car]\ntrain: train.txt\n')
    path = write(tmp_path/'train.txt', listed)
    monkeypatch.chdir(tmp_path)
    for place in (path if is_absolute else Path('train.txt'), tmp_path/'data.yaml'):
        labels = read_sources(place)
        names = [Path(line).name for line in listed.splitlines() if "gone" not in line]
        assert [image['path'].name for image in labels.images]==names and len(labels.annotations)==boxes
        assert notes_of(labels)==({Fault.NO_LABEL_FILE: background} if background else {})
        assert len(labels.report.dropped_images[Fault.FILE_MISSING])==listed.count('gone')


def test_a_list_in_a_folder_of_its_own_finds_its_images(tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80), 'v.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/'lists'/'day.txt', '../images/a.jpg')
    assert [image['path'].name for image in read_sources(path).images]==['a.jpg']
    (tmp_path/'labels'/'a.txt').unlink()
    with pytest.raises(SourceError, match='none of its images has a label file'): find_source(path)


@pytest.mark.parametrize('start', ['data/', 'data/yolo/', '/home/ada/cars/', 'C:\\ada\\', '../cars/'])
@pytest.mark.parametrize('place', ['train.txt', 'lists/train.txt'])
@pytest.mark.parametrize('images, labels', [('obj_train_data', 'obj_train_data'), ('images/train', 'labels/train')])
def test_a_list_may_be_relative_to_another_folder(start, place, images, labels, tmp_path):
    draw_images(tmp_path/images, dict.fromkeys(('a.jpg', 'b.jpg', 'none.jpg', 'other.jpg'), (60, 80)))
    for stem in ('a', 'b', 'other'): write(tmp_path/labels/f'{stem}.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/place, '\n'.join(f'{start}{images}/{name}.jpg' for name in ('none', 'a', 'b')))
    found = read_sources(path, tmp_path)
    assert [image['path'] for image in found.images]==[tmp_path/images/f'{name}.jpg' for name in ('none', 'a', 'b')]
    assert len(found.annotations)==2 and notes_of(found)[Fault.NO_LABEL_FILE]==['none.jpg']


def test_a_list_never_takes_labels_of_other_images(tmp_path):
    draw_images(tmp_path/'new'/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .1 .1')                       # of the folder above
    with pytest.raises(SourceError, match='none of its images has a label file'):
        find_source(write(tmp_path/'new'/'train.txt', 'images/a.jpg'))
    for folder in ('x', 'y'): write(tmp_path/'two'/folder/'other.txt', '')
    write(tmp_path/'two'/'a.txt', '0 .5 .5 .1 .1')                          # of x/a.jpg or of y/a.jpg?
    with pytest.raises(SourceError, match='none of its images has a label file'):
        find_source(write(tmp_path/'two'/'train.txt', 'x/a.jpg\ny/a.jpg'))


@pytest.mark.parametrize('line', ['/', '..', '.', 'x'*300+'.jpg', 'a\0b.jpg', 'images/', '\\'])
def test_a_strange_line_in_a_list_is_a_missing_image(line, tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .1 .1')
    labels = read_sources(write(tmp_path/'list.txt', f'images/a.jpg\n{line}\n'))
    assert [image['path'].name for image in labels.images]==['a.jpg'] and len(labels.annotations)==1
    assert num_left_out(labels.report)==0 and sum(map(len, labels.report.dropped_images.values()))==1


def test_a_single_label_file_is_one_image(tmp_path):
    draw_images(tmp_path, {'a.b.jpg': (60, 80), 'c.jpg': (60, 80)})
    labels = read_sources(write(tmp_path/'a.b.txt', '0 .5 .5 .1 .1'))
    assert [image['path'].name for image in labels.images]==['a.b.jpg'] and len(labels.annotations)==1


@pytest.mark.parametrize('place', ['train.txt', 'sets/train.txt', 'ImageSets/Main/train.txt'])
def test_a_relative_list_of_voc_finds_annotations_and_images(place, tmp_path, monkeypatch):
    shutil.copytree(FIXTURES/'supervision'/'voc', tmp_path/'Annotations')
    draw_images(tmp_path/'JPEGImages')
    write(tmp_path/place, 'c\nempty\n')
    monkeypatch.chdir(tmp_path)
    assert [image['path'].name for image in read_sources(Path(place)).images]==['c.jpg', 'empty.jpg']
    monkeypatch.chdir((tmp_path/place).parent)
    assert [image['path'].name for image in read_sources('train.txt').images]==['c.jpg', 'empty.jpg']


@pytest.mark.parametrize('part', ['train', 'val', 'train/day'])
def test_a_folder_of_images_has_its_labels_beside_it(part, tmp_path, monkeypatch):
    for name in ('train', 'val', 'train/day'):
        draw_images(tmp_path/'images'/name, {'a.jpg': (60, 80), f'{Path(name).name}.jpg': (60, 80)})
        write(tmp_path/'labels'/name/'a.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'data.yaml', 'names: [car]\ntrain: images/train\nval: images/val\n')
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path/'images'/part, Path('images')/part):
        labels = read_sources(place)
        assert labels.class_names==['car'] and len(labels.annotations)==(2 if part=='train' else 1)
        folders = {image['path'].parent.resolve() for image in labels.images}
        assert folders=={tmp_path/'images'/part, *([tmp_path/'images/train/day'] if part=='train' else [])}
        assert len(labels.images)==2*len(labels.annotations)
    with pytest.raises(SourceError, match=r'train \(images/train\), val \(images/val\)'): find_source(Path('data.yaml'))


@pytest.mark.parametrize('labels_at', ['proj/labels', 'proj', 'proj/labels/train'])
def test_images_of_another_dataset_are_not_taken(labels_at, tmp_path):
    draw_images(tmp_path/'holiday', {'0001.png': (60, 80)})
    write(tmp_path/labels_at/'0001.txt', '0 .5 .5 .1 .1')
    with pytest.raises(SourceError, match='its image is not in .*proj'): read_sources(tmp_path/labels_at)
    draw_images(tmp_path/'proj'/'photos', {'0001.png': (60, 80)})
    assert [image['path'].parent.name for image in read_sources(tmp_path/labels_at).images]==['photos']


@pytest.mark.parametrize('link', ['images', 'labels', 'both'])
def test_folders_behind_links_are_searched_once(link, tmp_path):
    draw_images(tmp_path/'disk'/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'disk'/'labels'/'a.txt', '0 .5 .5 .1 .1')
    (tmp_path/'set').mkdir()
    for name in ('images', 'labels'):
        if link in (name, 'both'): (tmp_path/'set'/name).symlink_to(tmp_path/'disk'/name)
        else: shutil.copytree(tmp_path/'disk'/name, tmp_path/'set'/name)
    (tmp_path/'set'/'images'/'loop').symlink_to(tmp_path/'set')
    labels = read_sources(tmp_path/'set')
    assert [image['path'].parent.name for image in labels.images]==['images'] and len(labels.annotations)==1
    path = write_json(tmp_path/'set'/'coco.json', coco(['A.JPG']))
    result = convert_sources(path, None, tmp_path/'out', num_shards=1, workers=1)
    assert (result.num_images, result.num_boxes)==(1, 2)


# --- class names in YAML

@pytest.mark.parametrize('text, names', [
    ('names: [on, off, no]', ['on', 'off', 'no']), ('names: [1.0, 2024-01-01, 0x10]', ['1.0', '2024-01-01', '0x10']),
    ('names: {0: yes, 2: y}', ['yes', 'class 1', 'y']), ('names:\n  - car\n  -\n', ['car', 'class 1']),
    ('names: {"0": car}\nval:\ntest:\npath:\nkpt_shape:\n', ['car'])])
def test_class_names_are_texts_as_written(text, names, tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    write(tmp_path/'labels'/'a.txt', '0 .5 .5 .25 .5')
    path = write(tmp_path/'data.yaml', text)
    for place in (tmp_path, path):
        labels = read_sources(place)
        assert labels.class_names==names and [a['class_name'] for a in labels.annotations]==names[:1]
        assert labels.annotations[0]['bbox']==[30, 15, 20, 30]


@pytest.mark.parametrize('text', ['a: &a [x]\nnames: [*a, *a]', 'names: {car: 0}', 'names: {0: {a: b}}', 'names: 3'])
def test_names_that_are_no_list_of_texts_are_refused(text, tmp_path):
    path = write(tmp_path/'data.yaml', text)
    with pytest.raises(SourceError, match='no class names'): find_source(path)


@pytest.mark.parametrize('text, class_map', [('on: light\nno:\n', dict(on='light', no='')),
                                             ('1: one\n1.0: float\ncar: ~\n', {'1': 'one', '1.0': 'float', 'car': ''}),
                                             ('"null": no\nvan: null\n', dict(null='no', van=''))])
def test_a_class_map_has_texts_and_empty_entries(text, class_map, tmp_path):
    assert parse_class_map([str(write(tmp_path/'map.yaml', text))])==class_map


@pytest.mark.parametrize('text', ['Role: !Ref Name', 'a: 1\n---\nb: 2', 'names_of: [', None])
@pytest.mark.parametrize('levels', [0, 1, 3])
def test_yaml_files_of_other_programs_are_not_read(text, levels, tmp_path):
    folder = tmp_path/'a'/'b'/'c'
    draw_images(folder, {'a.jpg': (60, 80)})
    write(folder/'a.txt', '0 .5 .5 .25 .5')
    other = [folder, *folder.parents][levels]/'conf.yaml'
    if text is None: other.mkdir()
    else: write(other, text)
    write(tmp_path/'zoo.yaml', 'names: [cat]')
    assert [a['class_name'] for a in read_sources(folder).annotations]==['cat']


def test_only_the_first_line_of_a_large_text_file_is_read(tmp_path):
    path = tmp_path/'log.txt'
    for head,found in ((b'\n \n0 .5 .5 .1 .1\n', 'yolo'), (b'start\n', None), (b'\xff\n', None), (b'', 'empty')):
        path.write_bytes(head)
        assert text_format(path)==found
    path.write_bytes(b'started\n'+b'x'*30_000_000)
    tracemalloc.start()
    assert text_format(path) is None
    assert tracemalloc.get_traced_memory()[1]<2_000_000
    tracemalloc.stop()


def png_text(pixels, mode=None):
    "A mask as LabelMe stores it."
    data = io.BytesIO()
    image = Image.fromarray(np.uint8(pixels))
    (image.convert(mode) if mode else image).save(data, 'PNG')
    return base64.b64encode(data.getvalue()).decode()


RING = np.pad(np.zeros((2, 3)), 1, constant_values=1)          # 4 rows, 5 columns, a hole inside

@pytest.mark.parametrize('mask', [png_text(RING), png_text(255*RING), png_text(255*RING, '1')])
def test_a_mask_of_labelme_is_stored_with_its_holes(mask, tmp_path):
    draw_images(tmp_path/'data', {'a.jpg': (60, 80)})
    shapes = [dict(label='nut', shape_type='mask', points=[[10, 20], [14, 23]], mask=mask),
              dict(label='nut', shape_type='rectangle', points=[[1, 1], [5, 5]]),
              dict(label='nut', shape_type='polygon', points=[[30, 30], [40, 30], [40, 40]])]
    write_json(tmp_path/'data'/'a.json', dict(shapes=shapes, imagePath='a.jpg', imageHeight=60, imageWidth=80))
    convert_sources(tmp_path/'data', None, tmp_path/'out', num_shards=1, include_masks=True, workers=1)
    [example] = map(parse_example, read_records(next((tmp_path/'out').glob('*-of-*'))))
    expected = np.zeros((60, 80))
    expected[20:24, 10:15] = RING
    masks = [np.asarray(Image.open(io.BytesIO(png))) for png in example['image/object/mask']]
    assert np.array_equal(masks[0], expected) and not masks[1].any() and masks[2].sum()>40
    edges = [example[f'image/object/bbox/{edge}'][0] for edge in ('ymin', 'xmin', 'ymax', 'xmax')]
    assert np.allclose(np.multiply(edges, [60, 80, 60, 80]), [20, 10, 24, 15])


@pytest.mark.parametrize('mask', [
    None, 7, '', 'no base64', base64.b64encode(b'no image').decode(), png_text(np.ones((50, 50))), png_text(RING)[:60]])
def test_a_damaged_mask_of_labelme_leaves_the_box(mask, tmp_path):
    draw_images(tmp_path, {'a.jpg': (60, 80)})
    shapes = [dict(label='nut', shape_type='mask', points=[[20, 15], [24, 18]], mask=mask)]
    write_json(tmp_path/'a.json', dict(shapes=shapes, imagePath='a.jpg', imageHeight=60, imageWidth=80))
    [box] = read_sources(tmp_path).annotations
    assert box['bbox']==[20, 15, 5, 4] and 'segmentation' not in box


@pytest.mark.parametrize('points, expected', [
    ([[10, 5], [30, 5], [30, 25], [10, 25]], [10, 5, 20, 20]),
    ([[30, 25], [10, 25], [10, 5], [30, 5]], [10, 5, 20, 20]),
    ([[10, 5], [30, 25]], [10, 5, 20, 20]), ([[20, 5], [30, 15], [20, 25], [10, 15]], Fault.ROTATED_BOX),
    ([[10, 5], [30, 5], [30, 25]], Fault.UNUSABLE_LABEL), ([], Fault.UNUSABLE_LABEL)])
def test_a_rectangle_of_labelme_has_two_or_four_corners(points, expected):
    assert labelme_outline(dict(shape_type='rectangle', points=points))==expected


def test_an_image_left_out_later_takes_its_boxes_with_it(tmp_path):
    draw_images(tmp_path, {'a.jpg': (60, 80), 'b.jpg': (60, 80)})
    labels = LabelSet()
    a,b,gone = (labels.add_image(tmp_path/name) for name in ('a.jpg', 'b.jpg', 'gone.jpg'))
    for image in (a, b, gone, a): labels.add_box(image, f'{image["id"]}', 'car', [1, 1, 5, 5])
    labels.leave_image_out(a, Fault.LABELS_DAMAGED, 'a.txt')
    assert [image['id'] for image in labels.images]==[b['id']] and len(labels.annotations)==1
    assert labels.report.dropped_boxes[Fault.IMAGE_LEFT_OUT]==[(3, '3'), (1, '1'), (1, '1')]
    assert dict(labels.report.dropped_images)=={Fault.FILE_MISSING: [(3, 'gone.jpg')],
                                                Fault.LABELS_DAMAGED: [(1, 'a.txt')]}


# --- several sources and class maps

@pytest.fixture
def two_sources(tmp_path):
    draw_images(tmp_path/'images')
    for name,cls in (('c', 'Car'), ('empty', 'Van')):
        text = VOC.format(name=f'{name}.jpg', size='', objects=voc_object(cls, 31, 31, 50, 50))
        write(tmp_path/'voc'/f'{name}.xml', text)
    return [FIXTURES/'supervision'/'yolo', tmp_path/'voc'], tmp_path/'images'


def test_an_image_in_two_sources_gets_the_boxes_of_both(two_sources, tmp_path):
    paths,images = two_sources
    class_map = parse_class_map(['Car=car', 'Van=car', 'big dog=dog'])
    labels = read_sources(paths, images, class_map)
    assert len(labels.images)==3 and labels.all_names()==['car', 'dog']
    assert sorted(a['class_name'] for a in labels.annotations)==['car']*3 + ['dog']*2
    result = convert_sources(paths, images, tmp_path/'out', 'both', class_map, num_shards=1, workers=1)
    assert result.boxes_by_name=={'car': 3, 'dog': 2}
    contents = json.loads((tmp_path/'out'/'both_coco.json').read_text())
    assert [c['name'] for c in contents['categories']]==['car', 'dog']


@pytest.mark.parametrize('kind', ['voc', 'yolo', 'kitti'])
@pytest.mark.parametrize('places', [['one', 'two'], ['.']])
def test_label_files_of_the_same_name_are_joined_and_copies_count_once(kind, places, tmp_path):
    draw_images(tmp_path/'images', {'a.jpg': (60, 80)})
    texts = dict(voc=lambda x: VOC.format(name='a.jpg', size='', objects=voc_object('car', x+1, 16, x+20, 45)),
                 yolo=lambda x: f'0 {(x+10)/80} .5 .25 .5', kitti=lambda x: kitti_line('car', x, 15, x+20, 45))
    ending = 'xml' if kind=='voc' else 'txt'
    for folder,x in (('one', 30), ('two', 30), ('three', 50)): write(tmp_path/'l'/folder/f'a.{ending}', texts[kind](x))
    labels = read_sources([tmp_path/'l'/place for place in [*places, *(['three'] if places!=['.'] else [])]],
                          tmp_path/'images')
    assert sorted(a['bbox'] for a in labels.annotations)==[[30, 15, 20, 30], [50, 15, 20, 30]]
    assert labels.report.dropped_boxes[Fault.DUPLICATE_ANNOTATION]==[(1, f'a.{ending}:1')]
    assert {a['id'] for a in labels.annotations}=={f'a.{ending}:1', f'a.{ending}:1 (2)'}


def test_a_part_of_several_folders_is_not_cut_to_its_first(tmp_path):
    for name in ('day', 'night'):
        draw_images(tmp_path/'images'/name, {f'{name}.jpg': (60, 80)})
        write(tmp_path/'labels'/name/f'{name}.txt', '0 .5 .5 .1 .1')
    path = write(tmp_path/'data.yaml', 'names: [car]\ntrain: [images/day, images/night]\n')
    with pytest.raises(SourceError, match='Convert each part on its own'): find_source(path)
    write(path, 'names: [car]\ntrain: [images/day]\n')
    assert [image['path'].name for image in read_sources(path).images]==['day.jpg']


@pytest.mark.parametrize('words, names, num_lost', [
    (['Van='], ['car', 'big dog', 'Car'], 1), (['*='  , 'Car=Car'], ['Car'], 4), (['*=thing'], ['thing'], 0),
    (['Van=bus', 'Car=bus', 'car=bus'], ['bus', 'big dog'], 0), ([], ['car', 'big dog', 'Car', 'Van'], 0)])
def test_class_maps_rename_merge_and_leave_out(words, names, num_lost, two_sources):
    labels = read_sources(*two_sources, parse_class_map(words))
    assert labels.all_names()==names
    assert num_left_out(labels.report)==num_lost and len(labels.annotations)==5-num_lost


@pytest.mark.parametrize('words, message', [
    (['cat=car'], 'no class has the name cat. Did you mean car?'), (['Vann='], 'Did you mean Van?'),
    (['zzzz=a'], 'There are car, big dog, Car, Van'), (['*='], 'leaves out all classes'),
    (['Van=a', 'Van=b'], 'Van becomes a and b'), (['Van'], 'neither a map such as van=car nor a file')])
def test_a_wrong_class_map_is_explained(words, message, two_sources):
    with pytest.raises(SourceError) as e: read_sources(*two_sources, parse_class_map(words))
    assert message in str(e.value)


@pytest.mark.parametrize('name, text', [('m.yaml', 'Van: car\nCar: car\n'), ('m.txt', 'Van=car\nCar = car\n'),
                                        ('m.json', '{"Van": "car", "Car": "car"}')])
def test_a_class_map_can_be_in_a_file(name, text, two_sources, tmp_path):
    labels = read_sources(*two_sources, parse_class_map([str(write(tmp_path/name, text))]))
    assert labels.all_names()==['car', 'big dog']


def test_a_list_of_classes_fixes_the_ids(two_sources, tmp_path):
    paths,images = two_sources
    names = write(tmp_path/'names.txt', 'Van\nbig dog\nboat\nCar\ncar\n')
    for i,path in enumerate(paths):
        convert_sources(path, images, tmp_path/'out', f'set{i}', label_map=names, num_shards=1, workers=1)
        contents = json.loads((tmp_path/'out'/f'set{i}_coco.json').read_text())
        assert [c['name'] for c in contents['categories']]==['Van', 'big dog', 'boat', 'Car', 'car']
    with pytest.raises(SourceError, match='no class has the name big dog. Did you mean big dogs'):
        convert_sources(paths[0], images, tmp_path/'out', 'x', label_map=write(tmp_path/'n.txt', 'car\nbig dogs'))


def test_other_labels_with_the_same_tag_do_not_replace_records(two_sources, tmp_path):
    paths,images = two_sources
    options = dict(num_shards=1, workers=1)
    convert_sources(paths[0], images, tmp_path/'out', 'train', **options)
    before = {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()}
    with pytest.raises(SourceError, match='which would be lost. Choose another tag'):
        convert_sources(paths[1], images, tmp_path/'out', 'train', **options)
    damaged = write(tmp_path/'lost'/'c.jpg', 'no image').parent
    with pytest.raises(ValueError, match='no image can be used'):
        convert_sources(paths[0], damaged, tmp_path/'out', 'val', **options)
    (images/'empty.jpg').unlink()
    with pytest.raises(ValueError, match='--strict allows none'):
        convert_sources(paths, images, tmp_path/'out', 'val', strict=True, **options)
    assert {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir() if p.name[0]!='.'}=={
        name: data for name,data in before.items() if name[0]!='.'}


@pytest.mark.parametrize('points', [[[float('nan'), 2], [12, 22]], [[10, 20], [float('inf'), 22]],
                                    [[float('-inf'), 2], [12, float('nan')]]])
def test_a_labelme_mask_that_is_not_finite_is_reported(points, tmp_path):
    draw_images(tmp_path, {'a.png': (60, 80)})
    shapes = [dict(label='nut', shape_type='mask', points=p, mask='') for p in (points, [[10, 20], [12, 22]])]
    write_json(tmp_path/'a.json', dict(imagePath='a.png', imageHeight=60, imageWidth=80, shapes=shapes))
    labels = read_sources(tmp_path)
    assert labels.report.dropped_boxes[Fault.NOT_FINITE]==[(1, 'a.json:1')]
    assert [a['id'] for a in labels.annotations]==['a.json:2']


LONG = 'x'*300 + '.jpg'

@pytest.mark.parametrize('kind', ['voc', 'labelme', 'label_studio', 'via', 'coco', 'list'])
def test_an_image_name_that_no_file_can_have_is_a_missing_file(kind, tmp_path):
    draw_images(tmp_path, {'a.jpg': (60, 80)})
    box, size = dict(x=5, y=5, width=20, height=20), dict(height=60, width=80)
    task = dict(annotations=[dict(result=[dict(type='rectanglelabels', original_width=80, original_height=60,
                                               value=box | dict(rectanglelabels=['car']))])])
    for i,name in enumerate(['a.jpg', LONG]):
        if kind=='voc': write(tmp_path/f'{i}.xml', f'<annotation><filename>{name}</filename></annotation>')
        shapes = dict(shapes=[], imageHeight=60, imageWidth=80, imagePath=name)
        if kind=='labelme': write_json(tmp_path/f'{i}.json', shapes)
    names = enumerate(['a.jpg', LONG], 1)
    if kind=='label_studio': write_json(tmp_path/'t.json', [task | dict(data=dict(image=name)) for _,name in names])
    if kind=='via': write_json(tmp_path/'v.json', {name: dict(filename=name, regions=[]) for _,name in names})
    if kind=='coco':
        write_json(tmp_path/'c.json', dict(images=[dict(id=i, file_name=name, **size) for i,name in names],
                                           annotations=[], categories=[dict(id=1, name='car')]))
    if kind=='list': write(tmp_path/'train.txt', f'a.jpg\n{LONG}\n') and write(tmp_path/'a.txt', '0 .5 .5 .2 .2')
    labels = read_sources(tmp_path/'train.txt' if kind=='list' else tmp_path)
    labels.leave_out_unreadable()
    assert [image['path'].name for image in labels.images]==['a.jpg']
    assert [name for _,name in labels.report.dropped_images[Fault.FILE_MISSING]]==[LONG]


@pytest.mark.parametrize('text', ['train: {}', 'path: {}', 'train: [{}, images]'])
def test_long_texts_in_the_yaml_file_are_no_folders(text, tmp_path):
    draw_images(tmp_path/'images')
    for name in SIZES: write(tmp_path/'labels'/f'{Path(name).stem}.txt', '0 .5 .5 .1 .1')
    write(tmp_path/'data.yaml', f'names: [car]\n{text.format(LONG)}\n')
    assert len(read_sources(tmp_path).annotations)==3


def test_a_long_word_in_a_class_map_is_no_file():
    assert parse_class_map([f'{LONG}=car'])=={LONG: 'car'}
    with pytest.raises(SourceError, match='neither a map such as van=car nor a file'): parse_class_map([LONG])


@pytest.mark.parametrize('place', ['labels', '.', '..'])
@pytest.mark.parametrize('start', ['names: [x]\n', '{names: [x], ', 'names:\n- x\n'])
def test_a_large_yaml_file_of_another_program_is_passed_over(place, start, tmp_path):
    folder = tmp_path/'a'
    draw_images(folder/'images')
    for name in SIZES: write(folder/'labels'/f'{Path(name).stem}.txt', '0 .5 .5 .1 .1')
    path = write(folder/place/'other.yaml', start + '# padding\n'*110_000)
    write(folder/'labels'/'classes.txt', 'car')
    assert read_sources(folder/'labels', folder/'images').all_names()==['car']
    with pytest.raises(UnsuitableFile, match='other.yaml: 1,1.* bytes, at most 1,048,576 are read'): find_source(path)
