"""Renders the docs site without Quarto: Sphinx and myst-nb, configured by the same `_quarto.yml`.

    python tools/render_docs.py                 # into _docs/
    python tools/render_docs.py --out /tmp/site --strict

Where Quarto is installed, `nbdev_docs` makes the site; this makes the same pages, at the same addresses, without it.
nbdev first turns the notebooks into pages (`_proc/`: tables of parameters, hidden cells gone, links to other chapters).
Here the code of exported cells comes back, folded, and the pages are rewritten from Quarto's Markdown into MyST's and
built. Nothing on a page comes from another server: formulas become MathML, which browsers draw themselves, and diagrams
are images made by tools/draw_diagrams.py. So the site also works from a memory stick.
"""
import argparse
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from draw_diagrams import DIAGRAM_FOLDER, MERMAID_BLOCK, diagram_file_name

CALLOUT_TO_ADMONITION = dict(note='note', tip='tip', warning='warning', important='important', caution='caution')
CALLOUT = re.compile(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}[ \t]*\n(?:\s*\n)?(?:#+ (.*)\n)?', re.M)
CELL_OPTION = re.compile(r'^#\|\s*([\w-]+)(?::\s*(.*?))?\s*$', re.M)
CODE_BLOCK = re.compile(r'^```.*?^```', re.M | re.S)
LINK = re.compile(r'(\]\()([^)\s]+)(\))')
NAMED_LINK = re.compile(r'\[(`[^`\n]+`)\]\(([^()\s#]*)#([\w.-]+)\)')   # a name that nbdev linked to its definition
HEADING = re.compile(r'(?:^|\s)#{1,6} +([^\n{]+)')
CODE_LINK = re.compile(r'\[(`[^`\n]+`)\]\([^()\s]*\)')
NESTED_LINK = re.compile(r'\[\[(`[^`\]]+`)\]\([^)\s]+\)\]\(([^)\s]+)\)') # a link whose text nbdev made a link as well
EXPORT_DIRECTIVE = re.compile(r'^#\|\s*exports?\b', re.M)
SHOW_DOC = re.compile(r'show_doc\(([\w.]+)')
SOURCE_LINK = re.compile(r'^\[source\]\((\S+)\)\s+(#+ [^\n]+)\n') # how nbdev's table of a definition begins
ASSET_SUFFIXES = ('.png', '.jpg', '.svg', '.proto', '.txt')
MISSING_NOTEBOOK = 'named in _quarto.yml, but there is no such notebook'
NOT_IN_SIDEBAR = 'not in the sidebar of _quarto.yml; put under "More"'
MISSING_IMAGE = 'a diagram without its image, shown as text; run tools/draw_diagrams.py'


def slug(heading):
    "Pandoc's id of a heading, which Quarto and nbdev's links use: lower case, hyphens for spaces, dots kept."
    kept = re.sub(r'[^\w\s.-]', '', heading.lower())
    return re.sub(r'\s+', '-', kept.strip())


def option_values(source):
    "The `#| name: value` lines of a code cell; a bare `#| name` counts as true."
    return {name: value or 'true' for name,value in CELL_OPTION.findall(source)}


def source_of(cell): return ''.join(cell['source'])


def front_matter(cell):
    "The YAML block nbdev makes of a notebook's title cell; None if this cell is not one."
    import yaml
    text = source_of(cell).strip()
    if cell['cell_type']!='raw' or not text.startswith('---'): return None
    return yaml.safe_load(text.strip('-')) or {}


class Page:
    "One processed notebook, its path in the sidebar (`detector/01_boxes.ipynb`) and its page (`detector/boxes`)."
    def __init__(self, notebook_path, notebook):
        self.notebook_path, self.notebook, self.cells = notebook_path, notebook, []
        fronts = [f for f in map(front_matter, notebook['cells']) if f is not None]
        self.metadata = fronts[0] if fronts else {}
        name = Path(self.metadata.get('output-file', posixpath.basename(notebook_path))).stem
        self.page_path = posixpath.join(posixpath.dirname(notebook_path), name)


    def anchors(self):
        "The ids of the headings of a page, among them those of its documented definitions."
        texts = [source_of(c) for c in self.notebook['cells'] if c['cell_type']=='markdown']
        outputs = [o for c in self.notebook['cells'] for o in c.get('outputs', [])]
        texts += [''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs]
        return {slug(heading) for text in texts for heading in HEADING.findall(text)}


class MarkdownRewriter:
    "Rewrites Quarto's Markdown as MyST's, for all pages of a site."
    def __init__(self, pages, site_url):
        self.by_notebook_path = {p.notebook_path: p for p in pages}
        self.by_page_path = {p.page_path: p for p in pages}
        self.site_url = site_url.rstrip('/') + '/'
        self.missing_diagrams = []
        self.anchors = {}

    def find_page(self, path, page):
        "The page that a link of `page` leads to, by the address on the site or by a relative path; None for others."
        if path.startswith(self.site_url) and path.endswith('.html'):
            return self.by_page_path.get(path.removeprefix(self.site_url).removesuffix('.html'))
        if urlsplit(path).scheme or not path.endswith(('.ipynb', '.html')): return None
        near = posixpath.normpath(posixpath.join(posixpath.dirname(page.notebook_path), path))
        return self.by_notebook_path.get(near) or self.by_page_path.get(near.removesuffix('.html'))

    def link(self, target, page):
        "The target of a link; if it is another page, as a path from the root of the site's source."
        path, hash_sign, anchor = target.partition('#')
        found = self.find_page(path, page)
        return f'/{found.page_path}.ipynb{hash_sign}{anchor}' if found else target

    def name_link(self, match, page):
        "A name with its link to the definition; without the link if that page does not show the definition."
        name, path, anchor = match.groups()
        found = self.find_page(path, page)
        if not found: return match[0]
        if found.page_path not in self.anchors: self.anchors[found.page_path] = found.anchors()
        return match[0] if anchor in self.anchors[found.page_path] else name

    def diagram(self, match):
        "The image of a mermaid block; its text as long as there is no image."
        name = diagram_file_name(match[1])
        if (DIAGRAM_FOLDER/name).is_file():
            return f':::{{container}} diagram\n![diagram](/images/{DIAGRAM_FOLDER.name}/{name})\n:::\n'
        self.missing_diagrams.append(name)
        return f'```text\n{match[1]}```'

    def __call__(self, text, page):
        "Rewrites one Markdown text of a page."
        text = re.sub(r'<!-- WARNING.*?-->\n?', '', text)
        text = re.sub(r'\{target="_blank"[^}]*\}', '', text)
        text = MERMAID_BLOCK.sub(self.diagram, text)
        text = CALLOUT.sub(callout_to_admonition, text)
        text = NESTED_LINK.sub(r'[\1](\2)', text)
        text = NAMED_LINK.sub(lambda m: self.name_link(m, page), text)
        return LINK.sub(lambda m: m[1] + self.link(m[2], page) + m[3], text)


def callout_to_admonition(match):
    "Quarto's callout as an admonition; its heading or title becomes the title, `collapse` folds it."
    fence, kind, options, heading = match.groups()
    admonition = CALLOUT_TO_ADMONITION.get(kind, 'note')
    titles = re.findall(r'title="([^"]*)"', options)
    title = heading or (titles[0] if titles else '')
    if 'collapse' in options:
        return f'{fence}{{admonition}} {title or kind.capitalize()}\n:class: {admonition} dropdown\n\n'
    if title: return f'{fence}{{admonition}} {title}\n:class: {admonition}\n\n'
    return f'{fence}{{{admonition}}}\n'


def strip_code_links(text):
    "Removes links from blocks of code: nbdev links the names in comments too, and a reader would see the address."
    return CODE_BLOCK.sub(lambda block: CODE_LINK.sub(r'\1', block[0]), text)


def definitions(source):
    "{name: syntax tree} of what a cell defines."
    return {o.name: o for o in ast.parse(source).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))}


