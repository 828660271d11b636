"Drawn images agree with their annotations, and the same seed gives the same files."
import hashlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from effdet_nb.data.coco import load_coco
from effdet_nb.detector.boxes import iou
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


def test_object_sizes_suit_a_small_detector():
    boxes = np.concatenate([make_toy_image(i).boxes for i in range(100)])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(-1)
    assert sides.min() >= 16 and sides.max() <= 72 and 30 < sides.mean() < 55


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_decode_to_the_mask(h, w, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=h*w, max_size=h*w))).reshape(h, w)
    rle = coco_mask.frPyObjects(dict(counts=mask_to_rle(mask), size=[h, w]), h, w)
    assert np.array_equal(coco_mask.decode(rle), mask)


def file_digests(folder):
    "Relative path -> SHA-256 of each file below a folder."
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    one, two, three = (file_digests(make_toy_dataset(tmp_path/name, 6, 5, seed=seed))
                       for name, seed in (('a', 7), ('b', 7), ('c', 8)))
    assert one == two and len(one) == 13
    assert one['train/000001.jpg'] != three['train/000001.jpg']
    assert one['train/000001.jpg'] != one['val/000001.jpg']


@pytest.mark.parametrize('size', [(128, 128), (96, 160)])
def test_the_dataset_has_every_edge_case_and_is_valid_coco(tmp_path, size):
    folder = make_toy_dataset(tmp_path, 7, 5, image_hw=size)
    for split, count in (('train', 7), ('val', 5)):
        coco = load_coco(folder/f'{split}.json')
        assert len(coco.images) == count and [c['name'] for c in coco.categories] == list(SHAPE_NAMES)
        annotations = list(chain(*coco.annotations.values()))
        assert sum(a['iscrowd'] for a in annotations) == 1
        assert sum(not o for o in coco.annotations.values()) == 1
        assert sum(a['bbox'][0] + a['bbox'][2] > size[1] for a in annotations) == 1
        assert {i['file_name'][-3:] for i in coco.images} == {'jpg', 'png'}
        for info in coco.images:
            with Image.open(folder/split/info['file_name']) as image:
                assert image.size == (info['width'], info['height'])


def test_masks_decode_to_their_area(tmp_path):
    coco = load_coco(make_toy_dataset(tmp_path, 8, 4)/'train.json')
    for a in chain(*coco.annotations.values()):
        rle = coco_mask.frPyObjects(a['segmentation'], 128, 128)
        area = coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle)
        assert abs(int(area) - a['area']) <= max(20, .08*a['area'])


def test_edge_cases_can_be_left_out(tmp_path):
    coco = load_coco(make_toy_dataset(tmp_path, 6, 4, edge_cases=False)/'train.json')
    assert all(coco.annotations.values())
    assert not any(a['iscrowd'] for a in chain(*coco.annotations.values()))


def test_a_crowd_is_large_and_has_few_other_shapes():
    sample, mask = make_crowd_image(3)
    assert mask.shape == (128, 128) and mask.sum() > 400 and 1 <= len(sample.boxes) <= 2


def test_seeds_are_flat_as_numpy_2_5_demands(tmp_path, monkeypatch):
    default_rng = np.random.default_rng

    def flat_rng(seed):
        assert np.ndim(seed)<2 and all(np.ndim(part)==0 for part in np.atleast_1d(np.asarray(seed, object)))
        return default_rng(seed)

    monkeypatch.setattr(np.random, 'default_rng', flat_rng)
    for seed in (0, 7): make_toy_dataset(tmp_path/str(seed), 12, 6, (128, 128), seed=seed, edge_cases=True)
