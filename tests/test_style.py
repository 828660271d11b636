"""What the chapters look like in numbers, the ones that admired literate code is measured by: sizes, nearness, words, pictures.

`pytest tests/test_style.py -s` prints them. The limits are wide on purpose: numbers are for noticing, and a page that reads better
another way may have others; they only fail when the whole book drifts."""
import ast
import json
import re
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'effdet_nb'
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def option(cell, name): return bool(re.search(rf'^#\|\s*{name}\b', source(cell), re.M))
def lines(text): return [l for l in text.splitlines() if l.strip() and not l.lstrip().startswith(('# %%', '#|'))]

def tree(cell):
    try: return ast.parse(source(cell)).body
    except SyntaxError: return []           # a cell with magics defines nothing for others

def notebooks():
    "{chapter or tutorial: cells}; a chapter exports a module."
    found = {p: cells_of(p) for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}
    chapters = {p: c for p,c in found.items() if any(option(x, 'default_exp') for x in c)}
    return chapters, {p: c for p,c in found.items() if 'tutorials' in p.parts}


def nearness(cells):
    "For each exported cell that defines something public: is the next code cell a use of it?"
    code = [c for c in cells if c['cell_type']=='code' and source(c).strip()]
    for c,after in zip(code, [*code[1:], None]):
        public = [n for n in tree(c) if isinstance(n, DEFINITION) and n.name[0]!='_']
        if option(c, 'export') and public: yield after is not None and not option(after, 'export')


def words_per_line(cells):
    "Words of prose for each line of code."
    prose = sum(len(re.sub(r'```.*?```', '', source(c), flags=re.S).split()) for c in cells if c['cell_type']=='markdown')
    return prose/max(1, sum(len(lines(source(c))) for c in cells if c['cell_type']=='code'))


def has_picture(cell):
    "Whether a cell keeps a picture."
    data = [o.get('data', {}) for o in cell.get('outputs', ())]
    return any('image/png' in d or 'image/svg+xml' in d or 'data:image/' in ''.join(d.get('text/html', ())) for d in data)


def pictures(cells):
    "Pictures a reader sees: kept outputs, diagrams, and images in the text."
    return sum(map(has_picture, cells)) + sum(len(re.findall(r'^```\{?mermaid|!\[', source(c), re.M)) for c in cells if c['cell_type']=='markdown')


def measured():
    "Our row of the table."
    chapters,tutorials = notebooks()
    modules = [p.read_text(encoding='utf-8') for p in LIB.rglob('*.py') if p.name[0]!='_']
    functions = [n.end_lineno-n.lineno+1 for m in modules for n in ast.walk(ast.parse(m)) if isinstance(n, DEFINITION[:2])]
    code = [c for cells in chapters.values() for c in cells if c['cell_type']=='code' and source(c).strip()]
    exported = [c for c in code if option(c, 'export')]
    defining = [len([n for n in tree(c) if isinstance(n, DEFINITION) and n.name[0]!='_']) for c in exported]
    near = [n for cells in chapters.values() for n in nearness(cells)]
    return {
        'functions, and modules': (len(functions), len(modules)),
        'function length, lines, median / 90%': (median(functions), np.percentile(functions, 90)),
        'functions of 40 lines or more, share': (np.mean(np.array(functions)>=40),),
        'module length, lines, median': (median(len(lines(m)) for m in modules),),
        'exported cell, lines, median / 90%': (median(len(lines(source(c))) for c in exported), np.percentile([len(lines(source(c))) for c in exported], 90)),
        'any code cell, lines, median': (median(len(lines(source(c))) for c in code),),
        'definition cells holding exactly one public definition': (np.mean([n==1 for n in defining if n]),),
        'public definitions followed at once by a use': (np.mean(near),),
        'words per line of code, chapters / tutorials, median': (median(map(words_per_line, chapters.values())), median(map(words_per_line, tutorials.values()))),
        'pictures per chapter, median / mean': (median(map(pictures, chapters.values())), np.mean([pictures(c) for c in chapters.values()])),
        'chapters without a picture': (sum(not pictures(c) for c in chapters.values()), len(chapters)),
    }


def test_pictures_that_are_drawn_are_kept():
    "A page that is run with a drawing library set to files (MPLBACKEND=agg) loses its pictures without a word."
    draws = re.compile(r'\b(show_(boxes|batch|scene)|plot_(?!history)\w+|plt\.subplots)\(')
    pages = {p: c for found in notebooks() for p,c in found.items()}
    lost = [f'{p.relative_to(ROOT)} {c["id"]}' for p,cells in pages.items() for c in cells if c['cell_type']=='code'
            and not option(c, 'export') and not option(c, 'hide') and draws.search(source(c)) and 'plt.close' not in source(c) and not has_picture(c)]
    assert not lost, 'run these pages again, with MPLBACKEND unset: ' + ', '.join(lost)


def test_the_measures_measure():
    def code(text, **more): return dict(cell_type='code', source=text, outputs=[], **more)
    def md(text): return dict(cell_type='markdown', source=text)
    cells = [code('#| default_exp x'), md('one two three'), code('#| export\ndef f(): return 1'), code('f()'), code('#| export\ndef g(): return 2'), code('#| export\ndef _h(): return 3'), md('![a](b.png)\n```\nnot words\n```')]
    assert list(nearness(cells))==[True, False] and pictures(cells)==1
    assert words_per_line(cells)==4/4
    assert lines('# %% x\n#| export\n\ndef f():\n    pass')==['def f():', '    pass']


def test_the_book_is_still_in_small_pieces(record_property):
    told = measured()
    for what,values in told.items():
        text = ' / '.join(f'{v:,}' if isinstance(v, int) else f'{v:.3g}' for v in values)
        record_property(what, text)
        print(f'{what:<58} {text}')
    def first(start): return next(v[0] for k,v in told.items() if k.startswith(start))
    assert told['function length, lines, median / 90%'][0]<=10 and told['function length, lines, median / 90%'][1]<=25
    assert first('functions of 40')<.02
    assert 60<=first('module length')<=260
    assert first('exported cell')<=12
    assert first('any code cell')<=8
    assert first('definition cells')>=.8
    assert first('public definitions')>=.5
    assert told['words per line of code, chapters / tutorials, median'][0]>=1 and told['words per line of code, chapters / tutorials, median'][1]>=3
    assert told['pictures per chapter, median / mean'][1]>=1
