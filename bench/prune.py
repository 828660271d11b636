"""Pruning of whole detectors: groups, decisions and slicing, beside Torch-Pruning's DepGraph on effdet's EfficientDet.

    pip install torch torchvision effdet==0.4.1 torch-pruning        # in an environment of its own
    PEER_PYTHON=that/environment/bin/python python bench/prune.py [--variants d0 d5] [--size 0]

Both remove the same share of the parameters: the peer halves every layer, ours finds the threshold that leaves as many.
Not counted: building the network with its weights, and files. Counted: finding the channels that belong together (the
peer traces an image through the network, ours lays out its wiring), choosing, and slicing every weight.
With --command the whole `effdet_prune` is timed as well: start-up, files, measuring of speed; and its peak memory.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

PEER_PACKAGES = 'pip install torch torchvision effdet==0.4.1 torch-pruning'

PEER_SCRIPT = '''
import json, sys, time, torch, torch_pruning as tp
from effdet import create_model
name, size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = create_model(name, bench_task='', num_classes=3, pretrained=False, pretrained_backbone=False,
                     image_size=(size, size)).eval()

def count(): return sum(p.numel() for p in model.parameters())

before, images = count(), torch.rand(1, 3, size, size)
outputs = ('predict.conv_pw', 'predict.conv', 'predict')
ignored = [m for n, m in model.named_modules() if n.endswith(outputs)]
start = time.perf_counter()
importance = tp.importance.MagnitudeImportance(p=2)
pruner = tp.pruner.MagnitudePruner(model, images, importance=importance, pruning_ratio=.5, round_to=8,
                                   ignored_layers=ignored, root_module_types=[torch.nn.Conv2d])
grouped = time.perf_counter()
pruner.step()
end = time.perf_counter()
with torch.no_grad(): out = model(images)
print(json.dumps(dict(before=before, after=count(), groups=grouped-start, slicing=end-grouped, total=end-start)))
'''

COMMAND_SCRIPT = '''
import resource, sys
from effdet_nb.app.cli import efficientdet_tf1
sys.argv = ['efficientdet_tf1', 'prune', '-m', sys.argv[1], '-o', sys.argv[2], '--target_params', '0.2']
efficientdet_tf1()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''


def run_peer(python, variant, size):
    "Runs the peer once, in its own environment."
    command = [python, '-W', 'ignore', '-c', PEER_SCRIPT, f'tf_efficientdet_{variant}', str(size)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f'{python} cannot run the peer. In an environment of its own: {PEER_PACKAGES}, and name its Python in '
                 f'PEER_PYTHON\n{out.stderr[-1500:]}')
    return json.loads(out.stdout.splitlines()[-1])


def time_pruning(model_file, target_fraction):
    "Groups, decisions and slicing of an open model file: seconds of each, and parameters before and after."
    from dataclasses import replace

    from effdet_nb.prune.channel_groups import abstract_model, channel_graph, prune_weights
    from effdet_nb.prune.pruning_plan import PruningPlan, find_threshold, group_norms
    start = time.perf_counter()
    graph = channel_graph(abstract_model(model_file.arch))
    grouped = time.perf_counter()
    plan = PruningPlan(graph, group_norms(graph, model_file.weights))
    plan = replace(plan, threshold=find_threshold(plan, target_fraction))
    chosen = time.perf_counter()
    weights = prune_weights(model_file.weights, graph, plan.kept_indices)
    end = time.perf_counter()
    before, after = plan.params
    assert sum(w.size for w in weights.values()) == after
    return dict(before=before, after=after, groups=grouped-start, choosing=chosen-grouped, slicing=end-chosen,
                total=end-start)


def time_command(path, folder):
    "Seconds and peak megabytes of the whole command, and the line of its table about the whole network."
    start = time.perf_counter()
    out = subprocess.run([sys.executable, '-c', COMMAND_SCRIPT, path, folder], capture_output=True, text=True)
    seconds = time.perf_counter()-start
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    [whole_row] = [l for l in lines if l.startswith('all')][-1:]
    return seconds, int(lines[-1])/1e3, whole_row


def save_random_model(variant, size, folder):
    "A file with fresh weights, and moving averages as training would leave them."
    from effdet_nb.data.classes import ClassTable
    from effdet_nb.detector.efficientdet import Arch, build
    from effdet_nb.weights.model_file import save_detector, weights_by_path
    arch = Arch(f'efficientdet-{variant}', (size, size), num_classes=3)
    model = build(arch)
    classes = ClassTable.from_categories([{'id': i, 'name': f'class {i}'} for i in (1, 2, 3)], 3)
    return save_detector(f'{folder}/{variant}.tlt', model, arch, classes, ema=weights_by_path(model))


def table_row(name, result):
    "A Markdown row; the peer chooses while it slices."
    choosing = f'{result["choosing"]:.2f}' if 'choosing' in result else 'with slicing'
    share = result['after']/result['before']
    return (f'| {name} | {result["before"]:,} → {result["after"]:,} ({share:.1%}) | {result["groups"]:.2f} | '
            f'{choosing} | {result["slicing"]:.2f} | {result["total"]:.2f} |')


def median_run(model_file, target_fraction, rounds):
    "The round with the median total."
    runs = sorted((time_pruning(model_file, target_fraction) for _ in range(rounds)), key=lambda run: run['total'])
    return runs[len(runs)//2]


def compare(variant, args, folder):
    "Prints the table of one variant."
    from effdet_nb.detector.efficientdet import Arch
    from effdet_nb.weights.model_file import load_model_file
    size = args.size or Arch(f'efficientdet-{variant}').image_hw[0]
    path = save_random_model(variant, size, folder)
    peer = run_peer(args.peer, variant, size) if args.peer else None
    ours = median_run(load_model_file(path), peer['after']/peer['before'] if peer else .35, args.rounds)
    print(f'\n| {variant} at {size} pixels | parameters | groups s | choosing s | slicing s | total s |\n'
          '|---|---|---|---|---|---|')
    if peer: print(table_row('Torch-Pruning', peer))
    print(table_row('effdet_nb', ours))
    if peer: print(f'{peer["total"]/ours["total"]:.1f} times as fast')
    if args.command:
        seconds, megabytes, row = time_command(path, f'{folder}/out')
        print(f'effdet_prune --target_params 0.2, everything: {seconds:.1f} s, peak {megabytes:,.0f} MB\n{row}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--variants', nargs='+', default=['d0', 'd5'])
    parser.add_argument('--size', type=int, default=0, help='side of the image; 0: the native one')
    parser.add_argument('--rounds', type=int, default=3, help='of ours; their median counts')
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON', ''),
                        help='Python of the environment with torch, effdet and torch-pruning')
    parser.add_argument('--command', action='store_true', help='time the whole command, too')
    args = parser.parse_args()
    if not args.peer: print(f'no PEER_PYTHON: ours alone. To compare: {PEER_PACKAGES} in an environment of its own')
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as folder: compare(variant, args, folder)


if __name__ == '__main__': main()
