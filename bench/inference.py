"""Images from disk to boxes: our exported D0 in ONNX Runtime beside effdet, and both graphs bare, on the CPU, in turns.

    python bench/inference.py --images FOLDER [--size 512] [--classes 90] [--rounds 5] [--count 8]

effdet runs in an environment of its own, whose Python is named by --peer or the variable PEER_PYTHON:

    python -m venv peers && peers/bin/pip install torch torchvision effdet==0.4.1 onnx onnxruntime openvino

All weights are fresh, so that suppression gets its full number of candidates on both sides.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from interleave import median_ratio, time_call

EXPORT_SCRIPT = '''
import sys
import onnx
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.efficientdet import Arch, build
from effdet_nb.export.onnx_graph import convert_to_onnx
from effdet_nb.export.onnx_nms import add_onnx_nms
from effdet_nb.weights.model_file import save_detector
folder, size, num_classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
arch = Arch(image_hw=(size, size), num_classes=num_classes)
categories = [dict(id=i, name=f'c{i}') for i in range(1, num_classes)]
save_detector(f'{folder}/a.tlt', build(arch), arch, ClassTable.from_categories(categories, num_classes=num_classes))
raw = convert_to_onnx(f'{folder}/a.tlt')[0]
onnx.save(raw, f'{folder}/raw.onnx')
onnx.save(add_onnx_nms(raw), f'{folder}/final.onnx')
'''

FIRST_RESULT_SCRIPT = '''
import sys, time
start = time.perf_counter()
from effdet_nb.app.infer import infer
infer(sys.argv[1], sys.argv[2], out_label_path=sys.argv[3])
print(time.perf_counter()-start, [m for m in ('tensorflow', 'keras') if m in sys.modules])
'''


def export_models(folder, size, num_classes):
    "Exports D0 with fresh weights, with suppression and without. In another process: TensorFlow's threads disturb."
    command = [sys.executable, '-c', EXPORT_SCRIPT, folder, str(size), str(num_classes)]
    subprocess.run(command, check=True, env=os.environ | dict(TF_CPP_MIN_LOG_LEVEL='3'), stderr=subprocess.DEVNULL)


class PeerProcess:
    "Another Python that runs a variant some times and returns the seconds."
    def __init__(self, python, setup):
        script = Path(__file__).with_name('peer_effdet.py')
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.send(json.dumps(setup))
        while self.receive() not in ('ready', ''): pass

    def send(self, line): print(line, file=self.process.stdin, flush=True)
    def receive(self): return self.process.stdout.readline().strip()

    def __call__(self, variant, count):
        self.send(f'{variant} {count}')
        reply = self.receive()
        if not reply or reply.startswith('failed'): sys.exit(f'{variant}: {reply or "the other process ended"}')
        return float(reply)


def bare_session(path, size, count):
    "A function that runs a graph on constant pixels, `count` times."
    import numpy as np
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    pixels = np.full((1, size, size, 3), 100, np.float32)

    def run():
        for _ in range(count): session.run(None, {'input': pixels})
    return run


def package_variants(folder, images, out, size, count):
    "{name: function that returns seconds} of our variants."
    from effdet_nb.app.infer import infer
    from effdet_nb.export.runtimes import load_detector
    detector = load_detector(folder/'final.onnx', threads=1)
    limits = dict(score_threshold=0., max_detections=12)
    calls = {
        'ours, disk to labels': lambda: infer(detector, images, out_label_path=out/'labels', **limits),
        'ours, also drawn and written': lambda: infer(detector, images, out/'drawn', out/'labels', **limits),
        'ours bare, suppression inside': bare_session(folder/'final.onnx', size, count),
        'ours bare, raw outputs': bare_session(folder/'raw.onnx', size, count)}
    def timed(call): return lambda: time_call(call)
    return {name: timed(call) for name, call in calls.items()}


def peer_variants(peer, count):
    "{name: function that returns seconds} of the peer's variants."
    names = {'effdet, disk to boxes': 'effdet', 'effdet export bare': 'effdet_ort',
             'effdet export bare, OpenVINO': 'effdet_openvino', 'ours bare, OpenVINO': 'ours_openvino'}
    def timed(variant): return lambda: peer(variant, count)
    return {name: timed(variant) for name, variant in names.items()}


def measure(variants, rounds, count):
    "Seconds per image of each variant, turn by turn, after one turn that does not count."
    for variant in variants.values(): variant()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items(): seconds[name].append(variant()/count)
    return seconds


def print_table(seconds, baseline):
    print(f'\n| variant | median ms | fastest ms | times as fast as `{baseline}` |\n|---|---|---|---|')
    for name, mine in seconds.items():
        ratio = median_ratio(mine, seconds[baseline])
        print(f'| {name} | {1e3*statistics.median(mine):.1f} | {1e3*min(mine):.1f} | {ratio:.2f} |')


def print_first_result(model, image, out):
    "Prints how long a new process needs until its first result."
    command = [sys.executable, '-c', FIRST_RESULT_SCRIPT, model, image, out]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    seconds, frameworks = zip(*(run.strip().split(' ', 1) for run in runs))
    fastest = min(map(float, seconds))
    print(f'start to first result: {fastest:.2f} s (fastest of 3), frameworks imported: {frameworks[0]}')


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    parser.add_argument('--files', help='keep our exported files in this folder, and take those that are there')
    for name, value in dict(size=512, classes=90, rounds=5, count=8).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    return parser.parse_args()


def link_images(paths, folder):
    "A folder with links to some images."
    folder.mkdir()
    for path in paths: (folder/path.name).symlink_to(path.resolve())
    return folder


def compare(args, work):
    "Times all variants, with `work` for what may be deleted afterwards."
    from effdet_nb.app.inference_files import find_images
    folder = Path(args.files or work)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/'final.onnx').is_file(): export_models(folder, args.size, args.classes)
    paths = [Path(p) for p in find_images(args.images)[:args.count]]
    variants = package_variants(folder, link_images(paths, work/'images'), work, args.size, len(paths))
    if args.peer:
        setup = dict(folder=str(work), images=list(map(str, paths)), size=args.size, num_classes=args.classes,
                     ours=str(folder/'final.onnx'))
        variants |= peer_variants(PeerProcess(args.peer, setup), len(paths))
    else: print('no effdet: name the Python of an environment that has it with --peer or PEER_PYTHON (see --help)')
    seconds = measure(variants, args.rounds, len(paths))
    print(f'D0 {args.size}x{args.size}, {args.classes} classes, fresh weights, {len(paths)} images a turn, '
          f'{args.rounds} turns, {os.cpu_count()} cores')
    print_table(seconds, 'effdet export bare' if args.peer else 'ours bare, raw outputs')
    labels, drawn = seconds['ours, disk to labels'], seconds['ours, also drawn and written']
    if args.peer:
        ratio = median_ratio(labels, seconds['effdet, disk to boxes'])
        print(f'\nours to labels is {ratio:.2f} times as fast as effdet to boxes')
    print(f'drawing and writing: {100*(median_ratio(labels, drawn)-1):.0f} % more time')
    print_first_result(folder/'final.onnx', paths[0], work/'first')


def main():
    args = read_arguments()
    with tempfile.TemporaryDirectory() as work: compare(args, Path(work))


if __name__ == '__main__': main()
