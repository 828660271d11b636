"The Tab key: what bash gets from the commands, and the scripts for each shell."
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

import effdet_nb.app.cli as cli
from effdet_nb.app.completion import SHELLS, field_words
from effdet_nb.app.options import parse_options


@pytest.fixture(autouse=True)
def require_argcomplete(request):
    "argcomplete is a requirement of the package; an old environment may not have it yet."
    if importlib.util.find_spec('argcomplete'): return
    assert os.environ.get('CI')!='true', 'argcomplete is missing in CI: see requirements in settings.ini'
    pytest.skip('argcomplete is not installed: pip install -e .')


def write_program(folder, name):
    "Writes a shell command of this checkout."
    command = 'efficientdet_tf1' if name=='effdet' else name
    code = f'import sys; sys.argv[0] = "{name}"; from effdet_nb.app.cli import {command}; {command}()'
    (folder/name).write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    (folder/name).chmod(0o755)


SCRIPT = '''
eval "$(effdet completion bash)"
while IFS= read -r line; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_TYPE=9
    COMP_WORDS=($line)
    _python_argcomplete "${COMP_WORDS[0]}"
    printf '%s|' "${COMPREPLY[@]}"; echo
done
'''


def press_tab(folder, lines):
    "Returns the words that bash offers at the end of each line."
    for name in ('effdet', 'effdet_train', 'effdet_export'): write_program(folder, name)
    env = os.environ | dict(PATH=f'{folder}:{os.environ["PATH"]}')
    text = '\n'.join(lines)+'\n'
    out = subprocess.run(['bash', '-c', SCRIPT], input=text, capture_output=True, text=True, cwd=folder, env=env,
                         timeout=120)
    assert out.returncode==0, out.stderr
    return [set(filter(None, (word.strip() for word in line.split('|')))) for line in out.stdout.splitlines()]


LINES = {
    'effdet tr': {'train'},
    'effdet c': {'check', 'compare', 'completion'},
    'effdet train --exp': {'--experiment_spec', '--experiment_spec_file'},
    'effdet_train --use': {'--use_amp'},
    'effdet_train -e spec.txt -d runs --log_to ': {'mlflow', 'wandb'},
    'effdet_train --log_to mlflow w': {'wandb'},
    'effdet_export --data_type fp': {'fp16', 'fp32'},
    'effdet_train --set training_config.num_ep': {'training_config.num_epochs='},
    'effdet_train -d ru': {'runs/'},
    'effdet_train -e ru': {'runs/', 'runs.txt'},
    'effdet compare ru': {'runs/'},
    'effdet_train --nonsense': set(),
}


def test_bash_completes_tasks_options_choices_fields_folders_and_files(tmp_path):
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs.txt').touch()
    found = dict(zip(LINES, press_tab(tmp_path, LINES)))
    assert found==LINES


@pytest.mark.parametrize('shell', SHELLS)
def test_the_script_of_a_shell_names_every_command_and_is_valid(shell, capsys):
    cli.effdet_completion(shell=shell)
    script = capsys.readouterr().out
    assert all(f'effdet_{task}' in script for task in cli.TASKS) and 'efficientdet_tf1' in script
    if shutil.which(shell): subprocess.run([shell, '-n'], input=script, text=True, check=True)


@pytest.mark.parametrize('line, words', [
    ('completion', ['shell']), ('completion csh', ['csh', 'bash', 'fish']), ('completion bash zsh', ['zsh'])])
def test_a_wrong_line_is_answered_by_one_line(line, words, capsys):
    task, *args = line.split()
    with pytest.raises(SystemExit) as e: parse_options(cli.TASKS[task], args, f'effdet_{task}')
    message = capsys.readouterr().err
    assert e.value.code==2 and message.count('\n')==1 and all(word in message for word in words), message


@pytest.mark.parametrize('prefix, some', [
    ('', ['amp=', 'training_config.amp=']), ('eval_config.', ['eval_config.eval_samples=']), ('zzz', [])])
def test_fields_of_the_spec_are_offered_with_and_without_section(prefix, some):
    words = field_words(prefix)
    assert set(some)<=set(words) and all(word.startswith(prefix) for word in words) and bool(words)==bool(some)
