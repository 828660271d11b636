"Files made to mislead or exhaust a reader: each is refused in one sentence, quickly, before anything is built from it."

import json, shlex, struct, time, warnings, zipfile
from configparser import ConfigParser
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import h5py, numpy as np, onnx, pytest
from hypothesis import given, strategies as st
from packaging.requirements import Requirement
from test_encryption import KEY, cheap_scrypt, refused  # noqa: F401
from test_model_file import npy, repacked

from effdet_nb.app.command import command, format_error
from effdet_nb.app.dataset_page import check_dataset
from effdet_nb.app.options import Option, parse_options
from effdet_nb.core.files import mask_secrets, to_jsonable
from effdet_nb.data.check import check_records
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.pipeline import DataConfig, read_training_example
from effdet_nb.data.record_index import CorruptRecord, Records
from effdet_nb.data.tfrecord import decode_example, example_class, make_example, write_records
from effdet_nb.detector.efficientdet import Arch, arch_to_dict
from effdet_nb.export.metadata import get_metadata
from effdet_nb.export.exported_detector import check_metadata, parse_metadata
from effdet_nb.export.runtimes import load_onnx_bytes
from effdet_nb.prune.prune import saved_norms
from effdet_nb.train.spec import MAX_SPEC_SIZE, Spec, SpecError
from effdet_nb.train.startup import read_initial_weights
from effdet_nb.weights.encryption import (DamagedFileError, HEADER_STRUCT, ModelFileError, WrongKeyError, decrypt,
                                          encrypt, make_encryption_header, resolve_key)
from effdet_nb.weights.import_weights import import_weights
from effdet_nb.weights.model_file import ModelFile, load_model_file, read_meta, save_etlt, save_model_file
from effdet_nb.weights import pretrained
from effdet_nb.weights.pretrained import WeightsError, matching_names
from effdet_nb.weights.read_weights import read_h5, read_weights

ARCH = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=4)
CLASSES = ClassTable((1, 2, 3), ('a', 'b', 'c'), 4)
ONNX = b'\x08\x07' + b'graph'*100


@contextmanager
def seconds(limit):
    "The body takes at most so much processor time in its own thread: ten times what it needs, far less than an attack."
    start = time.thread_time()
    yield
    assert time.thread_time()-start < limit


def heads(num_classes=4):
    "The weights whose shapes the description of a detector determines."
    return {'class-predict/pointwise_kernel': np.zeros((1, 1, 24, 9*num_classes), 'f4'),
            'box-predict/pointwise_kernel': np.zeros((1, 1, 24, 36), 'f4')}


def save_toy(path, key='', weights=None, **changes):
    "A model file with the weights of the heads only; `changes` replace entries of its metadata."
    meta = dict(arch=arch_to_dict(ARCH), classes=CLASSES.to_dict()) | changes
    return save_model_file(path, heads() if weights is None else weights, meta, key)


# --- with a key, a file that is not encrypted is refused, whatever it is

def initial(path, field, key):
    config = Spec().replace(training_config={field: str(path)}).training_config
    return read_initial_weights(config, 'efficientdet-tiny', key)


OPENERS = {
    'model': load_model_file,
    'metadata': read_meta,
    'checkpoint': lambda path, key: initial(path, 'checkpoint', key),
    'pruned_model_path': lambda path, key: initial(path, 'pruned_model_path', key),
    'weights': read_weights,
}


@pytest.mark.parametrize('opener', OPENERS)
def test_a_key_refuses_every_model_file_without_encryption(tmp_path, cheap_scrypt, opener):
    plain, encrypted = save_toy(tmp_path/'plain.tlt'), save_toy(tmp_path/'encrypted.tlt', KEY)
    read = OPENERS[opener]
    assert 'not encrypted, but a key was given' in refused(lambda: read(plain, KEY), WrongKeyError)
    assert 'another key' in refused(lambda: read(encrypted, 'guess'), WrongKeyError)
    assert read(plain, '') and read(encrypted, KEY)


