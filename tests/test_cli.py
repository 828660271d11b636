"The commands: each as a subprocess in a folder of its own, as a user runs it."
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from PIL import Image

import effdet_nb.app.cli as cli
from effdet_nb.app.options import (
    OPTION_ALIASES, command_parser, option_aliases, option_names, parse_options)
from effdet_nb.app.quickstart_settings import QuickstartSettings
from effdet_nb.core.console import read_status
from effdet_nb.detector.toy_data import make_toy_dataset

BIN = Path(sys.executable).parent
TASKS = ['dataset_convert', 'check', 'train', 'evaluate', 'prune', 'inference', 'export', 'gen_trt_engine',
         'quickstart', 'import', 'webpage', 'demo', 'tile', 'split', 'compare', 'completion']
KEY = 'tl7-geheim'
ENV = {k: v for k, v in os.environ.items() if k!='EFFDET_KEY'} | dict(OMP_NUM_THREADS='1')
MODEL = 'run/model.step-3.tlt'    # the model of the `trained` fixture

SPEC = '''
training_config {{ train_batch_size: 4 num_epochs: {epochs} lr_warmup_epoch: 0 learning_rate: 0.01 }}
dataset_config {{ num_classes: 4 image_size: "128,128" training_file_pattern: "rec/train-*"
                  validation_file_pattern: "rec/val-*" validation_json_file: "data/val.json" }}
eval_config {{ eval_batch_size: 4 eval_epoch_cycle: 1 }}
model_config {{ model_name: "efficientdet-tiny" }}
'''


def executable(name): return BIN/(name if name=='efficientdet_tf1' else f'effdet_{name}')


def run(*args, cwd, **env):
    "Runs a command, given without its prefix."
    name, *args = map(str, args)
    return subprocess.run([executable(name), *args], cwd=cwd, env=ENV | env, capture_output=True, text=True,
                          timeout=300)


def run_line(line, cwd, **env): return run(*line.split(), cwd=cwd, **env)


def run_python(code, cwd):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd, env=ENV)


def run_ok(line, cwd, **env):
    "Runs a command that must succeed."
    out = run_line(line, cwd, **env)
    assert out.returncode==0, out.stderr
    return out


def assert_fails(out, *words, code=1):
    "Exit code, one readable last line with these words, no traceback, no results."
    assert out.returncode==code, out.stderr
    last_line = out.stderr.rstrip('\n').split('\n')[-1]
    assert 'error: ' in last_line and all(word in last_line for word in words), out.stderr
    assert 'Traceback' not in out.stderr and not out.stdout
    return last_line


def read_json(path): return json.loads(path.read_text())
def kitti_rows(folder): return [line.split() for p in folder.iterdir() for line in p.read_text().splitlines()]


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    "A folder with a drawn data set, its records and a spec, made by commands."
    folder = tmp_path_factory.mktemp('work')
    make_toy_dataset(folder/'data', 12, 6, (128,128))
    for tag, shards in (('train', 2), ('val', 1)):
        run_ok(f'dataset_convert -i data/{tag} -a data/{tag}.json -o rec -s {shards}', folder)
    (folder/'spec.txt').write_text(SPEC.format(epochs=1))
    return folder


@pytest.fixture(scope='session')
def trained(work):
    "The folder with a model trained for one epoch under a key, and the output of the command."
    return work, run_ok(f'train -e spec.txt -d run -k {KEY} --log_file logs/deep/train.txt', work)


@pytest.fixture
def links(work, tmp_path):
    "A folder of its own with links to the data set, its records and the spec."
    for name in ('data', 'rec', 'spec.txt'): (tmp_path/name).symlink_to(work/name)
    return tmp_path


# --- without TensorFlow

HELP_IMPORTS = '''
import sys
sys.argv = ['x', '{task}', '--help']
import effdet_nb.app.cli as cli
try: cli.efficientdet_tf1()
except SystemExit: pass
print([name for name in ('tensorflow', 'keras', 'numpy') if name in sys.modules])
'''


@pytest.mark.parametrize('task', TASKS)
def test_help_describes_a_task_without_heavy_imports(task, tmp_path):
    out = run(task, '--help', cwd=tmp_path)
    assert out.returncode==0 and 'usage:' in out.stdout and not out.stderr
    assert run_python(HELP_IMPORTS.format(task=task), tmp_path).stdout.strip().endswith('[]')


@pytest.mark.parametrize('task', TASKS)
def test_the_help_of_a_task_contains_an_example_that_its_parser_accepts(task, tmp_path):
    command = cli.TASKS[task]
    help_text = ' '.join(run(task, '--help', cwd=tmp_path).stdout.split())
    assert help_text.endswith(f'Example: effdet_{task} {command.example}')
    assert parse_options(command, shlex.split(command.example))


