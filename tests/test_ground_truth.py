"Guards for samples: every way of giving pictures, records and files agree, channels without a category."
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from effdet_nb.data.classes import ClassTable
from effdet_nb.evaluate.ground_truth import channels_to_category_ids, predict_samples, samples_from_coco
from effdet_nb.train.experiment import eval_dataset_from_spec
from effdet_nb.detector.detections import Detections


class Fixed:
    "A detector that answers with the whole canvas and remembers what it was shown."
    def __init__(self, image_hw=(64, 64)):
        self.image_hw, self.classes, self.meta, self.seen = image_hw, ClassTable((1,), ('a',), 2), {}, []

    def __call__(self, images):
        assert images.dtype==np.uint8 and images.shape[1:]==(*self.image_hw, 3)
        self.seen.append(len(images))
        return [Detections([[0, 0, *self.image_hw]], [.5], [0]) for _ in images]


@pytest.fixture
def pictures(tmp_path):
    "Seven pictures of two shapes, as files, with one object that fills each."
    images, annotations = [], []
    for i in range(7):
        h, w = (40, 80) if i%2 else (80, 40)
        Image.new('RGB', (w, h), (i*30, 90, 60)).save(tmp_path/f'{i}.png')
        images.append(dict(id=1000+i, file_name=f'{i}.png', height=h, width=w))
        annotations.append(dict(id=i, image_id=1000+i, category_id=1, bbox=[0, 0, w, h]))
    (tmp_path/'a.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])))
    return tmp_path


def test_paths_bytes_and_arrays_give_the_same(pictures):
    pairs = list(samples_from_coco(pictures/'a.json', pictures))
    ways = [pairs, [(p.read_bytes(), t) for p, t in pairs], [(np.asarray(Image.open(p)), t) for p, t in pairs]]
    found = [[d.boxes.tolist() for _, d in predict_samples(Fixed((64, 96)), w, batch_size=2)] for w in ways]
    assert found[0] == found[1] == found[2]


def test_channels_beyond_the_table_have_no_category():
    assert channels_to_category_ids(np.array([0, 1, 7]), ClassTable((4,), ('a',), 2)).tolist() == [4, -1, -1]


def test_pictures_of_a_spec_come_in_the_order_of_the_file_and_twice(pictures):
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.train.spec import Spec
    for shards in (1, 3):
        dataset_convert(pictures, pictures/'a.json', pictures/f'in{shards}', 'val', num_shards=shards)
        samples = eval_dataset_from_spec(Spec().replace(dataset_config=dict(validation_file_pattern=str(pictures/f'in{shards}/val*'))))
        for _ in range(2): assert [t.image_id for _, t in samples] == list(range(1000, 1007))
        assert len(samples) == 7


def test_importing_is_light():
    code = "import sys, effdet_nb.evaluate.ground_truth; print([m for m in ('tensorflow', 'keras', 'matplotlib', 'pycocotools') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
