"Features that meet each other: combinations of options, models and machines that once went wrong."
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx_toy import toy_onnx_model
from PIL import Image
from test_pipeline import damaged_set, make_config

import effdet_nb.app.cli as cli
from effdet_nb.app.bulk import infer_bulk
from effdet_nb.app.export_commands import _lines_after_export
from effdet_nb.app.infer import warn_of_fixed_limit
from effdet_nb.app.model_evaluation import EvaluationResults
from effdet_nb.app.options import parse_options
from effdet_nb.app.quickstart_settings import QuickstartSettings, shell_commands
from effdet_nb.app.video_inference import list_videos
from effdet_nb.data.label_set import SourceError
from effdet_nb.data.split import split_dataset
from effdet_nb.data.tile_dataset import tile_dataset
from effdet_nb.detector.efficientdet import Arch, arch_to_dict
from effdet_nb.detector.tiles import Tiling
from effdet_nb.export.metadata import build_metadata
from effdet_nb.export.quantize import _batches_for, calibration_batches, collect_activation_ranges
from effdet_nb.train import diagnostics
from effdet_nb.train.distributed import DistributedPredictor
from effdet_nb.train.fit import TrainingLoop
from effdet_nb.train.diagnostics import DeferredSignals
from effdet_nb.weights import read_weights as reading
from effdet_nb.weights.import_weights import arch_for_weights
from effdet_nb.weights.model_file import ModelFile
from effdet_nb.weights.pretrained import SourceWeights, WeightsError, match_preprocessing

TINY = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=4)


def error_of(line, capsys):
    "What a command prints for a wrong command line."
    task, *args = line.split()
    with pytest.raises(SystemExit) as stop: cli.TASKS[task](**parse_options(cli.TASKS[task], args, f'effdet_{task}'))
    assert stop.value.code
    return capsys.readouterr().err


@pytest.mark.parametrize('line, words', [
    ('export -m m.tlt -o m.tflite --deepstream ds', '--deepstream: TensorRT reads .onnx and .etlt'),
    ('export -m m.tlt -o s/saved_model.pb --deepstream ds', '--deepstream: TensorRT reads .onnx and .etlt'),
    ('export -m m.tlt -o m.tflite --engine_file m.engine', '--engine_file: TensorRT reads .onnx and .etlt'),
    ('export -m m.tlt -o m.onnx --nms none --deepstream ds', 'Leave --nms out'),
    ('inference -m m.onnx -i . -r out -l labels --runner local', 'written to the folder of --results_dir'),
    ('inference -m m.onnx -i . -r out -o drawn --runner local', 'written to the folder of --results_dir'),
    ('inference -m m.onnx -i . -r out -t 3 --runner local', 'scores go from 0 to 1'),
    ('inference -m m.onnx -i day1/*.mp4 -r out', 'patterns are for images only'),
    ('import -m imagenet -o a.tlt -e bad.txt', 'anchor_scale'),
    ('import -m imagenet -o a.tlt -e few.txt', 'dataset_config.num_classes is missing'),
    ('evaluate -e testdev.txt -m m.onnx m.onnx', 'testdev_dir: is set')])
