"Inference: where files go, what a label line holds, unreadable images, and one answer of all detectors."
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from effdet_nb.app.infer import infer, load_for_inference, predict_files, predict_tiled_files
from effdet_nb.app.inference_files import choose_channels, find_images, read_label_map
from effdet_nb.app.inference_results import InferenceSummary
from effdet_nb.core.console import read_status
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.boxes import area, iou
from effdet_nb.detector.detections import Detections, kitti_line, predict_image
from effdet_nb.detector.images import PAD_RGB, read_image, read_resized
from effdet_nb.detector.nms import NmsOptions
from effdet_nb.detector.tiles import Tiling
from effdet_nb.evaluate.ground_truth import GroundTruth
from effdet_nb.evaluate.predict import predict_samples

ROOT = Path(__file__).resolve().parents[1]
TWO_CLASSES = ClassTable.from_categories([dict(id=1, name='a'), dict(id=2, name='b')])


class FullImageDetector:
    "A detector that finds one object as large as its input, and records the sizes of its batches."
    image_hw, classes, meta = (64,64), ClassTable.from_categories([dict(id=7, name='traffic light')]), {}
    nms_options = NmsOptions()

    def __init__(self): self.batches,self.corners = [], set()

    def __call__(self, images):
        assert images.dtype==np.uint8 and images.shape[1:]==(64,64,3)
        self.corners |= {tuple(map(int, image[-1,-1])) for image in images}
        self.batches.append(len(images))
        return [Detections([[0,0,64,64]], [.9], [0]) for _ in images]


IMAGE_NAMES = ['a.jpg', 'b.JPEG', 'c.png', 'd.bmp', 'e.webp', 'f.tif', 'g.tiff', 'h.gif', 'we ird [1].jpg', 'é.png',
               'inner/a.png', '.hidden.png']


@pytest.fixture
def image_folder(tmp_path):
    "Ten images of all formats, one in a subfolder, a hidden image, and a text file."
    folder = tmp_path/'in'
    (folder/'inner').mkdir(parents=True)
    for i,name in enumerate(IMAGE_NAMES): Image.new('RGB', (40+i,30), (10*i,0,0)).save(folder/name)
    (folder/'x.txt').write_text('text')
    return folder


def test_every_format_gives_an_image_of_the_same_name_and_size_and_a_label_file(image_folder, tmp_path):
    detector = FullImageDetector()
    summary = infer(detector, image_folder, tmp_path/'out'/'deep', tmp_path/'labels', batch_size=4)
    assert summary.counts==dict(images=10, boxes=10, unreadable=0) and summary.boxes_per_class=={'traffic light': 10}
    assert detector.batches==[4,4,2]                                       # the last partial batch too
    names = {p.name for p in find_images(image_folder)}
    assert {p.name for p in (tmp_path/'out'/'deep').iterdir()}==names
    for name in names:
        with Image.open(image_folder/name) as before, Image.open(tmp_path/'out'/'deep'/name) as after:
            assert (before.size, before.format)==(after.size, after.format)
        columns = (tmp_path/'labels'/name).with_suffix('.txt').read_text().split()
        assert len(columns)==16 and columns[0]=='traffic_light'
        assert columns[4:6]==['0.000','0.000'] and columns[7]=='30.000'


def test_subfolders_are_repeated_in_the_output(image_folder, tmp_path):
    infer(FullImageDetector(), image_folder, tmp_path/'out', tmp_path/'labels', recursive=True)
    assert (tmp_path/'out'/'inner'/'a.png').is_file() and (tmp_path/'labels'/'inner'/'a.txt').is_file()


def test_the_output_of_one_image_may_be_a_file_name(image_folder, tmp_path):
    infer(FullImageDetector(), image_folder/'a.jpg', tmp_path/'x.png', tmp_path/'y.txt')
    assert Image.open(tmp_path/'x.png').format=='PNG' and (tmp_path/'y.txt').is_file()
    infer(FullImageDetector(), image_folder/'a.jpg', tmp_path/'folder', tmp_path/'labels')
    assert (tmp_path/'folder'/'a.jpg').is_file() and (tmp_path/'labels'/'a.txt').is_file()


def test_labels_of_images_that_differ_only_in_the_ending_do_not_collide(tmp_path):
    (tmp_path/'in').mkdir()
    for name in ('a.jpg', 'a.png', 'b.jpg'): Image.new('RGB', (9,9)).save(tmp_path/'in'/name)
    infer(FullImageDetector(), tmp_path/'in', out_label_path=tmp_path/'labels')
    assert sorted(p.name for p in (tmp_path/'labels').iterdir())==['a.jpg.txt', 'a.png.txt', 'b.txt']
    Image.new('RGB', (9,9)).save(tmp_path/'in'/'a.jpg.jpg')
    infer(FullImageDetector(), tmp_path/'in', out_label_path=tmp_path/'four')
    assert sorted(p.name for p in (tmp_path/'four').iterdir())==['a.jpg.jpg.txt', 'a.jpg.txt', 'a.png.txt', 'b.txt']


def test_a_recursive_run_leaves_out_hidden_folders_and_the_copies_of_earlier_runs(image_folder):
    (image_folder/'.ipynb_checkpoints').mkdir()
    Image.new('RGB', (9,9)).save(image_folder/'.ipynb_checkpoints'/'a.png')
    for name, passed_over in (('res', 0), ('res', 11), ('res2', 11)):
        summary = infer(FullImageDetector(), image_folder, results_dir=image_folder/name, recursive=True)
        assert summary.num_images==11 and summary.passed_over['annotated copy']==passed_over
    assert len(find_images(image_folder/'res'/'images_annotated'))==10     # if you name the folder itself
    assert not (image_folder/'res2'/'images_annotated'/'res').exists()


