"""Writes README.md from nbs/index.ipynb: `python tools/make_readme.py`. (`nbdev_readme` does it where Quarto is installed.)

Prose stays, hidden cells go, kept outputs follow their code, pictures become files in nbs/images/, links to chapters point into nbs/."""
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
    "Keeps a picture as a file; returns the line that shows it."
    IMAGES.mkdir(exist_ok=True)
    name = f'readme_{number}.png'
    (IMAGES/name).write_bytes(base64.b64decode(data))
    return f'![](nbs/images/{name})'


def output_to_markdown(output, number):
    "A kept output as markdown."
    data = output.get('data', {})
    if 'image/png' in data: return save_image(data['image/png'], number)
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(data.get('text/plain', output.get('text', '')))
    return '```\n' + re.sub(r'\x1b\[[0-9;]*m', '', text).rstrip() + '\n```' if text.strip() else ''


def readme_parts(nb):
    "The parts of the page, one after another."
    number = 0
    for cell in nb.cells:
        if cell.cell_type == 'markdown': yield rewrite_links(cell.source)
        elif cell.cell_type == 'code' and not re.search(r'^#\|\s*(hide|hidden)\s*$', cell.source, re.M):
            yield '```python\n' + re.sub(r'^#\|.*\n', '', cell.source, flags=re.M).strip() + '\n```'
            for output in cell.outputs:
                number += 1
                yield output_to_markdown(output, number)


if __name__ == '__main__':
    page = '\n\n'.join(p for p in readme_parts(nbformat.read(ROOT/'nbs'/'index.ipynb', 4)) if p)
    (ROOT/'README.md').write_text('<!-- Made from nbs/index.ipynb by tools/make_readme.py; edit there. -->\n\n' + page + '\n', encoding='utf-8')