def is_field_class(node):
    "Whether a definition is a class of commented fields, whose lines say more than its constructor's signature."
    marks = [ast.unparse(o) for o in [*node.decorator_list, *getattr(node, 'bases', [])]]
    return isinstance(node, ast.ClassDef) and any(m.startswith(('dataclass','NamedTuple')) for m in marks)


def is_command(node): return any(ast.unparse(d)=='command' for d in node.decorator_list)


def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def summary(name, node):
    "A definition's name and the first line of its docstring."
    doc = ast.get_docstring(node)
    return f'{name}: {doc.splitlines()[0].rstrip(".")}' if doc else name


def fold_title(found):
    "The line a reader sees of a folded cell: private definitions are named, since nbdev prints nothing of them."
    if not found: return 'Imports'
    if all(name.startswith('_') for name in found): return '; '.join(summary(n, o) for n,o in found.items())
    return 'Code'


def fold(title): return dict(mystnb=dict(code_prompt_show=title, code_prompt_hide=title))


def stays_open(source, found):
    "Whether a cell is shown unfolded: classes of fields, tables and constants are to be read."
    if found: return any(map(is_field_class, found.values()))
    return not all(map(is_import, ast.parse(source).body))


def source_cell(cell):
    "An exported cell for a page. Functions are folded: nbdev prints what they take and return."
    source = CELL_OPTION.sub('', source_of(cell)).strip('\n')
    found = definitions(source)
    metadata = {} if stays_open(source, found) else dict(tags=['hide-input']) | fold(fold_title(found))
    return dict(cell_type='code', id=cell['id'], metadata=metadata, source=source, outputs=[], execution_count=None)


