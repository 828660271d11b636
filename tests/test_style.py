"""What the book and the code look like in numbers, those by which admired literate code is measured.

`pytest tests/test_style.py -s` prints them. Numbers are for noticing: a page that reads better another way may have
others. The limits below fail when the whole book drifts; a few, such as lines over 120 columns, hold for every line."""
import ast
import json
import re
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'effdet_nb'
WIDTH = 120
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (*FUNCTION, ast.ClassDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# The parts of the book, by folder; the rest of the folders are appendices.
PARTS = dict(detector='I', data='II', evaluate='III', weights='IV', train='V', prune='VI', export='VII', app='VIII',
             core='app.', accel='app.')


# --- the sources

def read(path): return path.read_text(encoding='utf-8')
def cells_of(path): return json.loads(read(path))['cells']
def source(cell): return ''.join(cell['source'])
def is_code(cell): return cell['cell_type']=='code' and bool(source(cell).strip())
def has_option(cell, name): return bool(re.search(rf'^#\|\s*{name}\b', source(cell), re.M))
def is_ours(path): return not {'.ipynb_checkpoints', '__pycache__'} & set(path.parts)
def modules(): return sorted(p for p in LIB.rglob('*.py') if p.name[0]!='_')


def lines(text):
    "The lines of code in a text: no blank ones, no markers of cells, no directives."
    return [l for l in text.splitlines() if l.strip() and not l.lstrip().startswith(('# %%', '#|'))]


def statements(cell):
    "The statements of a cell; none if it holds magics, which define nothing for others."
    try: return ast.parse(source(cell)).body
    except SyntaxError: return []


def notebooks():
    "({chapter: cells}, {tutorial: cells}); a chapter exports a module."
    found = {p: cells_of(p) for p in sorted(NBS.rglob('*.ipynb')) if is_ours(p)}
    chapters = {p: c for p,c in found.items() if any(has_option(x, 'default_exp') for x in c)}
    return chapters, {p: c for p,c in found.items() if 'tutorials' in p.parts}


def python_sources():
    "{place: text} of all code: modules, cells of notebooks, tests, benchmarks and tools."
    files = [*modules(), *(p for folder in ('tests', 'bench', 'tools') for p in sorted((ROOT/folder).glob('*.py')))]
    found = {str(p.relative_to(ROOT)): read(p) for p in files}
    for path in filter(is_ours, sorted(NBS.rglob('*.ipynb'))):
        for i,cell in enumerate(cells_of(path)):
            if is_code(cell): found[f'{path.relative_to(ROOT)} cell {i}'] = source(cell)
    return found


# --- density

def wide_lines(text):
    "Numbers of the lines over 120 columns, except those nbdev writes: markers of cells and `__all__` (of up to 130)."
    nbdev_line = re.compile(r"# %% |__all__ = |           '.*'[,\]]$")
    return [i for i,l in enumerate(text.splitlines(), 1) if len(l)>WIDTH and not nbdev_line.match(l)]


def num_nodes(function):
    "The number of statements and expressions in the body of a function, its docstring aside."
    body = function.body[ast.get_docstring(function) is not None:]
    return sum(isinstance(n, (ast.stmt, ast.expr)) for statement in body for n in ast.walk(statement))


def functions(tree): return [n for n in ast.walk(tree) if isinstance(n, FUNCTION)]


def expressions_per_line(tree):
    "For each line with an expression, the number of expressions that begin on it."
    beginnings = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.expr)]
    return np.unique(beginnings, return_counts=True)[1] if beginnings else np.zeros(0, int)


def joined_statements(tree):
    "Numbers of the lines on which a statement follows another one of the same block, joined by a semicolon."
    blocks = [block for n in ast.walk(tree) for _,block in ast.iter_fields(n)]
    blocks = [b for b in blocks if isinstance(b, list) and b and isinstance(b[0], ast.stmt)]
    return [after.lineno for b in blocks for before,after in zip(b, b[1:]) if before.end_lineno==after.lineno]


def named_lambdas(tree):
    "Numbers of the lines that give a lambda a name."
    assigned = [n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.AnnAssign, ast.NamedExpr))]
    return [n.lineno for n in assigned if isinstance(n.value, ast.Lambda)]


def nested_comprehensions(tree):
    "Numbers of the lines with a comprehension inside a comprehension."
    outer = [n for n in ast.walk(tree) if isinstance(n, COMPREHENSION)]
    return [n.lineno for n in outer if sum(isinstance(inner, COMPREHENSION) for inner in ast.walk(n))>1]


def self_attributes(function):
    "The attributes of `self` that a method sets."
    for n in ast.walk(function):
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, 'id', '')=='self':
            yield n.attr