def test_a_key_refuses_every_exported_file_without_encryption(tmp_path, cheap_scrypt):
    save_etlt(tmp_path/'plain.etlt', ONNX)
    (tmp_path/'replaced.etlt').write_bytes(ONNX)
    (tmp_path/'model.onnx').write_bytes(ONNX)
    save_etlt(tmp_path/'encrypted.etlt', ONNX, KEY)
    for name in ('plain.etlt', 'replaced.etlt'):
        assert 'not encrypted' in refused(lambda: load_onnx_bytes(tmp_path/name, KEY), WrongKeyError)
        assert load_onnx_bytes(tmp_path/name) == ONNX
    assert load_onnx_bytes(tmp_path/'encrypted.etlt', KEY) == load_onnx_bytes(tmp_path/'model.onnx', KEY) == ONNX


def test_a_key_refuses_foreign_weights_that_are_named_like_a_model_file(tmp_path):
    with h5py.File(tmp_path/'theirs.tlt', 'w') as h5: h5['class_net/class-predict/bias:0'] = np.zeros(36, 'f4')
    (tmp_path/'theirs.h5').write_bytes((tmp_path/'theirs.tlt').read_bytes())
    assert 'not encrypted' in refused(lambda: read_weights(tmp_path/'theirs.tlt', KEY), WrongKeyError)
    assert read_weights(tmp_path/'theirs.tlt').arrays and read_weights(tmp_path/'theirs.h5', KEY).arrays


# --- where keys come from, and where they do not go

@pytest.fixture
def no_key(monkeypatch):
    for name in ('EFFDET_KEY', 'EFFDET_KEY_FILE'): monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize('text, key', [(b'tlt_encode\n', 'tlt_encode'), (b'two words\r\nmore', 'two words'),
                                       ('gr\u00fcn'.encode(), 'gr\u00fcn'), (b'\xff\xfe', '\udcff\udcfe')])
def test_a_key_can_be_in_a_file(tmp_path, no_key, text, key):
    (tmp_path/'key').write_bytes(text)
    no_key.setenv('EFFDET_KEY_FILE', str(tmp_path/'key'))
    assert resolve_key() == key and resolve_key('typed') == 'typed'
    assert decrypt(encrypt(b'model', key), resolve_key()) == b'model'
    no_key.setenv('EFFDET_KEY', 'from the variable')
    assert resolve_key() == 'from the variable'


def test_an_unusable_key_is_refused(tmp_path, no_key):
    for key in (' ', '\t \n', '\u00a0'):
        with pytest.raises(ValueError, match='blanks only'): resolve_key(key)
    with pytest.raises(ValueError, match='not a character'): resolve_key('a\ud800')
    (tmp_path/'empty').write_text('\nkey')
    for name, words in (('empty', 'first line is empty'), ('none', 'no such file'), ('.', 'is a folder')):
        no_key.setenv('EFFDET_KEY_FILE', str(tmp_path/name))
        with pytest.raises((ValueError, OSError), match=words): resolve_key()


@given(st.text(max_size=8), st.text(st.characters(exclude_categories=['Cs']), max_size=60))
def test_masked_messages_stay_readable(secret, text):
    masked = mask_secrets(text, [secret])
    if len(secret) > 5 and not secret.isspace(): assert '*' in secret or secret not in masked
    if not secret.strip() or secret not in text: assert masked == text


@pytest.mark.parametrize('key, message, shown', [
    (' ', 'x.tlt: no such file', 'x.tlt: no such file'), ('t', 'the key t, not it', 'the key ***, not it'),
    ('nvidia_tlt', 'a/nvidia_tlt/b', 'a/***/b'), ('tlt', 'model.tltx tlt', 'model.tltx ***')])
def test_errors_hide_the_key_and_nothing_else(key, message, shown):
    assert format_error('effdet_train', ValueError(message), key) == f'effdet_train: error: {shown}'
    assert to_jsonable([message], [key]) == [shown]


def test_a_key_on_the_command_line_is_noted_once(no_key, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['effdet_probe'])

    @command
    def effdet_probe(key: Option('Key', '-k') = None): return repr(key)

    for argv, num_notes, shown in ((['-k', 'word'], 1, "'word'"), ([], 0, "''")):
        monkeypatch.setattr('sys.argv', ['effdet_probe', *argv])
        effdet_probe(**parse_options(effdet_probe, argv, 'effdet_probe'))
        out, err = capsys.readouterr()
        assert out.strip() == shown and err.count('EFFDET_KEY_FILE') == num_notes and 'word' not in err


