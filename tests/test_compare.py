"Runs side by side: finished, unfinished, damaged, of another version, or no runs at all."
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import effdet_nb.app.cli as cli
from effdet_nb.app.compare import (
    class_score_rows, compare_runs, different_settings, effdet_compare, plot_runs, read_class_scores, read_run,
    summary_row)
from effdet_nb.app.options import command_parser, parse_options

HEAD = 'epoch,step,loss,seconds,images_per_second,AP,AP50'


def write_run(folder, rows, spec='training_config { num_epochs: 3 }'):
    folder.mkdir(parents=True)
    if spec is not None: (folder/'spec.txt').write_text(spec)
    if rows is not None: (folder/'history.csv').write_text('\n'.join([HEAD, *rows])+'\n')
    return folder


ROWS = ['1,10,3.5,60,8.1,,', '2,20,2.5,60,,0.2,0.4', '3,30,2.0,61,8.3,0.15,0.3']


@pytest.fixture
def runs(tmp_path):
    a = write_run(tmp_path/'a', ROWS)
    b = write_run(tmp_path/'b', ROWS[:2], 'training_config { num_epochs: 3 learning_rate: 5e-05 }'
                  ' dataset_config { training_file_pattern: "rec<b>/*" }')
    (a/'model.best.tlt').write_bytes(bytes(2000))
    return a, b


def test_the_summary_has_best_and_last_ap_time_and_size(runs):
    a, b = (summary_row(run) for run in compare_runs(runs).runs)
    assert (a['run'], a['best AP'], a['at epoch'], a['last AP'], a['AP50'])==('a', .2, 2, .15, .4)
    assert (a['time'], a['model'], a['state'], a['last loss'])==('3 min 01 s', '2 kB', 'finished', 2.)
    assert (b['state'], b['model'], b['images/s'], b['time'])==('unfinished, 2 of 3 epochs', None, None, '2 min 00 s')


def test_only_settings_that_differ_are_shown_with_all_their_digits(runs):
    comparison = compare_runs(runs)
    assert [row['field'] for row in different_settings(comparison.runs)]==[
        'dataset_config.training_file_pattern', 'training_config.learning_rate']
    assert '5e-05' in str(comparison) and 'momentum' not in str(comparison)


@pytest.mark.parametrize('spec, state', [
    ('training_config { num_epochs: 3 }', 'finished'),
    ('training_config { num_epochs: 9 stop_at_epoch: 3 }', 'finished'),
    ('training_config { num_epochs: 3 stop_at_epoch: 9 }', 'finished'),
    ('training_config { num_epochs: 9 }', 'unfinished, 3 of 9 epochs'), (None, '3 epochs, end unknown'),
    ('no_such_config {', '3 epochs, end unknown')])
def test_a_run_is_finished_at_its_last_epoch(tmp_path, spec, state):
    assert read_run(write_run(tmp_path/'r', ROWS, spec), 'r').state()==state


@pytest.mark.parametrize('rows, spec, words', [
    (None, 'training_config { num_epochs: 3 }', ['r: history.csv is missing or empty']),
    ([], None, ['r: history.csv is missing or empty: no epoch was finished']),
    (ROWS, 'training_config { field_of_version_9: 3 }', ['r: its settings cannot be compared', 'field_of_version_9']),
    (ROWS, 'training_config {', ['cannot be compared', 'closing }']), (ROWS, '\x00\ufffd', ['cannot be compared'])])
def test_what_cannot_be_read_is_one_sentence_beside_the_other_runs(runs, tmp_path, rows, spec, words):
    comparison = compare_runs([*runs, write_run(tmp_path/'r', rows, spec)])
    note, = comparison.notes()
    assert all(word in note for word in words) and note in str(comparison) and '\n' not in note


@pytest.mark.parametrize('text', [
    'nonsense', 'a,b\n1,2\n', HEAD+'\nx,1,1,1,1,1,1\n', '\x00\x01', HEAD+'\n,1,2,3,4,5,6\n'])
def test_a_damaged_history_names_its_file(runs, text):
    (runs[1]/'history.csv').write_text(text)
    if text in ('nonsense', '\x00\x01'): assert compare_runs(runs).notes()          # a heading without rows: no epoch
    else:
        with pytest.raises(ValueError, match='b/history.csv: is not the history of a run'): compare_runs(runs)


