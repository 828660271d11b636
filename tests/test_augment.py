"Guards of the augmentation chapter: boxes move with their pixels, whatever is drawn."
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings, strategies as st
from PIL import Image

from effdet_nb.data import augment as A
from effdet_nb.detector import images as L

SIZES = [(90,160), (160,90), (128,128), (77,301), (500,333), (33,33), (427,640), (1,50)]
CANVASES = [(128,128), (96,160), (512,512)]


def marked(h, w, box):
    "A black picture with one filled red box."
    image = np.zeros((h,w,3), np.uint8)
    y1,x1,y2,x2 = box
    image[y1:y2,x1:x2] = (255,0,0)
    return tf.constant(image), tf.constant([box], tf.float32), tf.constant([0])


def red_box(canvas):
    canvas = np.asarray(canvas)
    ys,xs = np.nonzero((canvas[...,0]>127) & (canvas[...,1]<50))
    return None if len(ys)==0 else np.array([ys.min(), xs.min(), ys.max()+1, xs.max()+1])


def test_scale_one_is_the_letterbox_of_evaluation():
    assert A.PAD_RGB == L.PAD_RGB
    for hw in SIZES:
        for canvas in CANVASES:
            assert tuple(A.scaled_size(hw, canvas, 1.).numpy()) == L.letterbox_scale(hw, canvas)[1], (hw, canvas)


@pytest.mark.parametrize('hw', [(160,120), (90,160), (64,64), (256,256), (640,480), (1280,960), (200,400)])
@pytest.mark.parametrize('pad_rgb', [A.PAD_RGB, (127,127,127)])
def test_training_and_evaluation_have_the_same_pixels(hw, pad_rgb):
    image = np.random.default_rng(1).integers(0, 256, (*hw,3), np.uint8)     # the finest texture there is
    trained = A.crop_resize_pad(tf.constant(image), tf.zeros((0,4)), tf.zeros((0,), tf.int32), (128,128), 1.,
                                (0.,0.), pad_rgb=pad_rgb)[0].numpy()
    np.testing.assert_array_equal(trained, L.letterbox(image, (128,128), pad_rgb)[0])


