"Guards for the spec chapter: the table, the round trip, and files as people really have them."

import pickle, re, subprocess, sys, warnings
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from effdet_nb.train.fields import (
    experiment_message_class,
    parse_aspect_ratios,
    parse_image_size,
    proto_schema,
    reference_table,
    SPEC_SECTIONS,
    section_fields,
)
from effdet_nb.train.spec import Spec, SpecError, TASK_SECTIONS

# Field numbers of TAO's messages, in order: what keeps its files and ours the same language.
tao = dict(
    dataset_config='''
        training_file_pattern validation_file_pattern validation_json_file testdev_dir num_classes image_size
        use_fake_data max_instances_per_image skip_crowd_during_training''',
    training_config='''
        train_batch_size iterations_per_loop use_xla disable_logging checkpoint stop_at_epoch resume
        checkpoint_period keep_checkpoint_max num_examples_per_epoch num_epochs skip_checkpoint_variables
        profile_skip_steps tf_random_seed moving_average_decay lr_warmup_epoch lr_warmup_init learning_rate amp
        l2_weight_decay l1_weight_decay pruned_model_path clip_gradients_norm momentum logging_frequency''',
    eval_config='''
        min_eval_interval eval_timeout eval_batch_size eval_epoch_cycle eval_after_training eval_samples
        min_score_thresh max_detections_per_image''',
    augmentation_config='rand_hflip random_crop_min_scale random_crop_max_scale',
    model_config='model_name freeze_bn freeze_blocks aspect_ratios anchor_scale min_level max_level num_scales',
)


def test_the_table_has_taos_names_and_numbers():
    assert list(SPEC_SECTIONS) == list(tao)
    for section, names in tao.items():
        numbers = {n: f.metadata['number'] for n, f in section_fields(section).items()}
        assert {n: i for n, i in numbers.items() if i <= 100} == {
            n: i for i, n in enumerate(names.split(), 1)
        }  # fields of our own are numbered from 101
        assert len(set(numbers.values())) == len(numbers)


def test_every_field_is_explained():
    for section in SPEC_SECTIONS:
        for name, f in section_fields(section).items():
            assert f.metadata['doc'] and f'| `{name}` |' in reference_table(section)


def test_the_manuals_sample_is_read_unchanged(shared_dir):
    text = next((shared_dir / 'seeds').glob('*.txt')).read_text()
    text = text[text.index('training_config {') : text.index('The top level structure')]
    spec = Spec.parse(text, 'sample.txt')
    assert len(spec.fields_set) == 34 - 1  # its 34 lines name model_name twice
    assert spec.model_config.model_name == 'efficientdet-d0' and spec.training_config.profile_skip_steps == 100
    problems = spec.problems('train')
    assert len(problems) == 4 and all(
        'matches no file' in p and re.search(r'\(sample.txt:\d+:\d+\)$', p) for p in problems
    )
    for task in ('inference', 'export', 'prune', 'dataset_convert'):
        assert spec.check(task) is spec


def test_the_manuals_sample_trains_once_its_files_are_there(shared_dir, tmp_path):
    text = next((shared_dir / 'seeds').glob('*.txt')).read_text()
    text = text[text.index('training_config {') : text.index('The top level structure')].replace(
        '/path/to', str(tmp_path)
    )
    for name in (
        'your/pretrained_model',
        'coco/train-00000-of-00001.tfrecord',
        'coco/val-00000-of-00001.tfrecord',
        'coco/annotations/instances_val2017.json',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('')
    for task in TASK_SECTIONS:
        Spec.parse(text).check(task)


def test_defaults_are_those_of_the_manual():
    spec = Spec()
    assert {
        n: getattr(spec.training_config, n)
        for n in (
            'train_batch_size',
            'num_epochs',
            'checkpoint_period',
            'moving_average_decay',
            'tf_random_seed',
            'clip_gradients_norm',
            'skip_checkpoint_variables',
        )
    } == {
        'train_batch_size': 16,
        'num_epochs': 300,
        'checkpoint_period': 10,
        'moving_average_decay': 0.9999,
        'tf_random_seed': 42,
        'clip_gradients_norm': 5,
        'skip_checkpoint_variables': '',
    }
    assert (
        spec.dataset_config.max_instances_per_image,
        spec.dataset_config.skip_crowd_during_training,
        spec.dataset_config.image_hw,
    ) == (100, True, (512, 512))
    e, a, m = spec.eval_config, spec.augmentation_config, spec.model_config
    assert (e.eval_epoch_cycle, e.max_detections_per_image, e.min_score_thresh, e.eval_batch_size) == (10, 100, 0.5, 16)
    assert (a.rand_hflip, a.random_crop_min_scale, a.random_crop_max_scale) == (False, 0.1, 2.0)
    assert (m.model_name, m.min_level, m.max_level, m.num_scales, m.anchor_scale, m.aspects) == (
        'efficientdet-d0',
        3,
        7,
        3,
        4,
        ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4)),
    )


