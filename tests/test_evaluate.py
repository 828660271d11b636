"Evaluation: the same numbers as pycocotools on the raw files, every image counted, wrong input named."

import contextlib
import io
import json
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from effdet_nb.data.classes import ClassTable
from effdet_nb.data.coco import load_coco
from effdet_nb.evaluate.ground_truth import GroundTruth, samples_from_coco, samples_from_records
from effdet_nb.train.experiment import eval_dataset_from_spec
from effdet_nb.evaluate.evaluate import Metrics, coco_metrics, coco_results, evaluate, text_table
from effdet_nb.evaluate.inspect_results import image_ap, ap_per_image, plot_precision_recall, worst_images
from effdet_nb.evaluate.coco_metric import COCO_STAT_NAMES
from effdet_nb.evaluate.predict import bbox_and_scores64, load_coco_results
from effdet_nb.detector.detections import Detections
from test_ground_truth import FullImageDetector, image_folder  # noqa: F401


def reference(annotations_file, results, image_ids=None):
    "The twelve numbers as pycocotools itself gives them, from files alone."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(annotations_file))
        e = COCOeval(gt, gt.loadRes(results), 'bbox')
        if image_ids is not None:
            e.params.imgIds = image_ids
        e.evaluate(), e.accumulate(), e.summarize()
    return e.stats, e.eval['precision'][:, :, :, 0, 2], e.params.catIds


def guesses(truth, classes, rng):
    "What a middling detector might answer: shaken, repeated, confused and dreamed boxes."
    boxes, channels = truth.boxes, np.array([classes.channel(int(k)) for k in truth.category_ids], int)
    size = np.maximum((boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]], 1)
    shaken = np.concatenate([boxes + rng.normal(0, s, boxes.shape) * size for s in (0.01, 0.08, 0.2)])
    corner = rng.uniform(0, 200, (5, 2))
    all_boxes = np.concatenate([shaken, np.concatenate([corner, corner + rng.uniform(5, 150, (5, 2))], 1)])
    all_channels = np.concatenate([channels] * 3 + [rng.integers(0, classes.num_classes, 5)])
    confused = rng.random(len(all_channels)) < 0.1
    all_channels[confused] = rng.integers(0, classes.num_classes, confused.sum())
    scores = rng.integers(1, 50, len(all_boxes)) / 50  # ties on purpose
    order = np.argsort(-scores, kind='stable')
    return Detections(all_boxes[order], scores[order], all_channels[order])


@pytest.mark.parametrize('name, file, num_classes', [('bccd', 'test.json', None), ('coco_mini', None, 91)])
def test_real_files_give_the_numbers_of_pycocotools(shared_dir, name, file, num_classes):
    folder = shared_dir / 'data' / name
    file = (
        folder / file
        if file
        else next(p for p in sorted(folder.rglob('*.json')) if 'instances' in p.name or p.parent == folder)
    )
    coco = load_coco(file)
    classes, rng = ClassTable.from_categories(coco.categories, num_classes), np.random.default_rng(0)
    truths = [t for _, t in samples_from_coco(coco, folder)]
    metrics = coco_metrics([(t, guesses(t, classes, rng)) for t in truths], classes)
    stats, precision, ids = reference(file, coco_results(metrics.results, metrics.classes))
    np.testing.assert_allclose([metrics[k] for k in COCO_STAT_NAMES], stats, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(metrics.precision, precision)
    assert 0 < metrics['AP'] < 1 and [r['id'] for r in metrics.per_class] == list(ids)
    assert (
        sum(r['num_boxes'] for r in metrics.per_class)
        == metrics.num_boxes
        == coco.num_annotations - metrics.num_crowds
    )


def write_coco(path, rng, num_images, num_boxes):
    "A random annotation file: crowds, empty image_folder, areas unlike the boxes', one class without any box."
    images = [
        dict(id=int(i), file_name=f'{i}.png', height=300, width=300)
        for i in rng.permutation(10 * num_images)[:num_images]
    ]
    annotations = [
        dict(
            id=n,
            image_id=images[int(rng.integers(num_images))]['id'],
            category_id=int(rng.choice([2, 5])),
            iscrowd=int(rng.random() < 0.2),
            bbox=(b := [round(float(v), 2) for v in (*rng.uniform(0, 150, 2), *rng.uniform(0, 140, 2))]),
            area=b[2] * b[3] * float(rng.uniform(0.2, 1)),
        )
        for n in range(1, num_boxes + 1)
    ]
    path.write_text(
        json.dumps(
            dict(images=images, annotations=annotations, categories=[dict(id=k, name=str(k)) for k in (9, 5, 2)])
        )
    )
    return load_coco(path)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 30))
