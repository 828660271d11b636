"The rules of the house: imports run one way, importing changes nothing, notebooks and modules agree."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB, TESTS = ROOT/'nbs', ROOT/'effdet_nb', ROOT/'tests'

# The folders in the order of imports: a module imports only from its left, and in its own folder from earlier chapters.
FOLDERS = ('core', 'detector', 'accel', 'data', 'evaluate', 'weights', 'train', 'prune', 'export', 'app')

# Never at the top of a module:
OPTIONAL = {'matplotlib', 'pycocotools', 'tf2onnx', 'onnx', 'tensorboard', 'tensorrt', 'apache_beam', 'nbdev',
            'IPython', 'av'}
# Nor at the top of a light module, or of one in a light folder. These are imported by commands that have to start at
# once, by the processes of a conversion, and by programs that run or evaluate an exported file.
HEAVY = {'tensorflow', 'keras', 'onnxruntime'}
LIGHT = ('core', 'detector.boxes', 'detector.images', 'detector.toy_data', 'detector.anchors', 'detector.detections',
         'detector.nms', 'detector.tiles', 'data.classes', 'data.faults', 'data.coco_json', 'data.coco_checks',
         'data.coco', 'data.masks', 'data.validate', 'data.tfrecord', 'data.record', 'data.record_index',
         'data.shards', 'data.workers', 'data.conversion', 'data.convert', 'data.anchor_fit', 'data.label_set',
         'data.label_files', 'data.label_json', 'data.yolo_yaml', 'data.label_formats', 'data.sources',
         'data.image_groups', 'data.split', 'evaluate', 'weights.encryption', 'weights.container',
         'weights.model_file', 'train.fields', 'train.spec_text', 'train.spec', 'train.set_fields', 'export',
         'app.inference_files', 'app.inference_results', 'app.infer', 'app.bulk', 'app.video', 'app.video_inference',
         'app.html', 'app.model_evaluation', 'app.evaluation_page', 'app.quickstart_settings', 'app.options',
         'app.completion', 'app.command', 'app.demo', 'app.compare', 'app.tile_command', 'app.split_command',
         'app.inference_command', 'app.export_commands', 'app.cli')
# Keras, never TensorFlow, so that another Keras backend can run them:
PURE = ('detector', 'train.optim')

# Names that stand for a change of the process, forbidden at the top of a module:
SIDE_EFFECTS = {'environ', 'putenv', 'seed', 'set_seed', 'set_random_seed', 'set_global_policy', 'basicConfig',
                'set_verbosity', 'filterwarnings', 'simplefilter', 'chdir', 'set_memory_growth'}


def is_hidden(path, top): return any(part[0] in '._' for part in path.relative_to(top).parts)
def notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if not is_hidden(p, NBS))
def modules(): return sorted(p for p in LIB.rglob('*.py') if p.name[0]!='_')
def module_name(path): return '.'.join(path.relative_to(LIB).with_suffix('').parts)
def is_in(module, names): return module in names or module.split('.')[0] in names
def relative_path(path): return str(path.relative_to(ROOT))
def parse(path): return ast.parse(path.read_text(encoding='utf-8'))


def code_cells(path):
    "The code cells of a notebook as (position, source, cell)."
    for i,cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        if cell['cell_type']=='code': yield i, ''.join(cell['source']), cell


def exported_module(path):
    "The module a notebook exports to, or None."
    for _,source,_ in code_cells(path):
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', source, re.M)
        if found: return found[1]
    return None


def chapter_order():
    "{module: its place in the book}, from the folders and numbers of the notebooks."
    exported = {exported_module(p): p for p in notebooks()}
    return {m: (FOLDERS.index(m.split('.')[0]), p.name) for m,p in exported.items() if m}


def imported(node, module):
    "The full names that one import statement of a module names."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom): return []
    package = ['effdet_nb', *module.split('.')][:-node.level] if node.level else []
    base = '.'.join(package + ([node.module] if node.module else []))
    return [base] + [f'{base}.{a.name}' for a in node.names]


