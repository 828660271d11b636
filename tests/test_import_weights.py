"Imported weights: each reader reads a file written here in the real format, and bad files are refused."

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import h5py
import keras
from pathlib import Path
import numpy as np
import pytest

from effdet_nb.weights import keras_applications
from effdet_nb.weights.import_weights import default_class_table, import_weights
from effdet_nb.weights.name_map import source_names
from effdet_nb.weights.pretrained import WeightsError, load_pretrained, match_preprocessing, matching_variants
from effdet_nb.weights.read_weights import plain_variable_name, read_weights
from effdet_nb.weights.model_file import load_keras_model, save_detector, weights_by_path
from effdet_nb.detector.efficientdet import Arch, build

HW = (128, 128)
ARCH = Arch(image_hw=HW, num_classes=90)


def write_tf1(prefix, arrays):
    import tensorflow.compat.v1 as tf1

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tf1.Graph().as_default(), tf1.Session() as session:
        variables = {n: tf1.get_variable(f'v{i}', initializer=a) for i, (n, a) in enumerate(arrays.items())}
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver(variables).save(session, str(prefix))
    return prefix


def write_tf2(prefix, arrays):
    "An object-graph checkpoint: a tree of trackable objects, as a Keras 2 model's `save_weights` writes it."
    import tensorflow as tf

    tree = {}
    for name, a in arrays.items():
        *way, last = name.split('/')
        here = tree
        for part in way:
            here = here.setdefault(part, {})
        here[last] = tf.Variable(a)

    def checkpoint(node):
        if not isinstance(node, dict): return node
        return tf.train.Checkpoint(**{name: checkpoint(child) for name, child in node.items()})

    checkpoint(tree).write(str(prefix))
    return prefix


@pytest.fixture(scope='module')
def reference(shared_dir):
    "Google's D0 with random weights, by google's names."
    data = np.load(shared_dir / 'oracle' / 'd0_weights.npz', allow_pickle=False)
    return {k.replace('|', '/'): data[k] for k in data.files}


@pytest.fixture(scope='module')
def model():
    return build(ARCH)


@pytest.fixture(scope='module')
def tf1(reference, tmp_path_factory):
    "The published kind: averages beside the last values, optimizer slots, a step counter."
    rng = np.random.default_rng(0)
    arrays = {'global_step': np.int64(300)}
    for n, a in reference.items():
        arrays[n + '/ExponentialMovingAverage'], arrays[n] = a, (a + rng.normal(size=a.shape)).astype('float32')
        if n.startswith('box_net'):
            arrays[n + '/Momentum'] = np.zeros_like(a)
    return write_tf1(tmp_path_factory.mktemp('published') / 'efficientdet-d0' / 'model', arrays)


def ours_of(reference):
    "The reference's arrays by our names."
    got = {}
    for path in weights_by_path(build(ARCH)):
        parts = [reference[re.sub('^backbone', 'efficientnet-b0', n)] for n in source_names(path, ARCH, 'google')]
        got[path] = np.stack(parts) if len(parts) > 1 else parts[0]
    return got


def same_weights(model, wanted):
    for w in model.weights:
        np.testing.assert_array_equal(np.array(w).ravel(), np.ravel(wanted[w.path]), err_msg=w.path)


# --- names


def test_every_key_of_a_published_checkpoint_is_understood(shared_dir):
    names = [n for n, _ in json.loads((shared_dir / 'oracle' / 'variables_d0_tf1_ckpt.json').read_text())]
    plain = {n: plain_variable_name(n) for n in names}
    assert [n for n, p in plain.items() if p is None] == ['global_step']
    assert sum(p[1] for p in plain.values() if p) == 709


# --- google's formats, and the forward pass on them


def check_reference(weights, model, reference, kind):
    assert weights.description.startswith(kind) and matching_variants(weights) == ['efficientdet-d0']
    report = load_pretrained(model, weights, ARCH)
    assert not report.missing and not report.unexpected and len(report.loaded) == len(model.weights)
    same_weights(model, ours_of(reference))


