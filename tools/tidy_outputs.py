"""Removes what libraries wrote to stderr from the kept outputs of notebooks.

    python tools/tidy_outputs.py [notebook ...]

Outputs are half of a page, the warnings of one machine are not. Without arguments it tidies all notebooks in nbs/."""
import sys
from pathlib import Path

import nbformat


NBS = Path(__file__).resolve().parents[1]/'nbs'


def is_stderr(output): return output.output_type == 'stream' and output.name == 'stderr'


def remove_stderr(path):
    "Removes stderr streams from one notebook; returns whether there were any."
    nb = nbformat.read(path, 4)
    found = False
    for cell in nb.cells:
        outputs = cell.get('outputs', [])
        if any(map(is_stderr, outputs)):
            cell.outputs = [o for o in outputs if not is_stderr(o)]
            found = True
    if found: nbformat.write(nb, path)
    return found


def main():
    for path in map(Path, sys.argv[1:] or sorted(NBS.rglob('*.ipynb'))):
        if '.ipynb_checkpoints' not in path.parts and remove_stderr(path): print(f'{path}: tidied')


if __name__ == '__main__': main()
