"""The docs site as a reader meets it: every page in a real browser, every link, search, dark mode, and the width of a phone.

The site is what `make docs` left in _docs/. Pictures of all pages at both widths go to _shots/."""
import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from conftest import skip_missing

ROOT = Path(__file__).resolve().parents[1]
SITE, SHOTS = ROOT/'_docs', ROOT/'_shots'
DESKTOP, PHONE = (1400, 900), (390, 844)


def pages(site): return sorted(p for p in site.rglob('*.html') if not any(part[0]=='_' for part in p.relative_to(site).parts))
def named(p, site): return p.relative_to(site).as_posix()


@pytest.fixture(scope='module')
def site():
    "The built site."
    if not (SITE/'index.html').is_file(): skip_missing('docs site', 'make docs')
    return SITE


class Links(HTMLParser):
    "What a page refers to and what can be referred to in it."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.parts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag in ('img', 'script', 'iframe', 'source') and a.get('src'): self.parts.append(a['src'])
        if tag=='link' and a.get('href') and not {'search', 'index', 'next', 'prev', 'canonical'} & set(a.get('rel', '').split()): self.parts.append(a['href'])


def dead_links(site):
    "Links and parts of pages that lead nowhere, and parts that come from elsewhere."
    read = {p: Links(p.read_text(encoding='utf-8')) for p in pages(site)}
    for page, found in read.items():
        for to, part in [(l, False) for l in found.links]+[(l, True) for l in found.parts]:
            u = urlsplit(to)
            if u.scheme in ('data', 'mailto'): continue
            if u.scheme or u.netloc:
                if part: yield f'{named(page, site)}: {to} comes from another server'
                continue
            target = (page.parent/unquote(u.path)).resolve() if u.path else page
            if not target.is_file(): yield f'{named(page, site)}: {to} is not there'
            elif u.fragment and target in read and unquote(u.fragment) not in read[target].ids: yield f'{named(page, site)}: {to} has no such place'