@pytest.mark.slow
def test_a_tf1_checkpoint_by_prefix_folder_and_archive(reference, tf1, model, tmp_path):
    check_reference(read_weights(tf1), model, reference, 'TensorFlow 1')
    for path in (tf1.parent, f'{tf1}.index', f'{tf1}.data-00000-of-00001'):
        assert set(read_weights(path).arrays) == set(read_weights(tf1).arrays)
    with tarfile.open(tmp_path / 'd0.tar.gz', 'w:gz') as t:
        t.add(tf1.parent, 'efficientdet-d0')
    check_reference(read_weights(tmp_path / 'd0.tar.gz'), model, reference, 'TensorFlow 1')


def test_a_tf2_checkpoint(shared_dir, reference, model, tmp_path):
    graph = {}
    for w in model.weights:
        for google, key in zip(source_names(w.path, ARCH, 'google'), source_names(w.path, ARCH, 'graph')):
            graph[key] = reference[re.sub('^backbone', 'efficientnet-b0', google)]
    prefix = write_tf2(tmp_path / 'ckpt-7', graph)
    import tensorflow as tf

    keys = set(tf.train.load_checkpoint(str(prefix)).get_variable_to_shape_map())
    assert keys == {
        n for n, _ in json.loads((shared_dir / 'oracle' / 'tf2_ckpt_keys_d0.json').read_text())
    }  # the real format
    check_reference(read_weights(prefix), model, reference, 'TensorFlow 2')


@pytest.mark.slow
def test_a_keras_2_file_of_automl(reference, model, tmp_path):
    with h5py.File(tmp_path / 'd0.h5', 'w') as f:
        for n, a in reference.items():
            f[f'{n.split("/")[0]}/{n}:0'] = a
    check_reference(read_weights(tmp_path / 'd0.h5'), model, reference, 'Keras 2')


def test_the_forward_pass_on_imported_weights_equals_the_reference(shared_dir, tf1, tmp_path):
    import_weights(tf1, tmp_path / 'd0.tlt', 'a key')
    model, arch, stored = load_keras_model(tmp_path / 'd0.tlt', 'a key')
    assert arch == Arch() and stored.meta['classes']['names'][0] == 'person'
    ref = np.load(shared_dir / 'oracle' / 'd0_forward_512.npz', allow_pickle=False)
    image = ref[[k for k in ref.files if ref[k].dtype == np.uint8][0]].reshape(1, 512, 512, 3)
    out, start = model(image), 0
    for level, n, stride in zip(range(3, 8), (64, 32, 16, 8, 4), (7, 5, 1, 1, 1)):
        for name, key, c in (('class', 'cls_logits', 90), ('box', 'box_deltas', 4)):
            ours = np.array(out[key])[0, start : start + n * n * 9].reshape(1, n, n, 9 * c)
            np.testing.assert_allclose(
                ours[:, ::stride, ::stride].reshape(ref[f'{name}_{level}'].shape),
                ref[f'{name}_{level}'],
                atol=2e-4,
                err_msg=f'{name} of P{level}',
            )
            got = [ours.mean(), np.abs(ours).mean(), ours.std()]
            want = ref[f'stats_{level}']
            np.testing.assert_allclose(
                got, want[:3] if name == 'class' else want[3:6], atol=1e-4, err_msg=f'{name} of P{level}, all of it'
            )
        start += n * n * 9


# --- TAO