def any_of(names):
    "A regular expression for any of some names; one that never matches if there are none."
    return '|'.join(names) or '$.'


def clean_show_doc(doc, exported):
    "Corrects nbdev's print of a definition: `class` for classes; no signature for classes of fields and commands."
    found = definitions(exported['source'])
    classes = any_of(n for n,o in found.items() if isinstance(o, ast.ClassDef))
    unsigned = any_of(n for n,o in found.items() if is_field_class(o) or is_command(o))

    def edit(text):
        text = re.sub(rf'```python\n+def (?:{unsigned})\(.*?```\n*', '', ''.join(text), flags=re.S)
        text = re.sub(rf'^def ({classes})\(', r'class \1(', text, flags=re.M)
        return text.replace('*Call self as a function.*', '')

    def edit_output(output):
        if 'text' in output: return output | dict(text=edit(output['text']))
        data = output['data']
        return output | dict(data=data | {'text/markdown': edit(data['text/markdown'])})

    return doc | dict(outputs=[edit_output(o) for o in doc['outputs']])


def documented_name(cell):
    "The name whose documentation a cell of a processed page prints, without its class; None if it prints none."
    found = SHOW_DOC.search(source_of(cell))
    return found and found[1].split('.')[-1]


def is_exported(cell): return cell['cell_type']=='code' and bool(EXPORT_DIRECTIVE.search(source_of(cell)))


def take_until(cells, cell_id):
    "Takes cells from an iterator up to the one with this id, or all if the id is None."
    taken = []
    for cell in cells:
        taken.append(cell)
        if cell_id and cell.get('id')==cell_id: break
    return taken


def docs_then_code(between, exported):
    "Moves what nbdev printed of an exported cell's definitions out of `between`; returns it with the cell itself."
    names = list(definitions(exported['source']))
    docs = [c for c in between if documented_name(c) in names]
    between[:] = [c for c in between if c not in docs]
    docs.sort(key=lambda c: names.index(documented_name(c)))
    return [*(clean_show_doc(c, exported) for c in docs if documented_name(c)!='__repr__'), exported]


def insert_source_cells(page_cells, notebook_cells):
    "The cells of a processed page, with each exported cell after what nbdev printed of it."
    kept = {c['id'] for c in notebook_cells} & {c.get('id') for c in page_cells}
    remaining = iter(page_cells)
    out, waiting = [], []
    for cell in [*notebook_cells, None]:
        if cell and is_exported(cell): waiting.append(source_cell(cell))
        elif cell is None or cell['id'] in kept:
            between = take_until(remaining, cell and cell['id'])
            for exported in waiting: out.extend(docs_then_code(between, exported))
            out.extend(between)
            waiting.clear()
    return out


def markdown_cell(source): return dict(cell_type='markdown', metadata={}, source=source)


def title_cell(front, page):
    "The title cell of a page from its YAML block."
    description = front.get('description')
    return markdown_cell(f"# {front.get('title', page.page_path)}\n\n" + (f'*{description}*' if description else ''))


def sphinx_cells(page, rewrite):
    "The cells of a page as Sphinx should see them."
    for cell in page.notebook['cells']:
        front = front_matter(cell)
        if front is not None: yield title_cell(front, page)
        elif cell['cell_type']=='markdown':
            text = rewrite(source_of(cell), page).strip('\n')
            if text.strip(): yield cell | dict(source=text)
        elif cell['cell_type']=='code': yield from code_cells(cell, page, rewrite)


