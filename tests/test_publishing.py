"A set of shards is visible whole or not at all, whenever its conversion is killed, and the same command goes on."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effdet_nb.data.check import check_shards
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.record_index import Records
from effdet_nb.data.shards import output_lock
from effdet_nb.data.tfrecord import find_record_files, load_sidecar
from effdet_nb.detector.toy_data import make_toy_dataset

unix_only = pytest.mark.skipif(not hasattr(os, 'fork'), reason='signals differ')
slow = pytest.mark.slow


@pytest.fixture(scope='module')
def toy_dataset(tmp_path_factory):
    folder = make_toy_dataset(tmp_path_factory.mktemp('toy'), 6, 1)
    return folder/'train', folder/'train.json'


def convert_earlier_labels(toy_dataset, folder, num_shards):
    "Converts the file while it has other category ids, so that shards have equal sizes and other contents."
    images, annotations = toy_dataset
    original = annotations.read_bytes()
    data = json.loads(original)
    for annotation in data['annotations']: annotation['category_id'] = annotation['category_id'] % 3 + 1
    annotations.write_text(json.dumps(data))
    try: dataset_convert(images, annotations, folder, num_shards=num_shards)
    finally: annotations.write_bytes(original)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def visible_shards(folder):
    "What training and evaluation read: name -> bytes of each shard, or None if they refuse to read them."
    files = find_record_files(folder/'train*')
    try:
        if files: Records.from_files(files)
        if files: assert load_sidecar(folder/'train*')
    except ValueError as e:
        assert 'Run the same dataset_convert command again' in str(e)
        return None
    return {Path(f).name: Path(f).read_bytes() for f in files}


def killed_at_step(step, convert):
    "Runs a conversion in a copy of this process, killed before its `step`th change of the folder; True if it ended."
    child = os.fork()
    if child == 0:
        left = [step]
        def counted(change):
            def run(*args, **kw):
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **kw)
            return run
        for name in ('replace', 'unlink', 'rmdir'): setattr(os, name, counted(getattr(os, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        convert()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@unix_only
@pytest.mark.parametrize('earlier,now', [
    (3, 2), (2, 2), pytest.param(None, 2, marks=slow), pytest.param(2, 3, marks=slow)])
def test_shards_are_visible_together_or_not_at_all_at_every_step(toy_dataset, tmp_path, earlier, now):
    images, annotations = toy_dataset
    out, before, straight = tmp_path/'out', tmp_path/'before', tmp_path/'straight'
    before.mkdir()
    if earlier: convert_earlier_labels(toy_dataset, before, earlier)
    dataset_convert(images, annotations, straight, num_shards=now)
    old, new = (visible_shards(folder) for folder in (before, straight))
    assert old != new
    states = set()
    for step in range(200):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        ended = killed_at_step(step, lambda: dataset_convert(images, annotations, out, num_shards=now))
        seen = visible_shards(out)
        assert seen in (old, new, None)
        states.add('refused' if seen is None else 'old' if seen == old else 'new')
        dataset_convert(images, annotations, out, num_shards=now)
        assert contents(out) == contents(straight)
        if ended: break
    assert ended and step > 10 and states == {'old', 'refused', 'new'}


@unix_only
@pytest.mark.parametrize('step', [8, 12, 15])
def test_another_conversion_replaces_one_that_was_killed(toy_dataset, tmp_path, step):
    images, annotations = toy_dataset
    convert_earlier_labels(toy_dataset, tmp_path/'out', 3)
    killed_at_step(step, lambda: dataset_convert(images, annotations, tmp_path/'out', num_shards=4))
    dataset_convert(images, annotations, tmp_path/'out', num_shards=2)
    dataset_convert(images, annotations, tmp_path/'straight', num_shards=2)
    assert contents(tmp_path/'out') == contents(tmp_path/'straight')


def test_one_conversion_at_a_time_writes_to_a_tag(toy_dataset, tmp_path):
    images, annotations = toy_dataset
    with output_lock(tmp_path/'out', 'train'):
        with pytest.raises(ValueError, match='another process is writing "train"'):
            dataset_convert(images, annotations, tmp_path/'out', num_shards=2)
        dataset_convert(images, annotations, tmp_path/'out', tag='val', num_shards=2)
        dataset_convert(images, annotations, tmp_path/'elsewhere', num_shards=2)
    assert not [p for p in contents(tmp_path/'out') if p.startswith(('train', '.'))]


@pytest.mark.parametrize('ending', ['', '.tfrecord', '.other'])
@pytest.mark.parametrize('lost', [(0,), (1, 3), (1, 2, 3, 4, 5)])
def test_check_counts_the_shards_that_names_announce(toy_dataset, tmp_path, ending, lost):
    dataset_convert(*toy_dataset, tmp_path, num_shards=6)
    (tmp_path/'train_records.json').unlink()
    for i, path in enumerate(sorted(tmp_path.glob('*.tfrecord'))):
        path.rename(path.with_suffix(ending))
        if i in lost: path.with_suffix(ending).unlink()
    pattern = f'{tmp_path}/train-*-of-*'
    problems = [*check_shards(Records.from_files(find_record_files(pattern)), 'training_file_pattern', pattern)]
    if ending == '.other': assert not problems                      # not a name that TensorFlow's tools give
    else:
        problem, = problems
        verb = 'is' if len(lost)==1 else 'are'
        assert problem.is_error and problem.message.startswith(f'{len(lost)} of 6 shards {verb} missing')


@unix_only
@pytest.mark.parametrize('name,code,notes', [
    ('SIGTERM', 143, 0), ('SIGINT', 130, 1), pytest.param('SIGTERM', 143, 4, marks=slow),
    pytest.param('SIGINT', 130, 0, marks=slow), pytest.param('SIGHUP', 129, 2, marks=slow)])
def test_a_signal_to_all_processes_ends_in_one_sentence(toy_dataset, tmp_path, name, code, notes):
    images, annotations = toy_dataset
    data = json.loads(annotations.read_text())
    infos = [dict(data['images'][i % 6], id=i) for i in range(3000)]
    (tmp_path/'many.json').write_text(json.dumps(dict(data, images=infos, annotations=[])))
    arguments = ['-i', images, '-a', tmp_path/'many.json', '-o', tmp_path/'out', '-t', 'many', '-s', '64',
                 '--workers', '2']
    command = Path(sys.executable).with_name('effdet_dataset_convert')
    run = subprocess.Popen([command, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
                           start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    folder = tmp_path/'out'/'.many.part'
    while run.poll() is None and not folder.exists(): time.sleep(.01)
    while run.poll() is None and len([*folder.glob('many-*.json')]) < notes: time.sleep(.01)
    if run.poll() is not None: pytest.fail(run.stderr.read())
    os.killpg(run.pid, getattr(signal, name))
    error = run.communicate(timeout=30)[1]
    assert run.returncode == code, error
    assert 'Traceback' not in error and 'Exception' not in error
    ending = dict(SIGTERM='terminated', SIGINT='interrupted', SIGHUP='terminal was closed')
    assert error.splitlines()[-1].endswith(ending[name])
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'.many.part'}
