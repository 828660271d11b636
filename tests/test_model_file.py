"Model files: whatever happens to a file, it is read as written or refused with a reason."

import io, json, os, resource, subprocess, sys, zipfile
import numpy as np, pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from functools import partial

from effdet_nb.weights.encryption import (
    CHUNK_SIZE,
    DamagedFileError,
    HEADER_SIZE,
    ENCRYPTED_MAGIC,
    DecryptingReader,
    ModelFileError,
    TAG_SIZE,
    WrongKeyError,
)
from effdet_nb.weights.model_file import load_etlt, load_model_file, read_meta, save_etlt, save_model_file
from effdet_nb.weights.container import is_encrypted
from test_encryption import KEY, cheap_scrypt, few_examples, refused  # noqa: F401


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {f'block{i}/kernel': rng.normal(size=(3, 3, 8, 8)).astype(np.float32) for i in range(4)}


def check_same(a, b):
    assert list(a) == list(b)
    for n in a:
        x, y = np.asarray(a[n]), b[n]
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


# --- round trips

dtypes = st.sampled_from(['<f4', '<f8', '<f2', '>i4', '<i8', '|u1', '|b1', '<c8'])
numbers = dtypes.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
groups = st.dictionaries(st.text(), numbers, max_size=4)
metas = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@few_examples
@given(groups, groups, groups, metas, st.sampled_from(['', KEY]))
def test_any_model_is_read_back_bit_for_bit(tmp_path, cheap_scrypt, weights, ema, optimizer, meta, key):
    path = save_model_file(tmp_path / 'm.tlt', weights, meta, key, ema, optimizer)
    got = load_model_file(path, key)
    assert got.meta == meta == read_meta(path, key)
    check_same(weights, got.weights)
    check_same(ema, got.ema)
    check_same(optimizer, got.optimizer)
    assert is_encrypted(path) == bool(key)


def test_fortran_order_and_strided_arrays_keep_their_values(tmp_path):
    a = np.arange(24.0).reshape(2, 3, 4)
    got = load_model_file(
        save_model_file(tmp_path / 'm', {'f': np.asfortranarray(a), 's': a[:, ::2], 't': a.T}, {})
    ).weights
    for n, x in {'f': a, 's': a[:, ::2], 't': a.T}.items():
        np.testing.assert_array_equal(got[n], x)


@pytest.mark.parametrize('key', ['', KEY])
def test_an_etlt_has_four_zero_bytes_before_its_model(tmp_path, key):
    onnx = b'\x08\x07' + os.urandom(CHUNK_SIZE * 2)
    path = save_etlt(tmp_path / 'deep' / 'er' / 'm.etlt', onnx, key)
    data = path.read_bytes()
    assert data[:4] == bytes(4) and data[4:12] == (ENCRYPTED_MAGIC if key else onnx[:8])
    assert load_etlt(path, key) == onnx and is_encrypted(path) == bool(key)


def test_files_without_a_key_open_with_zipfile_and_numpy(tmp_path, arrays):
    with zipfile.ZipFile(save_model_file(tmp_path / 'm.tlt', arrays, dict(step=3))) as z:
        assert json.loads(z.read('meta.json'))['meta'] == dict(step=3)
        np.testing.assert_array_equal(
            np.load(io.BytesIO(z.read('weights/block0/kernel.npy'))), arrays['block0/kernel']
        )


def test_reading_the_metadata_does_not_read_the_weights(tmp_path):
    path, asked = save_model_file(tmp_path / 'm.tlt', {'w': np.zeros(2**20, np.float32)}, dict(step=3), KEY), []

    class Counted(io.FileIO):
        def readinto(self, b):
            n = super().readinto(b)
            asked.append(n)
            return n

    with (
        io.BufferedReader(Counted(path), 1) as f,
        zipfile.ZipFile(io.BufferedReader(DecryptingReader(f, KEY), CHUNK_SIZE)) as z,
    ):
        z.read('meta.json')
    assert sum(asked) < 6 * CHUNK_SIZE < path.stat().st_size / 8


def test_groups_that_were_not_requested_stay_empty(tmp_path, arrays):
    got = load_model_file(save_model_file(tmp_path / 'm', arrays, {}, '', arrays, {'i': 1}), groups=['ema'])
    assert not got.weights and not got.optimizer and len(got.ema) == 4


