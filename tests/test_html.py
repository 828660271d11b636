"HTML pages: whatever a name or a number is, the page stays well-formed, shows it, and loads nothing."
import base64
import hashlib
import html
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from effdet_nb.app.html import (
    boxes_figure, chart_figure, command_list, figure_pairs, figure_row, file_table, format_file_size, heatmap_table,
    html_page, html_table, metric_cards, write_html_page)
from effdet_nb.evaluate.error_analysis import plot_errors
from effdet_nb.train.callbacks import plot_history

VOID_ELEMENTS = {'meta', 'link', 'br', 'hr', 'img', 'input'}
ADDRESS_ATTRIBUTES = {'href', 'src', 'srcset', 'action', 'data', 'xlink:href', 'poster'}
texts = st.text(st.characters(exclude_categories=('Cs', 'Cc')), max_size=20)


class PageParser(HTMLParser):
    "Follows open elements; collects the text of each element, addresses, and event attributes."
    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.addresses, self.names, self.events = [], [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attrs):
        self.names.add(name)
        if name not in VOID_ELEMENTS: self.open.append(name)
        for key, value in attrs:
            if key in ADDRESS_ATTRIBUTES: self.addresses.append(value)
            if key.startswith('on'): self.events.append(key)

    def handle_endtag(self, name): assert self.open.pop()==name
    def handle_data(self, data): self.words.append((self.open[-1] if self.open else '', data))
    def text_of(self, name): return [text for element, text in self.words if element==name]


def svg_of(figure):
    "The SVG that matplotlib drew, parsed."
    data = re.search(r'data:image/svg\+xml;base64,([^"]*)"', figure)[1]
    return ET.fromstring(base64.b64decode(data))


