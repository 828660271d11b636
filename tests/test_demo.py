"The local page of effdet_demo: its server, two models side by side in chromium, and the end by Ctrl-C."
import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from onnx_toy import toy_onnx_model
from PIL import Image
from test_browser_page import drop, encode, found_by_page, textured

from effdet_nb.app.demo import MAX_UPLOAD, DemoModel, DemoServer
from effdet_nb.app.model_evaluation import short_names
from effdet_nb.app.infer import load_for_inference
from effdet_nb.detector.detections import predict_image
from effdet_nb.export.onnx_nms import add_nms
from effdet_nb.export.runtimes import load_detector


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Two exported networks: one with suppression in its graph from 0.3 on, one without."
    folder = tmp_path_factory.mktemp('demo')
    for name, proto in (('first', add_nms(toy_onnx_model(), 'onnx', score_threshold=.3)),
                        ('second', add_nms(toy_onnx_model(seed=1, num_classes=5), 'none'))):
        (folder/name).mkdir()
        (folder/name/'model.onnx').write_bytes(proto.SerializeToString())
    return [folder/'first/model.onnx', folder/'second/model.onnx']


@pytest.fixture(scope='module')
def server(models):
    detectors = [load_for_inference(path, score_threshold=.05) for path in models]
    with DemoServer([DemoModel(name, d) for name, d in zip(short_names(models), detectors)], port=0) as demo:
        thread = threading.Thread(target=demo.serve_forever, daemon=True)
        thread.start()
        yield demo
        demo.shutdown()


def request(server, method, path, body=None, **headers):
    "Sends a request; returns status, type and content of the answer."
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.getheader('Content-Type'), answer.read()


def open_demo(browser, address):
    browser.errors.clear()
    browser.requested_urls.clear()
    browser.goto(address)
    assert browser.wait_for('document.body.dataset.ready')=='yes'


def test_two_models_side_by_side(browser, server, models, tmp_path):
    open_demo(browser, server.address)
    image = encode(textured(200, 300), 'PNG')
    (tmp_path/'a.png').write_bytes(image)
    drop(browser, {'a.png': image})
    for i, path in enumerate(models):
        found = browser.evaluate_js(f'images.at(-1).results[{i}].detections')
        lowest = max(.05, server.models[i].settings['lowest'])
        expected = predict_image(load_detector(path), tmp_path/'a.png', threshold=lowest)
        assert len(found)==len(expected) > 3
        np.testing.assert_allclose([d['box'] for d in found], expected.boxes, atol=1e-3)
        np.testing.assert_allclose([d['score'] for d in found], expected.scores, atol=1e-5)
        caption = browser.evaluate_js(f'images.at(-1).results[{i}].caption.textContent')
        assert caption.startswith(f'{path.parent.name}/model.onnx: {(expected.scores>=.5).sum()} object')
    browser.evaluate_js("element('threshold').value = .31; element('threshold').oninput()")
    caption = browser.evaluate_js('images.at(-1).results[0].caption.textContent')
    assert f': {(found_by_page(browser)[:, 4]>=.31).sum()} object' in caption
    assert not browser.errors and all(url.startswith(server.address) for url in browser.requested_urls)


def test_formats_that_browsers_lack_are_shown_too(browser, server):
    open_demo(browser, server.address)
    drop(browser, {'a.tif': encode(textured(90, 120), 'TIFF')})
    assert browser.evaluate_js('images.at(-1).bitmap.width')==120 and len(found_by_page(browser))>3


CUT_FILES = encode(textured(64, 64), 'JPEG')[:200], encode(textured(64, 64), 'PNG')[:99]

@pytest.mark.parametrize('data', [b'', b'text', *CUT_FILES])
def test_files_that_are_no_images_get_one_sentence(server, data):
    status, kind, content = request(server, 'POST', '/detect/0', data)
    error = json.loads(content)['error']
    assert status==400 and kind=='application/json'
    assert error.startswith('not readable as an image') and '\n' not in error


def test_errors_are_shown_on_the_page(browser, server):
    open_demo(browser, server.address)
    drop(browser, {'notes.txt': b'text'})
    error = browser.evaluate_js("document.querySelector('.error').textContent")
    assert error.startswith('notes.txt: not readable as an image')


def test_other_pages_and_other_names_are_refused(server):
    image, own = encode(textured(64, 64), 'PNG'), server.hosts[0]
    assert request(server, 'POST', '/detect/0', image, Origin=f'http://{own}')[0]==200
    for headers in (dict(Origin='https://example.com'), dict(Origin='null'), dict(Host='example.com'),
                    dict(Host=f'example.com:{server.server_port}', Origin=f'http://example.com:{server.server_port}')):
        assert request(server, 'POST', '/detect/0', image, **headers)[0]==403
        assert request(server, 'GET', '/', **headers)[0]==403
    assert server.server_address[0]=='127.0.0.1'


def test_wrong_addresses_and_sizes_are_refused(server):
    for path in ('/detect/2', '/detect/-1', '/detect/x', '/other', '/detect/'):
        assert request(server, 'POST', path, b'x')[0]==400
    for path in ('/etc/passwd', '/../cli.py', '/detect/0'): assert request(server, 'GET', path)[0]==404
    for size in (str(MAX_UPLOAD+1), 'many', '-1', '\u00b2'):
        assert request(server, 'POST', '/detect/0', None, **{'Content-Length': size})[0]==413
    assert request(server, 'POST', '/detect/0', None, **{'Content-Length': ''})[0]==411


