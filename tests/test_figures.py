"The images that other pages show are the figures that the chapters keep."
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tool(name):
    "A script of tools/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


copy_figures = tool('copy_figures')


@pytest.mark.parametrize('name', copy_figures.FIGURES)
def test_a_copied_figure_is_the_one_its_chapter_keeps(name):
    kept = copy_figures.kept_figure(*copy_figures.FIGURES[name])
    assert (ROOT/'nbs'/'images'/name).read_bytes() == kept, f'{name} is out of date. Run python tools/copy_figures.py'


def test_the_readme_is_made_from_the_home_page(tmp_path, monkeypatch):
    make_readme = tool('make_readme')
    page = make_readme.nbformat.read(ROOT/'nbs'/'index.ipynb', 4)
    monkeypatch.setattr(make_readme, 'IMAGES', tmp_path)
    parts = [part for part in make_readme.readme_parts(page) if part]
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    missing = [part[:80] for part in parts if part not in readme]
    assert not missing, f'README.md is out of date. Run python tools/make_readme.py: {missing}'
