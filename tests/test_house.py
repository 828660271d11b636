"The house rules: imports run one way, importing changes nothing, notebooks and modules say the same."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'effdet_nb'
FOLDERS = ('core', 'detector', 'accel', 'data', 'evaluate', 'weights', 'train', 'prune', 'export', 'app')   # a module imports only from its left
OPTIONAL = {'matplotlib', 'pycocotools', 'tf2onnx', 'onnx', 'tensorboard', 'tensorrt', 'apache_beam', 'nbdev', 'IPython'} # never at the top of a module
HEAVY = {'tensorflow', 'keras', 'onnxruntime'}
LIGHT = ['core.files', 'core.console', 'detector.boxes', 'detector.images', 'detector.toy_data', 'detector.nms', 'detector.detections', 'data.classes', 'data.coco', 'data.tfrecord',
         'weights.encryption', 'weights.container', 'weights.model_file', 'train.fields', 'train.spec', 'app.command', 'app.cli']          # no TensorFlow in these
PURE = ['detector', 'train.optim']                # keras, never tensorflow

def hidden(p, top): return any(part[0] in '._' for part in p.relative_to(top).parts)
def notebooks(): return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p, NBS))
def modules(): return sorted(p for p in LIB.rglob('*.py') if p.name[0]!='_')
def dotted(p): return '.'.join(p.relative_to(LIB).with_suffix('').parts)
def code_cells(p): return [(i,''.join(c['source']),c) for i,c in enumerate(json.loads(p.read_text(encoding='utf-8'))['cells']) if c['cell_type']=='code']
def title(p): return str(p.relative_to(ROOT))

def chapter_order():
    "module → its place in the book, from the names of the notebooks that export to it."
    order = {}
    for p in notebooks():
        for _,src,_ in code_cells(p):
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', src, re.M): order[m[1]] = (FOLDERS.index(m[1].split('.')[0]), p.name)
    return order

def imported(node, module):
    "The full names that one import statement of a module asks for."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom): return []
    package = ['effdet_nb', *module.split('.')][:-node.level] if node.level else []
    base = '.'.join(package + ([node.module] if node.module else []))
    return [base] + [f'{base}.{a.name}' for a in node.names]

def top_nodes(tree):
    "Everything that runs when the module is imported: not the bodies of functions."
    stack = [tree]
    while stack:
        for n in ast.iter_child_nodes(stack.pop()):
            yield n
            if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): stack.append(n)

def wrong_way(module, names, order):
    "Of the names a module imports, those of ours that come later in the book, or are itself."
    ours = {n.removeprefix('effdet_nb.') for n in names if n.startswith('effdet_nb.')}
    return sorted(o for o in ours if o in order and order[o] >= order[module])

def forbidden(module, tops):
    "Of the packages at the top of a module, those it may not have there."
    bad = set(OPTIONAL)
    if module in LIGHT: bad |= HEAVY
    if module in PURE or module.split('.')[0] in PURE: bad |= {'tensorflow'}
    return sorted({t.split('.')[0] for t in tops} & bad)


def test_the_guards_can_fail():
    order = {'train.spec': (6,'02'), 'data.classes': (3,'01'), 'data.coco': (3,'02'), 'weights.model_file': (5,'02'), 'app.cli': (9,'08')}
    tree = ast.parse('import keras, matplotlib.pyplot as plt\nfrom ..data.coco import x\nfrom effdet_nb.app.cli import y\nfrom . import model_file\ndef f(): import onnx')
    names = [n for node in ast.walk(tree) for n in imported(node, 'weights.model_file')]
    assert wrong_way('weights.model_file', names, order)==['app.cli', 'weights.model_file']
    assert wrong_way('data.classes', names, order)==['app.cli', 'data.coco', 'weights.model_file']
    tops = [n for node in top_nodes(tree) for n in imported(node, 'weights.model_file')]
    assert forbidden('weights.model_file', tops)==['keras', 'matplotlib'] and forbidden('train.fit', tops)==['matplotlib']
    assert forbidden('detector.loss', ['tensorflow.data'])==['tensorflow']
    assert environment_touched(ast.parse('import os\nos.environ["A"] = "1"')) and not environment_touched(ast.parse('def f(): os.environ["A"]'))


@pytest.mark.parametrize('path', modules(), ids=title)
def test_imports_run_one_way(path):
    order, module = chapter_order(), dotted(path)
    assert module in order, f'{title(path)}: no notebook exports to it; delete it or find its chapter'
    names = [n for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) for n in imported(node, module)]
    assert not wrong_way(module, names, order), f'{title(path)} imports from its right or from a later chapter'


@pytest.mark.parametrize('path', modules(), ids=title)
def test_tops_of_modules_are_light(path):
    tops = [n for node in top_nodes(ast.parse(path.read_text(encoding='utf-8'))) for n in imported(node, dotted(path))]
    assert not forbidden(dotted(path), tops), f'{title(path)}: import these inside the functions that need them'
    assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name=='*' for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))))