# ── round trips ─────────────────────────────────────────────────────────────────────────────────────────

kinds = {
    int: st.integers(0, 2**32 - 1),
    bool: st.booleans(),
    str: st.text(max_size=12),
    float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 9),
}
everywhere = [(s, n) for s in SPEC_SECTIONS for n in section_fields(s)]


@st.composite
def specs(draw):
    changes = {}
    for section, name in draw(st.lists(st.sampled_from(everywhere), unique=True, max_size=12)):
        changes.setdefault(section, {})[name] = draw(kinds[section_fields(section)[name].type])
    return Spec().replace(**changes)


@given(specs())
def test_a_spec_survives_being_written_and_read(spec):
    again = Spec.parse(spec.to_text())
    assert again == spec and again.fields_set == spec.fields_set and again.to_text() == spec.to_text()


def test_paths_stay_readable():
    assert (
        Spec().replace(training_config=dict(checkpoint='/größe/x')).to_text()
        == 'training_config {\n  checkpoint: "/größe/x"\n}\n'
    )


@given(specs())
def test_the_effective_spec_holds_the_same_values(spec):
    again = Spec.parse(spec.to_text(include_defaults=True))
    assert all(getattr(again, s) == getattr(spec, s) for s in SPEC_SECTIONS) and again.fields_set == set(everywhere)


@given(specs())
def test_protobufs_own_parser_reads_the_same(spec):
    message = text_format.Parse(spec.to_text(), experiment_message_class()())
    assert {(s.name, f.name) for s, m in message.ListFields() for f, _ in m.ListFields()} == spec.fields_set
    assert all(getattr(getattr(message, s), n) == getattr(getattr(spec, s), n) for s, n in spec.fields_set)


@given(specs(), specs())
def test_replacing_twice_keeps_what_was_not_replaced(a, b):
    changes = {}
    for s, n in b.fields_set:
        changes.setdefault(s, {})[n] = getattr(getattr(b, s), n)
    both = a.replace(**changes)
    assert both.fields_set == a.fields_set | b.fields_set
    for s, n in both.fields_set:
        assert getattr(getattr(both, s), n) == getattr(getattr(b if (s, n) in b.fields_set else a, s), n)


words = st.sampled_from(
    [
        'training_config',
        'model_config',
        'data_config',
        'amp',
        'num_epochs',
        'model_name',
        '{',
        '}',
        '<',
        '>',
        '[',
        ']',
        ':',
        ',',
        ';',
        '"',
        '\'',
        '"a"',
        '-',
        '1',
        '1.5',
        'True',
        '# x',
        '\n',
        '"\\',
        '\\377',
        '"\\377"',
        'é',
    ]
)


@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow], max_examples=400, deadline=None)
@given(st.lists(words, max_size=14).map(' '.join) | st.text(max_size=40))
def test_nonsense_is_refused_politely(text):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            spec = Spec.parse(text, 'x')
        except SpecError as e:
            assert e.problems and str(e)
        else:
            assert Spec.parse(spec.to_text()).to_text() == spec.to_text()


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=14).map(' '.join))
def test_what_protobuf_reads_we_read(text):
    try:
        message = text_format.Merge(text, experiment_message_class()())
    except (text_format.ParseError, ValueError):
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert Spec.parse(text).fields_set == {
            (s.name, f.name) for s, m in message.ListFields() for f, _ in m.ListFields()
        }


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(4, 40).map(lambda n: n * 32), st.integers(4, 40).map(lambda n: n * 32))
def test_sizes_in_all_spellings(h, w):
    for text in (f'{h},{w}', f'({h}, {w})', f'[{h},{w}]', f'{w}x{h}', f' {w} X {h} '):
        assert parse_image_size(text) == (h, w)


@given(st.text(max_size=10))
def test_a_size_is_a_size_or_a_ValueError(text):
    try:
        h, w = parse_image_size(text)
    except ValueError as e:
        assert text == '' or 'size' in str(e) or 'side' in str(e)
    else:
        assert h % 32 == w % 32 == 0 and min(h, w) >= 128


