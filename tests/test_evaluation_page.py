"Evaluating model files: results that other programs read, a page that a browser opens, nothing lost on the way."
import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from effdet_nb.app.cli import _next_inference
from effdet_nb.app.evaluation_page import confusion_matrix_table, detections_figure, evaluate_files
from effdet_nb.app.html import TABLE_SORT_JS, html_page, html_table, sortable_cell
from effdet_nb.app.model_evaluation import ModelEvaluation, most_different_images, suggest_improvements
from effdet_nb.core.console import read_status
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco
from effdet_nb.data.convert import dataset_convert
from effdet_nb.detector.detections import Detections
from effdet_nb.evaluate.evaluate import coco_metrics
from effdet_nb.evaluate.ground_truth import samples_from_coco
from effdet_nb.train.spec import Spec

CATEGORIES = [dict(id=1, name='a<b>&"c'), dict(id=2, name='dog')]    # the first name is meant to break pages


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Nine images with two classes, their records, and two files of detections."
    work, rng = tmp_path_factory.mktemp('evaluation'), np.random.default_rng(0)
    images, annotations, detections = [], [], dict(good=[], bad=[])
    (work/'images').mkdir()
    for i in range(9):
        pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work/'images'/f'{i}.png')
        images.append(dict(id=100+i, file_name=f'{i}.png', height=90, width=120))
        for category_id in (1, 2):
            box = [float(v) for v in (*rng.integers(0, 50, 2), *rng.integers(15, 40, 2))]
            where = dict(image_id=100+i, category_id=category_id)
            annotations.append(dict(where, id=len(annotations)+1, bbox=box, area=box[2]*box[3], iscrowd=0))
            detections['good'].append(dict(where, bbox=[box[0]+1.37, *box[1:]], score=float(rng.uniform(.5, 1))))
            if i%2==0: continue
            detections['bad'].append(dict(where, category_id=3-category_id, bbox=box, score=float(rng.uniform(.2, 1))))
    write_json(work/'truth.json', dict(images=images, annotations=annotations, categories=CATEGORIES))
    for name, rows in detections.items(): write_json(work/f'{name}.json', rows)
    dataset_convert(work/'images', work/'truth.json', work/'records', 'val', num_shards=2)
    return work


@pytest.fixture(scope='module')
def spec(work): return spec_for(work, work/'truth.json')


def spec_for(work, annotations):
    files = dict(validation_file_pattern=str(work/'records/val*'), validation_json_file=str(annotations))
    return Spec().replace(dataset_config=files)


def write_json(path, data): path.write_text(json.dumps(data))
def read_json(path): return json.loads(path.read_text())