@pytest.mark.slow
def test_the_examples_of_the_help_texts_run_one_after_another(tmp_path):
    make_toy_dataset(tmp_path/'images', 12, 6, (128,128))
    for split in ('train', 'val'): (tmp_path/'images'/f'{split}.json').rename(tmp_path/f'{split}.json')
    spec = SPEC.format(epochs=1).replace('data/val.json', 'val.json').replace('rec/', 'records/')
    (tmp_path/'spec.txt').write_text(spec)
    out = run('dataset_convert', *shlex.split('-i images/val -a val.json -o records -t val'), cwd=tmp_path)
    assert out.returncode==0, out.stderr
    for task in ('dataset_convert', 'check', 'train', 'evaluate', 'prune', 'inference', 'export'):
        out = run(task, *shlex.split(cli.TASKS[task].example), cwd=tmp_path)
        assert out.returncode==0, out.stderr


def test_the_umbrella_command_lists_every_task(tmp_path):
    out = run('efficientdet_tf1', '--help', cwd=tmp_path)
    assert out.returncode==0 and all(task in out.stdout for task in TASKS)
    assert re.fullmatch(r'\d+\.\d+\.\d+\S*\n', run('efficientdet_tf1', '--version', cwd=tmp_path).stdout)
    for args in ((), ('fly',), ('train', '--nonsense')):
        assert run('efficientdet_tf1', *args, cwd=tmp_path).returncode==2


TAO_LINES = '''
dataset_convert -i a -a b -o c -t d -s 3 --include_mask
dataset_convert --image_dir a --annotations_file b --output_dir c --tag d --num_shards 3 --include_masks
train -e a -d b -k c --gpus 2 --gpu_index 0 1 --log_file d
train --experiment_spec_file a --model_dir b --key c --experiment_spec x
train -e a --results_dir b -k c
evaluate -e a -m b -k c --gpu_index 0 --log_file d
evaluate --experiment_spec_file a --model_path b --key c -r d
evaluate --experiment_spec a -m b
evaluate -e a -m b c -m d --nms soft --iou_threshold .5 --score_threshold .3 --pycocotools
prune -m a -o b -k c -n L2 -eq intersection -pg 4 -pth 0.7 -nf 8 -el x y z --gpu_index 0 --log_file d
prune --model a --output_dir b --normalizer max --equalization_criterion union --pruning_granularity 8 \
--pruning_threshold .1 --min_num_filters 16 --excluded_layers x
inference -m a -i b -o c -k d -e e -l f --label_map g --gpu_index 0 --log_file h
inference --model_path a --in_image_path b --out_image_path c --out_label_path d
inference -m a --image_dir b --class_map c -r d -t 0.4
gen_trt_engine -m a -k b --data_type fp16 --engine_file c --max_batch_size 4 --min_batch_size 1 --opt_batch_size 2 \
--batches 3 --cal_image_dir d --cal_cache_file e --max_workspace_size 2 -r f -v --gpu_index 0 --log_file g
export -m a -k b -e c -o d --gpu_index 0 --log_file e --verbose
export --model_path a --experiment_spec b --output_path c
export -m a --experiment_spec_file b -o c --max_batch_size 1 --data_type fp32 --cal_image_dir d --cal_cache_file e \
--engine_file f
'''.strip().split('\n')


@pytest.mark.parametrize('line', TAO_LINES)
def test_flags_of_both_tao_versions_are_understood(line):
    task, *args = line.split()
    parse_options(cli.TASKS[task], args, task)


OTHER_SPELLINGS = [
    ('train -e a --model-dir b --use-amp', dict(model_dir='b', use_amp=True)),
    ('train --experiment-spec-file=a -d=b', dict(experiment_spec_file='a')),
    ('train -model_dir b -e a -gpus 2', dict(model_dir='b', gpus=2)),
    ('prune -m a -o b -pruning_granularity 4', dict(pruning_granularity=4)),
    ('prune -m a -o b \u2013normalizer l2 \u2014min-num-filters 8', dict(normalizer='L2', min_num_filters=8)),
    ('prune -m a -o b -EQ union --Pruning-Threshold .5', None),
    ('export -m a --DATA_TYPE FP16 -o b.onnx', dict(data_type='fp16', output_path='b.onnx')),
    ('dataset_convert -i a -a b -o c --gpus 2 --gpu_index 0 1 --num-processes 2', dict(output_dir='c')),
    ('evaluate -e a -m b --gpus=2 -np 2 -i images', dict(model_path=['b'])),
    ('gen_trt_engine -m a -e spec.txt --multi-node -k -1', dict(key='-1')),
    ('prune -m ~/a -o=~/b', dict(model=os.path.expanduser('~/a'))),
]


