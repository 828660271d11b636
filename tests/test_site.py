"""The docs site as a reader meets it: every page in a real browser, every link, search, dark mode, and a phone's width.

The site is what `make docs` left in _docs/. Screenshots of all pages at both widths go to _shots/."""
import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
import yaml
from conftest import skip_missing

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE, SHOTS = ROOT/'nbs', ROOT/'_docs', ROOT/'_shots'
DESKTOP, PHONE = (1400, 900), (390, 844)
REPOSITORY = 'https://github.com/effdet-nb/effdet_nb'


def is_page(path): return not any(part[0]=='_' for part in path.parts)
def pages(site): return sorted(p for p in site.rglob('*.html') if is_page(p.relative_to(site)))
def name_of(page, site): return page.relative_to(site).as_posix()


def sidebar():
    "The sidebar as [(title of a part, its notebooks)]; the home page is a part without a title."
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
    for entry in site['sidebar']['contents']:
        if isinstance(entry, str): yield '', [entry]
        else: yield entry['section'], entry['contents']


def address(notebook):
    "The page of a notebook, as a path in the site: `detector/04_anchors.ipynb` is `detector/anchors.html`."
    path = Path(notebook)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem)+'.html').as_posix()


@pytest.fixture(scope='module')
def site():
    "The folder of the built site."
    if not (SITE/'index.html').is_file(): skip_missing('docs site', 'make docs')
    return SITE


class PageLinks(HTMLParser):
    "Collects what a page refers to (`links`, and `parts` that it loads) and the `ids` that links can refer to."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.parts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag in ('img', 'script', 'iframe', 'source') and a.get('src'): self.parts.append(a['src'])
        if tag=='link' and a.get('href') and not self.is_navigation(a): self.parts.append(a['href'])

    @staticmethod
    def is_navigation(attrs):
        return bool({'search', 'index', 'next', 'prev', 'canonical'} & set(attrs.get('rel', '').split()))


def link_problem(target, page, read, is_part):
    "What is wrong with a link of a page, or None."
    url = urlsplit(target)
    if url.scheme in ('data', 'mailto'): return None
    if url.scheme or url.netloc: return 'comes from another server' if is_part else None
    file = (page.parent/unquote(url.path)).resolve() if url.path else page
    if not file.is_file(): return 'is not there'
    if url.fragment and file in read and unquote(url.fragment) not in read[file].ids: return 'has no such place'
    return None


def dead_links(site):
    "Links and parts of pages that lead nowhere, and parts that come from another server."
    read = {p: PageLinks(p.read_text(encoding='utf-8')) for p in pages(site)}
    for page, found in read.items():
        for target, is_part in [(t, False) for t in found.links]+[(t, True) for t in found.parts]:
            problem = link_problem(target, page, read, is_part)
            if problem: yield f'{name_of(page, site)}: {target} {problem}'


def test_dead_links_are_found(tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="top">x</h1><a href="b.html#here">b</a><a href="#gone">?</a>'
                                   '<a href="c.html">c</a><img src="p.png">'
                                   '<script src="https://example.org/x.js"></script>'
                                   '<a href="https://example.org">ok</a>')
    (tmp_path/'b.html').write_text('<p id="here"></p><a href="a.html#bottom"></a>')
    assert list(dead_links(tmp_path))==[
        'a.html: #gone has no such place', 'a.html: c.html is not there', 'a.html: p.png is not there',
        'a.html: https://example.org/x.js comes from another server', 'b.html: a.html#bottom has no such place']


def test_no_link_is_dead_and_nothing_comes_from_another_server(site):
    assert len(pages(site))>50
    dead = list(dead_links(site))
    assert not dead, '\n'.join(dead)


TEXTS = '[...document.querySelectorAll("article p, article li")].map(p => p.textContent.trim())'
PLAIN = 'p => [...p.childNodes].filter(n => n.nodeType==3).map(n => n.data).join("")'
DEFECTS = {   # what no page may have: a name and a script that lists offenders
    'images that did not load': '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)',
    'tables left as text': '[...document.querySelectorAll("article p")].map(p => p.textContent.trim())'
                           '.filter(t => /^\\|.*\\|$/s.test(t))',
    'Markdown left as text': TEXTS+'.filter(t => /^(:::|```|#+ )|\\$\\$|^\\s*#\\| /.test(t))',
    'links left as text': f'[...document.querySelectorAll("article p, article li")].map({PLAIN})'
                          '.filter(t => /\\]\\([^)]*/.test(t))',
    'no heading': '[...document.querySelectorAll("article h1")].length==1 ? [] : ["h1"]',
}


