"Guards of the commands: each as a subprocess from a folder of its own, as a user would run it."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.core.console import read_status

BIN = Path(sys.executable).parent
TASKS = ['dataset_convert', 'check', 'train', 'evaluate', 'prune', 'inference', 'export', 'gen_trt_engine', 'quickstart', 'import']
KEY = 'tl7-geheim'
ENV = {k:v for k,v in os.environ.items() if k!='EFFDET_KEY'} | dict(OMP_NUM_THREADS='1')

SPEC = '''
training_config {{ train_batch_size: 4 num_epochs: {epochs} lr_warmup_epoch: 0 learning_rate: 0.01 }}
dataset_config {{ num_classes: 4 image_size: "128,128" training_file_pattern: "rec/train-*" validation_file_pattern: "rec/val-*" validation_json_file: "data/val.json" }}
eval_config {{ eval_batch_size: 4 eval_epoch_cycle: 1 }}
'''

def run(*args, cwd, **env):
    "Runs a command, given without its prefix, and returns what came of it."
    name,*args = map(str, args)
    return subprocess.run([BIN/(name if name=='efficientdet_tf1' else f'effdet_{name}'), *args], cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=300)

def fails(out, *words, code=1):
    "A failed command: its exit code, one readable last line with these words, no traceback, no results."
    assert out.returncode==code, out.stderr
    last = out.stderr.rstrip('\n').split('\n')[-1]
    assert 'error: ' in last and all(w in last for w in words), out.stderr
    assert 'Traceback' not in out.stderr and not out.stdout
    return last


@pytest.fixture(scope='session')
def work(tmp_path_factory):
    "A folder with a drawn data set, its records, a spec, and a model trained for an epoch under a key; all made by commands."
    folder = tmp_path_factory.mktemp('work')
    make_toy_dataset(folder/'data', 12, 6, (128,128))
    for tag,shards in (('train',2), ('val',1)):
        out = run('dataset_convert', '-i', f'data/{tag}', '-a', f'data/{tag}.json', '-o', 'rec', '-s', shards, cwd=folder)
        assert out.returncode==0, out.stderr
    (folder/'spec.txt').write_text(SPEC.format(epochs=1))
    return folder

@pytest.fixture(scope='session')
def trained(work):
    out = run('train', '-e', 'spec.txt', '-d', 'run', '-k', KEY, '--log_file', 'logs/deep/train.txt', cwd=work)
    assert out.returncode==0, out.stderr
    return work, out


# --- without TensorFlow

@pytest.mark.parametrize('task', TASKS)
def test_help_needs_no_heavy_import_and_says_what_the_task_does(task, tmp_path):
    out = run(task, '--help', cwd=tmp_path)
    assert out.returncode==0 and 'usage:' in out.stdout and not out.stderr
    code = f"import sys; sys.argv = ['x','{task}','--help']\nimport effdet_nb.app.cli as c\ntry: c.efficientdet_tf1()\nexcept SystemExit: pass\nprint([m for m in ('tensorflow','keras','numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=ENV).stdout.strip().endswith('[]')

def test_the_umbrella_knows_every_task(tmp_path):
    out = run('efficientdet_tf1', '--help', cwd=tmp_path)
    assert out.returncode==0 and all(t in out.stdout for t in TASKS)
    assert re.fullmatch(r'\d+\.\d+\.\d+\S*\n', run('efficientdet_tf1', '--version', cwd=tmp_path).stdout)
    for args in ((), ('fly',), ('train', '--nonsense')): assert run('efficientdet_tf1', *args, cwd=tmp_path).returncode==2

