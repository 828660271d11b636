"""Building D5 beside Keras' EfficientNetB5, and D0's forward pass on 8 images of 512 pixels beside effdet's.

    python bench/detector.py [--rounds 5] [--peer PYTHON]

The peer (effdet on PyTorch, channels last, float32) runs in a Python of its own, named by --peer or PEER_PYTHON, and
takes turns with ours:
    python -m venv peer && peer/bin/pip install torch torchvision effdet==0.4.1
"""
import argparse
import os
import subprocess

from interleave import print_timings, time_interleaved

PEER_SCRIPT = '''
import sys, torch
from effdet import create_model
torch.set_num_threads(int(sys.argv[1]))
net = create_model('tf_efficientdet_d0', pretrained=False, pretrained_backbone=False)
net = net.eval().to(memory_format=torch.channels_last)
x = torch.rand(8, 3, 512, 512).to(memory_format=torch.channels_last)
print('ready', flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        net(x)
        print('done', flush=True)
'''


def start_peer(python, num_threads):
    "Starts the peer; returns a function that lets it do one forward pass."
    command = [python, '-W', 'ignore', '-c', PEER_SCRIPT, str(num_threads)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdout.readline() == 'ready\n', 'the peer did not start'
    def forward():
        print('go', file=peer.stdin, flush=True)
        assert peer.stdout.readline() == 'done\n'
    return forward


def compare_building(rounds):
    "Times building D5 and EfficientNetB5."
    import keras

    from effdet_nb.detector.efficientdet import Arch, build
    shape = (512, 512, 3)
    variants = {
        'EfficientNetB5': lambda: keras.applications.EfficientNetB5(weights=None, include_top=False, input_shape=shape),
        'D5': lambda: build(Arch('efficientdet-d5', (512, 512), 90))}
    print_timings('building', time_interleaved(variants, rounds, 1), 'EfficientNetB5')


def compare_forward(peer_python, rounds):
    "Times the forward pass of D0 and of the peer's."
    import numpy as np

    from effdet_nb.accel.cpu_layers import FusedNormLayers
    from effdet_nb.detector.efficientdet import Arch, build
    model = build(Arch(), layers=FusedNormLayers)      # as a model file is opened
    model.jit_compile = False
    images = np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3)).astype('uint8')
    variants = {'effdet': start_peer(peer_python, len(os.sched_getaffinity(0))),
                'ours': lambda: model.predict_on_batch(images)}
    seconds = time_interleaved(variants, rounds, 2)
    print_timings('D0, 8 images of 512 pixels, the network alone', seconds, 'effdet')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--peer', default=os.environ.get('PEER_PYTHON'))
    parser.add_argument('--part', choices=['build', 'forward'])
    args = parser.parse_args()
    import effdet_nb   # noqa: F401  before TensorFlow, whose switches it sets
    if args.part != 'forward': compare_building(args.rounds)
    if args.part == 'build': return
    if args.peer: compare_forward(args.peer, args.rounds)
    else: print('\nNo peer: make one as `--help` says and name it with --peer or PEER_PYTHON')


if __name__ == '__main__': main()
