"MLflow and Weights & Biases: what they receive, and that they never end a training."
import importlib.util
import json
import os
import sys

import pytest
from small_training import run_stub, small_spec, stub_loop, write_records

import effdet_nb.app.cli as cli
from effdet_nb.train import trackers
from effdet_nb.train.set_fields import field_values
from effdet_nb.train.spec import Spec
from effdet_nb.train.trackers import TRACKERS, TrackerCallback, metric_values, tracker_callbacks

KEY = 'geheim-5271'


class RecordingRun:
    "A tracker that keeps what it is given; `failing` names the methods that raise."
    runs, failing, error = [], (), ConnectionError('no route to host\nand more')

    def __init__(self, name, run_id):
        self.calls, self.id, self.name, self.settings = [], run_id or f'id{len(self.runs)}', name, None
        self.runs.append(self)
        self.call('start')

    def call(self, method, *args):
        self.calls.append((method, *args))
        if method in self.failing: raise self.error

    def log_settings(self, settings):
        self.settings = settings
        self.call('log_settings')

    def log(self, metrics, step): self.call('log', metrics, step)
    def finish(self, is_complete): self.call('finish', is_complete)


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setitem(TRACKERS, 'recording', RecordingRun)
    monkeypatch.setattr(RecordingRun, 'runs', [])
    monkeypatch.setattr(RecordingRun, 'failing', ())
    return RecordingRun


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path/'runs'/'first'
    folder.mkdir(parents=True)
    (folder/'spec.txt').write_text('training_config { num_epochs: 2 }')
    return folder


@pytest.fixture(scope='module')
def spec(tmp_path_factory):
    return small_spec(write_records(tmp_path_factory.mktemp('shapes'), 4, 2), num_epochs=2, logging_frequency=2)


def track(tracker, model_dir, first_step=1):
    "Sends two steps and an epoch."
    callback = TrackerCallback(tracker, model_dir)
    callback.on_train_begin()
    for step in (first_step, first_step+1): callback.on_metrics(None, dict(step=step, loss=1/step, input_wait=None))
    callback.on_epoch_end(0, dict(epoch=1, step=first_step+1, loss=.5, AP=.25))
    callback.on_train_end()
    return callback


def test_a_training_loop_sends_steps_and_epochs(recording, model_dir, spec):
    loop = stub_loop(spec, lambda trainer, history: [TrackerCallback('recording', model_dir)])
    loop.callbacks.on_train_begin()
    loop.run(iter(dict, None))
    loop.callbacks.on_train_end()
    run, = recording.runs
    steps = [step for method,*args in run.calls if method=='log' for metrics,step in [args] if 'step/loss' in metrics]
    epochs = [args for method,*args in run.calls if method=='log' and 'epoch/AP' in args[0]]
    assert run.name=='first' and run.settings['training_config.num_epochs']==2 and len(run.settings)>50
    assert steps==[2, 3, 4, 6] and [step for _,step in epochs][-1]==6 and epochs[-1][0]['epoch/AP']==.5
    assert run.calls[-1]==('finish', True)


@pytest.mark.parametrize('method', ['start', 'log_settings', 'log', 'finish'])
def test_a_failing_tracker_is_one_line_and_the_training_goes_on(
        recording, model_dir, spec, method, monkeypatch, capsys):
    monkeypatch.setattr(recording, 'failing', (method,))
    callback = TrackerCallback('recording', model_dir)
    loop = run_stub(spec, lambda trainer, history: [callback])
    assert len(loop.history.epochs)==2                       # the loop does not call on_train_begin: no run yet
    track('recording', model_dir)
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('warning: --log_to recording: ') and 'no route to host' in line and 'more' not in line
    calls = [name for name,*_ in recording.runs[-1].calls]
    assert calls.count(method)==1 and calls[-1]==('finish' if method.startswith('log') else method)


def test_a_run_that_fails_is_ended_so_that_the_next_one_can_start(recording, model_dir, monkeypatch):
    monkeypatch.setattr(recording, 'failing', ('log', 'finish'))
    track('recording', model_dir)
    assert recording.runs[-1].calls[-1]==('finish', False)
    monkeypatch.setattr(recording, 'failing', ())
    assert track('recording', model_dir).run and recording.runs[-1].calls[-1]==('finish', True)


def test_a_run_whose_id_cannot_be_stored_is_ended(recording, model_dir, capsys):
    (model_dir/'trackers.json').mkdir()
    track('recording', model_dir)
    assert recording.runs[-1].calls[-1]==('finish', False) and capsys.readouterr().err.count('\n')==1


@pytest.mark.parametrize('text', ['{', '[]', '"r1"', '\x00'])
def test_a_damaged_file_of_ids_is_one_line(recording, model_dir, text, capsys):
    (model_dir/'trackers.json').write_text(text)
    track('recording', model_dir)
    assert capsys.readouterr().err.count('\n')==1


