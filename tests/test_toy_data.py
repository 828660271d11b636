"Guards for effdet_nb.detector.toy_data: drawn pictures tell the truth about themselves, and files repeat."
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from effdet_nb.detector.boxes import iou
from effdet_nb.data.coco import load_coco
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_crowd_image, make_toy_dataset, make_toy_image, mask_to_rle


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(128, 128), (96, 160), (200, 130), (48, 48)]))
def test_boxes_are_the_extents_of_their_masks(seed, size):
    s = make_toy_image(seed, size)
    assert s.image.shape == (*size, 3) and s.image.dtype == np.uint8
    assert len(s.boxes) == len(s.labels) == len(s.masks) == len(s.polygons) >= 1
    assert s.boxes.dtype == np.float32 and set(s.labels.tolist()) <= {0, 1, 2}
    assert (s.boxes[:, :2] >= 0).all() and (s.boxes[:, 2:] <= size).all()
    for box, mask in zip(s.boxes, s.masks):
        y, x = np.nonzero(mask)
        extent = np.array([y.min(), x.min(), y.max() + 1, x.max() + 1])
        assert abs(extent - box).max() <= 2.5  # the tip of a thin triangle covers no pixel by half
        assert iou(extent, box)[0, 0] > .6


def test_sizes_suit_a_small_detector():
    boxes = np.concatenate([make_toy_image(i).boxes for i in range(100)])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(-1)
    assert sides.min() >= 16 and sides.max() <= 72 and 30 < sides.mean() < 55


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_decode_to_the_mask(h, w, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=h*w, max_size=h*w))).reshape(h, w)
    rle = coco_mask.frPyObjects(dict(counts=mask_to_rle(mask), size=[h, w]), h, w)
    assert np.array_equal(coco_mask.decode(rle), mask)


def _digest(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    one, two, three = (_digest(make_toy_dataset(tmp_path/n, 6, 5, seed=s)) for n, s in zip('abc', (7, 7, 8)))
    assert one == two and len(one) == 13
    assert one['train/000001.jpg'] != three['train/000001.jpg']
    assert one['train/000001.jpg'] != one['val/000001.jpg']


@pytest.mark.parametrize('size', [(128, 128), (96, 160)])
def test_dataset_has_every_promised_flaw_and_is_valid_coco(tmp_path, size):
    folder = make_toy_dataset(tmp_path, 7, 5, image_hw=size)
    for split, count in (('train', 7), ('val', 5)):
        coco = load_coco(folder/f'{split}.json')
        assert len(coco.images) == count and [c['name'] for c in coco.categories] == list(SHAPE_NAMES)
        anns = [a for o in coco.annotations.values() for a in o]
        assert sum(a['iscrowd'] for a in anns) == 1
        assert sum(not o for o in coco.annotations.values()) == 1
        assert sum(a['bbox'][0] + a['bbox'][2] > size[1] for a in anns) == 1
        assert {i['file_name'][-3:] for i in coco.images} == {'jpg', 'png'}
        for info in coco.images:
            with Image.open(folder/split/info['file_name']) as im: assert im.size == (info['width'], info['height'])


def test_masks_decode_to_their_area(tmp_path):
    coco = load_coco(make_toy_dataset(tmp_path, 8, 4)/'train.json')
    for a in (a for o in coco.annotations.values() for a in o):
        rle = coco_mask.frPyObjects(a['segmentation'], 128, 128)
        area = coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle)
        assert abs(int(area) - a['area']) <= max(20, .08*a['area'])


def test_without_oddities_everything_is_plain(tmp_path):
    coco = load_coco(make_toy_dataset(tmp_path, 6, 4, edge_cases=False)/'train.json')
    assert all(coco.annotations.values()) and not any(a['iscrowd'] for o in coco.annotations.values() for a in o)


def test_the_crowd_is_a_crowd():
    sample, heap = make_crowd_image(3)
    assert heap.shape == (128, 128) and heap.sum() > 400 and 1 <= len(sample.boxes) <= 2