@pytest.mark.parametrize(
    'text',
    [
        '[]',
        '1',
        '[1.0, 2.0]',
        '[(1,)]',
        '[(1,2,3)]',
        '[(0,1)]',
        '[(True,1)]',
        '[(1e999,1)]',
        '[' * 5000,
        'x',
        '',
        '[(1.0, 1.0)',
        '().__class__',
    ],
)
def test_odd_aspects_are_refused(text):
    with pytest.raises(ValueError, match='factors, all above 0'):
        parse_aspect_ratios(text)


def test_nothing_in_a_spec_is_run(tmp_path):
    trap = f"[__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()]"
    spec = Spec().replace(
        model_config=dict(aspect_ratios=trap, freeze_blocks=trap), dataset_config=dict(image_size=trap)
    )
    assert len(spec.problems()) == 3 and not (tmp_path / 'ran').exists()


def test_spellings_of_the_manual():
    spec = Spec.parse('''data_config { val_json_file: "a.json" image_size: "(512, 512)" }
        training_config { model_name: "efficientdet_d1" } model_config { max_instances_per_image: 7 }''')
    assert spec.dataset_config.validation_json_file == 'a.json' and spec.dataset_config.max_instances_per_image == 7
    assert (
        spec.model_config.model_name == 'efficientdet-d1'
        and spec.is_set('data_config', 'val_json_file')
        and spec.problems() == []
    )


def test_the_later_value_wins_and_one_hears_of_it():
    text = (
        'training_config { model_name: "efficientdet-d0" amp: true amp: True } '
        'model_config { model_name: "efficientdet-d1" }'
    )
    with pytest.warns(UserWarning, match='given twice') as heard:
        assert Spec.parse(text).model_config.model_name == 'efficientdet-d1'
    assert len(heard) == 1  # amp is given twice with one value: not worth a word


def test_a_section_may_come_in_pieces():
    spec = Spec.parse('eval_config { eval_samples: 5 } eval_config { min_score_thresh: 0 }')
    assert (spec.eval_config.eval_samples, spec.eval_config.min_score_thresh) == (5, 0)


@pytest.mark.parametrize(
    'text',
    [
        'training_config {\r\n  amp: True\r\n}\r\n',
        '\ufefftraining_config { amp: true }',
        'training_config: < amp: t, >',
        '# note\ntraining_config{amp:1 # why\n}',
    ],
)
def test_files_from_other_machines(tmp_path, text):
    (tmp_path / 's.txt').write_bytes(text.encode())
    assert Spec.load(tmp_path / 's.txt').training_config.amp is True


# ── complaints ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    'text,words',
    [
        ('training_config { amp: maybe }', 'training_config.amp: maybe is not True or False (s:1:19)'),
        ('training_config {\n\n   num_epochs: 2.5 }', '2.5 is not a whole number from 0 to 4294967295 (s:3:4)'),
        ('training_config { num_epochs: -1 }', '-1 is not a whole number'),
        ('training_config { num_epochs: 4294967296 }', '4294967296 is not a whole number'),
        ('training_config { learning_rate: "0.1" }', '"0.1" is not a number'),
        ('model_config { model_name: efficientdet-d0 }', 'is not a string in quotes'),
        ('model_config { num_scales: [1, 2] }', 'is not a whole number'),
        ('training_config { amp: { x: 1 } }', 'is not True or False'),
        ('training_config { optimizer { name: "sgd" } }', 'training_config.optimizer: no such field'),
        ('evaluation_config { x: 1 }', 'Did you mean eval_config?'),
        ('model_config: 3', 'Write model_config { ... }'),
        ('model_config { num_scales 3 }', 'after num_scales a colon is missing (s:1:27)'),
        ('model_config { num_scales: }', 'a value is missing here (s:1:28)'),
        ('model_config { model_name: "d0 }', 'begins here with " and does not end on this line (s:1:28)'),
        ('model_config { } }', 'a name is expected here, not } (s:1:18)'),
        ('model_config { num_scales: 3', 'model_config begins here, but its closing } is missing (s:1:1)'),
    ],
)
def test_each_fault_is_named_with_its_place(text, words):
    with pytest.raises(SpecError) as e:
        Spec.parse(text, 's')
    assert len(e.value.problems) == 1 and words in str(e.value) and '\n' not in str(e.value)


