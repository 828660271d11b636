"Guards for effdet_nb.data.tfrecord: bytes TensorFlow agrees with, nothing lost, nothing half-written."
import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.tfrecord import (
    FEATURE_TYPES, decode_example, make_example, masked_crc, parse_example, read_records, write_records)


# --- the format ---

@given(st.lists(st.binary(max_size=300), max_size=8))
@settings(max_examples=40, deadline=None)
def test_records_are_read_as_they_were_written(tmp_path_factory, records):
    path = tmp_path_factory.mktemp('r')/'a.tfrecord'
    shard = write_records(path, records)
    assert list(read_records(path)) == records and shard.records == len(records)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and shard.size == path.stat().st_size


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_damaged_byte_is_found(tmp_path_factory, data):
    records = [b'first', b'second record', bytes(range(50))]
    path = tmp_path_factory.mktemp('r')/'a.tfrecord'
    write_records(path, records)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        # a cut between records looks like a shorter file; the sidecar knows better
        ends = {0} | set(np.cumsum([len(r) + 16 for r in records]).tolist())
        raw = raw[:data.draw(st.integers(0, len(raw)).filter(lambda n: n not in ends))]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match='a.tfrecord, record'): list(read_records(path))


def test_crc_of_a_published_vector():
    "RFC 3720 B.4: 32 zero bytes have CRC-32C 0x8a9136aa; the mask is rotate right by 15, add a constant."
    crc = 0x8a9136aa
    assert masked_crc(bytes(32)) == ((crc >> 15 | crc << 17 & 0xffffffff) + 0xa282ead8) & 0xffffffff


@pytest.mark.parametrize('raw,message',
                         [(b'\x1f\x8b\x08' + bytes(40), 'gzip'), (b'{"images": [], "x": 3}', 'not a TFRecord file'),
                          (b'abc', 'ends after 3 of 12'),
                                         (struct.pack('<Q', 1 << 40) + bytes(4), 'not a TFRecord file')])
def test_files_that_are_no_records_are_rejected(tmp_path, raw, message):
    (tmp_path/'x').write_bytes(raw)
    with pytest.raises(ValueError, match=message): list(read_records(tmp_path/'x'))


values = st.one_of(st.lists(st.binary(max_size=9), min_size=1, max_size=4),
                   st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4),
                   st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4))


@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_examples_are_decoded_as_encoded_and_are_deterministic(features):
    data = make_example(features)
    assert parse_example(data) == features
    assert make_example(dict(reversed(features.items()))) == data


@given(st.binary(max_size=60))
def test_parsing_nonsense_never_crashes(data):
    try: assert isinstance(parse_example(data), dict)
    except ValueError as e: assert 'tf.train.Example' in str(e)


def test_foreign_records_may_lack_area_and_crowd():
    e = decode_example(make_example({'image/encoded': b'x', 'image/height': 10, 'image/width': 20,
                                     'image/source_id': 'a7', 'image/object/bbox/xmin': [.5],
                                     'image/object/bbox/xmax': [1.],
                                   'image/object/bbox/ymin': [0.], 'image/object/bbox/ymax': [.5],
                                     'image/object/class/label': [3]}))
    assert e['boxes'].tolist() == [[0, 10, 5, 20]] and e['area'].tolist() == [50]
    assert e['is_crowd'].tolist() == [False] and e['source_id'] == 'a7'
    with pytest.raises(ValueError, match='shard 3: has no image/encoded, image/width'):
        decode_example(make_example({'image/height': 3}), 'shard 3')
    with pytest.raises(ValueError, match='equally long'):
        decode_example(make_example({'image/encoded': b'x', 'image/height': 1, 'image/width': 1,
                                     'image/object/class/label': [3]}))


def test_tensorflow_reads_the_same_records(tmp_path):
    tf = pytest.importorskip('tensorflow')
    data = make_toy_dataset(tmp_path/'s', 6, 4)
    summary = dataset_convert(data/'train', data/'train.json', tmp_path/'r', num_shards=2, include_masks=True)
    ours = [r for f in summary.files for r in read_records(f)]
    theirs = [r.numpy() for r in tf.data.TFRecordDataset([str(f) for f in summary.files])]
    assert ours == theirs                                           # framing and checksums agree
    for data in ours:
        mine, reference = parse_example(data), tf.train.Example.FromString(data)
        assert mine.keys() == reference.features.feature.keys() == FEATURE_TYPES.keys()
        for key, kind in FEATURE_TYPES.items():
            value = reference.features.feature[key]
            assert value.WhichOneof('kind') == dict(bytes='bytes_list', float='float_list', int='int64_list')[kind]
            assert list(getattr(value, value.WhichOneof('kind')).value) == mine[key]
        assert tf.io.decode_image(mine['image/encoded'][0]).shape == (128, 128, 3)
    with tf.io.TFRecordWriter(str(tmp_path/'tf.tfrecord')) as w:
        for r in ours: w.write(r)
    write_records(tmp_path/'ours.tfrecord', ours)
    assert (tmp_path/'tf.tfrecord').read_bytes() == (tmp_path/'ours.tfrecord').read_bytes()


def test_conversion_does_not_import_tensorflow():
    code = ('import sys, effdet_nb.data.convert; '
            'sys.exit(any(m in sys.modules for m in ("tensorflow", "keras", "matplotlib", "pycocotools")))')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
