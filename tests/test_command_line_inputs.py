"What people type into spec files, paths and environment variables by mistake, and the sentence they get."
import os
import stat

import pytest

from effdet_nb.app.command import check_outputs, format_error
from effdet_nb.app.inference_files import count_passed_over, output_paths, read_label_map
from effdet_nb.core.files import match_files
from effdet_nb.data.faults import Fault
from effdet_nb.data.tfrecord import find_record_files
from effdet_nb.data.image_files import image_fault
from effdet_nb.train.spec import Spec, SpecError


def problems_of(text, task=None):
    with pytest.raises(SpecError) as e: Spec.parse(text, 's.txt', task)
    return '\n'.join(e.value.problems)


@pytest.mark.parametrize('text, words', [
    ('training_config { num_epochs: 3 // short\n}', ['comment begins with #', 's.txt:1:33']),
    ('/* first run */ training_config { num_epochs: 3 }', ['comment begins with #', 's.txt:1:1']),
    ('model_config { model_name: \u201cefficientdet-d0\u201d }', ['quote \u201c is not a straight one', 's.txt:1:28']),
    ('model_config { model_name: \u2018efficientdet-d0\u2019 }', ['straight']),
    ('dataset_config { validation_json_file: \u00abval.json\u00bb }', ['straight']),
    ('training_config { NUM_EPOCHS: 3 }', ['Did you mean num_epochs?']),
    ('training_config { numEpochs: 3 }', ['Did you mean num_epochs?']),
    ('training_config { num-epochs: 3 }', ['underscores, not dashes']),
    ('TRAINING_CONFIG { num_epochs: 3 }', ['Did you mean training_config?']),
    ('training_config { lr: 0.1 }', ['Did you mean learning_rate?']),
    ('eval_config { batch_size: 8 }', ['Did you mean train_batch_size in training_config?']),
    ('training_config { amp: TRUE }', ['TRUE is not True or False']),
    ('training_config { num_epochs = 3 }', ['after num_epochs a colon is missing']),
    ('training_config { regularizer { type: NO_REG weight: 0.1 } }', ['l1_weight_decay', 'l2_weight_decay']),
    ('training_config { regularizer { type: L2 weight: 3e-5 } optimizer: "sgd" }', ['l2_weight_decay', 'momentum']),
    ('{"training_config": {"num_epochs": 3}}', ['looks like JSON']),
    ('"training_config" { num_epochs: 3 }', ['without quotes']),
    ('training_config:\n  num_epochs: 3\n', ['training_config { ... }']),
])
def test_a_habit_of_another_format_is_explained(text, words):
    message = problems_of(text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize('field, path, remedy', [
    ('training_file_pattern', r'records\train-*', 'records/train-*'),
    ('training_file_pattern', r'D:\new\train-*', 'D:/new/train-*'),
    ('validation_file_pattern', r'..\data\val-*', '../data/val-*'),
    ('validation_json_file', r'C:\101\x41.json', 'C:/101/x41.json'),
    ('testdev_dir', r'out\b', 'out/b'),
])
def test_a_windows_path_with_single_backslashes_is_corrected(field, path, remedy):
    message = problems_of(f'dataset_config {{ {field}: "{path}" }}')
    assert f'Write the path with slashes: "{remedy}"' in message and 's.txt:1:18' in message


def test_doubled_backslashes_are_read_as_before():
    spec = Spec.parse(r'dataset_config { training_file_pattern: "D:\\new\\t*" } '
                      r'training_config { skip_checkpoint_variables: "block\\d+" }')
    assert spec.dataset_config.training_file_pattern==r'D:\new\t*'
    assert spec.training_config.skip_checkpoint_variables==r'block\d+'
    assert 'two backslashes' in problems_of(r'training_config { skip_checkpoint_variables: "\bhead" }')
    assert 'two backslashes' in problems_of(r'model_config { model_name: "efficientdet\n" }')


def test_the_home_folder_is_expanded_in_every_path_of_a_spec(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'t-0').write_text('')
    spec = Spec.parse('dataset_config { training_file_pattern: "~/t-*" testdev_dir: "~/out" } '
                      'training_config { checkpoint: "~/m.tlt" pruned_model_path: "./~/m.tlt" }')
    assert spec.dataset_config.training_file_pattern==f'{tmp_path}/t-*'
    assert spec.dataset_config.testdev_dir==f'{tmp_path}/out'
    assert spec.training_config.checkpoint==f'{tmp_path}/m.tlt'
    assert spec.training_config.pruned_model_path=='./~/m.tlt'
    assert Spec().replace(training_config=dict(checkpoint='~/x')).training_config.checkpoint==f'{tmp_path}/x'
    assert find_record_files('~/t-*')==[f'{tmp_path}/t-0']


@pytest.mark.parametrize('folder', ['data [v1]', '[x]', 'a[0-9]b', 'plain', 'q]'])
def test_brackets_in_the_name_of_a_folder_are_no_wildcards(folder, tmp_path):
    (tmp_path/folder).mkdir()
    names = ['train-0', 'train-1', 'val [2]-0']
    for name in names: (tmp_path/folder/name).write_text('')
    def found(pattern): return [os.path.basename(path) for path in match_files(f'{tmp_path}/{folder}/{pattern}')]
    assert found('train-*')==names[:2] and found('val [2]-*')==names[2:] and found('train-[1-9]')==names[1:2]
    text = f'dataset_config {{ num_classes: 2 validation_file_pattern: "{tmp_path}/{folder}/no-*" }}'
    assert 'nothing in its folder matches' in problems_of(text, 'evaluate')


@pytest.mark.parametrize('text, word', [
    ('item {\n  id: 1\n  name: "WBC"\n}\nitem {\n  id: 2\n}', '.pbtxt'), ('item: {\n name: "a"\n}', '.pbtxt'),
    ('["a", "b"]', 'JSON'), ('{\n "1": "a"\n}', 'JSON'), ('0: person\n1: car', 'YAML'), ('names:\n- a\n- b', 'YAML'),
    ('---\nnames: [a, b]', 'YAML'), ('- a\n- b', 'YAML')])
def test_a_file_that_is_no_label_map_is_refused(text, word, tmp_path):
    (tmp_path/'map.txt').write_text(text)
    with pytest.raises(ValueError, match='not a label map') as e: read_label_map(tmp_path/'map.txt')
    assert word in str(e.value)


@pytest.mark.parametrize('names', [['person', 'car'], ['traffic light', 'item'], ['A: first', 'other'], ['[tag]'],
                                   ['a-b', '- c'], ['{x', 'y}z']])
def test_unusual_names_are_still_a_label_map(names, tmp_path):
    (tmp_path/'map.txt').write_text('\n'.join(names))
    assert list(read_label_map(tmp_path/'map.txt').values())==names


def test_files_that_are_passed_over_are_counted(tmp_path):
    for name in ('a.jpg', 'b.heic', 'c.HEIC', 'd', '.hidden', 'e.txt'): (tmp_path/name).write_text('')
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/'f.pdf').write_text('')
    (tmp_path/'g.png').symlink_to('nowhere.png')
    os.mkfifo(tmp_path/'h.jpg')
    counts = {'.heic extension': 2, 'no extension': 1, '.txt extension': 1, 'link to a missing file': 1,
              'device or pipe': 1}
    assert count_passed_over(tmp_path)==counts
    assert count_passed_over(tmp_path, recursive=True)==counts | {'.pdf extension': 1}
    assert count_passed_over(tmp_path/'*.heic')=={'.heic extension': 1} and not count_passed_over(tmp_path/'a.jpg')


