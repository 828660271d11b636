"Pointers of Git LFS, pipes and devices in place of files: each is named for what it is, and nothing waits for them."

import json, os

import pytest
from PIL import Image

from effdet_nb.app.inference_files import read_label_map
from effdet_nb.app.video import open_video
from effdet_nb.core.files import LfsPointer, read_file
from effdet_nb.data.faults import Fault
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.yolo_yaml import MAX_YAML_SIZE, read_yaml
from effdet_nb.data.record_index import index_tfrecord
from effdet_nb.data.sources import convert_sources, read_sources
from effdet_nb.data.split import split_dataset
from effdet_nb.data.tile_dataset import tile_dataset
from effdet_nb.detector.images import read_image
from effdet_nb.detector.tiles import Tiling
from effdet_nb.evaluate.predict import load_coco_results
from effdet_nb.data.classes import ClassTable
from effdet_nb.export.browser import read_ort_web, write_browser_page
from effdet_nb.export.runtimes import load_detector
from effdet_nb.train.spec import Spec
from effdet_nb.weights.import_weights import import_weights
from effdet_nb.weights.model_file import load_model_file

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n'
needs_pipes = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no named pipes')
CLASSES = ClassTable((1,), ('a',), 2)
LABELS = {
    '.txt': '0 0.5 0.5 0.4 0.4\n',
    '.xml': '<annotation><filename>{}.png</filename><object><name>a</name><bndbox><xmin>5</xmin><ymin>5</ymin>'
            '<xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>',
    '.json': '{"version": "5", "shapes": [{"label": "a", "points": [[5, 5], [20, 20]], "shape_type": "rectangle"}]}',
}


def dataset(folder, ending, count=4):
    "Images with labels of a format beside them."
    for i in range(count):
        Image.effect_noise((40, 30), 60+i).convert('RGB').save(folder/f'i{i}.png')
        (folder/f'i{i}{ending}').write_text(LABELS[ending].replace('{}', f'i{i}'))
    return folder


# --- one label file or one image of a dataset

@pytest.mark.parametrize('ending', LABELS)
@pytest.mark.parametrize('what', ['labels', 'image'])
def test_a_pointer_in_a_dataset_is_reported_and_the_rest_is_used(ending, what, tmp_path):
    folder = dataset(tmp_path, ending)
    name = f'i2{ending}' if what=='labels' else 'i2.png'
    (folder/name).write_bytes(POINTER)
    labels = read_sources(folder)
    assert [name for _, name in labels.report.dropped_images[Fault.LFS_POINTER]] == [name]
    assert len(labels.images) == 3 and len(labels.annotations) == 3
    assert sum(map(len, labels.report.dropped_boxes.values())) == (what=='image')


@needs_pipes
@pytest.mark.parametrize('ending', LABELS)
@pytest.mark.parametrize('kind', ['pipe', 'device'])
def test_a_pipe_or_a_device_among_the_labels_is_reported_and_not_read(ending, kind, tmp_path):
    folder = dataset(tmp_path, ending)
    (folder/f'i2{ending}').unlink()
    if kind=='pipe': os.mkfifo(folder/f'i2{ending}')
    else: (folder/f'i2{ending}').symlink_to('/dev/zero')
    labels = read_sources(folder)
    assert [name for _, name in labels.report.dropped_images[Fault.LABELS_DAMAGED]] == [f'i2{ending}']
    assert len(labels.images) == len(labels.annotations) == 3


@pytest.mark.parametrize('ending', ['.txt', '.json'])
def test_if_all_label_files_are_pointers_the_error_says_so(ending, tmp_path):
    folder = dataset(tmp_path, ending)
    for path in folder.glob(f'*{ending}'): path.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r'i\d.*a Git LFS pointer.*git lfs pull'): read_sources(folder)


@pytest.mark.parametrize('name', ['data.yaml', 'data.yml', 'classes.txt'])
def test_class_names_that_are_pointers_do_not_become_numbers(name, tmp_path):
    folder = dataset(tmp_path, '.txt')
    (folder/name).write_bytes(POINTER)
    with pytest.raises(LfsPointer, match=name): read_sources(folder)


