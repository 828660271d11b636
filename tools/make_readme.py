"""Writes README.md from nbs/index.ipynb: `python tools/make_readme.py`.

Prose stays, hidden cells go, kept outputs follow their code, images become files in nbs/images/, and links to chapters
point into nbs/. Where Quarto is installed, `nbdev_readme` does the same."""
import base64
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT/'nbs'/'images'


def rewrite_links(text):
    "Points links between chapters at their files on the repository's front page."
    return re.sub(r'\]\((?!\w+:|#)([\w./-]+\.(?:ipynb|png))', r'](nbs/\1', text)


def save_image(data, number):
    "Writes an image to a file; returns the Markdown that shows it."
    IMAGES.mkdir(exist_ok=True)
    name = f'readme_{number}.png'
    (IMAGES/name).write_bytes(base64.b64decode(data))
    return f'![](nbs/images/{name})'


def output_to_markdown(output, number):
    "A kept output as Markdown."
    data = output.get('data', {})
    if 'image/png' in data: return save_image(data['image/png'], number)
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(data.get('text/plain', output.get('text', '')))
    if not text.strip(): return ''
    without_colours = re.sub(r'\x1b\[[0-9;]*m', '', text)
    return f'```\n{without_colours.rstrip()}\n```'


def readme_parts(nb):
    "The parts of the page, one after another."
    number = 0
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield rewrite_links(cell.source)
        elif cell.cell_type == 'code' and not re.search(r'^#\|\s*(hide|hidden)\s*$', cell.source, re.M):
            code = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
            yield f'```python\n{code.strip()}\n```'
            for output in cell.outputs:
                number += 1
                yield output_to_markdown(output, number)


def main():
    parts = readme_parts(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    header = '<!-- Made from nbs/index.ipynb by tools/make_readme.py; edit there. -->'
    (ROOT/'README.md').write_text('\n\n'.join([header, *filter(None, parts)]) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
