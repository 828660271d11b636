"The reference pages show what the code says today, and the readers on the page of formats read what ours read."
import ast
import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.toy_data import make_toy_dataset
from effdet_nb.data.tfrecord import decode_example, read_records
from effdet_nb.weights.encryption import CHUNK_SIZE, encrypt
from effdet_nb.weights.model_file import load_etlt, load_model_file, save_etlt, save_model_file
from effdet_nb.train.fields import proto_schema

PAGES = Path(__file__).resolve().parents[1]/'nbs'/'reference'
KEY = 'nvidia_tlt'


def sources(page):
    return [''.join(c['source']) for c in json.loads((PAGES/page).read_text(encoding='utf-8'))['cells']
            if c['cell_type']=='code']

def definitions(page):
    "Imports of the world and functions of a page, as one program; nothing of ours is in it."
    parsed = [ast.parse(s) for s in sources(page)]
    keep = [n for tree in parsed for n in tree.body if isinstance(n, (ast.FunctionDef, ast.Import, ast.ImportFrom))]
    return ast.Module([n for n in keep
                       if not (isinstance(n, ast.ImportFrom)
                               and n.module.split('.')[0] in ('effdet_nb','fastcore','IPython'))], [])


@pytest.fixture(scope='module')
def readers():
    "The functions that stand on the page of formats."
    program = definitions('formats.ipynb')
    tops = {name.split('.')[0] for n in program.body if not isinstance(n, ast.FunctionDef)
            for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])}
    assert tops-set(sys.stdlib_module_names)=={'numpy', 'cryptography'}
    exec(compile(program, 'formats.ipynb', 'exec'), space := {})
    return space


def test_the_reader_of_model_files_is_short():
    source, = [s for s in sources('formats.ipynb') if 'def read_tlt' in s]
    assert 15<len(source.splitlines())<=35


@pytest.mark.parametrize('key', ['', KEY, 'ключ 🔑'])
def test_the_reader_on_the_page_reads_model_files(readers, tmp_path, key):
    rng = np.random.default_rng(0)
    weights = {'stem/conv/kernel': rng.normal(size=(3,3,64,200)).astype('f4'), 'half': rng.normal(size=5).astype('f2'),
               'a name/with %, é and 画/': np.arange(4), 'flag': np.array([True,False]), 'scalar': np.float64(1.5),
               'empty': np.zeros((0,3), 'f4'), 'complex': np.array([1j], 'c8'),
               'fortran': np.asfortranarray(rng.normal(size=(4,5)))}
    meta = dict(arch=dict(name='efficientdet-d0', image_hw=[128,128]),
                classes=dict(ids=[1,7], names=['é','狗'], num_classes=3), history=[dict(loss=1.5, AP=None)])
    save_model_file(tmp_path/'m.tlt', weights, meta, key, ema={'half': weights['half']*2},
                    optimizer={'0000 velocity': np.ones(3)})
    assert (tmp_path/'m.tlt').stat().st_size>4*CHUNK_SIZE
    told, arrays = readers['read_tlt'](tmp_path/'m.tlt', key)
    ours = load_model_file(tmp_path/'m.tlt', key)
    assert told==ours.meta==meta and set(arrays)=={'weights','ema','optimizer'}
    for group, named in arrays.items():
        assert list(named)==list(getattr(ours, group))
        for n, a in named.items():
            assert a.dtype==getattr(ours, group)[n].dtype and np.array_equal(a, getattr(ours, group)[n])
    assert np.array_equal(arrays['weights']['stem/conv/kernel'], weights['stem/conv/kernel'])