def test_a_tao_checkpoint_in_a_zip(model, tmp_path):
    wanted = {
        p: np.random.default_rng(i).normal(size=a.shape).astype('float32')
        for i, (p, a) in enumerate(weights_by_path(model).items())
    }
    arrays = {n: a for p, a in wanted.items() for n in source_names(p, ARCH, 'tao')}
    assert (
        'block2b_dwconv/depthwise_kernel' in arrays
        and 'bifpn0_1_7_0/kernel' in arrays
        and 'weighted_fusion_7_2/weighted_fusion_7_2' in arrays
    )
    arrays |= {'top_conv/kernel': np.zeros((1, 1, 320, 8), 'float32'), 'global_step': np.int64(9)}
    prefix = write_tf1(tmp_path / 'c' / 'model.ckpt-9', arrays)
    with zipfile.ZipFile(tmp_path / 'model.epoch-9.tlt', 'w') as z:
        for p in prefix.parent.iterdir():
            z.write(p, p.name)
    import_weights(tmp_path / 'model.epoch-9.tlt', tmp_path / 'ours.tlt', image_hw=(128, 128))
    imported, arch, _ = load_keras_model(tmp_path / 'ours.tlt')
    same_weights(imported, wanted)
    assert arch.std_rgb == (255 * 0.224,) * 3 and not arch.residual_last_block


def test_taos_p5_of_d1_is_taken_before_the_addition():
    with_tap = build(Arch('d1', HW, 3, residual_last_block=False))
    assert 'block7b_add' not in {l.name for l in with_tap.layers} and 'block7a_project_bn' in {
        l.name for l in with_tap.layers
    }
    assert with_tap.get_layer('block7b_project_bn').output is with_tap.get_layer('p6').input


# --- keras.applications


@pytest.fixture(scope='module')
def keras_b0():
    keras.utils.set_random_seed(5)
    net = keras.applications.EfficientNetB0(weights=None, include_top=False, input_shape=(*HW, 3))
    rng = np.random.default_rng(0)
    for w in net.weights:
        if 'moving' in w.path or 'gamma' in w.path:
            w.assign(rng.uniform(0.5, 1.5, w.shape))
    return net


def features_agree(net, arch, weights, atol=2e-3):
    model = build(arch)
    load_pretrained(model, weights, arch)
    image = np.random.default_rng(1).integers(0, 256, (1, *HW, 3)).astype('uint8')
    ours = keras.Model(model.input, model.get_layer('block7a_project_bn').output)(image)
    theirs = keras.Model(net.input, net.get_layer('block7a_project_bn').output)(image.astype('float32'))
    np.testing.assert_allclose(ours, theirs, atol=atol * np.abs(theirs).max())