def code_cells(cell, page, rewrite):
    "A code cell; one whose output is Markdown (`show_doc`) becomes that Markdown, so its headings join the contents."
    options = option_values(source_of(cell))
    if options.get('include')=='false': return []
    if options.get('output')=='asis': return markdown_outputs(cell, page, rewrite)
    metadata = cell['metadata'] | dict(tags=list(cell['metadata'].get('tags', [])))
    if options.get('echo')=='false': metadata['tags'].append('remove-input')
    if options.get('code-fold')=='true':
        metadata['tags'].append('hide-input')
        metadata |= fold(options.get('code-summary', 'Code').strip('"'))
    outputs = [rewrite_output_links(o, page, rewrite) for o in cell['outputs']]
    return [cell | dict(source=CELL_OPTION.sub('', source_of(cell)).strip('\n'), metadata=metadata, outputs=outputs)]


def markdown_outputs(cell, page, rewrite):
    "The outputs of a cell, which are Markdown, as Markdown cells."
    for output in cell['outputs']:
        text = ''.join(output.get('data', {}).get('text/markdown', output.get('text', '')))
        text = strip_code_links(rewrite(text, page)).replace('---\n', '', 1).strip()
        if text: yield markdown_cell(SOURCE_LINK.sub(r'\2\n\n<a class="source" href="\1">source</a>\n', text))


def rewrite_output_links(output, page, rewrite):
    "An output; if it is Markdown, such as a table, its links lead to pages as those in the text do."
    data = output.get('data', {})
    if 'text/markdown' not in data: return output
    text = rewrite(''.join(data['text/markdown']), page)
    return output | dict(data=data | {'text/markdown': text})


def file_of(entry): return entry if isinstance(entry, str) else entry['href']


def sidebar_groups(contents):
    "The sidebar as (caption, [files]) in reading order."
    for entry in contents:
        if isinstance(entry, str): yield '', [entry]
        elif 'section' in entry: yield entry['section'], [file_of(e) for e in entry['contents']]
        else: yield entry.get('text', ''), [file_of(entry)]


def toctree_cell(caption, names):
    "One part of the table of contents."
    options = [':hidden:'] + ([f':caption: {caption}'] if caption else [])
    return markdown_cell('\n'.join(['```{toctree}', *options, '', *names, '```']))


def index_cells(pages, site, groups):
    "The index page with the whole sidebar as its table of contents; only a title if there is no index notebook yet."
    title = markdown_cell(f"# {site['title']}")
    cells = next((p.cells for p in pages if p.notebook_path=='index.ipynb'), [title])
    by_path = {p.notebook_path: p.page_path for p in pages}
    for caption,files in groups:
        names = [by_path[f] for f in files if f in by_path and f!='index.ipynb']
        if names: cells.append(toctree_cell(caption, names))
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
  table.stacked thead { display: none; }
  table.stacked tr { display: block; padding: .4rem 0; }
  table.stacked td { display: block; border: 0; padding: 0 .5rem; text-align: left !important; }
  table.stacked td p { display: inline; }
  table.stacked td + td:not(:last-child) { display: inline-block; padding-right: 0; }
  table.stacked tr td.empty { display: none; }
  table.stacked td + td::before { content: attr(data-name) ": "; opacity: .7; }
  table.stacked td code .pre { white-space: pre-wrap; }
}
.cell_output pre:not(.columns) { white-space: pre-wrap; overflow-wrap: anywhere; }
button.code {
  float: right; margin-top: .6rem; padding: .1rem .6rem; font-size: smaller;
  border: 1px solid var(--pst-color-border); border-radius: .3rem; background: none; color: inherit;
}
@media (max-width: 719px) {   /* beside the button a long title would break within a word */
  button.code { float: none; display: block; margin: 0 0 0 auto; }
}
details.admonition { padding-bottom: .1rem; }
details.admonition > summary.admonition-title {
  cursor: pointer; list-style-position: inside; display: list-item; margin-bottom: 0;
}
details.admonition[open] > summary.admonition-title { margin-bottom: .6rem; }
.cell details.hide summary { font-size: .8rem; font-weight: normal; padding: .2rem .5rem; }
.cell.tag_hide-input { margin: .6rem 0; }
'''


SITE_JS = '''
// One button unfolds the code of all definitions, on this page and on those opened later.
function addCodeButton() {
  const folded = [...document.querySelectorAll("article .cell details.hide")]
  const title = document.querySelector("article h1")
  if (!folded.length || !title) return
  const button = document.createElement("button"), key = "effdet_nb code"
  const set = open => {
    folded.forEach(d => d.open = open)
    button.textContent = open ? "fold the code" : "unfold the code"
  }
  let open = false
  try { open = localStorage.getItem(key) === "open" } catch (e) {}
  button.className = "code"
  button.onclick = () => {
    open = !open
    set(open)
    try { localStorage.setItem(key, open ? "open" : "") } catch (e) {}
  }
  title.before(button)
  set(open)
}