@pytest.mark.parametrize('output, for_labels', [('labels.txt', True), ('out.json', True), ('all.jpg', False),
                                                ('x/y.PNG', False)])
def test_the_output_of_a_folder_is_a_folder(output, for_labels, tmp_path):
    paths = [tmp_path/'a.jpg', tmp_path/'b.jpg']
    for path in paths: path.write_text('')
    with pytest.raises(ValueError, match='needs a folder'):
        output_paths(paths, tmp_path, tmp_path/output, for_labels)
    assert output_paths(paths[:1], paths[0], tmp_path/output, for_labels)==[tmp_path/output]
    (tmp_path/output).mkdir(parents=True)       # a folder with such a name is a folder
    assert output_paths(paths, tmp_path, tmp_path/output, for_labels)[0].parent==tmp_path/output


@pytest.mark.parametrize('error, words', [
    (PermissionError(13, 'Permission denied', 's.txt'), ['s.txt: permission denied', 'chmod']),
    (OSError(28, 'No space left on device', '/x/log.txt'), ['/x/log.txt: no space left', 'Free some space']),
    (OSError(30, 'Read-only file system', '/x'), ['read-only file system', 'another disk']),
    (OSError(24, 'Too many open files'), ['too many open files', 'ulimit']),
    (OSError(36, 'File name too long', 'a'*300), ['file name too long', 'shorter'])])
