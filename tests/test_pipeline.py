"Guards of the pipeline chapter: nothing lost, nothing twice, the same again after a stop, and faults by name."
import io
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from effdet_nb.data import pipeline as D, record_index
from effdet_nb.detector.images import read_image


def noise_image(seed, hw=(40,60), file_format='jpeg'):
    "The bytes of a smooth random image."
    small = np.random.default_rng(seed).integers(0, 256, (4,5,3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(hw[::-1], Image.Resampling.BICUBIC).save(out, file_format)
    return out.getvalue()


def feature(values):
    "A feature of whole numbers, floats or bytes."
    if all(isinstance(v, bytes) for v in values): return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if all(isinstance(v, int) for v in values): return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def api_record(source_id, boxes=((.1,.2,.5,.6),), labels=None, hw=(40,60), crowd=None, encoded=None):
    "A record as the TF Object Detection API writes it: no area, no is_crowd unless given, any text as id."
    encoded = noise_image(hash(source_id)%1000, hw) if encoded is None else encoded
    features = {'image/encoded':[encoded], 'image/height':[hw[0]], 'image/width':[hw[1]],
                'image/source_id':[str(source_id).encode()],
                'image/object/class/label':[1]*len(boxes) if labels is None else labels}
    if crowd is not None: features['image/object/is_crowd'] = crowd
    example = tf.train.Example(features=tf.train.Features(feature={k:feature(v) for k,v in features.items()}))
    for k,edge in enumerate(('ymin','xmin','ymax','xmax')):
        example.features.feature[f'image/object/bbox/{edge}'].float_list.value.extend(box[k] for box in boxes)
    return example.SerializeToString()


def write_shards(folder, examples, shards=2, tag='train'):
    for s in range(shards):
        with tf.io.TFRecordWriter(f'{folder}/{tag}-{s:05d}-of-{shards:05d}') as out:
            for e in examples[s::shards]: out.write(e)
    return f'{folder}/{tag}-*'


NO_JITTER = dict(hflip=False, min_scale=1., max_scale=1.)


def make_config(pattern, **changes):
    config = D.DataConfig(str(pattern), num_classes=3, image_hw=(128,128), max_instances=5, hflip=True, min_scale=.5)
    return replace(config, **changes)


def batches(n, config, batch_size=4, **kw):
    return list(D.train_dataset(config, batch_size, **kw).take(n).as_numpy_iterator())


def same(a, b): return all(np.array_equal(x[k], y[k]) for x,y in zip(a, b, strict=True) for k in x)


@pytest.fixture(scope='module')
def pattern(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('records'), [api_record(f'img-{i}', hw=(40+i,60)) for i in range(10)],
                        3)


def test_records_are_those_tensorflow_reads(pattern):
    files = record_index.require_record_files(pattern)
    records = record_index.Records.from_files(files)
    assert [records.read(i) for i in range(len(records))] == [r for f in files
                                                              for r in tf.data.TFRecordDataset(f).as_numpy_iterator()]
    assert record_index.count_examples(pattern) == 10


def test_a_flipped_bit_is_found_and_named(pattern, tmp_path):
    data = bytearray(open(record_index.require_record_files(pattern)[0], 'rb').read())
    data[60] ^= 1
    (tmp_path/'bad-0').write_bytes(data)
    records = record_index.Records.from_files([str(tmp_path/'bad-0')])
    with pytest.raises(ValueError, match='bad-0, record 0: damaged'): records.read(0)


def test_a_set_without_records_is_rejected(tmp_path):
    (tmp_path/'none-0').write_bytes(b'')
    with pytest.raises(ValueError, match='no records in 1 files'):
        record_index.Records.from_files([str(tmp_path/'none-0')])


def test_every_epoch_has_every_record_once_for_any_batch_size():
    for n,batch,workers in ((10,4,1), (7,3,2), (64,5,3)):
        numbers = sorted(int(record_index.sample_index(s, j, batch, (w,workers))) for s in range(60)
                         for w in range(workers) for j in range(batch))
        assert numbers == list(range(60*batch*workers))
        for epoch in range(3):
            assert sorted(record_index.record_of_sample(k, n, 1) for k in range(epoch*n, epoch*n+n)) == list(range(n))


NEW_AUGMENTATION = dict(color_jitter=.4, hue_jitter=.1, mosaic=.5)


def test_mosaic_and_colors_are_the_same_when_a_run_continues_or_is_divided(pattern):
    config = make_config(pattern, **NEW_AUGMENTATION)
    whole = batches(4, config)
    assert same(whole[2:], batches(2, config, start_step=2))
    halves = [batches(1, config, 2, worker=(w,2))[0] for w in (0,1)]
    assert np.array_equal(np.concatenate([half['images'] for half in halves]), whole[0]['images'])


def test_colors_do_not_move_boxes_and_single_images_stay_as_they_were(pattern):
    plain = batches(3, make_config(pattern))
    colored = batches(3, make_config(pattern, color_jitter=.4))
    for a,b in zip(plain, colored):
        assert np.array_equal(a['gt_boxes'], b['gt_boxes']) and not np.array_equal(a['images'], b['images'])
    mixed = batches(3, make_config(pattern, mosaic=.5))
    equal = [np.array_equal(x, y) for a,b in zip(plain, mixed) for x,y in zip(a['images'], b['images'])]
    assert 0<sum(equal)<len(equal)


def test_a_mosaic_with_too_many_objects_is_replaced_by_the_single_image(tmp_path):
    crowd = [(.1*i,.1*j,.1*i+.08,.1*j+.08) for i in range(5) for j in range(4)]
    pattern = write_shards(tmp_path, [api_record(f'c{i}', crowd) for i in range(6)])
    config = make_config(pattern, max_instances=20, hflip=False, min_scale=.3, max_scale=.3)
    for a,b in zip(batches(2, config), batches(2, replace(config, mosaic=1.))):
        assert np.array_equal(a['gt_boxes'], b['gt_boxes']) and (b['num_boxes']<=20).all()


def test_records_of_the_object_detection_api_give_batches(pattern):
    batch, = batches(1, make_config(pattern))
    assert batch['images'].shape==(4,128,128,3) and batch['images'].dtype==np.uint8
    assert ((batch['gt_classes']>=0).sum(1) == batch['num_boxes']).all() and (batch['gt_classes'].max()) == 0
    rows = np.arange(5) < batch['num_boxes'][:,None]
    assert (batch['gt_boxes'][~rows] == -1).all() and (batch['gt_boxes'][rows] >= 0).all()
    assert (batch['gt_boxes'] <= 128).all()


@pytest.mark.parametrize('cache', [None, 'ram'])
def test_a_continued_run_gets_the_batches_of_the_uninterrupted_one(pattern, cache):
    whole = batches(7, make_config(pattern), cache=cache)
    for start in (0,4):
        assert same(whole[start:], batches(7-start, make_config(pattern), start_step=start, cache=cache))
    assert not same(whole[:1], batches(1, make_config(pattern, seed=7), cache=cache))


def test_two_workers_get_the_batch_of_one(pattern):
    whole = batches(3, make_config(pattern))
    parts = [batches(3, make_config(pattern), 2, worker=(w,2)) for w in (0,1)]
    joined = [{k:np.concatenate([a[k], b[k]]) for k in a} for a,b in zip(*parts)]
    assert same(whole, joined)


def test_fake_data_repeats_the_first_batch(pattern):
    first,*others = batches(3, make_config(pattern, use_fake_data=True))
    assert all(same([first], [o]) for o in others)
    assert same([first], batches(1, make_config(pattern)))


def test_the_global_seed_changes_nothing(pattern):
    a = batches(1, make_config(pattern))
    np.random.seed(5)
    tf.random.set_seed(5)
    assert same(a, batches(1, make_config(pattern)))


def test_without_jitter_boxes_are_scaled_letterbox_boxes(tmp_path):
    pattern = write_shards(tmp_path, [api_record('a', [(.1,.2,.5,.6)], hw=(80,160))], 1)
    batch, = batches(1, make_config(pattern, **NO_JITTER), 1)
    assert np.allclose(batch['gt_boxes'][0,0], np.array([8,32,40,96])*.8, atol=1e-3)


@pytest.mark.parametrize('file_format', ['jpeg', 'png', 'webp', 'bmp'])
def test_training_decodes_like_evaluation(file_format):
    data = noise_image(3, (61,83), file_format)
    assert np.abs(D.decode_image(data).numpy().astype(int)-read_image(data)).mean() < 1.5
    for shrink in (2,4,8): assert D.decode_image(data, shrink).shape == (-(-61//shrink), -(-83//shrink), 3)


def test_grey_and_16_bit_images_decode_like_evaluation():
    for image in (Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8,8)*4),
                  Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8,8))):
        out = io.BytesIO()
        image.save(out, 'png')
        assert np.array_equal(D.decode_image(out.getvalue()), read_image(out.getvalue()))