# --- whole files under attack


def write_bytes_to(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('key', ['', KEY])
def test_damaged_models_never_give_wrong_weights(tmp_path, cheap_scrypt, arrays, key):
    """Bytes changed, cut and appended at sampled places.

    A flip that a zip cannot notice (a date, an unused flag) may pass, but then the weights are the right ones.
    """
    data = save_model_file(tmp_path / 'm.tlt', arrays, dict(step=3), key).read_bytes()
    edges = range(HEADER_SIZE, len(data) + 1, CHUNK_SIZE + TAG_SIZE) if key else [data.index(b'PK\1\2')]
    cuts = {n for e in (0, *edges, len(data)) for n in (e - 1, e, e + 1) if 0 <= n < len(data)}
    broken = [data[:n] for n in sorted(cuts)] + [
        data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]
        for i in {*range(0, len(data), 97), *range(len(data) - 600, len(data))}
    ]
    passed = 0
    for b in broken:
        try:
            got = load_model_file(write_bytes_to(tmp_path / 'bad.tlt', b), key)
        except ModelFileError as e:
            assert 'bad.tlt' in str(e) and KEY not in str(e)
        else:
            check_same(arrays, got.weights)
            passed += 1
            assert not key
    assert passed < len(broken) / 4


def test_appended_bytes_are_refused(tmp_path, arrays):
    for key in ('', KEY):
        data = save_model_file(tmp_path / 'm.tlt', arrays, {}, key).read_bytes()
        longer = write_bytes_to(tmp_path / 'bad.tlt', data + bytes(70000))
        refused(partial(load_model_file, longer, key), DamagedFileError)
    refused(partial(load_model_file, write_bytes_to(tmp_path / 'bad.tlt', data + b'!'), KEY), DamagedFileError)


def test_missing_wrong_and_unneeded_keys_are_refused(tmp_path, arrays):
    a, b = save_model_file(tmp_path / 'a.tlt', arrays, {}, KEY), save_model_file(tmp_path / 'b.tlt', arrays, {})
    for read in (load_model_file, read_meta):
        assert 'no key was given' in refused(partial(read, a), WrongKeyError)
        assert 'another key' in refused(partial(read, a, KEY + ' '), WrongKeyError)
        assert 'not encrypted' in refused(partial(read, b, KEY), WrongKeyError)
    e, o = save_etlt(tmp_path / 'a.etlt', b'\x08\x07', KEY), save_etlt(tmp_path / 'b.etlt', b'\x08\x07')
    assert 'no key was given' in refused(partial(load_etlt, e), WrongKeyError)
    assert 'another key' in refused(partial(load_etlt, e, 'x'), WrongKeyError)
    assert 'not encrypted' in refused(partial(load_etlt, o, KEY), WrongKeyError)


def test_keys_are_not_in_the_file_nor_in_reprs(tmp_path, arrays):
    path = save_model_file(tmp_path / 'a.tlt', arrays, dict(step=1), KEY)
    assert KEY.encode() not in path.read_bytes() and b'step' not in path.read_bytes()
    reader = DecryptingReader(io.BytesIO(path.read_bytes()), KEY)
    assert KEY not in repr(reader) + str(vars(reader)) + repr(load_model_file(path, KEY))


# --- open zips made by others


def repacked(path, change, compression=zipfile.ZIP_STORED):
    "A copy of an open model whose members `change` may replace (bytes), drop (None) or add."
    with zipfile.ZipFile(path) as z:
        members = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path.with_name('changed.tlt'), 'w', compression) as z:
        for n, data in (members | change).items():
            if data is not None:
                z.writestr(n, data)
    return path.with_name('changed.tlt')


def npy(a):
    f = io.BytesIO()
    np.save(f, a, allow_pickle=True)
    return f.getvalue()


class Trap:
    def __reduce__(self):
        return os.mkdir, ('sprung',)


MEMBER = 'weights/block0/kernel.npy'


