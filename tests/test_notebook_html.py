"What objects show in a notebook: escaped names, images where they can be read, and a bar while a loop runs."
import IPython.display
import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image
from test_html import PageParser

import effdet_nb.core.console as console
from effdet_nb.core.fragments import image_tag
from effdet_nb.data.check import DataCheck
from effdet_nb.data.record_checks import DataProblem
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.record_index import Records
from effdet_nb.data.scan import scan_html, scan_records
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.toy_data import make_toy_dataset

NAMES = st.text(st.characters(exclude_categories=('Cs', 'Cc')), min_size=1, max_size=12)


@given(NAMES)
def test_names_of_classes_are_text(name):
    found = Detections([[1, 2, 3, 4]], [.5], [0], class_table=ClassTable((1,), (name,), 1))
    page = PageParser(found._repr_html_())
    assert name in page.text_of('td') and not page.events and 'script' not in page.names


@pytest.mark.parametrize('num', [0, 1, 20, 21, 500])
def test_detections_show_a_count_and_at_most_twenty_rows(num):
    boxes = np.tile([1, 2, 30, 40], (num, 1))
    page = PageParser(Detections(boxes, np.linspace(1, .1, num), np.zeros(num))._repr_html_())
    assert page.text_of('p')[0]==('1 object' if num==1 else f'{num:,} objects')
    assert len(page.text_of('td'))==6*min(num, 20)
    assert (f'and {num-20:,} more' in page.text_of('p'))==(num>20)


def test_images_are_shown_if_they_can_be_read(tmp_path):
    Image.new('RGB', (2000, 1000)).save(tmp_path/'a.png')
    (tmp_path/'b.png').write_bytes(b'no image')
    def shows_image(image): return '<img' in Detections([[1, 2, 3, 4]], [.5], [0], image=image)._repr_html_()
    assert shows_image(tmp_path/'a.png') and shows_image(np.zeros((9, 9, 3), np.uint8))
    for missing in (None, tmp_path/'b.png', tmp_path/'absent.png', tmp_path): assert not shows_image(missing)


@pytest.mark.parametrize('hw', [(1, 1), (10, 3000), (3000, 10), (320, 320), (500, 700)])
def test_images_are_small_and_their_text_is_escaped(hw):
    tag = image_tag(np.zeros((*hw, 3), np.uint8), '"><b>')
    assert PageParser(tag).names=={'img'} and len(tag)<5000


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    folder = make_toy_dataset(tmp_path_factory.mktemp('views'), num_train=6, num_val=1, image_hw=(64, 64))
    dataset_convert(folder/'train', folder/'train.json', folder/'records', 'train', num_shards=1, workers=1)
    return folder/'records'


def test_scans_and_checks_show_counts_and_images(records):
    scan = scan_records(Records.from_files(sorted(records.glob('train-*'))))
    page = PageParser(scan_html(scan, {1: '<b>', 2: '&'}))
    counts = np.unique(scan.labels, return_counts=True)[1]
    assert {'<b>', '&', *map(str, counts)} <= set(page.text_of('td')) and 'b' not in page.names
    check = DataCheck([DataProblem(True, 'training', 'a<b')], {'training': scan}, (64, 64), {})
    assert 'a<b' in PageParser(check._repr_html_()).text_of('td') and check._repr_html_().count('<img')==4


def test_a_scan_is_shown_although_its_records_are_gone(records, tmp_path):
    copy = tmp_path/'train-00000-of-00001.tfrecord'
    copy.write_bytes(sorted(records.glob('train-*'))[0].read_bytes())
    scan = scan_records(Records.from_files([copy]))
    copy.unlink()
    assert '<table' in scan._repr_html_() and '<img' not in scan._repr_html_()


@pytest.fixture
def displayed(monkeypatch):
    "What a notebook displays: a list of HTML texts, in order."
    texts = []
    class Handle:
        def update(self, content): texts.append(content.data)
    def display(content, display_id=None):
        texts.append(content.data)
        return Handle()
    monkeypatch.setattr(IPython.display, 'display', display)
    monkeypatch.setattr(console, '_is_notebook', lambda: True)
    monkeypatch.setattr(console, 'NOTEBOOK_REFRESH', 0)
    monkeypatch.setattr(console, 'NOTEBOOK_DELAY', 0)
    return texts


def test_a_bar_is_updated_and_removed(displayed, capsys):
    assert list(console.progress_bar('abc', desc='<letters>'))==list('abc')
    assert ['value="1" max="3"' in displayed[0], 'value="3" max="3"' in displayed[2], displayed[-1]]==[True, True, '']
    assert all('&lt;letters&gt;' in text for text in displayed[:-1])
    assert capsys.readouterr().err.startswith('<letters>: 3/3 (100%)')


def test_a_bar_of_unknown_length_and_of_a_failing_loop(displayed):
    assert list(console.progress_bar(x for x in 'ab'))==['a', 'b'] and '<progress ></progress>' in displayed[0]
    with pytest.raises(ZeroDivisionError):
        for x in console.progress_bar([1, 0], desc='divide'): 1/x
    assert len(displayed)>3


def test_a_short_loop_shows_nothing(displayed, monkeypatch, capsys):
    monkeypatch.setattr(console, 'NOTEBOOK_DELAY', 60)
    assert list(console.progress_bar(range(1000)))==list(range(1000))
    assert not displayed and not capsys.readouterr().err


def test_outside_a_notebook_no_bar_is_displayed():
    assert not console._is_notebook()
