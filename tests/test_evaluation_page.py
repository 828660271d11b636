"The evaluation page: files others can read, opened by a real browser, nothing lost on the way."
import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco
from effdet_nb.data.convert import dataset_convert
from effdet_nb.app.evaluation_page import EvaluationResults, ModelEvaluation, suggest_improvements, confusion_matrix_table, most_different_images, evaluate_files, evaluate_model_file, model_display_names, write_evaluation_report
from effdet_nb.app.html import TABLE_SORT_JS, html_page, html_table
from effdet_nb.evaluate.ground_truth import samples_from_coco
from effdet_nb.evaluate.evaluate import coco_metrics, coco_results
from effdet_nb.detector.detections import Detections
from effdet_nb.train.spec import Spec
from effdet_nb.core.console import read_status


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Nine pictures with two classes, one of them named to break pages; records; and two files of detections."
    work, rng = tmp_path_factory.mktemp('evaluation'), np.random.default_rng(0)
    images, annotations, files = [], [], dict(good=[], bad=[])
    (work/'pictures').mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(work/'pictures'/f'{i}.png')
        images.append(dict(id=100+i, file_name=f'{i}.png', height=90, width=120))
        for k in (1, 2):
            box = [float(v) for v in (*rng.integers(0, 50, 2), *rng.integers(15, 40, 2))]
            annotations.append(dict(id=len(annotations)+1, image_id=100+i, category_id=k, bbox=box, area=box[2]*box[3], iscrowd=0))
            files['good'].append(dict(image_id=100+i, category_id=k, bbox=[box[0]+1.37, *box[1:]], score=float(rng.uniform(.5, 1))))
            if i%2: files['bad'].append(dict(image_id=100+i, category_id=3-k, bbox=box, score=float(rng.uniform(.2, 1))))
    (work/'truth.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='a<b>&"c'), dict(id=2, name='dog')])))
    for name, rows in files.items(): (work/f'{name}.json').write_text(json.dumps(rows))
    dataset_convert(work/'pictures', work/'truth.json', work/'records', 'val', num_shards=2)
    return work


@pytest.fixture(scope='module')
def spec(work): return Spec().replace(dataset_config=dict(validation_file_pattern=str(work/'records/val*'), validation_json_file=str(work/'truth.json')))


def pycocotools(truth, detections):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        e = COCOeval(gt, gt.loadRes(str(detections)), 'bbox')
        e.evaluate(), e.accumulate(), e.summarize()
    return e.stats


def test_a_foreign_file_gets_pycocotools_digits_and_comes_out_as_it_went_in(work, spec):
    made = evaluate_files(spec, work/'good.json', results_dir=work/'out')
    np.testing.assert_allclose(list(made[0].metrics.values()), pycocotools(work/'truth.json', work/'good.json'), rtol=0, atol=1e-12)
    assert 0<made[0].metrics['AP']<1
    np.testing.assert_array_equal(pycocotools(work/'truth.json', work/'out'/'detections.json'), pycocotools(work/'truth.json', work/'good.json'))
    key = lambda r: (r['image_id'], r['category_id'], r['score'])
    out, went_in = (sorted(json.loads((work/p).read_text()), key=key) for p in ('out/detections.json', 'good.json'))
    assert [r['bbox'] for r in out]==[r['bbox'] for r in went_in] and all(type(r['image_id']) is int for r in out)
    slow = evaluate_files(spec, work/'good.json', pycocotools=True)
    assert dict(slow[0].metrics)==dict(made[0].metrics)


def test_files_are_all_there_and_status_holds_fractions(work, spec):
    evaluate_files(spec, work/'good.json', results_dir=work/'one', iou_threshold=.75, score_threshold=.6)
    told = json.loads((work/'one'/'metrics.json').read_text())
    assert (told['iou_threshold'], told['score_threshold'])==(.75, .6) and len(told['errors'])==6 and len(told['thresholds'])==3 and np.shape(told['confusion'])==(3, 3)
    assert told['num_images']==told['num_available']==9 and told['calibration']['bins']
    kpi = read_status(work/'one')[-1]['kpi']
    assert kpi==told['metrics'] and all(0<=v<=1 or v==-1 for v in kpi.values())
    assert (work/'one'/'report.html').stat().st_size>20_000


def test_two_models_are_compared(work, spec):
    made = evaluate_files(spec, [work/'good.json', work/'bad.json'], results_dir=work/'two')
    assert [m.name for m in made]==['good.json', 'bad.json'] and made[0].metrics['AP']>made[1].metrics['AP']
    told = json.loads((work/'two'/'metrics.json').read_text())
    assert [m['model'] for m in told]==['good.json', 'bad.json']
    assert all((work/'two'/n/'detections.json').is_file() for n in ('good.json', 'bad.json'))
    assert set(read_status(work/'two')[-1]['kpi'])=={f'{n} {k}' for n in ('good.json', 'bad.json') for k in made[0].metrics}
    text = str(made)
    assert max(map(len, text.splitlines()))<=100 and 'They differ most' in text
    best, worst = most_different_images(made, 1)[0][1]
    assert best==1 and worst==0


def test_eval_samples_hold_for_files_too_and_are_said(work, spec):
    few = json.loads((work/'good.json').read_text())[:8]
    (work/'few.json').write_text(json.dumps(few))
    made = evaluate_files(spec.replace(eval_config=dict(eval_samples=4)), work/'few.json')
    assert str(made).startswith('the first 4 of 9 images (eval_samples 4)')
    with pytest.raises(ValueError, match='10 of 18 detections are for images that were not evaluated; there are 4'): evaluate_files(spec.replace(eval_config=dict(eval_samples=4)), work/'good.json')


@pytest.mark.parametrize('wrong, words', [
    (lambda r: {**r, 'image_id': 5}, '1 of 18 detections are for images that were not evaluated; there are 9 .such as image 5'),
    (lambda r: {**r, 'image_id': '100'}, "such as image '100'"),
    (lambda r: {**r, 'category_id': 7}, '1 of 18 detections have a category the classes do not include; these are 2, 1 to 2 .such as category 7'),
    (lambda r: {**r, 'score': float('nan')}, '1 of 18 detections are not whole'),
    (lambda r: {**r, 'bbox': [0, 0, float('inf'), 1]}, '1 of 18 detections are not whole'),
    (lambda r: {**r, 'bbox': [0, 0, 1]}, '1 of 18 detections are not whole'),
    (lambda r: {k: v for k, v in r.items() if k!='score'}, '1 of 18 detections are not whole'),
    (lambda r: 7, '1 of 18 detections are not whole'),
])
def test_faults_in_a_file_are_counted(work, spec, tmp_path, wrong, words):
    rows = json.loads((work/'good.json').read_text())
    (tmp_path/'x.json').write_text(json.dumps([wrong(rows[0]), *rows[1:]]))
    with pytest.raises(ValueError, match=words): evaluate_files(spec, tmp_path/'x.json')


def test_files_that_are_no_detections(work, spec, tmp_path):
    (tmp_path/'cut.json').write_text('[{"image_id"')
    with pytest.raises(ValueError, match='cut.json: not valid JSON'): evaluate_files(spec, tmp_path/'cut.json')
    with pytest.raises(ValueError, match='An annotation file is not a file of detections'): evaluate_files(spec, work/'truth.json')
    with pytest.raises(FileNotFoundError, match='none.json'): evaluate_files(spec, tmp_path/'none.json')
    (tmp_path/'nothing.json').write_text('[]')
    assert evaluate_files(spec, tmp_path/'nothing.json', results_dir=tmp_path/'nothing')[0].metrics['AP']==0


def test_records_that_do_not_belong_to_the_file(work, spec, tmp_path):
    truth = json.loads((work/'truth.json').read_text())
    for name, images in dict(other=[{**i, 'id': i['id']+4} for i in truth['images']], size=[{**i, 'height': 91} for i in truth['images']], more=[*truth['images'], dict(id=7, file_name='x.png', height=9, width=9)]).items():
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(truth, images=images, annotations=[a for a in truth['annotations'] if a['image_id'] in {i['id'] for i in images}])))
    using = lambda name: spec.replace(dataset_config=dict(validation_json_file=str(tmp_path/f'{name}.json')))
    with pytest.raises(ValueError, match=r'image 100 of the records is not among the 9 images of .*other.json \(4 of 9 are not\)'): evaluate_files(using('other'), work/'good.json')
    with pytest.raises(ValueError, match=r'has 90 x 120 pixels in the records and 91 x 120 in .*size.json \(9 of 9 differ\)'): evaluate_files(using('size'), work/'good.json')
    with pytest.warns(UserWarning, match='1 of 10 images of .*more.json are in no record .such as 7.; they are not evaluated'): evaluate_files(using('more'), work/'good.json')