SEED = { # flags as NVIDIA's page writes them
    'dataset_convert': ['-i a -a b -o c -t d -s 3 --include_mask', '--image_dir a --annotations_file b --output_dir c --tag d --num_shards 3 --include_masks'],
    'train': ['-e a -d b -k c --gpus 2 --gpu_index 0 1 --log_file d', '--experiment_spec_file a --model_dir b --key c --experiment_spec x'],
    'evaluate': ['-e a -m b -k c --gpu_index 0 --log_file d', '--experiment_spec_file a --model_path b --key c -r d', '--experiment_spec a -m b', '-e a -m b c -m d --nms soft --iou_threshold .5 --score_threshold .3 --pycocotools'],
    'prune': ['-m a -o b -k c -n L2 -eq intersection -pg 4 -pth 0.7 -nf 8 -el x y z --gpu_index 0 --log_file d', '--model a --output_dir b --normalizer max --equalization_criterion union --pruning_granularity 8 --pruning_threshold .1 --min_num_filters 16 --excluded_layers x'],
    'inference': ['-m a -i b -o c -k d -e e -l f --label_map g --gpu_index 0 --log_file h', '--model_path a --in_image_path b --out_image_path c --out_label_path d', '-m a --image_dir b --class_map c -r d -t 0.4'],
    'gen_trt_engine': ['-m a -k b --data_type fp16 --engine_file c --max_batch_size 4 --min_batch_size 1 --opt_batch_size 2 --batches 3 --cal_image_dir d --cal_cache_file e --max_workspace_size 2 -r f -v --gpu_index 0 --log_file g'],
    'export': ['-m a -k b -e c -o d --gpu_index 0 --log_file e --verbose', '--model_path a --experiment_spec b --output_path c', '-m a --experiment_spec_file b -o c --max_batch_size 1 --data_type fp32 --cal_image_dir d --cal_cache_file e --engine_file f'],
}

@pytest.mark.parametrize('task, line', [(t,l) for t,ls in SEED.items() for l in ls])
def test_flags_of_both_tao_versions_are_understood(task, line):
    from fastcore.script import anno_parser
    import effdet_nb.app.cli as cli
    anno_parser(cli.TASKS[task], task).parse_args(line.split())

@pytest.mark.parametrize('line, words', [
    ('dataset_convert -i data/train -a data/nope.json -o out', ['nope.json']),
    ('dataset_convert -i rec -a data/train.json -o out', ['all 12 pictures are missing']),
    ('dataset_convert -i data/train -a data/train.json -o out --strict', ['--strict', 'listed above']),
    ('dataset_convert -i data/train -a bad.json -o out', ['bad.json', 'line 2']),
    ('dataset_convert -i data/train -a data/train.json -o spec.txt', ['spec.txt']),
    ('check -e nope.txt', ['nope.txt', 'no such spec']),
    ('train -e typo.txt -d out', ['learning_rat', 'Did you mean learning_rate?', 'typo.txt:2:']),
    ('train -e nope.txt -d out', ['nope.txt', 'no such spec']),
    ('train -e spec.txt -d out --gpus 0', ['--gpus 0']),
    ('train -e spec.txt -d out --gpu_index 1 1', ['--gpu_index']),
    ('train -e spec.txt -d out --log_file data', ['data', 'folder']),
    ('evaluate -e nope.txt -m x.tlt', ['nope.txt']),
    ('inference -m x.tlt -i nothing -o out', ['nothing', 'no such picture']),
    ('inference -m x.onnx -i data/val', ['nowhere to write']),
    ('inference -m x.tlt -i data/val -o data/val', ['would be replaced']),
    ('inference -m x.tlt -i data/val -o out -t 40', ['threshold', '0 to 1']),
    ('dataset_convert -i data/train -a odd.json -o out', ['odd.json: 2 problems (listed above)']),
    ('efficientdet_tf1 prune -m nope.tlt -o out', ['efficientdet_tf1 prune: error: nope.tlt']),
    ('prune -m nope.tlt -o out', ['nope.tlt', 'no such file']),
    ('prune -m nope.tlt -o out -pth 0.2 --target_params 0.5', ['--pruning_threshold', 'target']),
    ('export -m nope.tlt -o out.txt', ['out.txt', '.onnx']),
    ('export -m nope.tlt -o out.pb', ['out.pb', 'saved_model.pb']),
])
def test_bad_input_is_one_line_and_leaves_nothing(work, tmp_path, line, words):
    for name in ('data','rec','spec.txt'): (tmp_path/name).symlink_to(work/name)
    (tmp_path/'bad.json').write_text('{"images": [],\n oops}')
    (tmp_path/'odd.json').write_text('{"images": []}')
    (tmp_path/'typo.txt').write_text(SPEC.format(epochs=1).replace('learning_rate', 'learning_rat'))
    before = {p.name for p in tmp_path.iterdir()}
    fails(run(*line.split(), cwd=tmp_path), *words)
    assert {p.name for p in tmp_path.iterdir()}==before