@pytest.mark.parametrize('line, expected', OTHER_SPELLINGS)
def test_an_option_is_found_in_every_spelling(line, expected, capsys):
    task, *args = line.split()
    if expected is None:
        with pytest.raises(SystemExit): parse_options(cli.TASKS[task], args, task)
        assert '-EQ: no such option' in capsys.readouterr().err
    else:
        options = parse_options(cli.TASKS[task], args, task)
        assert {name: options[name] for name in expected}==expected


WRONG_LINES = [
    ('train -e a -d b --epochs 3', '--epochs', 'training_config { num_epochs: ... }'),
    ('train -e a -d b --lr .1', '--lr', 'training_config { learning_rate: ... }'),
    ('train -e a -d b --batch-size 8', '--batch-size', 'train_batch_size'),
    ('train -epochs 3', '-epochs', 'num_epochs'),
    ('evaluate -e a -m b --image_sise 5', '--image_sise', 'image_size'),
    ('train -e a --modeldir b', '--modeldir', 'Did you mean --model_dir?'),
    ('inference -m a -i b --treshold .5', '--treshold', 'Did you mean --threshold?'),
    ('prune -m a --outdir b', '--outdir', 'Did you mean -o/--output_dir?'),
    ('train -m model.tlt -e a', '-m', 'pruned_model_path'),
    ('dataset_convert -e spec.txt', '-e', 'reads no spec'),
    ('dataset_convert -i a -a b -o c -k key', '-k', 'not encrypted'),
    ('export -m a --gen_ds_config', '--gen_ds_config', '--deepstream'),
    ('export -m a --static-batch-size 4', '--static-batch-size', '--max_batch_size'),
    ('gen_trt_engine -m a -o b.engine', '-o', '--engine_file'),
    ('inference -m a -i b.jpg c.jpg d.jpg -o out', '-i', "'day1/*.png'"),
    ('evaluate spec.txt -e a -m b', 'spec.txt', 'name of its option'),
    ('prune -m a -o pruned/model.tlt', 'pruned/model.tlt', 'such as pruned'),
    ('train -e a -d run.json', 'run.json', 'such as run'),
    ('export -m a --deepstream ds/config.txt', 'ds/config.txt', 'such as ds'),
    ('train -e a -d b --zzz', '--zzz', 'no such option. Run'),
    ('train --epocs 5', '--epocs', 'num_epochs'),
    ('train --lerning_rate .1', '--lerning_rate', 'learning_rate'),
    ('train --imgsz 640', '--imgsz', 'dataset_config { image_size: ... }'),
    ('train --lr0 .1', '--lr0', 'training_config { learning_rate: ... }'),
    ('train --patience 5', '--patience', 'model.best.tlt'),
    ('train --data coco.yaml', '--data', 'training_file_pattern'),
    ('train --project runs', '--project', 'Did you mean -d/--model_dir?'),
    ('train --device 0', '--device', 'Did you mean --gpu_index?'),
    ('train --optimizer adam', '--optimizer', 'SGD'),
    ('split --validation 0.2', '--validation', 'Did you mean --val?'),
    ('split --train 0.7', '--train', 'such as --val 0.3'),
    ('split --test-size 0.1', '--test-size', 'Did you mean --test?'),
    ('export --format tflite', '--format', 'the end of -o chooses the format'),
    ('export --int8', '--int8', '--data_type int8'),
    ('export --half', '--half', '--data_type fp16'),
    ('inference --conf 0.3', '--conf', 'Did you mean -t/--threshold?'),
    ('inference --source a.jpg', '--source', 'Did you mean -i/--in_image_path?'),
    ('inference --weights a.tlt', '--weights', 'Did you mean -m/--model_path?'),
    ('inference --wieghts a.tlt', '--wieghts', 'Did you mean -m/--model_path?'),
    ('inference --imgsz 640', '--imgsz', 'that of the model'),
    ('inference --name first', '--name', 'Did you mean -r/--results_dir?'),
    ('evaluate --conf 0.3', '--conf', 'Did you mean --score_threshold?'),
    ('quickstart --epochs 3', '--epochs', 'Did you mean --num_epochs?'),
    ('demo --weights a.tlt', '--weights', 'Did you mean -m/--model_path?'),
    ('dataset_convert --out_dir rec', '--out_dir', 'Did you mean -o/--output_dir?'),
    ('prune --threshold .5', '--threshold', '--pruning_threshold?'),
    ('train --config spec.txt', '--config', 'Did you mean -e/--experiment_spec_file?'),
    ('inference --cfg spec.txt', '--cfg', 'Did you mean -e/--experiment_spec_file?'),
    ('export --out_file a.onnx', '--out_file', 'Did you mean -o/--output_path?'),
    ('gen_trt_engine --output a.engine', '--output', '--engine_file?'),
    ('export -m a --data_type fp8', '--data_type', 'fp16'),
    ('train -d b', '-e/--experiment_spec_file', 'required'),
]