@pytest.mark.parametrize(
    'change',
    [
        {MEMBER: None},
        {'meta.json': None},
        {'weights/extra.npy': npy(np.zeros(3))},
        {MEMBER: npy(np.zeros(3))},
        {MEMBER: b''},
        {MEMBER: npy(np.array([Trap()]))},
        {'meta.json': b'{'},
        {'meta.json': b'[]'},
        {'meta.json': b'{"format": 9}'},
        {'meta.json': b'{"format": 1, "arrays": 3}'},
        {'meta.json': b'\xff'},
    ],
)
def test_missing_wrong_and_pickled_members_are_refused(tmp_path, monkeypatch, arrays, change):
    monkeypatch.chdir(tmp_path)
    path = save_model_file(tmp_path / 'm.tlt', arrays, {})
    refused(partial(load_model_file, repacked(path, change)))
    assert not (tmp_path / 'sprung').exists()


def test_bytes_after_an_array_are_refused(tmp_path, arrays):
    path = save_model_file(tmp_path / 'm.tlt', arrays, {})
    refused(partial(load_model_file, repacked(path, {MEMBER: npy(arrays['block0/kernel']) + b'!'})), DamagedFileError)


def test_bombs_are_not_unpacked(tmp_path, arrays):
    path = save_model_file(tmp_path / 'm.tlt', arrays, {})
    assert 'compressed' in refused(
        partial(load_model_file, repacked(path, {MEMBER: bytes(10**7)}, zipfile.ZIP_DEFLATED)), DamagedFileError
    )
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, dict(descr='<f4', fortran_order=False, shape=(10**14,)))
    refused(partial(load_model_file, repacked(path, {MEMBER: huge.getvalue()})), DamagedFileError)
    with zipfile.ZipFile(path.with_name('lie.tlt'), 'w') as z:
        z.writestr('meta.json', b'{}')
        z.writestr('a', b'x' * 1000)
        second = zipfile.ZipInfo('b')
        second.header_offset = z.getinfo('a').header_offset
        second.file_size = second.compress_size = 10**6
        second.CRC = 0
        z.filelist.append(second)
    assert 'more bytes than the file has' in refused(
        partial(load_model_file, path.with_name('lie.tlt')), DamagedFileError
    )


def test_repacked_files_open(tmp_path, arrays):
    path = save_model_file(tmp_path / 'm.tlt', arrays, {})
    check_same(arrays, load_model_file(repacked(path, {})).weights)


# --- files of others


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'empty'),
        (b'hello', 'unknown format'),
        (b'\x89HDF\r\n\x1a\n' + bytes(99), 'HDF5'),
        (b'\x08\x07' + bytes(99), 'ONNX'),
        (b'\x80\x04.', 'pickle'),
        (np.random.default_rng(0).bytes(50_000), 'written by NVIDIA TAO'),
        (bytes(4) + np.random.default_rng(0).bytes(50_000), 'written by NVIDIA TAO'),
        (b'version https://git-lfs.github.com/spec/v1', 'Git LFS'),
    ],
)
def test_model_files_of_other_programs_are_named(tmp_path, data, message):
    assert message in refused(partial(load_model_file, write_bytes_to(tmp_path / 'x.tlt', data), KEY))
    assert message in refused(partial(load_model_file, write_bytes_to(tmp_path / 'x.tlt', data)))


def test_zips_of_other_programs_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / 'tao5.tlt', 'w') as z:
        z.writestr('model.ckpt-10.index', b'x')
    assert 'TAO 5' in refused(partial(load_model_file, tmp_path / 'tao5.tlt'))
    assert 'TAO 5' in refused(partial(load_model_file, tmp_path / 'tao5.tlt', KEY))  # TAO's users always give -k


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'ends after 0 bytes'),
        (b'\0\0', 'ends after 2 bytes'),
        (bytes(4), 'empty'),
        (b'\x08\x07abc', 'plain ONNX'),
        (b'\x07\0\0\0input_1' + bytes(99), 'UFF'),
        (bytes(4) + np.random.default_rng(0).bytes(50_000), 'written by NVIDIA TAO'),
        (np.random.default_rng(0).bytes(50_000), 'written by NVIDIA TAO'),
        (bytes(4) + b'hello', 'unknown format'),
    ],
)
def test_exported_files_of_other_programs_are_named(tmp_path, data, message):
    for key in ('', KEY):
        assert message in refused(partial(load_etlt, write_bytes_to(tmp_path / 'x.etlt', data), key))