def test_check_prints_all_problems_and_writes_a_page(work, tmp_path):
    for name in ('data','rec','spec.txt'): (tmp_path/name).symlink_to(work/name)
    out = run('check', '-e', 'spec.txt', '-o', 'deep/page.html', cwd=tmp_path)
    assert out.returncode==0, out.stderr
    assert 'training: 12 pictures' in out.stdout and 'validation: 6 pictures' in out.stdout and (tmp_path/'deep'/'page.html').read_text().count('<img')==6
    text = (work/'spec.txt').read_text()
    (tmp_path/'wrong.txt').write_text(re.sub(r'num_classes: *\d+', 'num_classes: 2 max_instances_per_image: 1', text))
    out = run('check', '-e', 'wrong.txt', cwd=tmp_path)
    assert out.returncode==1 and '2 serious problems with the data' in out.stderr.splitlines()[-1]
    assert 'dataset_config.num_classes' in out.stdout and 'max_instances_per_image' in out.stdout
    assert '2 problems. effdet_check tells more' in run('train', '-e', 'wrong.txt', '-d', 'run', cwd=tmp_path).stderr and not list((tmp_path/'run').glob('*.tlt'))

def test_all_faults_of_a_spec_stand_above_the_last_line(tmp_path):
    (tmp_path/'s.txt').write_text('training_config { learning_rat: 0.1\n num_epochs: -3 }')
    out = run('train', '-e', 's.txt', '-d', 'out', cwd=tmp_path)
    fails(out, 's.txt: 5 problems', 'listed above')
    assert 'learning_rate?' in out.stderr and 'num_epochs' in out.stderr

def test_verbose_shows_the_traceback_and_log_file_appends_everything(tmp_path):
    for i in (1,2):
        out = run('train', '-e', 'no.txt', '-d', 'out', '--verbose', '--log_file', 'a/b/log.txt', '-k', KEY, cwd=tmp_path)
        assert out.returncode==1 and 'Traceback' in out.stderr and out.stderr.rstrip().split('\n')[-1].startswith('effdet_train: error: no.txt')
        assert (tmp_path/'a'/'b'/'log.txt').read_text()==out.stderr*i
        assert KEY not in out.stderr

def test_results_on_stdout_and_dashes_forgiven(work, tmp_path):
    out = run('efficientdet_tf1', 'dataset-convert', '-i', work/'data'/'val', '-a', work/'data'/'val.json', '-o', 'x/y', '-s', 1, '-r', 'res', '--log_file', 'log.txt', cwd=tmp_path)
    assert out.returncode==0 and re.search(r'images +6\n', out.stdout) and 'val: 1 shards' in out.stdout
    assert (tmp_path/'log.txt').read_text()==out.stdout
    assert (tmp_path/'x'/'y'/'val-00000-of-00001.tfrecord').is_file() and [o['status'] for o in read_status(tmp_path/'res')]==['STARTED','RUNNING','SUCCESS']

WAITS = '''
import sys, time
import effdet_nb.app.cli as c
@c.command
def effdet_wait():
    "Wait."
    print('ready', flush=True)
    time.sleep(60)
c.TASKS['wait'] = effdet_wait
sys.argv = ['x', 'wait']
c.efficientdet_tf1()
'''

def heeds_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell starts background jobs deaf to it, and so their children

