"Tiles: they cover every image, and each object that is not larger than the overlap is found once."
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from onnx_toy import toy_onnx_model
from PIL import Image

from effdet_nb.app.infer import infer, predict_tiled_files
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.boxes import area, iou
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.images import letterbox
from effdet_nb.detector.nms import NmsOptions, nms
from effdet_nb.detector.tiles import (
    MAX_OVERLAP, MIN_TILE, Tiling, covered_share, detect_tiled, drop_fragments, is_cut, merge_tiles, neighbours,
    parse_tile_size, tile_starts, warn_of_small_tiles)
from effdet_nb.export.runtimes import OnnxDetector


class SquareDetector:
    "Finds up to 255 grey squares, each of its own brightness, that have at least 6 pixels in its input."
    image_hw, pad_rgb, meta = (64, 64), (0, 0, 0), {}
    classes = ClassTable.from_categories([dict(id=1, name='square')])

    def __init__(self, per_class=True): self.nms_options, self.batches = NmsOptions(per_class=per_class), []

    def __call__(self, images):
        self.batches.append(len(images))
        return [self.find(image[..., 0]) for image in images]

    def find(self, image):
        boxes = []
        for brightness in np.unique(image[image>0]):
            rows, columns = np.nonzero(image==brightness)
            is_square = len(rows)==(np.ptp(rows)+1)*(np.ptp(columns)+1)          # blends of two colours are not
            if is_square and min(np.ptp(rows), np.ptp(columns))>=5:
                boxes.append((rows.min(), columns.min(), rows.max()+1, columns.max()+1))
        return Detections(boxes, np.full(len(boxes), .9), np.zeros(len(boxes)))


def scene_of(hw, boxes):
    image = np.zeros((*hw, 3), np.uint8)
    for i, (y1, x1, y2, x2) in enumerate(boxes): image[y1:y2, x1:x2] = 60+15*i
    return image


