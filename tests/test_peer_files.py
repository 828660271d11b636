"""Files that other projects save, with random weights and batch statistics: read here they give the same answers.

Run by `PEER_PYTHON=another/bin/python pytest tests/test_peer_files.py`, where the other Python has torch, safetensors,
effdet==0.4.1, timm and efficientnet_pytorch==0.7.1. `PEER_ZYLO117=folder` names a checkout of
Yet-Another-EfficientDet-Pytorch for one more comparison."""
import os
import subprocess

import keras
import numpy as np
import pytest

from effdet_nb.detector.efficientdet import Arch, build, get_variant, pixel_mean_std
from effdet_nb.weights.pretrained import load_pretrained, matching_variants
from effdet_nb.weights.read_weights import read_weights

PEER, ZYLO117 = os.environ.get('PEER_PYTHON'), os.environ.get('PEER_ZYLO117')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not PEER, reason='needs another Python with torch, effdet, timm and efficientnet_pytorch, named by PEER_PYTHON')]

CODE = '''
import sys, numpy as np, torch
project, name, path, folder, zylo117 = sys.argv[1:]
x = torch.from_numpy(np.load(folder + '/image.npy')).permute(0, 3, 1, 2)
def nhwc(t): return t.permute(0, 2, 3, 1)
def rows(levels, width): return torch.cat([nhwc(t).reshape(len(t), -1, width) for t in levels], 1)
if project == 'effdet':
    from effdet import EfficientDet, get_efficientdet_config
    config = get_efficientdet_config('tf_efficientdet_' + name)
    config.image_size, config.num_classes = tuple(x.shape[2:]), 3
    model = EfficientDet(config, pretrained_backbone=False)
    def answers(): return dict(zip(('cls', 'box'), (rows(t, n) for t, n in zip(model(x), (3, 4)))))
elif project == 'zylo117':
    sys.path.insert(0, zylo117)
    from backbone import EfficientDetBackbone
    model = EfficientDetBackbone(num_classes=3, compound_coef=int(name[1:]), load_weights=False)
    def answers(): return dict(zip(('box', 'cls'), model(x)[1:3]))
elif project == 'timm':
    import timm
    model = timm.create_model('tf_efficientnet_' + name)
    def answers(): return dict(features=nhwc(model.blocks(model.bn1(model.conv_stem(x)))))
else:
    from efficientnet_pytorch import EfficientNet
    model = EfficientNet.from_name('efficientnet-' + name, image_size=x.shape[2])
    def answers(): return dict(features=nhwc(model.extract_endpoints(x)['reduction_5']))
torch.manual_seed(0)
for key, t in model.state_dict().items():
    if 'running_mean' in key: t.normal_(0, .1)
    if 'running_var' in key: t.uniform_(.7, 1.5)
    if t.dtype.is_floating_point and key.endswith(('edge_weights', '_w1', '_w2')): t.uniform_(.5, 1.5)
    if any(part in key for part in ('predict.conv_pw.w', 'header.pointwise_conv.conv.w')): t.normal_(0, .1)
model.eval()
with torch.no_grad(): np.savez(folder + '/out.npz', **{k: v.numpy() for k, v in answers().items()})
state = model.state_dict()
if path.endswith('.safetensors'):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in state.items()}, path)
else: torch.save(state, path, _use_new_zipfile_serialization=not path.endswith('old.pth'))
'''

# project, its name of the network, the file it saves, our variant
DETECTORS = [('effdet', 'd0', 'new.pth', 'd0'), ('effdet', 'd2', 'd2.safetensors', 'd2'),
             ('effdet', 'lite0', 'old.pth', 'lite0'), ('effdet', 'd6', 'new.pth', 'd6'),
             ('zylo117', 'd0', 'new.pth', 'd0'), ('zylo117', 'd6', 'old.pth', 'd6')]
BACKBONES = [('timm', 'b0', 'b0.safetensors', 'd0'), ('timm', 'lite2', 'new.pth', 'lite2'),
             ('efficientnet_pytorch', 'b0', 'new.pth', 'd0'), ('efficientnet_pytorch', 'b3', 'old.pth', 'd3')]
HEADS = ('_conv_head', '_bn1.', '_fc', 'backbone.conv_head', 'backbone.bn2', 'backbone.classifier')
UNUSED_SUMS = ('_w1', '_w2')      # that port has fusion weights in D6 and D7 too, which do not use them


def saved_by_peer(project, name, file, variant, folder):
    "Lets a peer save a random network; returns ours with the weights of the file, an image, and the peer's answers."
    if project == 'zylo117' and not ZYLO117: pytest.skip('needs a checkout of the project, named by PEER_ZYLO117')
    arch = Arch(variant, (128, 128), 3)
    image = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3)).astype('uint8')
    mean, std = (np.float32(v) for v in pixel_mean_std(get_variant(arch.name).lite))
    np.save(folder/'image.npy', (image-mean)/std)
    (folder/'run.py').write_text(CODE)
    command = [PEER, folder/'run.py', project, name, folder/file, folder, ZYLO117 or '']
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    weights, model = read_weights(folder/file), build(arch)
    assert arch.name in matching_variants(weights)
    return model, image, load_pretrained(model, weights, arch), np.load(folder/'out.npz')


@pytest.mark.parametrize('project, name, file, variant', DETECTORS)
def test_a_detector_gives_the_answers_of_its_project(project, name, file, variant, tmp_path):
    model, image, report, peer = saved_by_peer(project, name, file, variant, tmp_path)
    unused = [n for n in report.unexpected if not n.endswith(UNUSED_SUMS)]
    assert not report.missing and not unused
    out = model(image)
    scores = np.array(out['cls_logits'])
    if project == 'zylo117': scores = 1/(1+np.exp(-scores))
    for ours, theirs in ((scores, peer['cls']), (np.array(out['box_deltas']), peer['box'])):
        print(project, name, f'difference {np.abs(ours-theirs).max():.1e}, spread {theirs.std():.2g}')
        assert theirs.std() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize('project, name, file, variant', BACKBONES)
def test_a_backbone_gives_the_features_of_its_project(project, name, file, variant, tmp_path):
    model, image, report, peer = saved_by_peer(project, name, file, variant, tmp_path)
    assert all(n.startswith(HEADS) for n in report.unexpected)
    assert not any(p.startswith(('stem', 'block')) for p in report.missing)
    last = [l for l in model.layers if l.name.startswith('block7')][-1]
    ours, theirs = np.array(keras.Model(model.input, last.output)(image)), peer['features']
    print(project, name, f'difference {np.abs(ours-theirs).max():.1e}, spread {theirs.std():.2g}')
    np.testing.assert_allclose(ours, theirs, atol=1e-4*max(1, np.abs(theirs).max()))
