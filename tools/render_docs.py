"""Render the docs site without Quarto: Sphinx and myst-nb, led by the same `_quarto.yml`.

    python tools/render_docs.py                 # into _docs/
    python tools/render_docs.py --out /tmp/site --strict

Where Quarto is installed, `nbdev_docs` makes the site; this makes the same pages, at the same addresses, where it is not. nbdev first turns the
notebooks into pages (`_proc/`: tables of parameters, hidden cells gone, links to other chapters); here the code of exported cells comes back, folded, and the pages
are rewritten from Quarto's Markdown into MyST's and built. Nothing on a page comes from another server: formulas become MathML, which browsers draw themselves, and diagrams are pictures that
tools/draw_diagrams.py made. So the site works from a memory stick as well.
"""
import argparse, ast, json, os, posixpath, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import urlsplit
from draw_diagrams import MERMAID_BLOCK, DIAGRAM_FOLDER, diagram_file_name

CALLOUT_TO_ADMONITION = dict(note='note', tip='tip', warning='warning', important='important', caution='caution')
CELL_OPTION = re.compile(r'^#\|\s*([\w-]+)(?::\s*(.*?))?\s*$', re.M)
LINK = re.compile(r'(\]\()([^)\s]+)(\))')
NESTED_LINK = re.compile(r'\[\[(`[^`\]]+`)\]\([^)\s]+\)\]\(([^)\s]+)\)') # a link whose text nbdev made a link as well
EXPORT_DIRECTIVE = re.compile(r'^#\|\s*exports?\b', re.M)
SHOW_DOC = re.compile(r'show_doc\(([\w.]+)')
SOURCE_LINK = re.compile(r'^\[source\]\((\S+)\)\s+(#+ [^\n]+)\n') # how nbdev's table of a definition begins


def slug(heading):
    "Pandoc's id of a heading, which Quarto and nbdev's links use: lower case, hyphens for spaces, dots and underscores kept."
    kept = re.sub(r'[^\w\s.-]', '', heading.lower())
    return re.sub(r'\s+', '-', kept.strip())


def option_values(source):
    "The `#| name: value` lines of a code cell; a bare `#| name` counts as true."
    return {name: value or 'true' for name,value in CELL_OPTION.findall(source)}


def front_matter(cell):
    "The YAML block nbdev makes of a notebook's title cell, if this cell is one."
    import yaml
    text = ''.join(cell['source']).strip()
    if cell['cell_type']!='raw' or not text.startswith('---'): return None
    return yaml.safe_load(text.strip('-')) or {}


class Page:
    "One processed notebook and where it goes: `old` as in the sidebar (`detector/01_boxes.ipynb`), `new` as its address (`data/boxes`)."
    def __init__(self, old, notebook):
        self.old, self.notebook = old, notebook
        fronts = [f for c in notebook['cells'] if (f := front_matter(c)) is not None]
        self.front = fronts[0] if fronts else {}
        name = Path(self.front.get('output-file', posixpath.basename(old))).stem
        self.new = posixpath.join(posixpath.dirname(old), name)


