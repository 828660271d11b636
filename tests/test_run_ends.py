"However a training ends, what it has trained is kept, and the next start says what it does."
import errno
import os
import resource
import shlex
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from PIL import Image
from small_training import StubTrainer, run_stub, small_spec, stub_loop

import effdet_nb.app.cli as cli
from effdet_nb.app.command import tee_output
from effdet_nb.app.options import parse_options
from effdet_nb.app.video import VideoWriter
from effdet_nb.core.console import results_status
from effdet_nb.core.files import atomic_write, exclusive_lock, readable_disk_errors, write_json
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.tfrecord import write_records
from effdet_nb.detector.efficientdet import Arch, arch_to_dict
from effdet_nb.evaluate.ground_truth import open_eval_dataset
from effdet_nb.export.formats import write_saved_model, write_tflite
from effdet_nb.export.mobile import convert_detector
from effdet_nb.train import callbacks, checkpoints as checkpoints_module, diagnostics, fit, startup
from effdet_nb.train.callbacks import StatusCallback, TensorBoardCallback, event_file_errors, format_epoch
from effdet_nb.train.checkpoints import (
    CheckpointCallback, MetricHistory, list_checkpoints, load_latest_checkpoint, restore_checkpoint, save_checkpoint,
    set_aside_run, training_summary)
from effdet_nb.train.diagnostics import NanGuard
from effdet_nb.train.experiment import InitialWeights, compare_spec_texts, resolve_experiment
from effdet_nb.train.spec import Spec
from effdet_nb.train.startup import finished_history, open_run
from effdet_nb.train.trainer import Trainer
from effdet_nb.weights.encryption import ModelFileError
from effdet_nb.weights.model_file import load_model_file, save_model_file

ARCH = Arch('efficientdet-tiny', (128, 128), 4)
CLASSES = ClassTable.from_categories([{'id': i, 'name': f'class {i}'} for i in (1, 2, 3)], 4)
HEADS = {f'{name}-predict/pointwise_kernel': np.zeros((1, 1, 24, 36), np.float32) for name in ('class', 'box')}


@pytest.fixture
def records(tmp_path):
    "Record files without an image; enough for runs of stubs."
    folder = tmp_path/'records'
    folder.mkdir()
    write_records(folder/'train-00000-of-00001', [b'record']*12)
    return folder


@pytest.fixture
def spec(records):
    spec = small_spec(records, num_epochs=3, checkpoint_period=1, lr_warmup_epoch=1)
    return spec.replace(eval_config=dict(eval_epoch_cycle=1))


def write_checkpoint(folder, number, key='', name=None, **meta):
    "Writes a small file that opens as a checkpoint."
    meta = dict(arch=arch_to_dict(ARCH), classes=CLASSES.to_dict(), kind='checkpoint', step=number, history=[],
                spec='') | meta
    weights = {'w': np.arange(20_000, dtype=np.float32)} | HEADS
    return save_model_file(folder/(name or f'model.step-{number}.tlt'), weights, meta, key)


# --- the newest checkpoint is damaged

def change(data, where, value): return data[:where]+value+data[where+len(value):]


