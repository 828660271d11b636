"""Removes what libraries wrote to stderr, and the places of progress bars, from the kept outputs of notebooks.

    python tools/tidy_outputs.py [notebook ...]

Outputs are half of a page, the warnings of one machine are not. Without arguments it tidies all notebooks in nbs/."""
import sys
from pathlib import Path

import nbformat


NBS = Path(__file__).resolve().parents[1]/'nbs'


def is_unwanted(output):
    "Whether an output is a stream of stderr, or the empty place of a progress bar."
    is_stderr = output.output_type == 'stream' and output.name == 'stderr'
    return is_stderr or output.get('data', {}).get('text/html') == ''


def remove_unwanted(path):
    "Removes unwanted outputs from one notebook; returns whether there were any."
    nb = nbformat.read(path, 4)
    found = False
    for cell in nb.cells:
        outputs = cell.get('outputs', [])
        if any(map(is_unwanted, outputs)):
            cell.outputs = [o for o in outputs if not is_unwanted(o)]
            found = True
    if found: nbformat.write(nb, path)
    return found


def main():
    for path in map(Path, sys.argv[1:] or sorted(NBS.rglob('*.ipynb'))):
        if '.ipynb_checkpoints' not in path.parts and remove_unwanted(path): print(f'{path}: tidied')


if __name__ == '__main__': main()
