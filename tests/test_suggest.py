"Guards of the suggested settings: they follow the data, keep what the spec says about it, and are a valid spec."
from dataclasses import replace

import numpy as np
import pytest
from small_training import small_spec, write_records

from effdet_nb.core.console import counted
from effdet_nb.app import cli
from effdet_nb.data.record_index import Records, require_record_files
from effdet_nb.data.scan import SplitScan, scan_records
from effdet_nb.train import suggest as S
from effdet_nb.train.spec import Spec


def scan_of_boxes(num_images, hw, box_side):
    "A scan of images with one square box each."
    boxes = np.tile(np.float32([10,10,10+box_side,10+box_side]), (num_images,1))
    return SplitScan(
        records=None, num_records=num_images, image_ids=list(range(num_images)), checksums=['']*num_images,
        image_sizes=np.tile(np.float64(hw), (num_images,1)), boxes_per_image=np.ones(num_images, int),
        record_index=np.arange(num_images), boxes=boxes, labels=np.ones(num_images, int),
        is_crowd=np.zeros(num_images, bool), image_index=np.arange(num_images), damaged_records=[])


SPEC = Spec.parse('''dataset_config { training_file_pattern: "t-*" num_classes: 5 }
                     model_config { aspect_ratios: "[(1, 2)]" model_name: "efficientdet-d3" }''')


@pytest.mark.parametrize('hw,box,side', [((480,640), 200, 256), ((480,640), 32, 320), ((1000,1500), 60, 448),
                                         ((3000,4000), 50, 512), ((200,240), 10, 256)])
def test_the_input_is_as_large_as_the_objects_need(hw, box, side):
    suggested = S.suggest_spec(SPEC, scan_of_boxes(30, hw, box))
    assert suggested.dataset_config.image_hw==(side,side)
    scale = side/max(hw)
    assert box*scale>=S.MIN_OBJECT_RATIO*24-1e-6 or side==max(S.SIDES) or side>=max(hw)


@pytest.mark.parametrize('field,side', [(dict(model_config=dict(anchor_scale=4.)), 448),
                                        (dict(model_config=dict(anchor_scale=1.5)), 256),
                                        (dict(dataset_config=dict(resize='stretch')), 256)])
def test_the_input_size_follows_the_anchors_and_the_resizing(field, side):
    "A box of 32 pixels in an image of 320 x 640 needs 320 pixels with the anchors of lite0, letterboxed."
    scan = scan_of_boxes(30, (320,640), 32)
    assert S.suggest_spec(SPEC, scan).dataset_config.image_hw==(320,320)
    assert S.suggest_spec(SPEC.replace(**field), scan).dataset_config.image_hw==(side,side)


@pytest.mark.parametrize('num_images', [1, 5, 131, 205, 3000, 200_000])
def test_the_length_is_about_a_thousand_steps_within_limits(num_images):
    config = S.suggest_spec(SPEC, scan_of_boxes(num_images, (480,640), 99)).training_config
    steps = config.num_epochs*num_images/config.train_batch_size
    assert 1<=config.num_epochs<=S.MAX_EPOCHS and config.train_batch_size<=max(num_images, 1)
    assert config.learning_rate/config.train_batch_size==pytest.approx(S.LEARNING_RATE/S.BATCH_SIZE)
    if 100<=num_images<=3000: assert 1000<=steps<=1000*1.5
    text = S.describe_suggestion(S.suggest_spec(SPEC, scan_of_boxes(num_images, (480,640), 99)), num_images)
    assert f'{counted(config.num_epochs, "epoch")}, about {counted(round(steps), "step")} of ' in text
    assert f' of {counted(config.train_batch_size, "image")} at ' in text
    assert ('label more images' in text)==(num_images<80)
    assert config.lr_warmup_epoch<config.num_epochs


def test_the_data_and_the_anchors_of_the_spec_are_kept():
    suggested = S.suggest_spec(SPEC, scan_of_boxes(10, (480,640), 99))
    assert suggested.dataset_config.training_file_pattern=='t-*' and suggested.dataset_config.num_classes==5
    assert suggested.model_config.aspect_ratios=='[(1, 2)]' and suggested.model_config.model_name=='efficientdet-lite0'
    assert not suggested.is_set('training_config', 'moving_average_decay')
    assert suggested.augmentation_config.hue_jitter==0        # colours may be the class


@pytest.mark.parametrize('model', ['d7x', 'd7', 'd0', 'lite4'])
def test_the_spec_of_any_variant_gives_a_valid_suggestion(model):
    level = 8 if model=='d7x' else 7
    spec = Spec.parse(f'model_config {{ model_name: "efficientdet-{model}" min_level: 3 max_level: {level} }}'
                      'dataset_config { training_file_pattern: "t-*" num_classes: 5 }')
    suggested = S.suggest_spec(spec, scan_of_boxes(30, (480,640), 99))
    assert not suggested.problems() and suggested.model_config.max_level==7


def test_images_without_objects_and_crowded_images():
    none = replace(scan_of_boxes(4, (480,640), 99), boxes_per_image=np.zeros(4, int), labels=np.zeros(0, int),
                   boxes=np.zeros((0,4), np.float32), is_crowd=np.zeros(0, bool), image_index=np.zeros(0, int))
    assert S.suggest_spec(SPEC, none).dataset_config.image_hw==(256,256)
    crowded = scan_of_boxes(3, (480,640), 99)
    crowded.boxes_per_image[1] = 240
    assert S.suggest_spec(SPEC, crowded).dataset_config.max_instances_per_image==240