def slow(name): return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    'name', ['legacy.h5', 'b0.keras', slow('b0.weights.h5'), slow('whole.h5'), slow('renamed.hdf5')]
)
def test_keras_backbones_in_every_format(keras_b0, tmp_path, name):
    if name == 'legacy.h5':
        from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

        with h5py.File(tmp_path / name, 'w') as f:
            save_weights_to_hdf5_group(f, keras_b0)
    elif name in ('b0.weights.h5', 'renamed.hdf5'):
        keras_b0.save_weights(tmp_path / 'b0.weights.h5')
        os.rename(tmp_path / 'b0.weights.h5', tmp_path / name)
    else:
        keras_b0.save(tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert weights.description == 'Keras EfficientNetB0' and weights.num_blocks() == 16
    wanted = {w.path: np.array(w) for w in keras_b0.weights}
    for n, a in weights.arrays.items():
        np.testing.assert_array_equal(a, wanted[n])
    if name == 'b0.keras':
        features_agree(keras_b0, match_preprocessing(ARCH, weights), weights)  # pixels from 0 to 1, like theirs


def test_the_word_imagenet_uses_what_keras_downloads(keras_b0, tmp_path, monkeypatch):
    from keras.src.applications import efficientnet
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    norm = next(l for l in keras_b0.layers if isinstance(l, keras.layers.Normalization))
    old = [np.array(w) for w in norm.weights]
    norm.set_weights(
        [np.float32([0.485, 0.456, 0.406]), np.float32(keras_applications.IMAGENET_STD), *norm.get_weights()[2:]]
    )  # as in the published file
    with h5py.File(tmp_path / 'b0.h5', 'w') as f:
        save_weights_to_hdf5_group(f, keras_b0)
    norm.set_weights(old)
    monkeypatch.setattr(efficientnet.file_utils, 'get_file', lambda *a, **k: str(tmp_path / 'b0.h5'))
    weights = read_weights('imagenet', model_name='efficientdet-d0')
    np.testing.assert_allclose(weights.std_rgb, ARCH.std_rgb, rtol=1e-6)
    theirs = keras.applications.EfficientNetB0(weights='imagenet', include_top=False, input_shape=(*HW, 3))
    features_agree(theirs, match_preprocessing(ARCH, weights), weights)

    def offline(*a, **k):
        raise OSError('no route to host')

    monkeypatch.setattr(efficientnet.file_utils, 'get_file', offline)
    with pytest.raises(WeightsError, match='no route to host.*pass its path'):
        read_weights('imagenet')
    with pytest.raises(WeightsError, match='no ImageNet weights for the backbone of efficientdet-lite3'):
        read_weights('imagenet', model_name='efficientdet-lite3')


@pytest.mark.parametrize(
    'name, b', [('d0', 'B0'), ('d1', 'B1'), ('d2', 'B2'), ('d5', 'B5'), ('d7', 'B6'), ('d7x', 'B7')]
)
def test_imagenet_downloads_the_right_backbone(monkeypatch, name, b):
    asked = []

    class Stop(Exception):
        pass

    for k in keras_applications.KERAS_NUM_BLOCKS:
        monkeypatch.setattr(keras.applications, f'EfficientNet{k}', lambda *a, k=k, **kw: asked.append(k) or 1 / 0)
    with pytest.raises(WeightsError):
        read_weights('imagenet', model_name=name)
    assert asked == [b]


# --- what a run takes over


@pytest.mark.slow
def test_a_backbone_for_another_variant_is_refused(keras_b0, tmp_path):
    keras_b0.save_weights(tmp_path / 'b0.weights.h5')
    d1 = Arch('d1', HW, 4)
    with pytest.raises(WeightsError, match='16 blocks.*efficientdet-d1 has 23'):
        load_pretrained(build(d1), read_weights(tmp_path / 'b0.weights.h5'), d1)


# --- bad input


def untouched(model, act, words):
    before = weights_by_path(model)
    with pytest.raises(ValueError, match=words) as e:
        act()
    assert '\n' not in str(e.value)
    same_weights(model, before)


def test_damaged_checkpoints_are_refused(tf1, model, tmp_path):
    folder = tmp_path / 'c'
    folder.mkdir()
    for p in tf1.parent.iterdir():
        (folder / p.name).write_bytes(p.read_bytes())
    data = folder / 'model.data-00000-of-00001'
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    untouched(model, lambda: load_pretrained(model, read_weights(folder), ARCH), 'cannot be read')
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    data.write_bytes(flipped)
    untouched(model, lambda: load_pretrained(model, read_weights(folder), ARCH), 'cannot be read')
    data.unlink()
    untouched(model, lambda: load_pretrained(model, read_weights(folder), ARCH), 'cannot be read')
    (folder / 'model.index').write_bytes(b'nonsense' * 10)
    with pytest.raises(WeightsError):
        read_weights(folder)
    with pytest.raises(WeightsError, match='no TensorFlow checkpoint found'):
        read_weights(tmp_path)


def member(name, data=b'x', kind=tarfile.REGTYPE, link=''):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    'name, kind, link, words',
    [
        ('../model.index', tarfile.REGTYPE, '', 'outside the target folder'),
        ('/etc/model.index', tarfile.REGTYPE, '', 'outside the target folder'),
        ('model.index', tarfile.SYMTYPE, '/etc/passwd', 'a link or a device'),
    ],
)
def test_archives_that_lead_elsewhere_are_refused(tmp_path, name, kind, link, words):
    with tarfile.open(tmp_path / 'bad.tar.gz', 'w:gz') as t:
        t.addfile(*member(name, b'' if link else b'x', kind, link))
    with pytest.raises(WeightsError, match=words):
        read_weights(tmp_path / 'bad.tar.gz')
    if link:
        return
    with zipfile.ZipFile(tmp_path / 'bad.tlt', 'w') as z:
        z.writestr(name, 'x')
    with pytest.raises(WeightsError, match=words):
        read_weights(tmp_path / 'bad.tlt')
    assert not (tmp_path.parent / 'model.index').exists()