@needs_pipes
def test_yaml_files_that_are_pipes_or_too_large_are_not_waited_for(tmp_path):
    folder = dataset(tmp_path, '.txt')
    os.mkfifo(folder/'data.yaml')
    assert read_sources(folder).class_names == ['class 0']
    (tmp_path/'large.yaml').write_text('names:\n' + '- x\n'*(MAX_YAML_SIZE//4))
    with pytest.raises(ValueError, match='large.yaml: 1,048,5.. bytes, at most 1,048,576'):
        read_yaml(tmp_path/'large.yaml')
    (tmp_path/'many.yaml').write_text('names:\n' + ''.join(f'- class {i}\n' for i in range(9000)))
    assert len(read_yaml(tmp_path/'many.yaml')['names']) == 9000


# --- a single file

def openers(path):
    "What opens a file that a user named, by kind of file."
    truth = []
    return {
        'image': lambda: read_image(path), 'image in memory': lambda: read_image(path.read_bytes(), 'upload'),
        'annotations': lambda: read_sources(path), 'detections': lambda: load_coco_results(path, truth, CLASSES),
        'spec': lambda: Spec.load(path), 'model': lambda: load_model_file(path),
        'detector': lambda: load_detector(path),
        'weights': lambda: import_weights(path, path.parent/'out.tlt'), 'records': lambda: index_tfrecord(path),
        'label map': lambda: read_label_map(path), 'video': lambda: open_video(path),
        'tiles': lambda: tile_dataset(path.parent, path, path.parent/'tiles', Tiling((64, 64))),
        'web page': lambda: write_browser_page([path], path.parent/'page'), 'runtime': lambda: read_ort_web(path),
        'any': lambda: read_file(path)}


ENDINGS = {'image': ['.jpg'], 'annotations': ['.json', '.txt', '.xml', '.yaml'], 'tiles': ['.json'],
           'detector': ['.onnx', '.tlt', '.tflite', '.etlt', '.pb'], 'web page': ['.tlt', '.onnx'],
           'weights': ['.pth', '.h5', '.safetensors', '.tar.gz', '.npz'], 'video': ['.mp4']}


@pytest.mark.parametrize('kind', openers(None))
def test_a_pointer_is_named_with_the_remedy(kind, tmp_path):
    if kind=='video': pytest.importorskip('av')
    for ending in ENDINGS.get(kind, ['.bin']):
        path = tmp_path/f'file{ending}'
        path.write_bytes(POINTER)
        with pytest.raises(ValueError, match='a Git LFS pointer, not the file itself. Run "git lfs pull"') as error:
            openers(path)[kind]()
        assert str(error.value).partition(': ')[0].endswith('upload' if kind=='image in memory' else path.name)
        assert sorted(tmp_path.iterdir()) == [path]
        path.unlink()


@needs_pipes
@pytest.mark.parametrize('kind', [kind for kind in openers(None) if kind not in ('records', 'image in memory')])
def test_a_pipe_is_refused_at_once(kind, tmp_path):
    if kind=='video': pytest.importorskip('av')
    for ending in ENDINGS.get(kind, ['.bin']):
        path = tmp_path/f'file{ending}'
        os.mkfifo(path)
        with pytest.raises((ValueError, OSError), match='pipe'): openers(path)[kind]()
        path.unlink()


# --- images that a COCO file lists and that are not there

def coco(folder, names):
    "A COCO file whose images have sizes and one box each."
    images = [dict(id=i, file_name=name, height=30, width=40) for i, name in enumerate(names, 1)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[5, 5, 10, 10], area=100, iscrowd=0)
             for i in range(1, len(names)+1)]
    path = folder/'labels.json'
    path.write_text(json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=1, name='a')])))
    return path


def test_a_split_leaves_out_images_that_are_missing_or_no_images(tmp_path):
    dataset(tmp_path, '.txt', 5)
    (tmp_path/'text.jpg').write_text('no image')
    (tmp_path/'lfs.jpg').write_bytes(POINTER)
    names = [*(f'i{i}.png' for i in range(5)), 'gone.jpg', 'text.jpg', 'lfs.jpg']
    for near in ('together', 'skip'):
        result = split_dataset(coco(tmp_path, names), tmp_path, tmp_path/near, near=near)
        left_out = {fault: [name for _, name in items] for fault, items in result.report.dropped_images.items()}
        assert left_out == {Fault.FILE_MISSING: ['gone.jpg'], Fault.NOT_AN_IMAGE: ['text.jpg'],
                            Fault.LFS_POINTER: ['lfs.jpg']}
        assert sum(result.num_images.values()) == sum(result.boxes['a']) == 5
        assert len(result.report.dropped_boxes[Fault.IMAGE_LEFT_OUT]) == 3
    with pytest.raises(SourceError, match='no image can be used'):
        split_dataset(coco(tmp_path, ['x.jpg', 'y.jpg']), tmp_path, tmp_path/'none')


@pytest.mark.parametrize('url', ['https://host/a/{}?token=1', 's3://bucket/{}', 'http://host/x/{}#part?x'])
def test_images_behind_urls_are_found_by_their_names(url, tmp_path):
    dataset(tmp_path, '.txt')
    path = coco(tmp_path, [url.format(f'i{i}.png') for i in range(4)])
    assert convert_sources(path, tmp_path, tmp_path/'records', num_shards=1, workers=1).num_images == 4


@pytest.mark.parametrize('convert', [
    lambda path, out: convert_sources(path, None, out, 't', num_shards=1, workers=1),
    lambda path, out: split_dataset(path, None, out)], ids=['convert', 'split'])
@pytest.mark.parametrize('ending', ['.xml', '.json'])
def test_labels_without_any_class_are_refused_before_the_work(convert, ending, tmp_path):
    dataset(tmp_path, ending)
    empty = '<annotation></annotation>' if ending=='.xml' else '{"shapes": [], "imagePath": "x.png"}'
    for path in tmp_path.glob(f'*{ending}'): path.write_text(empty)
    with pytest.raises(SourceError, match='name no class.*--label_map'): convert(tmp_path, tmp_path/'out')
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('categories', [[], [dict(id=-1, name='a')], [dict(id=2**70, name='a')]])
def test_a_coco_file_without_a_usable_category_is_refused_before_the_work(categories, tmp_path):
    dataset(tmp_path, '.txt')
    path = coco(tmp_path, ['i0.png'])
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(categories=categories, annotations=[])))
    with pytest.raises(ValueError, match='categor'): convert_sources(path, tmp_path, tmp_path/'out', num_shards=1)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('text, found', [('null', 'null'), ('[1]', 'a list'), ('"x"', 'text'), ('1.5', 'a number'),
                                         ('true', 'true or false')])
def test_another_value_at_the_top_of_a_json_file_is_named_in_words(text, found, tmp_path):
    (tmp_path/'labels.json').write_text(text)
    with pytest.raises(ValueError, match=f'the top level is {found}; need an object'):
        tile_dataset(tmp_path, tmp_path/'labels.json', tmp_path/'tiles', Tiling((64, 64)))