def test_a_combination_that_is_impossible_is_refused_at_once(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('m.tlt', 'm.onnx', 'r-0'): Path(name).write_bytes(b'\x08\x07')
    data = 'num_classes: 3 image_size: "128,128" validation_file_pattern: "r-*"'
    Path('bad.txt').write_text(f'dataset_config {{ {data} }} model_config {{ anchor_scale: -3 }}')
    Path('few.txt').write_text('model_config { model_name: "efficientdet-d0" }')
    Path('testdev.txt').write_text(f'dataset_config {{ {data} testdev_dir: "out" }}')
    assert words in error_of(line, capsys) and not Path('out').exists() | Path('a.tlt').exists()


def test_a_damaged_record_in_the_first_batch_is_skipped_where_its_ids_are_read(tmp_path):
    data = make_config(damaged_set(tmp_path), skip_corrupt=True)
    trainer = SimpleNamespace(plan=SimpleNamespace(batch_size=6), num_replicas=1)
    ids = diagnostics._image_ids_of_step(trainer, data, 0)
    assert 0<len(ids)<6 and len({*ids})==len(ids)


@pytest.mark.parametrize('num_images, batch', [(6, 4), (3, 4), (4, 4), (1, 8)])
def test_the_last_batch_of_a_calibration_has_the_fixed_size(num_images, batch, tmp_path):
    for i in range(num_images): Image.new('RGB', (64, 48), (40*i, 0, 0)).save(tmp_path/f'{i}.tif')
    meta = dict(arch=arch_to_dict(TINY), batch_size=batch, input={})
    sizes = [len(b) for b in _batches_for(build_metadata(meta, batch), tmp_path, 10, None)]
    assert sizes==[batch]*-(-num_images//batch)


@pytest.mark.parametrize('limit', [5, 100, 300])
def test_several_replicas_keep_as_many_detections_as_the_spec_allows(limit):
    found = SimpleNamespace(boxes=np.zeros((limit, 4)), scores=np.ones(limit), classes=np.zeros(limit))
    class Found(SimpleNamespace):
        def __len__(self): return len(self.boxes)
        def __getitem__(self, part): return Found(**{k: v[part] for k,v in vars(self).items()})
    detector = SimpleNamespace(decode=lambda outputs: [Found(**vars(found))],
                               nms_options=SimpleNamespace(max_detections=limit))
    strategy = SimpleNamespace(experimental_local_results=lambda v: [SimpleNamespace(numpy=lambda: v)])
    predictor = SimpleNamespace(detector=detector, strategy=strategy)
    table, = DistributedPredictor._local_tables(predictor, dict(cls_logits=0, box_deltas=0))
    assert (table[0,:,5]==0).sum()==limit


def test_the_speed_counts_the_steps_of_the_call_that_was_just_read():
    order = []
    trainer = SimpleNamespace(step=0, config=SimpleNamespace(iterations_per_loop=1, logging_frequency=1))
    loop = TrainingLoop.__new__(TrainingLoop)
    loop.trainer, loop.signals = trainer, DeferredSignals()
    loop.callbacks = SimpleNamespace(on_train_batch_begin=lambda *_: None, on_train_batch_end=lambda *_: None)
    loop.take_steps = lambda batches, n: order.append('take') or np.zeros(1)
    loop.count_steps = lambda n, metrics, start: order.append('count')
    loop.read_metrics = lambda: order.append('read')
    loop.is_log_due = lambda *_: True
    loop.run_call(iter([]), 1)
    assert order==['take', 'count', 'read']


def evaluated(*ids):
    rows = [dict(id=k, name=f'class {k}', num_boxes=5, AP=k/10) for k in ids]
    return SimpleNamespace(metrics=SimpleNamespace(per_class=rows))


@pytest.mark.parametrize('second', [(2, 3, 4), (1, 2), (3, 1, 2), (7,)])
def test_classes_of_models_are_compared_by_their_ids(second):
    heading, *rows = EvaluationResults([evaluated(1, 2, 3), evaluated(*second)]).per_class_table()
    assert [row[0] for row in rows]==[str(k) for k in sorted({1, 2, 3, *second})]
    for row in rows:
        own = float(row[4])==int(row[0])/10 if row[4] not in ('–', '-1') else int(row[0]) not in second
        assert own, row


@pytest.mark.parametrize('named', ['efficientdet-d3', 'lite0', 'd0'])
def test_a_model_file_of_one_variant_is_not_imported_as_another(named):
    weights = SourceWeights('m.tlt', 'a model', 'ours', {}, arch=TINY)
    with pytest.raises(WeightsError, match='m.tlt: is efficientdet-tiny, not'): arch_for_weights(weights, named)
    assert arch_for_weights(weights).name=='efficientdet-tiny'


def test_the_padding_of_our_own_files_is_kept():
    own = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=4, pad_rgb=(1, 2, 3))
    weights = SourceWeights('m.tlt', 'a model', 'ours', {}, arch=own, mean_rgb=own.mean_rgb, std_rgb=own.std_rgb)
    assert tuple(match_preprocessing(TINY, weights).pad_rgb)==(1, 2, 3)


def test_a_full_disk_is_not_called_a_damaged_archive(tmp_path, monkeypatch):
    def fail(*_): raise OSError(28, os.strerror(28))
    monkeypatch.setattr(reading, '_extract', fail)
    with pytest.raises(OSError, match='No space left'), reading.extracted_archive(tmp_path/'a.tar.gz'): pass


def test_a_model_file_shows_its_variant():
    assert 'ModelFile(efficientdet-tiny' in repr(ModelFile({'arch': arch_to_dict(TINY)}))


@pytest.mark.parametrize('channels, colour', [(1, 'grey'), (3, 'RGB')])
def test_the_metadata_of_a_file_names_the_colours_of_its_input(channels, colour):
    arch = Arch('efficientdet-tiny', image_hw=(128, 128), num_classes=4, channels=channels)
    assert build_metadata(dict(arch=arch_to_dict(arch)))['input']['colour']==colour


@pytest.mark.parametrize('has_key', [False, True])
def test_the_commands_of_an_encrypted_quickstart_have_a_key(has_key):
    commands = dict(shell_commands('f', QuickstartSettings(), 'a.tlt', 'b.tlt', 'c.onnx', has_key=has_key))
    assert {' -k KEY' in line for line in commands.values() if line.startswith(('effdet_train', 'effdet_ev', 'effdet_i',
            'effdet_p', 'effdet_exp'))}=={has_key}


def test_a_wrong_threshold_of_a_bulk_inference_is_refused(tmp_path):
    with pytest.raises(ValueError, match='scores go from 0 to 1'): infer_bulk('m', 'i', tmp_path, score_threshold=3)


def test_a_pattern_of_videos_is_named():
    with pytest.raises(ValueError, match='patterns are for images only'): list_videos('day1/*.mp4')


def split(folder, names, out):
    "Splits images of these names, each with one box."
    folder.mkdir()
    for name in names: Image.new('RGB', (64, 64), (hash(name) % 200, 9, 9)).save(folder/name)
    images = [dict(id=i, file_name=name, width=64, height=64) for i, name in enumerate(names)]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[3, 3, 20, 20]) for i in range(len(names))]
    labels = dict(images=images, annotations=boxes, categories=[dict(id=1, name='a')])
    (folder.parent/f'{folder.name}.json').write_text(json.dumps(labels))
    return split_dataset([folder.parent/f'{folder.name}.json'], [folder], out, val=.5, near='skip')


