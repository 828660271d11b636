"""Pictures from disk to boxes: our exported D0 in ONNX Runtime beside effdet, and both graphs bare, on the CPU, turn by turn.

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
import time
from pathlib import Path

FIRST_RESULT_SCRIPT = '''
import sys, time; start = time.perf_counter()
from effdet_nb.app.infer import infer
infer(sys.argv[1], sys.argv[2], out_label_path=sys.argv[3])
print(time.perf_counter()-start, [m for m in ('tensorflow', 'keras') if m in sys.modules])'''


def export_models(folder, size, classes):
    "Our D0 with fresh weights as .onnx, with its ending and without. In a process of its own: TensorFlow's threads shall not disturb."
    code = f'''
import onnx
from effdet_nb.data.coco import ClassTable
from effdet_nb.export.onnx_graph import raw_graph
from effdet_nb.export.onnx_nms import end_with_operators
from effdet_nb.detector.predictor import save_detector
from effdet_nb.detector.efficientdet import Arch, build
arch = Arch(image_hw=({size},{size}), num_classes={classes})
save_detector({str(folder/"a.tlt")!r}, build(arch), arch, ClassTable.make([dict(id=i, name=f'c{{i}}') for i in range(1, {classes})], num_classes={classes}))
raw = raw_graph({str(folder/"a.tlt")!r})[0]
onnx.save(raw, {str(folder/"raw.onnx")!r}); onnx.save(end_with_operators(raw), {str(folder/"final.onnx")!r})'''
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | dict(TF_CPP_MIN_LOG_LEVEL='3'), stderr=subprocess.DEVNULL)


class PeerProcess:
    "Another Python that runs `way count` and says how long it took."
    def __init__(self, python, setup):
        script = Path(__file__).with_name('peer_effdet.py')
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.say(json.dumps(setup))
        while self.hear() not in ('ready', ''): pass

    def say(self, line): print(line, file=self.process.stdin, flush=True)
    def hear(self): return self.process.stdout.readline().strip()

    def __call__(self, way, count):
        self.say(f'{way} {count}')
        heard = self.hear()
        if not heard or heard.startswith('failed'): sys.exit(f'{way}: {heard or "the other process ended"}')
        return float(heard)


def time_call(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    parser.add_argument('--files', help='keep our exported files in this folder, and take those that are there')
    for name, value in dict(size=512, classes=90, rounds=5, count=8).items(): parser.add_argument(f'--{name}', type=int, default=value)
    a = parser.parse_args()
    import numpy as np
    import onnxruntime
    from effdet_nb.app.infer import find_images, infer
    from effdet_nb.export.runtimes import OnnxDetector
    temporary = tempfile.TemporaryDirectory()
    folder = Path(a.files or temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/'final.onnx').is_file(): export_models(folder, a.size, a.classes)
    pictures = [str(p) for p in find_images(a.images)[:a.count]]
    few = Path(temporary.name)/'few'
    few.mkdir()
    for p in pictures: (few/Path(p).name).symlink_to(Path(p).resolve())
    peer = PeerProcess(a.peer, dict(folder=temporary.name, pictures=pictures, size=a.size, classes=a.classes, ours=str(folder/'final.onnx'))) if a.peer else None
    detector = OnnxDetector(folder/'final.onnx', threads=1, method='hard')
    how, out = dict(threshold=0., max_detections=12), Path(temporary.name)

    def bare(name):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(folder/name), options, providers=['CPUExecutionProvider'])
        pixels = np.zeros((1, a.size, a.size, 3), np.float32)+100
        def run():
            for _ in pictures: session.run(None, {'input': pixels})
        return run
    final, raw = bare('final.onnx'), bare('raw.onnx')
    ways = {'ours, disk to labels': lambda: time_call(lambda: infer(detector, few, out_label_path=out/'labels', **how)),
            'ours, also drawn and written': lambda: time_call(lambda: infer(detector, few, out/'painted', out/'labels', **how)),
            'ours bare, suppression inside': lambda: time_call(final), 'ours bare, raw answers': lambda: time_call(raw)}
    if peer: ways |= {'effdet, disk to boxes': lambda: peer('effdet', len(pictures)), 'effdet export bare': lambda: peer('effdet_ort', len(pictures)),
                      'effdet export bare, OpenVINO': lambda: peer('effdet_openvino', len(pictures)), 'ours bare, OpenVINO': lambda: peer('ours_openvino', len(pictures))}
    else: print('no effdet: name the Python of an environment that has it with --peer or PEER_PYTHON (see --help)')
    for way in ways.values(): way()
    seconds = {name: [] for name in ways}
    for _ in range(a.rounds):
        for name, way in ways.items(): seconds[name].append(way()/len(pictures))
    base = 'effdet export bare' if peer else 'ours bare, raw answers'
    print(f'D0 {a.size}x{a.size}, {a.classes} classes, fresh weights, {len(pictures)} pictures a turn, {a.rounds} turns, onnxruntime {onnxruntime.__version__}, {os.cpu_count()} cores')
    print(f'\n| way | median ms | fastest ms | times as fast as `{base}` |\n|---|---|---|---|')
    for name, mine in seconds.items():
        print(f'| {name} | {1e3*statistics.median(mine):.1f} | {1e3*min(mine):.1f} | {statistics.median(b/m for b, m in zip(seconds[base], mine)):.2f} |')
    ratio = lambda x, y: statistics.median(p/q for p, q in zip(seconds[x], seconds[y]))
    if peer: print(f"\nours to labels / effdet to boxes: {ratio('effdet, disk to boxes', 'ours, disk to labels'):.2f} times as fast")
    print(f"drawing and writing: {100*(ratio('ours, also drawn and written', 'ours, disk to labels')-1):.0f} % more time")
    first = [subprocess.run([sys.executable, '-c', FIRST_RESULT_SCRIPT, folder/'final.onnx', pictures[0], out/'first'], capture_output=True, text=True, check=True).stdout.split(' ', 1) for _ in range(3)]
    print(f'start to first result: {min(float(t) for t, _ in first):.2f} s (fastest of 3), frameworks imported: {first[0][1].strip()}')


if __name__ == '__main__': main()
