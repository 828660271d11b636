"Data sets cut into tiles: no object is lost silently, and every box is where its object is."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from effdet_nb.app.tile_command import effdet_tile
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.faults import Fault
from effdet_nb.data.shards import output_lock
from effdet_nb.data.tile_dataset import ImageCutter, boxes_in_tile, choose_tiles, tile_dataset
from effdet_nb.detector.images import EXIF_ORIENTATION
from effdet_nb.detector.tiles import Tiling


def write_dataset(folder, images, boxes, ending='.png', sizes=True):
    "Writes images of a size each, and boxes (image index, x, y, w, h, iscrowd) as white rectangles on black."
    (folder/'in').mkdir(parents=True)
    entries, annotations = [], []
    for i, (h, w) in enumerate(images):
        pixels = np.zeros((h, w, 3), np.uint8)
        for _, x, y, bw, bh, _ in (b for b in boxes if b[0]==i): pixels[y:y+bh, x:x+bw] = 255
        Image.fromarray(pixels).save(folder/'in'/f'{i}{ending}', quality=95)
        size = dict(height=h, width=w) if sizes else {}
        entries.append(dict(id=10+i, file_name=f'{i}{ending}', **size))
    for n, (i, x, y, w, h, crowd) in enumerate(boxes):
        annotations.append(dict(id=100+n, image_id=10+i, category_id=7, bbox=[x, y, w, h], area=w*h, iscrowd=crowd))
    contents = dict(images=entries, annotations=annotations, categories=[dict(id=7, name='car')])
    (folder/'truth.json').write_text(json.dumps(contents))
    return folder/'in', folder/'truth.json'


def read_tiles(result):
    "Yields the pixels, the boxes (x, y, w, h) and the entry of each tile."
    contents = json.loads(result.annotations_file.read_text())
    for image in contents['images']:
        pixels = np.array(Image.open(result.image_dir/image['file_name']))
        assert pixels.shape[:2]==(image['height'], image['width'])
        yield pixels, [a['bbox'] for a in contents['annotations'] if a['image_id']==image['id']], image


@pytest.mark.parametrize('ending,sizes', [('.png', True), ('.jpg', True), ('.png', False), ('.bmp', True)])
def test_every_box_of_a_tile_surrounds_its_object(tmp_path, ending, sizes):
    boxes = [(0, 10, 10, 20, 30, 0), (0, 90, 60, 20, 20, 0), (0, 150, 120, 30, 10, 0), (1, 5, 5, 40, 40, 0)]
    source = write_dataset(tmp_path, [(150, 200), (64, 64)], boxes, ending, sizes)
    result = tile_dataset(*source, tmp_path/'out', Tiling((100, 100), .3), min_visible=.9, empty_share=1)
    assert (result.num_images, result.num_objects, result.report.dropped_boxes)==(2, 4, {})
    for pixels, found, _ in read_tiles(result):
        for x, y, w, h in np.array(found).astype(int).reshape(-1, 4):
            assert pixels[y:y+h, x:x+w].min()>200
    names = {image['file_name'] for *_, image in read_tiles(result)}
    kept = '.jpg' if ending=='.jpg' else '.png'
    assert f'1{kept}' in names and f'0{kept}' in names                          # a small image, and a whole image
    assert f'0_y0_x0{kept}' in names


@settings(max_examples=40)
@given(st.integers(0, 2**32-1), st.floats(.1, 1), st.sampled_from([0, .25, .5]))
def test_objects_in_are_objects_in_tiles_and_objects_reported(seed, min_visible, overlap):
    rng = np.random.default_rng(seed)
    hw, n = rng.integers(60, 400, 2), 12
    start = rng.uniform(0, hw-12, (n, 2))
    boxes = np.concatenate([start, np.minimum(start+rng.uniform(2, 200, (n, 2)), hw)], 1).astype(np.float32)
    tiles = Tiling((64, 96), overlap).boxes(hw)
    found = [boxes_in_tile(boxes, np.zeros(n, bool), tile, min_visible) for tile in tiles]
    for tile, (kept, inside) in zip(tiles, found):
        sides = inside[:, 2:]-inside[:, :2]
        assert (sides>=1).all() and (inside>=0).all() and (inside[:, 2:]<=tile[2:]-tile[:2]).all()
        share = sides.prod(1)/(boxes[kept, 2:]-boxes[kept, :2]).prod(1)
        assert (share>=min_visible-1e-3).all()
    fits = ((boxes[:, 2:]-boxes[:, :2])<=np.array([64, 96])*overlap-1).all(1)
    assert set(np.flatnonzero(fits))<={i for kept, _ in found for i in kept.tolist()}


