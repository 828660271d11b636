"""Draws the mermaid diagrams of all notebooks as pictures, so that the docs site needs neither a network nor a script to show them.

    npm install --no-save mermaid@11        # once; into node_modules/
    python tools/draw_diagrams.py           # writes nbs/images/diagrams/, removes what no notebook uses any more

Needed only after a diagram was changed or added; needs chromium as well. The pictures are committed, and their names hold a sum of the diagram's text:
tools/render_docs.py shows a diagram as text as long as its picture is missing, and tests/test_site.py complains.
"""
import argparse, base64, hashlib, html, json, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT/'nbs'/'images'/'diagrams'
BLOCK = re.compile(r'^```(?:\{mermaid\}|mermaid)[ \t]*\n(.*?)^```', re.M | re.S)
PAGE = '''<meta charset="utf-8"><body><pre>{text}</pre><script src="{script}"></script><script>
mermaid.initialize({{startOnLoad: false, theme: "neutral", htmlLabels: false, flowchart: {{htmlLabels: false}}, fontFamily: "sans-serif"}});
mermaid.render("diagram", document.querySelector("pre").textContent).then(o => o.svg, e => "error: " + e.message)
  .then(text => document.body.dataset.made = btoa(unescape(encodeURIComponent(text))));</script>'''


def picture_name(text):
    "The file name of a diagram's picture: it changes with the text."
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12] + '.svg'


def diagrams(nbs=ROOT/'nbs'):
    "{file name: text} of all diagrams in the notebooks."
    cells = (c for p in sorted(nbs.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts for c in json.loads(p.read_text(encoding='utf-8'))['cells'])
    return {picture_name(m): m for c in cells if c['cell_type']=='markdown' for m in BLOCK.findall(''.join(c['source']))}


def sized(svg):
    "A picture that knows its width and height, as an `img` wants it."
    left, top, width, height = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', svg).groups()
    svg = re.sub(r'<br\s*>', '<br/>', svg)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 width="{float(width):.0f}" height="{float(height):.0f}"', svg, count=1)


def drawn(text, chromium, script):
    "A diagram as SVG."
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder)/'page.html'
        page.write_text(PAGE.format(text=html.escape(text), script=script.resolve().as_uri()), encoding='utf-8')
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
        out = subprocess.run([chromium, *flags, f'--user-data-dir={folder}/profile', '--virtual-time-budget=20000', '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=180).stdout
    made = re.search(r'data-made="([^"]+)"', out)
    svg = base64.b64decode(made[1]).decode() if made else 'error: the page did not finish'
    if not svg.startswith('<svg'): raise ValueError(f'{svg}\n{text}')
    return sized(svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mermaid', type=Path, default=ROOT/'node_modules/mermaid/dist/mermaid.min.js', help='mermaid.min.js (node_modules/mermaid/dist/mermaid.min.js)')
    parser.add_argument('--force', action='store_true', help='draw those again that have a picture')
    args = parser.parse_args()
    wanted = diagrams()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for p in FOLDER.glob('*.svg'):
        if p.name not in wanted: p.unlink(); print(f'{p.name}: removed')
    missing = {n: t for n,t in wanted.items() if args.force or not (FOLDER/n).is_file()}
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if missing and not (chromium and args.mermaid.is_file()): sys.exit(f'{len(missing)} diagrams have no picture. To draw them, chromium and {args.mermaid} are needed: npm install --no-save mermaid@11')
    for name,text in missing.items():
        (FOLDER/name).write_text(drawn(text, chromium, args.mermaid), encoding='utf-8')
        print(f'{name}: drawn')


if __name__=='__main__': main()
