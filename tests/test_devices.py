"Two devices, or two machines, do what one does with the same pictures."
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from effdet_nb.data.shapes import draw_dataset
from effdet_nb.data.convert import dataset_convert
from effdet_nb.learn import saving
from effdet_nb.model.store import load_model
from effdet_nb.spec import Spec
from effdet_nb.status import read_status

SCRIPT = '''
import sys, tensorflow as tf
how, folder = sys.argv[1:3]
if how == 'mirrored': tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()]*2)
from effdet_nb.model import detector
detector.SCALING['efficientdet-d0'] = (128, .35, .3, 16, 1, 1)
detector.Scaling.drop_connect = 0.     # blocks dropped at random would be others on other devices
from effdet_nb.learn.train import train
from effdet_nb.spec import Spec
spec = Spec.load('spec.txt')
if how == 'one': spec = spec.replace(training_config=dict(train_batch_size=4, num_examples_per_epoch=8))
if len(sys.argv) > 3: spec = spec.replace(training_config=dict(num_epochs=int(sys.argv[3])))
history = train(spec, folder, strategy=tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1']) if how == 'mirrored' else None)
print('AP', history[-1].get('AP'), 'step', history[-1]['step'])
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Four steps an epoch for one device with pictures in fours, as for two with pictures in twos; one shard of records for both."
    folder = tmp_path_factory.mktemp('devices')
    draw_dataset(folder/'shapes', num_train=8, num_val=3, size=(128, 128), seed=0)
    for split in ('train', 'val'): dataset_convert(folder/'shapes'/split, folder/'shapes'/f'{split}.json', folder, split, num_shards=1, workers=1)
    spec = Spec().replace(
        dataset_config=dict(training_file_pattern=f'{folder}/train-*', validation_file_pattern=f'{folder}/val-*', validation_json_file=f'{folder}/shapes/val.json', num_classes=4, image_size='128,128', max_instances_per_image=20),
        training_config=dict(train_batch_size=2, num_examples_per_epoch=4, num_epochs=4, learning_rate=.002, lr_warmup_epoch=1, lr_warmup_init=.0005, moving_average_decay=.9, checkpoint_period=1, l2_weight_decay=1e-4),
        eval_config=dict(eval_batch_size=3, eval_epoch_cycle=4))
    (folder/'spec.txt').write_text(spec.to_text()); (folder/'run.py').write_text(SCRIPT)
    return folder


def start(folder, how, name, *more, **env):
    return subprocess.Popen([sys.executable, 'run.py', how, name, *map(str, more)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'} | env)


def finished(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


def cluster():
    "Two TF_CONFIGs on free ports of this machine."
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets: s.bind(('127.0.0.1', 0))
    workers = [f'127.0.0.1:{s.getsockname()[1]}' for s in sockets]
    for s in sockets: s.close()
    return [json.dumps(dict(cluster=dict(worker=workers), task=dict(type='worker', index=i))) for i in range(2)]


@pytest.fixture(scope='module')
def one(folder): finished(start(folder, 'one', 'one')); return load_model(folder/'one'/'model.step-8.tlt')


def alike(one, path):
    "The first epoch is the same to the rounding of batch norms over very few cells, and so is the AP of the last."
    ours, theirs = one.meta['history'], load_model(path).meta['history']
    np.testing.assert_allclose([theirs[0][k] for k in ('loss', 'cls_loss', 'box_loss', 'positives', 'lr')], [ours[0][k] for k in ('loss', 'cls_loss', 'box_loss', 'positives', 'lr')], rtol=1e-3)
    assert [r['step'] for r in ours] == [r['step'] for r in theirs] and theirs[-1]['AP'] == pytest.approx(ours[-1]['AP'], abs=.05)


def equal(one, path):
    two = load_model(path)
    for group in ('weights', 'ema'):
        for k, v in getattr(one, group).items(): np.testing.assert_allclose(getattr(two, group)[k], v, rtol=0, atol=1e-5*max(1, np.abs(v).max()), err_msg=f'{group} {k}')


@pytest.mark.slow
@pytest.mark.xfail(reason='not yet to 1e-5: the loss differs by 0.6 % in the second epoch; synchronised batch norm over the four cells of the coarsest level is the suspect')
def test_two_devices_equal_one_after_eight_steps(folder, one):
    finished(start(folder, 'mirrored', 'mirrored'))
    alike(one, folder/'mirrored'/'model.step-8.tlt')
    equal(one, folder/'mirrored'/'model.step-8.tlt')


@pytest.mark.slow
def test_two_machines_equal_one_and_only_the_first_writes(folder, one):
    pair = [start(folder, 'machines', name, TF_CONFIG=c) for name, c in zip(('chief', 'other'), cluster())]
    said = [finished(p) for p in pair]
    alike(one, folder/'chief'/'model.step-8.tlt')
    assert said[0].split('AP')[1] == said[1].split('AP')[1]                   # both know the same AP
    assert not (folder/'other').exists() or not list((folder/'other').iterdir())
    assert read_status(folder/'chief')[-1]['status'] == 'SUCCESS'


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_others_and_the_restart_goes_on(folder):
    pair = [start(folder, 'machines', 'lost', 400, TF_CONFIG=c) for c in cluster()]
    while not saving.checkpoints_in(folder/'lost') and pair[0].poll() is None: time.sleep(.1)
    pair[1].kill(); killed = time.monotonic()
    _, err = pair[0].communicate(timeout=300)
    assert time.monotonic()-killed < 60 and pair[0].returncode not in (0, None)
    assert 'another of the 2 machines is gone' in err, err[-3000:]
    assert read_status(folder/'lost')[-1]['status'] == 'FAILURE'
    done = int(saving.newest_checkpoint(folder/'lost').stem.split('-')[-1])
    pair = [start(folder, 'machines', 'lost', done//2+2, TF_CONFIG=c) for c in cluster()]
    assert all(f'step {done+4}' in finished(p) for p in pair)


def test_slurm_names_the_machine(monkeypatch):
    from effdet_nb.learn.step import machine
    assert machine() == (0, 1)
    for k, v in dict(SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='2').items(): monkeypatch.setenv(k, v)
    assert machine() == (2, 4)
    monkeypatch.setenv('TF_CONFIG', json.dumps(dict(cluster=dict(chief=['a:1'], worker=['b:1']), task=dict(type='worker', index=0))))
    assert machine() == (1, 2)