def test_an_object_that_no_tile_shows_is_reported(tmp_path):
    boxes = [(0, 0, 0, 190, 190, 0), (0, 10, 10, 20, 20, 0)]
    source = write_dataset(tmp_path, [(200, 200)], boxes)
    tiles_only = tile_dataset(*source, tmp_path/'a', Tiling((64, 64), whole_image=False))
    assert dict(tiles_only.report.dropped_boxes)=={'in no tile': [(10, 100)]}
    assert tiles_only.num_objects==2 and 'in no tile: 1, such as annotation 100 of 0.png' in repr(tiles_only)
    with_whole = tile_dataset(*source, tmp_path/'b', Tiling((64, 64)))
    assert not with_whole.report.dropped_boxes and with_whole.num_boxes==tiles_only.num_boxes+2


def test_a_crowd_is_kept_with_any_part(tmp_path):
    source = write_dataset(tmp_path, [(100, 200)], [(0, 0, 0, 200, 100, 1)])
    result = tile_dataset(*source, tmp_path/'out', Tiling((100, 100), 0, whole_image=False))
    contents = json.loads(result.annotations_file.read_text())
    assert [a['iscrowd'] for a in contents['annotations']]==[1, 1]
    assert all(a['bbox']==[0, 0, 100, 100] for a in contents['annotations'])


def test_images_and_boxes_that_cannot_be_used_are_reported(tmp_path):
    boxes = [(0, 10, 10, 20, 20, 0), (1, 1, 1, 5, 5, 0), (1, 2, 2, 5, 5, 0), (2, 0, 0, 9, 9, 0)]
    image_dir, truth = write_dataset(tmp_path, [(100, 100), (64, 64), (64, 64)], boxes)
    (image_dir/'1.png').write_text('not an image')
    (image_dir/'2.png').unlink()
    contents = json.loads(truth.read_text())
    contents['annotations'] += [dict(id=1, image_id=10, category_id=7, bbox=[90, 90, 50, 50], area=1, iscrowd=0),
                                dict(id=2, image_id=10, category_id=7, bbox=[5, 5, 0, 5], area=1, iscrowd=0)]
    truth.write_text(json.dumps(contents))
    result = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((64, 64), .5))
    left_out = sum(map(len, result.report.dropped_boxes.values()))
    assert result.num_objects+left_out==len(contents['annotations']) and result.num_objects==1
    assert {str(k): len(v) for k, v in result.report.dropped_images.items()}=={'not an image': 1, 'file missing': 1}


def test_the_boxes_follow_a_size_that_differs_from_the_file(tmp_path):
    image_dir, truth = write_dataset(tmp_path, [(200, 200)], [(0, 100, 20, 20, 20, 0)])
    contents = json.loads(truth.read_text())
    contents['images'][0] |= dict(height=100, width=100)
    contents['annotations'][0]['bbox'] = [50, 10, 10, 10]
    truth.write_text(json.dumps(contents))
    result = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((100, 100), .3, whole_image=False), empty_share=0)
    for pixels, found, _ in read_tiles(result):
        (x, y, w, h), = np.array(found).astype(int)
        assert (w, h)==(20, 20) and pixels[y:y+h, x:x+w].min()>200


@pytest.mark.parametrize('counts,share,expected', [([1]*20+[0]*20, .1, 22), ([0]*30, .1, 3), ([0], .1, 1),
                                                   ([0]*5, 0, 0), ([3, 0], 1, 2), ([3, 0], .1, 1)])
def test_how_many_empty_tiles_are_kept(counts, share, expected):
    chosen = choose_tiles(counts, share, seed=3)
    assert len(chosen)==expected and chosen==sorted(set(chosen))
    assert set(np.flatnonzero(counts))<=set(chosen) and chosen==choose_tiles(counts, share, seed=3)


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path):
    source = write_dataset(tmp_path, [(200, 150)]*6, [(i, 20*i, 20, 15, 15, 0) for i in range(6)])
    files = []
    for workers in (1, 5):
        result = tile_dataset(*source, tmp_path/f'out{workers}', Tiling((64, 64)), workers=workers)
        files.append({p.relative_to(tmp_path/f'out{workers}'): p.read_bytes()
                      for p in (tmp_path/f'out{workers}').rglob('*.*') if p.is_file()})
    assert files[0]==files[1] and result.num_tiles==len(files[0])-1


def test_images_of_the_same_name_stay_apart(tmp_path):
    image_dir, truth = write_dataset(tmp_path, [(64, 64)]*3, [(i, 5, 5, 9, 9, 0) for i in range(3)])
    (image_dir/'a').mkdir()
    contents, names = json.loads(truth.read_text()), ['x.png', 'x.bmp', 'a/x.png']
    for i, name in enumerate(names):
        Image.open(image_dir/f'{i}.png').save(image_dir/name)
        contents['images'][i]['file_name'] = name
    truth.write_text(json.dumps(contents))
    result = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((64, 64)))
    assert sorted(image['file_name'] for *_, image in read_tiles(result))==['a/x.png', 'x_0.png', 'x_1.png']