def test_a_file_that_is_too_large_is_not_sent(browser, server):
    open_demo(browser, server.address)
    browser.evaluate_js("void send('/image', {size: MAX_UPLOAD+1}).catch(e => { window.said = e.message })")
    assert browser.wait_for('window.said')=='the file is larger than 200 MB. Choose a smaller one'
    assert not any(url.endswith('/image') for url in browser.requested_urls)


@pytest.mark.parametrize('port', [80, 8080, 443])
def test_browsers_leave_out_port_80(monkeypatch, server, port):
    monkeypatch.setattr('effdet_nb.app.demo.ThreadingHTTPServer.__init__',
                        lambda self, *args: setattr(self, 'server_port', port))
    hosts = DemoServer(server.models, port).hosts
    assert (f'127.0.0.1:{port}' in hosts) and (('localhost' in hosts)==(port==80))


def test_a_failing_model_is_one_sentence(server, monkeypatch, capsys):
    def fail(images): raise TypeError('no number')
    monkeypatch.setattr(server.models[0], 'detector', type('Broken', (), dict(
        image_hw=(64, 64), classes=server.models[0].detector.classes, __call__=lambda self, images: fail(images)))())
    status, _, content = request(server, 'POST', '/detect/0', encode(textured(64, 64), 'PNG'))
    assert status==500 and json.loads(content)['error']=='the model failed: TypeError: no number'
    assert 'Traceback' not in capsys.readouterr().err


def test_port_in_use_and_impossible_ports_are_one_sentence(server):
    with pytest.raises(OSError, match=f'--port {server.server_port}: another program uses it. Choose another'):
        DemoServer(server.models, server.server_port)
    with pytest.raises(OSError, match=f'such as {server.server_port+1},'): DemoServer(server.models, server.server_port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match='ports go from 0 to 65535'): DemoServer(server.models, port)


def test_names_show_the_folders_that_tell_files_apart():
    assert short_names(['a/x.tlt'])==['x.tlt']
    assert short_names(['r/1/m.tlt', 's/1/m.tlt'])==['r/1/m.tlt', 's/1/m.tlt']
    assert short_names(['m.tlt', 'a/m.tlt'])==['m.tlt', 'a/m.tlt']
    assert short_names(['m.tlt', 'm.tlt'])==['m.tlt', 'm.tlt']


def test_command_ends_with_ctrl_c(models):
    code = "import sys; sys.argv[0] = 'effdet_demo'; from effdet_nb.app.demo import effdet_demo; effdet_demo()"
    command = [sys.executable, '-c', code, '-m', str(models[0]), '--port', '0']
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=os.environ | dict(PYTHONUNBUFFERED='1'), **pipes) as demo:
        line = demo.stdout.readline()
        assert line.startswith('Open http://127.0.0.1:') and 'Ctrl-C ends' in line
        demo.send_signal(signal.SIGINT)
        _, stderr = demo.communicate(timeout=20)
    assert demo.returncode==130 and 'Traceback' not in stderr
    assert stderr.strip().splitlines()[-1].startswith('effdet_demo: ')


@pytest.mark.parametrize('name,options', [('a.jpg', {}), ('a.png', {}), ('a.webp', dict(lossless=True))])
@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_photographs_of_phones_are_shown_and_detected_upright(browser, server, name, options, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = textured(90, 150)
    stored = np.ascontiguousarray({3: pixels[::-1, ::-1], 6: np.rot90(pixels), 8: np.rot90(pixels, 3)}[orientation])
    file_format = {'.jpg': 'JPEG', '.png': 'PNG', '.webp': 'WEBP'}[name[1:]]
    open_demo(browser, server.address)
    drop(browser, {name: encode(stored, file_format, exif=exif, **options), 'b.png': encode(pixels, 'PNG')})
    sizes = browser.evaluate_js('images.map(image => [image.bitmap.height, image.bitmap.width])')
    assert sizes==[[90, 150], [90, 150]]
    turned, plain = found_by_page(browser, -2), found_by_page(browser, -1)
    if name!='a.jpg': np.testing.assert_allclose(turned, plain, atol=1e-3)       # the same pixels
    browser.evaluate_js("element('threshold').value = 1; drawAll()")             # the image without boxes
    drawn = 'canvas => [...canvas.getContext("2d").getImageData(0, 0, 150, 90).data]'
    pixels_of = f'Promise.all(images.map(({{results}}) => ({drawn})(results[0].canvas)))'
    a, b = (np.reshape(data, (90, 150, 4)) for data in browser.evaluate_js(pixels_of))
    assert np.abs(a-b).mean()<(20 if name=='a.jpg' else 1)


def test_an_image_without_objects_shows_the_best_score(browser, server):
    open_demo(browser, server.address)
    drop(browser, {'a.png': encode(textured(90, 150), 'PNG')})
    best = found_by_page(browser)[:, 4].max()
    browser.evaluate_js("element('threshold').value = 1; element('threshold').oninput()")
    caption = browser.evaluate_js('images.at(-1).results[0].caption.textContent')
    assert f'0 objects; the best score is {best:.3f}' in caption
    browser.evaluate_js('images.at(-1).results[0].detections = []; drawAll()')
    assert '0 objects; no score reaches 0.3' in browser.evaluate_js('images.at(-1).results[0].caption.textContent')