# --- the header of an encrypted file

@pytest.mark.parametrize('costs', [(16, 8, 1), (18, 16, 4), (15, 9, 1), (15, 8, 2), (9, 8, 1), (15, 0, 1),
                                   (255, 255, 255)])
def test_a_header_that_asks_for_more_than_is_written_is_refused_at_once(costs):
    fields = list(HEADER_STRUCT.unpack(encrypt(b'text', KEY)[:60]))
    fields[2:5] = costs
    body = HEADER_STRUCT.pack(*fields)
    with seconds(1):
        message = refused(lambda: decrypt(body+crc32(body).to_bytes(4, 'little')+bytes(20), KEY), DamagedFileError)
    assert 'more than this package writes' in message


def test_what_is_written_is_read():
    assert HEADER_STRUCT.unpack(make_encryption_header(KEY)[0][:60])[2:5] == (15, 8, 1)
    assert decrypt(encrypt(b'text', KEY), KEY) == b'text'


# --- the members of the zip

@pytest.mark.parametrize('name', ['meta.json', 'weights/box-predict/pointwise_kernel.npy'])
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_members_of_one_name_are_refused(tmp_path, name):
    path = save_toy(tmp_path/'m.tlt')
    with zipfile.ZipFile(path, 'a') as z: z.writestr(name, z.read(name))
    assert f'has 2 members named {name}' in refused(lambda: load_model_file(path), DamagedFileError)


KERNEL = 'weights/box-predict/pointwise_kernel.npy'
NPY_START = b'\x93NUMPY\x01\x00'


def npy_with_header(text, data=b''): return NPY_START + struct.pack('<H', len(text)) + text + data


@pytest.mark.parametrize('member', [
    npy_with_header(b'['*40 + b']'*40 + b'\n', bytes(4000)),
    npy_with_header(b'{"descr": ' + b'('*60000 + b'\n', bytes(4000)),
    npy_with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 24, 10000000000), }\n", bytes(4000)),
    npy_with_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 24, 36), }\n", bytes(4000)),
    npy_with_header(b"{'descr': '<f4', 'fortran_order': 9**9**9, 'shape': (1, 1, 24, 36), }\n", bytes(4000)),
    b'\x93NUMPY\x03\x00' + bytes(4000),
    bytes(4000),
    npy(np.zeros((1, 1, 24, 36), 'f8')),
])
def test_headers_of_arrays_are_compared_before_they_are_parsed(tmp_path, member):
    path = repacked(save_toy(tmp_path/'m.tlt'), {KERNEL: member})
    with seconds(10): refused(lambda: load_model_file(path), DamagedFileError)


@pytest.mark.parametrize('listed', [
    ['<f4', [1, 1, 24, 10**12]], ['<f4', [-1, 24]], ['<f4', [1.0]], ['|O', [3]], ['<f4'], 'text', None, [['<f4'], [3]],
    ['<f4', [1]*10**5], ['<f4', [True, 24]], ['V10', [24]], [{}, []],
])
def test_listed_types_and_shapes_are_checked(tmp_path, listed):
    path = save_toy(tmp_path/'m.tlt')
    with zipfile.ZipFile(path) as z: manifest = json.loads(z.read('meta.json'))
    manifest['arrays']['weights']['box-predict/pointwise_kernel'] = listed
    path = repacked(path, {'meta.json': json.dumps(manifest).encode()})
    with seconds(10): refused(lambda: read_meta(path), DamagedFileError)


@pytest.mark.parametrize('meta', [b'['*10**6, b'{"format": 1, "meta": ' + b'9'*10**6 + b'}', b'{"format": 1e999}',
                                  b'{"format": 1, "meta": [], "arrays": {"weights": {}, "ema": {}, "optimizer": {}}}'])
def test_metadata_that_is_not_metadata_is_refused(tmp_path, meta):
    path = save_model_file(tmp_path/'m.tlt', {}, {})
    with seconds(10): refused(lambda: load_model_file(repacked(path, {'meta.json': meta})))


# --- the description of the network