def test_random_files_give_the_numbers_of_pycocotools(tmp_path_factory, seed, num_images, num_boxes):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp('coco') / 'a.json'
    coco = write_coco(path, rng, num_images, num_boxes)
    classes = ClassTable.from_categories(coco.categories, 10)
    metrics = coco_metrics([(t, guesses(t, classes, rng)) for _, t in samples_from_coco(coco, '')], classes)
    if not coco_results(metrics.results, metrics.classes):
        return  # pycocotools cannot read an empty list of results; see the next test
    np.testing.assert_allclose(
        [metrics[k] for k in COCO_STAT_NAMES],
        reference(path, coco_results(metrics.results, metrics.classes))[0],
        rtol=0,
        atol=1e-12,
    )


def test_more_than_a_hundred_detections_equal_pycocotools(tmp_path):
    rng = np.random.default_rng(3)
    coco = write_coco(tmp_path / 'a.json', rng, 2, 90)
    classes = ClassTable.from_categories(coco.categories, 10)
    metrics = coco_metrics([(t, guesses(t, classes, rng)) for _, t in samples_from_coco(coco, '')], classes)
    assert max(len(d) for _, d in metrics.results) > 100
    np.testing.assert_allclose(
        [metrics[k] for k in COCO_STAT_NAMES],
        reference(tmp_path / 'a.json', coco_results(metrics.results, metrics.classes))[0],
        rtol=0,
        atol=1e-12,
    )


def test_a_subset_is_evaluated_with_its_own_ground_truth(tmp_path):
    rng = np.random.default_rng(4)
    coco = write_coco(tmp_path / 'a.json', rng, 6, 30)
    classes, some = ClassTable.from_categories(coco.categories, 10), [i['id'] for i in coco.images[:3]]
    metrics = coco_metrics(
        [(t, guesses(t, classes, rng)) for _, t in islice(samples_from_coco(coco, ''), 3)], classes
    )
    np.testing.assert_allclose(
        [metrics[k] for k in COCO_STAT_NAMES],
        reference(tmp_path / 'a.json', coco_results(metrics.results, metrics.classes), some)[0],
        rtol=0,
        atol=1e-12,
    )


def test_no_detections_and_no_ground_truth_have_numbers():
    classes, boxes = ClassTable((1,), ('a',), 2), [[0, 0, 40, 40]]
    nothing = Detections([], [], [])
    assert coco_metrics([(GroundTruth(1, boxes, [1]), nothing)], classes)['AP'] == 0
    assert set(coco_metrics([(GroundTruth(1, [], []), Detections(boxes, [0.9], [0]))], classes).values()) == {-1.0}
    assert set(coco_metrics([(GroundTruth(1, [], []), nothing)], classes).values()) == {-1.0}
    assert coco_metrics([(GroundTruth(1, boxes, [1], [True]), nothing)], classes).num_boxes == 0


def test_an_annotation_with_id_zero_can_be_matched():
    "An annotation numbered 0 counts as missed in pycocotools; ours are numbered from 1."
    metrics = coco_metrics(
        [(GroundTruth(0, [[0, 0, 40, 40]], [1]), Detections([[0, 0, 40, 40]], [0.9], [0]))],
        ClassTable((1,), ('a',), 2),
    )
    assert metrics['AP'] == pytest.approx(1) and metrics['ARmax1'] == 1