def test_the_levels_of_the_network_are_checked_only_for_tasks_that_build_it():
    spec = Spec.parse('model_config { max_level: 8 }')
    checked = {task for task in TASK_SECTIONS if any('max_level' in problem for problem in spec.problems(task))}
    assert checked == {'train', 'evaluate'} and any('max_level' in problem for problem in spec.problems())


@pytest.mark.parametrize(
    'section,name,value',
    [
        ('dataset_config', 'num_classes', 1),
        ('dataset_config', 'max_instances_per_image', 0),
        ('dataset_config', 'image_size', '96,512'),
        ('dataset_config', 'image_size', '512,127'),
        ('dataset_config', 'num_channels', 2),
        ('training_config', 'train_batch_size', 0),
        ('training_config', 'num_epochs', 0),
        ('training_config', 'checkpoint_period', 0),
        ('training_config', 'num_examples_per_epoch', 0),
        ('training_config', 'learning_rate', 0),
        ('training_config', 'learning_rate', float('nan')),
        ('training_config', 'lr_warmup_init', -1),
        ('training_config', 'lr_warmup_epoch', -1),
        ('training_config', 'moving_average_decay', 1),
        ('training_config', 'momentum', 1),
        ('training_config', 'l1_weight_decay', -1),
        ('training_config', 'l2_weight_decay', float('inf')),
        ('training_config', 'clip_gradients_norm', -1),
        ('training_config', 'logging_frequency', 0),
        ('training_config', 'logging_frequency', 1001),
        ('training_config', 'skip_checkpoint_variables', '('),
        ('eval_config', 'eval_batch_size', 0),
        ('eval_config', 'eval_epoch_cycle', 0),
        ('eval_config', 'eval_samples', 0),
        ('eval_config', 'min_score_thresh', 1.1),
        ('eval_config', 'max_detections_per_image', 0),
        ('augmentation_config', 'random_crop_min_scale', 0),
        ('augmentation_config', 'random_crop_max_scale', float('inf')),
        ('model_config', 'model_name', 'efficientdet-d9'),
        ('model_config', 'freeze_blocks', '[9]'),
        ('model_config', 'aspect_ratios', '[]'),
        ('model_config', 'anchor_scale', 0),
        ('model_config', 'min_level', 2),
        ('model_config', 'max_level', 8),
        ('model_config', 'max_level', 6),
        ('model_config', 'num_scales', 0),
    ],
)
def test_values_out_of_range_are_refused(section, name, value):
    problems = Spec().replace(**{section: {name: value}}).problems()
    assert any(p.startswith(f'{section}.{name}: ') for p in problems)


@pytest.mark.parametrize(
    'name',
    [
        'clip_gradients_norm',
        'momentum',
        'lr_warmup_epoch',
        'lr_warmup_init',
        'moving_average_decay',
        'tf_random_seed',
        'l1_weight_decay',
        'stop_at_epoch',
    ],
)
def test_zero_is_a_value(name):
    spec = Spec.parse(f'training_config {{ {name}: 0 }}')
    assert (
        getattr(spec.training_config, name) == 0
        and spec.is_set('training_config', name)
        and not Spec().is_set('training_config', name)
        and spec.problems() == []
    )


def test_all_problems_come_at_once_in_the_order_of_the_file():
    text = (
        'training_config {\n num_epochs: "3"\n momentum: 2\n learning_rat: 1\n}\n'
        'model_config { anchor_scale: 0 }\neval_config {'
    )
    with pytest.raises(SpecError) as e:
        Spec.parse(text, 's', task='train')
    assert [re.search(r':(\d+):\d+\)$', p)[1] for p in e.value.problems] == ['2', '3', '4', '6', '7']


def test_a_field_that_could_not_be_read_is_not_called_missing(tmp_path):
    with pytest.raises(SpecError) as e:
        Spec.parse(
            'dataset_config { num_classes: "4" image_size: "128,128" training_file_pattern: "" }', 's', task='train'
        )
    assert len(e.value.problems) == 2 and 'must be given' in str(e.value) and 'num_classes: must' not in str(e.value)


def test_a_task_checks_only_its_sections():
    spec = Spec().replace(training_config=dict(learning_rate=-1), eval_config=dict(eval_batch_size=0))
    assert (
        len(spec.problems('train')) == 3 + 2
        and [p.split(':')[0] for p in spec.problems('export')] == ['eval_config.eval_batch_size']
        and spec.problems('prune') == []
    )
    with pytest.raises(ValueError, match='no such task. Did you mean evaluate'):
        spec.check('evalute')


