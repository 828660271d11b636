"""Trains our lite0 from ImageNet weights for a number of epochs; bench/learning.py runs it as a process of its own.

Standard input is one JSON object: spec (a path), fields (name: value), and out, a folder for the run. The last line of
standard output is a JSON object: step, AP, AP50, and cpu_seconds of the whole process, imports included.
"""
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def main():
    setup = json.loads(sys.stdin.read())
    from recipe import with_fields

    from effdet_nb.train.fit import train
    from effdet_nb.train.spec import Spec
    last = train(with_fields(Spec.load(setup['spec'], 'train'), setup['fields']), Path(setup['out']))[-1]
    row = {key: last[key] for key in ('step', 'AP', 'AP50')}
    print('\n'+json.dumps(row | dict(cpu_seconds=round(time.process_time(), 1))))


if __name__ == '__main__': main()