WRONG_ARCH = [
    ('a list', lambda arch: list(arch)),
    ('no dict', lambda arch: 'efficientdet-d0'),
    ('absent', lambda arch: None),
    *[(f'{key}={str(value)[:20]}', lambda arch, key=key, value=value: arch | {key: value}) for key, value in [
        ('depth', 3), ('__class__', 'x'), ('name', 3), ('name', 'efficientdet-d99'), ('name', 'x'*10**6),
        ('image_hw', [0, 128]), ('image_hw', [10**9, 10**9]), ('image_hw', [128]), ('image_hw', '128,128'),
        ('image_hw', [128.5, 128]), ('image_hw', {'h': 1}), ('num_classes', 10**9), ('num_classes', 0),
        ('num_classes', -1), ('num_classes', '4'), ('num_classes', True), ('num_classes', 99_999), ('aspects', []),
        ('aspects', [[1, 0]]), ('aspects', [1, 2]), ('aspects', [[1, 1]]*10**5), ('num_scales', 0),
        ('num_scales', 10**6),
        ('anchor_scale', -1), ('anchor_scale', float('nan')), ('anchor_scale', 'big'), ('mean_rgb', [1]*10**5),
        ('std_rgb', [0, 0, 0]), ('std_rgb', [float('inf')]*3), ('widths', []), ('widths', {'stem_conv': 10**9}),
        ('widths', {'stem_conv': 0}), ('widths', {'stem_conv': 24}), ('max_level', 99), ('channels', 2),
        ('channels', 10**9), ('last_adds', 'no')]],
]


@pytest.mark.parametrize('change', [c for _, c in WRONG_ARCH], ids=[name for name, _ in WRONG_ARCH])
def test_a_wrong_architecture_is_refused_before_it_is_built(tmp_path, change):
    path = save_toy(tmp_path/'m.tlt', arch=change(arch_to_dict(ARCH)))
    with seconds(10): message = refused(lambda: load_model_file(path).arch, DamagedFileError)
    assert str(path) in message and len(message) < len(str(path))+400


@pytest.mark.parametrize('classes', [
    None, [], dict(ids=[], names=[], num_classes=4), dict(ids=[1, 2], names=['a'], num_classes=4),
    dict(ids=[1, 1], names=['a', 'b'], num_classes=4), dict(ids=[2, 1], names=['a', 'b'], num_classes=4),
    dict(ids=[1], names=[3], num_classes=4), dict(ids=['1'], names=['a'], num_classes=4),
    dict(ids=[1, 2], names=['a', 'b'], num_classes=1), dict(ids=[1], names=['a'], num_classes=10**9),
    dict(ids=[1], names=['a'], num_classes='4'), dict(ids=[10**400], names=['a'], num_classes=4), dict(ids=[1]),
])
def test_a_wrong_class_table_is_refused(tmp_path, classes):
    path = save_toy(tmp_path/'m.tlt', classes=classes)
    with seconds(10): assert 'classes' in refused(lambda: load_model_file(path).classes, DamagedFileError)


def test_a_right_description_is_read(tmp_path):
    stored = load_model_file(save_toy(tmp_path/'m.tlt'))
    assert stored.arch == ARCH and stored.classes == CLASSES


# --- HDF5

def h5_refused(path, words):
    with seconds(10), pytest.raises(WeightsError, match=words) as e: read_h5(path)
    assert str(path) in str(e.value)


def test_an_h5_file_reads_no_other_file(tmp_path):
    (tmp_path/'secret').write_bytes(b'a secret of someone else'*100)
    for name in ('external', 'virtual', 'link', 'soft'):
        with h5py.File(tmp_path/f'{name}.h5', 'w') as h5:
            group = h5.create_group('class_net/class-predict')
            if name == 'external':
                group.create_dataset('bias:0', (36,), 'f4', external=[(str(tmp_path/'secret'), 0, 144)])
            if name == 'virtual':
                layout = h5py.VirtualLayout((36,), 'f4')
                layout[:] = h5py.VirtualSource(str(tmp_path/'other.h5'), 'x', (36,))
                group.create_virtual_dataset('bias:0', layout)
            if name == 'link': group['bias:0'] = h5py.ExternalLink(str(tmp_path/'other.h5'), '/x')
            if name == 'soft': group['bias:0'] = h5py.SoftLink('/somewhere')
        h5_refused(tmp_path/f'{name}.h5', 'refers to another place')