def shot(page, site, width): return SHOTS/f'{name_of(page, site)[:-5].replace("/", "-")}-{width}.png'


def page_defects(page, site, browser):
    "What is wrong with an open page: errors, requests to other servers, and the DEFECTS."
    yield from browser.errors
    for url in browser.requested_urls:
        if not url.startswith(('file:', 'data:', 'blob:')): yield f'requests {url}'
    if page.name=='search.html': return
    for what, script in DEFECTS.items():
        found = browser.evaluate_js(script)
        if found: yield f'{what}: {found[:3]}'


@pytest.mark.slow
def test_every_page_opens_without_defects_at_both_widths(site, browser):
    SHOTS.mkdir(exist_ok=True)
    for old in [*SHOTS.glob('*-desktop.png'), *SHOTS.glob('*-phone.png')]: old.unlink()
    bad = []
    for page in pages(site):
        browser.set_viewport(*DESKTOP)
        browser.errors.clear()
        browser.requested_urls.clear()
        browser.goto(page.as_uri())
        bad += [f'{name_of(page, site)}: {defect}' for defect in page_defects(page, site, browser)]
        browser.screenshot(shot(page, site, 'desktop'))
        browser.set_viewport(*PHONE, mobile=True)
        width = browser.evaluate_js('document.documentElement.scrollWidth')
        if width>PHONE[0]: bad.append(f'{name_of(page, site)}: {width} pixels wide on a phone of {PHONE[0]}')
        browser.screenshot(shot(page, site, 'phone'))
    assert not bad, '\n'.join(bad)
    assert all(shot(p, site, width).is_file() for p in pages(site) for width in ('desktop', 'phone'))


BAD_PAGE = '''<article><h1>x</h1><p>| a | b |\n|---|---|\n| 1 | 2 |</p><p>[<code>x</code>](#y)</p>
<img src="gone.png"><div style="width:700px">wide</div></article><script>nowhere()</script>'''

def test_the_browser_reports_defects(browser, tmp_path):
    "So that the silence of the pages above means something."
    (tmp_path/'bad.html').write_text(BAD_PAGE)
    browser.set_viewport(*PHONE, mobile=True)
    browser.errors.clear()
    browser.goto((tmp_path/'bad.html').as_uri())
    assert any('nowhere' in e for e in browser.errors) and any('ERR_FILE_NOT_FOUND' in e for e in browser.errors)
    for defect in ('images that did not load', 'tables left as text', 'links left as text'):
        assert browser.evaluate_js(DEFECTS[defect])
    assert not browser.evaluate_js(DEFECTS['no heading'])
    assert browser.evaluate_js('document.documentElement.scrollWidth')>PHONE[0]


def open_anchors(site, browser, **viewport):
    "Opens the chapter of the anchors at desktop width."
    browser.set_viewport(*DESKTOP, **viewport)
    browser.goto((site/'detector'/'anchors.html').as_uri())


WORDS = {   # what a reader may type, and the page that should be among the first results
    'anchors': 'detector/anchors.html', 'focal loss': 'detector/loss.html', 'NMS': 'detector/nms.html',
    'soft-NMS': 'detector/nms.html', 'EMA': 'train/optim.html', 'resume': 'train/checkpoints.html',
    'checkpoint': 'train/checkpoints.html', 'int8': 'export/quantize.html', 'KITTI': 'reference/formats.html',
    'ground truth': 'evaluate/ground_truth.html', 'letterbox': 'detector/images.html',
    'prune': 'prune/prune.html', 'TFRecord': 'data/tfrecord.html', 'overfit': 'train/overfit.html',
    'non-maximum suppression': 'detector/nms.html', 'average precision': 'evaluate/coco_metric.html',
}

def found_pages(browser, site, words):
    "The pages that the search finds, best first."
    browser.goto((site/'search.html').as_uri()+'?q='+quote(words))
    links = 'document.querySelectorAll("#search-results li > a")'
    assert browser.wait_for(f'{links}.length > 2'), f'the search for {words} found nothing'
    return [urlsplit(f).path for f in browser.evaluate_js(f'[...{links}].map(a => a.getAttribute("href"))')]