def test_a_file_that_is_smaller_than_its_labels_is_not_reduced_further(tmp_path):
    checks = np.indices((480, 640)).sum(0)//2%2*255                           # 2 pixels wide: gone after a reduction
    out = io.BytesIO()
    Image.fromarray(np.uint8(checks)).convert('RGB').save(out, 'jpeg', quality=95)
    record = api_record('a', [(.25, .5, .5, .75)], hw=(1920, 2560), encoded=out.getvalue())
    config = make_config(write_shards(tmp_path, [record], 1), image_hw=(512, 512))
    image, boxes, _ = D.make_sample_loader(config).read(0, 1.)
    assert image.shape==(480, 640, 3) and np.std(image)>100
    np.testing.assert_allclose(boxes, [[120, 320, 240, 480]])


def five(n): return [(.1*i,.1,.1*i+.1,.5) for i in range(n)]


def test_exactly_max_instances_fit_and_one_more_is_an_error(tmp_path):
    pattern = write_shards(tmp_path, [api_record('ok', five(5))], 1)
    assert batches(1, make_config(pattern, **NO_JITTER), 1)[0]['num_boxes'] == 5
    pattern = write_shards(tmp_path, [api_record('crowded', five(6))], 1)
    with pytest.raises(Exception) as e: batches(1, make_config(pattern), 1)
    assert D.pipeline_error_message(e.value) == ('train-00000-of-00001, record 0, image crowded: 6 objects, '
                                                 'max_instances_per_image is 5. Raise it in dataset_config')