def test_a_split_of_other_images_is_not_lost(tmp_path):
    split(tmp_path/'one', ['a.png', 'b.png', 'c.png'], tmp_path/'out')
    before = (tmp_path/'out'/'train.json').read_bytes()
    with pytest.raises(SourceError, match='train.json: has the split of other images, such as'):
        split(tmp_path/'two', ['x.png', 'y.png'], tmp_path/'out')
    assert (tmp_path/'out'/'train.json').read_bytes()==before
    split(tmp_path/'three', ['a.png', 'b.png', 'c.png', 'd.png'], tmp_path/'out')       # grown: may be split again


@pytest.mark.parametrize('pattern, words', [(None, ''), ('^.', '(2 groups of images that belong together)'),
                                            ('(.*)_', '(2 groups of images that belong together)')])
def test_a_split_says_how_many_groups_a_pattern_made(pattern, words, tmp_path):
    split(tmp_path/'one', ['a_1.png', 'a_2.png', 'b_1.png', 'b_2.png'], tmp_path/'out')
    result = split_dataset(tmp_path/'one.json', tmp_path/'one', tmp_path/'out', .5, near='skip', pattern=pattern)
    assert words in repr(result) and ('belong together' in repr(result))==bool(words)


@pytest.mark.parametrize('out', ['one', 'one/../one', './one'])
def test_tiles_are_not_written_among_the_images(out, tmp_path):
    split(tmp_path/'one', ['a.png', 'b.png'], tmp_path/'out')
    with pytest.raises(ValueError, match='would be written among the original images'):
        tile_dataset(tmp_path/'one', tmp_path/'one.json', tmp_path/out, Tiling((32, 32)))
    assert sorted(p.name for p in (tmp_path/'one').iterdir())==['a.png', 'b.png']


@pytest.mark.parametrize('bad', [b'', b'no image', b'\xff\xd8\xff\xe0 cut'])
def test_an_unreadable_calibration_image_is_left_out(bad, tmp_path, capsys):
    for i in range(3): Image.new('RGB', (64, 48), (40*i, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'1b.jpg').write_bytes(bad)
    assert sum(len(b) for b in calibration_batches(tmp_path, (128, 128), 2))==3
    assert '1b.jpg' in capsys.readouterr().err


@pytest.mark.parametrize('images, where', [(None, 'broken'), ([b'no image', b''], 'training records')])
def test_a_calibration_without_readable_images_is_one_sentence(images, where, tmp_path):
    (tmp_path/'broken').mkdir()
    for name in ('a.jpg', 'b.png'): (tmp_path/'broken'/name).write_bytes(b'no image')
    batches = calibration_batches(images or tmp_path/'broken', (64, 64))
    with pytest.raises(ValueError, match=f'{where}: none of 2 images could be read'):
        collect_activation_ranges(toy_onnx_model(), batches, tmp_path)


@pytest.mark.parametrize('resize, is_said', [('letterbox', True), ('stretch', False), (None, True)])
def test_an_export_for_mediapipe_names_the_command_that_measures_its_ap(resize, is_said):
    meta = dict(arch=dict(resize=resize) if resize else {})
    assert ('--resize stretch' in _lines_after_export('m.tflite', 'fp32', 'tflite', None, meta))==is_said
    assert '--resize' not in _lines_after_export('m.onnx', 'fp32', 'onnx', None, meta)


@pytest.mark.parametrize('channels, is_warned', [((0,), True), ((0, 1), False), (None, False)])
def test_only_a_choice_of_some_classes_is_warned_of(channels, is_warned, capsys):
    detector = SimpleNamespace(suppresses_itself=True, classes=SimpleNamespace(ids=(1, 2)),
                               nms_options=SimpleNamespace(max_detections=100))
    warn_of_fixed_limit(detector, channels)
    assert ('--set max_detections_per_image=N' in capsys.readouterr().err)==is_warned