def test_an_idle_channel_neither_helps_nor_hurts():
    classes, t = ClassTable((1,), ('a',), 2), GroundTruth('x', [[0, 0, 40, 40]], [1])
    metrics = coco_metrics([(t, Detections([[0, 0, 40, 40]] * 2, [0.95, 0.9], [1, 0]))], classes)
    assert (
        metrics['AP'] == pytest.approx(1)
        and len(coco_results(metrics.results, metrics.classes)) == 1
        and image_ap(*metrics.results[0], classes) == 0.5
    )


def test_every_image_counts_and_boxes_are_in_its_pixels(image_folder):
    detector = FullImageDetector()
    metrics = evaluate(detector, samples_from_coco(image_folder / 'a.json', image_folder), batch_size=3)
    assert detector.batch_sizes == [3, 3, 1] and metrics.num_images == 7 and metrics['AP'] == pytest.approx(1)
    for t, d in metrics.results:
        np.testing.assert_array_equal(d.boxes, t.boxes)  # the padding was cut off


def test_eval_samples_takes_the_first_and_reads_no_more(image_folder):
    (image_folder / '6.png').write_bytes(b'broken')
    metrics = evaluate(
        FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder), batch_size=4, eval_samples=6
    )
    assert [t.image_id for t, _ in metrics.results] == list(range(1000, 1006))
    with pytest.raises(ValueError, match='6.png'):
        evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder))
    with pytest.raises(ValueError, match='eval_samples 0: at least 1'):
        evaluate(FullImageDetector(), [], eval_samples=0)


def test_records_with_and_without_a_coco_file_agree(image_folder):
    coco = load_coco(image_folder / 'a.json')
    records = [
        dict(
            image=p.read_bytes(),
            source_id=str(t.image_id),
            boxes=t.boxes,
            labels=t.category_ids,
            is_crowd=t.is_crowd,
            area=t.area,
        )
        for p, t in samples_from_coco(coco, image_folder)
    ]
    alone, both = (
        evaluate(FullImageDetector(), samples_from_records(records)),
        evaluate(FullImageDetector(), samples_from_records(records, image_folder / 'a.json')),
    )
    assert dict(alone) == dict(both)
    assert coco_results(both.results, both.classes)[0]['image_id'] == 1000  # the file's own id, a number
    with pytest.raises(ValueError, match='image 5 of the records is not among the 7 images'):
        list(samples_from_records([dict(source_id='5')], coco))


def test_too_few_detections_and_no_images_are_refused(image_folder):
    class Short(FullImageDetector):
        def decode(self, images):
            return super().decode(images)[1:]

    with pytest.raises(ValueError, match='3 results for 4 images'):
        evaluate(Short(), samples_from_coco(image_folder / 'a.json', image_folder), batch_size=4)
    with pytest.raises(ValueError, match='batch_size 0'):
        evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder), batch_size=0)
    with pytest.raises(ValueError, match='no images at all'):
        evaluate(FullImageDetector(), [])
    with pytest.raises(FileNotFoundError, match='none.png'):
        evaluate(FullImageDetector(), [(image_folder / 'none.png', GroundTruth(1, [], []))])


def test_an_unknown_category_is_reported_before_the_network_runs():
    class Unused(FullImageDetector):
        def forward(self, images): raise AssertionError('the network ran')

    image, classes = np.zeros((64, 64, 3), np.uint8), ClassTable((1,), ('a',), 2)
    samples = [(image, GroundTruth(1, [[0, 0, 9, 9]], [1])), (image, GroundTruth(2, [[0, 0, 9, 9]], [7]))]
    with pytest.raises(ValueError, match='category id that is not one of the model .such as 7.'):
        evaluate(Unused(), samples, classes)


def test_worst_images_come_first(image_folder):
    class Half(FullImageDetector):
        def decode(self, images):
            return [d if i % 2 else d[:0] for i, d in enumerate(super().decode(images))]

    metrics = evaluate(Half(), samples_from_coco(image_folder / 'a.json', image_folder), batch_size=7)
    assert [i for ap, i in worst_images(metrics, 4) if ap == 0] == [1000, 1002, 1004, 1006]


