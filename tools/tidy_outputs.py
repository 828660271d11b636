"""Drops what libraries wrote to stderr from the kept outputs of notebooks: `python tools/tidy_outputs.py [notebook ...]`.

Outputs are half of a page, warnings of a machine are not. Without arguments all notebooks below nbs/ are tidied."""
import sys
from pathlib import Path

import nbformat


def remove_stderr(path):
    "Removes stderr streams from one notebook; True if there were any."
    nb = nbformat.read(path, 4)
    found = False
    for cell in nb.cells:
        kept = [o for o in cell.get('outputs', []) if not (o.output_type == 'stream' and o.name == 'stderr')]
        if 'outputs' in cell and len(kept) != len(cell.outputs): cell.outputs, found = kept, True
    if found: nbformat.write(nb, path)
    return found


if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]/'nbs'
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(root.rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in path.parts and remove_stderr(path): print(f'{path}: tidied')