def flip(data, i):
    return data[:i] + bytes([data[i] ^ 2]) + data[i + 1 :]


def test_truncated_and_changed_exports_are_refused(tmp_path, cheap_scrypt):
    data = save_etlt(tmp_path / 'm.etlt', b'\x08\x07' + os.urandom(CHUNK_SIZE + 99), KEY).read_bytes()
    for n in (0, 3, 4, 5, 11, 12, 67, 68, 69, CHUNK_SIZE + 83, CHUNK_SIZE + 84, CHUNK_SIZE + 85, len(data) - 1):
        refused(partial(load_etlt, write_bytes_to(tmp_path / 'x.etlt', data[:n]), KEY))
    for i in range(0, len(data), 1999):
        refused(
            partial(load_etlt, write_bytes_to(tmp_path / 'x.etlt', flip(data, i)), KEY)
        )


# --- writing


@pytest.mark.parametrize('key', ['', KEY])
@pytest.mark.parametrize(
    'save',
    [
        lambda p, k: save_model_file(p, {'w': np.zeros(10**6)}, {}, k),
        lambda p, k: save_etlt(p, b'\x08\x07' + bytes(10**6), k),
    ],
)
def test_a_full_disk_leaves_the_old_file(tmp_path, key, save):
    "The limit on file sizes makes real writes fail in the middle, as a full disk does."
    path = write_bytes_to(tmp_path / 'm', b'the old one')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError):
            save(path, key)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b'the old one' and [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(weights={'w': [None]}), 'weights/w: type object'),
        (dict(weights={}, ema={'w': ['a']}), 'ema/w'),
        (dict(weights={}, meta={'a': {1: 2}}), 'meta.a: key 1'),
        (dict(weights={}, meta={'a': [{1}]}), 'meta.a[0]: a value of type set'),
        (dict(weights={}, optimizer={'v': np.zeros(2, 'V2')}), 'optimizer/v'),
    ],
)
def test_values_that_cannot_be_stored_are_refused_before_writing(tmp_path, bad, message):
    path = write_bytes_to(tmp_path / 'm', b'the old one')
    with pytest.raises(ValueError) as e:
        save_model_file(path, **{'meta': {}, **bad})
    assert message in str(e.value) and path.read_bytes() == b'the old one' and len(list(tmp_path.iterdir())) == 1


def test_paths_without_a_file_are_refused(tmp_path):
    for read in (load_model_file, read_meta, load_etlt, is_encrypted):
        with pytest.raises(FileNotFoundError, match='no such file'):
            read(tmp_path / 'nowhere')
        with pytest.raises(FileNotFoundError, match='is a folder'):
            read(tmp_path)


def test_importing_needs_no_tensorflow():
    heavy = ('tensorflow','keras','matplotlib','onnx')
    code = f"import sys, effdet_nb.weights.model_file; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='asks Linux for the peak')
def test_a_gigabyte_needs_little_memory(tmp_path):
    "Written from zeros that take no memory, read back chunk by chunk, in a process of its own whose peak is measured."
    code = f'''
import io, json, re, numpy as np
from effdet_nb.weights.container import is_encrypted
from effdet_nb.weights.encryption import CHUNK_SIZE, DecryptingReader
from effdet_nb.weights.model_file import read_meta, save_model_file
path = save_model_file({str(tmp_path / 'big.tlt')!r}, dict(w=np.zeros(2**28, np.float32)), dict(step=3), 'k')
with open(path, 'rb') as f:
    r, n, odd = io.BufferedReader(DecryptingReader(f, 'k'), CHUNK_SIZE), 0, 0
    while block := r.read(2**20): n += len(block); odd += any(block)
peak_kb = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
print(json.dumps([path.stat().st_size, n, odd, is_encrypted(path), read_meta(path, 'k')['step'], peak_kb/1024]))'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    size, plain, odd, sealed, step, peak_mb = json.loads(out)
    assert size > plain > 2**30 and odd < 5 and sealed and step == 3
    assert peak_mb < 256