def declared_names(cls):
    "What a class declares: names in its body, and attributes set in the methods that make an instance."
    for n in cls.body:
        if isinstance(n, ast.AnnAssign): yield n.target.id
        if isinstance(n, ast.Assign): yield from (t.id for t in n.targets if isinstance(t, ast.Name))
        if isinstance(n, FUNCTION):
            yield n.name
            if n.name in ('__init__', '__new__', '__post_init__', 'build'): yield from self_attributes(n)


def late_attributes(tree):
    "Attributes (`Class.name`) that an instance first gets in another method than `__init__` (Keras: or `build`)."
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for name,cls in classes.items():
        bases = [classes[b.id] for b in cls.bases if getattr(b, 'id', '') in classes]
        known = {attr for c in (cls, *bases) for attr in declared_names(c)}
        methods = [n for n in cls.body if isinstance(n, FUNCTION)]
        yield from sorted({f'{name}.{attr}' for m in methods for attr in self_attributes(m) if attr not in known})


def density(trees):
    "The density of some modules."
    nodes = [num_nodes(f) for tree in trees for f in functions(tree)]
    expressions = np.concatenate([expressions_per_line(tree) for tree in trees])
    return {
        'AST nodes per function, median / 90% / max': (median(nodes), np.percentile(nodes, 90), max(nodes)),
        'expressions per line, 90%': (np.percentile(expressions, 90),),
        'lines joined by a semicolon': (sum(len(joined_statements(t)) for t in trees),),
        'lambdas given a name': (sum(len(named_lambdas(t)) for t in trees),),
        'comprehensions inside a comprehension': (sum(len(nested_comprehensions(t)) for t in trees),),
        'attributes first set outside __init__': (sum(len(list(late_attributes(t))) for t in trees),),
    }


# --- pages

def nearness(cells):
    "For each exported cell that defines something public: is the next code cell a use of it?"
    code = [c for c in cells if is_code(c)]
    for cell,after in zip(code, [*code[1:], None]):
        if has_option(cell, 'export') and num_public(cell): yield after is not None and not has_option(after, 'export')


def num_public(cell): return sum(isinstance(n, DEFINITION) and n.name[0]!='_' for n in statements(cell))


def words_per_line(cells):
    "Words of prose for each line of code."
    prose = [re.sub(r'```.*?```', '', source(c), flags=re.S) for c in cells if c['cell_type']=='markdown']
    code = [lines(source(c)) for c in cells if c['cell_type']=='code']
    return sum(len(text.split()) for text in prose) / max(1, sum(map(len, code)))


def keeps_image(cell):
    "Whether the outputs of a cell have an image."
    data = [o.get('data', {}) for o in cell.get('outputs', ())]
    in_html = any('data:image/' in ''.join(d.get('text/html', ())) for d in data)
    return in_html or any('image/png' in d or 'image/svg+xml' in d for d in data)


def num_pictures(cells):
    "Pictures a reader sees: kept outputs, diagrams, and images in the text."
    text = [source(c) for c in cells if c['cell_type']=='markdown']
    return sum(map(keeps_image, cells)) + sum(len(re.findall(r'^```\{?mermaid|!\[', t, re.M)) for t in text)


def style_of_pages(chapters, tutorials):
    "The part of the table that is about notebooks."
    exported = [c for cells in chapters.values() for c in cells if is_code(c) and has_option(c, 'export')]
    lengths = [len(lines(source(c))) for c in exported]
    all_lengths = [len(lines(source(c))) for cells in chapters.values() for c in cells if is_code(c)]
    public = [n for n in map(num_public, exported) if n]
    near = [n for cells in chapters.values() for n in nearness(cells)]
    words = [median(map(words_per_line, pages.values())) for pages in (chapters, tutorials)]
    pictures = [num_pictures(cells) for cells in chapters.values()]
    return {
        'exported cell, lines, median / 90%': (median(lengths), np.percentile(lengths, 90)),
        'any code cell, lines, median': (median(all_lengths),),
        'definition cells holding exactly one public definition': (np.mean(np.equal(public, 1)),),
        'public definitions followed at once by a use': (np.mean(near),),
        'words per line of code, chapters / tutorials, median': words,
        'pictures per chapter, median / mean': (median(pictures), np.mean(pictures)),
        'chapters without a picture': (pictures.count(0), len(chapters)),
    }


def nearness_by_part(chapters):
    "The share of public definitions followed at once by a use, for each folder of the book."
    found = {}
    for path,cells in chapters.items(): found.setdefault(path.parent.name, []).extend(nearness(cells))
    return {f'  part {PARTS[folder]} {folder}': (np.mean(found[folder]),) for folder in PARTS if found.get(folder)}


def style_of_modules():
    "The part of the table that is about modules."
    texts = list(map(read, modules()))
    trees = list(map(ast.parse, texts))
    lengths = [f.end_lineno-f.lineno+1 for tree in trees for f in functions(tree)]
    sizes = [len(lines(t)) for t in texts]
    return {
        'functions, and modules': (len(lengths), len(texts)),
        'module length, lines, median / max': (median(sizes), max(sizes)),
        'function length, lines, median / 90%': (median(lengths), np.percentile(lengths, 90)),
        'functions of 40 lines or more, share': (np.mean(np.array(lengths)>=40),),
    } | density(trees)


