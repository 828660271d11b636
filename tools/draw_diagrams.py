"""Draws the mermaid diagrams of all notebooks as pictures, so that the docs site needs neither a network nor a script to show them.

    npm install --no-save mermaid@11        # once; into node_modules/
    python tools/draw_diagrams.py           # writes nbs/images/diagrams/, removes what no notebook uses any more

Needed only after a diagram was changed or added; needs chromium as well. The pictures are committed, and their names hold a sum of the diagram's text:
tools/render_docs.py shows a diagram as text as long as its picture is missing, and tests/test_site.py complains.
"""
import argparse, hashlib, json, re, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT/'tests'))
from browser import CHROMIUM, Browser   # the one that opens pages in tests

DIAGRAM_FOLDER = ROOT/'nbs'/'images'/'diagrams'
MERMAID_BLOCK = re.compile(r'^```(?:\{mermaid\}|mermaid)[ \t]*\n(.*?)^```', re.M | re.S)
PAGE_TEMPLATE = '<meta charset="utf-8"><body><script src="{script}"></script>'
MERMAID_CONFIG = dict(startOnLoad=False, theme='neutral', htmlLabels=False, flowchart=dict(htmlLabels=False), fontFamily='sans-serif')


def diagram_file_name(text):
    "The file name of a diagram's picture: it changes with the text."
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12] + '.svg'


def find_diagrams(nbs=ROOT/'nbs'):
    "{file name: text} of all diagrams in the notebooks."
    cells = (c for p in sorted(nbs.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts for c in json.loads(p.read_text(encoding='utf-8'))['cells'])
    return {diagram_file_name(m): m for c in cells if c['cell_type']=='markdown' for m in MERMAID_BLOCK.findall(''.join(c['source']))}


def set_svg_size(svg):
    "A picture that knows its width and height, as an `img` wants it."
    left, top, width, height = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', svg).groups()
    svg = re.sub(r'<br\s*>', '<br/>', svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{float(width):.0f}" height="{float(height):.0f}"', svg, count=1)


@contextmanager
def mermaid_browser(script):
    "A browser that knows mermaid."
    with tempfile.TemporaryDirectory() as folder, Browser(f'{folder}/profile') as browser:
        page = Path(folder)/'page.html'
        page.write_text(PAGE_TEMPLATE.format(script=script.resolve().as_uri()), encoding='utf-8')
        browser.open(page.as_uri())
        browser.run(f'mermaid.initialize({json.dumps(MERMAID_CONFIG)})')
        yield browser


def render_diagram(text, browser):
    "A diagram as SVG."
    svg = browser.run(f'mermaid.render("diagram", {json.dumps(text)}).then(o => o.svg, e => "error: " + e.message)')
    if not svg.startswith('<svg'): raise ValueError(f'{svg}\n{text}')
    return set_svg_size(svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mermaid', type=Path, default=ROOT/'node_modules/mermaid/dist/mermaid.min.js', help='mermaid.min.js (node_modules/mermaid/dist/mermaid.min.js)')
    parser.add_argument('--force', action='store_true', help='draw those again that have a picture')
    args = parser.parse_args()
    wanted = find_diagrams()
    DIAGRAM_FOLDER.mkdir(parents=True, exist_ok=True)
    for p in DIAGRAM_FOLDER.glob('*.svg'):
        if p.name not in wanted: p.unlink(); print(f'{p.name}: removed')
    missing = {n: t for n,t in wanted.items() if args.force or not (DIAGRAM_FOLDER/n).is_file()}
    if not missing: return
    if not (CHROMIUM and args.mermaid.is_file()): sys.exit(f'{len(missing)} diagrams have no picture. To draw them, chromium and {args.mermaid} are needed: npm install --no-save mermaid@11')
    with mermaid_browser(args.mermaid) as browser:
        for name,text in missing.items():
            (DIAGRAM_FOLDER/name).write_text(render_diagram(text, browser), encoding='utf-8')
            print(f'{name}: drawn')


if __name__=='__main__': main()