@given(st.integers(1, 900), st.integers(MIN_TILE, 400), st.floats(0, MAX_OVERLAP))
def test_tiles_cover_a_side_with_the_requested_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0]==0 and starts==sorted(set(starts))
    if length<=tile: return
    assert starts[-1]+tile==length
    step = max(1, int(tile*(1-overlap)))
    assert max(np.diff(starts))<=step
    assert len(starts)==-(-(length-tile)//step)+1                               # no tile more than needed


@settings(max_examples=60)
@given(st.integers(64, 300), st.integers(64, 300), st.integers(0, 2**32-1))
def test_every_object_that_fits_into_the_overlap_is_found_once_where_it_is(height, width, seed):
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(8):
        side = rng.integers(8, 16)                                              # the overlap is 16 pixels
        y, x = rng.integers(0, height-side+1), rng.integers(0, width-side+1)
        box = (y, x, y+side, x+side)
        if not any(y<b[2]+2 and x<b[3]+2 and b[0]<box[2]+2 and b[1]<box[3]+2 for b in boxes): boxes.append(box)
    found = detect_tiled(SquareDetector(), scene_of((height, width), boxes), Tiling((64, 64), .25, whole_image=False))
    assert sorted(map(tuple, found.boxes.astype(int).tolist()))==sorted(map(tuple, np.array(boxes).tolist()))


@pytest.mark.parametrize('hw', [(64, 64), (40, 64), (64, 3), (1, 1), (50, 50)])
def test_an_image_that_fits_into_a_tile_is_detected_as_without_tiles(hw):
    box = (0, 0, min(hw), min(hw))
    detector, image = SquareDetector(), scene_of(hw, [box])
    pixels, scale = letterbox(image, (64, 64), (0, 0, 0))
    plain = detector([pixels])[0]
    tiled = detect_tiled(detector, image, Tiling((64, 64)))
    assert np.allclose(tiled.boxes, plain.boxes/scale) and len(tiled)==len(plain)
    assert detector.batches==[1, 1]                                             # the image itself is not added again


def test_a_large_object_needs_the_whole_image_and_small_ones_need_tiles():
    boxes = [(10, 10, 20, 20), (62, 62, 72, 72), (100, 40, 216, 240)]
    image = scene_of((256, 256), boxes)
    plain = SquareDetector()([letterbox(image, (64, 64), (0, 0, 0))[0]])[0].scaled(4)
    assert (iou(boxes, plain.boxes)>.5).any(1).tolist()==[False, False, True]
    found = detect_tiled(SquareDetector(), image, Tiling((64, 64), .25))
    assert (iou(boxes, found.boxes)>.8).sum(1).tolist()==[1, 1, 1] and len(found)==3
    in_tiles = detect_tiled(SquareDetector(), image, Tiling((64, 64), .25, whole_image=False))
    assert (iou(boxes, in_tiles.boxes)>.8).sum(1).tolist()==[1, 1, 0]


@pytest.mark.parametrize('batch_size,expected', [(1, [1]*5), (3, [3, 2]), (100, [5])])
def test_tiles_go_through_the_network_in_batches(batch_size, expected):
    detector = SquareDetector()
    detect_tiled(detector, scene_of((100, 100), []), Tiling((64, 64)), batch_size)
    assert detector.batches==expected


def test_classes_compete_only_if_the_detector_lets_them():
    tiles, parts = [(0, 0, 64, 64), (0, 32, 64, 96)], []
    for label in (0, 1): parts.append(Detections([[10, 40, 20, 50]], [.9-.1*label], [label]))
    assert len(merge_tiles(parts, tiles, (64, 96), NmsOptions(per_class=True)))==2
    assert merge_tiles(parts, tiles, (64, 96), NmsOptions(per_class=False)).classes.tolist()==[0]
    nothing = [Detections([], [], []), Detections([], [], [])]
    assert len(merge_tiles(nothing, tiles, (64, 96)))==0


def test_fragments_that_cover_each_other_leave_one():
    boxes = [[0, 0, 20, 40], [0, 0, 20, 40], [0, 0, 20, 39]]
    same = Detections(boxes, [.9, .9, .9], [0, 0, 0])
    assert drop_fragments(same, np.ones(3, bool)).boxes.tolist()==[boxes[0]]
    assert len(drop_fragments(same, np.zeros(3, bool)))==3                      # whole boxes are left to NMS


def test_a_box_near_an_inner_border_is_cut_on_every_side():
    tile, hw = (100, 100, 200, 200), (300, 300)
    cut = [[101, 150, 120, 160], [150, 101, 160, 120], [150, 150, 199, 160], [150, 150, 160, 199]]
    assert is_cut(cut, tile, hw).all() and not is_cut([[150, 150, 160, 160]], tile, hw).any()
    assert is_cut(np.zeros((0, 4)), tile, hw).shape==(0,)


def test_threads_and_batches_find_the_same():
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3)).astype(np.uint8)
    data = toy_onnx_model(spread=2.).SerializeToString()
    single, batched = OnnxDetector(data, threads=1), OnnxDetector(data)
    assert single.is_parallel and not batched.is_parallel
    a, b = (detect_tiled(d, image, Tiling((128, 128)), score_threshold=.3) for d in (single, batched))
    assert len(a)>0 and np.allclose(a.boxes, b.boxes, atol=1e-3) and np.allclose(a.scores, b.scores, atol=1e-5)


@pytest.mark.parametrize('text,expected', [('640', (640, 640)), (' 480 , 640 ', (480, 640)), ('640X480', (480, 640))])
def test_sizes_of_tiles_are_written_as_in_a_spec(text, expected): assert parse_tile_size(text)==expected


@pytest.mark.parametrize('text', ['', '-640', '640,', '640.5', '6 40', 'big', '640x480x3', '٣٢٠x'])
def test_other_texts_are_no_sizes(text):
    with pytest.raises(ValueError, match='is not a size'): parse_tile_size(text)


@pytest.mark.parametrize('arguments,message', [
    (((31, 640),), 'at least 32'), (((640, 640), -.1), 'from 0 to 0.9'), (((640, 640), 1.), 'from 0 to 0.9'),
    (((640, 640), float('nan')), 'from 0 to 0.9')])
def test_impossible_tilings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message): Tiling(*arguments)


def test_inference_writes_the_boxes_of_tiles_in_pixels_of_the_file(tmp_path):
    boxes = [(10, 10, 20, 20), (60, 60, 70, 70)]
    (tmp_path/'in').mkdir()
    Image.fromarray(scene_of((200, 150), boxes)).save(tmp_path/'in'/'large.png')
    Image.fromarray(scene_of((64, 64), boxes[:1])).save(tmp_path/'in'/'small.png')
    (tmp_path/'in'/'broken.png').write_text('no image')
    run = dict(results_dir=tmp_path/'out', tiling=Tiling((64, 64), .25))
    summary = infer(SquareDetector(), tmp_path/'in', **run)
    assert summary.counts==dict(images=2, boxes=3, unreadable=1)
    found = json.loads((tmp_path/'out'/'detections.json').read_text())
    large = [a['bbox'] for a in found['annotations'] if a['image_id']==1]
    assert sorted(large)==[[10, 10, 10, 10], [60, 60, 10, 10]]
    with Image.open(tmp_path/'out'/'images_annotated'/'large.png') as image: assert image.size==(150, 200)