def pycocotools_stats(truth, detections):
    "The twelve numbers that pycocotools computes from two files."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        evaluation = COCOeval(gt, gt.loadRes(str(detections)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_detections_of_another_program_get_the_numbers_of_pycocotools(work, spec):
    results = evaluate_files(spec, work/'good.json', results_dir=work/'out')
    expected = pycocotools_stats(work/'truth.json', work/'good.json')
    np.testing.assert_allclose(list(results[0].metrics.values()), expected, rtol=0, atol=1e-12)
    assert 0<results[0].metrics['AP']<1
    counted_by_pycocotools = evaluate_files(spec, work/'good.json', pycocotools=True)
    assert dict(counted_by_pycocotools[0].metrics)==dict(results[0].metrics)


def test_detections_are_written_as_they_were_read(work, spec):
    def order(row): return row['image_id'], row['category_id'], row['score']
    evaluate_files(spec, work/'good.json', results_dir=work/'out')
    written, read = (sorted(read_json(work/name), key=order) for name in ('out/detections.json', 'good.json'))
    assert [row['bbox'] for row in written]==[row['bbox'] for row in read]
    assert all(type(row['image_id']) is int for row in written)
    stats = [pycocotools_stats(work/'truth.json', work/name) for name in ('out/detections.json', 'good.json')]
    np.testing.assert_array_equal(*stats)


def test_all_files_are_written_and_status_holds_fractions(work, spec):
    evaluate_files(spec, work/'good.json', results_dir=work/'one', iou_threshold=.75, score_threshold=.6)
    written = read_json(work/'one'/'metrics.json')
    assert (written['iou_threshold'], written['score_threshold'])==(.75, .6)
    assert len(written['errors'])==6 and len(written['thresholds'])==3 and np.shape(written['confusion'])==(3, 3)
    assert written['num_images']==written['num_available']==9 and written['calibration']['bins']
    kpi = read_status(work/'one')[-1]['kpi']
    assert kpi==written['metrics'] and all(0<=v<=1 or v==-1 for v in kpi.values())
    assert (work/'one'/'report.html').stat().st_size>20_000


def test_models_with_similar_names_keep_their_detections_even_in_their_own_folder(work, spec, tmp_path):
    paths = [tmp_path/name for name in ('m a.json', 'm-a.json', 'bad.json')]
    for path,source in zip(paths, ('good.json', 'bad.json', 'bad.json')): path.write_bytes((work/source).read_bytes())
    results = evaluate_files(spec, paths, results_dir=tmp_path)
    files = [tmp_path/'detections'/name for name in ('m-a.json-1.json', 'm-a.json-2.json', 'bad.json.json')]
    again = evaluate_files(spec, files)
    assert [dict(e.metrics) for e in again]==[dict(e.metrics) for e in results]
    assert results[0].metrics['AP']>results[1].metrics['AP']
    assert paths[0].read_bytes()==(work/'good.json').read_bytes()


@pytest.mark.parametrize('options, message', [
    (dict(iou_threshold=50), '--iou_threshold 50: must be above 0 and at most 1'),
    (dict(iou_threshold=0), '--iou_threshold 0: must be above 0'),
    (dict(score_threshold=40), '--score_threshold 40: must be from 0 to 1'),
])
def test_wrong_thresholds_are_reported_before_the_work(work, spec, monkeypatch, options, message):
    monkeypatch.setattr('effdet_nb.app.evaluation_page.evaluate_model_file', None)     # is never called
    with pytest.raises(ValueError, match=message): evaluate_files(spec, work/'good.json', **options)


def test_two_models_are_compared(work, spec):
    names = ['good.json', 'bad.json']
    results = evaluate_files(spec, [work/name for name in names], results_dir=work/'two')
    assert [e.name for e in results]==names and results[0].metrics['AP']>results[1].metrics['AP']
    assert [row['model'] for row in read_json(work/'two'/'metrics.json')]==names
    assert all((work/'two'/'detections'/f'{name}.json').is_file() for name in names)
    kpi_names = {f'{name} {stat}' for name in names for stat in results[0].metrics}
    assert set(read_status(work/'two')[-1]['kpi'])==kpi_names
    text = str(results)
    assert max(map(len, text.splitlines()))<=100 and 'They differ most' in text
    assert most_different_images(results, 1)[0][1]==[1, 0]


def test_eval_samples_apply_to_detection_files_and_are_reported(work, spec):
    spec = spec.replace(eval_config=dict(eval_samples=4))
    write_json(work/'few.json', read_json(work/'good.json')[:8])
    assert str(evaluate_files(spec, work/'few.json')).startswith('the first 4 of 9 images (eval_samples 4)')
    message = '10 of 18 detections are for images that were not evaluated; there are 4'
    with pytest.raises(ValueError, match=message): evaluate_files(spec, work/'good.json')


@pytest.mark.parametrize('change', [
    lambda row: row.update(image_id=str(row['image_id'])), lambda row: row.update(image_id=float(row['image_id'])),
    lambda row: row.update(category_id=str(row['category_id']))])
def test_ids_that_differ_only_in_type_are_equal(work, spec, tmp_path, change):
    rows = read_json(work/'good.json')
    expected = evaluate_files(spec, work/'good.json')
    for row in rows: change(row)
    write_json(tmp_path/'x.json', rows)
    assert evaluate_files(spec, tmp_path/'x.json')[0].metrics['AP']==expected[0].metrics['AP']


@pytest.mark.parametrize('wrong, message', [
    (dict(image_id=5), '1 of 18 detections are for images that were not evaluated; there are 9 .such as image 5'),
    (dict(image_id='0100'), "such as image '0100'"),
    (dict(category_id=7),
     '1 of 18 detections have a category the classes do not include; these are 2, 1 to 2 .such as cat'),
    (dict(score=float('nan')), '1 of 18 detections are not complete'),
    (dict(bbox=[0, 0, float('inf'), 1]), '1 of 18 detections are not complete'),
    (dict(bbox=[0, 0, 1]), '1 of 18 detections are not complete'),
    (dict(score=None), '1 of 18 detections are not complete'),
    ('no score', '1 of 18 detections are not complete'),
    ('no dict', '1 of 18 detections are not complete'),
])
def test_faults_in_a_detection_file_are_counted(work, spec, tmp_path, wrong, message):
    rows = read_json(work/'good.json')
    if wrong=='no dict': rows[0] = 7
    elif wrong=='no score': del rows[0]['score']
    else: rows[0] |= wrong
    write_json(tmp_path/'x.json', rows)
    with pytest.raises(ValueError, match=message): evaluate_files(spec, tmp_path/'x.json')


def test_other_files_are_refused(work, spec, tmp_path):
    (tmp_path/'cut.json').write_text('[{"image_id"')
    with pytest.raises(ValueError, match='cut.json: not valid JSON'): evaluate_files(spec, tmp_path/'cut.json')
    message = 'An annotation file is not a file of detections'
    with pytest.raises(ValueError, match=message): evaluate_files(spec, work/'truth.json')
    with pytest.raises(FileNotFoundError, match='none.json'): evaluate_files(spec, tmp_path/'none.json')


def test_a_file_without_detections_has_ap_zero(spec, tmp_path):
    write_json(tmp_path/'nothing.json', [])
    results = evaluate_files(spec, tmp_path/'nothing.json', results_dir=tmp_path/'nothing')
    assert results[0].metrics['AP']==0


def write_annotations(work, path, images):
    "The annotation file with other images."
    truth = read_json(work/'truth.json')
    ids = {image['id'] for image in images}
    annotations = [a for a in truth['annotations'] if a['image_id'] in ids]
    write_json(path, dict(truth, images=images, annotations=annotations))
    return spec_for(work, path)


def test_records_and_annotations_must_belong_together(work, tmp_path):
    images = read_json(work/'truth.json')['images']
    shifted = [{**image, 'id': image['id']+4} for image in images]
    message = r'image 100 of the records is not among the 9 images of .*other.json \(4 of 9 are not\)'
    with pytest.raises(ValueError, match=message):
        evaluate_files(write_annotations(work, tmp_path/'other.json', shifted), work/'good.json')
    taller = [{**image, 'height': 91} for image in images]
    message = r'has 90 x 120 pixels in the records and 91 x 120 in .*size.json \(9 of 9 differ\)'
    with pytest.raises(ValueError, match=message):
        evaluate_files(write_annotations(work, tmp_path/'size.json', taller), work/'good.json')
    more = [*images, dict(id=7, file_name='x.png', height=9, width=9)]
    message = '1 of 10 images of .*more.json are in no record .such as 7.; they are not evaluated'
    with pytest.warns(UserWarning, match=message):
        evaluate_files(write_annotations(work, tmp_path/'more.json', more), work/'good.json')


def test_models_measured_on_other_images_are_not_compared(work):
    classes, evaluations = ClassTable((1, 2), ('a', 'b'), 3), []
    truths = [truth for _, truth in samples_from_coco(load_coco(work/'truth.json'), work/'images')]
    for num_images in (3, 4):
        metrics = coco_metrics([(truth, Detections([], [], [])) for truth in truths[:num_images]], classes)
        evaluations.append(ModelEvaluation(str(num_images), metrics, metrics.analyze_errors()))
    with pytest.raises(ValueError, match='evaluated on different images .3, 4.'): most_different_images(evaluations)


def test_advice_is_about_the_most_expensive_errors():
    def analysis(**costs):
        kinds = 'location', 'classification', 'both', 'duplicate', 'background', 'missed'
        return dict(errors=[dict(kind=kind, what=kind, count=1, cost=costs.get(kind, 0.)) for kind in kinds])
    advice = suggest_improvements(analysis(missed=.2, both=.3, duplicate=.1))
    assert [sentence.split(':')[0] for sentence in advice]==['Both', 'Missed']
    assert 'Without this error, AP50 would be 0.300 higher' in advice[0]
    assert 'AP75 would be 0.200' in suggest_improvements(analysis(missed=.2) | dict(iou_threshold=.75))[0]
    assert len(suggest_improvements(analysis()))==1


def test_advice_for_a_model_that_has_hardly_learned_is_about_its_training_first():
    errors = dict(errors=[dict(kind='missed', what='not detected', count=9, cost=.3)])
    trained, untrained = suggest_improvements(errors, .6), suggest_improvements(errors, .043)
    assert trained==suggest_improvements(errors)==untrained[1:]
    assert untrained[0].startswith('AP50 is only 0.043') and '--overfit 8' in untrained[0]


def test_a_confusion_matrix_of_a_hundred_classes_shows_thirty(work):
    classes = ClassTable(tuple(range(1, 101)), tuple(f'class {i}' for i in range(100)), 101)
    results = []
    for _, truth in samples_from_coco(load_coco(work/'truth.json'), work/'images'):
        next_class = truth.category_ids     # a channel is one less than its id, so every class is called the next one
        results.append((truth, Detections(truth.boxes, np.ones(len(truth)), next_class)))
    metrics = coco_metrics(results, classes)
    matrix = str(confusion_matrix_table(ModelEvaluation('x', metrics, metrics.analyze_errors())))
    assert matrix.count('<tr>')==32 and 'the 30 of 100 classes' in matrix


# --- in a browser

def open_page(browser, path):
    "The document a browser makes of a page, and the errors on its console."
    browser.errors.clear()
    browser.goto(path.resolve().as_uri())
    return browser.evaluate_js('document.documentElement.outerHTML'), list(browser.errors)


def test_a_browser_draws_the_page_without_errors(work, spec, browser, tmp_path):
    for name, files in dict(one=['good.json'], two=['good.json', 'bad.json']).items():
        evaluate_files(spec, [work/f for f in files], results_dir=tmp_path/name)
        dom, errors = open_page(browser, tmp_path/name/'report.html')
        assert not errors, errors
        assert dom.count('data:image/svg+xml')>=3 and dom.count('<rect')>20 and dom.count('data:image/')>=9
        assert 'tabindex="0"' in dom                          # the script ran
        assert 'a&lt;b&gt;&amp;"c' in dom                     # and the odd name is text
    browser.set_viewport(1100, 5000)
    open_page(browser, tmp_path/'one'/'report.html')
    browser.screenshot(tmp_path/'page.png')
    pixels = np.asarray(Image.open(tmp_path/'page.png').convert('RGB')).astype(int)
    colorful = (pixels.max(-1)-pixels.min(-1)>60).mean()
    assert colorful>.005, 'charts and boxes have colours'


DECODE_IMAGES = """
Promise.all([...document.querySelectorAll('image')].map(async image => {
  const copy = new Image()
  copy.src = image.getAttribute('href')
  await copy.decode()
  return copy.naturalWidth
}))
"""


def test_a_browser_draws_charts(work, spec, browser, tmp_path):
    "A chart that a browser cannot decode would leave its place empty."
    evaluate_files(spec, work/'good.json', results_dir=tmp_path)
    open_page(browser, tmp_path/'report.html')
    decoded = browser.evaluate_js(DECODE_IMAGES)
    assert len(decoded)>=9 and min(decoded)>0


SORT_AND_REPORT = """
const th = document.querySelectorAll("th"), orders = []
const read = () => orders.push([...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent).join(""))
read()
for (const i of [1, 1, 0, 0]) { th[i].click(); read() }
document.title = orders.join(" ")
"""


def test_a_click_sorts_numbers_by_value_and_dashes_last(browser, tmp_path):
    values = dict(b=9, a=1_200, d=None, c=.5, e=30)
    table = html_table([dict(name=name, value=value) for name, value in values.items()], sortable=True)
    (tmp_path/'page.html').write_text(html_page('x', {'t': [table]}, script=TABLE_SORT_JS+SORT_AND_REPORT))
    dom, errors = open_page(browser, tmp_path/'page.html')
    assert not errors
    assert re.search('<title>(.*?)</title>', dom)[1].split()==['badce', 'aebcd', 'cbead', 'edcba', 'abcde']


@pytest.mark.parametrize('cells', [
    [sortable_cell('950 kB', 950_000), sortable_cell('15.3 MB', 15_300_000), sortable_cell('1.2 GB', 1_200_000_000)],
    [sortable_cell('45 s', 45.), sortable_cell('8 min 05 s', 485.), sortable_cell('26 h 00 min', 93_600.)],
    [7, '10 m', '3 wheels', 'car 2']])
def test_a_click_sorts_texts_by_their_numbers_only_if_they_have_one(cells, browser, tmp_path):
    mixed = [cells[i] for i in (2, 0, 1)]
    table = html_table([dict(name=str(cells.index(cell)), value=cell) for cell in [*mixed, *cells[3:]]], sortable=True)
    (tmp_path/'page.html').write_text(html_page('x', {'t': [table]}, script=TABLE_SORT_JS+SORT_AND_REPORT))
    dom, errors = open_page(browser, tmp_path/'page.html')
    up = ''.join(map(str, range(len(cells))))
    assert not errors and re.search('<title>(.*?)</title>', dom)[1].split()[1:3]==[up[::-1], up]


def test_detections_without_a_category_are_not_drawn():
    classes = ClassTable((1,), ('cat',), 2)
    found = Detections([[0, 0, 30, 30], [10, 10, 60, 60]], [.9, .8], [0, 1])
    figure = detections_figure(np.zeros((90, 90, 3), np.uint8), found, classes)
    assert re.findall('<text[^>]*>(.*?)</text>', figure)==['cat 0.90'] and figure.count('<rect')==1


@pytest.mark.parametrize('threshold, text', [(.0042, '0.0042'), (.45, '0.45'), (.3, '0.3'), (1., '1')])
def test_a_low_threshold_is_not_rounded_to_zero(threshold, text):
    results = [ModelEvaluation('x', None, dict(thresholds=[dict(threshold=threshold)]))]
    assert _next_inference(['m.tlt'], results, '').endswith(f' -t {text}')


def test_the_content_security_policy_stops_other_scripts(browser, tmp_path):
    text = html_page('before', {'t': ['x']}, script=TABLE_SORT_JS)
    text = text.replace('</body>', '<script>document.title = "after"</script></body>')
    (tmp_path/'page.html').write_text(text)
    dom, errors = open_page(browser, tmp_path/'page.html')
    assert '<title>before</title>' in dom
    assert any('Content Security Policy' in error for error in errors)   # so errors do arrive here
