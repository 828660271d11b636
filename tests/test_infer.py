"Guards of the inference chapter: where files go, what a label line holds, faulty pictures, the real detector."
import subprocess, sys, tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from effdet_nb.data.classes import ClassTable
from effdet_nb.app.infer import InferenceSummary, find_images, infer, predict_files, read_label_map, filter_detections, output_paths
from effdet_nb.detector.detections import kitti_line
from effdet_nb.detector.detections import Detections
from effdet_nb.core.console import read_status


class Whole:
    "A detector that finds one thing as large as the picture's canvas, and counts how often it was asked."
    image_hw, classes, meta = (64,64), ClassTable.from_categories([dict(id=7, name='traffic light')]), {}
    def __init__(self, score=.9): self.score, self.batches = score, []
    def __call__(self, images):
        assert images.dtype==np.uint8 and images.shape[1:]==(64,64,3)
        self.batches.append(len(images))
        return [Detections([[0,0,64,64]], [self.score], [0]) for _ in images]


@pytest.fixture
def pictures(tmp_path):
    "Eleven pictures of all formats, a folder inside, a hidden file, and what is no picture."
    folder = tmp_path/'in'
    (folder/'inner').mkdir(parents=True)
    for i,name in enumerate(['a.jpg', 'b.JPEG', 'c.png', 'd.bmp', 'e.webp', 'f.tif', 'g.tiff', 'h.gif', 'we ird [1].jpg', 'é.png', 'inner/a.png', '.hidden.png']):
        Image.new('RGB', (40+i,30), (10*i,0,0)).save(folder/name)
    (folder/'x.txt').write_text('text')
    return folder


def test_every_format_gives_a_picture_of_the_same_name_and_size_and_a_label(pictures, tmp_path):
    detector = Whole()
    summary = infer(detector, pictures, tmp_path/'out'/'deep', tmp_path/'labels', batch_size=4)
    assert summary.counts==dict(images=10, boxes=10, unreadable=0) and summary.boxes_per_class=={'traffic light': 10}
    assert detector.batches==[4,4,2]                                       # the last partial batch too
    names = {p.name for p in find_images(pictures)}
    assert {p.name for p in (tmp_path/'out'/'deep').iterdir()}==names
    for name in names:
        with Image.open(pictures/name) as before, Image.open(tmp_path/'out'/'deep'/name) as after: assert (before.size, before.format)==(after.size, after.format)
        columns = (tmp_path/'labels'/name).with_suffix('.txt').read_text().split()
        assert len(columns)==16 and columns[0]=='traffic_light' and columns[4:6]==['0.000','0.000'] and columns[7]=='30.000'


def test_folders_inside_are_repeated(pictures, tmp_path):
    infer(Whole(), pictures, tmp_path/'out', tmp_path/'labels', recursive=True)
    assert (tmp_path/'out'/'inner'/'a.png').is_file() and (tmp_path/'labels'/'inner'/'a.txt').is_file()


def test_one_picture_may_have_a_file_name(pictures, tmp_path):
    infer(Whole(), pictures/'a.jpg', tmp_path/'x.png', tmp_path/'y.txt')
    assert Image.open(tmp_path/'x.png').format=='PNG' and (tmp_path/'y.txt').is_file()
    infer(Whole(), pictures/'a.jpg', tmp_path/'folder', tmp_path/'labels')
    assert (tmp_path/'folder'/'a.jpg').is_file() and (tmp_path/'labels'/'a.txt').is_file()


def test_labels_of_pictures_that_differ_only_in_the_ending_do_not_collide(tmp_path):
    (tmp_path/'in').mkdir()
    for name in ('a.jpg', 'a.png', 'b.jpg'): Image.new('RGB', (9,9)).save(tmp_path/'in'/name)
    infer(Whole(), tmp_path/'in', out_label_path=tmp_path/'labels')
    assert sorted(p.name for p in (tmp_path/'labels').iterdir())==['a.jpg.txt', 'a.png.txt', 'b.txt']


def test_originals_are_never_replaced(pictures, tmp_path):
    before = {p: p.read_bytes() for p in pictures.rglob('*') if p.is_file()}
    (tmp_path/'link').symlink_to(pictures)
    for source,out in ((pictures, pictures), (pictures, tmp_path/'link'), (pictures/'a.jpg', pictures), (pictures/'a.jpg', pictures/'a.jpg'), (pictures, tmp_path/'in'/'..'/'in')):
        with pytest.raises(ValueError, match='would be replaced'): infer(Whole(), source, out)
    assert before=={p: p.read_bytes() for p in pictures.rglob('*') if p.is_file()}