class MarkdownRewriter:
    "Quarto's Markdown to MyST's, for all pages of a site."
    def __init__(self, pages, address):
        self.by_old, self.by_new = {p.old: p for p in pages}, {p.new: p for p in pages}
        self.address, self.undrawn = address.rstrip('/') + '/', []

    def link(self, target, page):
        "A link to another page, however it was written, as a path from the root of the site's source."
        path, _, anchor = target.partition('#')
        anchor = '#' + anchor if anchor else ''
        if path.startswith(self.address) and path.endswith('.html'):
            to = self.by_new.get(path.removeprefix(self.address).removesuffix('.html'))
        elif urlsplit(path).scheme or not path.endswith(('.ipynb', '.html')): return target
        else:
            near = posixpath.normpath(posixpath.join(posixpath.dirname(page.old), path))
            to = self.by_old.get(near) or self.by_new.get(near.removesuffix('.html'))
        return f'/{to.new}.ipynb{anchor}' if to else target

    def diagram(self, match):
        "The picture of a mermaid block; its text, as long as there is none."
        name = diagram_file_name(match[1])
        if (DIAGRAM_FOLDER/name).is_file(): return f':::{{container}} diagram\n![diagram](/images/{DIAGRAM_FOLDER.name}/{name})\n:::\n'
        self.undrawn.append(name)
        return f'```text\n{match[1]}```'

    def __call__(self, text, page):
        "One Markdown text of a page."
        text = re.sub(r'<!-- WARNING.*?-->\n?', '', text)
        text = re.sub(r'\{target="_blank"[^}]*\}', '', text)
        text = MERMAID_BLOCK.sub(self.diagram, text)
        text = re.sub(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}[ \t]*\n(?:\s*\n)?(?:#+ (.*)\n)?', self.callout, text, flags=re.M)
        text = NESTED_LINK.sub(r'[\1](\2)', text)
        return LINK.sub(lambda m: m[1] + self.link(m[2], page) + m[3], text)

    @staticmethod
    def callout(match):
        "Quarto's callout as an admonition; its heading or title becomes the title, `collapse` folds it."
        fence, kind, options, heading = match.groups()
        title = heading or next(iter(re.findall(r'title="([^"]*)"', options)), '')
        if 'collapse' in options: return f'{fence}{{admonition}} {title or kind.capitalize()}\n:class: {CALLOUT_TO_ADMONITION.get(kind, "note")} dropdown\n\n'
        if title: return f'{fence}{{admonition}} {title}\n:class: {CALLOUT_TO_ADMONITION.get(kind, "note")}\n\n'
        return f'{fence}{{{CALLOUT_TO_ADMONITION.get(kind, "note")}}}\n'


def strip_code_links(text):
    "A text whose blocks of code have no links in them: nbdev links the names in comments too, and a reader would see the address."
    return re.sub(r'^```.*?^```', lambda block: re.sub(r'\[(`[^`\n]+`)\]\([^()\s]*\)', r'\1', block[0]), text, flags=re.M | re.S)


def definitions(source):
    "{name: syntax tree} of what a cell defines."
    return {o.name: o for o in ast.parse(source).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))}


def is_field_class(node):
    "Whether a definition is a class of fields with a remark each: its own lines say more than the signature of its constructor."
    marks = [ast.unparse(o) for o in [*node.decorator_list, *getattr(node, 'bases', [])]]
    return isinstance(node, ast.ClassDef) and any(m.startswith(('dataclass','NamedTuple')) for m in marks)


def source_cell(cell):
    "An exported cell for a page. Functions are folded: nbdev prints what they take and give, and nothing at all of private ones; tables and constants are to be read."
    source = CELL_OPTION.sub('', ''.join(cell['source'])).strip('\n')
    found = definitions(source)
    says = '; '.join(n + (f': {ast.get_docstring(o).splitlines()[0].rstrip(".")}' if ast.get_docstring(o) else '') for n,o in found.items())
    title = says if found and all(n.startswith('_') for n in found) else 'Code' if found else 'Imports'
    open_ = any(map(is_field_class, found.values())) or not found and not all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body)
    folded = dict(tags=['hide-input'], mystnb=dict(code_prompt_show=title, code_prompt_hide=title))
    return dict(cell_type='code', id=cell['id'], metadata={} if open_ else folded, source=source, outputs=[], execution_count=None)


def clean_show_doc(doc, exported):
    "nbdev's print of a definition: a class is called one, and a table of fields leaves the signature to its code, a command to its help."
    found = definitions(exported['source'])
    classes = '|'.join(n for n,o in found.items() if isinstance(o, ast.ClassDef)) or '$.'
    told = '|'.join(n for n,o in found.items() if is_field_class(o) or any(ast.unparse(d)=='command' for d in o.decorator_list)) or '$.'
    def edited(text):
        text = re.sub(rf'```python\n+def (?:{told})\(.*?```\n*', '', text, flags=re.S)
        return re.sub(rf'^def ({classes})\(', r'class \1(', text, flags=re.M).replace('*Call self as a function.*', '')
    outputs = [o | ({'text': edited(''.join(o['text']))} if 'text' in o else {'data': o['data'] | {'text/markdown': edited(''.join(o['data']['text/markdown']))}}) for o in doc['outputs']]
    return doc | dict(outputs=outputs)


def documented_name(cell):
    "The name that a cell of a processed page prints, without its class; None if it prints no definition."
    found = SHOW_DOC.search(''.join(cell['source']))
    return found and found[1].split('.')[-1]


