"Mistakes of a command line are found before TensorFlow is imported, which takes seconds to minutes."
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import effdet_nb.app.cli as cli
from effdet_nb.app.options import parse_options
from effdet_nb.weights.model_file import read_meta


class NoTensorFlow:
    "A finder of modules that fails the test when TensorFlow or Keras is imported."
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'keras'): pytest.fail(f'{name} was imported')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with a spec, a run, and files that are no models, in a process that seems to be without TensorFlow."
    heavy = ('tensorflow', 'keras')
    own = ('effdet_nb.train.experiment', 'effdet_nb.train.fit', 'effdet_nb.prune.prune',
           'effdet_nb.weights.import_weights', 'effdet_nb.detector.efficientdet')
    for name in list(sys.modules):
        if name.split('.')[0] in heavy or name in own: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [NoTensorFlow(), *sys.meta_path])
    monkeypatch.chdir(tmp_path)
    Path('run').mkdir()
    for name in ('run/model.best.tlt', 'model.tlt'): Path(name).write_bytes(b'PK')
    Path('model.onnx').write_bytes(b'\x08\x07')
    Path('spec.txt').write_text('dataset_config { num_classes: 3 image_size: "256,256" training_file_pattern: "r-*" }')
    Path('r-0').touch()
    return tmp_path


LINES = [
    ('export -m nope.tlt', 'nope.tlt: no such file'),
    ('export -m nope.tlt -e spec.txt', 'nope.tlt: no such file'),
    ('export -m run', 'is a folder. Give run/model.best.tlt'),
    ('export -m model.onnx -o other.onnx', 'use the .tlt that it was exported from'),
    ('export -m model.tlt -o run', '--output_path run: the suffix determines'),
    ('export -m model.tlt -o a.pt', 'it must be .onnx'),
    ('export -m model.tlt -o a.pb', 'a/saved_model.pb'),
    ('export -m model.tlt --data_type int8', 'Give --cal_image_dir'),
    ('export -m model.tlt -o k.tflite --nms onnx', '--nms tflite with any precision, or --nms none with fp32'),
    ('export -m model.tlt -o k.onnx --nms tflite', '--nms tflite: is the ending of a .tflite file'),
    ('export -m model.tlt --opset 9', '--opset 9'),
    ('export -m model.tlt -o k.tflite --max_batch_size 4', '--max_batch_size 4'),
    ('prune -m nope.tlt -o p', 'nope.tlt: no such file'),
    ('prune -m run -o p', 'Give run/model.best.tlt'),
    ('prune -m run/model.step-9.tlt -o p', 'The newest model there is run/model.best.tlt'),
    ('prune -m model.onnx -o p', 'use the .tlt'),
    ('train -e spec.txt -d out --set model_name=efficientdet-d9', 'efficientdet-lite0'),
    ('train -e spec.txt -d out --set num_classes=1', 'from 2'),
    ('train -e spec.txt -d out --set image_size=256', 'such as "256,256"'),
    ('train -e spec.txt -d out --set checkpoint=imagnet', 'Did you mean "imagenet"?'),
    ('train -e spec.txt -d out --set checkpoint=IMAGENET1K_V1', 'Did you mean "imagenet"?'),
    ('train -e spec.txt -d out --set checkpoint=efficientnet_b0', 'Weights of ImageNet are named "imagenet"'),
    ('check -e spec.txt --set num_classes=1', 'from 2'),
    ('evaluate -e spec.txt -m nope.tlt --set validation_file_pattern=r-*', 'nope.tlt: no such file'),
    ('evaluate -e spec.txt -m nope.tlt --set validation_file_pattern=r-* num_classes=1', 'from 2'),
    ('import -m nope.pth -o a.tlt', 'nope.pth: no such file'),
    ('import -m imagenet -o a.tlt --model_name efficientdet-d9', '--model_name: "efficientdet-d9" is not allowed'),
    ('import -m model.onnx -o run', 'this is a folder'),
    ('inference -m model.onnx -i run -o out -t 40', '--threshold 40.0: not a score'),
    ('inference -m nope.tlt -i r-0 -o out', 'no such file'),
]


@pytest.mark.parametrize('line, words', LINES)
def test_a_mistake_is_found_before_tensorflow_is_imported(folder, line, words, capsys):
    task, *args = line.split()
    before = {*folder.rglob('*')}
    options = parse_options(cli.TASKS[task], args, task)
    with pytest.raises(SystemExit) as e: cli.TASKS[task](**options)
    assert e.value.code==1 and words in capsys.readouterr().err
    assert not {'tensorflow', 'keras'} & {*sys.modules} and {*folder.rglob('*')} == before


def test_the_check_of_a_model_file_reads_its_metadata_only(folder):
    with pytest.raises(ValueError, match='model.tlt'): read_meta('model.tlt')


def test_a_camera_that_fails_is_not_counted_as_files(folder, monkeypatch, capsys):
    from effdet_nb.app.video_inference import FilesSummary, VideoSummary
    def fail(model, source, *args, **kwargs): return FilesSummary(videos=[VideoSummary(source, error='it is gone')])
    monkeypatch.setattr('effdet_nb.app.video_inference.infer_files', fail)
    for source, words in (('0', 'the camera or stream'), ('rtsp://camera/1', 'the camera or stream'),
                          ('drive.mp4', '1 of 1 files')):
        options = dict(model_path='m.tlt', in_image_path=source, results_dir='out')
        with pytest.raises(SystemExit): cli.effdet_inference(**options)
        assert f'{words} could not be read' in capsys.readouterr().err


@pytest.mark.parametrize('name, modules', [
    ('detect_litert.py', ['ai_edge_litert', 'ai_edge_litert.interpreter']),
    ('detect_mediapipe.py', ['mediapipe', 'mediapipe.tasks', 'mediapipe.tasks.python'])])
@pytest.mark.parametrize('args', [[], ['model.tflite']])
def test_a_script_for_a_device_prints_how_it_is_called(monkeypatch, name, modules, args):
    for module in modules: monkeypatch.setitem(sys.modules, module, MagicMock())
    monkeypatch.setattr(sys, 'argv', [name, *args])
    script = Path(__file__).parents[1]/'nbs'/'tutorials'/'device'/name
    with pytest.raises(SystemExit, match=f'python {name} model.tflite photo.jpg'): runpy.run_path(str(script))