@pytest.mark.parametrize('sent, code, word', [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')])
def test_signals_end_a_command_with_the_exit_code_of_the_shell(sent, code, word, tmp_path):
    (tmp_path/'waits.py').write_text(WAITS)
    with subprocess.Popen([sys.executable, 'waits.py'], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c) as p:
        assert p.stdout.readline()=='ready\n'
        p.send_signal(sent)
        _,err = p.communicate(timeout=30)
    assert p.returncode==code and err==f'effdet_wait: {word}\n'

def test_a_reader_who_has_seen_enough_hears_no_complaint(work, tmp_path):
    with subprocess.Popen([BIN/'effdet_dataset_convert', '-i', work/'data'/'val', '-a', work/'data'/'val.json', '-o', tmp_path], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        p.stdout.close()
        err = p.stderr.read()
    assert p.returncode==141 and 'rror' not in err and 'pipe' not in err

def test_held_back_text_appears_only_when_it_is_needed(tmp_path):
    code = 'import os\nfrom effdet_nb.app.command import held_back\nwith held_back(): os.write(2, b"hello\\n"); {}'
    def stderr(then): return subprocess.run([sys.executable, '-c', code.format(then)], capture_output=True, text=True, cwd=tmp_path).stderr
    assert stderr('pass')=='' and stderr('1/0').startswith('hello\n')


# --- with TensorFlow: one small model serves all

def test_training_leaves_a_model_a_log_and_no_key(trained):
    work,out = trained
    assert out.stdout.startswith('run: epoch 1/1  loss ') and 'WARNING' not in out.stderr and 'Warning' not in out.stderr
    assert (work/'logs'/'deep'/'train.txt').read_text()==out.stderr+out.stdout
    assert read_status(work/'run')[-1]['status']=='SUCCESS'
    for p in (work/'run').rglob('*'): assert not p.is_file() or KEY.encode() not in p.read_bytes()

@pytest.mark.parametrize('env', [{'CUDA_VISIBLE_DEVICES': ''}, {'TF_CPP_MIN_LOG_LEVEL': '0'}]) # TensorFlow's own chatter stays away, however it was told to speak
def test_two_gpus_on_a_machine_without_are_one_line(work, env):
    out = run('train', '-e', 'spec.txt', '-d', 'two', '--gpus', 2, cwd=work, **env)
    fails(out, '--gpus 2', 'TensorFlow sees 0 GPU')
    assert len(out.stderr.splitlines())==1

def test_evaluate_prints_the_table_and_writes_numbers(trained):
    work,_ = trained
    out = run('evaluate', '-e', 'spec.txt', '-m', 'run/model.step-3.tlt', '-r', 'ev', cwd=work, EFFDET_KEY=KEY)
    assert out.returncode==0, out.stderr
    numbers = json.loads((work/'ev'/'metrics.json').read_text())
    assert 'APs' in out.stdout and 'triangle' in out.stdout and out.stdout.startswith('6 images')
    assert numbers['num_images']==6 and len(numbers['metrics'])==12 and [r['name'] for r in numbers['per_class']]==['circle','square','triangle']
    assert len(json.loads((work/'ev'/'detections.json').read_text()))==numbers['num_detections']
    assert read_status(work/'ev')[-1]['kpi'].keys()==numbers['metrics'].keys() and KEY not in (work/'ev'/'status.json').read_text()

def test_several_models_are_compared_and_each_is_read(trained):
    work,_ = trained
    from fastcore.script import anno_parser
    import effdet_nb.app.cli as cli
    assert anno_parser(cli.TASKS['evaluate'], 'x').parse_args('-e a -m b c -m d'.split()).model_path==['b','c','d']
    out = run('evaluate', '-e', 'spec.txt', '-m', 'run/model.step-3.tlt', '-m', 'run/model.best.tlt', '-k', KEY, '--nms', 'hard', '-r', 'both', cwd=work)
    assert out.returncode==0, out.stderr
    assert 'model.step-3.tlt' in out.stdout and 'model.best.tlt' in out.stdout and out.stdout.count(' hard ')==2 and max(map(len, out.stdout.splitlines()))<=100
    told = json.loads((work/'both'/'metrics.json').read_text())
    assert [m['model'] for m in told]==['model.step-3.tlt','model.best.tlt'] and all(m['images_per_second']>0 and m['nms']=='hard' for m in told)
    assert (work/'both'/'report.html').is_file() and KEY not in (work/'both'/'report.html').read_text()
    again = run('evaluate', '-e', 'spec.txt', '-m', 'both/model.best.tlt/detections.json', cwd=work)
    assert again.returncode==0 and again.stdout.splitlines()[2:4]==run('evaluate', '-e', 'spec.txt', '-m', 'run/model.best.tlt', '-k', KEY, '--nms', 'hard', '--pycocotools', cwd=work).stdout.splitlines()[2:4], again.stderr

def test_testdev_writes_detections_and_scores_nothing(trained):
    work,_ = trained
    (work/'testdev.txt').write_text((work/'spec.txt').read_text().replace('dataset_config {', 'dataset_config { testdev_dir: "sent"', 1))
    out = run('evaluate', '-e', 'testdev.txt', '-m', 'run/model.step-3.tlt', '-k', KEY, cwd=work)
    assert out.returncode==0 and 'nothing is scored' in out.stdout and 'AP50' not in out.stdout, out.stderr
    rows = json.loads((work/'sent'/'detections.json').read_text())
    assert rows and all(type(r['image_id']) is int and set(r)=={'image_id','category_id','bbox','score'} for r in rows)

def test_inference_writes_pictures_and_labels(trained):
    work,_ = trained
    out = run('inference', '-m', 'run/model.step-3.tlt', '-e', 'spec.txt', '-i', 'data/val', '-o', 'seen', '-l', 'labels', '-t', '0.005', '-k', KEY, cwd=work)
    assert out.returncode==0, out.stderr
    names = {p.name for p in (work/'data'/'val').iterdir()}
    assert {p.name for p in (work/'seen').iterdir()}==names and {p.stem for p in (work/'labels').iterdir()}=={Path(n).stem for n in names}
    lines = [l.split() for p in (work/'labels').iterdir() for l in p.read_text().splitlines()]
    assert lines and all(len(l)==16 and l[0] in ('circle','square','triangle') and float(l[15])>=.005 for l in lines)
    assert f'{len(lines):,}' in out.stdout.split('\n')[1]

def test_inference_does_all_it_can_and_then_fails(trained, tmp_path):
    work,_ = trained
    (tmp_path/'in').mkdir()
    Image.new('RGB', (50,40)).save(tmp_path/'in'/'good.png')
    (tmp_path/'in'/'bad.jpg').write_bytes(b'\xff\xd8\xff')
    out = run('inference', '-m', work/'run'/'model.step-3.tlt', '-k', KEY, '--image_dir', 'in', '-r', 'res', cwd=tmp_path)
    assert out.returncode==1 and 'in/bad.jpg: not readable' in out.stderr and 'Traceback' not in out.stderr
    assert out.stderr.rstrip().split('\n')[-1].startswith('effdet_inference: error: 1 of 2 pictures could not be read')
    assert sorted(p.name for p in (tmp_path/'res').rglob('*.*'))==['detections.json','good.png','good.txt','status.json'] and 'no box reached 0.5' in out.stdout

def test_a_wrong_key_and_a_cut_file_are_one_line(trained, tmp_path):
    work,_ = trained
    model = work/'run'/'model.step-3.tlt'
    (tmp_path/'cut.tlt').write_bytes(model.read_bytes()[:-1000])
    fails(run('inference', '-m', model, '-k', 'falsch', '-i', work/'data'/'val', '-o', 'o', cwd=tmp_path), 'another key')
    fails(run('inference', '-m', model, '-i', work/'data'/'val', '-o', 'o', cwd=tmp_path), 'EFFDET_KEY')
    fails(run('evaluate', '-e', 'spec.txt', '-m', tmp_path/'cut.tlt', '-k', KEY, cwd=work), 'cut.tlt', 'chunk')
    assert [p.name for p in tmp_path.iterdir()]==['cut.tlt']

@pytest.mark.slow
def test_a_scheduler_may_stop_training_and_the_same_command_goes_on(work):
    (work/'long.txt').write_text(SPEC.format(epochs=40).replace('validation_file_pattern: "rec/val-*"', ''))
    args = [BIN/'effdet_train', '-e', 'long.txt', '-d', 'stopped']
    with subprocess.Popen(args, cwd=work, env=ENV, stderr=subprocess.PIPE, text=True) as p:
        while not (line := p.stderr.readline()).startswith('epoch 2/40'): assert line, 'training ended by itself'
        p.send_signal(signal.SIGTERM)
        _,err = p.communicate(timeout=60)
    assert p.returncode==143 and 'the same command goes on' in err and err.endswith('effdet_train: terminated\n')
    assert read_status(work/'stopped')[-1]['status']=='FAILURE'
    with subprocess.Popen(args, cwd=work, env=ENV, stderr=subprocess.PIPE, text=True) as p:
        while not (line := p.stderr.readline()).startswith('continuing from stopped/model.step-'): assert line, 'training began anew'
        p.kill()

def test_an_exported_file_is_sealed_and_answers_like_its_model(trained):
    work,_ = trained
    model,etlt = 'run/model.step-3.tlt','exported/deep/a.etlt'
    out = run('export', '-m', model, '-k', KEY, '-e', 'spec.txt', '-o', etlt, cwd=work)
    assert out.returncode==0 and out.stdout.startswith('a.etlt: efficientdet-d0 128x128'), out.stderr
    assert KEY.encode() not in (work/etlt).read_bytes()
    for m in (model, etlt):
        out = run('inference', '-m', m, '-i', 'data/val', '-l', f'labels_of/{Path(m).suffix[1:]}', '-t', '0.01', '-k', KEY, cwd=work)
        assert out.returncode==0 and 'warning' not in out.stderr, out.stderr
    def scores(path): return sorted((float(l.split()[15]) for l in path.read_text().splitlines()), reverse=True)[:10]
    pairs = [(scores(p), scores(work/'labels_of'/'etlt'/p.name)) for p in (work/'labels_of'/'tlt').iterdir()]
    assert sum(len(a) for a,_ in pairs)>5
    for ours,theirs in pairs: assert ours==pytest.approx(theirs, abs=1e-3)
    fails(run('export', '-m', model, '-k', KEY, '-o', 'data', cwd=work), 'data', '.onnx')

def test_evaluate_takes_exported_files_without_tensorflow(trained):
    work,_ = trained
    out = run('export', '-m', 'run/model.step-3.tlt', '-k', KEY, '-o', 'exported/b.onnx', '-v', cwd=work)
    assert out.returncode==0 and 'nms onnx' in out.stdout, out.stderr
    code = "import sys; sys.argv = 'x evaluate -e spec.txt -m exported/b.onnx'.split()\nimport effdet_nb.app.cli as c; c.efficientdet_tf1(); print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, '-c', code], cwd=work, env=ENV, capture_output=True, text=True)
    assert out.returncode==0 and out.stdout.startswith('6 images') and out.stdout.endswith('False\n'), out.stderr

def test_prune_says_what_it_would_do_and_does_it(trained):
    work,_ = trained
    args = ['prune', '-m', 'run/model.step-3.tlt', '-k', KEY, '-o', 'pruned/deep', '-pth', '0.9']
    dry = run(*args, '--dry_run', cwd=work)
    assert dry.returncode==0 and dry.stdout and not (work/'pruned').exists(), dry.stderr
    out = run(*args, '-el', 'stem*', '--log_file', 'logs/prune.txt', cwd=work)
    assert out.returncode==0 and 'pruned_model_path' in out.stdout, out.stderr
    model = work/'pruned'/'deep'/'model.tlt'
    assert model.stat().st_size<.9*(work/'run'/'model.best.tlt').stat().st_size and read_status(model.parent)[-1]['status']=='SUCCESS'
    assert not any(KEY in p.read_text() for p in (model.parent/'status.json', work/'logs'/'prune.txt'))
    fails(run(*args, '-el', 'nosuchlayer', cwd=work), 'nosuchlayer')

@pytest.mark.slow
def test_a_pruned_model_is_retrained(trained):
    work,_ = trained
    assert run('prune', '-m', 'run/model.step-3.tlt', '-k', KEY, '-o', 'pruned2', '-pth', '0.9', cwd=work).returncode==0
    (work/'again.txt').write_text(SPEC.format(epochs=1).replace('num_epochs', 'pruned_model_path: "pruned2/model.tlt" num_epochs'))
    out = run('train', '-e', 'again.txt', '-d', 'again', '-k', KEY, cwd=work)
    assert out.returncode==0 and 'retraining the pruned pruned2/model.tlt' in out.stderr, out.stderr
    out = run('train', '-e', 'again.txt', '-d', 'again', '-k', KEY, cwd=work)
    assert out.returncode==0 and 'finished already: again/model.step-3.tlt' in out.stderr and 'AP' in out.stdout, out.stderr
    out = run('train', '-e', 'again.txt', '-d', 'run', '-k', KEY, cwd=work)
    assert 'model.step-3.tlt: is of another run' in fails(out, '--model_dir')

def test_quickstart_offers_every_setting_and_leaves_defaults_to_it():
    import inspect
    from dataclasses import fields
    import effdet_nb.app.cli as cli
    from effdet_nb.app.quickstart import QuickstartSettings, quickstart
    mine = {k:p.default for k,p in inspect.signature(cli.effdet_quickstart).parameters.items() if k not in ('key','log_file','verbose')}
    assert mine.pop('folder')==inspect.signature(quickstart).parameters['folder'].default
    assert set(mine)=={f.name for f in fields(QuickstartSettings)} and set(mine.values())=={None}

def test_quickstart_settings_are_checked_at_once(tmp_path):
    fails(run('quickstart', '--folder', 'q', '--size', 100, cwd=tmp_path), '128')
    fails(run('quickstart', '--folder', 'q', '--num_train', 0, cwd=tmp_path), 'num_train 0')
    assert not list(tmp_path.iterdir())
