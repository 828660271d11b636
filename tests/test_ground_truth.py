"Samples: paths, bytes, arrays, records and files agree, and channels without a category are known."
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from effdet_nb.data.classes import ClassTable
from effdet_nb.evaluate.ground_truth import samples_from_coco, samples_from_records
from effdet_nb.evaluate.predict import channels_to_category_ids, predict_samples
from effdet_nb.train.experiment import eval_dataset_from_spec
from effdet_nb.detector.detections import Detections


class FullImageDetector:
    "Finds one object as large as its input, and records the sizes of its batches."
    def __init__(self, image_hw=(64, 64)):
        self.image_hw, self.classes, self.batch_sizes = image_hw, ClassTable((1,), ('a',), 2), []

    def forward(self, images):
        assert images.dtype==np.uint8 and images.shape[1:]==(*self.image_hw, 3)
        self.batch_sizes.append(len(images))
        return images

    def decode(self, images): return [Detections([[0, 0, *self.image_hw]], [.5], [0]) for _ in images]


@pytest.fixture
def image_folder(tmp_path):
    "Seven images of two shapes, as files, with one object that fills each."
    images, annotations = [], []
    for i in range(7):
        h, w = (40, 80) if i%2 else (80, 40)
        Image.new('RGB', (w, h), (i*30, 90, 60)).save(tmp_path/f'{i}.png')
        images.append(dict(id=1000+i, file_name=f'{i}.png', height=h, width=w))
        annotations.append(dict(id=i, image_id=1000+i, category_id=1, bbox=[0, 0, w, h]))
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])
    (tmp_path/'a.json').write_text(json.dumps(coco))
    return tmp_path


def test_paths_bytes_and_arrays_give_the_same(image_folder):
    pairs = list(samples_from_coco(image_folder/'a.json', image_folder))
    as_bytes = [(path.read_bytes(), truth) for path, truth in pairs]
    as_arrays = [(np.asarray(Image.open(path)), truth) for path, truth in pairs]

    def boxes(samples): return [d.boxes.tolist() for _, d in predict_samples(FullImageDetector((64, 96)), samples, 2)]
    assert boxes(pairs) == boxes(as_bytes) == boxes(as_arrays)


@pytest.mark.parametrize('change', [str.upper, lambda name: '/data/'+name, lambda name: 'images\\'+name])
def test_files_under_other_names_are_found(image_folder, change):
    data = json.loads((image_folder/'a.json').read_text())
    for image in data['images']: image['file_name'] = change(image['file_name'])
    (image_folder/'b.json').write_text(json.dumps(data))
    paths = [path for path, _ in samples_from_coco(image_folder/'b.json', image_folder)]
    assert paths==[path for path, _ in samples_from_coco(image_folder/'a.json', image_folder)]


@pytest.mark.parametrize('source_id', [lambda i: str(i['id']), lambda i: i['file_name'],
                                       lambda i: i['file_name'].rpartition('/')[2]])
def test_images_of_records_are_found_by_id_and_by_file_name(image_folder, source_id):
    data = json.loads((image_folder/'a.json').read_text())
    for image in data['images']: image['file_name'] = 'deep/er/'+image['file_name']
    (image_folder/'b.json').write_text(json.dumps(data))
    records = [dict(image=b'', source_id=source_id(image)) for image in data['images']]
    truths = [truth for _, truth in samples_from_records(records, image_folder/'b.json')]
    assert [truth.image_id for truth in truths]==[image['id'] for image in data['images']]
    assert all(len(truth)==1 for truth in truths)


def test_an_ambiguous_file_name_is_not_used(image_folder):
    data = json.loads((image_folder/'a.json').read_text())
    for folder, image in zip('abcdefg', data['images']): image['file_name'] = f'{folder}/same.png'
    (image_folder/'b.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match='image same.png of the records is not among the 7 images'):
        list(samples_from_records([dict(image=b'', source_id='same.png')], image_folder/'b.json'))


def test_channels_beyond_the_table_have_no_category():
    assert channels_to_category_ids(np.array([0, 1, 7]), ClassTable((4,), ('a',), 2)).tolist() == [4, -1, -1]


def test_images_of_a_spec_come_in_the_order_of_the_file_and_repeatedly(image_folder):
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.train.spec import Spec
    for shards in (1, 3):
        dataset_convert(image_folder, image_folder/'a.json', image_folder/f'in{shards}', 'val', num_shards=shards)
        config = dict(validation_file_pattern=str(image_folder/f'in{shards}/val*'))
        samples = eval_dataset_from_spec(Spec().replace(dataset_config=config))
        for _ in range(2): assert [t.image_id for _, t in samples] == list(range(1000, 1007))
        assert len(samples) == 7


def test_importing_is_light():
    heavy = ('tensorflow', 'keras', 'matplotlib', 'pycocotools')
    code = f"import sys, effdet_nb.evaluate.ground_truth; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '[]'