def insert_source_cells(page, chapter):
    "The cells of a processed page, and after what nbdev printed of an exported cell that cell itself."
    kept, out, waiting, between = {c['id'] for c in chapter} & {c.get('id') for c in page}, [], [], []
    cells = iter(page)
    def give(exported):
        names = list(definitions(exported['source']))
        mine = [c for c in between if documented_name(c) in names]
        between[:] = [c for c in between if c not in mine]
        out.extend([*(clean_show_doc(c, exported) for c in sorted(mine, key=lambda c: names.index(documented_name(c))) if documented_name(c)!='__repr__'), exported])
    for cell in [*chapter, None]:
        if cell and cell['cell_type']=='code' and EXPORT_DIRECTIVE.search(''.join(cell['source'])): waiting.append(source_cell(cell))
        elif cell is None or cell['id'] in kept:
            for next_one in cells:
                between.append(next_one)
                if cell and next_one.get('id')==cell['id']: break
            for exported in waiting: give(exported)
            out.extend(between)
            waiting.clear(), between.clear()
    return out


def markdown_cell(source): return dict(cell_type='markdown', metadata={}, source=source)


def sphinx_cells(page, rewrite):
    "The cells of a page as Sphinx should see them."
    for cell in page.notebook['cells']:
        source = ''.join(cell['source'])
        if (front := front_matter(cell)) is not None:
            yield markdown_cell(f"# {front.get('title', page.new)}\n\n" + (f"*{front['description']}*" if front.get('description') else ''))
        elif cell['cell_type']=='markdown':
            if (text := rewrite(source, page).strip('\n')).strip(): yield cell | dict(source=text)
        elif cell['cell_type']=='code': yield from code_cells(cell, source, page, rewrite)


def code_cells(cell, source, page, rewrite):
    "A code cell; one whose output is itself Markdown (`show_doc`) becomes that Markdown, so that its headings join the contents."
    options = option_values(source)
    if options.get('include')=='false': return
    if options.get('output')=='asis':
        for out in cell['outputs']:
            text = ''.join(out.get('data', {}).get('text/markdown', out.get('text', '')))
            text = strip_code_links(rewrite(text, page)).replace('---\n', '', 1).strip()
            if text: yield markdown_cell(SOURCE_LINK.sub(r'\2\n\n<a class="source" href="\1">source</a>\n', text))
        return
    tags = cell['metadata'].get('tags', []) + ['remove-input']*(options.get('echo')=='false') + ['hide-input']*(options.get('code-fold')=='true')
    title = options.get('code-summary', 'Code').strip('"')
    folded = dict(mystnb=dict(code_prompt_show=title, code_prompt_hide=title)) if options.get('code-fold')=='true' else {}
    yield cell | dict(source=CELL_OPTION.sub('', source).strip('\n'), metadata=cell['metadata'] | dict(tags=tags) | folded, outputs=[rewrite_output_links(o, page, rewrite) for o in cell['outputs']])


def rewrite_output_links(out, page, rewrite):
    "An output; links in one that is Markdown, such as a table, lead to pages as those in the text do."
    data = out.get('data', {})
    return out | dict(data=data | {'text/markdown': rewrite(''.join(data['text/markdown']), page)}) if 'text/markdown' in data else out


def sidebar_groups(contents):
    "The sidebar as (caption, [files]) in reading order."
    for entry in contents:
        if isinstance(entry, str): yield '', [entry]
        elif 'section' in entry: yield entry['section'], [e if isinstance(e, str) else e['href'] for e in entry['contents']]
        else: yield entry.get('text', ''), [entry['href']]


def index_cells(pages, site, groups):
    "The index page with the whole sidebar as its table of contents; made up where there is no index notebook yet."
    cells = next((p.cells for p in pages if p.old=='index.ipynb'), [markdown_cell(f"# {site['title']}")])
    by_old = {p.old: p.new for p in pages}
    for caption,files in groups:
        names = [by_old[f] for f in files if f in by_old and f!='index.ipynb']
        if names: cells.append(markdown_cell('```{toctree}\n:hidden:\n' + (f':caption: {caption}\n' if caption else '') + '\n' + '\n'.join(names) + '\n```'))
    return cells


CONF_TEMPLATE = '''
import sys
sys.path.insert(0, {tools!r})
project = html_title = {title!r}
author = {author!r}
extensions = ['myst_nb', 'sphinx_copybutton', 'render_docs']
html_math_renderer = 'mathml'
exclude_patterns = ['_static']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'html_image']
myst_heading_anchors = 4
myst_heading_slug_func = 'render_docs.slug'
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
html_theme = {theme!r}
html_static_path = ['_static']
html_show_sourcelink = False
html_use_index = False
html_context = dict(default_mode='auto')
html_css_files = ['effdet_nb.css']
html_js_files = ['effdet_nb.js']
html_theme_options = dict(repository_url={repository!r}, use_repository_button=True, use_download_button=True)
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']
'''