def test_tiles_are_converted_without_a_remark(tmp_path):
    source = write_dataset(tmp_path, [(150, 200)]*2, [(0, 10, 10, 20, 30, 0), (1, 90, 60, 20, 20, 0)])
    result = tile_dataset(*source, tmp_path/'out', Tiling((96, 96)))
    converted = dataset_convert(result.image_dir, result.annotations_file, tmp_path/'records', num_shards=1, workers=1)
    assert converted.num_boxes==result.num_boxes and not converted.dropped_boxes and not converted.notes


def test_tiles_report_what_a_conversion_reports_about_the_images(tmp_path):
    image_dir, truth = write_dataset(tmp_path, [(100, 120)]*6, [(i, 10, 10, 20, 30, 0) for i in range(6)], '.jpg')
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.open(image_dir/'0.jpg').save(image_dir/'0.jpg', exif=exif)                # annotated as it is stored
    Image.open(image_dir/'1.jpg').save(image_dir/'1.jpg', exif=exif)                # annotated upright
    Image.fromarray(np.arange(12000, dtype=np.uint16).reshape(100, 120)//4).save(image_dir/'2.jpg', 'PNG')
    Image.open(image_dir/'3.jpg').save(image_dir/'3.jpg', 'BMP')
    contents = json.loads(truth.read_text())
    contents['images'][1] |= dict(height=120, width=100)
    contents['images'][4] |= dict(height=200, width=240)
    contents['images'][5] |= dict(height=20_000, width=20_000)
    truth.write_text(json.dumps(contents))
    tiled = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((64, 64)))
    converted = dataset_convert(image_dir, truth, tmp_path/'records', num_shards=1, workers=1)
    assert dict(tiled.report.notes)==dict(converted.report.notes)
    assert {reason.fault for reason in tiled.report.notes}=={
        Fault.EXIF_ROTATED, Fault.TURNED_UPRIGHT, Fault.NOT_RGB, Fault.DARK_16_BITS, Fault.CONVERTED_TO_PNG,
        Fault.SIZE_DIFFERS, Fault.SIZE_IMPOSSIBLE}
    assert 'turned by an EXIF flag, which is ignored: 1, such as 0.jpg' in repr(tiled)


@pytest.mark.parametrize('options,message', [
    (dict(min_visible=2), 'from 0 to 1'), (dict(empty_share=-1), 'from 0 to 1'),
    (dict(output_dir='.', tag='in'), 'among'), (dict(tag='../../escaped'), 'escaped'), (dict(tag='..'), 'tag'),
    (dict(tag='a/b'), 'tag')])