def test_an_unreadable_picture_loses_nothing_else(pictures, tmp_path, capsys):
    (pictures/'a2.jpg').write_bytes((pictures/'a.jpg').read_bytes()[:200])
    (pictures/'a3.png').write_bytes(b'')
    summary = infer(Whole(), pictures, results_dir=tmp_path/'r')
    assert summary.counts==dict(images=10, boxes=10, unreadable=2)
    assert sorted(p.name for p,_ in summary.unreadable)==['a2.jpg', 'a3.png']
    assert capsys.readouterr().err.count('warning: ')==2
    made = {p.name for p in (tmp_path/'r').rglob('*') if p.is_file()}
    assert not {'a2.jpg','a3.png','a2.txt','a3.txt'} & made and not any('.part' in n for n in made)
    assert read_status(tmp_path/'r')[-1]['kpi']==summary.counts


def test_errors_come_before_the_model_is_opened_and_leave_nothing(pictures, tmp_path):
    gone = tmp_path/'no.tlt'
    with pytest.raises(FileNotFoundError, match='no such label map'): infer(gone, pictures, tmp_path/'o', label_map=tmp_path/'nope')
    with pytest.raises(ValueError, match='is a file'): infer(gone, pictures, pictures/'x.txt'/'o')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no pictures'): infer(gone, tmp_path/'empty', tmp_path/'o')
    assert not (tmp_path/'o').exists()