def all_imports(tree, module): return [name for node in ast.walk(tree) for name in imported(node, module)]
def top_imports(tree, module): return [name for node in top_nodes(tree) for name in imported(node, module)]


def top_nodes(tree):
    "Everything that runs when the module is imported: not the bodies of functions."
    stack = [tree]
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            yield node
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): stack.append(node)


def wrong_way(module, names, order):
    "Of the names a module imports, those of our modules that come later in the book, or are the module itself."
    ours = {n.removeprefix('effdet_nb.') for n in names if n.startswith('effdet_nb.')}
    return sorted(o for o in ours if o in order and order[o] >= order[module])


def forbidden(module, names):
    "Of the packages imported at the top of a module, those that may not be there."
    bad = set(OPTIONAL)
    if is_in(module, LIGHT): bad |= HEAVY
    if is_in(module, PURE): bad |= {'tensorflow'}
    return sorted({n.split('.')[0] for n in names} & bad)


def side_effects(tree):
    "Names and attributes at the top of a module that stand for a change of the process."
    used = [n for n in top_nodes(tree) if not isinstance(getattr(n, 'ctx', None), ast.Store)]   # a field may be `seed`
    return {getattr(n, 'attr', getattr(n, 'id', '')) for n in used} & SIDE_EFFECTS


def find_circle(arrows):
    "A circle in {module: modules it imports} as a list of modules, or None."
    done, path = set(), []
    def visit(module):
        if module in path: return [*path[path.index(module):], module]
        if module in done: return None
        path.append(module)
        circle = next(filter(None, map(visit, sorted(arrows.get(module, ())))), None)
        path.pop()
        done.add(module)
        return circle
    return next(filter(None, map(visit, sorted(arrows))), None)


EXAMPLE = '''
import keras, matplotlib.pyplot as plt
from ..data.coco import x
from effdet_nb.app.cli import y
from . import model_file
def f(): import onnx
'''

def test_the_checks_can_fail():
    order = {'train.spec': (6,'02'), 'data.classes': (3,'01'), 'data.coco': (3,'02'),
             'weights.model_file': (5,'02'), 'app.cli': (9,'08')}
    names = all_imports(ast.parse(EXAMPLE), 'weights.model_file')
    assert wrong_way('weights.model_file', names, order)==['app.cli', 'weights.model_file']
    assert wrong_way('data.classes', names, order)==['app.cli', 'data.coco', 'weights.model_file']
    tops = top_imports(ast.parse(EXAMPLE), 'weights.model_file')
    assert forbidden('weights.model_file', tops)==['keras', 'matplotlib']
    assert forbidden('train.fit', tops)==['matplotlib']
    assert forbidden('detector.loss', ['tensorflow.data'])==['tensorflow']
    assert side_effects(ast.parse('import os\nos.environ["A"] = "1"'))
    assert not side_effects(ast.parse('def f(): os.environ["A"]'))
    assert find_circle(dict(a={'b'}, b={'c'}, c={'b'}))==['b', 'c', 'b']
    assert not find_circle(dict(a={'b', 'c'}, b={'c'}))


def test_light_and_pure_name_modules_that_exist():
    known = set(chapter_order()) | set(FOLDERS)
    assert set(LIGHT) | set(PURE) <= known


@pytest.mark.parametrize('path', modules(), ids=relative_path)
def test_imports_run_one_way(path):
    order, module = chapter_order(), module_name(path)
    assert module in order, f'{relative_path(path)}: no notebook exports to it; delete it or find its chapter'
    bad = wrong_way(module, all_imports(parse(path), module), order)
    assert not bad, f'{relative_path(path)} imports from its right or from a later chapter'


def test_imports_have_no_circle_and_no_module_stands_outside_the_book():
    order = chapter_order()
    assert sorted(order)==sorted(map(module_name, modules()))
    names = {module_name(p): all_imports(parse(p), module_name(p)) for p in modules()}
    arrows = {m: {n.removeprefix('effdet_nb.') for n in found} & set(order) for m,found in names.items()}
    assert sum(map(len, arrows.values()))>100 and not find_circle(arrows)


