"Bulk inference: one row per picture whatever happens to it, and the same answers as on one machine."
import json

import numpy as np
import onnx
import pytest
from PIL import Image

from effdet_nb.app.bulk import infer_bulk, predict_and_save
from effdet_nb.export.onnx_nms import add_onnx_nms
from effdet_nb.app.infer import infer
from onnx_toy import toy_onnx_model


@pytest.fixture
def work(tmp_path):
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    (tmp_path/'in'/'deep').mkdir(parents=True)
    for i in range(4): Image.new('RGB', (100+i, 60), (60*i, 0, 0)).save(tmp_path/'in'/('deep' if i > 2 else '')/f'{i}.png')
    (tmp_path/'in'/'bad.jpg').write_bytes(b'?')
    return tmp_path


def test_one_picture_is_one_row(work):
    job = (str(work/'in'/'0.png'), str(work/'p'/'0.png'), str(work/'l'/'0.txt'))
    row = json.loads(json.dumps(predict_and_save(job, str(work/'a.onnx'), {1: 'eins'}, threshold=.5)))
    assert len(row['ids']) == len((work/'l'/'0.txt').read_text().splitlines()) > 0 and Image.open(work/'p'/'0.png').size == (100, 60)
    assert 'bad.jpg' in predict_and_save((str(work/'in'/'bad.jpg'), None, None), str(work/'a.onnx'), {}, threshold=.5)['error']


def test_without_beam_one_line_helps(work, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'apache_beam', None)
    with pytest.raises(ImportError, match=r'effdet_nb\[beam\]'): infer_bulk(work/'a.onnx', work/'in', work/'out')


def test_the_pipeline_says_what_one_machine_says(work):
    pytest.importorskip('apache_beam', reason='needs the extra [beam]')
    many = infer_bulk(work/'a.onnx', work/'in', work/'many', recursive=True)
    one = infer(work/'a.onnx', work/'in', results_dir=work/'one', recursive=True)
    assert many.counts == one.counts == dict(images=4, boxes=sum(one.boxes_per_class.values()), unreadable=1) and many.boxes_per_class == one.boxes_per_class
    files = lambda root: {p.relative_to(root) for p in root.rglob('*') if p.is_file()} - {p.relative_to(root) for p in root.glob('found.jsonl')}
    assert files(work/'many') == files(work/'one')
    a, b = (json.loads((work/n/'detections.json').read_text()) for n in ('many', 'one'))
    assert a['images'] == b['images'] and a['categories'] == b['categories']
    assert [o['bbox'] for o in a['annotations']] == [o['bbox'] for o in b['annotations']]
    for p in (work/'one'/'labels').rglob('*.txt'): assert p.read_text() == (work/'many'/p.relative_to(work/'one')).read_text()