def test_originals_are_never_replaced(image_folder, tmp_path):
    before = {p: p.read_bytes() for p in image_folder.rglob('*') if p.is_file()}
    (tmp_path/'link').symlink_to(image_folder)
    one_image = image_folder/'a.jpg'
    same_places = ((image_folder, image_folder), (image_folder, tmp_path/'link'), (one_image, image_folder),
                   (one_image, one_image), (image_folder, tmp_path/'in'/'..'/'in'))
    for source,out in same_places:
        with pytest.raises(ValueError, match='would be replaced'): infer(FullImageDetector(), source, out)
    assert before=={p: p.read_bytes() for p in image_folder.rglob('*') if p.is_file()}


def test_an_unreadable_image_does_not_stop_the_others(image_folder, tmp_path, capsys):
    (image_folder/'a2.jpg').write_bytes((image_folder/'a.jpg').read_bytes()[:200])
    (image_folder/'a3.png').write_bytes(b'')
    summary = infer(FullImageDetector(), image_folder, results_dir=tmp_path/'r')
    assert summary.counts==dict(images=10, boxes=10, unreadable=2)
    assert sorted(p.name for p,_ in summary.unreadable)==['a2.jpg', 'a3.png']
    assert capsys.readouterr().err.count('warning: ')==2
    written = {p.name for p in (tmp_path/'r').rglob('*') if p.is_file()}
    assert not {'a2.jpg','a3.png','a2.txt','a3.txt'} & written and not any('.part' in name for name in written)
    assert read_status(tmp_path/'r')[-1]['kpi']==summary.counts


def test_errors_are_raised_before_the_model_is_opened_and_leave_no_files(image_folder, tmp_path):
    gone = tmp_path/'no.tlt'
    with pytest.raises(FileNotFoundError, match='no such file'):
        infer(gone, image_folder, tmp_path/'o', label_map=tmp_path/'nope')
    with pytest.raises(ValueError, match='is a file'): infer(gone, image_folder, image_folder/'x.txt'/'o')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no images'): infer(gone, tmp_path/'empty', tmp_path/'o')
    assert not (tmp_path/'o').exists()


