"What counts as a stale output of a notebook."
import subprocess
import sys

import nbformat
import pytest
from hypothesis import given, strategies as st
from test_figures import ROOT, tool

check_outputs = tool('check_outputs')
is_same_text = check_outputs.is_same_text


@pytest.mark.parametrize('kept, new', [
    ('AP 0.512', 'AP 0.515'), ('[ 1.5 -2. ]', '[1.51 -2.]'), ('loss  9.8\nstep  12', 'loss 9.81\nstep 12'),
    ('largest difference 2.4e-07', 'largest difference 5.9e-08'), ('-0.0', '0.0')])
def test_rounding_and_alignment_are_no_difference(kept, new): assert is_same_text(kept, new)


@pytest.mark.parametrize('kept, new', [
    ('AP 0.512', 'AP 0.612'), ('12 boxes', '13 boxes'), ('12 boxes', '12 images'), ('[1 2]', '[12]'), ('a', ''),
    ('49,104 anchors', '49,105 anchors'), ('version 0.1.0', 'version 0.1.1'), ('1.5 2.5', '1.5'), ('nan', '0.5'),
    ('efficientdet-d0', 'efficientdet-d1'), ('1e-3', '1e-2'), ('1.0', '-1.0'), ('step 999', 'step 1000')])
def test_other_words_counts_and_results_are_differences(kept, new): assert not is_same_text(kept, new)


@given(st.integers(), st.integers())
def test_integers_are_compared_exactly(a, b):
    assert is_same_text(f'{a} boxes', f'{b} boxes')==(a==b)


@given(st.floats(.01, 1e6), st.floats(1.05, 10))
def test_floats_may_differ_by_two_percent(x, factor):
    assert is_same_text(f'loss {x:.6f}.', f'loss {x*1.01:.6f}.')
    assert not is_same_text(f'{x:.6f}', f'{x*factor:.6f}')


@given(st.text())
def test_a_text_is_the_same_as_itself(text): assert is_same_text(text, text)


def printed(text): return nbformat.v4.new_output('stream', name='stdout', text=text)
def shown(text, **kwargs): return nbformat.v4.new_output('display_data', {'text/plain': text, **kwargs})


def write_notebook(path, cells):
    "Writes a notebook of (source, kept outputs); the id of a cell is its number."
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(language='python', name='python3', display_name='p')))
    nb.cells = [nbformat.v4.new_code_cell(source, outputs=kept, id=f'cell-{i}') for i,(source,kept) in enumerate(cells)]
    nbformat.write(nb, path)


def run_tool(path, *options):
    command = [sys.executable, ROOT/'tools'/'check_outputs.py', '--path', path, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_notebook_with_outputs_of_its_cells_passes(tmp_path):
    write_notebook(tmp_path/'good.ipynb', [
        ('print(1)\nprint(2)', [printed('1\n'), printed('2\n')]),        # Jupyter may split what is printed
        ('import sys\nprint("warning", file=sys.stderr)', []),
        ('{"a": 1.50}', [shown("{'a': 1.5}")]),
        ('x = 3', []),
        ('print(x)\nx;      # shown by no notebook', [printed('3\n')]),
        ('import pathlib\npathlib.Path("a")', [shown("PosixPath('a')")]),
        ('#| varies\nimport time\ntime.time()', [shown('1.0')]),
        ('#| eval: false\n1/0', [printed('not run')]),
        ('#| slow\n1/0', [printed('not run')]),
        ('from IPython.display import HTML\nHTML("<b>new</b>")',
         [shown('<IPython.core.display.HTML object>', **{'text/html': '<b>kept</b>'})]),
    ])
    done = run_tool(tmp_path/'good.ipynb')
    assert done.returncode==0 and 'Success' in done.stdout, done.stderr


def test_every_stale_output_is_named(tmp_path):
    write_notebook(tmp_path/'stale.ipynb', [
        ('print("now")', [printed('before')]),           # 0
        ('1+1', [shown('2')]),
        ('[1, 2, 3]', [shown('[1, 2]')]),                # 2
        ('"an output that is not kept"', []),            # 3
        ('y = 1', [shown('1')]),                         # 4
        ('"<svg>"', [shown("'<svg>'")]),
    ])
    done = run_tool(tmp_path/'stale.ipynb', '--n_workers', '2')           # in another process
    named = [i for i in range(6) if f'cell cell-{i} ' in done.stderr]
    assert done.returncode==1 and named==[0, 2, 3, 4], done.stderr
    assert '-before' in done.stderr and '+now' in done.stderr and 'stale.ipynb' in done.stderr


def test_a_failing_cell_is_reported_as_by_nbdev_test(tmp_path):
    write_notebook(tmp_path/'failing.ipynb', [('print(1)', [printed('1\n')]), ('1/0', [])])
    done = run_tool(tmp_path/'failing.ipynb')
    assert done.returncode==1 and 'ZeroDivisionError' in done.stderr and 'keeps other text' not in done.stderr
