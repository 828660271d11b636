"What objects show of themselves in a notebook: short, with counts and names, and safe with names from files."
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from effdet_nb.app.inference_results import InferenceSummary
from effdet_nb.core.fragments import html_facts
from effdet_nb.data.classes import ClassTable
from effdet_nb.data.conversion import ConversionResult
from effdet_nb.data.faults import ConversionReport
from effdet_nb.detector.detections import Detections, network_facts
from effdet_nb.evaluate.ground_truth import EvalDataset
from effdet_nb.export.runtimes import OnnxDetector
from effdet_nb.train.spec import Spec

HOSTILE = '<script>alert(1)</script>'


def dataset(coco):
    "An `EvalDataset` of seven records."
    samples = EvalDataset.__new__(EvalDataset)
    samples.records, samples.coco = range(7), coco
    return samples


def detector(num_classes=3, name='runs/m.onnx', is_fixed=True):
    "An `OnnxDetector` without its session."
    found = OnnxDetector.__new__(OnnxDetector)
    found.name, found.image_hw, found.suppresses_itself = name, (320, 640), is_fixed
    found.meta = dict(arch=dict(name='efficientdet-lite0'), data_type='int8')
    names = tuple(f'class {i}' for i in range(num_classes))
    found.classes = ClassTable(tuple(range(1, num_classes+1)), names, num_classes+1)
    return found


RESULT = ConversionResult('train', 12, 3, {'cat': 20, HOSTILE: 4}, ConversionReport(), ['a', 'b'], None, Path('r.json'))
SUMMARY = InferenceSummary(5, Counter({'cat': 7, HOSTILE: 1}), written_to=['out'], seconds=2.)
SPEC = Spec.parse('dataset_config { num_classes: 3 training_file_pattern: "<script>alert(1)</script>" }')


@pytest.mark.parametrize('shown, words', [
    (RESULT, ['train', '>12<', '>24<', 'cat', 'r.json']), (SUMMARY, ['>5<', '>8<', 'cat', 'written to out']),
    (SPEC, ['dataset_config.num_classes', 'training_file_pattern']),
    (Spec(), ['all defaults']),
    (dataset(None), ['>7<', 'that of the records']),
    (dataset(SimpleNamespace(path=HOSTILE, num_annotations=42)), ['>7<', '>42<']),
    (detector(), ['runs/m.onnx', 'efficientdet-lite0', '320 x 640 pixels', 'class 0, class 1, class 2', 'int8']),
    (detector(name=HOSTILE), ['inside the file'])])
def test_a_notebook_shows_counts_and_names_and_runs_no_names(shown, words):
    page = shown._repr_html_()
    for word in words: assert word in page
    assert '<script>' not in page and 'object at 0x' not in repr(shown)


@pytest.mark.parametrize('num_classes, end', [
    (1, 'class 0'), (10, 'class 9'), (11, 'class 9 and 1 more'), (91, 'class 9 and 81 more')])
def test_a_detector_of_many_classes_names_ten(num_classes, end):
    assert network_facts('d0', (1, 2), detector(num_classes).classes)['classes'].endswith(end)
    assert f'{end}, precision int8, NMS outside the file' in repr(detector(num_classes, is_fixed=False))


@pytest.mark.parametrize('num', [0, 1, 20, 21, 300])
def test_printed_detections_are_a_table_of_at_most_twenty(num):
    classes = ClassTable((1,), ('a very long name of a class that is cut',), 2)
    boxes = np.tile(np.float32([1, 2, 30, 4000]), (num, 1))
    found = Detections(boxes, np.full(num, .5), np.zeros(num), class_table=classes)
    lines = str(found).splitlines()
    assert len(lines) == (1 if num==0 else 1+min(num, 20)+(num>20))
    if num:
        assert lines[1].split()[-5:] == ['0.50', '1.0', '2.0', '30.0', '4000.0']
        assert len(set(map(len, lines[:20]))) == 1
    if num>20: assert lines[-1] == f'and {num-20} more'
    assert ('upper left corner' in found._repr_html_()) == (num>0)


@pytest.mark.parametrize('value, text', [(1234567, '1,234,567'), (.5, '0.500'), (None, '–'), (HOSTILE, '&lt;script')])
def test_facts_are_formatted_and_escaped(value, text):
    assert text in html_facts({'name': value}, HOSTILE) and '<script>' not in html_facts({HOSTILE: value}, HOSTILE)
