"The quickstart: its settings, its commands, and (slow) the whole of it."
import shlex, subprocess, sys
from pathlib import Path

import pytest

from effdet_nb.app import quickstart as Q
from effdet_nb.train.spec import Spec


@pytest.mark.parametrize('changed', [{}, dict(num_epochs=1, retrain_epochs=1), dict(size=256, batch_size=2), dict(num_epochs=100, learning_rate=.01, seed=7)])
def test_any_settings_make_a_spec_that_trains(changed, tmp_path):
    settings = Q.QuickstartSettings(**changed)
    for spec in (settings.spec(tmp_path), settings.retrain_spec(tmp_path, tmp_path/'pruned.tlt')):
        assert not spec.problems()
        assert spec.training_config.lr_warmup_epoch < spec.training_config.num_epochs and 1 <= spec.eval_config.eval_epoch_cycle <= spec.training_config.num_epochs
        assert Spec.parse(spec.to_text())==spec
    assert settings.spec(tmp_path).training_config.num_examples_per_epoch==settings.num_train


@pytest.mark.parametrize('wrong, says', [(dict(size=100), '128'), (dict(num_train=0), 'num_train 0'), (dict(retrain_epochs=0), 'retrain_epochs 0')])
def test_wrong_settings_are_refused_before_anything_is_made(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says): Q.quickstart(tmp_path/'run', **wrong)
    assert not (tmp_path/'run').exists()


def test_a_strangers_folder_is_left_alone(tmp_path):
    (tmp_path/'photo.jpg').write_bytes(b'mine')
    with pytest.raises(ValueError, match='other files'): Q.quickstart(tmp_path)
    with pytest.raises(ValueError, match='is a file'): Q.quickstart(tmp_path/'photo.jpg')
    assert [p.name for p in tmp_path.iterdir()]==['photo.jpg']


def test_the_commands_in_the_report_are_understood_by_the_commands(tmp_path):
    "Each is parsed by the parser of its own command; none may name an option that does not exist."
    from fastcore.script import anno_parser
    from effdet_nb.app import cli
    f = tmp_path.as_posix()
    lines = [line for _,command in Q.shell_commands(f, Q.QuickstartSettings(), f'{f}/a.tlt', f'{f}/b.tlt', f'{f}/c.onnx') for line in command.splitlines()]
    seen = set()
    for line in lines:
        name,*args = shlex.split(line)
        if name=='python': compile(args[1], '<command>', 'exec'); continue
        anno_parser(getattr(cli, name)).parse_args(args)        # exits, and so fails, on anything unknown
        seen.add(name)
    assert seen=={'effdet_dataset_convert', 'effdet_train', 'effdet_evaluate', 'effdet_prune', 'effdet_export', 'effdet_inference'}


def test_the_command_has_no_settings_of_its_own():
    "Its options are settings, and one left out keeps the default of `Settings`."
    import inspect
    from dataclasses import asdict
    from effdet_nb.app import cli
    ours, theirs = asdict(Q.QuickstartSettings()), inspect.signature(cli.effdet_quickstart).parameters
    shared_dir = set(ours) & set(theirs)
    assert {'num_train', 'num_epochs', 'seed'}<=shared_dir
    assert all(theirs[k].default in (None, ours[k]) for k in shared_dir)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path):
    "From an empty folder to a report, as a command: good before pruning, smaller and nearly as good after it, the same again from the exported file."
    done = subprocess.run([Path(sys.executable).with_name('effdet_quickstart'), '--folder', 'run'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    rows = {r.split()[0]: r.split()[1:] for r in done.stdout.splitlines()[1:5]}
    ap50 = {k: float(v[1]) for k,v in rows.items()}
    parameters = {k: v[2] for k,v in rows.items()}
    assert ap50['trained']>=.6
    assert abs(ap50['retrained']-ap50['trained'])<=.05 or ap50['retrained']>ap50['trained']
    assert abs(ap50['exported']-ap50['retrained'])<=.05
    assert int(parameters['retrained'].replace(',',''))<int(parameters['trained'].replace(',',''))
    text = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
    assert text.count('<image href="data:image/')>=12 and 'http' not in text.replace('http-equiv', '')
    for line in done.stdout.splitlines()[6:]: assert (tmp_path/line.split()[-1]).exists(), line