def test_a_number_of_classes_that_is_too_large_is_lowered(tmp_path):
    spec = small_spec(write_records(tmp_path))
    scan = scan_records(Records.from_files(require_record_files(f'{tmp_path}/train-*')))
    suggested = [S.suggest_spec(spec.replace(dataset_config=dict(num_classes=n)), scan).dataset_config.num_classes
                 for n in (3, 4, 50)]
    assert suggested==[3, 4, 4]     # three categories have three channels; the fourth is TAO's idle one


def test_the_command_writes_a_spec_that_can_be_trained(tmp_path, capsys):
    spec = small_spec(write_records(tmp_path))
    (tmp_path/'spec.txt').write_text(spec.to_text())
    target = tmp_path/'new'/'suggested.txt'
    cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=str(target))
    out = capsys.readouterr().out
    assert f'suggested settings: {target}\n' in out and ' epochs, about ' in out
    assert f'Next: effdet_train -e {target} -d FOLDER' in out
    suggested = Spec.load(target, 'train')
    scan = scan_records(Records.from_files(require_record_files(f'{tmp_path}/train-*')))
    assert suggested.to_text()==S.suggest_spec(spec, scan).to_text()


def test_the_command_lists_what_it_changes_and_leaves_out_and_a_second_time_nothing(tmp_path, capsys):
    spec = small_spec(write_records(tmp_path))
    (tmp_path/'spec.txt').write_text(spec.replace(training_config=dict(amp=True, num_epochs=7)).to_text())
    for given,suggested in (('spec.txt','a b.txt'), ('a b.txt','second.txt'), ('spec.txt','a b.txt')):
        cli.effdet_check(experiment_spec_file=str(tmp_path/given), suggest=str(tmp_path/suggested))
    first,second,third = capsys.readouterr().out.split('suggested settings: ')[1:]
    lines = first.splitlines()
    left_out = next(line for line in lines if line.startswith('left out: '))
    assert 'amp' in left_out and 'num_epochs' not in left_out and '  num_epochs: 7 -> 100' in lines
    assert f"Next: effdet_train -e '{tmp_path}/a b.txt' -d FOLDER" in lines
    assert 'left out' not in second and 'changed' not in second and third==first
    assert (tmp_path/'a b.txt').read_text()==(tmp_path/'second.txt').read_text()


def test_fields_that_are_set_with_the_command_are_kept(tmp_path, capsys):
    (tmp_path/'spec.txt').write_text(small_spec(write_records(tmp_path)).to_text())
    cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=str(tmp_path/'suggested.txt'),
                     set=['num_epochs=10', 'image_size=384,384'])
    spec = Spec.load(tmp_path/'suggested.txt')
    assert spec.training_config.num_epochs==10 and spec.dataset_config.image_hw==(384,384)
    assert '10 epochs, about ' in capsys.readouterr().out


@pytest.mark.parametrize('name,message', [('labels.json', 'exists, was not written by --suggest'),
                                          ('mine.txt', 'exists, was not written by --suggest'),
                                          ('', 'the name of the file is missing'), ('folder', 'this is a folder')])
def test_no_file_of_the_user_is_replaced(name, message, tmp_path, capsys):
    (tmp_path/'spec.txt').write_text(small_spec(write_records(tmp_path)).to_text())
    for name_of_user in ('labels.json', 'mine.txt'): (tmp_path/name_of_user).write_text('{}')
    (tmp_path/'folder').mkdir()
    before = {path: path.read_bytes() for path in tmp_path.glob('*.*')}
    with pytest.raises(SystemExit):
        cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=name and str(tmp_path/name))
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob('*.*')}==before


def test_a_missing_number_of_classes_is_filled_in(tmp_path):
    text = small_spec(write_records(tmp_path)).to_text()
    (tmp_path/'spec.txt').write_text('\n'.join(line for line in text.splitlines() if 'num_classes' not in line))
    cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=str(tmp_path/'suggested.txt'))
    assert Spec.load(tmp_path/'suggested.txt').dataset_config.num_classes==4


def test_a_class_of_small_objects_decides_about_the_input_size():
    sides,labels = [.2]*190+[.05]*10, np.repeat([1,2], [190,10])
    assert S.suggest_image_side(sides)==256 and S.suggest_image_side(sides, labels=labels)==320
    assert S.suggest_image_side(sides[:-1], labels=labels[:-1])==256      # too few of them to decide


def test_data_with_errors_get_no_suggestion(tmp_path, capsys):
    spec = small_spec(write_records(tmp_path)).replace(dataset_config=dict(num_classes=2))
    (tmp_path/'spec.txt').write_text(spec.to_text())
    with pytest.raises(SystemExit):
        cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=str(tmp_path/'suggested.txt'))
    assert f'{tmp_path}/suggested.txt was not written' in capsys.readouterr().err
    assert not (tmp_path/'suggested.txt').exists()


def test_the_command_checks_the_data_with_the_settings_that_it_suggests(tmp_path, capsys):
    spec = small_spec(write_records(tmp_path)).replace(dataset_config=dict(num_classes=50))
    (tmp_path/'spec.txt').write_text(spec.to_text())
    cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'))
    assert 'num_classes' in capsys.readouterr().out
    cli.effdet_check(experiment_spec_file=str(tmp_path/'spec.txt'), suggest=str(tmp_path/'suggested.txt'))
    notes = capsys.readouterr().out.split('The data with these settings:')[1]
    assert 'train: ' in notes or 'training: ' in notes
    assert 'num_classes' not in notes
