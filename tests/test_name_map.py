"The names of other programs: ours translate to exactly those of real checkpoints."
import json
import re

import pytest

from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.weights.name_map import source_names
from effdet_nb.weights.read_weights import plain_variable_name

ARCH = Arch(image_hw=(128, 128), num_classes=90)


@pytest.fixture(scope='module')
def paths(): return [w.path for w in build(ARCH).weights]


def translated(paths, source_format): return [n for path in paths for n in source_names(path, ARCH, source_format)]


def test_every_weight_has_its_name_in_the_published_checkpoint(shared_dir, paths):
    variables = json.loads((shared_dir/'oracle'/'variables_d0.json').read_text())
    published = {v['name'] for v in variables['tf2']}
    names = [re.sub('^backbone', 'efficientnet-b0', n) for n in translated(paths, 'google')]
    assert set(names) == published and len(names) == len(published) == 709


def test_every_weight_has_its_name_in_a_tensorflow_2_checkpoint(shared_dir, paths):
    keys = {n for n, _ in json.loads((shared_dir/'oracle'/'tf2_ckpt_keys_d0.json').read_text())}
    keys.remove('_CHECKPOINTABLE_OBJECT_GRAPH')
    names = [f'{n}/.ATTRIBUTES/VARIABLE_VALUE' for n in translated(paths, 'graph')]
    assert set(names) == keys and len(names) == len(keys)


def test_every_variable_of_a_published_checkpoint_is_recognised(shared_dir):
    names = [n for n, _ in json.loads((shared_dir/'oracle'/'variables_d0_tf1_ckpt.json').read_text())]
    plain = {n: plain_variable_name(n) for n in names}
    assert [n for n, p in plain.items() if p is None] == ['global_step']
    assert sum(p[1] for p in plain.values() if p) == 709