def wide_places():
    "{place: numbers of its lines over 120 columns} for all code."
    found = {place: wide_lines(text) for place,text in python_sources().items()}
    return {place: numbers for place,numbers in found.items() if numbers}


def style_table():
    "Our row of the table, as {measure: values}."
    chapters,tutorials = notebooks()
    num_wide = sum(map(len, wide_places().values()))
    wide = {f'lines over {WIDTH} columns: modules, notebooks, tests, bench, tools': (num_wide,)}
    return wide | style_of_modules() | style_of_pages(chapters, tutorials) | nearness_by_part(chapters)


def format_value(value): return f'{value:,}' if isinstance(value, int) else f'{value:.3g}'


# --- the tests

DRAWING = re.compile(r'\b(show_(boxes|batch|scene)|plot_(?!history)\w+|plt\.subplots)\(')


def lost_image(cell):
    "Whether a cell draws and keeps no image."
    if not is_code(cell) or has_option(cell, 'export') or has_option(cell, 'hide'): return False
    return bool(DRAWING.search(source(cell))) and 'plt.close' not in source(cell) and not keeps_image(cell)


def test_pictures_that_are_drawn_are_kept():
    "A page that is run with a drawing library set to files (MPLBACKEND=agg) loses its pictures without a message."
    pages = {p: cells for group in notebooks() for p,cells in group.items()}
    lost = [f'{p.relative_to(ROOT)} {c["id"]}' for p,cells in pages.items() for c in cells if lost_image(c)]
    assert not lost, 'run these pages again, with MPLBACKEND unset: ' + ', '.join(lost)


def code_cell(text): return dict(cell_type='code', source=text, outputs=[])
def markdown_cell(text): return dict(cell_type='markdown', source=text)


def test_the_measures_of_pages_measure():
    cells = [code_cell('#| default_exp x'), markdown_cell('one two three'), code_cell('#| export\ndef f(): return 1'),
             code_cell('f()'), code_cell('#| export\ndef g(): return 2'), code_cell('#| export\ndef _h(): return 3'),
             markdown_cell('![a](b.png)\n```\nnot words\n```')]
    assert list(nearness(cells))==[True, False] and num_pictures(cells)==1
    assert words_per_line(cells)==4/4
    assert lines('# %% x\n#| export\n\ndef f():\n    pass')==['def f():', '    pass']


SAMPLE = '''
class A:
    rate: float = 1.
    def __init__(self): self.a = 1
    def run(self): self.a = self.rate = 2
    def late(self): self.b = 3; return f(self.b)
double = lambda x: 2*x
pairs = [[i*j for j in range(3)] for i in range(3)]
'''

def test_the_measures_of_code_measure():
    tree = ast.parse(SAMPLE)
    assert list(late_attributes(tree))==['A.b']
    assert joined_statements(tree)==[6] and named_lambdas(tree)==[7] and nested_comprehensions(tree)==[8]
    [function] = functions(ast.parse('def f(x):\n    "Doc."\n    return x+1'))
    assert num_nodes(function)==4                                                # return, +, x, 1
    assert list(expressions_per_line(ast.parse('y = x+1\n\nz')))==[4, 1]         # y, +, x, 1; z
    assert wide_lines('x'*121 + '\n' + '# %% ' + 'x'*120)==[1]


def test_no_line_is_over_120_columns():
    found = wide_places()
    assert not found, '\n'.join(f'{place}: {numbers}' for place,numbers in found.items())


def test_the_book_is_still_in_small_pieces(record_property):
    table = style_table()
    for measure,values in table.items():
        text = ' / '.join(map(format_value, values))
        record_property(measure, text)
        print(f'{measure:<66} {text}')

    def values(start): return next(v for measure,v in table.items() if measure.startswith(start))
    def first(start): return values(start)[0]
    # Reached on 2026-11-29; the aim is 25 / 80 (no function over 160) and 12 expressions a line.
    nodes_median, nodes_90, nodes_max = values('AST nodes')
    assert nodes_median<=37 and nodes_90<=88 and nodes_max<=195
    assert first('expressions per line')<=14
    assert first('lines joined')==0 and first('lambdas')==0
    assert first('comprehensions inside')<=12
    assert first('attributes first set')<=3          # `Option` sets those of its base class, fastcore's Param
    assert first('function length')<=10 and values('function length')[1]<=25
    assert first('functions of 40')<.02
    assert 60<=first('module length')<=260
    assert first('exported cell')<=13
    assert first('any code cell')<=8
    assert first('definition cells')>=.8
    assert first('public definitions')>=.5
    assert first('words per line')>=1 and values('words per line')[1]>=3
    assert values('pictures per chapter')[1]>=1
