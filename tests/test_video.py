"Videos: what is written can be played and read, also after an interruption and from a damaged file."
import csv
import json
import os
import re
import signal
import struct
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import skip_missing
from PIL import Image

from effdet_nb.app import video as V, video_inference as I
from effdet_nb.app.cli import effdet_inference
from effdet_nb.app.command import _run_command
from effdet_nb.core.console import read_status
from effdet_nb.data.classes import ClassTable
from effdet_nb.detector.detections import Detections
from effdet_nb.detector.nms import NmsOptions
from effdet_nb.detector.tiles import Tiling


@pytest.fixture(autouse=True, scope='module')
def av():
    try: import av
    except ImportError: skip_missing('PyAV', 'pip install av')
    return av


class RedDetector:
    "Finds the box of the red pixels; `at_call` is called with the number of each call."
    image_hw, meta, nms_options = (64, 64), {}, NmsOptions()
    classes = ClassTable.from_categories([dict(id=1, name='red')])

    def __init__(self, at_call=lambda i: None): self.at_call, self.num_calls = at_call, 0

    def __call__(self, images):
        self.at_call(self.num_calls)
        self.num_calls += 1
        return [self.find(image.astype(int)) for image in images]

    def find(self, image):
        pixels = np.argwhere(image[..., 0]-image[..., 2]>100)
        if not len(pixels): return Detections([], [], [])
        return Detections([[*pixels.min(0), *(pixels.max(0)+1)]], [.9], [0])


def image_at(i, hw=(96, 128)):
    "A red square that moves to the right, 2 pixels per frame, on grey noise."
    image = np.random.default_rng(i).integers(150, 200, (*hw, 1)).repeat(3, 2).astype(np.uint8)
    image[30:60, 2*i:2*i+30] = 220, 30, 40
    return image


def write_clip(path, num_frames=20, rate=10, hw=(96, 128)):
    with V.VideoWriter(path, rate) as writer:
        for i in range(num_frames): writer.write(image_at(i, hw))
    return path


def cut(path, share):
    "Removes the end of a file."
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data)*share)])
    return path