@pytest.mark.parametrize('hw', [(333,500), (77,301), (427,640)])
def test_pixels_are_nearly_the_same_where_the_window_has_no_whole_pixels(hw):
    small = np.random.default_rng(1).integers(0, 256, (5,6,3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize(hw[::-1], Image.Resampling.BICUBIC))
    trained = A.crop_resize_pad(tf.constant(image), tf.zeros((0,4)), tf.zeros((0,), tf.int32), (128,128), 1.,
                                (0.,0.))[0].numpy()
    assert np.abs(trained.astype(int)-L.letterbox(image, (128,128))[0]).mean() < 2


@pytest.mark.parametrize('scale', [.1, .25, .5])
def test_fine_stripes_become_grey(scale):
    stripes = np.zeros((320,320,3), np.uint8)
    stripes[:,::2] = 255
    small,_,_ = A.crop_resize_pad(tf.constant(stripes), tf.zeros((0,4)), tf.zeros((0,), tf.int32), (320,320), scale,
                                  (0.,0.))
    inner = small.numpy()[1:int(320*scale)-1,1:int(320*scale)-1]
    assert np.abs(inner.astype(int)-127).max() <= 16


def test_boxes_stay_on_their_objects():
    image,boxes,labels = marked(90, 150, (20,30,60,110))
    shown = 0
    for i in range(80):
        canvas,moved,left = A.augment(image, boxes, labels, (64,96), (7,i), True, .3, 3.)
        assert canvas.shape==(64,96,3) and canvas.dtype==tf.uint8
        if len(left)==0: assert red_box(canvas) is None
        elif red_box(canvas) is not None:
            shown += 1
            assert np.abs(moved[0].numpy()-red_box(canvas)).max() <= 1.01, i
    assert shown > 50


def test_transforming_back_gives_the_visible_part():
    "Canvas boxes mapped back through the window are the originals, cut at the window."
    rng = np.random.default_rng(0)
    for _ in range(60):
        h,w = rng.integers(20, 300, 2)
        corner,size,shown = (o.numpy()
                             for o in A.crop_window((h,w), (64,80), rng.uniform(.1, 3),
                                                    rng.random(2).astype('float32')))
        assert (corner>=0).all() and (corner+size<=(h,w)).all() and (shown<=(64,80)).all()
        assert (size>=1).all() and (shown>=1).all()
        boxes = np.sort(rng.random((6,2,2))*(h,w), 1).reshape(-1, 4).astype('float32')
        moved,left = (o.numpy() for o in A.transform_boxes(tf.constant(boxes), tf.range(6), corner, size, shown))
        back = moved*np.tile(size/shown, 2) + np.tile(corner, 2)
        cut = np.clip(boxes, np.tile(corner, 2), np.tile(corner+size, 2))
        assert np.allclose(back, cut[left], atol=1e-2)
        gone = np.setdiff1d(np.arange(6), left)
        assert (np.prod(cut[gone,2:]-cut[gone,:2], 1) < 1e-2).all()


def test_the_aspect_ratio_is_kept():
    "Both axes get the same factor, but for the rounding to whole pixels."
    rng = np.random.default_rng(1)
    for _ in range(60):
        h,w = rng.integers(60, 400, 2)
        _,size,shown = (o.numpy().astype(float)
                        for o in A.crop_window((h,w), (128,128), rng.uniform(.5, 2.5), rng.random(2).astype('float32')))
        fy,fx = shown/size
        assert abs(fy/fx-1) < 2/min(*shown, *size)


def test_flipping_twice_is_the_identity():
    rng = np.random.default_rng(2)
    image = tf.constant(rng.integers(0, 256, (7,13,3), dtype=np.uint8))
    boxes = tf.constant([[1.,2,5,9], [0,0,7,13]])
    once = A.horizontal_flip(image, boxes)
    assert (once[0].numpy() == image.numpy()[:,::-1]).all()
    assert np.allclose(once[1], [[1,4,5,11], [0,0,7,13]])
    twice = A.horizontal_flip(*once)
    assert (twice[0].numpy() == image.numpy()).all() and np.allclose(twice[1], boxes)


def test_same_seed_same_result_in_graph_and_eager():
    image,boxes,labels = marked(60, 90, (10,20,40,70))
    graph = tf.function(lambda key: A.augment(image, boxes, labels, (64,64), key, True))
    for i in range(10):
        key = tf.constant([3,i], tf.int64)
        for a,b in zip(graph(key), A.augment(image, boxes, labels, (64,64), key, True)): assert np.array_equal(a, b)


def test_images_without_objects_and_of_one_pixel():
    none = tf.zeros((0,4)), tf.zeros((0,), tf.int32)
    for hw in ((1,1), (1,40), (40,1)):
        for i in range(5):
            canvas,boxes,labels = A.augment(tf.zeros((*hw,3), tf.uint8), *none, (64,64), (0,i), True)
            assert canvas.shape==(64,64,3) and boxes.shape==(0,4) and labels.shape==(0,)


COLORS = {'red': (255,0,0), 'green': (0,255,0), 'blue': (0,0,255), 'yellow': (255,255,0)}


def mosaic_of_colors(key, image_hw, hw=(60,90), box=(5,10,55,80), scales=(.5,2.)):
    "A mosaic of four black images, each with a rectangle of its own colour and class."
    tiles = A.mosaic_tiles(key, image_hw)
    samples = []
    for i,color in enumerate(COLORS.values()):
        image = np.zeros((*hw,3), np.uint8)
        image[box[0]:box[2],box[1]:box[3]] = color
        samples.append(A.augment(tf.constant(image), tf.constant([box], tf.float32), tf.constant([i]), image_hw,
                                 (key[0],i), True, *scales, window_hw=tiles[i,2:]-tiles[i,:2],
                                 min_visible=A.MIN_VISIBLE_IN_MOSAIC))
    return tiles.numpy(), [part.numpy() for part in A.join_tiles(tiles, samples, image_hw)]


@pytest.mark.parametrize('image_hw', [(128,128), (96,160), (160,96)])
def test_boxes_of_a_mosaic_cover_their_object_and_have_its_class(image_hw):
    num_boxes = 0
    for seed in range(12):
        _,(image,boxes,labels) = mosaic_of_colors((seed,5), image_hw)
        assert image.shape==(*image_hw,3) and image.dtype==np.uint8
        for box,label in zip(boxes, labels):
            color = np.array(list(COLORS.values())[label])
            ys,xs = np.nonzero((np.abs(image.astype(int)-color)<128).all(-1))
            assert np.abs(box-[ys.min(), xs.min(), ys.max()+1, xs.max()+1]).max()<=1.01, (seed, label)
        num_boxes += len(boxes)
    assert num_boxes>=24                                    # more than one image on average


def test_boxes_of_a_mosaic_stay_inside_their_tiles():
    for seed in range(12):
        tiles,(_,boxes,labels) = mosaic_of_colors((seed,6), (128,96), scales=(1.,3.))
        for box,label in zip(boxes, labels):
            y1,x1,y2,x2 = tiles[label]
            assert y1<=box[0]<box[2]<=y2 and x1<=box[1]<box[3]<=x2
            assert (box[2]-box[0])*(box[3]-box[1])>0


@pytest.mark.parametrize('visible,is_kept', [(.05, False), (.19, False), (.21, True), (1., True)])
def test_slivers_are_dropped_and_visible_objects_kept(visible, is_kept):
    boxes = tf.constant([[0.,100-100*visible,50,200-100*visible]])     # of 100 columns, `visible` lie in the window
    _,labels = A.transform_boxes(boxes, tf.constant([7]), (0,0), (50,100), (50,100), A.MIN_VISIBLE_IN_MOSAIC)
    assert labels.numpy().tolist()==([7] if is_kept else [])


def test_color_jitter_off_is_the_identity_and_on_is_repeatable():
    image = tf.constant(np.random.default_rng(3).integers(0, 256, (20,30,3), dtype=np.uint8))
    assert np.array_equal(A.jitter_colors(image, (0,1), 0.), image)
    graph = tf.function(lambda key: A.jitter_colors(image, key, .4, .1))
    for i in range(4):
        key = tf.constant([9,i], tf.int64)
        assert np.array_equal(graph(key), A.jitter_colors(image, key, .4, .1))
        assert not np.array_equal(graph(key), image)


def test_hue_jitter_keeps_brightness_and_grey():
    for seed in range(5):
        red = A.jitter_colors(tf.constant(np.full((2,2,3), (200,0,0), np.uint8)), (seed,0), 0., .5).numpy()
        assert red.max()==200 and red.min()==0
        grey = np.full((2,2,3), 90, np.uint8)
        assert np.array_equal(A.jitter_colors(tf.constant(grey), (seed,0), 0., .5), grey)


# --- properties, whatever the picture, the boxes and the draw

sides = st.integers(1, 400)
draws = dict(hw=st.tuples(sides, sides), canvas=st.tuples(st.integers(32, 200), st.integers(32, 200)),
             scale=st.floats(.125, 3., width=32), place=st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)),
             seed=st.integers(0, 2**31))


