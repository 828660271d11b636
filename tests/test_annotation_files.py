"Annotation files with random faults mean the same to conversion, the check, and evaluation, and nothing gets lost."
import copy
import json
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from effdet_nb.data.check import check_annotation_file
from effdet_nb.data.coco_json import CocoError
from effdet_nb.data.image_files import OutsideFolder
from effdet_nb.data.convert import dataset_convert
from effdet_nb.data.faults import Fault, describe_issues
from effdet_nb.data.record_index import Records
from effdet_nb.data.scan import scan_records
from effdet_nb.data.validate import load_ground_truth
from effdet_nb.evaluate.ground_truth import EvalDataset


HW = 24, 32
VALUES = [None, True, False, 0, 1, 2, -1, 7, 7., 1.5, '1', '2', '7', '1.0', ' 2 ', '', 'x', '007', 'N/A', '0', [],
          [1], {}, {'a': 1}, float('nan'), float('inf'), -float('inf'),
          1e308, -1e9, 1e-9, 10**400, 2**63, -2**70, 2**31, 10**6,
          [1, 2, 3, 4], ['1', '2', '3', '4'], [1, 2, 3], [1, 2, 3, None], [0, 0, 0, 0], [-5, 0, 9, 9], [0, 0, 33, 24],
          [1e300]*4, [float('nan')]*4, '\ud800', 'a\0b', '\u00e9.png', '..', '/', '0.png', 'sub/1.PNG', '\u202e',
          'x'*5000, [[[[[[]]]]]], {'counts': 'x', 'size': [3, 4]}]
KEYS = dict(images=['id', 'file_name', 'height', 'width'], categories=['id', 'name'],
            annotations=['id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'])


def sound_file():
    rng = np.random.default_rng(0)
    images = [dict(id=i, file_name=f'{i}.png', height=HW[0], width=HW[1]) for i in range(1, 7)]
    annotations = []
    for i in range(15):
        x, y, w, h = np.add(rng.integers(0, 10, 4), [0, 0, 3, 3]).tolist()
        annotations.append(dict(id=100+i, image_id=1+i%5, category_id=1+i%3, bbox=[x, y, w, h], iscrowd=int(i%7==0),
                                area=w*h, segmentation=[[x, y, x+w, y, x+w, y+h]]))
    return dict(images=images, annotations=annotations, categories=[dict(id=i, name=f'class {i}') for i in (1, 2, 3)])


def mutate(data, rng):
    "Damages one place of a file."
    name = rng.choice([*KEYS])
    entries = data.get(name)
    kind = rng.random()
    if kind<.02: data[name] = rng.choice([None, {}, [], 'x', 3])
    elif kind<.03: data.pop(name, None)
    if not isinstance(entries, list) or not entries: return
    i = rng.randrange(len(entries))
    entry, key = entries[i], rng.choice(KEYS[name])
    value = copy.deepcopy(rng.choice(VALUES))
    if kind<.1: entries.append(copy.deepcopy(entry))
    elif kind<.15: entries[i] = value
    elif kind<.18: del entries[i]
    elif not isinstance(entry, dict): return
    elif kind<.3: entry.pop(key, None)
    elif kind<.4:                                             # another entry with a part of this one
        entries.append(copy.deepcopy(entry) | {key: value})
    elif kind<.45:                                            # the same fault in all entries
        for other in entries:
            if isinstance(other, dict): other[key] = value
    elif kind<.5 and isinstance(entry.get('bbox'), list) and entry['bbox']:
        entry['bbox'][rng.randrange(len(entry['bbox']))] = value
    else: entry[key] = value


@pytest.fixture(scope='module')
def image_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i in range(1, 6): Image.new('RGB', HW[::-1], (i*40, 9, 90)).save(folder/f'{i}.png')    # the sixth is missing
    return folder


def result_of(function, *args, **kwargs):
    "The result of a function, or the error that a user would see."
    try: return function(*args, **kwargs)
    except (CocoError, ValueError, FileNotFoundError) as e:
        assert type(e) in (CocoError, OutsideFolder, ValueError, FileNotFoundError) and str(e)
        return e


def num_dropped(groups): return sum(map(len, groups.values()))


def check_counts(summary, data):
    "Every image and every box of the file was either written or reported."
    report = summary.report
    assert report.num_images + num_dropped(report.dropped_images)==len(data['images'])
    assert summary.num_boxes + num_dropped(report.dropped_boxes)==len(data.get('annotations') or ())
    assert all(issue for issue in describe_issues(report))


def check_ground_truth(summary, path, data):
    "Evaluation and the check read the boxes that conversion wrote, and those outside of their image."
    coco, report = load_ground_truth(path)
    assert coco.num_annotations + num_dropped(report.dropped_boxes)==len(data.get('annotations') or ())
    records = scan_records(Records.from_files(summary.files))
    problems = [p for p in check_annotation_file(records, path) if p.is_error]
    assert not problems, problems
    written = dict(zip(records.image_ids, records.boxes_per_image))
    outside = [str(image_id) for image_id, _ in summary.report.dropped_boxes.get(Fault.OUT_OF_BOUNDS, ())]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                       # images without a record
        truths = [truth for _, truth in EvalDataset(summary.files, path)]
    assert len(truths)==records.num_images
    for truth in truths:
        image_id = str(truth.image_id)
        assert len(truth)==written[image_id] + outside.count(image_id)
        assert np.isfinite(truth.bbox).all() and np.isfinite(truth.area).all()


def try_mutations(folder, image_dir, seeds):
    path = folder/'a.json'
    outcomes = {'converted': 0, 'refused': 0}
    for seed in seeds:
        rng, data = random.Random(seed), sound_file()
        for _ in range(rng.randint(1, 6)): mutate(data, rng)
        path.write_text(json.dumps(data))
        try:
            summary = result_of(dataset_convert, image_dir, path, folder/'out', num_shards=1, workers=1,
                                include_masks=seed%4==0)
            truth = result_of(load_ground_truth, path)
            if isinstance(summary, CocoError): assert type(truth) is type(summary) and str(truth)==str(summary)
            outcomes['refused' if isinstance(summary, Exception) else 'converted'] += 1
            if isinstance(summary, Exception): continue
            check_counts(summary, data)
            if isinstance(truth, Exception): assert not summary.num_boxes
            else: check_ground_truth(summary, path, data)
        except Exception as e:
            raise AssertionError(f'seed {seed}: {type(e).__name__}: {e}') from e
    return outcomes


def test_damaged_annotation_files_mean_the_same_to_all_commands(tmp_path, image_dir):
    outcomes = try_mutations(tmp_path, image_dir, range(100))
    assert outcomes['converted']>40 and outcomes['refused']>10


@pytest.mark.slow
def test_two_thousand_damaged_annotation_files(tmp_path, image_dir):
    outcomes = try_mutations(tmp_path, image_dir, range(1000, 3000))
    assert outcomes['converted']>800 and outcomes['refused']>200
