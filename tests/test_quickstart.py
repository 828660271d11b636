"The quickstart: its settings, its commands, and (slow) the whole run."
import inspect
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from effdet_nb.app import cli
from effdet_nb.app.options import parse_options
from effdet_nb.app.quickstart import quickstart
from effdet_nb.app.quickstart_settings import QuickstartSettings, shell_commands
from effdet_nb.train.spec import Spec

SETTINGS = [{}, dict(num_epochs=1, retrain_epochs=1), dict(size=256, batch_size=2),
            dict(num_epochs=100, learning_rate=.01, seed=7)]


@pytest.mark.parametrize('changed', SETTINGS)
def test_any_settings_make_a_spec_that_trains(changed, tmp_path):
    settings = QuickstartSettings(**changed)
    for spec in (settings.spec(tmp_path), settings.retrain_spec(tmp_path, tmp_path/'pruned.tlt')):
        assert not spec.problems()
        assert spec.training_config.lr_warmup_epoch < spec.training_config.num_epochs
        assert 1 <= spec.eval_config.eval_epoch_cycle <= spec.training_config.num_epochs
        assert Spec.parse(spec.to_text())==spec
    assert settings.spec(tmp_path).training_config.num_examples_per_epoch==settings.num_train


@pytest.mark.parametrize('wrong, message', [
    (dict(size=100), '128'), (dict(num_train=0), 'num_train 0'), (dict(retrain_epochs=0), 'retrain_epochs 0'),
    (dict(learning_rate=float('nan')), 'learning_rate nan'), (dict(seed=-1), 'tf_random_seed'),
    (dict(retrain_rate=-1.), 'retrain_rate -1'), (dict(pruning_threshold=5.), 'pruning_threshold 5')])
def test_wrong_settings_are_refused_before_anything_is_written(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message): quickstart(tmp_path/'run', **wrong)
    assert not (tmp_path/'run').exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path/'photo.jpg').write_bytes(b'mine')
    with pytest.raises(ValueError, match='other files'): quickstart(tmp_path)
    with pytest.raises(ValueError, match='is a file'): quickstart(tmp_path/'photo.jpg')
    assert [p.name for p in tmp_path.iterdir()]==['photo.jpg']


@pytest.mark.parametrize('content', ['', '[]', '{"size": 128', b'\xff'])
def test_damaged_settings_in_the_folder_are_one_sentence(content, tmp_path):
    path = tmp_path/'quickstart.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match='quickstart.json: damaged, .*Give a new name'): quickstart(tmp_path)


def words_of_shell(command):
    "The words of a command as the shell passes them on."
    line = f'set -- {command}\nfor word; do printf "%s\\0" "$word"; done'
    return subprocess.run(['sh', '-c', line], capture_output=True, text=True, check=True).stdout.split('\0')[:-1]


@pytest.mark.parametrize('folder', ['my runs/a', 'a"b', r'back\slash', "it's", '$HOME/x', 'line\nbreak', 'ü'])
def test_a_folder_of_any_name_gives_a_spec_and_commands_with_this_name(folder):
    settings, paths = QuickstartSettings(), [f'{folder}/{name}' for name in ('a.tlt', 'b.tlt', 'c.onnx')]
    for spec in (settings.spec(folder), settings.retrain_spec(folder, paths[0])):
        assert spec.dataset_config.training_file_pattern==f'{folder}/records/train-*'
    (_, draw), (_, convert), (_, train), (_, evaluate), *_ = shell_commands(folder, settings, *paths)
    arguments = []
    code = words_of_shell(draw)[2].split('; ')[1]
    eval(code, dict(make_toy_dataset=lambda *args: arguments.extend(args)))
    assert arguments==[f'{folder}/shapes', 400, 40, (128, 128), 0]
    assert words_of_shell(convert.split(' -o ')[0])==['effdet_dataset_convert', '-i', f'{folder}/shapes/train', '-a',
                                                        f'{folder}/shapes/train.json']
    assert words_of_shell(train)==['effdet_train', '-e', f'{folder}/spec.txt', '-d', f'{folder}/trained']
    assert words_of_shell(evaluate)[-1]==paths[0]


def test_the_shell_commands_exist_with_these_options(tmp_path):
    "Each is parsed by the parser of its own command; the Python one is compiled and its import is made."
    folder, names = tmp_path.as_posix(), set()
    paths = [f'{folder}/{name}' for name in ('a.tlt', 'b.tlt', 'c.onnx')]
    for _, command in shell_commands(folder, QuickstartSettings(), *paths):
        for line in command.splitlines():
            name, *args = shlex.split(line)
            names.add(name)
            if name!='python': parse_options(getattr(cli, name), args)        # exits on anything unknown
            else:
                compile(args[1], '<command>', 'exec')
                exec(args[1].split(';')[0], {})
    assert names=={'python', 'effdet_dataset_convert', 'effdet_train', 'effdet_evaluate', 'effdet_prune',
                   'effdet_export', 'effdet_inference'}


def test_options_of_the_command_are_settings_with_the_same_defaults():
    settings = asdict(QuickstartSettings())
    parameters = inspect.signature(cli.effdet_quickstart).parameters
    shared = set(settings) & set(parameters)
    assert {'num_train', 'num_epochs', 'seed'}<=shared
    assert all(parameters[name].default in (None, settings[name]) for name in shared)


@pytest.mark.slow
def test_a_whole_quickstart_trains_prunes_and_exports(tmp_path):
    "From an empty folder to a report, as a command: AP is good, retraining recovers it, the exported file keeps it."
    command = Path(sys.executable).with_name('effdet_quickstart')
    done = subprocess.run([command, '--folder', 'run'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:5]}
    ap50 = {model: float(cells[1]) for model, cells in rows.items()}
    parameters = {model: int(cells[2].replace(',', '')) for model, cells in rows.items() if cells[2]!='–'}
    assert ap50['trained']>=.6
    assert abs(ap50['retrained']-ap50['trained'])<=.05 or ap50['retrained']>ap50['trained']
    assert abs(ap50['exported']-ap50['retrained'])<=.05
    assert parameters['retrained']<parameters['trained']
    text = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
    assert text.count('<image href="data:image/')>=12 and 'http' not in text.replace('http-equiv', '')
    for line in lines[6:]: assert (tmp_path/line.split()[-1]).exists(), line