def test_an_h5_file_is_not_larger_than_it_is(tmp_path):
    for name, shape, options in (('chunks', (10**9,), dict(chunks=(10**4,))), ('fill', (3, 10**8), {}),
                                 ('gzip', (10**8,), dict(compression='gzip', chunks=(10**6,)))):
        with h5py.File(tmp_path/f'{name}.h5', 'w') as h5: h5.create_dataset('class_net/bias:0', shape, 'f4', **options)
        assert (tmp_path/f'{name}.h5').stat().st_size < 10**5
        h5_refused(tmp_path/f'{name}.h5', 'would expand to')
    with h5py.File(tmp_path/'text.h5', 'w') as h5: h5['class_net/names'] = ['a', 'b']
    h5_refused(tmp_path/'text.h5', 'does not contain numbers')


@pytest.mark.parametrize('seed', range(3))
def test_damaged_h5_files_are_read_or_refused(tmp_path, seed):
    numbers = np.random.default_rng(0).normal(size=(5, 3, 3, 4)).astype('f4')
    with h5py.File(tmp_path/'m.h5', 'w') as h5:
        for i in range(5): h5[f'class_net/class-{i}/kernel:0'] = numbers[i]
    good, rng = (tmp_path/'m.h5').read_bytes(), np.random.default_rng(seed)
    for _ in range(60):
        bad = bytearray(good)
        for i in rng.choice(len(bad), 3): bad[i] ^= 1 << int(rng.integers(8))
        (tmp_path/'bad.h5').write_bytes(bad)
        with seconds(20):
            try: read_h5(tmp_path/'bad.h5')
            except WeightsError: pass


def test_import_encrypts_a_plain_model(tmp_path, cheap_scrypt):
    "The key of an import is for the file that is written; its input comes from elsewhere."
    from effdet_nb.detector.efficientdet import build
    from effdet_nb.weights.model_file import save_detector
    plain = save_detector(tmp_path/'plain.tlt', build(ARCH), ARCH, CLASSES)
    import_weights(plain, tmp_path/'encrypted.tlt', KEY)
    assert load_model_file(tmp_path/'encrypted.tlt', KEY).classes == CLASSES


# --- many damaged files

def flip(data, rng, num_bits):
    bad = bytearray(data)
    for i in rng.choice(len(bad), num_bits): bad[i] ^= 1 << int(rng.integers(8))
    return bytes(bad)


def check_flipped(path, key, seed, count):
    "Flips bits of a model file: what is read is what was written, everything else is one of this package's errors."
    good, rng, original = path.read_bytes(), np.random.default_rng(seed), load_model_file(path, key)
    for _ in range(count):
        path.with_name('bad.tlt').write_bytes(flip(good, rng, int(rng.integers(1, 4))))
        with seconds(10):
            try: stored = load_model_file(path.with_name('bad.tlt'), key)
            except ModelFileError: continue
            assert not key
            try: stored.arch, stored.classes   # noqa: B018
            except ModelFileError: continue
        for name, a in original.weights.items(): assert np.array_equal(stored.weights[name], a)


@pytest.mark.parametrize('key', ['', KEY])
def test_flipped_bits_of_model_files_never_give_other_weights(tmp_path, cheap_scrypt, key):
    check_flipped(save_toy(tmp_path/'m.tlt', key), key, seed=0, count=250)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['', KEY])
def test_ten_thousand_flipped_bits_of_model_files(tmp_path, cheap_scrypt, key):
    small = {name: a[..., :8] for name, a in heads().items()}     # more of the file is names and numbers
    check_flipped(save_toy(tmp_path/'m.tlt', key, small), key, seed=1, count=5000)


# --- specs

WORDS = ('training_config', 'model_config', 'dataset_config', 'eval_config', 'amp', 'num_epochs', 'model_name',
         'image_size', 'learning_rate', 'aspect_ratios', 'freeze_blocks', 'skip_checkpoint_variables', '{', '}',
         '<', '>', '[', ']', ':', ',', ';', '"', "'", '\\', '#', '\n', '\r', '\t', '\0', '\ufeff', 'é', '\U0001f40d',
         '-', '1e999', 'nan', '0x10', '99999999999', '"512,512"', 'True', '(' * 50, 'a{9999999999}', '(a+)+$')