def test_search_finds_the_terms_of_the_field(site, browser):
    browser.set_viewport(*DESKTOP)
    browser.errors.clear()
    found = {words: found_pages(browser, site, words) for words in WORDS}
    assert not {words: found[words][:5] for words, page in WORDS.items() if page not in found[words][:5]}
    browser.goto((site/'search.html').as_uri()+'?q=zyzzyva')
    assert browser.wait_for('/did not match|no results/i.test(document.body.innerText)')
    assert not browser.errors


def test_each_part_begins_with_its_overview():
    parts = {title: notebooks for title, notebooks in sidebar() if re.match(r'[IVX]+\.|Appendix', title)}
    assert len(parts)>8
    assert not [title for title, notebooks in parts.items() if Path(notebooks[0]).name!='00_overview.ipynb']


def test_answers_of_exercises_are_folded(site, browser):
    browser.set_viewport(*DESKTOP)
    browser.goto((site/'detector'/'first_fit.html').as_uri())
    answers = '[...document.querySelectorAll("article details.dropdown")]'
    count = browser.evaluate_js(f'{answers}.length')
    titles = browser.evaluate_js(f'{answers}.map(a => a.querySelector("summary").innerText.trim())')
    assert count and titles==['Answer']*count
    shown = f'{answers}.filter(a => a.querySelector("p:not(.admonition-title)").checkVisibility())'
    assert browser.evaluate_js(f'{shown}.length')==0
    browser.evaluate_js(f'{answers}.forEach(a => a.querySelector("summary").click())')
    assert browser.wait_for(f'{shown}.length == {count}'), 'a click does not open the answer'


def test_the_glossary_links_each_term_to_a_page_and_is_in_order():
    cells = json.loads((NBS/'reference'/'glossary.ipynb').read_text(encoding='utf-8'))['cells']
    text = ''.join(cells[1]['source'])
    entries = re.findall(r'^\*\*(.+?)\*\*: .*\[.+?\]\(\.\./(.+?)\)$', text, re.M)
    terms = [term.lower() for term, _ in entries]
    assert len(terms)>60 and len(terms)==len(re.findall(r'^\*\*', text, re.M))
    assert terms==sorted(terms)
    assert not [file for _, file in entries if not (NBS/file).is_file()]


def test_every_page_has_a_search_button(site, browser):
    open_anchors(site, browser)
    browser.evaluate_js('[...document.querySelectorAll(".search-button__button")].find(b => b.offsetParent).click()')
    assert browser.wait_for('document.activeElement && document.activeElement.matches("input[type=search]")')


def test_the_page_can_be_dark(site, browser):
    background = 'getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3)'
    light = f'({background}.reduce((a, b) => +a + +b) / 3)'
    open_anchors(site, browser, dark=True)
    assert browser.wait_for(f'{light} < 60'), 'a reader who prefers dark pages got a light one'
    SHOTS.mkdir(exist_ok=True)
    browser.screenshot(SHOTS/'dark.png')
    browser.set_viewport(*DESKTOP)
    assert browser.wait_for(f'{light} > 200')
    browser.evaluate_js('document.querySelector(".theme-change-button[data-mode=dark]").click()')
    assert browser.wait_for(f'{light} < 60'), 'the button for the dark page did nothing'


def test_the_left_lists_parts_and_chapters_and_the_right_headings(site, browser):
    open_anchors(site, browser)
    captions = '[...document.querySelectorAll(".bd-sidebar-primary .caption-text")].map(e => e.textContent)'
    assert browser.evaluate_js(captions)==[title for title, _ in sidebar() if title]
    hrefs = '[...document.querySelectorAll(".bd-sidebar-primary .toctree-l1 > a")].map(a => a.href.split("#")[0])'
    chapters = [address(n) for _, notebooks in sidebar() for n in notebooks if n!='index.ipynb']
    assert browser.evaluate_js(hrefs)==[(site/c).as_uri() for c in chapters]
    headings = browser.evaluate_js('[...document.querySelectorAll("article h2")].map(h => h.firstChild.textContent)')
    entry = '.bd-sidebar-secondary .page-toc > ul > li'
    entries = browser.evaluate_js(f'[...document.querySelectorAll("{entry} > a, {entry} > ul > li > a")]'
                                  '.map(a => a.textContent.trim())')
    assert len(headings)>2 and [h for h in headings if h.strip() not in entries]==[]