def environment_touched(tree):
    "Names and attributes at the top of a module that stand for a change of the world."
    words = {'environ', 'putenv', 'seed', 'set_seed', 'set_random_seed', 'set_global_policy', 'basicConfig', 'set_verbosity', 'filterwarnings', 'simplefilter', 'chdir', 'set_memory_growth'}
    return {getattr(n, 'attr', getattr(n, 'id', '')) for n in top_nodes(tree) if not isinstance(getattr(n, 'ctx', None), ast.Store)} & words  # a dataclass may have a field `seed`

@pytest.mark.parametrize('path', modules(), ids=title)
def test_tops_of_modules_change_nothing(path):
    assert not environment_touched(ast.parse(path.read_text(encoding='utf-8')))


def test_importing_touches_no_environment():
    "In a fresh process: the light modules, all of them, leave environment, seeds, folder and warnings alone and bring no TensorFlow."
    light = [m for m in LIGHT if (LIB/f"{m.replace('.', '/')}.py").is_file()]
    code = f'''
import importlib, json, os, random, sys, warnings, logging
import numpy as np
def world(): return [dict(os.environ), random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), os.getcwd(), len(warnings.filters), len(logging.root.handlers), logging.root.level]
before = world()
import effdet_nb
for m in {light!r}: importlib.import_module('effdet_nb.' + m)
print(json.dumps(dict(same=world()==before, heavy=[m for m in {sorted(HEAVY | OPTIONAL)!r} if m in sys.modules])))'''
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
    for call in ('from nbdev.doclinks import nbdev_export as f', 'from nbdev.clean import nbdev_clean as f'):
        out = subprocess.run([sys.executable, '-c', f'{call}; f()'], cwd=to, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(to), IN_TEST=''))
        assert out.returncode==0, out.stderr
    return to

def differences(a, b, pattern):
    files = {p.relative_to(top) for top in (a, b) for p in top.rglob(pattern) if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}
    return sorted(str(f) for f in files if not (a/f).is_file() or not (b/f).is_file() or (a/f).read_bytes()!=(b/f).read_bytes())

def test_modules_are_in_step_with_notebooks(exported):
    assert not differences(LIB, exported/'effdet_nb', '*.py'), 'run nbdev_export'

def test_notebooks_are_clean(exported):
    assert not differences(NBS, exported/'nbs', '*.ipynb'), 'run nbdev_clean'


@pytest.mark.parametrize('path', notebooks(), ids=title)
def test_imports_have_their_own_cells(path):
    "Building the docs runs every cell with an import; one that does more would run half a page."
    mixed = []
    for i,src,_ in code_cells(path):
        if re.search(r'^#\|\s*eval:\s*false', src, re.M): continue
        try: body = ast.parse(src).body
        except SyntaxError: continue            # magics
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
        if len(kinds)==2: mixed.append(f'cell {i}: {src[:60]!r}')
    assert not mixed


def shown(cell):
    "What a reader sees of a cell's outputs, as text."
    for o in cell['outputs']:
        yield ''.join(o.get('text', ''))
        for kind,data in o.get('data', {}).items():
            if kind.startswith('text/'): yield ''.join(data)

@pytest.mark.parametrize('path', notebooks(), ids=title)
def test_kept_outputs_travel(path):
    "No error, no folder or address of one machine, no progress bar, no chatter; and small enough to read on the web."
    assert path.stat().st_size < 2**20
    for i,_,cell in code_cells(path):
        assert all(o['output_type']!='error' for o in cell['outputs']), f'cell {i} kept an error'
        text = '\n'.join(shown(cell))
        bad = re.findall(r'(?:/(?:tmp|home|root|Users)/|[A-Z]:\\Users)\S*|\d+%\|.*\||cuda_\w+\.cc:\d+|\w+Warning:|object at 0x[0-9a-f]+', text)
        assert not bad, f'cell {i}: {bad[:3]}'


def narrow(nb):
    "Whether a page leaves D0 narrower than it found it: `nbdev_test` runs several pages in one process."
    sizes = re.findall(r"^SCALING\['efficientdet-d0'\] = (\(.*?\))", '\n'.join(''.join(c['source']) for c in nb['cells']), re.M)
    return bool(sizes) and ast.literal_eval(sizes[-1]) != (512, 1.0, 1.0, 64, 3, 3)


@pytest.mark.parametrize('path', notebooks(), ids=title)
def test_pages_leave_the_networks_as_they_are(path): assert not narrow(json.loads(path.read_text()))


def test_a_page_that_leaves_them_changed_is_found():
    assert narrow({'cells': [{'source': ["SCALING['efficientdet-d0'] = (128, .35, .3, 16, 1, 1)  # small\n"]}]})


def test_every_chapter_is_in_the_sidebar():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    listed = [f for entry in site for f in ([entry] if isinstance(entry, str) else entry.get('contents', [entry.get('href')]))]
    assert sorted(listed)==sorted(p.relative_to(NBS).as_posix() for p in notebooks())


def test_packaging_has_one_source():
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    assert '[project]' not in text and '[tool.nbdev]' not in text      # settings.ini is the source
    assert 'include settings.ini' in (ROOT/'MANIFEST.in').read_text()  # so the source archive has it, and can be installed
    assert re.search(r'Apache License\s+Version 2.0', (ROOT/'LICENSE').read_text(encoding='utf-8'))