def test_models_measured_on_other_pictures_are_not_compared(work):
    classes = ClassTable((1,), ('a',), 2)
    samples = list(samples_from_coco(load_coco(work/'truth.json'), work/'pictures'))
    made = [ModelEvaluation(str(n), m:=coco_metrics([(t, Detections([], [], [])) for _, t in samples[:n]], ClassTable((1, 2), ('a', 'b'), 3)), m.analyze_errors()) for n in (3, 4)]
    with pytest.raises(ValueError, match='measured on other pictures .3, 4.'): most_different_images(made)


def test_advice_names_the_dearest(work, spec):
    told = lambda **cost: dict(errors=[dict(kind=k, what=k, count=1, cost=cost.get(k, 0.)) for k in ('location', 'classification', 'both', 'duplicate', 'background', 'missed')])
    assert [a.split(',')[0] for a in suggest_improvements(told(missed=.2, both=.3, duplicate=.1))]==['Both', 'Missed']
    assert len(suggest_improvements(told()))==1


def test_a_hundred_classes_fit_a_square(work):
    classes = ClassTable(tuple(range(1, 101)), tuple(f'class {i}' for i in range(100)), 101)
    samples = [t for _, t in samples_from_coco(load_coco(work/'truth.json'), work/'pictures')]
    m = coco_metrics([(t, Detections(t.boxes, np.ones(len(t)), t.category_ids)) for t in samples], classes)   # every class called the next one
    square = str(confusion_matrix_table(ModelEvaluation('x', m, m.analyze_errors())))
    assert square.count('<tr>')==32 and 'the 30 of 100 classes' in square