def test_an_error_of_the_operating_system_has_no_number(error, words):
    message = format_error('effdet_check', error)
    assert message.startswith('effdet_check: error: ') and 'Errno' not in message
    assert all(word in message for word in words)


def test_a_file_without_permission_is_not_called_damaged():
    assert image_fault(PermissionError(13, 'Permission denied'))==Fault.NOT_PERMITTED
    assert 'permission denied' in Fault.NOT_PERMITTED and 'chmod' in Fault.NOT_PERMITTED.hint
    assert stat.S_IMODE(0o644)      # image_fault does not look at the mode: root may read everything


@pytest.mark.parametrize('name, value', [
    ('TF_CONFIG', '{bad'), ('TF_CONFIG', '[]'), ('TF_CONFIG', '3'), ('TF_CONFIG', '{"cluster": 3}'),
    ('TF_CONFIG', '{"cluster": {"worker": ["a:1", "b:1"]}}'), ('TF_CONFIG', '{"cluster": {"worker": "a:1"}}'),
    ('TF_CONFIG', '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}'),
    ('TF_CONFIG', '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "x"}}'),
    ('SLURM_PROCID', 'one'), ('SLURM_STEP_NUM_TASKS', '2(x3)')])
def test_a_wrong_environment_variable_is_named(name, value, monkeypatch):
    from effdet_nb.train.distributed import num_workers, worker_rank
    for variable in ('TF_CONFIG', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'): monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f'^{name}: ') as e: [worker_rank(), num_workers()]
    assert 'unset' in str(e.value) and value in str(e.value)


def test_only_paths_are_expanded():
    spec = Spec().replace(training_config=dict(keep_checkpoint_max=3, num_epochs=2))
    assert spec.training_config.keep_checkpoint_max==3
    assert Spec.parse('training_config { keep_checkpoint_max: 3 checkpoint_period: 2 }').training_config


@pytest.mark.parametrize('options', [
    dict(experiment_spec_file='a', suggest='a'), dict(experiment_spec_file='a', log_file='./a'),
    dict(model_path=['b', 'a'], output_path='../{}/a'), dict(output_path='a', log_file='link'),
    dict(annotations_file='a', log_file='a'), dict(only='a', out_label_path='a'),
    dict(in_image_path=['b', 'a'], out_image_path='a')])
def test_a_command_does_not_write_to_a_file_that_it_reads(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'ab': (tmp_path/name).write_text('kept')
    (tmp_path/'link').symlink_to('a')
    options = {k: v.format(tmp_path.name) if isinstance(v, str) else v for k,v in options.items()}
    with pytest.raises(ValueError, match='is also the file of --.* would be changed'): check_outputs(options)


@pytest.mark.parametrize('options', [
    dict(experiment_spec_file='a', suggest='new'), dict(experiment_spec_file='a', log_file='b'),
    dict(model_path=['a'], output_path=None, threshold=.4), dict(log_file='b', key='b?'), dict(suggest='', key='')])
def test_other_outputs_are_allowed(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'ab': (tmp_path/name).write_text('kept')
    check_outputs(options)
