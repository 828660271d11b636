"Guards of the letterbox chapter: geometry for any size, faulty files, order and restraint of the threads."
import io, subprocess, sys, time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from effdet_nb.detector.images import PAD_RGB, read_letterboxed_batches, letterbox_scale, letterbox, threaded_map, read_image, read_letterboxed, boxes_to_original

side = st.integers(1, 5000)


def encoded(image, format='png', **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format, **options)
    return out.getvalue()


def smooth(h, w, seed=0):
    "A picture without sharp noise, so that two ways of scaling may be compared."
    small = np.random.default_rng(seed).integers(0, 256, (6,8,3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w,h), Image.Resampling.BICUBIC))


@given(side, side, side, side)
def test_a_picture_touches_one_side_and_fits_the_other(h, w, H, W):
    scale, (nh,nw) = letterbox_scale((h,w), (H,W))
    assert 1<=nh<=H and 1<=nw<=W and (nh==H or nw==W)
    assert (nh, nw) == (max(1, min(H, h*W//w)), max(1, min(W, w*H//h)))
    assert scale == min(H/h, W/w)


@given(st.lists(st.tuples(*[st.floats(0, 1)]*4), max_size=5), side, side)
def test_boxes_come_home(unit, h, w):
    scale,_ = letterbox_scale((h,w), (512,640))
    unit = np.array(unit, float).reshape(-1, 2, 2)
    boxes = np.sort(unit, 1).reshape(-1, 4)*(h,w,h,w)
    assert np.allclose(boxes_to_original(boxes*scale, scale, (h,w)), boxes, atol=1e-3*max(h,w)/100+1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1,90), st.integers(1,90), st.integers(1,64), st.integers(1,64))
def test_every_size_gives_a_full_canvas(h, w, H, W):
    image = np.full((h,w,3), (200,10,50), np.uint8)
    canvas,_ = letterbox(image, (H,W))
    nh,nw = letterbox_scale((h,w), (H,W))[1]
    assert (canvas[:nh,:nw] == (200,10,50)).all()
    assert (canvas[nh:] == PAD_RGB).all() and (canvas[:,nw:] == PAD_RGB).all()


@pytest.mark.parametrize('size', [(33,33), (100,64), (64,200), (480,640), (700,700)])
def test_a_jpeg_read_small_is_the_same_picture(size):
    data = encoded(smooth(481, 643), 'jpeg', quality=95)
    full,scale = letterbox(read_image(data), size)
    quick = read_letterboxed(data, size)
    assert (quick.scale, quick.original_hw) == (scale, (481,643))
    assert np.abs(full.astype(int)-quick.image).mean() < 2


def test_real_photographs_read_small_are_the_same_pictures(shared_dir):
    for path in sorted((shared_dir/'data/coco_mini/images').glob('*.jpg'))[:5]:
        quick,(full,_) = read_letterboxed(path, (128,128)), letterbox(read_image(path), (128,128))
        assert np.abs(full.astype(int)-quick.image).mean() < 6


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from([b'', b'\xff\xd8\xff\xe0', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM', b'RIFF']))
def test_garbage_is_a_value_error_with_the_name(data, magic):
    with pytest.raises(ValueError, match='^odd.bin: not readable as an image'): read_image(magic+data, 'odd.bin')


@pytest.mark.parametrize('format', ['jpeg', 'png', 'bmp', 'webp', 'tiff', 'gif'])
def test_formats(format):
    image = read_image(encoded(smooth(20, 30), format))
    assert image.shape==(20,30,3) and image.dtype==np.uint8


@pytest.mark.parametrize('cut', [.1, .5, .9])
def test_a_truncated_file_is_refused(cut):
    data = encoded(smooth(200, 300), 'jpeg')
    with pytest.raises(ValueError, match='truncated|not readable'): read_letterboxed(data[:int(len(data)*cut)], (64,64), 'cut.jpg')


def test_an_exif_turn_is_not_applied():
    exif = Image.Exif()
    exif[0x112] = 6
    assert read_image(encoded(smooth(20, 30), 'jpeg', exif=exif)).shape == (20,30,3)


def test_threads_keep_the_order_and_report_errors_in_place():
    def slow(i):
        time.sleep(.002*(7-i%8))
        if i==20: raise ValueError('twenty')
        return i
    results = threaded_map(slow, range(100), 4)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(ValueError, match='twenty'): next(results)


def test_a_reader_that_stops_early_stops_the_threads():
    asked = []
    def sources():
        for i in range(1000):
            asked.append(i)
            yield encoded(smooth(8, 8))
    batches = read_letterboxed_batches(sources(), (16,16), batch_size=2, workers=2)
    next(batches)
    batches.close()
    time.sleep(.05)
    assert len(asked) < 12


def test_no_tensorflow_is_imported():
    code = 'import sys, effdet_nb.detector.images; assert "tensorflow" not in sys.modules and "keras" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