@pytest.mark.parametrize('page', ['detector/boxes.html', 'data/convert.html', 'app/cli.html', 'accel/cpu_session.html'])
def test_the_sidebar_shows_the_current_page_wherever_the_reader_comes_from(site, browser, page):
    "The theme keeps the position of the sidebar from one page to the next."
    browser.set_viewport(1280, 900)
    for other in ('accel/fast_focal.html', 'detector/overview.html'):
        browser.goto((site/other).as_uri())
        browser.evaluate_js('document.querySelector(".bd-sidebar-primary").scrollTop = '
                            + ('1e6' if other.startswith('accel') else '0'))
        browser.goto((site/page).as_uri())
        entry = '[...document.querySelectorAll(".bd-sidebar-primary li.current > a")].pop().getBoundingClientRect()'
        assert browser.evaluate_js(f'{entry}.top >= 0 && {entry}.bottom <= innerHeight'), other


def test_previous_and_next_follow_the_sidebar(site):
    order = [address(n) for _, notebooks in sidebar() for n in notebooks]
    for before, page, after in zip(order, order[1:], order[2:]):
        text = (site/page).read_text(encoding='utf-8')
        for rel, wanted in (('prev', before), ('next', after)):
            href = re.search(rf'<link rel="{rel}" [^>]*href="([^"]+)"', text)[1]
            assert (site/page).parent.joinpath(href).resolve()==(site/wanted).resolve(), (page, rel)


def test_names_in_the_text_lead_to_their_definitions_and_these_to_the_source(site):
    text = (site/'detector'/'loss.html').read_text(encoding='utf-8')
    name = r'(?:<span[^>]*>)?<code[^>]*><span class="pre">detection_loss'
    assert re.search(rf'<a [^>]*href="#detection-loss">{name}', text)
    link = rf'class="source" href="{re.escape(REPOSITORY)}/blob/main/(effdet_nb/detector/loss\.py)#L(\d+)"'
    sources = re.findall(link, text)
    lines = (ROOT/sources[0][0]).read_text(encoding='utf-8').splitlines()
    assert len(sources)>3 and all(re.match(r'(def|class|@)', lines[int(n)-1].strip()) for _, n in sources)


def exported_definitions(notebook):
    "The first words of what a notebook exports: `def f`, `class C`."
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type']=='code' and re.search(r'^#\| *exports?\b', source, re.M):
            yield from re.findall(r'^(?:def|class) \w+', source, re.M)


def test_the_code_of_every_definition_is_on_its_page(site):
    "Private ones too: a page that only prints signatures cannot be followed."
    missing, seen = [], 0
    for notebook in (n for _, notebooks in sidebar() for n in notebooks):
        wanted = list(exported_definitions(NBS/notebook))
        page = (site/address(notebook)).read_text(encoding='utf-8')
        text = html.unescape(re.sub(r'<[^>]+>', '', page))
        missing += [f'{notebook}: {w}' for w in wanted if w not in text]
        seen += len(wanted)
    assert seen>800 and not missing, missing[:20]


def test_one_button_unfolds_the_code(site, browser):
    open_anchors(site, browser)
    unfolded = '[...document.querySelectorAll("article .cell details.hide")].filter(d => d.open).length'
    click = 'document.querySelector("button.code").click()'
    assert browser.evaluate_js(unfolded)==0
    browser.evaluate_js(click)
    assert browser.evaluate_js(unfolded)>5
    browser.evaluate_js(click)
    assert browser.evaluate_js(unfolded)==0


def diagram_images():
    "The folder of diagram images, and the file names the notebooks need."
    sys.path.insert(0, str(ROOT/'tools'))
    try: from draw_diagrams import DIAGRAM_FOLDER, find_diagrams
    finally: sys.path.pop(0)
    return DIAGRAM_FOLDER, set(find_diagrams())


def test_formulas_and_diagrams_are_drawn(site, browser):
    folder, wanted = diagram_images()
    present = {p.name for p in folder.glob('*.svg')}
    assert present==wanted, f'run tools/draw_diagrams.py: missing {wanted-present}, unused {present-wanted}'
    assert {p.name for p in (site/'_images').glob('*.svg')} >= wanted
    browser.set_viewport(*DESKTOP)
    browser.goto((site/'detector'/'loss.html').as_uri())
    formulas = browser.evaluate_js('[...document.querySelectorAll("article math")]'
                                   '.map(m => m.getBoundingClientRect()).map(r => [r.width, r.height])')
    assert len(formulas)>5 and all(w>0 and h>5 for w, h in formulas)