def test_the_configuration_decides_whether_crowds_are_trained_on(tmp_path):
    pattern = write_shards(tmp_path, [api_record('c', five(6), crowd=[0,1,0,1,0,0])], 1)
    with pytest.raises(Exception, match='6 objects'): batches(1, make_config(pattern, skip_crowd=False, **NO_JITTER), 1)
    batch, = batches(1, make_config(pattern, skip_crowd=True, **NO_JITTER), 1)
    assert batch['num_boxes'] == 4


@pytest.mark.parametrize('label', [0, 3, 99])
def test_an_id_without_a_channel_is_an_error(tmp_path, label):
    pattern = write_shards(tmp_path, [api_record('odd', labels=[label])], 1)
    with pytest.raises(Exception) as e: batches(1, make_config(pattern), 1)
    assert f'train-00000-of-00001, record 0, image odd: category id {label}' in D.pipeline_error_message(e.value)


def test_a_damaged_image_is_named(tmp_path):
    pattern = write_shards(tmp_path, [api_record('7', encoded=noise_image(1)[:100])], 1)
    with pytest.raises(Exception) as e: batches(1, make_config(pattern), 1)
    message = D.pipeline_error_message(e.value)
    assert message.startswith('train-00000-of-00001, record 0, image 7: not readable as an image')


def test_real_images_give_batches_with_targets(shared_dir, tmp_path):
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.detector.targets import assign
    from effdet_nb.detector.anchors import all_anchors
    dataset_convert(shared_dir/'data/coco_mini/images', shared_dir/'data/coco_mini/val.json', tmp_path, 'val',
                    num_shards=2, workers=1)
    config = D.DataConfig(f'{tmp_path}/val-*', num_classes=91, image_hw=(128,192), min_scale=.8)
    anchors = np.asarray(all_anchors((128,192)))
    batch, = batches(1, config, 3, assign_fn=partial(assign, anchors))
    for k in range(3):
        alone = assign(anchors, batch['gt_boxes'][k], batch['gt_classes'][k])
        assert np.array_equal(batch['cls_targets'][k], alone[0])
        assert np.allclose(batch['box_targets'][k], alone[1], atol=1e-5)
        assert batch['num_positives'][k]==alone[2]
    assert batch['num_positives'].sum() >= batch['num_boxes'].sum() > 0