# --- in a browser

def opened(browser, path):
    "What a browser makes of a page, and what it says on the console."
    browser.errors.clear()
    browser.goto(path.resolve().as_uri())
    return browser.evaluate_js('document.documentElement.outerHTML'), list(browser.errors)


def test_a_browser_opens_the_page_without_complaint_and_draws_it(work, spec, browser, tmp_path):
    for name, files in dict(one=['good.json'], two=['good.json', 'bad.json']).items():
        evaluate_files(spec, [work/f for f in files], results_dir=tmp_path/name)
        dom, said = opened(browser, tmp_path/name/'report.html')
        assert not said, said
        assert dom.count('<polyline')>=3 and dom.count('<rect')>20 and dom.count('data:image/')>=9
        assert 'tabindex="0"' in dom                          # the script ran
        assert 'a&lt;b&gt;&amp;"c' in dom                     # and the odd name is text
    shot = tmp_path/'shot.png'
    browser.set_viewport(1100, 5000)
    opened(browser, tmp_path/'one'/'report.html')
    browser.screenshot(shot)
    pixels = np.asarray(Image.open(shot).convert('RGB')).astype(int)
    coloured = (pixels.max(-1)-pixels.min(-1)>60).mean()
    assert coloured>.005, 'charts and boxes have colours'


def test_a_click_sorts_numbers_by_size_and_dashes_last(browser, tmp_path):
    rows = [dict(name=n, v=v) for n, v in (('b', 9), ('a', 1_200), ('d', None), ('c', .5), ('e', 30))]
    click = 'const th = document.querySelectorAll("th"), read = () => [...document.querySelectorAll("tbody tr")].map(r => r.cells[0].textContent).join(""); const out = [read()]; for (const i of [1,1,0,0]) { th[i].click(); out.push(read()) } document.title = out.join(" ")'
    (tmp_path/'page.html').write_text(html_page('x', {'t': [html_table(rows, sortable=True)]}, script=TABLE_SORT_JS+click))
    dom, said = opened(browser, tmp_path/'page.html')
    assert not said and re.search('<title>(.*?)</title>', dom)[1].split()==['badce', 'aebcd', 'cbead', 'edcba', 'abcde']


def test_the_promise_of_the_page_stops_other_scripts(browser, tmp_path):
    text = html_page('before', {'t': ['x']}, script=TABLE_SORT_JS).replace('</body>', '<script>document.title = "after"</script></body>')
    (tmp_path/'page.html').write_text(text)
    dom, said = opened(browser, tmp_path/'page.html')
    assert '<title>before</title>' in dom and any('Content Security Policy' in l for l in said)   # so the console is listened to
