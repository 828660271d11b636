"The page that runs a detector in a browser: opened from disk in chromium, its pixels and boxes equal those of Python."
import base64
import io
import json
import re
import tarfile

import keras
import numpy as np
import pytest
from conftest import skip_missing
from onnx_toy import toy_onnx_model
from PIL import Image

from effdet_nb.detector.images import read_resized, resize_options
from effdet_nb.detector.efficientdet import Arch
from effdet_nb.detector.images import resize_to_input, to_channels
from effdet_nb.detector.toy_data import make_toy_image
from effdet_nb.data.classes import ClassTable
from effdet_nb.export.browser import (
    ORT_WEB_FILES, browser_graph, fetch_ort_web, page_scripts, read_ort_web, write_browser_page)
from effdet_nb.export.formats import random_detector
from effdet_nb.export.onnx_graph import convert_to_onnx
from effdet_nb.export.onnx_nms import add_nms
from effdet_nb.export.runtimes import OnnxDetector, load_detector
from effdet_nb.export.viewer import model_settings, viewer_html
from effdet_nb.weights.model_file import save_detector


@pytest.fixture(scope='module')
def runtime():
    "The files of ONNX Runtime Web."
    try: return fetch_ort_web()
    except OSError as error: skip_missing('ONNX Runtime Web', str(error))


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An exported network of the toy variant whose scores depend on the image."
    folder = tmp_path_factory.mktemp('browser_model')
    arch = Arch('efficientdet-tiny', image_hw=(128, 160), num_classes=4)
    classes = ClassTable((1, 2, 3), ('round', 'square <b>', 'three & more'), 4)
    keras.utils.set_random_seed(0)
    save_detector(folder/'toy.tlt', random_detector(arch, logit_scale=10.), arch, classes)
    raw, _, _ = convert_to_onnx(folder/'toy.tlt')
    (folder/'toy.onnx').write_bytes(add_nms(raw, 'onnx', score_threshold=.01).SerializeToString())
    return folder/'toy.onnx'


def save_runtime(runtime, folder):
    "Writes the files of the runtime as npm unpacks them; returns the folder."
    (folder/'dist').mkdir(parents=True)
    for name, data in runtime.items(): (folder/'dist'/name).write_bytes(data)
    return folder