def test_dead_links_are_found(tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="top">x</h1><a href="b.html#here">b</a><a href="#gone">?</a><a href="c.html">c</a><img src="p.png"><script src="https://example.org/x.js"></script><a href="https://example.org">fine</a>')
    (tmp_path/'b.html').write_text('<p id="here"></p><a href="a.html#bottom"></a>')
    assert list(dead_links(tmp_path))==['a.html: #gone has no such place', 'a.html: c.html is not there', 'a.html: p.png is not there', 'a.html: https://example.org/x.js comes from another server', 'b.html: a.html#bottom has no such place']


def test_no_link_is_dead_and_nothing_comes_from_elsewhere(site):
    assert len(pages(site))>50
    assert not (dead := list(dead_links(site))), '\n'.join(dead)


WRONG = {   # what no page may have: a name and a script that lists offenders
    'pictures that did not load': '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)',
    'tables that stayed text': '[...document.querySelectorAll("article p")].map(p => p.textContent.trim()).filter(t => /^\\|.*\\|$/s.test(t))',
    'Markdown that stayed text': '[...document.querySelectorAll("article p, article li")].map(p => p.textContent.trim()).filter(t => /^(:::|```|#+ )|\\$\\$|^\\s*#\\| /.test(t))',
    'links that stayed text': '[...document.querySelectorAll("article p, article li")].map(p => [...p.childNodes].filter(n => n.nodeType==3).map(n => n.data).join("")).filter(t => /\\]\\([^)]*/.test(t))',
    'no heading': '[...document.querySelectorAll("article h1")].length==1 ? [] : ["h1"]',
}

def test_every_page_opens_without_complaint_at_both_widths(site, browser):
    SHOTS.mkdir(exist_ok=True)
    for old in SHOTS.glob('*.png'): old.unlink()
    bad = []
    for page in pages(site):
        name = named(page, site)
        browser.size(*DESKTOP)
        browser.said.clear(), browser.asked.clear()
        browser.open(page.as_uri())
        bad += [f'{name}: {s}' for s in browser.said] + [f'{name}: asks for {u}' for u in browser.asked if not u.startswith(('file:', 'data:', 'blob:'))]
        if name!='search.html': bad += [f'{name}: {what}: {found[:3]}' for what, script in WRONG.items() if (found := browser.run(script))]
        browser.shot(SHOTS/f'{name[:-5].replace("/", "-")}-desktop.png')
        browser.size(*PHONE, mobile=True)
        if (wide := browser.run('document.documentElement.scrollWidth'))>PHONE[0]: bad.append(f'{name}: {wide} pixels wide on a phone of {PHONE[0]}')
        browser.shot(SHOTS/f'{name[:-5].replace("/", "-")}-phone.png')
    assert not bad, '\n'.join(bad)
    assert len(list(SHOTS.glob('*.png')))==2*len(pages(site))


def test_the_browser_tells_what_is_wrong(browser, tmp_path):
    "So the silence of the pages above means something."
    (tmp_path/'bad.html').write_text('<article><h1>x</h1><p>| a | b |\n|---|---|\n| 1 | 2 |</p><p>[<code>x</code>](#y)</p><img src="gone.png"><div style="width:700px">wide</div></article><script>nowhere()</script>')
    browser.size(*PHONE, mobile=True)
    browser.said.clear()
    browser.open((tmp_path/'bad.html').as_uri())
    assert any('nowhere' in s for s in browser.said) and any('ERR_FILE_NOT_FOUND' in s for s in browser.said)
    assert browser.run(WRONG['pictures that did not load']) and browser.run(WRONG['tables that stayed text']) and browser.run(WRONG['links that stayed text']) and not browser.run(WRONG['no heading'])
    assert browser.run('document.documentElement.scrollWidth')>PHONE[0]


def test_search_finds_anchors(site, browser):
    browser.size(*DESKTOP)
    browser.open((site/'search.html').as_uri()+'?q=anchors')
    assert browser.until('document.querySelectorAll("#search-results li a").length > 2'), 'the search found nothing'
    found = browser.run('[...document.querySelectorAll("#search-results li > a")].map(a => a.getAttribute("href"))')
    assert any(urlsplit(f).path=='model/anchors.html' for f in found[:5]), found[:5]
    browser.open((site/'search.html').as_uri()+'?q=zyzzyva')
    assert browser.until('/did not match|no results/i.test(document.body.innerText)')


def test_search_can_be_reached_from_every_page(site, browser):
    browser.size(*DESKTOP)
    browser.open((site/'model'/'anchors.html').as_uri())
    browser.run('[...document.querySelectorAll(".search-button__button")].find(b => b.offsetParent).click()')
    assert browser.until('document.activeElement && document.activeElement.matches("input[type=search]")')


def test_the_page_can_be_dark(site, browser):
    light = '(c => c.slice(0, 3).reduce((a, b) => +a + +b) / 3)(getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g))'
    browser.size(*DESKTOP, dark=True)
    browser.open((site/'model'/'anchors.html').as_uri())
    assert browser.until(f'{light} < 60'), 'a reader who likes it dark got a light page'
    browser.shot(SHOTS/'dark.png')
    browser.size(*DESKTOP)
    assert browser.until(f'{light} > 200')
    browser.run('document.querySelector(".theme-change-button[data-mode=dark]").click()')
    assert browser.until(f'{light} < 60'), 'choosing the dark page did nothing'


def test_contents_are_on_the_left_by_wing_and_on_the_right_by_heading(site, browser):
    browser.size(*DESKTOP)
    browser.open((site/'model'/'anchors.html').as_uri())
    wings = [e['section'] for e in yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'] if 'section' in e]
    assert browser.run('[...document.querySelectorAll(".bd-sidebar-primary .caption-text")].map(e => e.textContent)')==wings
    headings = browser.run('[...document.querySelectorAll("article h2")].map(h => h.firstChild.textContent)')
    shown = browser.run('[...document.querySelectorAll(".bd-sidebar-secondary .page-toc > ul > li > a, .bd-sidebar-secondary .page-toc > ul > li > ul > li > a")].map(a => a.textContent.trim())')
    assert len(headings)>2 and [h for h in headings if h.strip() not in shown]==[]


def test_names_in_the_text_lead_to_their_definitions_and_these_to_the_source(site):
    text = (site/'learn'/'loss.html').read_text(encoding='utf-8')
    assert re.search(r'<a [^>]*href="#detection-loss">(?:<span[^>]*>)?<code[^>]*><span class="pre">detection_loss', text)
    sources = re.findall(r'class="source" href="https://github\.com/[^"]+/blob/main/(effdet_nb/learn/loss\.py)#L(\d+)"', text)
    lines = (ROOT/sources[0][0]).read_text(encoding='utf-8').splitlines()
    assert len(sources)>3 and all(re.match(r'(def|class|@)', lines[int(n)-1].strip()) for _, n in sources)


def test_the_code_of_every_definition_is_on_its_page(site):
    "Private ones too: a page that only prints signatures cannot be followed."
    nbs, missing, seen = ROOT/'nbs', [], 0
    for path in [p for p in nbs.rglob('*.ipynb') if '_' not in {part[0] for part in p.relative_to(nbs).parts} and '.' not in {part[0] for part in p.relative_to(nbs).parts}]:
        cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
        wanted = [m for c in cells if re.search(r'^#\| *exports?\b', c, re.M) for m in re.findall(r'^(?:def|class) \w+', c, re.M)]
        if not wanted: continue
        page = site/path.relative_to(nbs).with_name(re.sub(r'^\d+[a-z]?_', '', path.stem)+'.html')
        text = html.unescape(re.sub(r'<[^>]+>', '', page.read_text(encoding='utf-8')))
        missing += [f'{path.name}: {w}' for w in wanted if w not in text]
        seen += len(wanted)
    assert seen>800 and not missing, missing[:20]


def test_one_button_unfolds_the_code(site, browser):
    browser.size(*DESKTOP)
    browser.open((site/'model'/'anchors.html').as_uri())
    opened = '[...document.querySelectorAll("article .cell details.hide")].filter(d => d.open).length'
    assert browser.run(opened)==0
    browser.run('document.querySelector("button.code").click()')
    assert browser.run(opened)>5
    browser.run('document.querySelector("button.code").click()')
    assert browser.run(opened)==0


def test_formulas_and_diagrams_are_drawn(site, browser):
    sys.path.insert(0, str(ROOT/'tools'))
    try: from draw_diagrams import DIAGRAM_FOLDER, find_diagrams
    finally: sys.path.pop(0)
    missing = sorted(n for n in find_diagrams() if not (DIAGRAM_FOLDER/n).is_file())
    unused = sorted(p.name for p in DIAGRAM_FOLDER.glob('*.svg') if p.name not in find_diagrams())
    assert not (missing or unused), f'run tools/draw_diagrams.py: {missing} have no picture, {unused} no diagram'
    assert {p.name for p in (site/'_images').glob('*.svg')} >= set(find_diagrams())
    browser.size(*DESKTOP)
    browser.open((site/'learn'/'loss.html').as_uri())
    assert browser.run('document.querySelectorAll("article math").length')>5
    assert all(w>0 and h>5 for w, h in browser.run('[...document.querySelectorAll("article math")].map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height])'))