# --- what the pictures are

def encode(image, file_format, **kw):
    out = io.BytesIO()
    image.save(out, file_format, **kw)
    return out.getvalue()


small = np.random.default_rng(5).integers(0, 256, (4,5,3), dtype=np.uint8)
smooth = Image.fromarray(small).resize((60,40), Image.Resampling.BICUBIC)
grey = smooth.convert('L')
black_white = Image.fromarray(np.asarray(smooth.convert('1')).astype(np.uint8)*255)
image_kinds = {     # how it is stored, and what it shows
    'grey jpeg': (lambda: encode(grey, 'JPEG'), grey),
    'CMYK jpeg': (lambda: encode(smooth.convert('CMYK'), 'JPEG', quality=95), smooth),
    'progressive jpeg': (lambda: encode(smooth, 'JPEG', progressive=True), smooth),
    'grey png': (lambda: encode(grey, 'PNG'), grey),
    'png with alpha': (lambda: encode(smooth.convert('RGBA'), 'PNG'), smooth),
    'grey png with alpha': (lambda: encode(smooth.convert('LA'), 'PNG'), grey),
    'png with palette': (lambda: encode(smooth.convert('P'), 'PNG'), smooth),
    'one bit png': (lambda: encode(smooth.convert('1'), 'PNG'), black_white),
    '16 bit png': (lambda: encode(Image.fromarray(np.asarray(grey).astype(np.uint16)*257), 'PNG'), grey),
    'webp': (lambda: encode(smooth, 'WEBP', lossless=True), smooth),
    'bmp': (lambda: encode(smooth, 'BMP'), smooth),
    'gif': (lambda: encode(smooth.convert('P'), 'GIF'), smooth),
}


@pytest.mark.parametrize('kind', image_kinds)
def test_training_and_evaluation_decode_every_kind_of_image_alike(kind, tmp_path):
    make, shown = image_kinds[kind]
    data = make()
    decoded, expected = D.decode_image(data).numpy().astype(int), read_image(data).astype(int)
    assert decoded.shape == (40,60,3)
    assert np.abs(decoded-expected).mean() < 3
    assert np.abs(decoded-np.asarray(shown).reshape(40,60,-1)).mean() < 18
    pattern = write_shards(tmp_path, [api_record('a', encoded=data)], 1)
    batch, = batches(1, make_config(pattern, **NO_JITTER), 1)
    assert batch['num_boxes'] == 1 and batch['images'].std() > 5


def test_a_tiff_is_rejected_by_name(tmp_path):
    pattern = write_shards(tmp_path, [api_record('a', encoded=encode(smooth, 'TIFF'))], 1)
    with pytest.raises(Exception) as e: batches(1, make_config(pattern), 1)
    assert 'record 0, image a: not readable as an image' in D.pipeline_error_message(e.value)
    assert 'JPEG, PNG, BMP, GIF and WebP are allowed' in D.pipeline_error_message(e.value)


def test_boxes_fit_the_pixels_even_if_the_record_gives_another_size(tmp_path):
    "Boxes are shares of the image, whatever height and width stand beside them."
    pattern = write_shards(tmp_path, [api_record('a', [(.25,.5,.75,1.)], hw=(80,160), encoded=noise_image(1, (40,80)))],
                           1)
    batch, = batches(1, make_config(pattern, **NO_JITTER), 1)
    np.testing.assert_allclose(batch['gt_boxes'][0,0], [16,64,48,128], atol=.51)


# --- damage

def damaged_set(folder):
    records = [api_record(f'i{k}') for k in range(6)]
    records[1] = api_record('cut', encoded=noise_image(1)[:100])
    pattern = write_shards(folder, records, 2)
    shard = folder/'train-00000-of-00002'                       # holds 0, 2, 4
    data = bytearray(shard.read_bytes())
    data[-30] ^= 1
    shard.write_bytes(data)
    return pattern


