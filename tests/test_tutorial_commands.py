"The commands of tutorials that are shown without being run: all are accepted, those for a Raspberry Pi are run."
import json
import re
import shlex
from pathlib import Path

import pytest

from effdet_nb.app.cli import TASKS
from effdet_nb.app.options import parse_options
from effdet_nb.detector.toy_data import SHAPE_NAMES, make_toy_dataset
from effdet_nb.export.runtimes import load_detector

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT/'nbs'/'tutorials'
PAGES = 'blood_cells', 'deploy', 'prune_and_retrain', 'raspberry_pi'
END_OF_COMMAND = {'&&', '||', '|', ';', '>', '>>', '&'}


def split_commands(line):
    "The commands of a line of shell, as lists of words."
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ''
    commands = [[]]
    for word in lexer:
        if word in END_OF_COMMAND: commands.append([])
        else: commands[-1].append(word)
    return commands


def page_commands(page):
    "The commands of this package on a page, in their order: pairs of a task and its words."
    cells = json.loads((TUTORIALS/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']).replace('\\\n', ' ') for cell in cells if cell['cell_type'] == 'code']
    lines = [line[1:] for source in sources for line in source.splitlines() if line.startswith('!')]
    commands = [command for line in lines for command in split_commands(line)]
    return [(words[0].removeprefix('effdet_'), words[1:]) for words in commands
            if words and words[0].startswith('effdet_')]


def parse(task, words): return parse_options(TASKS[task], words, f'effdet_{task}')


@pytest.mark.parametrize('page', PAGES)
def test_every_command_is_accepted(page):
    commands = page_commands(page)
    assert len(commands) >= 4
    for task, words in commands: assert parse(task, words)


@pytest.mark.parametrize('line', [
    'effdet_export -m a.tlt --data_typo int8', 'effdet_export -m a.tlt --data_type int7', 'effdet_evaluate --resize no',
    'effdet_dataset_convert -i a -a b.json -o c -t d -q', 'effdet_train -e a.txt -d b c'])
def test_a_command_that_does_not_exist_is_found(line):
    (name, *words), = split_commands(line)
    with pytest.raises(SystemExit): parse(name.removeprefix('effdet_'), words)


def test_commands_end_at_a_pipe_and_quotes_are_kept():
    line = "sed 's/a;b/c|d/' x > y && effdet_evaluate -e y -m 'a b.tlt' | head -9"
    assert split_commands(line) == [['sed', 's/a;b/c|d/', 'x'], ['y'],
                                    ['effdet_evaluate', '-e', 'y', '-m', 'a b.tlt'], ['head', '-9']]


# From photographs to a Raspberry Pi

SHORT = [f'--set={field}' for field in (
    'model_config.model_name=efficientdet-tiny', 'dataset_config.image_size=128,128', 'training_config.num_epochs=1',
    'training_config.checkpoint=', 'training_config.train_batch_size=4', 'training_config.lr_warmup_epoch=0',
    'training_config.checkpoint_period=1', 'eval_config.eval_epoch_cycle=1')]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "The folder of the tutorial, with drawings as photographs and the spec of the repository."
    make_toy_dataset(tmp_path/'photos', num_train=8, num_val=3, image_hw=(128, 128))
    for name in ('train.json', 'val.json'): (tmp_path/'photos'/name).rename(tmp_path/name)
    spec = (ROOT/'specs'/'photographs_lite0.txt').read_text(encoding='utf-8')
    (tmp_path/'photos.txt').write_text(re.sub(r'num_classes: \d+', f'num_classes: {len(SHAPE_NAMES)+1}', spec))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_path_to_a_raspberry_pi_can_be_walked(photos, capsys):
    tasks = []
    for task, words in page_commands('raspberry_pi'):
        TASKS[task](**parse(task, [*words, *(SHORT if '-e' in words else [])]))
        tasks.append(task)
    assert tasks == ['dataset_convert', 'dataset_convert', 'check', 'train', 'evaluate', 'export']
    detector = load_detector('photos.tflite')
    assert detector.meta['data_type'] == 'int8' and list(detector.classes.names) == list(SHAPE_NAMES)
    assert capsys.readouterr().out.count('AP') >= 3       # of evaluation, and before and after the export