def test_the_limit_of_a_user_is_one_of_the_image(tmp_path):
    boxes = [(y, x, y+10, x+10) for y in (10, 60, 110) for x in (10, 60, 110)]
    path = tmp_path/'nine.png'
    Image.fromarray(scene_of((128, 128), boxes)).save(path)
    tiling, counts = Tiling((64, 64), .25), []
    for limit in (None, 4):
        prediction, = predict_tiled_files(SquareDetector(), [path], tiling, max_detections=limit)
        counts.append(len(prediction.detections))
    assert counts==[9, 4]


def merge_every_pair(parts, tiles, image_hw, options):
    "Merges by comparing each box with all others."
    names = 'boxes', 'scores', 'classes'
    boxes, scores, classes = (np.concatenate([getattr(d, name) for d in parts]) for name in names)
    together = replace(parts[0], boxes=boxes, scores=scores, classes=classes)
    kept = ~(cut := np.concatenate([is_cut(d.boxes, tile, image_hw) for d, tile in zip(parts, tiles)]))
    fragments = np.flatnonzero(cut)
    for i in fragments[np.argsort(-area(boxes[fragments]), kind='stable')]:
        rivals = kept & (scores>=.5*scores[i])
        if options.per_class: rivals &= classes==classes[i]
        kept[i] = not (covered_share(boxes[i], boxes[rivals])>=.5).any()
    together = together[kept]
    groups = together.classes if options.per_class else None
    return together[nms(together.boxes, together.scores, groups, options.iou_threshold, max_detections=len(together))]


def random_parts(rng, tiles, most):
    "Boxes inside each tile, many of them at its borders; scores repeat."
    parts = []
    for y1, x1, y2, x2 in tiles:
        n = rng.integers(0, most)
        corners = np.sort(rng.uniform(-.1, 1.1, (n, 2, 2)).clip(0, 1), 1)*(y2-y1, x2-x1)+(y1, x1)
        parts.append(Detections(corners.reshape(-1, 4), rng.integers(0, 20, n)/20, rng.integers(0, 2, n)))
    return parts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32-1), st.booleans(), st.booleans(), st.sampled_from([.3, .5, .8]),
       st.sampled_from([1, 4, 30]))
def test_merging_neighbours_gives_the_same_boxes_as_comparing_all(seed, per_class, whole_image, threshold, most):
    rng, image_hw = np.random.default_rng(seed), (300, 420)
    tiles = Tiling((96, 96), rng.choice([0, .2, .6])).boxes(image_hw)
    if whole_image: tiles = np.concatenate([tiles, [(0, 0, *image_hw)]])
    parts, options = random_parts(rng, tiles, most), NmsOptions(per_class=per_class, iou_threshold=threshold)
    merged, expected = (f(parts, tiles, image_hw, options) for f in (merge_tiles, merge_every_pair))
    for name in ('boxes', 'scores', 'classes'):
        np.testing.assert_array_equal(getattr(merged, name), getattr(expected, name))


def test_the_time_of_merging_grows_with_the_number_of_tiles():
    "Compares numbers of pairs, which do not depend on the machine."
    def num_pairs(side):
        tiles = Tiling((64, 64)).boxes((side, side))
        parts = random_parts(np.random.default_rng(0), tiles, 6)
        owners = np.repeat(np.arange(len(parts)), [len(d) for d in parts])
        boxes = np.concatenate([d.boxes for d in parts])
        return sum(len(own)*len(near) for own, near in neighbours(boxes, owners))/len(tiles)
    assert num_pairs(1600)<1.5*num_pairs(800)


def test_a_tile_smaller_than_the_input_is_a_warning(capsys):
    for tile_hw, is_small in (((32, 32), True), ((64, 64), False), ((48, 200), False), ((40, 60), True)):
        warn_of_small_tiles(Tiling(tile_hw), SquareDetector())
        assert ('are enlarged to the network input, 64 x 64' in capsys.readouterr().err)==is_small