def some_boxes(hw, seed, n=5):
    return np.sort(np.random.default_rng(seed).random((n,2,2))*hw, 1).reshape(-1,4).astype('float32')


@settings(max_examples=60, deadline=None)
@given(**draws)
def test_any_crop_maps_back_to_its_window_and_conserves_area(hw, canvas, scale, place, seed):
    corner,size,shown = (o.numpy() for o in A.crop_window(hw, canvas, scale, np.float32(place)))
    boxes = some_boxes(hw, seed)
    moved,left = (o.numpy() for o in A.transform_boxes(tf.constant(boxes), tf.range(len(boxes)), corner, size, shown))
    factor = np.tile(shown/size, 2)
    seen = np.clip(boxes, np.tile(corner, 2), np.tile(corner+size, 2))
    # crop, then map back
    np.testing.assert_allclose(moved/factor + np.tile(corner, 2), seen[left], atol=2e-2)
    def area(b):
        return np.prod(b[:,2:]-b[:,:2], 1)
    # what was cut off is all that is lost
    np.testing.assert_allclose(area(moved), area(seen[left])*np.prod(shown/size), rtol=1e-3, atol=.1)
    assert (moved >= 0).all() and (moved <= np.tile(shown, 2)).all() and (moved[:,2:] > moved[:,:2]).all()


@settings(max_examples=40, deadline=None)
@given(hw=draws['hw'], seed=draws['seed'])
def test_flipping_any_boxes_twice_is_the_identity_and_keeps_their_area(hw, seed):
    image, boxes = tf.zeros((*hw,3), tf.uint8), some_boxes(hw, seed)
    once = A.horizontal_flip(image, tf.constant(boxes))[1].numpy()
    np.testing.assert_allclose(A.horizontal_flip(image, tf.constant(once))[1], boxes, atol=1e-3)
    np.testing.assert_allclose(np.prod(once[:,2:]-once[:,:2], 1), np.prod(boxes[:,2:]-boxes[:,:2], 1), rtol=1e-3,
                               atol=.1)
    assert (once[:,1] >= -1e-3).all() and (once[:,3] <= hw[1]+1e-3).all()


@settings(max_examples=25, deadline=None)
@given(canvas=draws['canvas'], seed=draws['seed'])
def test_any_random_crop_keeps_the_box_on_its_pixels(canvas, seed):
    rng = np.random.default_rng(seed)
    h,w = rng.integers(40, 160, 2)
    y1,x1 = rng.integers(0, (h-20, w-20))
    y2,x2 = y1+rng.integers(12, h-y1), x1+rng.integers(12, w-x1)
    image,boxes,labels = marked(h, w, (int(y1),int(x1),int(y2),int(x2)))
    out,moved,left = A.augment(image, boxes, labels, canvas, (seed, 1), True, .5, 2.5)
    found = red_box(out)
    if found is None: assert len(left) == 0 or np.min(moved[0,2:]-moved[0,:2]) < 2
    else: assert np.abs(moved[0].numpy()-found).max() <= 1.6