@pytest.mark.parametrize('path', modules(), ids=relative_path)
def test_tops_of_modules_are_light(path):
    tree, module = parse(path), module_name(path)
    bad = forbidden(module, top_imports(tree, module))
    assert not bad, f'{relative_path(path)}: import {", ".join(bad)} inside the functions that need them'
    assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name=='*' for n in ast.walk(tree))


@pytest.mark.parametrize('path', modules(), ids=relative_path)
def test_tops_of_modules_change_nothing(path):
    assert not side_effects(parse(path))


PROBE = '''
import importlib, json, logging, os, random, sys, warnings
import numpy as np

def state():
    seeds = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist()
    return dict(os.environ), seeds, os.getcwd(), len(warnings.filters), logging.root.handlers[:], logging.root.level

before = state()
import effdet_nb
for module in {light}: importlib.import_module('effdet_nb.' + module)
print(json.dumps(dict(same=state()==before, heavy=[m for m in {heavy} if m in sys.modules])))
'''

def test_importing_changes_nothing():
    "In a new process, all light modules leave environment, seeds, folder and warnings alone and import no TensorFlow."
    light = [m for m in map(module_name, modules()) if is_in(m, LIGHT)]
    code = PROBE.format(light=light, heavy=sorted(HEAVY | OPTIONAL))
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert json.loads(out.stdout)==dict(same=True, heavy=[])
    assert not out.stderr


# --- notebooks

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the project in which everything was exported and cleaned again."
    to = tmp_path_factory.mktemp('house')/'copy'
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'effdet_nb'): shutil.copytree(ROOT/name, to/name, ignore=skip)
    for name in ('settings.ini', 'setup.py', '_quarto.yml', 'README.md'): shutil.copy(ROOT/name, to)
    env = os.environ | dict(PYTHONPATH=str(to), IN_TEST='')
    code = 'import nbdev.doclinks, nbdev.clean; nbdev.doclinks.nbdev_export(); nbdev.clean.nbdev_clean()'
    out = subprocess.run([sys.executable, '-c', code], cwd=to, capture_output=True, text=True, env=env)
    assert out.returncode==0, out.stderr
    return to


def files_below(folder, pattern):
    "{relative path: content} of the files below a folder."
    paths = [p for p in folder.rglob(pattern) if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def differences(a, b, pattern):
    "The files that differ between two folders, or are in one only."
    in_a, in_b = files_below(a, pattern), files_below(b, pattern)
    return sorted(f for f in in_a.keys() | in_b.keys() if in_a.get(f)!=in_b.get(f))


def test_modules_are_in_step_with_notebooks(exported):
    assert not differences(LIB, exported/'effdet_nb', '*.py'), 'run nbdev_export'


def test_notebooks_are_clean(exported):
    assert not differences(NBS, exported/'nbs', '*.ipynb'), 'run nbdev_clean'


def mixes_imports(source):
    "Whether a cell holds imports and other code."
    if re.search(r'^#\|\s*eval:\s*false', source, re.M): return False
    try: body = ast.parse(source).body
    except SyntaxError: return False            # magics
    return len({isinstance(n, (ast.Import, ast.ImportFrom)) for n in body})==2


@pytest.mark.parametrize('path', notebooks(), ids=relative_path)
def test_imports_have_their_own_cells(path):
    "Building the docs runs every cell with an import; one that does more would run half a page."
    mixed = [f'cell {i}: {source[:60]!r}' for i,source,_ in code_cells(path) if mixes_imports(source)]
    assert not mixed


def output_texts(cell):
    "The text a reader sees in the outputs of a cell."
    for output in cell['outputs']:
        yield ''.join(output.get('text', ''))
        for kind,data in output.get('data', {}).items():
            if kind.startswith('text/'): yield ''.join(data)


# A folder of one machine, a progress bar, TensorFlow's chatter, a warning, an address in memory
UNWANTED_OUTPUT = re.compile(r'(?:/(?:tmp|home|root|Users)/|[A-Z]:\\Users)\S*|\S*\btmp[a-z0-9_]{8}/\S*|\d+%\|.*\|'
                             r'|cuda_\w+\.cc:\d+|\w+Warning:|object at 0x[0-9a-f]+')
EMBEDDED = re.compile(r'base64,[A-Za-z0-9+/=]+')     # files in a page; the pattern above takes seconds for them

@pytest.mark.parametrize('path', notebooks(), ids=relative_path)
def test_kept_outputs_fit_every_machine(path):
    "No error, no folder or address of one machine, no progress bar, no chatter; and small enough to read on the web."
    assert path.stat().st_size < 2**20
    for i,_,cell in code_cells(path):
        assert all(o['output_type']!='error' for o in cell['outputs']), f'cell {i} kept an error'
        bad = UNWANTED_OUTPUT.findall(EMBEDDED.sub('', '\n'.join(output_texts(cell))))
        assert not bad, f'cell {i}: {bad[:3]}'


def is_variants(node): return getattr(node, 'id', getattr(node, 'attr', '')) == 'VARIANTS'


def changes_variants(node):
    "Whether a statement or call changes a row of the table of variants."
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Subscript) and is_variants(t.value) for t in node.targets)
    if not isinstance(node, ast.Call): return False
    name = getattr(node.func, 'attr', '')
    if name in ('update', 'pop', 'setdefault', 'clear', 'popitem'): return is_variants(node.func.value)
    return name in ('setitem', 'delitem') and any(map(is_variants, node.args))