SITE_CSS = '''
p:has(> a.source) { float: right; margin: -2.1rem 0 0; font-size: smaller; }
:is(h3, h4):has(+ p > a.source) { font-size: 1.2rem; font-family: var(--pst-font-family-monospace); }
.diagram { overflow-x: auto; }
.diagram img { max-width: max(100%, 45rem); height: auto; }
article table { font-size: .9em; }
math { font-size: 1.1em; }
article { overflow-wrap: break-word; }
code .pre { display: inline-block; max-width: 100%; white-space: pre-wrap; }
td code .pre { white-space: nowrap; }
article pre { font-size: .8rem; }
@media (min-width: 1200px) {
  .bd-main .bd-content .bd-article-container { max-width: 72rem; }
  .bd-sidebar-secondary { width: 15rem; }
}
@media (max-width: 719px) {
  table.told thead { display: none; }
  table.told tr { display: block; padding: .4rem 0; }
  table.told td { display: block; border: 0; padding: 0 .5rem; text-align: left !important; }
  table.told td p { display: inline; }
  table.told td + td:not(:last-child) { display: inline-block; padding-right: 0; }
  table.told tr td.nothing { display: none; }
  table.told td + td::before { content: attr(data-name) ": "; opacity: .7; }
  table.told td code .pre { white-space: pre-wrap; }
}
.cell_output pre:not(.columns) { white-space: pre-wrap; overflow-wrap: anywhere; }
button.code { float: right; margin-top: .6rem; padding: .1rem .6rem; font-size: smaller; border: 1px solid var(--pst-color-border); border-radius: .3rem; background: none; color: inherit; }
@media (max-width: 719px) { button.code { float: none; display: block; margin: 0 0 0 auto; } }   /* beside it a long title would break within a word */
.cell details.hide summary { font-size: .8rem; font-weight: normal; padding: .2rem .5rem; }
.cell.tag_hide-input { margin: .6rem 0; }
'''


SITE_JS = '''
document.addEventListener("DOMContentLoaded", () => {  // one button unfolds the code of all definitions, on this page and those to come
  const folded = [...document.querySelectorAll("article .cell details.hide")], title = document.querySelector("article h1")
  if (!folded.length || !title) return
  const button = document.createElement("button"), keep = "effdet_nb code"
  const set = open => { folded.forEach(d => d.open = open); button.textContent = open ? "fold the code" : "unfold the code" }
  let open = false
  try { open = localStorage.getItem(keep) === "open" } catch (e) {}
  button.className = "code"
  button.onclick = () => { open = !open; set(open); try { localStorage.setItem(keep, open ? "open" : "") } catch (e) {} }
  title.before(button)
  set(open)
})
document.addEventListener("DOMContentLoaded", () => {  // outputs are sentences, which wrap, or columns, which do not
  for (const pre of document.querySelectorAll("article .cell_output pre")) {
    const lines = pre.textContent.split("\\n").filter(l => l.trim()), wide = lines.filter(l => / {2,}\\S.* {2,}\\S/.test(l.trim())).length, two = lines.filter(l => /\\S {3,}\\S/.test(l)).length
    if (wide>1 || lines.length>4 && 2*two>=lines.length) pre.classList.add("columns")
  }
})
document.addEventListener("DOMContentLoaded", () => {  // on a phone a table with sentences in it becomes a list, each value with its column's name
  for (const table of document.querySelectorAll("article table")) {
    const names = [...table.querySelectorAll("thead th")].map(h => h.textContent.trim()), rows = [...table.querySelectorAll("tbody tr")]
    const words = names.map((_, i) => rows.map(r => r.children[i] ? r.children[i].textContent.trim().length : 0).reduce((a, b) => a+b, 0)/rows.length)
    if (names.length<3 || Math.max(...words.slice(1))<25) continue
    table.classList.add("told")
    for (const r of rows) [...r.children].forEach((c, i) => { c.dataset.name = names[i]; c.classList.toggle("nothing", !c.textContent.trim()) })
  }
})
'''