def test_crop_scales_must_be_in_order():
    assert (
        'Swap them' in Spec().replace(augmentation_config=dict(random_crop_min_scale=3)).problems()[0]
    )  # against the default of the other


def test_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('train-0.tfrecord', 'odd[1].tfrecord', 'ckpt.index', 'model.tlt'):
        Path(name).write_text('')

    def missing(**fields):
        spec = Spec().replace(
            training_config={k: v for k, v in fields.items() if k == 'checkpoint'},
            dataset_config={k: v for k, v in fields.items() if k != 'checkpoint'},
        )
        return [p for p in spec.problems('train') if 'matches no file' in p]

    assert not missing(training_file_pattern='train-*', checkpoint='ckpt') and not missing(
        training_file_pattern='odd[1].tfrecord', checkpoint='model.tlt'
    )
    assert not missing(training_file_pattern='gs://bucket/train-*')
    assert 'nothing in its folder matches' in missing(training_file_pattern='val-*')[0]
    assert 'that is a folder' in missing(training_file_pattern=str(tmp_path))[0]
    assert not missing(checkpoint=str(tmp_path)) and not missing(
        checkpoint='imagenet'
    )  # a folder with a TensorFlow checkpoint; a word
    assert 'the folder far/away does not exist' in missing(checkpoint='far/away/model.tlt')[0]
    assert 'nothing in its folder matches' in missing(checkpoint='model')[0]


def test_load_names_what_it_could_not_open(tmp_path):
    (tmp_path / 'model.tlt').write_bytes(b'\xff\xfe\x00PK')
    with pytest.raises(FileNotFoundError, match='there is no such spec file'):
        Spec.load(tmp_path / 'none.txt')
    with pytest.raises(FileNotFoundError, match='this is a folder'):
        Spec.load(tmp_path)
    with pytest.raises(SpecError, match='not a text in UTF-8'):
        Spec.load(tmp_path / 'model.tlt')


@pytest.mark.parametrize(
    'changes,words',
    [
        (dict(training_config=dict(epochs=3)), 'Did you mean num_epochs'),
        (dict(train=dict(a=1)), 'no such section'),
        (dict(training_config=dict(num_epochs=True)), 'True is not a whole'),
        (dict(training_config=dict(amp=1)), '1 is not True or False'),
        (dict(training_config=dict(amp='yes', num_epochs='3')), '2 problems'),
        (dict(training_config=dict(amp=None)), 'None is not'),
    ],
)
def test_replace_is_as_strict_as_a_file(changes, words):
    with pytest.raises(SpecError, match=words):
        Spec().replace(**changes)


def test_a_spec_is_a_value():
    spec = Spec.parse('training_config { amp: True }')
    assert (
        spec == Spec().replace(training_config=dict(amp=True))
        and hash(spec) == hash(Spec.parse(spec.to_text()))
        and spec != Spec()
    )
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(AttributeError):
        spec.training_config.amp = False
    error = pickle.loads(pickle.dumps(SpecError('s', ['one', 'two'])))  # crosses process borders
    assert error.problems == ['one', 'two'] and 's: 2 problems' in str(error)


# ── the schema for other tools ──────────────────────────────────────────────────────────────────────────


def test_the_proto_file_says_what_the_descriptors_say():
    written = {
        m: {n: (kind, int(number)) for kind, n, number in re.findall(r'optional (\w+) (\w+) = (\d+);', body)}
        for m, body in re.findall(r'message (\w+) \{\n(.*?)\n\}', proto_schema(), re.S)
    }
    file = experiment_message_class().DESCRIPTOR.file
    kinds = {13: 'uint32', 1: 'double', 8: 'bool', 9: 'string'}
    built = {
        name: {f.name: (f.message_type.name if f.message_type else kinds[f.type], f.number) for f in m.fields}
        for name, m in file.message_types_by_name.items()
    }
    assert written == built and all(f.has_presence for m in file.message_types_by_name.values() for f in m.fields)
    assert proto_schema().startswith('//') and 'syntax = "proto3";' in proto_schema()


def test_descriptors_keep_to_themselves():
    from google.protobuf import descriptor_pool

    experiment_message_class()
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName('effdet_nb.Experiment')


def test_importing_is_light():
    code = (
        'import sys, effdet_nb.train.spec; '
        'print([m for m in ("tensorflow","keras","numpy","matplotlib","IPython") if m in sys.modules])'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        ).stdout.strip()
        == '[]'
    )
