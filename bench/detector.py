"""How long a D5 takes to build beside Keras' EfficientNetB5, and how fast D0 looks at 8 pictures of 512 pixels beside effdet (PyTorch, channels last, float32).

    python bench/detector.py [--rounds 5] [--peer PYTHON]

The peer runs in an interpreter of its own, named by --peer or PEER_PYTHON, and takes turns with ours:
    python -m venv peer && peer/bin/pip install torch torchvision effdet==0.4.1
"""
import argparse
import os
import subprocess

from time_interleaved import time_interleaved, print_timings

PEER_SCRIPT = '''
import sys, torch
from effdet import create_model
torch.set_num_threads(int(sys.argv[1]))
net = create_model('tf_efficientdet_d0', pretrained=False, pretrained_backbone=False).eval().to(memory_format=torch.channels_last)
x = torch.rand(8, 3, 512, 512).to(memory_format=torch.channels_last)
print('ready', flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        net(x)
        print('done', flush=True)
'''


def start_peer(python, threads):
    "A function that lets the peer look at its 8 pictures once."
    run = subprocess.Popen([python, '-W', 'ignore', '-c', PEER_SCRIPT, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'ready\n', 'the peer did not start'
    def look():
        run.stdin.write('go\n'); run.stdin.flush()
        assert run.stdout.readline() == 'done\n'
    return look


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    p.add_argument('--part', choices=['build', 'forward'])
    a = p.parse_args()
    import effdet_nb   # first: it sets the switches that TensorFlow reads
    import keras
    import numpy as np
    from effdet_nb.detector.efficientdet import Arch, build
    if a.list_name != 'forward':
        ways = {'EfficientNetB5': lambda: keras.applications.EfficientNetB5(weights=None, include_top=False, input_shape=(512, 512, 3)),
                'D5': lambda: build(Arch('efficientdet-d5', (512, 512), 90))}
        print_timings('building', time_interleaved(ways, a.rounds, 1), 'EfficientNetB5')
    if a.list_name == 'build': return
    if not a.peer: return print('\nNo peer: make one as `--help` says and name it with --peer or PEER_PYTHON')
    model, images = build(Arch()), np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3)).astype('uint8')
    model.jit_compile = False
    ways = {'effdet': start_peer(a.peer, len(os.sched_getaffinity(0))), 'ours': lambda: model.predict_on_batch(images)}
    print_timings('D0, 8 pictures of 512 pixels, the network alone', time_interleaved(ways, a.rounds, 2), 'effdet')


if __name__ == '__main__': main()