def test_a_full_disk_is_an_error_and_not_an_unreadable_image(image_folder, tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('effdet_nb.core.files.os.fsync', full)
    with pytest.raises(OSError, match='No space left'): infer(FullImageDetector(), image_folder, tmp_path/'o')
    assert not list((tmp_path/'o').rglob('*'))


@pytest.mark.parametrize('is_parallel', [False, True])
def test_a_failure_of_the_detector_ends_the_run_and_is_written_to_the_status_file(image_folder, tmp_path, is_parallel):
    def broken(images): raise ValueError('the network has diverged')
    broken.image_hw, broken.classes = FullImageDetector.image_hw, FullImageDetector.classes
    broken.is_parallel = is_parallel
    with pytest.raises(ValueError): infer(broken, image_folder, results_dir=tmp_path/'r')
    last = read_status(tmp_path/'r')[-1]
    assert last['status']=='FAILURE' and 'diverged' in last['message']


@given(st.text(), st.tuples(*[st.floats(-1e5, 1e5, width=32)]*4), st.floats(0, 1, width=32))
def test_a_label_line_has_sixteen_columns_whatever_the_name(name, box, score):
    columns = kitti_line(name, box, score).split()
    assert len(columns)==16 and '\n' not in kitti_line(name, box, score)
    y1,x1,y2,x2 = box
    assert np.allclose(np.array(columns[4:8], float), [x1,y1,x2,y2], atol=1e-3) and abs(float(columns[15])-score)<1e-6


words = st.text(st.characters(categories=('L','N','P','S','Zs')), max_size=8)
newlines = st.sampled_from(['\n', '\r\n'])
encodings = st.sampled_from(['utf-8', 'utf-8-sig'])


@given(st.lists(words, min_size=1), newlines, st.booleans(), encodings)
def test_label_maps_written_by_any_editor_are_read(names, newline, last, encoding):
    wanted = {i: n.strip() for i,n in enumerate(names, 1) if n.strip()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'map.txt'
        path.write_bytes((newline.join(names) + newline*last).encode(encoding))
        if wanted: assert read_label_map(path)==wanted
        else:
            with pytest.raises(ValueError, match='no names'): read_label_map(path)


corner, side, score = st.integers(0, 50), st.integers(0, 20), st.floats(.01, 1)
detection_rows = st.lists(st.tuples(corner, corner, side, side, score, st.integers(0, 2)), max_size=12)


@given(detection_rows, st.floats(0, 1))
def test_selected_detections_have_a_score_a_category_and_an_area(rows, threshold):
    rows = sorted(rows, key=lambda row: -row[4])
    found = Detections([[y, x, y+h, x+w] for y,x,h,w,_,_ in rows], [row[4] for row in rows], [row[5] for row in rows],
                       class_table=TWO_CLASSES)
    kept = found.select(threshold)
    assert (kept.scores>=np.float32(threshold)).all() and (kept.classes<2).all() and (area(kept.boxes)>0).all()
    is_good = (found.scores>=threshold) & (found.classes<2) & (area(found.boxes)>0)
    assert len(kept)==is_good.sum()


def test_importing_the_module_imports_no_framework():
    code = '''import sys, effdet_nb.app.infer
print([m for m in ("tensorflow", "keras", "onnxruntime", "matplotlib") if m in sys.modules])'''
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip()=='[]', run.stderr


def test_the_summary_tells_a_weak_model_from_a_high_threshold():
    assert 'the best score was 0.310' in repr(InferenceSummary(3, best_score=.31))
    assert 'lower threshold' not in repr(InferenceSummary(3, Counter(a=1), best_score=.6))


def raise_class_scores(model):
    "Changes the prediction layer of the classes, so that an untrained model gives scores of all sizes."
    class_layer = [layer for layer in model.layers if layer.name.startswith('class-') and layer.weights][-1]
    for v in class_layer.weights: v.assign(np.full(v.shape, -2) if v.name=='bias' else np.array(v)*40)


@pytest.fixture(scope='module')
def model_files(tmp_path_factory):
    "One tiny model as .tlt and as exported files with and without suppression, and images of several sizes."
    from effdet_nb.detector.efficientdet import Arch, build
    from effdet_nb.export.onnx_graph import convert_to_onnx
    from effdet_nb.export.onnx_nms import add_nms
    from effdet_nb.weights.model_file import save_detector
    import keras
    import onnx
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp('models')
    arch = Arch('efficientdet-tiny', image_hw=(128,128), num_classes=3)
    model = build(arch)
    raise_class_scores(model)
    save_detector(folder/'a.tlt', model, arch, TWO_CLASSES)
    raw = convert_to_onnx(folder/'a.tlt')[0]
    for kind in ('onnx', 'none'): onnx.save(add_nms(raw, kind), folder/f'{kind}.onnx')
    (folder/'in').mkdir()
    rng = np.random.default_rng(0)
    for i,size in enumerate([(300,200), (90,120), (128,128)]):
        Image.fromarray(rng.integers(0, 255, (*size,3), np.uint8)).save(folder/'in'/f'{i}.png')
    return folder


@pytest.mark.parametrize('pad_rgb', [(127,127,127), (0,0,0), (1,2,3), None])
@pytest.mark.parametrize('is_parallel', [False, True])
def test_images_are_padded_with_the_colour_of_the_detector(tmp_path, pad_rgb, is_parallel):
    Image.fromarray(np.full((20,90,3), 200, np.uint8)).save(tmp_path/'wide.png')
    detector = FullImageDetector()
    detector.is_parallel = is_parallel
    if pad_rgb: detector.pad_rgb = pad_rgb
    infer(detector, tmp_path/'wide.png', out_label_path=tmp_path/'labels')
    predict_image(detector, tmp_path/'wide.png')
    detector.forward,detector.decode = (lambda images: images), detector
    list(predict_samples(detector, [(tmp_path/'wide.png', GroundTruth(0, [], [])),
                                    (np.zeros((9,99,3), np.uint8), GroundTruth(1, [], []))]))
    assert detector.corners=={pad_rgb or PAD_RGB}


@pytest.mark.parametrize('pad_rgb', [(127,127,127), (7,0,255), None])
def test_every_file_of_a_model_has_its_padding(model_files, tmp_path, pad_rgb):
    import onnx
    from effdet_nb.export.metadata import build_metadata, set_metadata
    from effdet_nb.export.runtimes import load_detector
    from effdet_nb.weights.model_file import load_model_file, save_model_file
    stored = load_model_file(model_files/'a.tlt')
    if pad_rgb: stored.meta['arch']['pad_rgb'] = pad_rgb
    else: del stored.meta['arch']['pad_rgb']                # a file from before this entry
    save_model_file(tmp_path/'a.tlt', stored.weights, stored.meta)
    proto = onnx.load(model_files/'none.onnx')
    onnx.save(set_metadata(proto, build_metadata(stored.meta)), tmp_path/'a.onnx')
    for name in ('a.tlt', 'a.onnx'): assert load_detector(tmp_path/name).pad_rgb==(pad_rgb or PAD_RGB)


def assert_same(a, b):
    "Whether two detections agree box by box, up to rounding."
    assert len(a)==len(b)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    for box,label,score in zip(a.boxes, a.classes, a.scores):
        is_equal = (b.classes==label) & (abs(b.scores-score)<1e-4) & (abs(b.boxes-box).max(1)<.1)
        assert is_equal.any()


THRESHOLD = .1


def test_every_way_to_open_and_run_a_model_gives_the_same_boxes(model_files, tmp_path):
    from effdet_nb.export.runtimes import load_detector
    from effdet_nb.weights.model_file import load_keras_detector
    paths = find_images(model_files/'in')
    reference = load_keras_detector(model_files/'a.tlt')
    expected = [reference(path, THRESHOLD) for path in paths]
    assert sum(map(len, expected))>10
    for name in ('a.tlt', 'onnx.onnx', 'none.onnx'):
        detector = load_detector(model_files/name)
        assert detector.nms_options==NmsOptions()
        summary = infer(model_files/name, model_files/'in', results_dir=tmp_path/name, score_threshold=THRESHOLD)
        samples = [(path, GroundTruth(i, [], [])) for i,path in enumerate(paths)]
        evaluated = [found for _,found in predict_samples(detector, samples)]
        for path,want,predicted,found in zip(paths, expected, summary.predictions, evaluated):
            assert_same(detector(path, THRESHOLD), want)
            assert_same(predicted.detections, want)
            assert_same(replace(found, class_table=detector.classes).select(THRESHOLD), want)


@pytest.mark.parametrize('limit', [3, 137, 300])
def test_the_limit_of_the_training_spec_is_obeyed_by_every_file(model_files, tmp_path, limit):
    from effdet_nb.app.model_evaluation import open_detector
    from effdet_nb.export.onnx_nms import NMS_BUILDERS
    from effdet_nb.export.runtimes import load_detector
    from effdet_nb.weights.model_file import load_model_file, save_etlt, save_model_file
    stored = load_model_file(model_files/'a.tlt')
    stored.meta['spec'] = f'eval_config {{ max_detections_per_image: {limit} }}'
    save_model_file(tmp_path/'a.tlt', stored.weights, stored.meta)
    for kind in NMS_BUILDERS: write_exported(model_files, stored, kind, tmp_path/f'{kind}.onnx')
    save_etlt(tmp_path/'a.etlt', (tmp_path/'efficient_nms_trt.onnx').read_bytes())
    image = find_images(model_files/'in')[0]
    counts = {}
    for path in sorted(tmp_path.glob('*.*')):
        detector = load_detector(path)
        assert detector.nms_options.max_detections==limit, path
        counts[path.name] = infer(detector, image, out_label_path=tmp_path/'own', score_threshold=0.).counts['boxes']
        few = infer(detector, image, out_label_path=tmp_path/'few', score_threshold=0., max_detections=2)
        assert few.counts['boxes']==2
    assert open_detector(tmp_path/'onnx.onnx', max_detections=2).nms_options.max_detections==2
    assert len(counts)==5 and max(counts.values())<=limit
    assert min(counts.values())>=max(counts.values())-2>0      # two scores may differ by a rounding error


def write_exported(model_files, stored, kind, path):
    "Writes an exported file with the settings of a model's spec, from a graph that was traced once."
    import onnx
    from effdet_nb.export.export import saved_nms_settings
    from effdet_nb.export.onnx_nms import add_nms, strip_nms
    raw = strip_nms(onnx.load(model_files/'none.onnx'))
    settings = saved_nms_settings(stored, kind)
    if kind=='efficient_nms_trt': settings |= dict(score_threshold=.001)
    onnx.save(add_nms(raw, kind, **settings), path)


@pytest.mark.parametrize('name', ['a.tlt', 'onnx.onnx', 'none.onnx'])
def test_thresholds_and_limits_are_obeyed_by_every_file(model_files, name):
    image = read_resized(find_images(model_files/'in')[0], (128,128)).image
    detector = load_for_inference(model_files/name)
    every = detector(image[None])[0]
    threshold = float(every.scores[8])
    for limit in (5, 50):
        detector.set_nms_options(score_threshold=threshold, max_detections=limit)
        expected = every[every.scores>threshold][:limit]
        assert_same(detector(image[None])[0], expected)
        assert 0<len(expected)<=min(limit, 8)


def test_class_agnostic_suppression_is_a_named_option(model_files, tmp_path):
    path = find_images(model_files/'in')[0]
    image = read_resized(path, (128,128)).image
    for name in ('a.tlt', 'none.onnx'):
        boxes = load_for_inference(model_files/name, class_agnostic=True)(image[None])[0].boxes
        assert len(boxes) and (iou(boxes, boxes)-np.eye(len(boxes))<=.5+1e-5).all()
    options = dict(results_dir=tmp_path/'r', score_threshold=THRESHOLD, max_detections=1000)
    class_wise = infer(model_files/'none.onnx', path, **options)
    agnostic = infer(model_files/'none.onnx', path, class_agnostic=True, **options)
    assert 0<agnostic.counts['boxes']<class_wise.counts['boxes']
    for model in (model_files/'onnx.onnx', FullImageDetector()):
        with pytest.raises(ValueError, match='class_agnostic|per_class=False'):
            infer(model, path, results_dir=tmp_path/'refused', class_agnostic=True)


def test_more_boxes_than_a_file_keeps_are_a_warning(model_files, capsys):
    detector = load_for_inference(model_files/'onnx.onnx', max_detections=101)
    assert detector.nms_options.max_detections==100 and 'warning: max_detections=101' in capsys.readouterr().err
    assert load_for_inference(model_files/'a.tlt', max_detections=101).nms_options.max_detections==101


def test_a_limit_that_the_caller_did_not_name_is_no_warning(model_files, tmp_path, capsys):
    import onnx
    from effdet_nb.export.onnx_graph import convert_to_onnx
    from effdet_nb.export.onnx_nms import add_nms
    few = add_nms(convert_to_onnx(model_files/'a.tlt')[0], 'onnx', max_detections=7)
    onnx.save(few, tmp_path/'few.onnx')
    summary = infer(tmp_path/'few.onnx', model_files/'in', results_dir=tmp_path/'r', score_threshold=THRESHOLD)
    assert 'warning' not in capsys.readouterr().err
    assert max(len(p.detections) for p in summary.predictions)==7
    infer(tmp_path/'few.onnx', model_files/'in', results_dir=tmp_path/'r', max_detections=8)
    assert 'warning: max_detections=8' in capsys.readouterr().err


def test_detections_do_not_depend_on_the_batch(model_files):
    detector = load_for_inference(model_files/'a.tlt')
    paths = find_images(model_files/'in')
    in_batches = predict_files(detector, paths, batch_size=2, score_threshold=THRESHOLD)
    for path,prediction in zip(paths, in_batches):
        alone = next(predict_files(detector, [path], score_threshold=THRESHOLD))
        assert_same(alone.detections, prediction.detections)


def test_a_pattern_chooses_images_and_keeps_their_folders(image_folder, tmp_path):
    summary = infer(FullImageDetector(), str(image_folder/'*.p[mn]g'), results_dir=tmp_path/'r')
    assert summary.num_images==2 and {p.name for p in (tmp_path/'r'/'labels').iterdir()}=={'c.txt', 'é.txt'}
    infer(FullImageDetector(), f'{image_folder}/**/a.*', out_label_path=tmp_path/'l')
    assert {p.relative_to(tmp_path/'l').as_posix() for p in (tmp_path/'l').rglob('*.txt')}=={'a.txt', 'inner/a.txt'}
    one_file = find_images(image_folder/'we ird [1].jpg')              # a name, though it looks like a pattern
    assert [p.name for p in one_file]==['we ird [1].jpg']
    with pytest.raises(FileNotFoundError, match='between quotes'): find_images(image_folder/'*.txt')


def test_the_results_folder_holds_one_coco_file(image_folder, tmp_path):
    from pycocotools.coco import COCO
    (image_folder/'bad.png').write_bytes(b'?')
    infer(FullImageDetector(), image_folder, results_dir=tmp_path/'r', label_map=None)
    data = json.loads((tmp_path/'r'/'detections.json').read_text())
    assert len(data['images'])==len(data['annotations'])==10 and data['categories']==[dict(id=7, name='traffic light')]
    by_id = {i['id']: i for i in data['images']}
    for a in data['annotations']:
        w,h = by_id[a['image_id']]['width'], by_id[a['image_id']]['height']
        assert a['category_id']==7 and a['score']==.9 and np.allclose(a['bbox'], [0,0,min(w,64*w/64),h], atol=1e-2)
    coco = COCO(tmp_path/'r'/'detections.json')
    assert len(coco.loadRes(data['annotations']).anns)==10


class ParallelDetector(FullImageDetector):
    "The same, to be called from several threads with single images; slower for some images than for others."
    is_parallel = True

    def __call__(self, images):
        time.sleep(.02*(int(images[0,0,0,0])//10%3))
        return super().__call__(images)


def test_parallel_inference_keeps_the_order_and_gives_the_same_files(image_folder, tmp_path):
    (image_folder/'b2.png').write_bytes(b'?')
    detector = ParallelDetector()
    one = infer(FullImageDetector(), image_folder, results_dir=tmp_path/'one', workers=3)
    many = infer(detector, image_folder, results_dir=tmp_path/'many', workers=3)
    assert one.counts==many.counts==dict(images=10, boxes=10, unreadable=1) and detector.batches==[1]*10
    assert [f.path for f in one.predictions]==[f.path for f in many.predictions]
    for p in (tmp_path/'one').rglob('*.txt'):
        assert p.read_text()==(tmp_path/'many'/p.relative_to(tmp_path/'one')).read_text()
    for summary in (one, many):
        assert list(summary.stage_seconds)==['read','network','choose','write']
        assert 'ms per image: read' in repr(summary)
    with pytest.raises(ValueError, match='not readable'): list(predict_files(detector, find_images(image_folder)))


def test_onnx_files_of_any_batch_give_the_same_labels(tmp_path, image_folder):
    import onnx
    from effdet_nb.export.onnx_nms import add_onnx_nms
    from effdet_nb.export.runtimes import OnnxDetector
    from onnx_toy import toy_onnx_model
    onnx.save(add_onnx_nms(toy_onnx_model()), tmp_path/'a.onnx')
    onnx.save(add_onnx_nms(toy_onnx_model(batch=4)), tmp_path/'b.onnx')
    for name,threads,is_parallel in (('a.onnx', 1, True), ('a.onnx', None, False), ('b.onnx', 1, False)):
        assert OnnxDetector(tmp_path/name, threads=threads).is_parallel==is_parallel
    a = infer(tmp_path/'a.onnx', image_folder, out_label_path=tmp_path/'a', score_threshold=.3)
    b = infer(tmp_path/'b.onnx', image_folder, out_label_path=tmp_path/'b', score_threshold=.3)
    assert a.boxes_per_class==b.boxes_per_class and a.num_images==10
    for p in (tmp_path/'a').iterdir(): assert p.read_text()==(tmp_path/'b'/p.name).read_text()


@pytest.mark.parametrize('name,copy', [('photo.jfif', 'photo.jfif'), ('photo.JPE', 'photo.JPE'), ('photo', 'photo.png'),
                                       ('photo.heic', 'photo.heic.png')])
def test_an_image_with_any_ending_gets_an_annotated_copy(tmp_path, name, copy):
    from effdet_nb.app.inference_files import output_paths
    (tmp_path/name).write_bytes(b'')
    assert output_paths([tmp_path/name], tmp_path/name, tmp_path/'out') == [tmp_path/'out'/copy]


class LeftDetector:
    "Finds the light left half of an upright image, and in every image a second object of another class."
    image_hw, classes, meta = (64,64), TWO_CLASSES, {}
    nms_options = NmsOptions()

    def __call__(self, images): return [self.find(image) for image in images]

    def find(self, image):
        y,x = np.nonzero(image.min(-1)>200)
        if not len(y): return Detections([[0,0,8,8]], [.6], [1])
        return Detections([[y.min(),x.min(),y.max()+1,x.max()+1], [0,0,8,8]], [.9,.6], [0,1])


def save_turned(path, pixels, orientation):
    "Writes an image so that a viewer that obeys the EXIF orientation shows these pixels."
    stored = {1: pixels, 2: pixels[:,::-1], 3: pixels[::-1,::-1], 4: pixels[::-1], 5: pixels.transpose(1,0,2),
              6: np.rot90(pixels), 7: np.rot90(pixels, 2).transpose(1,0,2), 8: np.rot90(pixels, 3)}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)


def light_on_the_left(hw=(40,80)):
    pixels = np.full((*hw,3), 20, np.uint8)
    pixels[:,:hw[1]//4] = 250
    return pixels


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp'])
@pytest.mark.parametrize('orientation', [3, 6, 8, 5])
@pytest.mark.parametrize('tiling', [None, Tiling((32,32))], ids=['whole', 'tiles'])
def test_photographs_of_phones_are_detected_upright_if_asked(tmp_path, capsys, name, orientation, tiling):
    save_turned(tmp_path/name, light_on_the_left(), orientation)
    options = dict(score_threshold=.5, tiling=tiling, classes=['a'])
    summary = infer(LeftDetector(), tmp_path/name, tmp_path/'out', tmp_path/'labels', upright=True, **options)
    assert 'warning: 1 of 1' not in capsys.readouterr().err
    boxes = summary.predictions[0].detections.boxes
    boxes = [boxes[:,:2].min(0), boxes[:,2:].max(0)]                     # a tile may cut the object
    assert np.allclose(boxes, [[0,0], [40,20]], atol=2.1) and summary.predictions[0].image_hw==(40,80)
    with Image.open(tmp_path/'out'/name) as copy:
        assert copy.size==(80,40) and copy.getexif().get(0x112, 1)==1
        assert np.asarray(copy.convert('RGB'))[30:,8:16].mean()>200>np.asarray(copy.convert('RGB'))[30:,50:].mean()
    infer(LeftDetector(), tmp_path/name, tmp_path/'out', **options)
    warning = capsys.readouterr().err
    assert f'warning: 1 of 1 images, such as {tmp_path/name}' in warning and '--upright' in warning
    with Image.open(tmp_path/'out'/name) as copy: assert (copy.size==(80,40))==(orientation==3)


@pytest.mark.parametrize('orientation', [1, 6, 8])
def test_a_prediction_has_the_orientation_of_its_file(tmp_path, orientation):
    save_turned(tmp_path/'a.jpg', light_on_the_left(), orientation)
    tiled = predict_tiled_files(LeftDetector(), [tmp_path/'a.jpg'], Tiling((32,32)))
    for prediction in (*predict_files(LeftDetector(), [tmp_path/'a.jpg']), *tiled):
        assert prediction.orientation==orientation


def test_images_without_a_flag_are_the_same_upright(tmp_path, capsys):
    save_turned(tmp_path/'a.png', light_on_the_left(), 1)
    Image.fromarray(light_on_the_left()).save(tmp_path/'b.png')
    both = [infer(LeftDetector(), tmp_path, tmp_path/'out', upright=upright) for upright in (False, True)]
    assert [p.detections.boxes.tolist() for p in both[0].predictions]==[p.detections.boxes.tolist()
                                                                        for p in both[1].predictions]
    assert 'warning' not in capsys.readouterr().err


@pytest.mark.parametrize('hw', [(401,603), (400,600), (64,500)])
@pytest.mark.parametrize('orientation', [2, 3, 4, 5, 6, 7, 8])
def test_an_upright_jpeg_is_read_at_a_reduced_size_like_the_turned_file(tmp_path, hw, orientation):
    rows,columns = np.indices(hw)
    pixels = np.stack([rows*255//hw[0], columns*255//hw[1], (rows+columns)%64], -1).astype(np.uint8)
    save_turned(tmp_path/'a.jpg', pixels, orientation)
    read = read_resized(tmp_path/'a.jpg', (64,96), upright=True)
    Image.fromarray(read_image(tmp_path/'a.jpg', upright=True)).save(tmp_path/'b.png')
    full = read_resized(tmp_path/'b.png', (64,96))
    assert read.original_hw==full.original_hw==hw and read.scale==full.scale
    assert np.abs(read.image[...,:2].astype(int)-full.image[...,:2]).mean()<3


@pytest.mark.parametrize('chosen,expected', [(['b'], {'b'}), (['B'], {'b'}), (['1'], {'a'}), ([2], {'b'}), (['a', '2'],
                                                                                                        {'a', 'b'})])
def test_classes_are_chosen_by_name_or_id(tmp_path, chosen, expected):
    Image.fromarray(light_on_the_left()).save(tmp_path/'a.png')
    summary = infer(LeftDetector(), tmp_path, out_label_path=tmp_path/'labels', classes=chosen)
    assert set(summary.boxes_per_class)==expected
    assert {line.split()[0] for line in (tmp_path/'labels/a.txt').read_text().splitlines()}==expected


@pytest.mark.parametrize('ids', [(10,20,30), (1,3,7)])
@pytest.mark.parametrize('name', ['red', 'green', 'blue'])
def test_channels_of_classes_do_not_depend_on_the_ids(ids, name):
    names = ('red','green','blue')
    for num_classes in (4, 10):
        table = ClassTable(ids, names, num_classes)
        assert choose_channels(table, [name])==choose_channels(table, [ids[names.index(name)]])==(
            table.channel(ids[names.index(name)]),)


@pytest.mark.parametrize('names,chosen,channels', [
    (['animal', 'animal', 'car'], ['animal'], (0,1)), (['animal', 'Animal', 'car'], ['animal'], (0,)),
    (['Animal', 'ANIMAL', 'car'], ['animal', 'car'], (0,1,2)), (['animal', 'animal', 'car'], ['2'], (1,))])
def test_a_name_stands_for_all_categories_of_this_name(names, chosen, channels):
    categories = [dict(id=k, name=name) for k,name in enumerate(names, 1)]
    assert choose_channels(ClassTable.from_categories(categories), chosen)==channels


def test_an_unknown_class_is_one_sentence_with_a_suggestion(tmp_path):
    Image.fromarray(light_on_the_left()).save(tmp_path/'a.png')
    table = ClassTable.from_categories([dict(id=1, name='kangaroo'), dict(id=2, name='RBC')])
    for name,hint in (('kangeroo', 'Did you mean kangaroo'), ('rbcs', 'Did you mean RBC'), ('9', ': kangaroo, RBC')):
        with pytest.raises(ValueError, match=f'--classes {name}: .*{hint}'): choose_channels(table, [name])
    with pytest.raises(ValueError, match='--classes c'):
        infer(LeftDetector(), tmp_path, tmp_path/'out', classes=['c'])
    assert not (tmp_path/'out').exists()


def save_list(path, names):
    images = [dict(id=i, file_name=name, height=30, width=40) for i,name in enumerate(names)]
    path.write_text(json.dumps(dict(images=images, annotations=[], categories=[dict(id=1, name='a')])))


def test_only_the_images_of_an_annotation_file_are_processed(image_folder, tmp_path, capsys):
    part = tmp_path/'val.json'
    for names,expected in ((['c.png', 'a.jpg'], ['a.jpg', 'c.png']), (['inner/a.png'], ['a.png']),
                           (['C.PNG', 'é.png'], ['c.png', 'é.png'])):
        save_list(part, names)
        summary = infer(FullImageDetector(), image_folder, tmp_path/'out', only=part)
        assert [p.path.name for p in summary.predictions]==expected and not summary.passed_over
    assert (tmp_path/'out/inner/a.png').is_file() and not (tmp_path/'out/d.bmp').exists()
    save_list(part, ['c.png', 'gone.jpg', 'away.jpg'])
    capsys.readouterr()
    assert infer(FullImageDetector(), image_folder, tmp_path/'out', only=part).num_images==1
    assert '2 of the 3 images in' in capsys.readouterr().err
    save_list(part, ['gone.jpg', 'away.jpg'])
    with pytest.raises(FileNotFoundError, match='2 of the 2 images .* such as away.jpg. Give the folder'):
        infer(FullImageDetector(), image_folder, tmp_path/'out', only=part)
    with pytest.raises(ValueError, match='--only needs the folder'):
        infer(FullImageDetector(), image_folder/'a.jpg', tmp_path/'out', only=part)


@pytest.mark.parametrize('options,message', [
    (dict(out_label_path='r.jsonl'), r'r.jsonl: labels of images are not written to files ending in .jsonl. Give'),
    (dict(out_label_path='r.PNG'), 'r.PNG: labels of images are not'),
    (dict(out_image_path='r.csv'), 'r.csv: annotated images are not'),
    (dict(out_image_path='r.webm'), 'r.webm: annotated images are not'),
    (dict(out_label_path='r.mpg'), 'r.mpg: labels of images are not'),
    (dict(out_image_path='r.mp4'), 'Give a folder, such as r, or for one image a name in .jpg')])
def test_a_folder_is_not_created_under_the_name_of_a_file(image_folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for source in (image_folder, image_folder/'a.jpg'):
        with pytest.raises(ValueError, match=message): infer(FullImageDetector(), source, **options)
    assert [p.name for p in tmp_path.iterdir()]==['in']
    (tmp_path/'r.v2').mkdir()
    assert infer(FullImageDetector(), image_folder/'a.jpg', 'r.v2').num_images==1


def test_an_annotation_file_of_other_images_is_an_error_before_the_work(image_folder, tmp_path):
    other, results = tmp_path/'other.json', tmp_path/'results.json'
    detector = FullImageDetector()
    images = [dict(id=1, file_name='x.jpg', height=30, width=40)]
    other.write_text(json.dumps(dict(images=images, annotations=[], categories=[dict(id=7, name='traffic light')])))
    for source, count in ((image_folder, 10), (image_folder/'a.jpg', 1), (image_folder/'c.png', 1)):
        with pytest.raises(ValueError, match=f'lists none of the {count} images'):
            infer(detector, source, out_label_path=results, annotations_file=other)
    assert detector.batches==[] and not results.exists()


def test_nothing_is_named_as_written_if_no_image_could_be_read(tmp_path):
    for name in ('a.txt', 'b.jpg', 'c'):
        (tmp_path/name).write_text('text')
        summary = infer(FullImageDetector(), tmp_path/name, tmp_path/'out')
        assert 'written to' not in repr(summary) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('best,hint', [(.285, '-t 0.2 '), (.05, '-t 0.05 '), (.0042, '-t 0.004 '), (.9, '-t 0.9 ')])
def test_a_run_without_boxes_names_a_threshold_that_the_best_score_reaches(best, hint):
    assert hint in repr(InferenceSummary(3, best_score=best, score_threshold=.95))
    assert 'add -t' not in repr(InferenceSummary(3, best_score=0.))


@pytest.mark.parametrize('width,has_tiles,is_hint', [(300, False, True), (193, False, True), (192, False, False),
                                                     (300, True, False)])
def test_a_run_without_boxes_names_tiles_if_the_images_are_large(tmp_path, width, has_tiles, is_hint):
    Image.new('RGB', (width, 50)).save(tmp_path/'a.png')
    tiling = Tiling((64,64)) if has_tiles else None
    summary = infer(FullImageDetector(), tmp_path, tmp_path/'out', score_threshold=.95, tiling=tiling)
    assert ('add --tile 64' in repr(summary))==is_hint


@pytest.mark.parametrize('num_images,tiling,batches', [(10, None, [3,1]), (9, None, []), (2, None, []),
                                                       (10, Tiling((64,64)), [])])
@pytest.mark.parametrize('compiles', [True, False])
def test_only_a_long_run_of_a_model_that_compiles_is_warmed_up(tmp_path, monkeypatch, num_images, tiling, batches,
                                                               compiles):
    for i in range(num_images): Image.new('RGB', (40,30)).save(tmp_path/f'{i}.png')
    detector, before = FullImageDetector(), []
    detector.compiles = compiles
    monkeypatch.setattr('effdet_nb.export.runtimes.load_detector', lambda *args: detector)
    monkeypatch.setattr('effdet_nb.app.infer._write_all', lambda *args: before.extend(detector.batches))
    detector.set_nms_options = lambda **options: None
    options = dict(batch_size=3, tiling=tiling)
    infer('model.tlt', tmp_path, tmp_path/'out', **options)
    assert before==(batches if compiles else [])
    detector.batches.clear()
    before.clear()
    infer(detector, tmp_path, tmp_path/'out', **options)                                       # an open detector
    assert before==[]


def test_files_that_compile_nothing_say_so(model_files):
    for name in ('onnx.onnx', 'none.onnx'): assert not load_for_inference(model_files/name).compiles
    assert getattr(load_for_inference(model_files/'a.tlt'), 'compiles', True)


class CrowdDetector(FullImageDetector):
    "A detector of 150 boxes of class a with the score 0.9 and five of class b with 0.8, as many as its limit allows."
    classes = TWO_CLASSES

    def set_nms_options(self, **changes): self.nms_options = replace(self.nms_options, **changes)

    def __call__(self, images):
        left = np.arange(155)%60
        boxes = np.stack([left*0, left, left*0+64, left+4], 1)
        found = Detections(boxes, [.9]*150+[.8]*5, [0]*150+[1]*5)
        return [found[:self.nms_options.max_detections] for _ in images]


def count_of_classes(model, folder, **options):
    return dict(infer(model, folder, out_label_path=folder/'labels', **options).boxes_per_class)


@pytest.mark.parametrize('is_file', [True, False])
def test_other_classes_do_not_displace_the_chosen_ones(tmp_path, monkeypatch, capsys, is_file):
    Image.new('RGB', (64,64)).save(tmp_path/'a.png')
    detector = CrowdDetector()
    monkeypatch.setattr('effdet_nb.export.runtimes.load_detector', lambda *args: detector)
    model = 'model.tlt' if is_file else detector
    for options, expected in (
            (dict(), dict(a=100)), (dict(classes=['b']), dict(b=5)), (dict(classes=['b'], max_detections=3), dict(b=3)),
            (dict(classes=['a']), dict(a=100)), (dict(classes=['a'], max_detections=120), dict(a=120)),
            (dict(classes=['a', 'b'], max_detections=152), dict(a=150, b=2)),
            (dict(classes=['b'], score_threshold=.85), dict())):
        detector.nms_options = NmsOptions()
        assert count_of_classes(model, tmp_path, **options)==expected
    detector.nms_options = NmsOptions()
    assert count_of_classes(model, tmp_path, classes=['b'], tiling=Tiling((64,64)))==dict(b=5)
    assert detector.nms_options.max_detections==100 and 'warning' not in capsys.readouterr().err


@pytest.mark.parametrize('name', ['a.tlt', 'none.onnx', 'onnx.onnx'])
def test_a_limit_on_boxes_counts_only_those_of_the_chosen_classes(model_files, tmp_path, capsys, name):
    options = dict(results_dir=tmp_path/'r', score_threshold=THRESHOLD)
    boxes = [infer(model_files/name, model_files/'in', max_detections=n, **options).predictions for n in (100, 3)]
    wanted = boxes[0][0].detections.class_names[-1]
    capsys.readouterr()
    chosen = infer(model_files/name, model_files/'in', max_detections=3, classes=[wanted], **options)
    for few,kept,of_all in zip(boxes[1], chosen.predictions, boxes[0]):
        assert len(few.detections)==3 and len(kept.detections)<=3
        expected = [s for s,c in zip(of_all.detections.scores, of_all.detections.class_names) if c==wanted][:3]
        np.testing.assert_allclose(kept.detections.scores, expected, atol=1e-5)
    assert ('best boxes of all classes' in capsys.readouterr().err)==(name=='onnx.onnx')


@pytest.mark.parametrize('best,threshold', [(.9, .5), (.5, .5), (.3, .3)])
def test_no_threshold_is_proposed_that_is_not_lower(best, threshold):
    text = repr(InferenceSummary(3, best_score=best, score_threshold=threshold))
    assert 'add -t' not in text and 'no box reached' not in text and f'up to {best:.3f}' in text


def test_the_images_are_checked_before_the_model_is_opened(image_folder, tmp_path):
    other = tmp_path/'other.json'
    save_list(other, ['x.jpg'])
    for source in (image_folder, image_folder/'a.jpg', image_folder/'c.png'):
        with pytest.raises(ValueError, match='lists none of the'):
            infer(tmp_path/'no_model.tlt', source, out_label_path=tmp_path/'results.json', annotations_file=other)