def test_damaged_records_are_skipped_and_counted(tmp_path, capfd):
    pattern = damaged_set(tmp_path)
    with pytest.raises(Exception) as e: batches(6, make_config(pattern), 2)
    assert 'record ' in D.pipeline_error_message(e.value) and 'train-0000' in D.pipeline_error_message(e.value)
    config = make_config(pattern, skip_corrupt=True)
    whole = batches(6, config, 2)
    said = capfd.readouterr().err
    assert 'train-00000-of-00002, record 2: damaged' in said
    assert 'train-00001-of-00002, record 0, image cut: not readable as an image' in said
    assert '(2 of 6 records skipped so far)' in said and said.count('skip_corrupt:') == 2           # each once
    # and the order can still be continued
    assert same(whole[3:], batches(3, config, 2, start_step=3))
    (tmp_path/'all').mkdir()
    nothing = write_shards(tmp_path/'all', [api_record('cut', encoded=b'\xff\xd8 no')]*2, 1)
    with pytest.raises(Exception) as e: batches(1, make_config(nothing, skip_corrupt=True), 2)
    assert 'all 2 records are damaged' in D.pipeline_error_message(e.value)


def test_skip_corrupt_does_not_hide_mistakes_of_the_spec(tmp_path):
    pattern = write_shards(tmp_path, [api_record('odd', labels=[7])], 1)
    with pytest.raises(Exception) as e: batches(1, make_config(pattern, skip_corrupt=True), 1)
    assert 'category id 7' in D.pipeline_error_message(e.value)


def test_training_verifies_the_counts_of_the_conversion(tmp_path):
    import json
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.detector.toy_data import make_toy_dataset
    data = make_toy_dataset(tmp_path/'s', 6, 4)
    dataset_convert(data/'train', data/'train.json', tmp_path, num_shards=2)
    config = make_config(tmp_path/'train-*', num_classes=4, max_instances=100)
    assert len(D.make_sample_loader(config).records) == 6
    side = json.loads((tmp_path/'train_records.json').read_text())
    side['shards'][0]['records'] += 1
    (tmp_path/'train_records.json').write_text(json.dumps(side))
    with pytest.raises(ValueError, match='6 records, but 7 were written'): D.make_sample_loader(config)


# --- targets and pictures of them

def test_targets_on_the_grid_equal_the_plain_ones(pattern):
    from effdet_nb.accel.grid_targets import anchor_grid, assign_on_grid
    from effdet_nb.detector.targets import assign
    from effdet_nb.detector.anchors import all_anchors
    anchors = all_anchors((128,128))
    plain, = batches(1, make_config(pattern), assign_fn=partial(assign, anchors))
    quick, = batches(1, make_config(pattern), assign_fn=partial(assign_on_grid, anchor_grid(anchors)))
    for k in plain: np.testing.assert_allclose(plain[k], quick[k], atol=1e-5)
    assert plain['num_positives'].sum() > 0


def test_show_batch_draws_boxes_names_and_matched_anchors(pattern):
    from effdet_nb.accel.grid_targets import anchor_grid, assign_on_grid
    from effdet_nb.detector.anchors import all_anchors
    anchors = all_anchors((128,128))
    batch, = batches(1, make_config(pattern), assign_fn=partial(assign_on_grid, anchor_grid(anchors)))
    ax = D.show_batch(batch, ['thing','other'], anchors=anchors)[0,0]
    assert [t.get_text() for t in ax.texts] == ['thing']*batch['num_boxes'][0]
    assert ax.get_title() == f"{batch['num_positives'][0]} anchors"
    assert len(ax.patches) == batch['num_boxes'][0] + batch['num_positives'][0]


# --- failures inside the pipeline

def test_skipped_records_keep_messages_not_exceptions(tmp_path):
    "An exception kept for a whole run keeps its traceback, and with it the images in its frames."
    loader = D.make_sample_loader(make_config(damaged_set(tmp_path), skip_corrupt=True))
    for k in range(6): loader.read_or_skip(k, 1.)
    assert len(loader.skipped_records)==2
    assert all(type(message) is str for message in loader.skipped_records.values())


def test_an_exception_without_a_message_hides_nothing():
    def fail(): raise MemoryError
    with pytest.raises(MemoryError): D._recording_failures(fail)()
    assert D.pipeline_error_message(ValueError('a text of TensorFlow'))=='a text of TensorFlow'
    assert all(type(text) is str and text for failure in D._failures for text in failure)