SPEC_TEXT = '''# a comment
dataset_config { num_classes: 4 image_size: "128,256" training_file_pattern: 'records/train*' }
training_config {
  num_epochs: 3  # another
  learning_rate: 0.08, skip_checkpoint_variables: "-predict*"
}
model_config < model_name: "efficientdet-d0" aspect_ratios: "[(1.0, 1.0)]" freeze_blocks: "[0, 1]" >
'''


def mutate(text, rng):
    "A text with one to eight random changes: characters deleted, words inserted, parts repeated or exchanged."
    for _ in range(int(rng.integers(1, 9))):
        i, j = sorted(int(k) for k in rng.integers(0, len(text)+1, 2))
        kind = int(rng.integers(5))
        if kind == 0: text = text[:i]+text[i+1:]
        elif kind == 1: text = text[:i]+str(rng.choice(WORDS))+text[i:]
        elif kind == 2: text = text[:i]+text[j:]
        elif kind == 3: text = text[:i]+text[i:j]*int(rng.integers(2, 4))+text[j:]
        else: text = text[:i]+chr(int(rng.integers(1, 0x3000)))+text[i+1:]
    return text


def check_mutated_specs(seed, count):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = mutate(SPEC_TEXT, rng)
        with seconds(10), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: Spec.parse(text, 's.txt').problems('train')
            except SpecError as e: assert e.problems and len(str(e)) < 50_000, text


def test_mutated_specs_are_read_or_refused(): check_mutated_specs(0, 400)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 5))
def test_twenty_thousand_mutated_specs(seed): check_mutated_specs(seed, 5000)