def test_tables_fit_a_terminal_and_survive_odd_names():
    rows = [
        dict(id=1, name='x' * 90, num_boxes=10**6, num_detections=10**6, AP=0.5, AP50=0.5, AR=0.5),
        dict(id=2, name='a|b', num_boxes=0, num_detections=0, AP=-1.0, AP50=-1.0, AR=-1.0),
    ]
    metrics = Metrics([-1] * 12, rows, np.zeros((10, 101, 2)), [], ClassTable((1, 2), ('x', 'a|b'), 3))
    assert (
        max(map(len, str(metrics).splitlines())) <= 100
        and '–' in str(metrics)
        and 'a\\|b' in metrics._repr_markdown_()
    )
    assert json.loads(json.dumps(metrics.to_dict()))['metrics']['AP'] == -1


@pytest.mark.parametrize('column', ['run', 'model', 'field', 'a'*50])
def test_texts_that_differ_in_any_letter_differ_in_a_table(column):
    texts = ['efficientdet-lite0_lr0.08_bs16_warmup2_seed1', 'efficientdet-lite0_lr0.08_bs16_warmup2_seed2',
             'b/efficientdet-lite0_lr0.08_bs16_warmup2_seed1']
    lines = text_table([[column, 'AP'], *([text, '0.5'] for text in texts)]).splitlines()
    assert [line.split()[0] for line in lines]==[column, *texts]


def test_a_long_name_of_a_class_keeps_both_ends():
    rows = [['id', 'class'], ['1', 'a'*50+'1'], ['2', 'b'*40]]
    assert [line.split()[1] for line in text_table(rows).splitlines()]==['class', 'a'*20+'…'+'a'*18+'1', 'b'*40]


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend():
    from matplotlib.figure import Figure
    rows = [dict(id=k, name=name, num_boxes=1, num_detections=1) for k, name in enumerate(('_a', 'b'), 1)]
    metrics = Metrics([-1]*12, rows, np.ones((10, 101, 2)), [], ClassTable((1, 2), ('_a', 'b'), 3))
    ax = Figure().subplots()
    ax.plot([0, 1], [0, 1])
    plot_precision_recall(metrics, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()]==['_a 1.000', 'b 1.000']


def test_nothing_is_printed_by_default(image_folder, capfd):
    evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder))
    assert capfd.readouterr() == ('', '')


def test_a_spec_names_records_and_file(image_folder):
    from effdet_nb.data.convert import dataset_convert
    from effdet_nb.train.spec import Spec

    dataset_convert(image_folder, image_folder / 'a.json', image_folder / 'records', 'val', num_shards=3)
    spec = Spec().replace(dataset_config=dict(validation_file_pattern=str(image_folder / 'records/val*')))
    both = spec.replace(dataset_config=dict(validation_json_file=str(image_folder / 'a.json')))
    direct = evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder))
    for s in (spec, both):
        metrics = evaluate(FullImageDetector(), eval_dataset_from_spec(s), batch_size=2)
        assert dict(metrics) == dict(direct) and {t.image_id for t, _ in metrics.results} == set(range(1000, 1007))
    with pytest.raises(FileNotFoundError, match='dataset_config.validation_file_pattern'):
        list(
            eval_dataset_from_spec(
                spec.replace(dataset_config=dict(validation_file_pattern=str(image_folder / 'none*')))
            )
        )


def test_progress_leaves_stdout_alone(image_folder, capfd):
    evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder), show_progress=True)
    assert capfd.readouterr().out == ''


def test_pycocotools_gives_the_same_metrics(image_folder):
    samples = list(samples_from_coco(image_folder / 'a.json', image_folder))
    ours, theirs = (evaluate(FullImageDetector(), samples, pycocotools=p) for p in (False, True))
    assert dict(ours) == dict(theirs) and ours.per_class == theirs.per_class
    np.testing.assert_array_equal(ours.precision, theirs.precision)