def test_a_full_disk_is_an_error_and_not_an_unreadable_picture(pictures, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('effdet_nb.core.files.os.fsync', full)
    with pytest.raises(OSError, match='No space left'): infer(Whole(), pictures, tmp_path/'o')
    assert not list((tmp_path/'o').rglob('*'))


def test_failure_is_told_in_the_status_file(pictures, tmp_path):
    def broken(images): raise ValueError('the network has diverged')
    broken.image_hw, broken.classes = Whole.image_hw, Whole.classes
    with pytest.raises(ValueError): infer(broken, pictures, results_dir=tmp_path/'r')
    assert read_status(tmp_path/'r')[-1]['status']=='FAILURE' and 'diverged' in read_status(tmp_path/'r')[-1]['message']


@given(st.text(), st.tuples(*[st.floats(-1e5, 1e5, width=32)]*4), st.floats(0, 1, width=32))
def test_a_label_line_has_sixteen_columns_whatever_the_name(name, box, score):
    columns = kitti_line(name, box, score).split()
    assert len(columns)==16 and '\n' not in kitti_line(name, box, score)
    y1,x1,y2,x2 = box
    assert np.allclose(np.array(columns[4:8], float), [x1,y1,x2,y2], atol=1e-3) and abs(float(columns[15])-score)<1e-6


word = st.text(st.characters(categories=('L','N','P','S','Zs')), max_size=8)

@given(st.lists(word, min_size=1), st.sampled_from(['\n', '\r\n']), st.booleans(), st.sampled_from(['utf-8', 'utf-8-sig']))
def test_label_maps_of_any_editor(names, newline, last, encoding):
    wanted = {i: n.strip() for i,n in enumerate(names, 1) if n.strip()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'map.txt'
        path.write_bytes((newline.join(names) + newline*last).encode(encoding))
        if wanted: assert read_label_map(path)==wanted
        else:
            with pytest.raises(ValueError, match='no names'): read_label_map(path)


boxes = st.lists(st.tuples(st.integers(0,50), st.integers(0,50), st.integers(1,20), st.integers(1,20), st.floats(0.01,1), st.integers(0,2)), max_size=12)

@given(boxes, st.floats(0,1), st.booleans())
def test_what_is_kept_is_sure_enough_and_alone_in_its_place(found, threshold, per_class):
    from effdet_nb.detector.boxes import iou
    classes = ClassTable.from_categories([dict(id=1, name='a'), dict(id=2, name='b')])
    d = Detections([[y,x,y+h,x+w] for y,x,h,w,_,_ in found], [o[4] for o in found], [o[5] for o in found])
    kept = filter_detections(d, classes, threshold, per_class)
    assert (kept.scores>=np.float32(threshold)).all() and (np.diff(kept.scores)<=0).all() and (kept.classes<2).all()
    rivals = iou(kept.boxes, kept.boxes) * (1-np.eye(len(kept)))
    if per_class: rivals = rivals * (kept.classes[:,None]==kept.classes)
    assert not (rivals>.5+1e-6).any()
    if (best := d[(d.classes<2) & (d.scores>=threshold)]): assert kept.scores[0]==best.scores.max()


def test_the_module_brings_no_framework():
    code = 'import sys, effdet_nb.app.infer; print([m for m in ("tensorflow","keras","onnxruntime","matplotlib") if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert out.stdout.strip()=='[]', out.stderr


def test_summary_tells_a_blind_model_from_a_high_threshold():
    assert 'the best score was 0.310' in repr(InferenceSummary(3, best_score=.31)) and 'lower threshold' not in repr(InferenceSummary(3, Counter(a=1), best_score=.6))


def test_a_keras_detector_finds_its_own_boxes_in_files_of_any_size(tmp_path):
    from effdet_nb.detector.nms import NmsOptions
    from effdet_nb.detector.predictor import KerasDetector
    from effdet_nb.detector.efficientdet import Arch, build
    arch = Arch(image_hw=(128,128), num_classes=3)
    detector = KerasDetector(build(arch), arch, ClassTable.from_categories([dict(id=1, name='a'), dict(id=2, name='b')]), nms_options=NmsOptions(score_threshold=.005))
    rng = np.random.default_rng(0)
    (tmp_path/'in').mkdir()
    for i,size in enumerate([(300,200), (90,120), (128,128)]): Image.fromarray(rng.integers(0, 255, (*size,3), np.uint8)).save(tmp_path/'in'/f'{i}.png')
    alone = [o for p in find_images(tmp_path/'in') for o in predict_files(detector, [p], threshold=.005)]
    together = list(predict_files(detector, find_images(tmp_path/'in'), batch_size=2, threshold=.005))
    for a,b in zip(alone, together): np.testing.assert_allclose(a.boxes, b.boxes, atol=.05)
    assert sum(len(o.category_ids) for o in together)>0
    summary = infer(detector, tmp_path/'in', results_dir=tmp_path/'r', score_threshold=.005)
    assert summary.counts['boxes']==sum(len(o.category_ids) for o in together)


def test_patterns_choose_pictures_and_keep_their_folders(pictures, tmp_path):
    summary = infer(Whole(), str(pictures/'*.p[mn]g'), results_dir=tmp_path/'r')
    assert summary.num_images==2 and {p.name for p in (tmp_path/'r'/'labels').iterdir()}=={'c.txt', 'é.txt'}
    infer(Whole(), f'{pictures}/**/a.*', out_label_path=tmp_path/'l')
    assert {p.relative_to(tmp_path/'l').as_posix() for p in (tmp_path/'l').rglob('*.txt')}=={'a.txt', 'inner/a.txt'}
    assert [p.name for p in find_images(pictures/'we ird [1].jpg')]==['we ird [1].jpg']              # a name, though it looks like a pattern
    with pytest.raises(FileNotFoundError, match='between quotes'): find_images(pictures/'*.txt')


def test_the_results_folder_holds_one_coco_file(pictures, tmp_path):
    import json
    from pycocotools.coco import COCO
    (pictures/'bad.png').write_bytes(b'?')
    infer(Whole(), pictures, results_dir=tmp_path/'r', label_map=None)
    data = json.loads((tmp_path/'r'/'detections.json').read_text())
    assert len(data['images'])==len(data['annotations'])==10 and data['categories']==[dict(id=7, name='traffic light')]
    by_id = {i['id']: i for i in data['images']}
    for a in data['annotations']:
        w,h = by_id[a['image_id']]['width'], by_id[a['image_id']]['height']
        assert a['category_id']==7 and a['score']==.9 and np.allclose(a['bbox'], [0,0,min(w,64*w/64),h], atol=1e-2)
    coco = COCO(tmp_path/'r'/'detections.json')
    assert len(coco.loadRes(data['annotations']).anns)==10


class Alone(Whole):
    "The same, to be asked from several threads for one picture at a time; slower for some pictures than for others."
    is_parallel = True
    def __call__(self, images):
        import time
        time.sleep(.02*(int(images[0,0,0,0])//10%3))
        return super().__call__(images)


def test_side_by_side_is_in_order_and_the_same(pictures, tmp_path):
    (pictures/'b2.png').write_bytes(b'?')
    detector = Alone()
    one, many = (infer(d, pictures, results_dir=tmp_path/n, workers=3) for d,n in ((Whole(),'one'), (detector,'many')))
    assert one.counts==many.counts==dict(images=10, boxes=10, unreadable=1) and detector.batches==[1]*10
    assert [f.path for f in one.predictions]==[f.path for f in many.predictions]
    for p in (tmp_path/'one').rglob('*.txt'): assert p.read_text()==(tmp_path/'many'/p.relative_to(tmp_path/'one')).read_text()
    for s in (one, many): assert list(s.stage_seconds)==['read','network','choose','write'] and 'ms per picture: read' in repr(s)
    with pytest.raises(ValueError, match='not readable'): list(predict_files(detector, find_images(pictures)))


def test_onnx_files_work_side_by_side(tmp_path, pictures):
    import onnx
    from effdet_nb.export.onnx_nms import add_onnx_nms
    from effdet_nb.export.runtimes import OnnxDetector
    from onnx_toy import toy_onnx_model
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    onnx.save(add_onnx_nms(toy_onnx_model(batch=4)), tmp_path/'b.onnx')
    assert [OnnxDetector(tmp_path/n, threads=t).is_parallel for n,t in (('a.onnx',1), ('a.onnx',None), ('b.onnx',1))]==[True, False, False]
    a,b = (infer(tmp_path/n, pictures, out_label_path=tmp_path/n[0], score_threshold=.3) for n in ('a.onnx','b.onnx'))
    assert a.boxes==b.boxes and a.images==10
    for p in (tmp_path/'a').iterdir(): assert p.read_text()==(tmp_path/'b'/p.name).read_text()