@given(st.lists(st.dictionaries(texts, texts, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_table_shows_every_value(rows):
    page = PageParser(html_table(rows))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [row.get(column, '–') for row in rows for column in columns]
    assert ''.join(page.text_of('th'))==''.join(columns)
    assert ''.join(page.text_of('td'))==''.join(cells)


@settings(deadline=None)
@given(texts, texts, texts)
def test_no_text_becomes_markup(title, name, words):
    bad = f'{title}</td></style></script><img src=http://x onerror=alert(1)>"\' {name}'
    fragments = [
        bad, html_table([{bad: bad}], bad), metric_cards({bad: bad}), figure_row(bad), command_list([(bad, words)]),
        boxes_figure(np.zeros((8,8,3), np.uint8), [[0,0,4,4]], [0], [.5], [bad], bad)]
    page = PageParser(html_page(bad, {bad: fragments}, bad))
    assert not page.names & {'img', 'script', 'iframe', 'object'} and not page.events
    assert bad in page.text_of('title') and page.text_of('p').count(bad)==2 and bad in page.text_of('td')


@settings(deadline=None, max_examples=25)
@given(st.text(st.characters(categories=('L', 'N', 'P', 'S', 'Zs')), max_size=20))
def test_text_in_a_chart_stays_text(words):
    "Markup, mathematics and any script: the text in the drawing is the text that was given."
    bad = f'$x$ </text></svg><script>alert(1)</script> {words}'
    def draw(figure): figure.subplots().set_title(bad)
    figure = chart_figure(draw, bad)
    assert not PageParser(figure).names & {'img', 'script'} and bad in PageParser(figure).text_of('figcaption')
    drawn = [''.join(element.itertext()) for element in svg_of(figure).iter('{http://www.w3.org/2000/svg}text')]
    assert bad.split() in [text.split() for text in drawn]


@pytest.mark.parametrize('name', ['a\x01b', 'a\x1b[31mb', 'a\ufffeb'])
def test_a_chart_is_valid_xml_whatever_its_names_contain(name):
    svg = svg_of(chart_figure(lambda figure: figure.subplots().set_title(name), 'x'))
    shown = re.sub('[^\\w\\[]', '\ufffd', name)
    assert shown in [''.join(element.itertext()).strip() for element in svg.iter()]


def test_the_page_loads_nothing_and_supports_dark_mode_and_phones():
    image = np.random.default_rng(0).integers(0, 255, (40,30,3), np.uint8)
    figure = boxes_figure(image, [[1,2,30,20], [0,0,5,5]], [0,1], title='two')
    chart = chart_figure(lambda figure: figure.subplots().plot([1], [2], 'o'), 'one point')
    text = html_page('run', {'a': [figure_row(chart, figure_pairs([(figure, figure)]))]})
    page = PageParser(text)
    assert {a.split(':')[0] if ':' in a else a[0] for a in page.addresses}=={'data', '#'}
    assert 'script' not in page.names and not re.search(r'@import|url\(', text)
    assert "default-src 'none'" in text and 'width=device-width' in text and 'color-scheme: light dark' in text
    assert set(re.findall(r'href="#(.*?)"', text))==set(re.findall(r'<section id="(.*?)"', text))
    drawing = ET.tostring(svg_of(chart), encoding='unicode')
    assert not re.findall(r'(?:href|src)="(?!#)', drawing) and '@import' not in drawing and '<script' not in drawing


@settings(deadline=None, max_examples=12)
@given(st.lists(st.floats(), max_size=12))
@example([])
@example([math.nan])
@example([math.inf, -math.inf, 1., math.nan])
def test_a_chart_draws_any_history(losses):
    "NaN and infinite losses, single epochs, none at all: every coordinate that is drawn is a finite number."
    history = []
    for epoch, loss in enumerate(losses, 1):
        loss = loss%1e6 if math.isfinite(loss) else loss
        history.append(dict(epoch=epoch, loss=loss, cls_loss=loss, box_loss=loss, AP=.5, AP50=.7))
    svg = svg_of(chart_figure(lambda figure: plot_history(history, figure), 'loss'))
    paths = [element.get('d') for element in svg.iter('{http://www.w3.org/2000/svg}path')]
    assert paths and not any(re.search('nan|inf', path) for path in paths if path)


def test_a_chart_is_vector_or_pixels():
    def draw(figure): figure.subplots().plot([1, 2], [3, 4])
    assert 'data:image/svg+xml;base64,' in chart_figure(draw, 'lines')
    assert 'data:image/png;base64,' in chart_figure(draw, 'points', vector=False)


def test_boxes_are_drawn_at_their_coordinates():
    figure = boxes_figure(np.zeros((100,200,3), np.uint8), [[10,20,60,120]], [2], [.87], {2: 'cat'})
    assert 'viewBox="0 0 200 100"' in figure and '>cat 0.87</text>' in figure
    assert re.search(r'x="20.0" y="10.0" width="100.0" height="50.0"', figure)
    assert '<rect' not in boxes_figure(np.zeros((10,10,3), np.uint8))


def test_file_sizes_and_relative_paths_are_shown(tmp_path):
    sizes = [format_file_size(n) for n in (1, 12_345, 999_000_000, 12_000_000_000_000)]
    assert sizes==['1 byte', '12.3 kB', '999 MB', '12,000 GB']
    (tmp_path/'a b').mkdir()
    (tmp_path/'a b'/'x.tlt').write_bytes(bytes(2000))
    page = PageParser(file_table({'model': tmp_path/'a b'/'x.tlt', 'folder': tmp_path/'a b'}, tmp_path))
    assert page.text_of('code')==['a b/x.tlt', 'a b']
    assert '2 kB' in page.text_of('td') and 'files: 1' in page.text_of('td')


def test_a_report_is_complete_or_absent(tmp_path):
    (tmp_path/'taken').write_text('')
    with pytest.raises(ValueError, match='is a file'): write_html_page(tmp_path/'taken'/'report.html', 'x', {})
    with pytest.raises(TypeError): write_html_page(tmp_path/'report.html', 'x', None)
    assert [p.name for p in tmp_path.iterdir()]==['taken']
    path = write_html_page(tmp_path/'new'/'ü.html', 'ü', {'ö': ['ä']})
    assert PageParser(path.read_text(encoding='utf-8')).text_of('h1')==['ü']


def test_bars_and_heatmaps_accept_any_text_and_number():
    bad = '</td><script>alert(1)</script>'
    errors = [dict(kind=bad, cost=.5, count=3), dict(kind='none', cost=0, count=0),
              dict(kind='odd', cost=math.nan, count=0)]
    bars = chart_figure(lambda figure: plot_errors(errors, figure.subplots()), bad)
    heatmap = heatmap_table([[0, 2], [0, 0]], [bad, 'b'], ['c', bad], bad)
    assert 'script' not in PageParser(html_page('x', {'t': [bars, heatmap]})).names
    assert PageParser(heatmap).text_of('td')==['2']
    assert svg_of(bars) is not None


def test_only_the_given_script_may_run():
    table = html_table([{'a': 1}], sortable=True)
    text = html_page('x', {'t': [table]}, script='let a = 1 < 2')
    digest = base64.b64encode(hashlib.sha256(b'let a = 1 < 2').digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text) and '<script>let a = 1 < 2</script>' in text
    assert 'script-src' not in html_page('x', {'t': [table]})