@pytest.mark.parametrize('name,rate', [('a.mp4', 10), ('b.avi', 25), ('c.mkv', 30), ('d.webm', 10), ('e.MOV', 24)])
def test_every_container_keeps_number_rate_and_size_of_the_frames(tmp_path, name, rate):
    source = write_clip(tmp_path/name, rate=rate)
    summary = I.infer_video(RedDetector(), source, tmp_path/'out'/name, tmp_path/'out.csv')
    reader = V.VideoReader(tmp_path/'out'/name)
    frames = list(reader)
    assert (len(frames), reader.rate, frames[0].image.shape)==(20, rate, (96, 128, 3))
    assert summary.num_frames==20 and summary.error is None
    with open(tmp_path/'out.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert [int(row['frame']) for row in rows]==[*range(20)]
    assert np.allclose([float(row['seconds']) for row in rows], np.arange(20)/rate, atol=2e-3)
    assert np.allclose([float(row['x1']) for row in rows], 2*np.arange(20), atol=5)


@pytest.mark.parametrize('every,indices', [(1, [*range(10)]), (3, [0, 3, 6, 9]), (10, [0]), (100, [0])])
def test_every_nth_frame(tmp_path, every, indices):
    detector = RedDetector()
    I.infer_video(detector, write_clip(tmp_path/'a.mp4', 10), out_label_path=tmp_path/'a.jsonl', every=every)
    lines = [json.loads(line) for line in (tmp_path/'a.jsonl').read_text().splitlines()]
    assert [line['frame'] for line in lines]==indices and detector.num_calls==len(indices)
    assert all(line['detections'][0]['class']=='red' for line in lines)


@pytest.mark.parametrize('hw', [(95, 127), (96, 127), (67, 128)])
def test_odd_sizes_are_extended_by_a_row_or_column(tmp_path, hw):
    write_clip(tmp_path/'odd.mp4', 3, hw=hw)
    shape = next(iter(V.VideoReader(tmp_path/'odd.mp4'))).image.shape
    assert shape==(hw[0]+hw[0]%2, hw[1]+hw[1]%2, 3)


def test_frames_without_objects_have_a_line_but_no_row(tmp_path):
    with V.VideoWriter(tmp_path/'grey.mp4', 10) as writer:
        for _ in range(3): writer.write(np.full((64, 64, 3), 128, np.uint8))
    for name in ('x.csv', 'x.jsonl'): I.infer_video(RedDetector(), tmp_path/'grey.mp4', out_label_path=tmp_path/name)
    assert (tmp_path/'x.csv').read_text().splitlines()==[','.join(I.FRAME_COLUMNS)]
    assert [json.loads(line)['detections'] for line in open(tmp_path/'x.jsonl')]==[[], [], []]


@pytest.mark.parametrize('share', [.3, .6, .9])
def test_what_could_be_read_of_a_truncated_video_is_kept(tmp_path, share, capsys):
    source = cut(write_clip(tmp_path/'cut.avi', 60), share)
    summary, = I.infer_videos(RedDetector(), source, tmp_path/'out.mp4', tmp_path/'out.csv')
    frames = list(V.VideoReader(tmp_path/'out.mp4'))
    assert 0<len(frames)==summary.num_frames<60
    assert f'{len(frames)} of 60 frames could be read' in summary.error
    assert capsys.readouterr().err.count('frames could be read')==1


@pytest.mark.parametrize('name', ['cut.mp4', 'cut.mov'])
def test_a_video_that_was_cut_without_encoding_is_complete(tmp_path, av, name):
    write_clip(tmp_path/'whole.mp4', 20)
    with av.open(str(tmp_path/'whole.mp4')) as source, av.open(str(tmp_path/name), 'w', options=dict(
            avoid_negative_ts='disabled', use_editlist='1')) as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        for packet in source.demux(video):
            if packet.dts is None: continue
            shift = int(.8/packet.time_base)                         # an edit list hides the first eight frames
            packet.pts, packet.dts, packet.stream = packet.pts-shift, packet.dts-shift, stream
            target.mux(packet)
    reader = V.VideoReader(tmp_path/name)
    assert len([*reader])==12 and reader.error is None
    assert reader.num_frames==20 and reader.num_hidden==8


def test_videos_that_cannot_be_opened_do_not_stop_the_others(tmp_path, av):
    (tmp_path/'in').mkdir()
    write_clip(tmp_path/'in'/'good.mp4', 3)
    cut(write_clip(tmp_path/'in'/'no_index.mp4', 30), .5)
    (tmp_path/'in'/'text.mkv').write_text('no video')
    (tmp_path/'in'/'empty.avi').write_bytes(b'')
    with av.open(str(tmp_path/'in'/'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame)+stream.encode())
    summaries = I.infer_videos(RedDetector(), tmp_path/'in', tmp_path/'out')
    errors = {s.source.rsplit(os.sep, 1)[1]: s.error for s in summaries}
    assert errors.pop('good.mp4') is None and [p.name for p in (tmp_path/'out').iterdir()]==['good.mp4']
    assert 'no video stream' in errors.pop('sound.mp4')
    assert len(errors)==3 and all('not readable as a video' in error for error in errors.values())


def test_an_interruption_leaves_playable_files_and_the_exit_code_130(tmp_path, capsys):
    source, detector = write_clip(tmp_path/'in.mp4', 200), RedDetector()
    detector.at_call = lambda i: os.kill(os.getpid(), signal.SIGINT) if i==20 else time.sleep(.002)

    def effdet_inference(**options): I.infer_video(detector, source, tmp_path/'out.mp4', tmp_path/'out.jsonl')
    assert _run_command(effdet_inference, {})==130
    frames = list(V.VideoReader(tmp_path/'out.mp4'))
    assert 10<=len(frames)<=25
    lines = [json.loads(line) for line in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert len(lines)-len(frames) in (0, 1)                                      # the labels are written first
    assert sorted(p.name for p in tmp_path.iterdir())==['in.mp4', 'out.jsonl', 'out.mp4']   # no temporary files
    assert 'interrupted' in capsys.readouterr().err


def test_an_error_of_the_detector_stops_the_run_and_leaves_no_file(tmp_path):
    def fail(i):
        if i==3: raise RuntimeError('no such operator')
    with pytest.raises(RuntimeError, match='no such operator'):
        I.infer_video(RedDetector(fail), write_clip(tmp_path/'in.mp4'), tmp_path/'out.mp4', tmp_path/'out.csv')
    assert [p.name for p in tmp_path.iterdir()]==['in.mp4']


def test_a_slow_network_gets_the_newest_frames_of_a_camera():
    taken = []
    for item in V.in_background(iter_slowly(60, .01), size=2, drop=True):
        taken.append(item)
        time.sleep(.1)
    assert taken==sorted(taken) and len(taken)<40 and taken[-1]>=57


def test_a_full_queue_does_not_slow_a_camera_down():
    made, taken = [], []

    def camera():
        for _ in range(100):
            time.sleep(.01)
            made.append(time.monotonic())
            yield len(made)-1

    for i in V.in_background(camera(), size=4, drop=True):
        taken.append(i)
        lag = len(made)-1-i
        assert lag<=5
        time.sleep(.15)
    assert made[-1]-made[0]<2.5                          # it took 50 ms more per frame: over 6 s
    assert taken[-1]==99


def test_an_iterable_that_cannot_start_is_an_error_not_a_wait():
    class Broken:
        def __iter__(self): raise OSError('unplugged')
    for iterable, message in ((Broken(), 'unplugged'), (3, 'not iterable'), (None, 'not iterable')):
        with pytest.raises((OSError, TypeError), match=message): list(V.in_background(iterable))


IDENTITY = 1, 0, 0, 1
# degrees clockwise -> a, b, c, d of x' = ax+cy, y' = bx+dy
TURNS = {0: IDENTITY, 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def turn(path, degrees):
    "Notes in an MP4 file that a player turns it clockwise, as phones do."
    def matrix(a, b, c, d): return struct.pack('>9i', a<<16, b<<16, 0, c<<16, d<<16, 0, 0, 0, 1<<30)
    data = path.read_bytes()
    start = data.index(matrix(*IDENTITY), data.index(b'tkhd'))
    path.write_bytes(data[:start]+matrix(*TURNS[degrees])+data[start+36:])
    return path


@pytest.mark.parametrize('degrees,hw,corner', [
    (0, (48, 64), (0, 63)), (90, (64, 48), (63, 47)), (180, (48, 64), (47, 0)), (270, (64, 48), (0, 0))])
def test_videos_of_phones_are_upright(tmp_path, degrees, hw, corner):
    image = np.full((48, 64, 3), 128, np.uint8)
    image[:12, -16:] = 220, 30, 40                       # red at the upper right, as stored
    with V.VideoWriter(tmp_path/'a.mp4', 10) as writer:
        for _ in range(3): writer.write(image)
    frames = [frame.image for frame in V.VideoReader(turn(tmp_path/'a.mp4', degrees))]
    assert len(frames)==3 and all(frame.shape[:2]==hw and frame.flags.c_contiguous for frame in frames)
    red, _, blue = frames[0][corner].astype(int)
    assert red-blue>100


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.webm', 'a.avi'])
def test_irregular_times_are_kept(tmp_path, name):
    seconds = [100, 100.1, 100.2, 103, 103.1, 106.2]
    with V.VideoWriter(tmp_path/name, 10) as writer:
        for i, time_of_frame in enumerate(seconds): writer.write(image_at(i), time_of_frame)
    I.infer_video(RedDetector(), tmp_path/name, tmp_path/'out'/name)
    for path in (tmp_path/name, tmp_path/'out'/name):
        frames = list(V.VideoReader(path))
        assert np.allclose([frame.seconds-frames[0].seconds for frame in frames], np.subtract(seconds, 100), atol=.11)


@pytest.mark.parametrize('name', ['a.mp4', 'a.avi', 'a.webm'])
@pytest.mark.parametrize('seconds', [[5, 5, 5], [3, 2, 1], [0, .001, .002], [None, None, None]])
def test_times_that_stand_still_or_go_back_lose_no_image(tmp_path, name, seconds):
    with V.VideoWriter(tmp_path/name, 10) as writer:
        for i, time_of_frame in enumerate(seconds): writer.write(image_at(i), time_of_frame)
    frames = list(V.VideoReader(tmp_path/name))
    assert len(frames)==3 and np.all(np.diff([frame.seconds for frame in frames])>0)


@pytest.fixture
def web_address(tmp_path):
    "Serves a folder, also parts of its files; returns its address."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = (tmp_path/self.path[1:]).read_bytes()
            start = int(re.search(r'\d+', self.headers.get('Range', '0')).group())
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
            self.send_header('Content-Length', str(len(data)-start))
            self.end_headers()
            with suppress(ConnectionError): self.wfile.write(data[start:])

        def log_message(self, *args): pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.avi'])
def test_a_file_behind_a_url_loses_no_frame(tmp_path, web_address, name):
    write_clip(tmp_path/name, 40)
    detector = RedDetector(lambda i: time.sleep(.02))
    summary = I.infer_video(detector, f'{web_address}/{name}', out_label_path=tmp_path/'a.csv')
    assert summary.num_frames==40 and summary.error is None


def test_a_folder_or_file_named_by_a_number_is_no_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = '0', '12', '007'
    assert all(map(V.is_live, names)) and V.is_live(0)
    for name in names[1:]: (tmp_path/name).mkdir()
    (tmp_path/'0').write_text('')
    assert not any(map(V.is_live, names)) and not V.is_live(12)
    write_clip(tmp_path/'12'/'a.mp4', 2)
    assert [path.as_posix() for path in I.list_videos('12')]==['12/a.mp4']


@pytest.mark.parametrize('outputs', [dict(out_label_path='a.txt'), dict(out_video_path='a.gif'),
                                     dict(out_label_path='a.csv', out_video_path='b.mp5')])
def test_a_video_is_closed_if_an_output_cannot_be_opened(tmp_path, monkeypatch, outputs):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path/'in.mp4', 2)
    readers = []
    monkeypatch.setattr(I, 'VideoReader', lambda *args: readers.append(V.VideoReader(*args)) or readers[-1])
    with pytest.raises(ValueError): I.infer_video(RedDetector(), 'in.mp4', **outputs)
    with pytest.raises((AssertionError, ValueError, RuntimeError)): next(readers[0].container.decode(video=0))
    assert [p.name for p in tmp_path.iterdir()]==['in.mp4']


def iter_slowly(n, seconds):
    for i in range(n):
        time.sleep(seconds)
        yield i


def test_a_queue_without_dropping_loses_nothing_and_is_bounded():
    ahead = []
    def source():
        for i in range(50):
            ahead.append(i)
            yield i
    for i, item in enumerate(V.in_background(source(), size=3)):
        assert item==i and len(ahead)<=i+6


def test_tiles_find_in_each_frame_what_is_small(tmp_path):
    with V.VideoWriter(tmp_path/'large.mp4', 5) as writer:
        for _ in range(3):
            image = np.full((256, 512, 3), 128, np.uint8)
            image[100:108, 300:308] = 220, 30, 40
            writer.write(image)
    plain, tiled = (I.infer_video(RedDetector(), tmp_path/'large.mp4', out_label_path=tmp_path/'x.csv', tiling=tiling)
                    for tiling in (None, Tiling((64, 64))))
    assert plain.boxes_per_class.total()==0 and tiled.boxes_per_class=={'red': 3}


class CrowdDetector(RedDetector):
    "Finds 150 grey boxes and five red ones, with lower scores."
    classes = ClassTable.from_categories([dict(id=1, name='grey'), dict(id=2, name='red')])
    def set_nms_options(self, **changes): self.nms_options = replace(self.nms_options, **changes)
    def find(self, image):
        boxes = [[0, i%60, 64, i%60+4] for i in range(155)]
        return Detections(boxes, [.9]*150+[.8]*5, [0]*150+[1]*5)[:self.nms_options.max_detections]


@pytest.mark.parametrize('options, expected', [
    (dict(), dict(grey=100)), (dict(classes=['red']), dict(red=5)), (dict(classes=['grey']), dict(grey=100)),
    (dict(classes=['red'], max_detections=2), dict(red=2))])
def test_chosen_classes_are_not_displaced_by_others(tmp_path, options, expected):
    write_clip(tmp_path/'a.mp4', 2)
    summary, = I.infer_videos(CrowdDetector(), tmp_path/'a.mp4', out_label_path=tmp_path/'a.csv', **options)
    assert dict(summary.boxes_per_class) == {name: 2*count for name, count in expected.items()}


def test_images_and_videos_of_a_folder(tmp_path):
    folder = tmp_path/'in'
    (folder/'deep').mkdir(parents=True)
    Image.fromarray(image_at(0)).save(folder/'a.png')
    (folder/'notes.txt').write_text('x')
    (folder/'.old').mkdir()
    for name in ('a.mp4', 'deep/a.avi', '.hidden.mp4', '.old/b.mp4'): write_clip(folder/name, 2)
    summary = I.infer_files(RedDetector(), folder, tmp_path/'out', tmp_path/'labels', recursive=True)
    outputs = sorted(p.relative_to(tmp_path).as_posix() for d in ('out', 'labels') for p in (tmp_path/d).rglob('*.*'))
    assert outputs==['labels/a.mp4.csv', 'labels/a.txt', 'labels/deep/a.avi.csv', 'out/a.mp4', 'out/a.png',
                     'out/deep/a.avi']
    assert summary.images.passed_over=={'.txt extension': 1} and summary.num_files==3
    for _ in range(2): again = I.infer_files(RedDetector(), folder, results_dir=folder/'results', recursive=True)
    assert again.num_files==3


def test_without_pyav_the_videos_of_a_folder_are_passed_over(tmp_path, monkeypatch, capsys):
    (tmp_path/'in').mkdir()
    Image.fromarray(image_at(0)).save(tmp_path/'in'/'a.png')
    clip = write_clip(tmp_path/'in'/'a.mp4', 2)
    monkeypatch.setitem(__import__('sys').modules, 'av', None)
    summary = I.infer_files(RedDetector(), tmp_path/'in', tmp_path/'out')
    assert (summary.num_files, summary.videos)==(1, []) and 'pip install' in capsys.readouterr().err
    with pytest.raises(ImportError, match=r'pip install "effdet_nb\[video\]"'):
        I.infer_files(RedDetector(), clip, tmp_path/'out')


@pytest.mark.parametrize('options,message', [
    (dict(out_image_path='out.png'), 'Use one of|the end of its name'), (dict(out_label_path='out.txt'), 'JSON lines'),
    (dict(out_label_path='x', image_options=dict(label_format='kitti')), 'JSON lines'),
    (dict(out_image_path='o', every=0), 'at least 1'), (dict(out_image_path='o', score_threshold=2), 'from 0 to 1')])
def test_options_that_do_not_fit_a_video(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path/'a.mp4', 2)
    with pytest.raises(ValueError, match=message): I.infer_files(RedDetector(), 'a.mp4', **options)
    assert [p.name for p in tmp_path.iterdir()]==['a.mp4']


@pytest.mark.parametrize('output', ['.', 'a.mp4'])
def test_a_video_is_never_replaced_by_its_copy(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    before = write_clip(tmp_path/'a.mp4', 2).read_bytes()
    with pytest.raises(ValueError, match='Give another'): I.infer_files(RedDetector(), 'a.mp4', output)
    assert (tmp_path/'a.mp4').read_bytes()==before


@pytest.mark.parametrize('source,message', [
    ('7', 'camera 7: no such camera'), ('rtsp://127.0.0.1:9/x', 'not readable as a video')])
def test_cameras_and_streams_that_are_not_there(source, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message): V.open_video(source)


def test_the_command_writes_a_video(tmp_path, capsys):
    from onnx_toy import toy_onnx_model
    (tmp_path/'m.onnx').write_bytes(toy_onnx_model().SerializeToString())
    write_clip(tmp_path/'a.mp4', 4)
    effdet_inference(model_path=str(tmp_path/'m.onnx'), in_image_path=str(tmp_path/'a.mp4'),
                     results_dir=str(tmp_path/'r'), threshold=.3, every=2)
    assert '2 frames' in capsys.readouterr().out
    assert sorted(p.relative_to(tmp_path/'r').as_posix() for p in (tmp_path/'r').rglob('*.*'))==[
        'labels/a.mp4.csv', 'status.json', 'videos_annotated/a.mp4']


@pytest.mark.parametrize('names,message,counts', [
    (['0.png', '1.jpg'], '1 of 2 images could not', dict(images=1, unreadable=1)),
    (['1.jpg', '2.jpg'], '2 of 2 images could not', dict(images=0, unreadable=2)),
    (['x.mp4'], '1 of 1 files could not', dict(videos=0, frames=0, incomplete_videos=1)),
    (['0.png', 'a.mp4', 'x.mp4'], '1 of 3 files could not',
     dict(images=1, unreadable=0, videos=1, frames=2, incomplete_videos=1))])
def test_the_command_and_its_status_file_end_alike(tmp_path, capsys, names, message, counts):
    from onnx_toy import toy_onnx_model
    (tmp_path/'m.onnx').write_bytes(toy_onnx_model().SerializeToString())
    (tmp_path/'in').mkdir()
    for name in names:
        if name=='a.mp4': write_clip(tmp_path/'in'/name, 2)
        elif name=='0.png': Image.fromarray(image_at(0)).save(tmp_path/'in'/name)
        else: (tmp_path/'in'/name).write_bytes(b'broken')
    with pytest.raises(SystemExit):
        effdet_inference(model_path=str(tmp_path/'m.onnx'), in_image_path=str(tmp_path/'in'),
                         results_dir=str(tmp_path/'r'), threshold=.3)
    assert message in capsys.readouterr().err
    events = read_status(tmp_path/'r')
    states = [event['status'] for event in events]
    assert states[0]=='STARTED' and states[-1]=='FAILURE' and set(states[1:-1])=={'RUNNING'}
    assert message in events[-1]['message'] and counts.items()<=events[-1]['kpi'].items()
    if 'videos' in counts: assert f'Processed {counts["videos"]} of' in events[-2]['message']


@pytest.mark.parametrize('options', [
    dict(score_threshold=7), dict(image_options=dict(label_format='coco')),
    dict(image_options=dict(annotations_file='val.json')),
    dict(image_options=dict(label_format='csv'), out_label_path='x.json')])
def test_options_that_are_not_possible_leave_nothing_behind(tmp_path, options):
    Image.fromarray(image_at(0)).save(tmp_path/'0.png')
    with pytest.raises(ValueError): I.infer_files('m.onnx', tmp_path, results_dir=tmp_path/'r', **options)
    assert [path.name for path in tmp_path.iterdir()]==['0.png']


def test_names_of_outputs():
    names = [('0', 'out', False), ('rtsp://x/y', 'out', True), ('dir/a.mpg', 'out', False),
             ('dir/a.mp4', 'b.jsonl', True)]
    paths = [I.output_of_video(source, source, output, labels).as_posix() for source, output, labels in names]
    assert paths==['out/camera0.mp4', 'out/stream.csv', 'out/a.mpg.mp4', 'b.jsonl']
    assert I.output_of_video('0', '0', None) is None
    assert SimpleNamespace(path=V.check_video_path('x.MKV')).path.name=='x.MKV'


@pytest.mark.parametrize('options', [dict(out_label_path='mix.csv'), dict(out_label_path='mix.jsonl'),
                                     dict(out_image_path='mix.mp4')])
@pytest.mark.parametrize('has_image', [False, True])
def test_one_file_for_a_folder_with_a_video_is_refused_before_the_work(tmp_path, monkeypatch, options, has_image):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'in').mkdir()
    write_clip(tmp_path/'in/a.mp4', 2)
    if has_image: Image.fromarray(image_at(0)).save(tmp_path/'in/a.png')
    with pytest.raises(ValueError, match='in contains a video, such as a.mp4, .* Give a folder, such as mix'):
        I.infer_files(RedDetector(), 'in', **options)
    assert [p.name for p in tmp_path.iterdir()]==['in']