LONG_SPECS = {
    'fields in one line': lambda n: 'training_config { '+'amp: True '*(n//10)+'}',
    'values': lambda n: 'training_config { '+''.join(f'num_epochs: {i} ' for i in range(n//18))+'}',
    'unknown fields': lambda n: 'training_config { '+''.join(f'f{i}: 1 ' for i in range(n//10))+'}',
    'unknown sections': lambda n: ''.join(f'f{i} {{}} ' for i in range(n//10)),
    'wrong values': lambda n: 'training_config { '+'amp: 3 '*(n//8)+'}',
    'quotes': lambda n: 'training_config { checkpoint: '+'"'*n+' }',
    'backslashes': lambda n: 'training_config { checkpoint: "'+'\\'*n+'" }',
    'brackets': lambda n: 'training_config { checkpoint: '+'['*n+' }',
    'minus signs': lambda n: 'training_config { learning_rate: '+'-'*n+' }',
    'one name': lambda n: 'training_config { '+'a'*n+': 1 }',
    'one path': lambda n: 'training_config { checkpoint: "'+'a'*n+'" }',
    'digits': lambda n: 'training_config { num_epochs: '+'1'*n+' }',
    'blanks': lambda n: 'training_config { '+' '*n+' }',
    'comments': lambda n: '#\n'*(n//2),
    'nested literal': lambda n: 'model_config { aspect_ratios: "'+'['*n+'" }',
    'size of blanks': lambda n: 'dataset_config { image_size: "'+' '*n+'x" }',
    'long regex': lambda n: 'training_config { skip_checkpoint_variables: "'+'('*n+'" }',
}


@pytest.mark.parametrize('kind', LONG_SPECS)
def test_the_longest_specs_are_read_in_seconds(kind):
    text = LONG_SPECS[kind](MAX_SPEC_SIZE-100)
    with seconds(20), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: Spec.parse(text, 's.txt').problems()
        except SpecError as e: assert len(str(e)) < 50_000
    with pytest.raises(SpecError, match='but a spec has at most'): Spec.parse(text*2)


def test_a_long_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path/'spec.txt', 'wb') as f: f.truncate(2**36)     # 64 GB of zeros that are not stored
    with seconds(1), pytest.raises(SpecError, match='but a spec has at most'): Spec.load(tmp_path/'spec.txt')


@pytest.mark.parametrize('pattern', ['a{4294967296}', 'a{1,99999999999999999999}', '('*10_000, '(', '[z-a]', '*',
                                     '(?P<'])
def test_patterns_that_cannot_be_compiled_are_refused(pattern):
    problems = Spec().replace(training_config=dict(skip_checkpoint_variables=pattern)).problems()
    assert len(problems) == 1 and 'is not a regular expression' in problems[0] and len(problems[0]) < 600


@pytest.mark.parametrize('pattern', ['(a+)+$', '(a|aa)+$', '(a*a*)*b?!!'])
def test_patterns_that_never_end_are_stopped(monkeypatch, pattern):
    names = ['a'*60+'!', 'stem_conv/kernel']
    assert matching_names('stem', names) == names[1:]
    monkeypatch.setattr(pretrained, 'MATCH_SECONDS', 1)
    with pytest.raises(WeightsError, match='without a result'): matching_names(pattern, names)


# --- records

RECORD = {'image/encoded': b'x', 'image/height': 96, 'image/width': 128, 'image/object/class/label': [1],
          'image/object/bbox/ymin': [.1], 'image/object/bbox/xmin': [.1], 'image/object/bbox/ymax': [.5],
          'image/object/bbox/xmax': [.5]}


@pytest.mark.parametrize('key, value', [
    ('image/object/bbox/ymax', np.nan), ('image/object/bbox/xmin', np.inf), ('image/object/bbox/ymin', -np.inf),
    ('image/object/bbox/xmax', 3e38), ('image/object/area', np.nan), ('image/object/area', np.inf), ('image/height', 0),
    ('image/width', -128), ('image/height', 2**40),
])
def test_records_with_impossible_numbers_are_damaged(key, value):
    assert len(decode_example(make_example(RECORD))['boxes']) == 1
    bad = make_example(RECORD | {key: [value]})
    with pytest.raises(ValueError, match=f'record 3: {key}'): decode_example(bad, 'record 3')


@pytest.mark.parametrize('key', ['image/height', 'image/encoded', 'image/object/class/label', 'image/object/bbox/ymin',
                                 'image/source_id'])
@pytest.mark.parametrize('other', ['bytes_list', 'float_list', 'int64_list'])
def test_records_with_values_of_another_type_are_damaged(key, other):
    example = example_class().FromString(make_example(RECORD | {'image/source_id': 'i'}))
    feature = example.features.feature[key]
    if feature.WhichOneof('kind') == other: return
    feature.Clear()
    getattr(feature, other).value.append(dict(bytes_list=b'1', float_list=1.5, int64_list=1)[other])
    with pytest.raises(ValueError, match=f'{key} has values of type'): decode_example(example.SerializeToString())


def test_a_damaged_record_is_skipped_or_named(tmp_path):
    bad = make_example(RECORD | {'image/object/bbox/ymax': [np.nan]})
    write_records(tmp_path/'train-00000-of-00001', [make_example(RECORD), bad])
    records = Records.from_files([tmp_path/'train-00000-of-00001'])
    with pytest.raises(CorruptRecord, match='record 1: image/object/bbox/ymax of object 0 is nan'):
        read_training_example(records, 1, CLASSES)
    check = check_records(DataConfig(training_file_pattern=str(tmp_path/'train-*'), num_classes=4))
    assert any('1 of 2 records is damaged' in p.message for p in check.errors)


def test_a_spec_without_records_is_a_problem():
    check = check_records(DataConfig())
    assert len(check.errors) == 1 and 'names no records' in str(check)


# --- what is installed

def test_requirements_have_upper_bounds_and_admit_what_is_installed():
    config = ConfigParser(delimiters=['='])
    config.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
    requirements = [Requirement(text) for text in shlex.split(config['DEFAULT']['requirements'])]
    for r in requirements:
        assert any(s.operator in ('<', '==') for s in r.specifier), f'{r} has no upper bound'
        assert r.specifier.contains(version(r.name)), f'{r}: {version(r.name)} is installed'
    bounds = {r.name: r.specifier for r in requirements}
    vulnerable = ('pillow', '12.2.0'), ('pillow', '11.2.1'), ('cryptography', '46.0.4'), ('protobuf', '6.33.4')
    for name, old in vulnerable: assert not bounds[name].contains(old)


# --- metadata of exported files

def exported_meta(**changes):
    arch = dict(name='efficientdet-tiny', image_hw=[128, 128], num_classes=4, aspects=[[1., 1.]], num_scales=1,
                anchor_scale=4., max_level=7)
    return dict(arch=arch, classes=CLASSES.to_dict(), batch_size=None, nms=dict(kind='none')) | changes


@pytest.mark.parametrize('changes', [
    dict(arch=None), dict(arch=[]), dict(arch=dict(name='x')), dict(classes={}), dict(nms=None), dict(nms='onnx'),
    dict(nms=dict(kind='onnx', top_k=10**30)), dict(nms=dict(kind='onnx', magic=1)), dict(batch_size=0),
    dict(nms=dict(kind='onnx', score_threshold='low')), dict(nms=dict(kind='onnx', iou_threshold=float('nan'))),
    dict(batch_size='4'), dict(batch_size=10**9), dict(max_batch_size=-1), dict(batch_size=True),
    dict(input=7), dict(input=dict(padding='grey')), dict(input=dict(padding=[0, 0])),
    dict(input=dict(padding=[0, 0, 256])),
    dict(input=dict(padding=[1.5]*3)), dict(data_type=16), dict(version=[1]), dict(opset='17'), dict(step=[4]),
    dict(step='4'),
    dict(epoch='two'), dict(epoch=float('nan')),
])
def test_impossible_metadata_of_exported_files_is_refused(changes):
    check_metadata(exported_meta(), 'm.onnx')
    with seconds(5), pytest.raises(ValueError, match='m.onnx: its'): check_metadata(exported_meta(**changes), 'm.onnx')


@pytest.mark.parametrize('text', ['{', '['*10**5, '', b'\xff', '1'*10**5, 'nul'])
def test_metadata_that_is_not_json_is_refused(text):
    with seconds(5), pytest.raises(ValueError, match='m.onnx: its metadata is not'): parse_metadata(text, 'm.onnx')


@pytest.mark.parametrize('text', ['{', '['*10**5, '', '[1]', '"arch"', '1'*10**5])
def test_metadata_of_an_onnx_model_that_is_no_json_object_is_refused(text):
    proto = onnx.ModelProto()
    proto.metadata_props.add(key='effdet_nb', value=text)
    with seconds(5), pytest.raises(ValueError, match='no JSON object'): get_metadata(proto)


@pytest.mark.parametrize('pruning', [
    [], 'max', dict(norms=[]), dict(norms={'a': 1}), dict(norms={'a': ['b']}), dict(norms={'a': [2.]}),
    dict(norms={'a': [-1.]}), dict(norms={'a': [float('nan')]}), dict(normalizer=1), dict(criterion=['union']),
])
def test_a_forged_record_of_a_pruning_is_refused(tmp_path, pruning):
    path = save_toy(tmp_path/'m.tlt', kind='pruned', pruning=pruning)
    with seconds(10): assert 'pruning' in refused(lambda: load_model_file(path), DamagedFileError)


def test_norms_that_a_record_of_a_pruning_lacks_are_computed(tmp_path):
    graph = SimpleNamespace(sizes={'a': 2})
    rules = dict(normalizer='max', criterion='union')
    for norms, expected in [({'a': [.5, 1.]}, [.5, 1.]), ({'a': [1.]}, None), ({'b': [1., 1.]}, None), (None, None)]:
        pruning = rules if norms is None else rules | dict(norms=norms)
        found = saved_norms(ModelFile(dict(kind='pruned', pruning=pruning)), graph, 'max', 'union')
        assert (found and found['a'].tolist()) == expected


@pytest.mark.parametrize('section, name, value', [
    ('model_config', 'num_scales', 4_000_000_000), ('dataset_config', 'num_classes', 4_000_000_000),
    ('dataset_config', 'image_size', '999999,999999'), ('dataset_config', 'max_instances_per_image', 4_000_000_000)])
def test_a_spec_of_a_network_that_cannot_be_built_is_refused(tmp_path, section, name, value):
    spec = Spec().replace(**{section: {name: value}})
    with seconds(5), pytest.raises(SpecError, match=f'{section}.{name}'): check_dataset(spec)