// The theme keeps the position of the sidebar from page to page, so the entry of the current page may be out of sight.
function showCurrentPage() {
  const sidebar = document.querySelector(".bd-sidebar-primary")
  const current = sidebar && [...sidebar.querySelectorAll("li.current > a")].pop()
  if (!current) return
  const box = sidebar.getBoundingClientRect(), entry = current.getBoundingClientRect()
  if (entry.top>=box.top && entry.bottom<=Math.min(box.bottom, innerHeight)) return
  sidebar.scrollTop += entry.top-box.top-sidebar.clientHeight/3
}

// Outputs are sentences, which wrap, or columns, which do not.
function markColumns() {
  for (const pre of document.querySelectorAll("article .cell_output pre")) {
    const lines = pre.textContent.split("\\n").filter(l => l.trim())
    const three = lines.filter(l => / {2,}\\S.* {2,}\\S/.test(l.trim())).length
    const two = lines.filter(l => /\\S {3,}\\S/.test(l)).length
    const indented = lines.filter(l => /^ {12,}\\S/.test(l)).length        // the second column of a --help text
    if (three>1 || indented>3 || lines.length>4 && 2*two>=lines.length) pre.classList.add("columns")
  }
}

// On a phone a table with sentences in it becomes a list, each value with the name of its column.
function stackTables() {
  for (const table of document.querySelectorAll("article table")) {
    const names = [...table.querySelectorAll("thead th")].map(h => h.textContent.trim())
    const rows = [...table.querySelectorAll("tbody tr")]
    const text = cell => cell ? cell.textContent.trim() : ""
    const meanLength = i => rows.map(r => text(r.children[i]).length).reduce((a, b) => a+b, 0)/rows.length
    if (names.length<3 || Math.max(...names.map((_, i) => meanLength(i)).slice(1))<25) continue
    table.classList.add("stacked")
    for (const row of rows) for (const [i, cell] of [...row.children].entries()) {
      cell.dataset.name = names[i]
      cell.classList.toggle("empty", !text(cell))
    }
  }
}