def parsed_sources():
    "(file, syntax tree) of the cells of all notebooks and of all tests."
    for path in notebooks():
        for _,source,_ in code_cells(path):
            try: yield path, ast.parse(source)
            except SyntaxError: pass            # magics
    for path in sorted(TESTS.glob('*.py')): yield path, parse(path)


def test_a_change_of_the_variants_is_found():
    changes = ("VARIANTS['d0'] = (128, .3)", "efficientdet.VARIANTS.update(d0=1)", "patch.setitem(d.VARIANTS, 'd0', 1)")
    for code in changes:
        assert any(map(changes_variants, ast.walk(ast.parse(code))))
    assert not any(map(changes_variants, ast.walk(ast.parse("VARIANTS = {}\nv = VARIANTS['d0']"))))


def test_pages_and_tests_leave_the_variants_as_they_are():
    "A small network is the variant efficientdet-tiny; several pages and tests share one process."
    assert not {relative_path(p) for p,tree in parsed_sources() if any(map(changes_variants, ast.walk(tree)))}


def sidebar_groups():
    "[(title of a part or '', its notebooks)] in the order of the sidebar."
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
    for entry in site['sidebar']['contents']:
        if isinstance(entry, str): yield '', [entry]
        else: yield entry['section'], entry['contents']


def test_every_chapter_is_in_the_sidebar():
    listed = [notebook for _,group in sidebar_groups() for notebook in group]
    assert sorted(listed)==sorted(p.relative_to(NBS).as_posix() for p in notebooks())


def test_a_part_of_the_sidebar_is_a_folder_in_the_order_of_its_numbers():
    for title,group in sidebar_groups():
        folders = {Path(n).parent.name for n in group}
        assert len(folders)==1, f'{title}: {folders}'
        if folders & set(FOLDERS): assert group==sorted(group), title


def test_files_carry_the_names_of_their_modules():
    "nbs/detector/04_anchors.ipynb exports effdet_nb.detector.anchors."
    for path in notebooks():
        module = exported_module(path)
        if not module: continue
        folder, name = module.split('.')
        assert re.fullmatch(rf'{folder}/\d\d_{name}\.ipynb', path.relative_to(NBS).as_posix())


def test_packaging_has_one_source():
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    assert '[project]' not in text and '[tool.nbdev]' not in text      # settings.ini is the source
    assert 'include settings.ini' in (ROOT/'MANIFEST.in').read_text()  # so that the source archive can be installed
    assert re.search(r'Apache License\s+Version 2.0', (ROOT/'LICENSE').read_text(encoding='utf-8'))