@pytest.mark.parametrize('line, option, advice', WRONG_LINES)
def test_a_wrong_option_is_answered_by_one_line(line, option, advice, capsys):
    task, *args = line.split()
    with pytest.raises(SystemExit) as e: parse_options(cli.TASKS[task], args, f'effdet_{task}')
    message = capsys.readouterr().err
    assert e.value.code==2 and message.count('\n')==1 and message.startswith(f'effdet_{task}: error: ')
    assert option in message and advice in message


@pytest.mark.parametrize('task', TASKS)
def test_aliases_of_a_command_lead_to_its_options(task):
    command = cli.TASKS[task]
    known = option_names(command)
    for text in option_aliases(command).values(): assert all(name in known for name in text.split('/'))


def test_every_alias_of_an_option_leads_to_a_command():
    parameters = {name for command in cli.TASKS.values() for name in option_names(command)}
    for candidates in OPTION_ALIASES.values():
        assert all(f'--{parameter}' in parameters for parameter in candidates.split()), candidates
    names = [name for names in OPTION_ALIASES for name in names.split()]
    assert len(names)==len(set(names))


def test_the_help_of_quickstart_has_its_default_settings():
    options = option_names(cli.effdet_quickstart)
    for name, value in asdict(QuickstartSettings()).items():
        assert options[f'--{name}'].help.endswith(f'(default: {value})')


@pytest.mark.parametrize('words, task', [('help train', 'train'), ('help effdet-split', 'split'),
                                         ('effdet_compare --help', 'compare'), ('help', 'TASK')])
def test_the_umbrella_command_prints_the_help_of_a_task(words, task, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['effdet', *words.split()])
    with pytest.raises(SystemExit) as e: cli.efficientdet_tf1()
    assert not e.value.code and capsys.readouterr().out.startswith(f'usage: effdet {task} ')


def test_the_tasks_are_listed_in_the_order_of_the_work():
    work = 'split tile dataset_convert check train evaluate compare prune export gen_trt_engine'.split()
    assert sorted(work, key=list(cli.TASKS).index)==work and list(cli.TASKS)[0]=='quickstart'
    assert all(task in cli.TASKS for task in cli.TASK_ALIASES.values())


def test_the_help_of_completion_lists_the_shells():
    assert '{bash,zsh,fish}' in command_parser(cli.effdet_completion).format_help()


UMBRELLA_LINES = [('effdet', 'usage: effdet TASK'), ('effdet predict', 'Did you mean inference?'),
                  ('effdet val', 'Did you mean evaluate?'), ('effdet detect', 'Did you mean inference?'),
                  ('effdet help predict', 'Did you mean inference?'), ('effdet effdet_train', 'effdet train: error'),
                  ('effdet fly', 'fly: no such task'),
                  ('effdet evalute', 'Did you mean evaluate?'), ('effdet convert', 'Did you mean dataset_convert?'),
                  ('efficientdet_tf1 tao model efficientdet_tf1 train', 'efficientdet_tf1 train: error'),
                  ('efficientdet_tf1 model train --epochs 3', 'num_epochs'),
                  ('effdet Dataset-Convert -e a', 'effdet dataset_convert: error: -e')]


