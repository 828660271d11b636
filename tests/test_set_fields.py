"Fields of a spec from the command line: `--set SECTION.FIELD=VALUE`, checked like a line of the file."
import inspect
import warnings

import pytest
from hypothesis import given, settings, strategies as st

import effdet_nb.app.cli as cli
from effdet_nb.app.options import parse_options
from effdet_nb.train.experiment import check_spec_changes, changed_fields, with_defaults
from effdet_nb.train.fields import SPEC_SECTIONS, section_fields
from effdet_nb.train.set_fields import load_spec, parse_assignment, set_fields
from effdet_nb.train.spec import Spec, SpecError

FIELDS = [(section, name) for section in SPEC_SECTIONS for name in section_fields(section)]
LINES = dict(
    train='-e {spec} -d {out}', evaluate='-e {spec} -m {out}/no.tlt', check='-e {spec}',
    inference='-m {out}/no.tlt -i {out} -o {out}/images -e {spec}', export='-m {out}/no.tlt -e {spec}')
LINES['import'] = '-m {out}/no.pth -o {out}/m.tlt -e {spec}'


def value_of(text): return parse_assignment(text)[1]


def problems_of(*assignments):
    with pytest.raises(SpecError) as e: set_fields(Spec(name='s.txt'), assignments)
    return e.value.problems


@pytest.mark.parametrize('text, value', [
    ('amp=true', True), ('training_config.amp=False', False), ('rand_hflip=1', True), ('freeze_bn=f', False),
    ('num_epochs=0x10', 16), ('training_config.tf_random_seed=0', 0), ('eval_samples = 100', 100),
    ('learning_rate=1e-3', .001), ('momentum=.5', .5), ('augmentation_config.mosaic=1', 1.),
    ('image_size=256,512', '256,512'), ('dataset_config.image_size="512x256"', '512x256'),
    ("model_name='efficientdet_d1'", 'efficientdet-d1'), ('model_config.model_name=EfficientDet-Lite0',
                                                          'efficientdet-lite0'),
    ('training_config.model_name=efficientdet-d2', 'efficientdet-d2'),      # an alias
    ('aspect_ratios=[(1.0, 1.0), (1.4, 0.7)]', '[(1.0, 1.0), (1.4, 0.7)]'), ('freeze_blocks=0, 1', '0, 1'),
    ('training_file_pattern=records/a=b/train-*', 'records/a=b/train-*'), ('pruned_model_path=""', ''),
    ('checkpoint=größe ☃.tlt', 'größe ☃.tlt'), (r'skip_checkpoint_variables=block\d+', r'block\d+'),
    (r'training_file_pattern="D:\\new\\t*"', r'D:\new\t*'), (r'training_file_pattern=D:\new\t*', r'D:\new\t*'),
])
def test_a_value_of_every_type_is_read(text, value):
    assert value_of(text)==value and type(value_of(text)) is type(value)


@pytest.mark.parametrize('text, words', [
    ('train_config.amp=True', ['train_config: no such section', 'Did you mean training_config?']),
    ('eval_config.num_epochs=3', ['no such field', 'It belongs in training_config']),
    ('training_config.learning_rat=.1', ['Did you mean learning_rate?']),
    ('learning-rate=.1', ['Did you mean training_config.learning_rate?']),
    ('epochs=3', ['Did you mean training_config.num_epochs?']),
    ('zzz=3', ['zzz: no such field', 'SECTION.FIELD=VALUE']),
    ('optimizer=adam', ['learning_rate and momentum']),
    ('training_config=3', ['is a section', 'training_config.train_batch_size']),
    ('amp=maybe', ['training_config.amp: maybe is not True or False']),
    ('amp=yes', ['yes is not True or False']),
    ('num_epochs=-3', ['-3 is not a whole number from 0']), ('num_epochs=1.5', ['1.5 is not a whole number']),
    ('num_epochs="3"', ['"3" is not a whole number']),
    ('learning_rate=0,1', ['0,1 is not a number']), ('learning_rate=fast', ['fast is not a number']),
    ('num_epochs=5 amp: True', ['5 amp: True is not a whole number']),
    ('num_epochs=5 } eval_config { eval_samples: 1', ['is not a whole number']),
    ('checkpoint="a.tlt" amp: True', ['is not a string in quotes']), ("checkpoint='a", ['is not a string in quotes']),
    ('num_epochs', ['num_epochs: a value is missing']), ('num_epochs=', ['a value is missing after =']),
    ('=3', ['no such field']), ('', ['a value is missing']),
    (r'training_file_pattern="records\train-*"', ['records/train-*']),
    ('checkpoint='+'x'*9000, ['9,002 characters', 'at most 8,192']),
])
def test_a_wrong_field_or_value_is_one_sentence_with_its_option(text, words):
    problem, = problems_of(text)
    assert all(word in problem for word in words), problem
    assert problem.endswith(')') and '(--set ' in problem and len(problem)<300