def test_archive_bombs_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.tlt', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('model.ckpt-1.index', 'w') as f:
            for _ in range(300):
                f.write(bytes(2**20))
    with pytest.raises(WeightsError, match='too many for weights'):
        read_weights(tmp_path / 'bomb.tlt')
    lie = tarfile.TarInfo('model.index')
    lie.size = 2**40
    (tmp_path / 'bomb.tar').write_bytes(lie.tobuf() + bytes(1024))
    with pytest.raises(WeightsError, match='too many for weights'):
        read_weights(tmp_path / 'bomb.tar')


def test_files_of_another_kind_are_named(tmp_path):
    (tmp_path / 'a.tar.gz').write_bytes(b'\x1f\x8b' + b'rubbish' * 50)
    (tmp_path / 'a.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))
    (tmp_path / 'a.zip').write_bytes(b'PK\x03\x04' + bytes(100))
    for name, words in (
        ('a.tar.gz', 'damaged or truncated'),
        ('a.h5', 'damaged or truncated'),
        ('a.zip', 'damaged or truncated'),
    ):
        with pytest.raises(WeightsError, match=words):
            read_weights(tmp_path / name)
    with h5py.File(tmp_path / 'b.h5', 'w') as f:
        f['dense/kernel:0'] = np.zeros(3)
    with pytest.raises(WeightsError, match='unsupported network'):
        read_weights(tmp_path / 'b.h5')
    with zipfile.ZipFile(tmp_path / 'pruned.tlt', 'w') as z:
        z.writestr('pruned_model.hdf5', 'x')
    with pytest.raises(WeightsError, match='pruned by TAO'):
        read_weights(tmp_path / 'pruned.tlt')
    with pytest.raises(ValueError, match='train again'):
        (tmp_path / 'x.tlt').write_bytes(os.urandom(9000))
        read_weights(tmp_path / 'x.tlt')
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / 'gone.tlt')


@pytest.mark.slow
def test_our_own_file_and_a_pruned_one(model, tmp_path):
    save_detector(tmp_path / 'm.tlt', model, ARCH, default_class_table(90), 'k')
    assert read_weights(tmp_path / 'm.tlt', 'k').arch == ARCH
    narrow = Arch(image_hw=HW, num_classes=90, widths={'stem_conv': 24})
    save_detector(tmp_path / 'p.tlt', build(narrow), narrow, default_class_table(90))
    untouched(model, lambda: load_pretrained(model, read_weights(tmp_path / 'p.tlt'), ARCH), 'pruned_model_path')


# --- the command, and a run


def command(*args):
    return subprocess.run(
        [Path(sys.executable).parent / 'effdet_import', *map(str, args)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_command_reports_what_was_loaded(tf1, tmp_path):
    out = command('-m', tf1.parent, '-o', tmp_path / 'd0.tlt', '--image_size', '128,128', '-k', 'word')
    assert out.returncode == 0, out.stderr
    assert (
        'TensorFlow 1 checkpoint of google/automl' in out.stdout
        and 'efficientdet-d0, 128x128, 90 classes' in out.stdout
        and 'word' not in out.stdout
    )
    assert load_keras_model(tmp_path / 'd0.tlt', 'word')[1] == ARCH
    out = command('-m', tf1.parent, '-o', tmp_path / 'd1.tlt', '--model_name', 'efficientdet-d1')
    assert (
        out.returncode == 1
        and 'backbone has 16 blocks' in out.stderr.strip().splitlines()[-1]
        and not (tmp_path / 'd1.tlt').exists()
    )