def mathml_visitor(block):
    "A Sphinx visitor that writes a formula as MathML."
    def visit(self, node):
        from docutils import nodes
        from latex2mathml.converter import convert
        self.body.append(convert(node.astext(), display='block' if block else 'inline'))
        raise nodes.SkipNode
    return visit


def setup(app):
    "Makes this file a Sphinx extension: the one that draws formulas."
    app.add_html_math_renderer('mathml', (mathml_visitor(False), None), (mathml_visitor(True), None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def write_sphinx_source(cfg, proc, source, theme):
    "Fills `source` with what Sphinx needs; returns the files that the sidebar names and nobody wrote, those it forgets, and diagrams without a picture."
    import yaml
    site = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))['website']
    shutil.rmtree(source, ignore_errors=True)
    (source/'_static').mkdir(parents=True)
    for name,text in (('effdet_nb.css', SITE_CSS), ('effdet_nb.js', SITE_JS)): (source/'_static'/name).write_text(text)
    written = {p.relative_to(cfg.nbs_path).as_posix() for p in cfg.nbs_path.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(cfg.nbs_path).parts)}
    def read(path): return json.loads(path.read_text(encoding='utf-8'))
    def processed(old): return (nb := read(proc/old)) | dict(cells=insert_source_cells(nb['cells'], read(cfg.nbs_path/old)['cells']))
    pages = [Page(old, processed(old)) for old in sorted(written) if (proc/old).is_file()]
    groups = list(sidebar_groups(site['sidebar']['contents']))
    listed = {f for _,files in groups for f in files}
    if forgotten := sorted(written-listed-{'index.ipynb'}): groups.append(('More', forgotten))
    rewrite = MarkdownRewriter(pages, cfg.doc_host + cfg.doc_baseurl)
    for p in pages: p.cells = list(sphinx_cells(p, rewrite))
    outputs = {p.new: p.notebook | dict(cells=p.cells) for p in pages}
    blank = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    outputs['index'] = outputs.get('index', blank) | dict(cells=index_cells(pages, site, groups))
    for name,notebook in outputs.items():
        for i,cell in enumerate(notebook['cells']): cell['id'] = f'cell-{i}'
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        (source/f'{name}.ipynb').write_text(json.dumps(notebook), encoding='utf-8')
    copy_assets(cfg.nbs_path, source)
    conf = CONF_TEMPLATE.format(tools=str(Path(__file__).resolve().parent), title=site['title'], author=cfg.author, theme=theme, repository=cfg.git_url)
    (source/'conf.py').write_text(conf, encoding='utf-8')
    return sorted(listed-written), forgotten, rewrite.undrawn


def copy_assets(nbs, source):
    "Pictures and downloads that lie beside the notebooks keep their places."
    for p in nbs.rglob('*'):
        if p.suffix in ('.png', '.jpg', '.svg', '.proto', '.txt') and not any(part[0] in '._' for part in p.relative_to(nbs).parts):
            to = source/p.relative_to(nbs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, to)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='_docs', help='folder for the HTML pages (_docs)')
    parser.add_argument('--theme', default='sphinx_book_theme', help='Sphinx theme (sphinx_book_theme)')
    parser.add_argument('--strict', action='store_true', help='fail on warnings, on chapters the sidebar names but nobody wrote or forgets, and on diagrams without a picture')
    parser.add_argument('--force', action='store_true', help='process all notebooks again, not only those that changed')
    parser.add_argument('--workers', type=int, default=1, help='processes that process notebooks (1)')
    args = parser.parse_args()
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    cfg = get_config()
    out = Path(args.out).resolve()
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=args.workers, force=args.force)
    source = proc/'_sphinx'
    missing, forgotten, undrawn = write_sphinx_source(cfg, proc, source, args.theme)
    for what,files in (('named in _quarto.yml, but there is no such notebook', missing), ('not in the sidebar of _quarto.yml; put under "More"', forgotten),
                       ('a diagram without its picture, shown as text; run tools/draw_diagrams.py', undrawn)):
        for f in files: print(f'{f}: {what}', file=sys.stderr)
    command = [sys.executable, '-m', 'sphinx', '-q', '-b', 'html', '-d', str(proc/'_doctrees'), *(['-W', '--keep-going'] if args.strict else []), str(source), str(out)]
    code = subprocess.call(command, env=os.environ | dict(PYTHONWARNINGS='ignore'))
    return code or int(args.strict and bool(missing or forgotten or undrawn))


if __name__=='__main__': sys.exit(main())