def test_decoding_in_a_thread_keeps_the_order_and_its_errors(image_folder):
    class SlowDecoder(FullImageDetector):
        def decode(self, images):
            time.sleep(0.01)
            return super().decode(images)

    class BrokenDecoder(FullImageDetector):
        def decode(self, images):
            raise ValueError('no boxes today')

    samples = list(samples_from_coco(image_folder / 'a.json', image_folder))
    slow, quick = (evaluate(detector, samples, batch_size=2) for detector in (SlowDecoder(), FullImageDetector()))
    assert dict(slow) == dict(quick)
    assert [t.image_id for t, _ in slow.results] == [t.image_id for t, _ in quick.results]
    with pytest.raises(ValueError, match='no boxes today'):
        evaluate(BrokenDecoder(), samples, batch_size=2)


def test_how_many_were_looked_at_is_described(image_folder):
    samples = list(samples_from_coco(image_folder / 'a.json', image_folder))

    def described(samples, eval_samples):
        return str(evaluate(FullImageDetector(), samples, eval_samples=eval_samples)).split(', ')[0]

    assert described(samples, None) == '7 images'
    assert described(samples, 3) == 'the first 3 of 7 images (eval_samples 3)'
    assert described(iter(samples), 3) == 'the first 3 images (eval_samples 3)'
    assert described(samples, 5000) == '7 images (all there are; eval_samples is 5,000)'


def test_a_dash_in_a_table_has_a_footnote(image_folder):
    metrics = evaluate(FullImageDetector(), samples_from_coco(image_folder / 'a.json', image_folder))
    assert (
        metrics['APl'] == -1
        and 'there was no such box to find' in str(metrics)
        and 'there was no such box' in metrics._repr_markdown_()
    )
    full = Metrics(
        [0.5] * 12,
        [dict(id=1, name='a', num_boxes=1, num_detections=1, AP=0.5, AP50=0.5, AR=0.5)],
        np.zeros((10, 101, 1)),
        [],
        ClassTable((1,), ('a',), 2),
    )
    assert 'no such box' not in str(full)


def test_image_ap_of_all_at_once_is_that_of_each(shared_dir):
    coco = load_coco(shared_dir / 'data' / 'bccd' / 'test.json')
    classes, rng = ClassTable.from_categories(coco.categories), np.random.default_rng(1)
    results = [(t, guesses(t, classes, rng)) for _, t in islice(samples_from_coco(coco, ''), 12)] + [
        (GroundTruth('none', [], []), Detections([[0, 0, 9, 9]], [0.3], [0]))
    ]
    np.testing.assert_allclose(
        ap_per_image(results, classes), [image_ap(t, d, classes) for t, d in results], rtol=0, atol=1e-12
    )
    assert ap_per_image(results, classes)[-1] == pytest.approx(0.7)


def test_importing_is_light():
    heavy = ('tensorflow', 'keras', 'matplotlib', 'pycocotools')
    code = f"import sys, effdet_nb.evaluate.evaluate; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
        == '[]'
    )


def test_selected_detections_of_a_file_keep_their_own_numbers():
    rows = [dict(image_id='a', category_id=1, bbox=[10.05, 20, 30.05, 40], score=.9),
            dict(image_id='a', category_id=1, bbox=[1.05, 2, 3.05, 4], score=.2)]
    truth = GroundTruth('a', [[0, 0, 9, 9]], [1])
    loaded = load_coco_results(rows, [truth], ClassTable((1,), ('cat',), 2))[0][1]
    for kept, numbers in ((loaded.select(.5), [0]), (loaded[1:], [1]), (loaded[[1, 0]], [1, 0])):
        bbox, scores = bbox_and_scores64(kept)
        assert bbox.tolist() == [rows[i]['bbox'] for i in numbers]
        assert scores.tolist() == [rows[i]['score'] for i in numbers]
    assert bbox_and_scores64(loaded.scaled(2))[0].tolist() == (2*loaded.bbox).tolist()
