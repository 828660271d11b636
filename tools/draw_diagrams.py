"""Draws the mermaid diagrams of all notebooks as SVG images, so that the docs site needs no network and no script.

    npm install --no-save mermaid@11        # once; into node_modules/
    python tools/draw_diagrams.py           # writes nbs/images/diagrams/, removes what no notebook uses any more

Needed only after a diagram was changed or added; needs chromium as well. The images are committed, and their names hold
a checksum of the diagram's text: tools/render_docs.py shows a diagram as text as long as its image is missing, and
tests/test_site.py fails.
"""
import argparse
import hashlib
import json
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT/'tests'))
from browser import CHROMIUM, Browser   # noqa: E402  the one that opens pages in tests

DIAGRAM_FOLDER = ROOT/'nbs'/'images'/'diagrams'
MERMAID_BLOCK = re.compile(r'^```(?:\{mermaid\}|mermaid)[ \t]*\n(.*?)^```', re.M | re.S)
MERMAID_SCRIPT = ROOT/'node_modules/mermaid/dist/mermaid.min.js'
PAGE_TEMPLATE = '<meta charset="utf-8"><body><script src="{script}"></script>'
MERMAID_CONFIG = dict(startOnLoad=False, theme='neutral', htmlLabels=False, flowchart=dict(htmlLabels=False),
                      fontFamily='sans-serif')


def diagram_file_name(text):
    "The file name of a diagram's image, which changes with the text."
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12] + '.svg'


def markdown_sources(nbs):
    "The text of every Markdown cell below a folder."
    for path in sorted(nbs.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type']=='markdown': yield ''.join(cell['source'])


def find_diagrams(nbs=ROOT/'nbs'):
    "{file name: text} of all diagrams in the notebooks."
    return {diagram_file_name(text): text for source in markdown_sources(nbs) for text in MERMAID_BLOCK.findall(source)}


def set_svg_size(svg):
    "Gives an SVG the width and height of its view box, for use in an `img`."
    width, height = map(float, re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups())
    svg = re.sub(r'<br\s*>', '<br/>', svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{width:.0f}" height="{height:.0f}"', svg, count=1)


@contextmanager
def mermaid_browser(script):
    "A browser with mermaid loaded."
    with tempfile.TemporaryDirectory() as folder, Browser(f'{folder}/profile') as browser:
        page = Path(folder)/'page.html'
        page.write_text(PAGE_TEMPLATE.format(script=script.resolve().as_uri()), encoding='utf-8')
        browser.goto(page.as_uri())
        browser.evaluate_js(f'mermaid.initialize({json.dumps(MERMAID_CONFIG)})')
        yield browser


def render_diagram(text, browser):
    "A diagram as SVG."
    call = f'mermaid.render("diagram", {json.dumps(text)})'
    svg = browser.evaluate_js(f'{call}.then(o => o.svg, e => "error: " + e.message)')
    if not svg.startswith('<svg'): raise ValueError(f'{svg}\n{text}')
    return set_svg_size(svg)


def remove_unused(diagrams):
    "Deletes the images of diagrams that no notebook has any more."
    for path in DIAGRAM_FOLDER.glob('*.svg'):
        if path.name not in diagrams:
            path.unlink()
            print(f'{path.name}: removed')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mermaid', type=Path, default=MERMAID_SCRIPT, help='mermaid.min.js (%(default)s)')
    parser.add_argument('--force', action='store_true', help='draw those again that have an image')
    args = parser.parse_args()
    diagrams = find_diagrams()
    DIAGRAM_FOLDER.mkdir(parents=True, exist_ok=True)
    remove_unused(diagrams)
    missing = {n: t for n,t in diagrams.items() if args.force or not (DIAGRAM_FOLDER/n).is_file()}
    if not missing: return
    if not (CHROMIUM and args.mermaid.is_file()):
        sys.exit(f'{len(missing)} diagrams have no image. To draw them, chromium and {args.mermaid} are needed: '
                 'npm install --no-save mermaid@11')
    with mermaid_browser(args.mermaid) as browser:
        for name,text in missing.items():
            (DIAGRAM_FOLDER/name).write_text(render_diagram(text, browser), encoding='utf-8')
            print(f'{name}: drawn')


if __name__=='__main__': main()