DAMAGES = {
    'empty': lambda data: b'',
    'zeros': lambda data: bytes(len(data)),
    'truncated': lambda data: data[:len(data)//2],
    'zeros at the start': lambda data: change(data, 0, bytes(4096)),
    'zeros at the end': lambda data: change(data, len(data)-4096, bytes(4096)),
    'one bit': lambda data: change(data, len(data)//2, bytes([data[len(data)//2]^1])),
}


@pytest.mark.parametrize('key', ['', 'Geheim'])
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(damage, key, tmp_path, capsys):
    for step in (2, 4, 6): path = write_checkpoint(tmp_path, step, key)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    found, checkpoint = load_latest_checkpoint(tmp_path, key)
    assert found.name == 'model.step-4.tlt' and checkpoint.meta['step'] == 4
    assert 'model.step-6.tlt' in capsys.readouterr().err


def test_if_all_are_damaged_the_best_model_continues_the_run(tmp_path):
    write_checkpoint(tmp_path, 3, name='model.best.tlt')
    for step in (2, 4): (tmp_path/f'model.step-{step}.tlt').write_bytes(b'')
    assert load_latest_checkpoint(tmp_path)[1].meta['step'] == 3
    (tmp_path/'model.best.tlt').write_bytes(b'')
    with pytest.raises(ModelFileError, match=r'step-4\.tlt.*empty'): load_latest_checkpoint(tmp_path)


def test_a_wrong_key_is_an_error_and_starts_no_new_run(tmp_path):
    for step in (2, 4): write_checkpoint(tmp_path, step, 'Geheim')
    for key in ('', 'other'):
        with pytest.raises(ModelFileError, match=r'step-4\.tlt'): load_latest_checkpoint(tmp_path, key)


# --- files under the name of a checkpoint from which a run cannot continue

EPOCH = dict(epoch=1, loss=2., cls_loss=1., box_loss=.02)
FORGED = [
    dict(step=-1), dict(step='6'), dict(step=6.5), dict(step=None), dict(step=True), dict(step=10**30), dict(step=[6]),
    dict(step=5), dict(epoch='one'), dict(epoch=-2.), dict(epoch=float('nan')), dict(history=None), dict(history={}),
    dict(history=[1]), dict(history=[{'AP': 'good'}]), dict(history=[{'epoch': 1}]),
    dict(history=[EPOCH | {'loss': None}]),
    dict(history=[EPOCH | {'AP': [1]}]), dict(history=[EPOCH]*9, pace=dict(global_batch=4, steps_per_epoch=3.)),
    dict(history=[], pace=dict(global_batch=4, steps_per_epoch=3.)), dict(sums=5), dict(sums=[]), dict(sums=[-1, 2.]),
    dict(sums=[2, 'x']), dict(pace=None), dict(pace=[4, 3]), dict(pace=dict(global_batch=0)),
    dict(pace=dict(steps_per_epoch='3')), dict(spec=None), dict(spec=['a']), dict(spec='training_config {'),
    dict(spec='no_such_section {}'), dict(kind='pruned'), dict(kind=None), dict(kind=7), dict(arch=None),
    dict(arch={'name': 'x'}), dict(classes={}), dict(scores=[1]), dict(scores={'AP': 'x'}),
]


@pytest.mark.parametrize('meta', FORGED, ids=str)
def test_a_forged_checkpoint_is_passed_over_or_ends_the_start_in_a_sentence(meta, tmp_path, capsys):
    write_checkpoint(tmp_path, 6)
    assert load_latest_checkpoint(tmp_path)[1].meta['step'] == 6         # it is the forging that is refused
    write_checkpoint(tmp_path, 6, **meta)
    with pytest.raises(ModelFileError, match=r'model\.step-6\.tlt'): load_latest_checkpoint(tmp_path)
    write_checkpoint(tmp_path, 3)
    assert load_latest_checkpoint(tmp_path)[0].name == 'model.step-3.tlt'
    line, = capsys.readouterr().err.splitlines()
    assert 'model.step-6.tlt' in line and 'passed over' in line and len(line) < 500


def test_entries_that_a_checkpoint_lacks_are_named(tmp_path):
    for name in ('step', 'history', 'spec'):
        meta = dict(arch=arch_to_dict(ARCH), classes=CLASSES.to_dict(), kind='checkpoint', step=6, history=[], spec='')
        save_model_file(tmp_path/'model.step-6.tlt', HEADS, {key: meta[key] for key in meta if key != name})
        with pytest.raises(ModelFileError, match=f'it has no {name}'): load_latest_checkpoint(tmp_path)


def forged_arrays(arrays, kind):
    "Arrays of a checkpoint, of which the last has numbers of another kind, another shape, or is missing."
    *names, last = arrays
    forged = {name: arrays[name] for name in names}
    if kind == 'missing': return forged
    return forged | {last: arrays[last][..., None] if kind == 'shape' else np.asarray(arrays[last]).astype(kind)}


@pytest.mark.parametrize('kind', ['complex64', 'bool', 'shape', 'missing'])
@pytest.mark.parametrize('group', ['weights', 'ema', 'optimizer'])
def test_forged_arrays_of_a_checkpoint_are_refused(group, kind, trained, tmp_path):
    experiment, checkpoint, trainer = trained
    changed = replace(checkpoint, **{group: forged_arrays(getattr(checkpoint, group), kind)})
    history = MetricHistory(trainer.metric_names)
    with pytest.raises(ValueError, match='model.step-2.tlt'):
        restore_checkpoint(changed, trainer, history, experiment.spec_text, 'model.step-2.tlt')


@pytest.mark.parametrize('num_sums', [1, 3, 99])
def test_sums_of_other_metrics_are_refused(num_sums, trained):
    experiment, checkpoint, trainer = trained
    changed = replace(checkpoint, meta=checkpoint.meta | {'sums': [1]*num_sums})
    with pytest.raises(ModelFileError, match='sums of'):
        restore_checkpoint(changed, trainer, MetricHistory(trainer.metric_names), experiment.spec_text)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The experiment of a toy run, a checkpoint of it, and its trainer."
    experiment = resolve_experiment(small_spec('records'))
    trainer = Trainer(experiment.arch, experiment.training)
    trainer.step = 2
    path = tmp_path_factory.mktemp('run')/'model.step-2.tlt'
    save_checkpoint(path, trainer, MetricHistory(trainer.metric_names), CLASSES, spec_text=experiment.spec_text)
    return experiment, load_model_file(path), trainer


# --- several runs in one folder

def checkpoint_callback(folder, keep, monkeypatch):
    "A callback whose checkpoints are small files."
    def save(path, *args, **meta):
        path.write_bytes(b'new')
        return path
    monkeypatch.setattr(checkpoints_module, 'save_checkpoint', save)
    config = SimpleNamespace(keep_checkpoint_max=keep, checkpoint_period=1)
    trainer = SimpleNamespace(step=0, config=config, plan=SimpleNamespace(config=config, last_epoch=99))
    return CheckpointCallback(trainer, SimpleNamespace(epochs=[]), folder, CLASSES)


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_a_run_never_deletes_the_checkpoint_that_it_has_just_written(keep, tmp_path, monkeypatch):
    for step in (50, 60, 70): (tmp_path/f'model.step-{step}.tlt').write_bytes(b'later, and damaged')
    callback = checkpoint_callback(tmp_path, keep, monkeypatch)
    for step in (10, 20, 30, 40):
        callback.trainer.step = step
        callback.save_step()
    own = [p.name for p in list_checkpoints(tmp_path) if p.read_bytes() == b'new']
    assert own == [f'model.step-{step}.tlt' for step in (10, 20, 30, 40)[-keep:]]


def test_an_earlier_run_is_moved_aside_each_time(tmp_path):
    for n in (1, 2, 3):
        write_checkpoint(tmp_path, 10*n)
        write_checkpoint(tmp_path, 10*n, name='model.best.tlt')
        (tmp_path/'history.csv').write_text(f'run {n}')
        assert set_aside_run(tmp_path) == tmp_path/f'earlier-{n}'
        assert not list(tmp_path.glob('*.*'))
        assert (tmp_path/f'earlier-{n}'/'history.csv').read_text() == f'run {n}'
    assert set_aside_run(tmp_path) is None


@pytest.mark.parametrize('field', ['checkpoint', 'pruned_model_path'])
@pytest.mark.parametrize('place', ['run/model.best.tlt', './run/../run/model.step-4.tlt'])
def test_a_new_run_cannot_start_from_files_that_it_moves(field, place, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('model.best.tlt', 'model.step-4.tlt'): write_checkpoint(tmp_path/'run', 4, name=name)
    new = spec.replace(training_config={'resume': False, field: place})
    with pytest.raises(ValueError, match=f'training_config.{field}.*another --model_dir'):
        open_run(new, 'run', '', SimpleNamespace(num_replicas_in_sync=1))
    assert len(list_checkpoints('run')) == 1


@pytest.mark.parametrize('name, is_refused', [('model.best.tlt', True), ('imported.tlt', False)])
def test_a_new_run_beside_a_best_model_cannot_start_from_it(name, is_refused, spec, tmp_path, monkeypatch):
    for file in ('model.best.tlt', 'imported.tlt'): write_checkpoint(tmp_path, 4, name=file)
    monkeypatch.setattr(startup, 'read_initial_weights', lambda *args: InitialWeights())
    new = spec.replace(training_config=dict(checkpoint=str(tmp_path/name)))
    refused = pytest.raises(ValueError, match='training_config.checkpoint.*another --model_dir')
    with refused if is_refused else nullcontext(): open_run(new, tmp_path, '', SimpleNamespace(num_replicas_in_sync=1))


@pytest.fixture
def prepare(spec, tmp_path, monkeypatch):
    "A function that prepares a run of stubs in a folder, new or continued; returns the arguments of the data check."
    checked = []
    for name in ('log_start', 'class_table'): monkeypatch.setattr(startup, name, lambda *args: None)
    monkeypatch.setattr(startup, 'check_before_training', lambda *args: checked.extend(args))
    monkeypatch.setattr(startup, 'initialize_weights', lambda *args: '')
    monkeypatch.setattr(startup, 'Trainer', lambda arch, plan, strategy: StubTrainer(plan))
    def prepare(initial, num_replicas=1):
        strategy = SimpleNamespace(num_replicas_in_sync=num_replicas)
        startup.prepare_training(resolve_experiment(spec, initial, num_replicas), initial, tmp_path, strategy)
        return checked
    return prepare


def test_a_new_run_moves_a_best_model_that_is_left_alone(prepare, tmp_path, capsys):
    (tmp_path/'model.best.tlt').write_bytes(b'three days of training')
    prepare(InitialWeights())
    assert os.listdir(tmp_path/'earlier-1') == ['model.best.tlt'] and not list(tmp_path.glob('*.tlt'))
    assert (tmp_path/'earlier-1'/'model.best.tlt').read_bytes() == b'three days of training'
    assert f'a new run begins: the earlier run in {tmp_path} is now in {tmp_path}/earlier-1' in capsys.readouterr().err


def test_a_continued_run_moves_nothing(prepare, tmp_path):
    for name in ('model.best.tlt', 'model.step-4.tlt'): (tmp_path/name).touch()
    prepare(InitialWeights(SimpleNamespace(arch=ARCH), 'model.step-4.tlt'))
    assert {'model.best.tlt', 'model.step-4.tlt'} <= set(os.listdir(tmp_path))
    assert not (tmp_path/'earlier-1').exists()


@pytest.mark.parametrize('num_replicas, epoch_size, batch_size', [(1, 12, 4), (2, 24, 8)])
def test_the_data_is_compared_with_the_epoch_of_all_replicas(num_replicas, epoch_size, batch_size, prepare):
    assert prepare(InitialWeights(), num_replicas)[2:4] == [epoch_size, batch_size]


def test_a_run_leaves_the_temporary_files_of_other_processes(tmp_path, monkeypatch):
    with atomic_write(tmp_path/'model.onnx') as f:
        checkpoint_callback(tmp_path, 1, monkeypatch)
        f.write(b'exported')
    assert (tmp_path/'model.onnx').read_bytes() == b'exported'


def test_a_second_training_in_a_folder_is_refused_and_changes_nothing(spec, tmp_path):
    spec = spec.replace(dataset_config=dict(validation_file_pattern='', validation_json_file=''))
    with exclusive_lock(tmp_path/'run'/'.train.lock', ''):
        with pytest.raises(ValueError, match=rf'another training runs in this folder.*process {os.getpid()}'):
            fit.train(spec, tmp_path/'run')
        assert [p.name for p in (tmp_path/'run').iterdir()] == ['.train.lock']


# --- a run that is over

@pytest.mark.parametrize('changes, words', [
    ({}, 'finished already: x.tlt (step 9)\n'),
    (dict(num_epochs=1), 'finished already: x.tlt (step 9); changed since: training_config.num_epochs 3 -> 1\n'),
    (dict(stop_at_epoch=2), 'stop_at_epoch')])
def test_a_finished_run_says_so_and_nothing_more(spec, changes, words, capsys):
    rows = [dict(epoch=n) for n in (1, 2, 3)]
    meta = dict(step=9, history=rows, spec=resolve_experiment(spec).spec_text)
    initial = InitialWeights(SimpleNamespace(meta=meta, arch=ARCH), 'x.tlt')
    experiment = resolve_experiment(spec.replace(training_config=changes))
    assert finished_history(experiment, initial) == rows
    err = capsys.readouterr().err
    assert err.startswith('finished already') and words in err and len(err.splitlines()) == 1


def test_a_run_that_is_not_over_is_no_finished_one(spec):
    meta = dict(step=6, history=[{}, {}], spec=spec.to_text())
    initial = InitialWeights(SimpleNamespace(meta=meta, arch=ARCH), 'x.tlt')
    assert finished_history(resolve_experiment(spec), initial) is None
    assert finished_history(resolve_experiment(spec), InitialWeights()) is None


# --- an evaluation fails

@pytest.mark.parametrize('error', [ValueError('a damaged record'), OSError(errno.EIO, 'disk'), KeyboardInterrupt()])
def test_an_epoch_is_saved_before_its_evaluation(error, spec, tmp_path, monkeypatch):
    callback = checkpoint_callback(tmp_path, 0, monkeypatch)
    def make_callbacks(trainer, history):
        callback.trainer = trainer
        return [callback]
    loop = stub_loop(spec, make_callbacks)
    def evaluate():
        if loop.trainer.step == 6: raise error
        return {'AP': .5, 'AP50': .5}
    loop.evaluator.evaluate = evaluate
    with pytest.raises(type(error)): loop.run(iter(dict, None))
    assert [p.name for p in list_checkpoints(tmp_path)] == ['model.step-3.tlt', 'model.step-6.tlt']
    assert len(loop.history.epochs) == 1          # the second epoch is trained, but not judged


def saving_stub(spec, folder, monkeypatch, others=()):
    "A loop of stubs, and its checkpoints: small files that contain what the model is."
    callback = checkpoint_callback(folder, 0, monkeypatch)
    def save(path, trainer, *args, **meta):
        path.write_text(getattr(trainer.model, 'content', 'own weights'))
        return path
    monkeypatch.setattr(checkpoints_module, 'save_checkpoint', save)
    def make_callbacks(trainer, history):
        callback.trainer, callback.history = trainer, history
        return [callback, *others]          # in the order of `train`
    return stub_loop(spec, make_callbacks), callback


def run_saving_stub(loop, checkpoints):
    guard = SimpleNamespace(on_metrics=lambda rows: None)
    return fit.run_until_interrupted(loop, iter(dict, None), guard, checkpoints)


def test_an_interruption_during_an_evaluation_leaves_the_checkpoint_before_it(spec, tmp_path, monkeypatch, capsys):
    loop, checkpoints = saving_stub(spec, tmp_path, monkeypatch)
    def evaluate():
        loop.trainer.model.content = 'some averaged weights'    # as after a second signal, while they are swapped back
        raise KeyboardInterrupt
    loop.evaluator.evaluate = evaluate
    with pytest.raises(KeyboardInterrupt): run_saving_stub(loop, checkpoints)
    assert (tmp_path/'model.step-3.tlt').read_text() == 'own weights'
    assert f'interrupted: saved {tmp_path}/model.step-3.tlt' in capsys.readouterr().err


def test_an_interruption_in_the_next_epoch_saves_its_step(spec, tmp_path, monkeypatch):
    loop, checkpoints = saving_stub(spec, tmp_path, monkeypatch)
    def take_steps(*args):
        if loop.trainer.step == 4: raise KeyboardInterrupt
        return fit.TrainingLoop.take_steps(loop, *args)
    loop.take_steps = take_steps
    with pytest.raises(KeyboardInterrupt): run_saving_stub(loop, checkpoints)
    assert [p.name for p in list_checkpoints(tmp_path)] == ['model.step-3.tlt', 'model.step-4.tlt']


@pytest.mark.parametrize('with_evaluation', [False, True])
def test_a_run_that_a_callback_ends_between_two_checkpoints_is_saved(with_evaluation, spec, tmp_path, monkeypatch):
    spec = spec.replace(training_config=dict(num_epochs=50, checkpoint_period=10))
    stop = keras.callbacks.EarlyStopping(monitor='loss', patience=3)
    loop, checkpoints = saving_stub(spec, tmp_path, monkeypatch, [stop])
    if not with_evaluation: loop.evaluator = None
    assert len(run_saving_stub(loop, checkpoints)) == 4
    assert list_checkpoints(tmp_path)[-1].name == 'model.step-12.tlt'
    assert (tmp_path/'model.best.tlt').exists() == with_evaluation


def damaged_records(folder, how):
    "Three drawings as records, of which the second is damaged."
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.data.record_index import index_tfrecord
    from effdet_nb.detector.toy_data import make_toy_dataset
    make_toy_dataset(folder/'shapes', num_train=1, num_val=3, image_hw=(64, 64), seed=0)
    dataset_convert(folder/'shapes'/'val', folder/'shapes'/'val.json', folder, 'val', num_shards=1, workers=1)
    path = next(folder.glob('val-*'))
    data, (start, length) = bytearray(path.read_bytes()), index_tfrecord(path)[1]
    if how == 'bit': data[start+length//2] ^= 1
    else:
        from effdet_nb.data.tfrecord import masked_crc
        image = data.index({'image': b'\xff\xd8', 'png': b'\x89PNG'}[how], start)
        data[image:image+64] = bytes(64)          # the checksum is right, the image cannot be decoded
        data[start+length:start+length+4] = masked_crc(bytes(data[start:start+length])).to_bytes(4, 'little')
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize('how', ['bit', 'image'])
@pytest.mark.parametrize('with_json', [True, False])
def test_skip_corrupt_leaves_out_damaged_validation_records(how, with_json, tmp_path, capsys, recwarn):
    folder = damaged_records(tmp_path, how)
    path = folder/'shapes'/'val.json' if with_json else None
    samples = open_eval_dataset(f'{folder}/val-*', path, skip_corrupt=True)
    assert [len(list(samples)) for _ in range(2)] == [2, 2]
    assert capsys.readouterr().err.count('skip_corrupt: ') == 1         # said once, not at every evaluation
    if how == 'bit':
        with pytest.raises(ValueError, match='checksum'): list(open_eval_dataset(f'{folder}/val-*', path))


def test_an_evaluation_out_of_memory_names_the_batch_of_the_evaluation(spec, monkeypatch):
    def evaluate_data(*args, **kwargs): raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
    monkeypatch.setattr(fit, 'evaluate_data', evaluate_data)
    loop = stub_loop(spec.replace(eval_config=dict(eval_batch_size=256)))
    evaluator = loop.evaluator
    evaluator.detector = evaluator.classes = None
    loop.trainer.model.weights = []
    evaluator.evaluate = lambda: fit.Evaluator.evaluate(evaluator)
    words = '^eval_config.eval_batch_size: .*batches of 256 images. Lower it'
    with pytest.raises(ValueError, match=words), diagnostics.readable_errors(loop.trainer.plan, (128, 128)):
        loop.run(iter(dict, None))
    assert loop.trainer.step == 3


# --- what is reported

@pytest.mark.parametrize('per_loop', [3, 5, 100])
def test_the_speed_of_an_epoch_in_one_call_is_unknown_first_and_measured_later(per_loop, spec):
    rows = run_stub(spec.replace(training_config=dict(iterations_per_loop=per_loop))).history.epochs
    assert [row['images_per_second'] is None for row in rows] == [True, False, False]
    lines = [format_epoch(row, 3) for row in rows]
    assert 'images/s' not in lines[0] and all('images/s' in line and ' 0.0 images/s' not in line for line in lines[1:])


def nan_guard(spec, folder, step, monkeypatch):
    monkeypatch.setattr(diagnostics, 'batch_of_step', lambda trainer, data, step: ({'step': step}, [7]))
    trainer = StubTrainer(resolve_experiment(spec).training)
    trainer.step = step
    return NanGuard(trainer, None, folder)


@pytest.mark.parametrize('step, bad, number', [(1, 0, 1), (7, 0, 5), (7, 2, 7), (300, 1, 299)])
def test_a_nan_is_reported_with_the_number_of_its_step(step, bad, number, spec, tmp_path, monkeypatch):
    "As the progress lines count, also after a resume at step 4 or 297."
    guard, rows = nan_guard(spec, tmp_path, step, monkeypatch), np.ones((min(step, 3), 6))
    rows[bad, 0] = np.nan
    words = rf'^step {number}: .*bad_batch\.step-{number}\.npz'
    with pytest.raises(ValueError, match=words) as e: guard.on_metrics(rows)
    assert 'intact' not in str(e.value)           # there is no checkpoint
    write_checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match=r'; model\.step-4\.tlt is intact$'): guard.on_metrics(rows)


@pytest.mark.parametrize('section, field, old, new', [
    ('dataset_config', 'num_channels', 3, 1), ('model_config', 'freeze_blocks', '', '[0, 1]'),
    ('model_config', 'freeze_blocks', '[0]', '[0, 1]'), ('model_config', 'freeze_bn', False, True)])
def test_fields_that_a_run_cannot_change_are_named(section, field, old, new):
    specs = [Spec().replace(**{section: {field: value}}).to_text() for value in (old, new)]
    with pytest.raises(ValueError, match=f'{section}.{field} was .* and is .*start another --model_dir'):
        compare_spec_texts(*specs, {}, {}, 'x.tlt')


@pytest.mark.parametrize('section, field, old, new', [
    ('dataset_config', 'image_size', '128,256', '(128, 256)'), ('model_config', 'freeze_blocks', '[0,1]', '[0, 1]'),
    ('model_config', 'aspect_ratios', '[(1.0, 1.0), (1.4, 0.7)]', '[(1,1),(1.4,.7)]')])
def test_another_spelling_of_a_value_is_no_change(section, field, old, new):
    specs = [Spec().replace(**{section: {field: value}}).to_text() for value in (old, new)]
    assert compare_spec_texts(*specs, {}, {}, 'x.tlt') == ''


LITE, D7X = dict(model_name='efficientdet-lite0'), dict(model_name='efficientdet-d7x')


@pytest.mark.parametrize('old, new, words', [
    (LITE, LITE | dict(anchor_scale=3.), ''), (LITE | dict(anchor_scale=3.), LITE, ''),
    (D7X, D7X | dict(max_level=8), ''), (dict(), dict(anchor_scale=4., max_level=7), ''),
    (LITE, LITE | dict(anchor_scale=4.), 'model_config.anchor_scale was 3.0 and is 4.0'),
    (LITE | dict(anchor_scale=4.), LITE, 'model_config.anchor_scale was 4.0 and is 3.0'),
    (dict(), D7X, 'model_config.model_name was "efficientdet-d0" and is "efficientdet-d7x"')])
def test_the_networks_of_two_specs_are_compared_with_the_values_of_their_variants(old, new, words):
    specs = [Spec().replace(model_config=model).to_text() for model in (old, new)]
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        assert compare_spec_texts(*specs, {}, {}, 'x.tlt') == ''


@pytest.mark.parametrize('ids, names, line', [
    ((1, 2, 3), ('class 1', 'class 2', 'class 3'), 'continuing from x.tlt (step 9)'),
    ((1, 2, 3), ('cat', 'class 2', 'fox'), '; changed since: class class 1 -> cat, class class 3 -> fox'),
    ((1, 2, 3, 4), (*CLASSES.names, 'dog'), '; changed since: class id 4 -> dog'),
    ((1, 3, 4), ('class 1', 'class 2', 'class 3'), None), ((5, 6, 7), CLASSES.names, None)])
def test_a_run_continues_only_with_the_categories_of_its_channels(ids, names, line, monkeypatch):
    monkeypatch.setattr(startup, 'restore_checkpoint', lambda *args: '')
    checkpoint = SimpleNamespace(meta=dict(history=[], spec=''), arch=ARCH, classes=CLASSES)
    trainer, history = SimpleNamespace(arch=ARCH, step=9), SimpleNamespace(epochs=[])
    classes = ClassTable(ids, names, 4)
    def start(): return startup.initialize_weights(trainer, history, InitialWeights(checkpoint, 'x.tlt'), '', classes)
    if line: assert start().endswith(line)
    else:
        with pytest.raises(ValueError, match=r'x\.tlt: category id \d .* had channel .*another --model_dir'): start()


PRUNED = replace(ARCH, widths={'block2a_expand_conv': 8})


def pruned_arch(checkpoint=None, dataset=(), **model):
    "The network that is retrained from a pruned toy, with a spec that gives these fields."
    data = dict(num_classes=4, image_size='256,128') | dict(dataset)
    training = dict(pruned_model_path='pruned.tlt')
    spec = Spec().replace(dataset_config=data, training_config=training, model_config=model)
    return resolve_experiment(
        spec.replace(training_config=dict(num_examples_per_epoch=99)),
        InitialWeights(pruned=SimpleNamespace(arch=PRUNED), checkpoint=checkpoint)).arch


@pytest.mark.parametrize('model', [
    {}, dict(model_name='EfficientDet_Tiny'), dict(model_name='efficientdet-tiny', anchor_scale=4, num_scales=3),
    dict(aspect_ratios='((1,1), [1.4, .7], (.7, 1.4))', max_level=7)])
def test_a_pruned_model_is_retrained_with_the_fields_of_its_first_training(model):
    assert pruned_arch(**model) == replace(PRUNED, image_hw=(256, 128))


@pytest.mark.parametrize('fields, words', [
    (dict(model_name='efficientdet-d1'), 'model_name efficientdet-tiny, model_config.model_name is efficientdet-d1'),
    (dict(num_scales=2), 'num_scales 3, model_config.num_scales is 2'), (dict(anchor_scale=3.), 'anchor_scale 4.0,'),
    (dict(aspect_ratios='[(1, 1)]'), r'aspect_ratios .*, model_config.aspect_ratios is \(\(1.0, 1.0\),\)'),
    (dict(dataset=dict(num_classes=7)), 'num_classes 4, dataset_config.num_classes is 7'),
    (dict(dataset=dict(num_channels=1)), 'num_channels 3, dataset_config.num_channels is 1')])
def test_fields_of_another_network_than_the_pruned_one_are_refused_at_the_start(fields, words):
    with pytest.raises(ValueError, match=f'^pruned.tlt: was pruned with {words}.*Use the values of the pruned network'):
        pruned_arch(**fields)
    assert pruned_arch(SimpleNamespace(), **fields).name == PRUNED.name     # later, the spec of the checkpoint decides


# --- disks that are full or read-only

@contextmanager
def full_disk():
    "Within this context, no file may become larger than 2 kB. (As a fixture it would also limit the output of pytest.)"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('write', [
    lambda path: write_json(path, ['text']*1000), lambda path: save_model_file(path, {'w': np.ones(9999)}, {}),
    lambda path: save_model_file(path, {'w': np.ones(9999)}, {}, 'Geheim')], ids=['JSON', 'model', 'encrypted'])
def test_a_full_disk_is_named_with_the_file(write, tmp_path):
    message = rf'^{tmp_path}/out: cannot be written \(File too large\)\. Free some space'
    with full_disk(), pytest.raises(OSError, match=message): write(tmp_path/'out')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'BMP', 'WEBP', 'figure'])
def test_an_image_that_a_full_disk_cuts_off_is_an_error(file_format, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    is_named = pytest.raises(OSError, match=rf'^{tmp_path}/out: cannot be written')
    with full_disk(), is_named, atomic_write(tmp_path/'out') as f:
        if file_format == 'figure': plot_noise(pixels).savefig(f, format='png')
        else: Image.fromarray(pixels).save(f, file_format)
    assert os.listdir(tmp_path) == []


def plot_noise(pixels):
    figure = Figure()
    figure.subplots().imshow(pixels)
    return figure


@pytest.mark.parametrize('sizes', [[3000], [500]*10, [10]*1000])
def test_a_shard_that_a_full_disk_cuts_off_is_named(sizes, tmp_path):
    is_named = pytest.raises(OSError, match=rf'^{tmp_path}/t-00000-of-00001: cannot be written')
    with full_disk(), is_named:
        write_records(tmp_path/'t-00000-of-00001', [bytes(size) for size in sizes], is_atomic=False)


def small_network():
    "A network with the two outputs of a detector."
    image = keras.Input((8, 8, 3))
    outputs = {name: keras.layers.Conv2D(8, 3)(image) for name in ('cls_logits', 'box_deltas')}
    return keras.Model(image, outputs)


@pytest.mark.parametrize('folder', ['model', 'new/model'])
def test_a_saved_model_that_a_full_disk_cuts_off_is_named_in_one_sentence(folder, tmp_path):
    path = tmp_path/folder/'saved_model.pb'
    network = small_network()
    with full_disk(), pytest.raises(OSError) as e, readable_disk_errors(path):
        write_saved_model(network, tmp_path/folder)
    assert str(e.value).startswith(f'{path}: cannot be written (') and '__' not in str(e.value)


@pytest.mark.parametrize('convert', [
    lambda folder: write_tflite(small_network(), folder/'a.tflite'),
    lambda folder: convert_detector(small_network(), 4)])
@pytest.mark.parametrize('num_free', [0, 1000, 5000])
def test_a_full_folder_for_temporary_files_is_named_before_a_conversion(num_free, convert, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=num_free))
    with pytest.raises(OSError, match='TMPDIR'): convert(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_file_keeps_its_message(tmp_path):
    with pytest.raises(FileNotFoundError, match='No such file'), atomic_write(tmp_path/'out'): open(tmp_path/'missing')


@pytest.mark.parametrize('error', [tf.errors.ResourceExhaustedError, tf.errors.UnknownError,
                                   tf.errors.FailedPreconditionError])
def test_a_full_disk_under_the_event_files_is_not_a_full_memory(error, tmp_path, monkeypatch):
    with pytest.raises(OSError, match='TensorBoard cannot be written .No space left'), event_file_errors('log'):
        raise error(None, None, 'No space left on device\nand more')
    board = TensorBoardCallback(tmp_path)
    def fail(*args, **kwargs): raise error(None, None, 'No space left on device')
    monkeypatch.setattr(tf.summary, 'scalar', fail)
    monkeypatch.setattr(tf.summary, 'image', fail)
    image = np.zeros((2, 2, 3), np.uint8)
    for write in (lambda: board.write_scalars('a', {'b': 1}, 1), lambda: board.write_image('a', image, 1)):
        with pytest.raises(OSError, match='TensorBoard cannot be written'): write()


def test_a_full_disk_ends_the_log_and_not_the_command(tmp_path, capsys):
    with full_disk(), tee_output(tmp_path/'log.txt'):
        for n in range(300): print(f'a line of the command, number {n}')
    out, err = capsys.readouterr()
    assert out.count('\n') == 300 and err.count('no more lines are written (File too large)') == 1
    assert (tmp_path/'log.txt').stat().st_size <= 2000


@pytest.mark.parametrize('path', ['out', 'new/out', 'new/deep/out'])
def test_a_read_only_folder_is_named_before_the_work(path, tmp_path, monkeypatch):
    from effdet_nb.export.export import check_export_options
    monkeypatch.setattr(os, 'access', lambda *args: False)
    with pytest.raises(PermissionError, match=f'{tmp_path} is read-only'):
        check_export_options(tmp_path/f'{path}.onnx', 17, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('path', ['page.html', 'new/page.html', 'new/deep/page.html'])
def test_a_page_that_cannot_be_written_is_named_before_the_check(path, tmp_path, monkeypatch):
    from effdet_nb.app.dataset_page import check_dataset
    monkeypatch.setattr(os, 'access', lambda *args: False)
    with pytest.raises(PermissionError, match=f'{tmp_path} is read-only'): check_dataset(None, tmp_path/path)


@pytest.mark.parametrize('name', ['out.mp4', 'out.avi', 'new/out.mkv'])
@pytest.mark.parametrize('num_frames', [1, 30])
def test_a_video_that_a_full_disk_cuts_off_is_named_and_leaves_nothing(name, num_frames, tmp_path):
    pytest.importorskip('av')
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 240, 320, 3), np.uint8)
    message = rf'^{tmp_path}/{name}: cannot be written \(File too large\)\. Free some space'
    with full_disk(), pytest.raises(OSError, match=message), VideoWriter(tmp_path/name) as video:
        for frame in frames: video.write(frame)
    assert os.listdir(tmp_path) == []


# --- the time that is left

@pytest.mark.parametrize('first_call, seconds, num_steps, left', [
    ((1, 60.), 62., 3, 3.),          # two steps took 2 s, three are left
    ((1, 60.), 60., 1, 180.),        # only the first call is known
    ((2, 10.), 14., 3, 12.),         # two steps in the first call
    ((0, 0.), 9., 3, 9.)])           # a step compiled before
def test_the_time_left_does_not_count_the_compilation(first_call, seconds, num_steps, left, spec):
    loop = stub_loop(spec)
    plan = loop.trainer.plan
    loop.first_call, loop.trainer.step = first_call, plan.step_at(plan.last_epoch)-3
    assert loop.seconds_left(seconds, num_steps) == pytest.approx(left)


def test_the_time_left_is_unknown_after_an_epoch_that_only_repeats_its_evaluation(spec, monkeypatch):
    loop = stub_loop(spec)
    loop.trainer.step, loop.history.epoch_sums = 3, [3]+[1.]*6     # as restored from the checkpoint before it
    first, second, _ = loop.run(iter(dict, None))
    assert first['eta'] is None and second['eta'] > 0
    assert ' left' not in format_epoch(first, 3) and ' left' in format_epoch(second, 3)
    events = []
    status = SimpleNamespace(log_progress=lambda message, **event: events.append(event))
    monkeypatch.setattr(callbacks, 'write_history', lambda *args: None)
    StatusCallback(SimpleNamespace(epochs=[first]), 3, '.', status).on_epoch_end(0)
    assert events[0]['eta'] is None


def test_an_epoch_without_a_step_is_called_that(spec):
    spec = spec.replace(training_config=dict(num_examples_per_epoch=6, train_batch_size=16))
    lines = [format_epoch(row, 3) for row in run_stub(spec).history.epochs]
    assert [line.split('  ')[1] for line in lines[:2]] == ['no step', 'no step']
    assert lines[2].split('  ')[1] == 'loss 1.0000 (class 1.0000, box 1.00000)'


def test_a_slow_first_step_is_not_counted_in_the_later_epochs(spec, monkeypatch):
    loop = stub_loop(spec)
    loop.trainer.train_step = train_step = lambda batch: np.float32([1, 1, 1, 0, 1, 1])
    def slow_first(batch):
        time.sleep(.5)
        loop.trainer.train_step = train_step
        return train_step(batch)
    loop.trainer.train_step = slow_first
    loop.run(iter(dict, None))
    assert loop.first_call[0] == 1 and loop.first_call[1] >= .5
    assert loop.history.epochs[0]['eta'] < .5


# --- the last lines

ROWS = [{'epoch': 1, 'loss': 2.}, {'epoch': 2, 'loss': 1., 'AP': .25}, {'epoch': 3, 'loss': .5, 'AP': .2}]


@pytest.mark.parametrize('rows, names, first, second', [
    (ROWS, ['model.best.tlt', 'model.step-6.tlt'], 'best AP 0.250 (epoch 2): run/model.best.tlt',
     'effdet_evaluate -m run/model.best.tlt -r run/results -e spec.txt'),
    (ROWS[:1], ['model.step-6.tlt'], 'loss 2.0000 (epoch 1): run/model.step-6.tlt',
     'effdet_inference -i IMAGES -m run/model.step-6.tlt -r run/results -e spec.txt'),
    ([ROWS[0] | {'AP': -1.}], ['model.step-2.tlt', 'model.step-12.tlt'], 'run/model.step-12.tlt', 'effdet_inference'),
    (ROWS, ['model.step-6.tlt'], 'run/model.step-6.tlt', 'effdet_inference')])      # the best file was moved
def test_a_training_ends_with_its_best_model_and_the_next_command(
        rows, names, first, second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'run').mkdir()
    for name in names: (tmp_path/'run'/name).touch()
    lines = training_summary(rows, 'run', 'spec.txt').splitlines()
    assert first in lines[0] and lines[1].startswith(f'Next: {second}') and len(lines) == 2
    more = training_summary(rows, 'run', 'spec.txt', ["num_epochs=3", "checkpoint='a b'"], has_key=True)
    assert '-k KEY' in more and shlex.split(more.splitlines()[1])[-3:] == ['--set', 'num_epochs=3', "checkpoint='a b'"]


@pytest.mark.parametrize('changes, num_rows, is_over', [
    ({}, 3, True), ({}, 2, False), (dict(stop_at_epoch=2), 2, True), (dict(stop_at_epoch=2), 1, False)])
def test_a_finished_run_that_goes_on_says_so(changes, num_rows, is_over, spec, monkeypatch):
    text = spec.replace(training_config=changes).to_text()
    meta = dict(history=[{}]*num_rows, spec=text)
    checkpoint = SimpleNamespace(meta=meta, arch=ARCH)
    monkeypatch.setattr(startup, 'restore_checkpoint', lambda *args: '')
    trainer, history = SimpleNamespace(arch=ARCH, step=9), SimpleNamespace(epochs=[{}]*num_rows)
    line = startup.continue_run(trainer, history, InitialWeights(checkpoint, 'x.tlt'), '')
    start = f'the run was finished after epoch {num_rows} and goes on; ' if is_over else ''
    assert line == f'{start}continuing from x.tlt (step 9)'


@pytest.mark.parametrize('line, task', [
    ('evaluate -e spec.txt -m a.onnx -r out', 'evaluate'), ('inference -m a.onnx -i a.jpg -r out', 'inference'),
    ('inference -m a.onnx -i . -r out --tile 256', 'inference'), ('gen_trt_engine -m a.onnx -r out', 'gen_trt_engine')])
def test_a_second_run_that_shares_a_results_folder_is_refused_and_writes_nothing(
        line, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fields = 'num_classes: 3 image_size: "128,128" validation_file_pattern: "r-*"'
    Path('spec.txt').write_text(f'dataset_config {{ {fields} }}')
    Path('r-0').touch()
    Path('a.onnx').write_bytes(b'\x08\x07')
    Image.new('RGB', (64, 64)).save('a.jpg')
    function, *args = line.split()
    function = cli.TASKS[function]
    with results_status('out', task):
        before = Path('out/status.json').read_bytes()
        with pytest.raises(SystemExit) as stop: function(**parse_options(function, args, 'effdet'))
        assert Path('out/status.json').read_bytes()==before and len(list(Path('out').iterdir()))==2
    assert stop.value.code and f'another run of {task} writes' in capsys.readouterr().err
