"""Pruning of whole detectors: groups, decisions and slicing, beside Torch-Pruning's DepGraph on the PyTorch port of EfficientDet.

    pip install torch torchvision effdet==0.4.1 torch-pruning        # in an environment of its own
    PEER_PYTHON=that/environment/bin/python python bench/prune.py [--variants d0 d5] [--size 0]

Both take out the same share of the parameters: the peer halves every layer, ours looks for the threshold that leaves as many.
Not counted: building the network with its weights, and files. Counted: finding out who shares channels (the peer traces a picture
through the network, ours lays out its wiring), choosing, and cutting every weight.
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

import numpy as np

PEER_SCRIPT = '''
import json, sys, time, torch, torch_pruning as tp
from effdet import create_model
name, size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = create_model(name, bench_task='', num_classes=3, pretrained=False, pretrained_backbone=False, image_size=(size, size)).eval()
count = lambda: sum(p.numel() for p in model.parameters())
before, images = count(), torch.rand(1, 3, size, size)
ignored = [m for n, m in model.named_modules() if n.endswith('predict.conv_pw') or n.endswith('predict.conv') or n.endswith('predict')]
start = time.perf_counter()
pruner = tp.pruner.MagnitudePruner(model, images, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=.5, round_to=8, ignored_layers=ignored, root_module_types=[torch.nn.Conv2d])
grouped = time.perf_counter()
pruner.step()
end = time.perf_counter()
with torch.no_grad(): out = model(images)
print(json.dumps(dict(before=before, after=count(), groups=grouped-start, cutting=end-grouped, total=end-start)))
'''


def run_peer(python, variant, size):
    "Runs the peer once, in its own environment."
    r = subprocess.run([python, '-W', 'ignore', '-c', PEER_SCRIPT, f'tf_efficientdet_{variant}', str(size)], capture_output=True, text=True)
    if r.returncode: raise SystemExit(f'{python} cannot run the peer. In an environment of its own: pip install torch torchvision effdet==0.4.1 torch-pruning, and name its Python in PEER_PYTHON\n{r.stderr[-1500:]}')
    return json.loads(r.stdout.splitlines()[-1])


def time_pruning(stored, share):
    "Groups, decisions and slicing of a stored model; seconds of each, and parameters before and after."
    from effdet_nb.prune.channel_groups import channel_graph, prune_weights, abstract_model
    from effdet_nb.prune.pruning_plan import PruningPlan, find_threshold, group_norms
    from effdet_nb.detector.efficientdet import arch_from_dict
    from dataclasses import replace
    start = time.perf_counter()
    graph = channel_graph(abstract_model(arch_from_dict(stored.meta['arch'])))
    grouped = time.perf_counter()
    plan = PruningPlan(graph, group_norms(graph, stored.weights))
    plan = replace(plan, threshold=find_threshold(plan, share))
    chosen = time.perf_counter()
    weights = prune_weights(stored.weights, graph, plan.kept_indices)
    end = time.perf_counter()
    assert sum(w.size for w in weights.values()) == plan.params[1]
    return dict(before=plan.params[0], after=plan.params[1], groups=grouped-start, choosing=chosen-grouped, cutting=end-chosen, total=end-start)


def time_command(path, folder):
    "Seconds and peak megabytes of the whole command."
    start = time.perf_counter()
    code = "import resource, sys\nfrom effdet_nb.app.cli import efficientdet_tf1\nsys.argv = ['efficientdet_tf1', 'prune', '-m', sys.argv[1], '-o', sys.argv[2], '--target_params', '0.2']\nefficientdet_tf1()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    r = subprocess.run([sys.executable, '-c', code, path, folder], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    *_, all_row, memory = [l for l in r.stdout.splitlines() if l.startswith('all') or l.isdigit()]
    return time.perf_counter()-start, int(memory)/1e3, all_row


def save_random_model(variant, size, folder):
    "A file with fresh weights, and moving averages as training would leave them."
    from effdet_nb.data.classes import ClassTable
    from effdet_nb.weights.model_file import save_detector, weights_by_path
    from effdet_nb.detector.efficientdet import Arch, build
    arch = Arch(f'efficientdet-{variant}', (size, size), num_classes=3)
    model = build(arch)
    classes = ClassTable.from_categories([{'id': i, 'name': f'class {i}'} for i in (1, 2, 3)], 3)
    return save_detector(f'{folder}/{variant}.tlt', model, arch, classes, ema=weights_by_path(model))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--variants', nargs='+', default=['d0', 'd5'])
    parser.add_argument('--size', type=int, default=0, help='side of the picture; 0: the native one')
    parser.add_argument('--rounds', type=int, default=3, help='of ours; their median counts')
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON', ''), help='Python of the environment with torch, effdet and torch-pruning')
    parser.add_argument('--command', action='store_true', help='time the whole command, too')
    args = parser.parse_args()
    from effdet_nb.detector.efficientdet import VARIANTS
    from effdet_nb.weights.model_file import load_model_file
    if not args.peer: print('no PEER_PYTHON: ours alone. To compare, pip install torch torchvision effdet==0.4.1 torch-pruning in an environment of its own')
    for variant in args.variants:
        size = args.size or VARIANTS[f'efficientdet-{variant}'][0]
        with tempfile.TemporaryDirectory() as folder:
            stored = load_model_file(save_random_model(variant, size, folder))
            theirs = run_peer(args.peer, variant, size) if args.peer else None
            share = theirs['after']/theirs['before'] if theirs else .35
            rounds = sorted((time_pruning(stored, share) for _ in range(args.rounds)), key=lambda r: r['total'])
            mine = rounds[len(rounds)//2]
            print(f'\n| {variant} at {size} pixels | parameters | groups s | choosing s | cutting s | total s |\n|---|---|---|---|---|---|')
            for name, r in (('Torch-Pruning', theirs), ('effdet_nb', mine)):
                if r: print(f'| {name} | {r["before"]:,} → {r["after"]:,} ({r["after"]/r["before"]:.1%}) | {r["groups"]:.2f} | {r.get("choosing", 0) or "with cutting" if r is theirs else round(r["choosing"], 2)} | {r["cutting"]:.2f} | {r["total"]:.2f} |')
            if theirs: print(f'{theirs["total"]/mine["total"]:.1f} times as fast')
            if args.command:
                seconds, megabytes, row = time_command(f'{folder}/{variant}.tlt', f'{folder}/out')
                print(f'effdet_prune --target_params 0.2, everything: {seconds:.1f} s, peak {megabytes:,.0f} MB\n{row}')


if __name__ == '__main__': main()