for (const step of [addCodeButton, markColumns, stackTables]) document.addEventListener("DOMContentLoaded", step)
addEventListener("load", showCurrentPage)          // after the theme has moved the sidebar
// The search puts chapters before tutorials, commands and appendices. The numbers below `score` are those of Sphinx.
window.Scorer = {
  score: ([page, title, anchor, description, score]) => score - (/^(tutorials|app|accel|core)\\//.test(page) ? 9 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
}

// A page on disk may not fetch others, so the search shows no excerpts there.
if (location.protocol==="file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false
'''


def mathml_visitor(block):
    "A Sphinx visitor that writes a formula as MathML."
    def visit(self, node):
        from docutils import nodes
        from latex2mathml.converter import convert
        self.body.append(convert(node.astext(), display='block' if block else 'inline'))
        raise nodes.SkipNode
    return visit


def fold_admonitions(app, document, page_name):
    "Turns the admonitions that are to be folded into HTML's own folded boxes, which need no script."
    from docutils import nodes
    for box in list(document.findall(nodes.admonition)):
        if 'dropdown' not in box['classes']: continue
        title, *content = box.children
        classes, summary_text = ' '.join(['admonition', *box['classes']]), html.escape(title.astext())
        opening = f'<details class="{classes}"><summary class="admonition-title">{summary_text}</summary>'
        folded = [nodes.raw('', opening, format='html'), *content, nodes.raw('', '</details>', format='html')]
        box.parent.replace(box, folded)


def setup(app):
    "Makes this file a Sphinx extension: it writes formulas as MathML and folds admonitions."
    app.connect('doctree-resolved', fold_admonitions)
    app.add_html_math_renderer('mathml', (mathml_visitor(False), None), (mathml_visitor(True), None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


def is_public(path, top):
    "Whether no part of a path begins with a dot or an underscore."
    return not any(part[0] in '._' for part in path.relative_to(top).parts)


def read_json(path): return json.loads(path.read_text(encoding='utf-8'))


def read_pages(nbs, proc, notebooks):
    "The processed pages of these notebooks, with the code of their exported cells."
    for name in sorted(notebooks):
        if not (proc/name).is_file(): continue
        notebook = read_json(proc/name)
        cells = insert_source_cells(notebook['cells'], read_json(nbs/name)['cells'])
        yield Page(name, notebook | dict(cells=cells))


def blank_notebook():
    "A notebook without cells."
    kernel = dict(name='python3', display_name='python3', language='python')
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=kernel))


def write_notebook(path, notebook):
    "Writes a notebook for Sphinx, with new cell ids."
    for i,cell in enumerate(notebook['cells']): cell['id'] = f'cell-{i}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook), encoding='utf-8')


def write_static_files(source, cfg, title, theme):
    "Writes Sphinx's configuration, the style sheet and the script of the site."
    static = source/'_static'
    static.mkdir(parents=True)
    (static/'effdet_nb.css').write_text(SITE_CSS)
    (static/'effdet_nb.js').write_text(SITE_JS)
    tools = str(Path(__file__).resolve().parent)
    conf = CONF_TEMPLATE.format(tools=tools, title=title, author=cfg.author, theme=theme, repository=cfg.git_url)
    (source/'conf.py').write_text(conf, encoding='utf-8')


def write_sphinx_source(cfg, proc, source, theme):
    "Fills `source` with what Sphinx needs; returns [(problem, file)]."
    import yaml
    site = yaml.safe_load((cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'))['website']
    shutil.rmtree(source, ignore_errors=True)
    write_static_files(source, cfg, site['title'], theme)
    nbs = cfg.nbs_path
    notebooks = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if is_public(p, nbs)}
    pages = list(read_pages(nbs, proc, notebooks))
    groups = list(sidebar_groups(site['sidebar']['contents']))
    listed = {f for _,files in groups for f in files}
    forgotten = sorted(notebooks-listed-{'index.ipynb'})
    if forgotten: groups.append(('More', forgotten))
    rewrite = MarkdownRewriter(pages, cfg.doc_host + cfg.doc_baseurl)
    for p in pages: p.cells = list(sphinx_cells(p, rewrite))
    outputs = {p.page_path: p.notebook | dict(cells=p.cells) for p in pages}
    outputs['index'] = outputs.get('index', blank_notebook()) | dict(cells=index_cells(pages, site, groups))
    for name,notebook in outputs.items(): write_notebook(source/f'{name}.ipynb', notebook)
    copy_assets(nbs, source)
    return [*((MISSING_NOTEBOOK, f) for f in sorted(listed-notebooks)), *((NOT_IN_SIDEBAR, f) for f in forgotten),
            *((MISSING_IMAGE, f) for f in rewrite.missing_diagrams)]


def copy_assets(nbs_path, source):
    "Copies images and downloads that lie beside the notebooks to the same places."
    for p in nbs_path.rglob('*'):
        if p.suffix in ASSET_SUFFIXES and is_public(p, nbs_path):
            to = source/p.relative_to(nbs_path)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, to)


def run_sphinx(source, out, doctrees, strict):
    "Builds the site; returns Sphinx's exit code."
    flags = ['-W', '--keep-going'] if strict else []
    command = [sys.executable, '-m', 'sphinx', '-q', '-b', 'html', '-d', str(doctrees), *flags, str(source), str(out)]
    return subprocess.call(command, env=os.environ | dict(PYTHONWARNINGS='ignore'))


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='_docs', help='folder for the HTML pages (_docs)')
    parser.add_argument('--theme', default='sphinx_book_theme', help='Sphinx theme (sphinx_book_theme)')
    parser.add_argument('--strict', action='store_true', help='fail on warnings, on a sidebar that does not fit the '
                        'notebooks, and on diagrams without an image')
    parser.add_argument('--force', action='store_true', help='process all notebooks again, not only those that changed')
    parser.add_argument('--workers', type=int, default=1, help='processes that process notebooks (1)')
    return parser.parse_args()


def main():
    args = read_arguments()
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    cfg = get_config()
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=args.workers, force=args.force)
    problems = write_sphinx_source(cfg, proc, proc/'_sphinx', args.theme)
    for problem,file in problems: print(f'{file}: {problem}', file=sys.stderr)
    code = run_sphinx(proc/'_sphinx', Path(args.out).resolve(), proc/'_doctrees', args.strict)
    return code or int(args.strict and bool(problems))


if __name__=='__main__': sys.exit(main())