def test_an_interrupted_run_is_continued_and_a_stopped_one_is_not_complete(recording, model_dir):
    for begin in (1, 3): track('recording', model_dir, begin)
    assert [run.id for run in recording.runs]==['id0', 'id0']
    callback = TrackerCallback('recording', model_dir)
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_begin()
        try: raise KeyboardInterrupt
        finally: callback.on_train_end()
    assert recording.runs[-1].calls[-1]==('finish', False)


def test_ctrl_c_inside_a_client_is_passed_on(recording, model_dir, monkeypatch):
    monkeypatch.setattr(recording, 'failing', ('log',))
    monkeypatch.setattr(recording, 'error', KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): track('recording', model_dir)


def test_only_the_first_machine_is_tracked(recording, model_dir, monkeypatch):
    monkeypatch.setattr(trackers, 'is_chief', lambda: False)
    track('recording', model_dir)
    assert not recording.runs


@pytest.mark.parametrize('value, kept', [
    (None, False), (float('nan'), False), (float('inf'), False), (-1., True), (0, True)])
def test_values_that_are_no_numbers_are_left_out(value, kept):
    assert metric_values('step', dict(step=1, loss=value))==({'step/loss': float(value)} if kept else {})


@pytest.mark.parametrize('tracker', ['mlflow', 'wandb'])
def test_a_missing_client_is_reported_before_the_training(tracker, tmp_path, monkeypatch, capsys):
    (tmp_path/'train-0').write_text('')
    (tmp_path/'s.txt').write_text('dataset_config { num_classes: 4 image_size: "128,128" training_file_pattern: "%s" }'
                                  % (tmp_path/'train-*'))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name==tracker else find_spec(name, *a))
    with pytest.raises(SystemExit) as e:
        cli.effdet_train(experiment_spec_file=str(tmp_path/'s.txt'), model_dir=str(tmp_path/'out'), log_to=[tracker])
    message = capsys.readouterr().err
    assert e.value.code==1 and f'pip install "effdet_nb[{tracker}]"' in message and not (tmp_path/'out').exists()


def test_a_folder_of_that_name_is_not_the_client(tmp_path, monkeypatch):
    (tmp_path/'nosuchclient').mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match='is not installed'): tracker_callbacks(['nosuchclient'], tmp_path)


# --- the clients themselves, without a network

def require(package):
    "Skips a test without an optional package; continuous integration installs all of them."
    if importlib.util.find_spec(package) and importlib.util.find_spec(package).origin: return
    assert os.environ.get('CI')!='true', f'{package} is missing in CI: see dev_requirements in settings.ini'
    pytest.skip(f'{package} is not installed')


def test_mlflow_stores_settings_and_metrics(model_dir, tmp_path, monkeypatch, capsys):
    require('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
    monkeypatch.setattr(sys, 'argv', ['effdet_train', '-k', KEY])
    for begin in (1, 3): assert track('mlflow', model_dir, begin).run
    from mlflow import MlflowClient
    client = MlflowClient(f'sqlite:///{tmp_path}/mlflow.db')
    run = client.get_run(json.loads((model_dir/'trackers.json').read_text())['mlflow'])
    assert run.info.run_name=='first' and run.info.status=='FINISHED' and run.data.metrics['epoch/AP']==.25
    values = field_values(Spec.load(model_dir/'spec.txt'))
    assert run.data.params=={name: str(value) for name,value in values.items()}
    assert [m.step for m in client.get_metric_history(run.info.run_id, 'step/loss')]==[1, 2, 3, 4]
    assert KEY.encode() not in (tmp_path/'mlflow.db').read_bytes()


def test_an_mlflow_server_that_is_away_is_one_line(model_dir, monkeypatch, capsys):
    require('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://127.0.0.1:9')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    assert track('mlflow', model_dir).run is None
    assert 'warning: --log_to mlflow: the rest of this run is not tracked' in capsys.readouterr().err


@pytest.mark.parametrize('method', ['log_params', 'log_metrics'])
def test_a_failing_mlflow_leaves_no_run_active(model_dir, tmp_path, monkeypatch, capsys, method):
    require('mlflow')
    import mlflow
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
    with monkeypatch.context() as patch:
        def fail(*args, **kwargs): raise ConnectionError('no route to host')
        patch.setattr(mlflow, method, fail)
        assert track('mlflow', model_dir).run is None
    assert mlflow.active_run() is None and 'no route to host' in capsys.readouterr().err
    assert track('mlflow', model_dir).run


def test_wandb_stores_settings_and_metrics_offline_and_never_the_key(model_dir, tmp_path, monkeypatch, capsys):
    require('wandb')
    for name,value in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'argv', ['effdet_train', '-k', KEY])
    for begin in (1, 3): assert track('wandb', model_dir, begin).run
    assert 'warning' not in capsys.readouterr().err
    assert len(list(tmp_path.rglob('*.wandb')))==2
    written = b''.join(p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())
    assert all(word in written for word in (b'epoch/AP', b'step/loss', b'training_config.num_epochs'))
    assert KEY.encode() not in written