def test_the_reader_refuses_a_wrong_key_and_damage(readers, tmp_path):
    data = save_model_file(tmp_path/'m.tlt', {'w': np.arange(50_000)}, {}, KEY).read_bytes()
    with pytest.raises(ValueError, match='not the key'): readers['read_tlt'](tmp_path/'m.tlt', KEY+' ')
    for at in (20, 70, len(data)-1):
        (tmp_path/'bad.tlt').write_bytes(data[:at] + bytes([data[at]^1]) + data[at+1:])
        with pytest.raises(Exception): readers['read_tlt'](tmp_path/'bad.tlt', KEY)     # noqa: B017  a short reader
    (tmp_path/'cut.tlt').write_bytes(data[:64+CHUNK_SIZE+16])
    with pytest.raises(Exception): readers['read_tlt'](tmp_path/'cut.tlt', KEY)         # noqa: B017


@pytest.mark.parametrize('length', [0, 1, 15, 16, 17, 32, 33])
def test_the_last_chunk_is_where_the_page_says(readers, length):
    data = bytes(range(length))
    assert readers['decrypt'](encrypt(data, KEY, 16), KEY)==data


@pytest.mark.parametrize('key', ['', KEY])
def test_the_reader_on_the_page_reads_exported_files(readers, tmp_path, key):
    save_etlt(tmp_path/'m.etlt', b'\x08\x08'+bytes(range(256))*300, key)
    assert readers['read_etlt'](tmp_path/'m.etlt', key)==load_etlt(tmp_path/'m.etlt', key)


def test_the_reader_on_the_page_reads_records(readers, tmp_path):
    make_toy_dataset(tmp_path/'shapes', num_train=6, num_val=1, image_hw=(64,96), seed=3)
    made = dataset_convert(tmp_path/'shapes'/'train', tmp_path/'shapes'/'train.json', tmp_path/'records', 'train',
                           num_shards=2, workers=1)
    counts = []
    for shard in made.files:
        data = readers['records'](shard)
        assert data==list(read_records(shard))
        for record in data:
            page, ours = readers['example'](record), decode_example(record)
            counts.append(len(ours['labels']))
            assert page['image/encoded']==[ours['image']] and page['image/width']==[96]
            assert page['image/key/sha256'][0].decode()==ours['sha256']
            assert list(page['image/object/class/label'])==ours['labels'].tolist()
            assert list(page['image/object/is_crowd'])==ours['is_crowd'].tolist()
            assert [o.decode() for o in page['image/object/class/text']]==ours['names']
            for i, edge in enumerate(('ymin','xmin','ymax','xmax')):
                np.testing.assert_allclose(np.array(page[f'image/object/bbox/{edge}'])*(96 if edge[0]=='x' else 64),
                                           ours['boxes'][:,i], rtol=1e-6)
    assert len(counts)==6 and min(counts)==0<max(counts)         # a picture without objects was among them


def texts(nb):
    "The output of each cell of a notebook as text, without colours and times, whatever the pieces in which it arrived."
    def said(o):
        return '' if o.get('name')=='stderr' else ''.join(o.get('text') or o.get('data', {}).get('text/markdown')
                                                          or o.get('data', {}).get('text/plain') or '')
    for cell in nb['cells']: yield ' '.join(''.join(map(said, cell.get('outputs', ()))).split())


@pytest.mark.parametrize('page',
                         ['reference/spec', 'reference/commands', 'reference/formats', 'tutorials/coming_from_tao',
                          'app/*_cli'])
def test_pages_show_what_the_code_says_today(page, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.setenv('PYTHONPATH',
                       os.pathsep.join(filter(None, [str(PAGES.parents[1]), os.environ.get('PYTHONPATH', '')])))
    kept = nbformat.read(next(PAGES.parent.glob(f'{page}.ipynb')), 4)      # chapters are numbered
    kept.cells = [c for c in kept.cells if '#| slow' not in c.source]
    fresh = NotebookClient(copy.deepcopy(kept), timeout=120, kernel_name='python3',
                           resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert list(texts(kept))==list(texts(fresh)), f'nbs/{page}.ipynb shows what was true once: run it again and save'


def test_the_schema_to_download_is_the_one_of_the_spec():
    schema = (PAGES/'effdet_nb.proto').read_text(encoding='utf-8')
    assert schema==proto_schema(), 'run nbs/reference/spec.ipynb, which writes it'