@pytest.mark.parametrize('row', ['2,20,2.5,60,,0.2,0.4,9', '2,20,2.5,60,,0.2,0.4,', '2,20,2.5,60,8,0.2,0.4,1,2,3'])
def test_a_row_with_too_many_cells_is_one_sentence(tmp_path, row):
    folder = write_run(tmp_path/'r', [ROWS[0], row])
    with pytest.raises(ValueError, match='r/history.csv: is not the history of a run'): read_run(folder, 'r')


def test_values_that_are_not_finite_and_undefined_ap_are_left_out(tmp_path):
    run = read_run(write_run(tmp_path/'r', ['1,1,nan,5,inf,-1,-1', '2,2,1.5,5,,,']), 'r')
    row = summary_row(run)
    assert row['best AP'] is None and row['last AP'] is None and row['last loss']==1.5 and row['at epoch'] is None


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"per_class": 3}', '{"per_class": [{"name": "x"}]}'])
def test_other_metrics_files_are_passed_over(runs, content):
    (runs[0]/'metrics.json').write_text(content)
    assert read_class_scores(runs[0])=={}


def test_ap_of_classes_that_only_one_run_has(runs):
    for folder, rows in zip(runs, ([dict(name='cat', AP=.5), dict(name='dog', AP=-1)], [dict(name='emu', AP=.25)])):
        (folder/'evaluation').mkdir()
        (folder/'evaluation'/'metrics.json').write_text(json.dumps(dict(per_class=rows)))
    assert class_score_rows(compare_runs(runs).runs)==[
        {'class': 'cat', 'a': .5, 'b': None}, {'class': 'dog', 'a': None, 'b': None},
        {'class': 'emu', 'a': None, 'b': .25}]


@pytest.mark.parametrize('name', ['class', 'field', 'run'])
def test_a_run_named_like_a_column_replaces_no_column(runs, tmp_path, name):
    other = write_run(tmp_path/name, ROWS, 'training_config { num_epochs: 5 }')
    for folder in (runs[0], other):
        (folder/'metrics.json').write_text(json.dumps(dict(per_class=[dict(name='cat', AP=.5)])))
    found = compare_runs([runs[0], other]).to_dict()
    shown = name if name=='run' else f'./{name}'
    assert found['classes']==[{'class': 'cat', 'a': .5, shown: .5}]
    assert found['settings']==[{'field': 'training_config.num_epochs', 'a': 3, shown: 5}]


def test_the_same_folder_twice_is_one_run_and_equal_names_are_told_apart(runs, tmp_path):
    other = write_run(tmp_path/'old'/'a', ROWS)
    comparison = compare_runs([runs[0], f'{runs[0]}/', other])
    assert [run.name for run in comparison.runs]==[f'{tmp_path.name}/a', 'old/a']


def test_the_command_prints_tables_and_writes_a_page(runs, tmp_path, capsys):
    effdet_compare(runs=list(map(str, runs)), output_path=str(tmp_path/'new'/'page.html'))
    text, page = capsys.readouterr().out, (tmp_path/'new'/'page.html').read_text()
    for word in ('0.200', 'unfinished, 2 of 3 epochs', '5e-05'): assert word in text and word in page
    assert 'rec&lt;b&gt;/*' in page and page.count('<svg')==2 and 'effdet_evaluate' in page


@pytest.mark.parametrize('names', [['_old', 'new'], ['_old']])
def test_every_run_is_in_the_legend(tmp_path, names):
    from matplotlib.figure import Figure
    figure = Figure()
    plot_runs(figure, compare_runs([write_run(tmp_path/name, ROWS) for name in names]).runs, 'loss')
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()]==names


def test_the_page_sorts_times_and_sizes_by_their_numbers(runs, tmp_path):
    effdet_compare(runs=[str(run) for run in runs], output_path=str(tmp_path/'x.html'))
    assert re.findall('<td><data value="(.*?)">(.*?)</data></td>', (tmp_path/'x.html').read_text())==[
        ('181.0', '3 min 01 s'), ('2000', '2 kB'), ('120.0', '2 min 00 s')]