@pytest.fixture(scope='module')
def page(runtime, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('page')
    source = save_runtime(runtime, folder/'runtime')
    return write_browser_page([model], folder/'a page with blanks', runtime=source, threshold=.3)


def open_page(browser, page):
    "Opens a page from disk and waits until its model is loaded."
    browser.errors.clear()
    browser.requested_urls.clear()
    browser.goto(page.as_uri())
    status = "document.getElementById('status').textContent"
    assert browser.wait_for(f"document.body.dataset.ready || {status}.startsWith('The model')", 60)=='yes', \
        browser.evaluate_js(status)


DROP = """(async () => {
  const transfer = new DataTransfer()
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))
  for (const [name, data] of FILES) transfer.items.add(new File([bytes(data)], name))
  document.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}))
  await queue
})()"""

def drop(browser, files):
    "Drops files {name: bytes} on the page and waits for their detections."
    encoded = [(name, base64.b64encode(data).decode()) for name, data in files.items()]
    browser.evaluate_js(DROP.replace('FILES', json.dumps(encoded)))


def found_by_page(browser, position=-1):
    "Boxes, scores and channels of the first model in the newest image."
    found = browser.evaluate_js(f'images.at({position}).results[0].detections')
    rows = [(*d['box'], d['score'], d['channel']) for d in found]
    return np.array(rows, np.float64).reshape(-1, 6)


def encode(image, kind, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def found_by_python(model, data, tmp_path, resize='letterbox'):
    path, detector = tmp_path/'image', load_detector(model)
    path.write_bytes(data)
    detector.resize = resize
    resized = read_resized(path, detector.image_hw, upright=True, **resize_options(detector))
    found = detector(resized.image[None])[0].to_original(resized, path, detector.classes).select(0.)
    return np.column_stack([found.boxes, found.scores, found.classes])


def textured(height, width, seed=0):
    "Drawn shapes with noise, so that every pixel matters."
    image = make_toy_image(seed, image_hw=(max(height, 64), max(width, 64))).image[:height, :width].astype(int)
    noise = np.random.default_rng(seed).integers(-30, 30, image.shape)
    return np.clip(image+noise, 0, 255).astype(np.uint8)


RESIZE = """(() => {
  const bytes = Uint8Array.from(atob(DATA), c => c.charCodeAt(0))
  const {pixels, scale} = resizeToInput({data: bytes, width: WIDTH, height: HEIGHT, channels: 3}, SETTINGS)
  return [Array.from(pixels), scale]
})()"""

def pixels_of_page(browser, image, settings):
    "The pixels of the network input as the page computes them, and the scale."
    script = RESIZE.replace('DATA', json.dumps(base64.b64encode(image.tobytes()).decode()))
    script = script.replace('WIDTH', str(image.shape[1])).replace('HEIGHT', str(image.shape[0]))
    pixels, scale = browser.evaluate_js(script.replace('SETTINGS', json.dumps(settings)))
    return np.reshape(pixels, (settings['height'], settings['width'], settings['channels'])), scale


@pytest.mark.parametrize('resize', ['letterbox', 'stretch'])
def test_pixels_equal_those_of_python(browser, page, resize):
    "Exactly, except where new versions of Pillow run the two passes in the other order: up to 1 there."
    open_page(browser, page)
    settings = dict(height=64, width=80, padding=(127, 3, 250), channels=3, resize=resize)
    for hw in ((1, 1), (64, 80), (32, 40), (3, 500), (500, 2), (97, 131), (333, 517), (700, 900), (20, 30), (90, 45)):
        image = np.random.default_rng(hw[0]).integers(0, 256, (*hw, 3), np.uint8)
        pixels, scale = pixels_of_page(browser, image, settings)
        expected, expected_scale, _ = resize_to_input(image, (64, 80), settings['padding'], resize)
        assert tuple(scale)==tuple(expected_scale)
        is_other_order = hw[0] > (1 if resize=='stretch' else 1.8)*hw[1]
        np.testing.assert_allclose(pixels, expected, atol=int(is_other_order), rtol=0, err_msg=str(hw))
        grey, _ = pixels_of_page(browser, image, settings | dict(channels=1))       # ties may be rounded up or down
        np.testing.assert_allclose(grey, to_channels(pixels[None].astype(np.uint8), 1)[0], atol=1, rtol=0)


QUARTER_TURN = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'

def image_files():
    "{file name: bytes} of every kind of file that browsers decode; Python decodes all of them at full size."
    tall, wide = textured(517, 333, 1), textured(200, 420, 2)
    return {
        'a.png': encode(wide, 'PNG'), 'b.png': encode(tall[..., 0], 'PNG'), 'c.jpg': encode(wide[:, :300], 'JPEG'),
        'd.jpg': encode(textured(90, 120, 3), 'JPEG', subsampling=0), 'e.webp': encode(tall, 'WEBP', lossless=True),
        'f.gif': encode(wide, 'GIF'), 'g.bmp': encode(textured(128, 160, 4), 'BMP'),
        'turned.jpg': encode(textured(180, 240, 5), 'JPEG', exif=QUARTER_TURN)}


def test_boxes_equal_those_of_python(browser, page, model, tmp_path):
    """Both run ONNX Runtime, whose kernels for different processors sum in a different order. That changes scores by
    about 1e-5 and boxes by 1e-3 pixels here; the tolerance is ten times as large."""
    open_page(browser, page)
    for name, data in image_files().items():
        drop(browser, {name: data})
        found, expected = found_by_page(browser), found_by_python(model, data, tmp_path)
        assert len(found)==len(expected) > 5, name
        assert_same_objects(found, expected, name)
    assert not browser.errors
    assert {url.partition(':')[0] for url in browser.requested_urls} == {'file', 'blob'}


def test_boxes_of_stretched_images_equal_those_of_python(browser, page, model, tmp_path):
    open_page(browser, page)
    browser.evaluate_js("detectors[0].settings.resize = 'stretch'")
    for hw in ((90, 250), (97, 131), (128, 160)):
        data = encode(textured(*hw), 'PNG')
        drop(browser, {'a.png': data})
        found, expected = found_by_page(browser), found_by_python(model, data, tmp_path, 'stretch')
        assert len(found)==len(expected) > 5
        assert_same_objects(found, expected, str(hw))


def assert_same_objects(found, expected, name, box_tolerance=1e-2, score_tolerance=1e-4):
    "Each object has a partner of its class; objects of equal scores may be in another order."
    for row in expected:
        same_class = found[found[:, 5]==row[5]]
        partner = same_class[np.abs(same_class[:, :4]-row[:4]).max(1).argmin()]
        np.testing.assert_allclose(partner[:4], row[:4], atol=box_tolerance, err_msg=name)
        np.testing.assert_allclose(partner[4], row[4], atol=score_tolerance, err_msg=name)


def test_slider_chooses_boxes_without_running_the_network_again(browser, page):
    open_page(browser, page)
    drop(browser, {'<i>x.png': encode(textured(200, 200), 'PNG')})
    scores = found_by_page(browser)[:, 4]
    caption = "images.at(-1).results[0].caption.textContent"
    milliseconds = browser.evaluate_js('images.at(-1).results[0].milliseconds')
    for threshold in (.05, .3, .9, 1.):
        browser.evaluate_js(f"element('threshold').value = {threshold}; element('threshold').oninput()")
        num_shown = (scores>=threshold).sum()
        assert f'{num_shown} object' in browser.evaluate_js(caption)
        label = browser.evaluate_js("images.at(-1).results[0].canvas.ariaLabel")
        assert sum(map(int, re.findall(r'\d+', label)))==num_shown
        assert browser.evaluate_js("element('score').textContent")==f'{threshold:.2f}'
    assert f'{int(milliseconds+.5)} ms' in browser.evaluate_js(caption)      # JavaScript rounds halves up
    assert browser.evaluate_js("document.querySelector('h2').textContent")=='<i>x.png'


def test_files_that_are_no_images_are_reported(browser, page):
    open_page(browser, page)
    png = encode(textured(64, 64), 'PNG')
    cut_jpeg = encode(textured(64, 64), 'JPEG')[:30]
    drop(browser, {'a.txt': b'hello', 'empty.png': b'', 'cut.jpg': cut_jpeg, 'good.png': png})
    texts = browser.evaluate_js("[...document.querySelectorAll('.error')].map(p => p.textContent)")
    assert len(texts)==3 and all('cannot read it as an image. Choose' in text for text in texts)
    assert len(found_by_page(browser))>5


def test_runtime_is_read_from_a_package_and_from_folders(runtime, tmp_path):
    node_modules = save_runtime(runtime, tmp_path/'node_modules/onnxruntime-web')
    for folder in (node_modules, node_modules/'dist', tmp_path, node_modules.parent):
        assert read_ort_web(folder)==runtime
    with tarfile.open(tmp_path/'x.tgz', 'w:gz') as package: package.add(node_modules/'dist', 'package/dist')
    assert read_ort_web(tmp_path/'x.tgz')==runtime


def test_other_versions_of_the_runtime_are_refused(tmp_path):
    for name in ORT_WEB_FILES: (tmp_path/name).write_bytes(b'other')
    with pytest.raises(ValueError, match='SHA-256 differs. On a computer with npm'): read_ort_web(tmp_path)
    (tmp_path/'ort.wasm.min.js').unlink()
    with pytest.raises(ValueError, match='does not contain ort.wasm.min.js'): read_ort_web(tmp_path)
    (tmp_path/'text.tgz').write_text('text')
    with pytest.raises(ValueError, match='not a complete package'): read_ort_web(tmp_path/'text.tgz')
    with pytest.raises(FileNotFoundError, match='no such file or folder'): read_ort_web(tmp_path/'absent')


@pytest.mark.parametrize('place', [20, 200, 2000])
def test_a_damaged_package_is_one_sentence(tmp_path, place):
    (tmp_path/'ort.wasm.min.js').write_bytes(np.random.default_rng(0).bytes(9000))
    with tarfile.open(tmp_path/'x.tgz', 'w:gz') as package: package.add(tmp_path/'ort.wasm.min.js', 'package/dist/x')
    data = bytearray((tmp_path/'x.tgz').read_bytes())
    data[place:place+400] = b'\xff'*400
    (tmp_path/'x.tgz').write_bytes(data)
    with pytest.raises(ValueError, match='not a complete package|does not contain'): read_ort_web(tmp_path/'x.tgz')


@pytest.mark.parametrize('threshold, text', [(.3, '0.30'), (.5, '0.50'), (.05, '0.05'), (1, '1.00')])
def test_the_page_begins_with_the_score_of_the_slider(threshold, text):
    assert f'<output id="score">{text}</output>' in viewer_html('m', [], threshold, .05)


def test_models_of_the_same_name_are_told_apart_by_their_folders(monkeypatch, tmp_path):
    meta = dict(arch=dict(image_hw=[64, 64]), classes=dict(ids=[1], names=['a'], num_classes=2), nms={})
    monkeypatch.setattr('effdet_nb.export.browser.browser_graph', lambda path, key: (b'x', meta))
    monkeypatch.setattr('effdet_nb.export.browser.read_ort_web', lambda path: dict.fromkeys(ORT_WEB_FILES, b''))
    write_browser_page(['runs/first/model.onnx', 'runs/second/model.onnx'], tmp_path/'page', runtime='x')
    models = json.loads((tmp_path/'page'/'model.js').read_text().removeprefix('const MODELS = '))
    names = ['first/model.onnx', 'second/model.onnx']
    assert [model['settings']['name'] for model in models]==names
    assert f'<title>{", ".join(names)}</title>' in (tmp_path/'page'/'index.html').read_text()


def test_missing_npm_is_one_sentence_with_the_cure(monkeypatch):
    monkeypatch.setattr('shutil.which', lambda *args, **kwargs: None)
    with pytest.raises(FileNotFoundError, match='npm pack onnxruntime-web@.* --runtime'): fetch_ort_web()


def test_failing_npm_is_one_sentence_with_the_cure(monkeypatch, tmp_path):
    (tmp_path/'npm').write_text('#!/bin/sh\necho "npm error network" >&2\nexit 1\n')
    (tmp_path/'npm').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(OSError, match='Is there a network.*npm pack onnxruntime-web@'): fetch_ort_web()


@pytest.mark.parametrize('kind', ['none', 'efficient_nms_trt', 'onnx'])
def test_every_ending_becomes_standard_operators_with_the_same_detections(kind, tmp_path):
    import onnx
    onnx.save(add_nms(toy_onnx_model(), kind, score_threshold=.2), tmp_path/'toy.onnx')
    graph, meta = browser_graph(tmp_path/'toy.onnx')
    assert meta['nms']['kind']=='onnx' and meta['nms']['score_threshold']==.2
    images = np.full((1, 128, 128, 3), 90, np.uint8)
    of_page, of_file = (load(images)[0] for load in (OnnxDetector(graph), load_detector(tmp_path/'toy.onnx')))
    assert len(of_page)>3
    np.testing.assert_allclose(of_page.scores, of_file.scores, atol=1e-6)
    np.testing.assert_allclose(of_page.boxes, of_file.boxes, atol=1e-3)


def test_fixed_batches_and_other_files_are_refused(tmp_path):
    import onnx
    onnx.save(add_nms(toy_onnx_model(batch=4), 'onnx'), tmp_path/'four.onnx')
    with pytest.raises(ValueError, match='batches of 4 images.*without max_batch_size'):
        browser_graph(tmp_path/'four.onnx')
    (tmp_path/'x.tflite').write_bytes(b'\x1c\0\0\0TFL3'+bytes(40))
    with pytest.raises(ValueError, match='a browser runs ONNX files'): browser_graph(tmp_path/'x.tflite')


def test_labels_and_titles_are_text():
    classes = ClassTable((1, 3), ('</script>', '"&'), 4)
    settings = model_settings('m', classes, .1)
    assert settings['labels']==['</script>', None, '"&', None]
    assert '<title>&lt;/script&gt;</title>' in viewer_html('</script>', [], .5, .05)
    scripts = page_scripts([(settings, b'')], dict.fromkeys(ORT_WEB_FILES, b''))
    assert json.loads(scripts['model.js'].removeprefix('const MODELS = '))[0]['settings']==settings