@pytest.mark.parametrize('text, words', [
    ('momentum=2', ['2.0 is not allowed: it must be at least 0 and below 1', '(--set momentum=2)']),
    ('num_epochs=0', ['0 is not allowed: it must be at least 1']),
    ('image_size=96,512', ['each side must be at least 128']),
    ('model_name=d0', ['"efficientdet-d0" to "efficientdet-d7"']),
    ('num_channels=2', ['3 or 1']), ('hue_jitter=nan', ['from 0 to 0.5']),
    ('random_crop_min_scale=9', ['is above random_crop_max_scale']),
    ('training_file_pattern=nowhere/train-*', ['matches no file', '(--set training_file_pattern=nowhere/train-*)']),
])
def test_a_value_out_of_range_is_found_by_the_check_of_the_task(text, words):
    problems = '\n'.join(set_fields(Spec(), [text]).problems('train'))
    assert all(word in problems for word in words), problems


def test_all_problems_of_file_and_options_are_listed_together(tmp_path):
    (tmp_path/'s.txt').write_text('training_config { learning_rat: 1 }')
    with pytest.raises(SpecError) as e: load_spec(tmp_path/'s.txt', 'train', ['num_epochs=x', 'zzz=1'])
    assert len(e.value.problems)==3 and 's.txt:1:19' in e.value.problems[0]


def test_an_option_supplies_what_the_file_lacks_and_replaces_what_is_out_of_range(tmp_path):
    spec_file = tmp_path/'s.txt'
    spec_file.write_text('eval_config { min_score_thresh: 7 }')
    with pytest.raises(SpecError, match='s.txt:1:15'): load_spec(spec_file, 'inference')
    assert load_spec(spec_file, 'inference', ['min_score_thresh=0']).eval_config.min_score_thresh==0
    with pytest.raises(SpecError, match='num_classes: must be given'): load_spec(spec_file, 'evaluate', ['amp=True'])
    (tmp_path/'val-0').write_text('')
    found = load_spec(spec_file, 'evaluate', [
        'min_score_thresh=.3', 'num_classes=4', f'validation_file_pattern={tmp_path}/val-*'])
    assert found.dataset_config.num_classes==4 and found.is_set('dataset_config', 'num_classes')


def test_a_field_given_twice_has_its_later_value_and_a_warning(recwarn):
    spec = set_fields(Spec(), ['num_epochs=3', 'training_config.num_epochs=4', 'amp=True', 'amp=True'])
    assert spec.training_config.num_epochs==4
    warning, = [str(w.message) for w in recwarn]
    assert '3 (--set num_epochs=3) and 4 (--set training_config.num_epochs=4)' in warning
    with warnings.catch_warnings():
        warnings.simplefilter('error')                    # the file and the option are not "twice"
        set_fields(Spec.parse('training_config { num_epochs: 1 }'), ['num_epochs=2'])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([w for w in FIELDS if section_fields(w[0])[w[1]].type is str and 'model_name' not in w]),
       st.text(st.characters(blacklist_categories=['Cs', 'Cc']), max_size=30))