@pytest.mark.parametrize('line, text', UMBRELLA_LINES)
def test_the_umbrella_command_explains_a_wrong_line(line, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', line.split())
    with pytest.raises(SystemExit) as e: cli.efficientdet_tf1()
    message = capsys.readouterr().err
    assert e.value.code==2 and text in message
    if line=='effdet': assert all(command.__doc__ in message for command in cli.TASKS.values())


def test_a_gpu_that_does_not_exist_is_a_warning(monkeypatch):
    import tensorflow as tf
    from effdet_nb.app.command import _load_quietly
    def load(module): pass
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
    for gpu_index, name in ((7, '7'), ([0,3], '0 3'), (0, '0')):
        with pytest.warns(UserWarning, match=f'--gpu_index {name}: TensorFlow finds no such GPU and uses the CPU'):
            _load_quietly(load, gpu_index, tf)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _load_quietly(load, None, tf)


def test_a_key_with_a_dash_is_never_repeated(capsys):
    with pytest.raises(SystemExit): parse_options(cli.TASKS['prune'], ['-m', 'a', '-o', 'b', '-k', '-geheim'], 'prune')
    message = capsys.readouterr().err
    assert 'geheim' not in message and '-k: its value is missing' in message and '--key=-value' in message
    assert parse_options(cli.TASKS['prune'], ['-m', 'a', '-o', 'b', '--key=-geheim'])['key']=='-geheim'


@pytest.mark.parametrize('line, words', [
    ('dataset_convert -i data/train -a data/nope.json -o out', ['nope.json']),
    ('dataset_convert -i rec -a data/train.json -o out', ['all 12', 'are missing']),
    ('dataset_convert -i data/train -a data/train.json -o out --strict', ['--strict', 'listed above']),
    ('dataset_convert -i data/train -a bad.json -o out', ['bad.json', 'line 2']),
    ('dataset_convert -i data/train -a data/train.json -o typo.txt/rec', ['typo.txt']),
    ('check -e nope.txt', ['nope.txt', 'no such spec']),
    ('train -e typo.txt -d out', ['learning_rat', 'Did you mean learning_rate?', 'typo.txt:2:']),
    ('train -e nope.txt -d out', ['nope.txt', 'no such spec']),
    ('train -e spec.txt -d out --gpus 0', ['--gpus 0']),
    ('train -e spec.txt -d out --gpu_index 1 1', ['--gpu_index']),
    ('train -e spec.txt -d out --log_file data', ['data', 'folder']),
    ('evaluate -e nope.txt -m x.tlt', ['nope.txt']),
    ('inference -m x.tlt -i nothing -o out', ['nothing', 'no such']),
    ('inference -m x.onnx -i data/val', ['no output path', '-o FOLDER', '-l FOLDER']),
    ('inference -m x.tlt -i data/val -o data/val', ['would be replaced']),
    ('inference -m x.tlt -i data/val -o out -t 40', ['threshold', '0 to 1']),
    ('dataset_convert -i data/train -a odd.json -o out', ['odd.json', '"categories" is missing']),
    ('efficientdet_tf1 prune -m nope.tlt -o out', ['efficientdet_tf1 prune: error: nope.tlt']),
    ('prune -m nope.tlt -o out', ['nope.tlt', 'no such file']),
    ('prune -m nope.tlt -o out -pth 0.2 --target_params 0.5', ['--pruning_threshold', 'target']),
    ('export -m nope.tlt -o out.txt', ['out.txt', '.onnx']),
    ('export -m nope.tlt -o out.pb', ['out.pb', 'saved_model.pb']),
])
def test_bad_input_gives_one_line_and_writes_nothing(links, line, words):
    (links/'bad.json').write_text('{"images": [],\n oops}')
    (links/'odd.json').write_text('{"images": []}')
    (links/'typo.txt').write_text(SPEC.format(epochs=1).replace('learning_rate', 'learning_rat'))
    before = {p.name for p in links.iterdir()}
    assert_fails(run_line(line, links), *words)
    assert {p.name for p in links.iterdir()}==before


def test_check_writes_a_page(links):
    out = run_ok('check -e spec.txt -o deep/page.html', links)
    assert 'training: 12 ' in out.stdout and 'validation: 6 ' in out.stdout
    charts = re.findall(r'data:image/(?:svg\+xml|png);base64[^>]*></image></svg>',
                        (links/'deep'/'page.html').read_text())
    assert len(charts)>=6


def test_check_prints_all_problems_and_training_does_not_start(links):
    spec = (links/'spec.txt').read_text()
    (links/'wrong.txt').write_text(re.sub(r'num_classes: *\d+', 'num_classes: 2 max_instances_per_image: 1', spec))
    out = run_line('check -e wrong.txt', links)
    assert out.returncode==1 and '2 serious problems with the data' in out.stderr.splitlines()[-1]
    assert 'dataset_config.num_classes' in out.stdout and 'max_instances_per_image' in out.stdout
    assert '2 problems. Run effdet_check for details' in run_line('train -e wrong.txt -d run', links).stderr
    assert not list((links/'run').glob('*.tlt'))


def test_all_problems_of_a_spec_are_listed_above_the_last_line(tmp_path):
    (tmp_path/'s.txt').write_text('training_config { learning_rat: 0.1\n num_epochs: -3 }')
    out = run_line('train -e s.txt -d out', tmp_path)
    assert_fails(out, 's.txt: 5 problems', 'listed above')
    assert 'learning_rate?' in out.stderr and 'num_epochs' in out.stderr


def test_verbose_shows_the_traceback_and_log_file_appends_everything(tmp_path):
    for num_runs in (1, 2):
        out = run_line(f'train -e no.txt -d out --verbose --log_file a/b/log.txt -k {KEY}', tmp_path)
        assert out.returncode==1 and 'Traceback' in out.stderr and KEY not in out.stderr
        assert out.stderr.rstrip().split('\n')[-1].startswith('effdet_train: error: no.txt')
        assert (tmp_path/'a'/'b'/'log.txt').read_text()==out.stderr*num_runs


def test_results_go_to_stdout_and_dashes_in_task_names_are_accepted(work, tmp_path):
    out = run_ok(f'efficientdet_tf1 dataset-convert -i {work}/data/val -a {work}/data/val.json -o x/y -s 1 -r res '
                 '--log_file log.txt', tmp_path)
    assert re.search(r'images +6\n', out.stdout) and 'val: 1 shard\n' in out.stdout
    assert (tmp_path/'log.txt').read_text()==out.stdout
    assert (tmp_path/'x'/'y'/'val-00000-of-00001.tfrecord').is_file()
    assert [row['status'] for row in read_status(tmp_path/'res')]==['STARTED', 'RUNNING', 'SUCCESS']


WAITING_COMMAND = '''
import sys, time
from effdet_nb.app.command import command
@command
def effdet_wait():
    print('ready', flush=True)
    time.sleep(30)
effdet_wait()
'''


def accept_ctrl_c():
    "Undoes what a shell does to background jobs, and so to their children: they ignore SIGINT."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize('number, code, word', [
    (signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')])
def test_signals_end_a_command_with_the_exit_code_of_the_shell(number, code, word, tmp_path):
    (tmp_path/'waits.py').write_text(WAITING_COMMAND)
    with subprocess.Popen([sys.executable, 'waits.py'], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, preexec_fn=accept_ctrl_c) as process:
        assert process.stdout.readline()=='ready\n'
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode==code and err==f'effdet_wait: {word}\n'


def test_a_closed_pipe_is_no_error_message(work, tmp_path):
    "As behind `| head`, which closes the pipe when it has read enough."
    args = [executable('dataset_convert'), '-i', work/'data'/'val', '-a', work/'data'/'val.json', '-o', tmp_path]
    with subprocess.Popen(args, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode==141 and 'rror' not in err and 'pipe' not in err


SUPPRESSED_OUTPUT = '''
import os
from effdet_nb.app.command import suppress_stderr
with suppress_stderr(): os.write(2, b"hello\\n"); {then}
'''


def test_suppressed_output_appears_only_after_an_error(tmp_path):
    assert run_python(SUPPRESSED_OUTPUT.format(then='pass'), tmp_path).stderr==''
    assert run_python(SUPPRESSED_OUTPUT.format(then='1/0'), tmp_path).stderr.startswith('hello\n')


def test_the_quickstart_command_offers_every_setting_without_defaults_of_its_own():
    from effdet_nb.app.quickstart import quickstart
    from effdet_nb.app.quickstart_settings import QuickstartSettings
    parameters = inspect.signature(cli.effdet_quickstart).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ('key', 'log_file', 'verbose')}
    assert defaults.pop('folder')==inspect.signature(quickstart).parameters['folder'].default
    assert set(defaults)=={f.name for f in fields(QuickstartSettings)} and set(defaults.values())=={None}


def test_quickstart_settings_are_checked_at_once(tmp_path):
    assert_fails(run_line('quickstart --folder q --size 100', tmp_path), '128')
    assert_fails(run_line('quickstart --folder q --num_train 0', tmp_path), 'num_train 0')
    assert not list(tmp_path.iterdir())


# --- with TensorFlow: all tests share one small model

def test_training_leaves_a_model_and_a_log_without_the_key(trained):
    work, out = trained
    assert out.stdout.startswith('best AP ') and '(epoch 1): run/model.best.tlt\nNext: effdet_evaluate' in out.stdout
    for stage in ('loading TensorFlow', 'building the network', 'compiling the training step'):
        assert f'{stage} ' in out.stderr
    assert 'WARNING' not in out.stderr and 'Warning' not in out.stderr
    assert (work/'logs'/'deep'/'train.txt').read_text()==out.stderr+out.stdout
    assert read_status(work/'run')[-1]['status']=='SUCCESS'
    for path in (work/'run').rglob('*'): assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize('env', [{'CUDA_VISIBLE_DEVICES': ''}, {'TF_CPP_MIN_LOG_LEVEL': '0'}])
def test_two_gpus_on_a_machine_without_any_are_one_line(work, env):
    "TensorFlow's own messages do not appear, whatever its log level."
    out = run_line('train -e spec.txt -d two --gpus 2', work, **env)
    assert_fails(out, '--gpus 2', 'TensorFlow sees 0 GPU')
    assert out.stderr.splitlines()[:-1] in ([], ['loading TensorFlow ...'])


def test_evaluate_prints_the_table_and_writes_numbers(trained):
    work, _ = trained
    out = run_ok(f'evaluate -e spec.txt -m {MODEL} -r ev', work, EFFDET_KEY=KEY)
    assert 'APs' in out.stdout and 'triangle' in out.stdout and out.stdout.startswith('6 images')
    numbers = read_json(work/'ev'/'metrics.json')
    assert numbers['num_images']==6 and len(numbers['metrics'])==12
    assert [row['name'] for row in numbers['per_class']]==['circle', 'square', 'triangle']
    assert len(read_json(work/'ev'/'detections.json'))==numbers['num_detections']
    assert read_status(work/'ev')[-1]['kpi'].keys()==numbers['metrics'].keys()
    assert KEY not in (work/'ev'/'status.json').read_text()
    threshold = numbers['thresholds'][-1]['threshold'] or .3
    command = f'effdet_inference -m {MODEL} -i IMAGES -r detections -t {threshold:.2g} -k KEY'
    assert out.stdout.splitlines()[-1]==f'Next, with the best score threshold: {command}'


def test_m_takes_several_models_and_may_be_repeated():
    assert parse_options(cli.TASKS['evaluate'], '-e a -m b c -m d'.split())['model_path']==['b', 'c', 'd']


@pytest.mark.slow
def test_several_models_are_compared(trained):
    work, _ = trained
    out = run_ok(f'evaluate -e spec.txt -m {MODEL} -m run/model.best.tlt -k {KEY} --nms soft -r both', work)
    assert 'model.step-3.tlt' in out.stdout and 'model.best.tlt' in out.stdout and out.stdout.count(' soft ')==2
    assert max(map(len, out.stdout.splitlines()))<=100
    rows = read_json(work/'both'/'metrics.json')
    assert [row['model'] for row in rows]==['model.step-3.tlt', 'model.best.tlt']
    assert all(row['images_per_second']>0 and row['nms']=='soft' for row in rows)
    assert (work/'both'/'report.html').is_file() and KEY not in (work/'both'/'report.html').read_text()


def test_written_detections_evaluate_to_the_numbers_of_pycocotools(trained):
    work, _ = trained
    counted = run_ok(f'evaluate -e spec.txt -m run/model.best.tlt -k {KEY} -r best --pycocotools', work)
    again = run_ok('evaluate -e spec.txt -m best/detections.json', work)
    assert again.stdout.splitlines()[2:4]==counted.stdout.splitlines()[2:4]


def test_testdev_writes_detections_and_scores_nothing(trained):
    work, _ = trained
    spec = (work/'spec.txt').read_text()
    (work/'testdev.txt').write_text(spec.replace('dataset_config {', 'dataset_config { testdev_dir: "sent"', 1))
    out = run_ok(f'evaluate -e testdev.txt -m {MODEL} -k {KEY}', work)
    assert 'nothing is scored' in out.stdout and 'AP50' not in out.stdout
    rows = read_json(work/'sent'/'detections.json')
    keys = {'image_id', 'category_id', 'bbox', 'score'}
    assert rows and all(type(row['image_id']) is int and set(row)==keys for row in rows)


def test_inference_writes_images_and_labels(trained):
    work, _ = trained
    out = run_ok(f'inference -m {MODEL} -e spec.txt -i data/val -o seen -l labels -t 0.005 -k {KEY}', work)
    names = {p.name for p in (work/'data'/'val').iterdir()}
    assert {p.name for p in (work/'seen').iterdir()}==names
    assert {p.stem for p in (work/'labels').iterdir()}=={Path(name).stem for name in names}
    rows = kitti_rows(work/'labels')
    assert rows and all(len(row)==16 and row[0] in ('circle', 'square', 'triangle') for row in rows)
    assert all(float(row[15])>=.005 for row in rows)
    assert f'{len(rows):,}' in out.stdout.split('\n')[1]


def test_inference_processes_all_readable_images_and_then_fails(trained, tmp_path):
    work, _ = trained
    (tmp_path/'in').mkdir()
    Image.new('RGB', (50,40)).save(tmp_path/'in'/'good.png')
    (tmp_path/'in'/'bad.jpg').write_bytes(b'\xff\xd8\xff')
    out = run_line(f'inference -m {work/MODEL} -k {KEY} --image_dir in -r res', tmp_path)
    assert out.returncode==1 and 'in/bad.jpg: not readable' in out.stderr and 'Traceback' not in out.stderr
    last_line = out.stderr.rstrip().split('\n')[-1]
    assert last_line.startswith('effdet_inference: error: 1 of 2 images could not be read')
    names = sorted(p.name for p in (tmp_path/'res').rglob('*.*'))
    assert names==['detections.json', 'good.png', 'good.txt', 'status.json'] and 'no box reached 0.5' in out.stdout


def test_a_wrong_key_and_a_truncated_file_are_one_line(trained, tmp_path):
    work, _ = trained
    model, images = work/MODEL, work/'data'/'val'
    (tmp_path/'cut.tlt').write_bytes(model.read_bytes()[:-1000])
    assert_fails(run_line(f'inference -m {model} -k falsch -i {images} -o o', tmp_path), 'another key')
    assert_fails(run_line(f'inference -m {model} -i {images} -o o', tmp_path), 'EFFDET_KEY')
    assert_fails(run_line(f'evaluate -e spec.txt -m {tmp_path}/cut.tlt -k {KEY}', work), 'cut.tlt', 'chunk')
    assert [p.name for p in tmp_path.iterdir()]==['cut.tlt']


def wait_for_line(process, start):
    "Reads stderr up to a line that begins like this."
    while True:
        line = process.stderr.readline()
        assert line, f'the command ended without a line that starts with {start!r}'
        if line.startswith(start): return


@pytest.mark.slow
def test_a_terminated_training_is_continued_by_the_same_command(work):
    spec = SPEC.format(epochs=40).replace('validation_file_pattern: "rec/val-*"', '')
    (work/'long.txt').write_text(spec)
    args = [executable('train'), '-e', 'long.txt', '-d', 'stopped']
    with subprocess.Popen(args, cwd=work, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        wait_for_line(process, 'epoch 2/40')
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode==143 and 'run the same command again to continue' in err
    assert err.endswith('effdet_train: terminated\n')
    assert read_status(work/'stopped')[-1]['status']=='FAILURE'
    with subprocess.Popen(args, cwd=work, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        wait_for_line(process, 'continuing from stopped/model.step-')
        process.kill()


def best_scores(path):
    "The ten highest scores in a KITTI file."
    scores = [float(line.split()[15]) for line in path.read_text().splitlines()]
    return sorted(scores, reverse=True)[:10]


@pytest.mark.slow
def test_an_encrypted_export_detects_like_its_model(trained):
    work, _ = trained
    out = run_ok(f'export -m {MODEL} -k {KEY} -e spec.txt -o exported/deep/a.etlt', work)
    assert out.stdout.startswith('a.etlt: efficientdet-tiny 128x128')
    assert KEY.encode() not in (work/'exported/deep/a.etlt').read_bytes()
    for model, labels in ((MODEL, 'labels_of/tlt'), ('exported/deep/a.etlt', 'labels_of/etlt')):
        out = run_ok(f'inference -m {model} -i data/val -l {labels} -t 0.01 -k {KEY}', work)
        assert 'warning' not in out.stderr
    num_scores = 0
    for path in (work/'labels_of'/'tlt').iterdir():
        scores = best_scores(path)
        assert scores==pytest.approx(best_scores(work/'labels_of'/'etlt'/path.name), abs=1e-3)
        num_scores += len(scores)
    assert num_scores>5
    assert_fails(run_line(f'export -m {MODEL} -k {KEY} -o data', work), 'data', '.onnx')


EVALUATE_AND_LIST = '''
import sys
sys.argv = 'x evaluate -e spec.txt -m exported/b.onnx'.split()
import effdet_nb.app.cli as cli
cli.efficientdet_tf1()
print('tensorflow' in sys.modules)
'''


def test_exported_files_are_evaluated_without_tensorflow(trained):
    work, _ = trained
    assert 'nms onnx' in run_ok(f'export -m {MODEL} -k {KEY} -o exported/b.onnx -v', work).stdout
    out = run_python(EVALUATE_AND_LIST, work)
    assert out.returncode==0 and out.stdout.startswith('6 images') and out.stdout.endswith('False\n'), out.stderr


def test_a_dry_run_of_prune_writes_nothing(trained):
    work, _ = trained
    out = run_ok(f'prune -m {MODEL} -k {KEY} -o dry -pth 0.9 --dry_run', work)
    assert out.stdout and not (work/'dry').exists()


def test_prune_writes_a_smaller_model(trained):
    work, _ = trained
    command = f'prune -m {MODEL} -k {KEY} -o pruned/deep -pth 0.9'
    out = run_ok(f'{command} -el stem* --log_file logs/prune.txt', work)
    assert 'pruned_model_path' in out.stdout
    model = work/'pruned'/'deep'/'model.tlt'
    assert model.stat().st_size < .9*(work/'run'/'model.best.tlt').stat().st_size
    assert read_status(model.parent)[-1]['status']=='SUCCESS'
    for path in (model.parent/'status.json', work/'logs'/'prune.txt'): assert KEY not in path.read_text()
    assert_fails(run_line(f'{command} -el nosuchlayer', work), 'nosuchlayer')


@pytest.mark.slow
def test_a_pruned_model_is_retrained_and_a_finished_run_stays_as_it_is(trained):
    work, _ = trained
    run_ok(f'prune -m {MODEL} -k {KEY} -o pruned2 -pth 0.9', work)
    spec = SPEC.format(epochs=1).replace('num_epochs', 'pruned_model_path: "pruned2/model.tlt" num_epochs')
    (work/'again.txt').write_text(spec)
    out = run_ok(f'train -e again.txt -d again -k {KEY}', work)
    assert 'retraining the pruned pruned2/model.tlt' in out.stderr
    out = run_ok(f'train -e again.txt -d again -k {KEY}', work)
    assert 'finished already: again/model.step-3.tlt' in out.stderr and 'AP' in out.stdout
    message = assert_fails(run_line(f'train -e again.txt -d run -k {KEY}', work), '--model_dir')
    assert 'model.step-3.tlt: belongs to another run' in message