def test_json_is_one_document_without_nan(runs, capsys):
    effdet_compare(runs=list(map(str, runs)), json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [row['run'] for row in found['runs']]==['a', 'b'] and len(found['histories']['a'])==3


@pytest.mark.parametrize('names, words', [
    (['nowhere'], ['nowhere: there is no such folder']),
    (['empty'], ['history.csv is missing or empty', '--model_dir']),
    (['a/history.csv'], ['history.csv: is a file. Give the --model_dir'])])
def test_without_any_run_it_fails_with_one_line(runs, tmp_path, names, words, capsys):
    (tmp_path/'empty').mkdir()
    with pytest.raises(SystemExit) as e: effdet_compare(runs=[str(tmp_path/name) for name in names])
    message = capsys.readouterr().err
    assert e.value.code==1 and message.count('\n')==1 and all(word in message for word in words)


@pytest.mark.parametrize('line, words', [
    ('compare', ['RUN']), ('compare -d a b', ['-d', 'without an option']), ('compare a -o p.html b', ['-o', 'b']),
    ('compare a --jsn', ['Did you mean --json?'])])
def test_a_wrong_line_is_answered_by_one_line(line, words, capsys):
    task, *args = line.split()
    with pytest.raises(SystemExit) as e: parse_options(cli.TASKS[task], args, f'effdet_{task}')
    message = capsys.readouterr().err
    assert e.value.code==2 and message.count('\n')==1 and all(word in message for word in words), message


def test_the_help_ends_with_an_example_that_is_valid():
    text = ' '.join(command_parser(effdet_compare, 'effdet_compare').format_help().split())
    assert text.endswith(f'Example: effdet_compare {effdet_compare.example}')
    options = parse_options(effdet_compare, shlex.split(effdet_compare.example))
    assert options['runs']==['runs/first', 'runs/second'] and cli.TASKS['compare'] is effdet_compare


def test_the_search_in_the_chapter_runs(tmp_path, monkeypatch, capsys):
    if not importlib.util.find_spec('optuna'):
        assert os.environ.get('CI')!='true', 'optuna is missing in CI: see dev_requirements in settings.ini'
        pytest.skip('optuna is not installed')
    import optuna

    from effdet_nb.train import fit
    monkeypatch.chdir(tmp_path)
    (tmp_path/'train-0').touch()
    (tmp_path/'spec.txt').write_text(
        'dataset_config { num_classes: 4 image_size: "128,128" training_file_pattern: "train-*" }')
    rates = []

    def train(spec, model_dir, callbacks):
        "Reports an AP that is best at a learning rate of 0.05, as a training would."
        callback, = callbacks
        callback.set_model(SimpleNamespace(stop_training=False))
        rates.append(spec.training_config.learning_rate)
        for epoch in range(4): callback.on_epoch_end(epoch, dict(AP=(epoch+1)*(.2-abs(rates[-1]-.05)), loss=1.))
        assert Path(model_dir).parent.name=='runs' and spec.eval_config.eval_epoch_cycle==2
        return [dict(AP=.5-abs(rates[-1]-.05)), dict(loss=1.)]

    monkeypatch.setattr(fit, 'train', train)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chapter, = (Path(__file__).resolve().parents[1]/'nbs'/'app').glob('*_compare.ipynb')
    pages = [''.join(cell['source']) for cell in json.loads(chapter.read_text(encoding='utf-8'))['cells']]
    program, = [block for page in pages for block in re.findall(r'```python\n(.*?)```', page, re.S)]
    assert 20<len(program.splitlines())<40
    exec(compile(program, 'search.py', 'exec'), space := {})
    assert len(rates)==10 and len(set(rates))>5 and space['study'].best_value>.4
    assert (tmp_path/'sweep.db').is_file() and 'learning_rate' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['model.step-100.tlt', 'model.best.tlt', 'evaluation/metrics.json'])
def test_a_file_that_is_deleted_while_it_is_read_is_as_if_it_had_not_been_there(runs, name, monkeypatch):
    for step in (50, 100): (runs[1]/f'model.step-{step}.tlt').write_bytes(bytes(step))
    for folder in ('evaluation', 'older'):
        (runs[1]/folder).mkdir()
        (runs[1]/folder/'metrics.json').write_text(json.dumps(dict(per_class=[dict(name='cat', AP=.5)])))
    monkeypatch.setattr(Path, 'is_file', lambda path: os.path.isfile(path) or path.name==Path(name).name)
    listed = Path.glob
    def glob(folder, pattern):
        paths = list(listed(folder, pattern))
        (runs[1]/name).unlink(missing_ok=True)
        return paths
    monkeypatch.setattr(Path, 'glob', glob)
    run = read_run(runs[1], 'b')
    assert run.class_scores=={'cat': .5} and run.model_bytes==(50 if '100' in name else 100)