def test_any_text_is_taken_as_it_is(where, text):
    text = text.strip()
    if text[:1] in ('"', "'", '~'): return
    spec = set_fields(Spec(), [f'{".".join(where)}={text}'])
    assert getattr(getattr(spec, where[0]), where[1])==text
    assert Spec.parse(spec.to_text())==spec                # and survives in the effective spec


@pytest.mark.parametrize('section, name', FIELDS)
def test_every_field_can_be_set_to_what_its_file_would_contain(section, name):
    default = section_fields(section)[name].default
    spec = set_fields(Spec(), [f'{name}={default}'])
    assert getattr(getattr(spec, section), name)==default and spec.is_set(section, name)
    assert with_defaults(spec).is_set(section, name)


def test_a_continued_run_treats_an_option_like_a_changed_file():
    old = Spec.parse('training_config { num_epochs: 3 } model_config { num_scales: 3 }')
    pace = dict(global_batch=4, steps_per_epoch=3.)
    for option, line in (('num_epochs=5', 'num_epochs: 5'), ('momentum=0', 'momentum: 0')):
        edited = Spec.parse(f'{old}\ntraining_config {{ {line} }}'.replace('num_epochs: 3', ''))
        edited = edited if 'num_epochs' in line else set_fields(edited, ['num_epochs=3'])
        changes = [check_spec_changes(changed_fields(old, new), pace, pace, 'c')
                   for new in (set_fields(old, [option]), edited)]
        assert changes[0]==changes[1]!=''
    with pytest.raises(ValueError, match='num_scales was 3 and is 2'):
        check_spec_changes(changed_fields(old, set_fields(old, ['num_scales=2'])), pace, pace, 'c')


@pytest.mark.parametrize('task', LINES)
def test_every_command_with_a_spec_checks_the_option(task, tmp_path, capsys):
    (tmp_path/'s.txt').write_text('dataset_config { num_classes: 4 }')
    words = LINES[task].format(spec=tmp_path/'s.txt', out=tmp_path/'out').split()
    options = parse_options(cli.TASKS[task], [*words, '--set', 'num_epochs=3', 'zzz=1', '--set', 'lr=1'], task)
    assert options['set']==['num_epochs=3', 'zzz=1', 'lr=1']
    with pytest.raises(SystemExit) as e: cli.TASKS[task](**options)
    message = capsys.readouterr().err
    assert e.value.code==1 and '(--set zzz=1)' in message and 'Did you mean training_config.learning_rate?' in message
    assert not (tmp_path/'out').exists()


def test_all_commands_with_a_spec_have_the_option():
    for task, command in cli.TASKS.items():
        parameters = inspect.signature(command).parameters
        if 'experiment_spec_file' in parameters and task!='gen_trt_engine': assert task in LINES and 'set' in parameters


@pytest.mark.parametrize('line, words', [
    ('dataset_convert -i a -a b -o c --set num_epochs=3', ['--set', 'reads no spec']),
    ('prune -m a -o b --set num_epochs=3', ['--set', 'reads no spec']),
    ('gen_trt_engine -m a --set x=3', ['--set', 'contains its settings']),
    ('quickstart --set num_epochs=3', ['--set', 'options']),
    ('train -e a -d b num_epochs=3', ['--set num_epochs=3']),
    ('train -e a -d b --epochs 3', ['--set training_config.num_epochs=']),
    ('train -e a -d b --set', ['--set', 'expected at least one argument']),
])
def test_a_wrong_line_is_answered_by_one_line(line, words, capsys):
    task, *args = line.split()
    with pytest.raises(SystemExit): parse_options(cli.TASKS[task], args, f'effdet_{task}')
    message = capsys.readouterr().err
    assert message.count('\n')==1 and all(word in message for word in words), message
