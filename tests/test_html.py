"The report: whatever a name or a number may be, the page stays whole, says it, and loads nothing."
import base64, hashlib, html, math, re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.app.html import bar_chart, boxes_figure, command_list, heatmap_table, format_file_size, file_table, metric_cards, line_chart, html_page, figure_pairs, figure_row, html_table, axis_ticks, write_html_page

VOID = {'meta', 'link', 'br', 'hr', 'img', 'input'}
texts = st.text(st.characters(exclude_categories=('Cs', 'Cc')), max_size=20)
finite = st.floats(-1e9, 1e9)


class Reader(HTMLParser):
    "What is open, which words stand in which element, which addresses and scripts there are."
    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.addresses, self.names, self.events = [], [], [], set(), []
        self.feed(text)
        self.close()
        assert not self.open
    def handle_starttag(self, name, attrs):
        self.names.add(name)
        if name not in VOID: self.open.append(name)
        self.addresses += [v for k,v in attrs if k in ('href', 'src', 'srcset', 'action', 'data', 'xlink:href', 'poster')]
        self.events += [k for k,_ in attrs if k.startswith('on')]
    def handle_endtag(self, name): assert self.open.pop()==name
    def handle_data(self, data): self.words.append((self.open[-1] if self.open else '', data))
    def of(self, name): return [w for n,w in self.words if n==name]


@given(st.lists(st.dictionaries(texts, texts, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_table_says_what_it_was_given(rows):
    read = Reader(html_table(rows))
    columns = list(dict.fromkeys(k for r in rows for k in r))
    cells = [r[c] if c in r else '–' for r in rows for c in columns]
    assert ''.join(read.of('th'))==''.join(columns) and ''.join(read.of('td'))==''.join(cells)


@given(texts, texts, texts)
def test_no_text_becomes_markup(title, name, words):
    bad = f'{title}</td></style></script><img src=http://x onerror=alert(1)>"\' {name}'
    image = np.zeros((8,8,3), np.uint8)
    text = html_page(bad, {bad: [bad, html_table([{bad: bad}], bad), metric_cards({bad: bad}), line_chart({bad: [(0,1), (1,2)]}, bad, bad),
                            boxes_figure(image, [[0,0,4,4]], [0], [.5], [bad], bad), command_list([(bad, words)])]}, bad)
    read = Reader(text)
    assert not read.names & {'img', 'script', 'iframe', 'object'} and not read.events
    assert bad in read.of('title') and read.of('p').count(bad)==2 and bad in read.of('td')


def test_the_page_loads_nothing_and_knows_dark_and_narrow():
    image = np.random.default_rng(0).integers(0, 255, (40,30,3), np.uint8)
    picture = boxes_figure(image, [[1,2,30,20], [0,0,5,5]], [0,1], title='two')
    text = html_page('run', {'a': [figure_row(line_chart({'x': [(1,2)]}, 'one point'), figure_pairs([(picture, picture)]))]})
    read = Reader(text)
    assert {a.split(':')[0] if ':' in a else a[0] for a in read.addresses}=={'data', '#'}
    assert 'script' not in read.names and not re.search(r'@import|url\(', text)
    assert "default-src 'none'" in text and 'width=device-width' in text and 'color-scheme: light dark' in text
    assert set(re.findall(r'href="#(.*?)"', text))==set(re.findall(r'<section id="(.*?)"', text))


@given(finite, st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_few_ordered_and_inside(low, width, about):
    high = low+width
    if not high-low > 1e-9*max(abs(low), abs(high)): return     # nothing between neighbouring numbers
    found = axis_ticks(low, high, about)
    assert len(found)<=2*about+2 and found==sorted(set(found))
    assert all(low-1e-6*width-1e-9<=t<=high+1e-6*width+1e-9 for t in found)


@settings(deadline=None)
@given(st.dictionaries(texts, st.lists(st.tuples(st.integers(0, 500), st.floats()), max_size=12), max_size=4))
def test_a_chart_draws_any_history(lines):
    "NaN and infinite losses, single points, nothing at all: every coordinate that is drawn is a number inside the drawing."
    text = line_chart({k: [(x, y if not math.isfinite(y) else y%1e6) for x,y in v] for k,v in lines.items()}, 'loss')
    Reader(text)
    for points in re.findall(r'points="(.*?)"', text):
        for p in points.split():
            x,y = map(float, p.split(','))
            assert 46<=x<=346 and 8<=y<=166
    assert 'nan' not in text.lower() or 'nan' in ''.join(lines).lower()


def test_boxes_lie_where_they_should():
    text = boxes_figure(np.zeros((100,200,3), np.uint8), [[10,20,60,120]], [2], [.87], {2: 'cat'})
    assert 'viewBox="0 0 200 100"' in text and re.search(r'x="20.0" y="10.0" width="100.0" height="50.0"', text) and '>cat 0.87</text>' in text
    assert '<rect' not in boxes_figure(np.zeros((10,10,3), np.uint8))


def test_sizes_and_files(tmp_path):
    assert [format_file_size(n) for n in (1, 12_345, 999_000_000, 12_000_000_000_000)]==['1 byte', '12.3 kB', '999 MB', '12,000 GB']
    (tmp_path/'a b').mkdir()
    (tmp_path/'a b'/'x.tlt').write_bytes(bytes(2000))
    read = Reader(file_table({'model': tmp_path/'a b'/'x.tlt', 'folder': tmp_path/'a b'}, tmp_path))
    assert read.of('code')==['a b/x.tlt', 'a b'] and '2 kB' in read.of('td') and 'files: 1' in read.of('td')


def test_a_report_is_whole_or_absent(tmp_path):
    (tmp_path/'taken').write_text('')
    with pytest.raises(ValueError, match='is a file'): write_html_page(tmp_path/'taken'/'report.html', 'x', {})
    with pytest.raises(AttributeError): write_html_page(tmp_path/'report.html', 'x', None)
    assert [p.name for p in tmp_path.iterdir()]==['taken']
    assert Reader(write_html_page(tmp_path/'new'/'ü.html', 'ü', {'ö': ['ä']}).read_text(encoding='utf-8')).of('h1')==['ü']


def test_bars_and_squares_hold_any_text_and_number():
    bad = '</td><script>alert(1)</script>'
    text = html_page('x', {'t': [bar_chart({bad: (.5, bad), 'none': (0, ''), 'less': (-1, ''), 'odd': (math.nan, '')}, bad), heatmap_table([[0, 2], [0, 0]], [bad, 'b'], ['c', bad], bad)]})
    assert 'script' not in Reader(text).names
    assert [float(w) for w in re.findall(r'<rect[^>]*? width="(.*?)"', text)]==[170, 0, 0, 0]
    assert 'Nothing' not in bar_chart({}, 'empty') and Reader(bar_chart({}, 'empty'))


def test_only_the_script_that_was_given_may_run():
    text = html_page('x', {'t': [html_table([{'a': 1}], sortable=True)]}, script='let a = 1 < 2')
    digest = base64.b64encode(hashlib.sha256(b'let a = 1 < 2').digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text) and '<script>let a = 1 < 2</script>' in text
    assert 'script-src' not in html_page('x', {'t': [html_table([{'a': 1}], sortable=True)]})