def test_settings_that_cannot_be_used(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    source = write_dataset(tmp_path, [(64, 64)], [])
    with pytest.raises(ValueError, match=message):
        tile_dataset(*source, **(dict(output_dir='out', tiling=Tiling((64, 64))) | options))


def test_the_command_says_what_it_needs(tmp_path, capsys):
    source = write_dataset(tmp_path, [(64, 64)], [])
    (source[0]/'0.png').write_text('x')
    with pytest.raises(SystemExit) as e:
        effdet_tile(image_dir=str(source[0]), annotations_file=str(source[1]), output_dir=str(tmp_path/'out'))
    assert e.value.code==1
    assert 'no tile was written. images left out: not an image: 1' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()


def test_a_cutter_can_be_used_for_one_image(tmp_path):
    image_dir, truth = write_dataset(tmp_path, [(64, 128)], [(0, 5, 5, 20, 20, 0)])
    contents = json.loads(truth.read_text())
    cutter = ImageCutter(str(image_dir), tmp_path/'out', Tiling((64, 64), 0, whole_image=False), empty_share=0)
    cut = cutter((0, contents['images'][0], contents['annotations'], 'one'))
    assert [name for name, *_ in cut.entries]==['one_y0_x0.png'] and cut.num_empty==1


@pytest.mark.parametrize('tag', [None, 'truth', 'other'])
def test_a_file_of_another_origin_is_not_replaced(tmp_path, tag):
    source = write_dataset(tmp_path, [(64, 64)], [(0, 5, 5, 9, 9, 0)])
    (tmp_path/'other.json').write_text('{"images": [], "annotations": [], "info": {"made_by": "me"}}')
    before = {path: path.read_bytes() for path in tmp_path.glob('*.json')}
    with pytest.raises(ValueError, match='would be replaced.*--tag'):
        tile_dataset(*source, tmp_path, Tiling((64, 64)), tag=tag)
    assert before=={path: path.read_bytes() for path in tmp_path.glob('*.json')} and not (tmp_path/'truth').exists()


def test_tiles_replace_earlier_tiles_but_not_those_they_are_cut_from(tmp_path):
    source = write_dataset(tmp_path, [(64, 128)], [(0, 5, 5, 9, 9, 0)])
    first = tile_dataset(*source, tmp_path/'out', Tiling((64, 64), 0))
    again = tile_dataset(*source, tmp_path/'out', Tiling((32, 32), 0), empty_share=1)
    assert again.num_tiles==len(list(read_tiles(again)))!=first.num_tiles
    again.image_dir.rename(tmp_path/'moved')
    with pytest.raises(ValueError, match='would be replaced'):
        tile_dataset(tmp_path/'moved', again.annotations_file, tmp_path/'out', Tiling((32, 32)))


@pytest.mark.parametrize('names', [
    ['a.jpg', 'a.png', 'a_0.jpg', 'b.png', 'b_y0_x0.png'], ['a_1.png', 'a.png', 'a.bmp', 'a_2.png', 'a_1.bmp'],
    ['c/b_y0_x0.png', 'b_y0_x0.png', 'b_y0_x0_y0_x0.png', 'b.png', '../b.png'],
    ['b_y0_x0_1.png', 'b_y0_x0.png', 'b.png', 'b_y0_x64.png', 'b_y0_x0.bmp']])
def test_no_tile_overwrites_another(tmp_path, names):
    "Every image has one object, at a place of its own, and is wider than a tile."
    boxes = [(i, 3+7*i, 2+9*i, 6, 6, 0) for i in range(len(names))]
    image_dir, truth = write_dataset(tmp_path/'x', [(64, 128)]*len(names), boxes)
    (image_dir/'c').mkdir()
    contents = json.loads(truth.read_text())
    for i, name in enumerate(names):
        Image.open(image_dir/f'{i}.png').save(image_dir/name, quality=95)
        contents['images'][i]['file_name'] = name
    truth.write_text(json.dumps(contents))
    result = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((64, 64), 0), empty_share=1, min_visible=1)
    left_out = sum(map(len, result.report.dropped_images.values()))             # ../b.png is outside of the folder
    tiles = list(read_tiles(result))
    assert len({image['file_name'] for *_, image in tiles})==len(tiles)==3*(len(names)-left_out)
    for pixels, found, _ in tiles:
        assert (pixels>200).any()==bool(found)
        for x, y, w, h in np.array(found).astype(int).reshape(-1, 4): assert pixels[y:y+h, x:x+w].min()>200


@pytest.mark.parametrize('stop_at', [0, 1, 2])
def test_an_interrupted_run_leaves_no_file_with_boxes_of_other_tiles(tmp_path, monkeypatch, stop_at):
    source = write_dataset(tmp_path, [(64, 128)]*3, [(i, 5, 5, 9, 9, 0) for i in range(3)])
    first = tile_dataset(*source, tmp_path/'out', Tiling((64, 64), 0))
    cut = ImageCutter.__call__
    def stop(cutter, job):
        if job[0]==stop_at: raise KeyboardInterrupt
        return cut(cutter, job)
    monkeypatch.setattr(ImageCutter, '__call__', stop)
    with pytest.raises(KeyboardInterrupt): tile_dataset(*source, tmp_path/'out', Tiling((48, 48), 0), workers=1)
    assert not first.annotations_file.exists() and not list((tmp_path/'out').glob('.*'))


def test_earlier_tiles_stay_if_no_image_can_be_read(tmp_path):
    source = write_dataset(tmp_path, [(64, 128)], [(0, 5, 5, 9, 9, 0)])
    path = tile_dataset(*source, tmp_path/'out', Tiling((64, 64), 0)).annotations_file
    before = path.read_bytes()
    (source[0]/'0.png').write_text('x')
    with pytest.raises(ValueError, match='no tile was written'): tile_dataset(*source, tmp_path/'out', Tiling((48, 48)))
    assert path.read_bytes()==before


def test_two_runs_at_once_do_not_mix_their_tiles(tmp_path):
    source = write_dataset(tmp_path, [(64, 128)], [(0, 5, 5, 9, 9, 0)])
    with output_lock(tmp_path/'out', 'truth'):
        with pytest.raises(ValueError, match='another process'): tile_dataset(*source, tmp_path/'out', Tiling((64, 64)))


@pytest.mark.parametrize('name', ['', '/', '.', '..', '//', 'in/..'])
def test_an_entry_without_a_file_name_is_left_out_alone(tmp_path, name):
    image_dir, truth = write_dataset(tmp_path, [(64, 64)]*2, [(i, 5, 5, 9, 9, 0) for i in range(2)])
    contents = json.loads(truth.read_text())
    contents['images'][1]['file_name'] = name
    truth.write_text(json.dumps(contents))
    result = tile_dataset(image_dir, truth, tmp_path/'out', Tiling((64, 64)))
    assert (result.num_tiles, result.num_objects)==(1, 1) and sum(map(len, result.report.dropped_images.values()))==1
