"""Copies kept figures of chapters to nbs/images/, for the pages that show them: `python tools/copy_figures.py`.

A test reminds you when a chapter was run again and its figure changed."""
import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
# image file: (notebook, id of the cell that draws the figure)
FIGURES = {
    'first_detector.png': ('detector/14_first_fit.ipynb', '9a7a1b53'),
}


def kept_figure(notebook, cell_id):
    "The PNG image that a cell of a notebook keeps as its output."
    cells = nbformat.read(ROOT/'nbs'/notebook, 4).cells
    outputs = next(cell for cell in cells if cell.id == cell_id).outputs
    return base64.b64decode(next(o.data['image/png'] for o in outputs if 'image/png' in o.get('data', {})))


def main():
    for name, (notebook, cell_id) in FIGURES.items():
        (ROOT/'nbs'/'images'/name).write_bytes(kept_figure(notebook, cell_id))


if __name__ == '__main__': main()
