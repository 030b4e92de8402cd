"""What would fail is found, and the finding says what to do."""
import copy
import json
import shutil
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model import PretrainedInit

from kd_det.checks import environment
from kd_det.checks.checkpoints import (
    inspect_checkpoints,
    inspect_start,
    inspect_teacher_classes,
    inspect_teacher_weights,
)
from kd_det.checks.data import check_labels, class_counts, inspect_annotations, inspect_classes, inspect_paths
from kd_det.checks.doctor import check_config, explain, inspect_config, inspect_data
from kd_det.checks.environment import DiagnosisError, Finding, raise_faults
from kd_det.checks.step import inspect_step, original_sizes, tried_sizes
from kd_det.config.files import ConfigurationError
from kd_det.losses import FGD

CLASSES = ('blue', 'green', 'red')


@pytest.fixture
def folder(coco_folder, tmp_path):
    """A copy of the shared data, to damage."""
    return shutil.copytree(coco_folder, tmp_path / 'coco')


@pytest.fixture
def config(folder, retinanet):
    dataset = dict(type='CocoDataset', data_root=str(folder), ann_file='all.json', data_prefix=dict(img=''),
                   metainfo=dict(classes=CLASSES), pipeline=[dict(type='LoadImageFromFile')])
    return Config(dict(
        model=retinanet(),
        train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
        val_dataloader=dict(dataset=dict(dataset, test_mode=True)),
        test_dataloader=dict(dataset=dict(dataset, test_mode=True)),
        val_evaluator=dict(type='CocoMetric', ann_file=f'{folder}/all.json')))


@pytest.fixture
def distilling(config, retinanet, tmp_path):
    """A distillation whose teacher's checkpoint fits."""
    teacher = retinanet(depth=50)
    torch.save(dict(state_dict=MODELS.build(teacher).state_dict()), tmp_path / 'teacher.pth')
    config.model = dict(type='DetectionDistiller', student=config.model, distill=dict(),
                        teacher=dict(config=teacher, checkpoint=str(tmp_path / 'teacher.pth')))
    config.default_hooks = dict(distill=dict(type='DistillHook', preflight=dict(images=8)))
    return config


def dataset_of(config):
    return config.train_dataloader.dataset.dataset


def rewrite(folder, change):
    content = json.loads((folder / 'all.json').read_text())
    change(content)
    (folder / 'all.json').write_text(json.dumps(content))


def fault_of(findings) -> Finding:
    faults = [finding for finding in findings if finding.fault]
    assert len(faults) == 1 and faults[0].remedy
    return faults[0]


def test_nothing_to_find(distilling):
    findings = list(inspect_config(distilling))
    assert not any(finding.fault for finding in findings)
    found = {finding.subject: finding.found for finding in findings}
    assert found['train data'] == '8 images, 8 of them with boxes of 3 classes'
    assert found['teacher weights'] == 'fit RetinaNet'
    assert 'val data' not in found  # the same files as train
    check_config(distilling, ('train', 'val'))


# ---------------------------------------------------------------- data


def test_paths_that_do_not_exist(config):
    dataset_of(config).ann_file, dataset_of(config).data_prefix = 'no.json', dict(img='nowhere/')
    config.val_evaluator = [dict(ann_file='/no/such.json')]
    found = {finding.subject: finding.found for finding in inspect_paths(config) if finding.fault}
    root = dataset_of(config).data_root
    assert found == {
        'train annotations': f"'{root}/no.json' does not exist",
        'train images': f"'{root}/nowhere' does not exist",
        'val evaluator': "'/no/such.json' does not exist"
    }


def test_only_the_splits_that_a_run_needs(config):
    config.test_dataloader.dataset.ann_file = 'no.json'
    check_config(config, ('train', 'val'))
    with pytest.raises(DiagnosisError, match='no.json'):
        check_config(config, ('test', ))


def test_addresses_are_not_looked_up(config):
    dataset_of(config).data_root = 's3://bucket/coco/'
    assert not any(finding.fault for finding in inspect_paths(config))


def test_all_missing_files_are_told_at_once_and_the_remedy_once(config):
    dataset_of(config).data_root = config.val_dataloader.dataset.data_root = '/nowhere'
    with pytest.raises(DiagnosisError) as error:
        check_config(config, ('train', 'val'))
    assert str(error.value).count('does not exist') == 2 and str(error.value).count('--data-root') == 1


@pytest.mark.parametrize(
    'text, why', [('{"images": [', 'it is cut off: Expecting value'), ('[]', 'it holds a list'),
                  ('{"images": []}', "no 'categories'"), ('', 'it is empty'), (' \n', 'it is empty'),
                  ('{"images": {}, "categories": [], "annotations": []}', "'images' is an object, no list"),
                  ('{"images": [{"file_name": "a', 'it is cut off: Unterminated string'),
                  ('{"images": [1,, 2]}', 'it is no JSON: Expecting value: line 1 column 15'),
                  ('null', 'it holds null'),
                  ('\ufeff{}', 'it is no JSON: Unexpected UTF-8 BOM'),
                  ('[' * 100000, 'it can not be read'), (b'{"images": "\xe9"}', 'it is not encoded as UTF-8')])
def test_a_file_that_is_no_annotation_file(config, folder, text, why):
    (folder / 'all.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    fault = fault_of(inspect_annotations(config))
    assert f"all.json' is no COCO annotation file ({why}" in fault.found
    assert fault.remedy == 'Expected a JSON object with the lists images, categories and annotations'


def test_a_file_without_images(config, folder):
    rewrite(folder, lambda content: content.update(images=[], annotations=[]))
    assert 'lists no images' in fault_of(inspect_annotations(config)).found


def test_classes_that_the_file_does_not_have(config):
    for dataset in (dataset_of(config), config.val_dataloader.dataset, config.test_dataloader.dataset):
        dataset.metainfo.classes = ('cat', 'dog', 'cow')
    fault = fault_of(inspect_annotations(config))
    assert "no box of the config's classes (cat, dog, cow); the file's categories are blue, green, red" in fault.found
    assert 'metainfo=dict(classes=…)' in fault.remedy


def test_classes_that_are_numbers_in_the_file_and_texts_in_the_config(config, folder):
    rewrite(folder, lambda content: [category.update(name=category['id']) for category in content['categories']])
    set_classes(config, ('1', '2', '3'))
    fault = fault_of(inspect_annotations(config, ['train']))
    assert "config's classes ('1', '2', '3'); the file's categories are 1, 2, 3" in fault.found


def test_a_file_without_boxes(config, folder):
    rewrite(folder, lambda content: content.update(annotations=[]))
    fault = fault_of(inspect_annotations(config))
    assert "no box of the config's classes" in fault.found and "dict(type='Unlabelled')" in fault.remedy


# ---------------------------------------------------------------- what labels mean


def set_classes(config, classes, splits=('train', 'val', 'test')):
    for split in splits:
        (dataset_of(config) if split == 'train' else config[f'{split}_dataloader'].dataset).metainfo.classes = classes


def test_a_class_without_boxes_that_stands_last_is_a_note_where_nothing_is_evaluated(config):
    set_classes(config, ('blue', 'green', 'yellow'))
    _, finding = inspect_data(config, ['train'])
    assert not finding.fault and finding.found == "there is no category 'yellow' in the annotations"
    fault = fault_of(inspect_data(config, ['val']))  # the metric would look for its category
    assert "leave it out: Write metainfo=dict(classes=('blue', 'green')) in the data set, and num_classes=2 in" \
        in fault.remedy
    del config.val_evaluator.ann_file  # it takes the ground truth from the data set
    _, finding = inspect_data(config, ['val'])
    assert not finding.fault and finding.subject == 'val data classes'


@pytest.mark.parametrize('classes', [('blue', 'green', 'rde'), ('bleu', 'green', 'red'), ('blue', 'gren', 'red'),
                                     ('BLUE', 'green', 'red'), ('blue', 'green', 'RED')])
def test_a_misspelt_class_is_a_fault_that_names_the_near_name(config, classes):
    set_classes(config, classes)
    fault = fault_of(inspect_data(config, ['train']))
    wrong, right = next(pair for pair in zip(classes, CLASSES) if len(set(pair)) == 2)
    assert f"no category '{wrong}' in the annotations; the nearest name is '{right}'" in fault.found
    assert f'Write metainfo=dict(classes={CLASSES!r}) in the data set' in fault.remedy


def test_another_order_than_the_files_is_a_fault_that_shows_both(config):
    set_classes(config, ('red', 'green', 'blue'))
    fault = fault_of(inspect_data(config))  # once: the splits are the same
    assert fault.found.splitlines()[1:] == ['    label  boxes  metainfo', '        0  blue   red',
                                            '        1  green  green', '        2  red    blue']
    assert f'metainfo=dict(classes={CLASSES!r})' in fault.remedy
    dataset = DATASETS.build(config.train_dataloader.dataset)
    with pytest.raises(DiagnosisError, match='label  boxes  metainfo\n'):
        check_labels(dict(train=dataset))


def test_teachers_are_matched_by_what_labels_mean_and_not_by_what_the_config_says(distilling):
    set_classes(distilling, ('red', 'green', 'blue'))
    distilling.model.teacher.classes = CLASSES
    found = {finding.subject: finding.found for finding in inspect_config(distilling)}
    assert found['teacher classes'] == "the teacher's 3 are the student's, in the same order."
    assert 'metainfo' in found['train data classes']


def test_a_subset_in_the_order_of_the_file_is_sound(config):
    set_classes(config, ('blue', 'red'))
    assert not any(finding.fault for finding in inspect_data(config))
    set_classes(config, ('Blue', 'red'))  # MMDetection compares names letter by letter
    assert "nearest name is 'blue'" in fault_of(inspect_data(config, ['train'])).found


def test_of_many_classes_those_that_differ_are_shown(config, folder):
    names = [f'class {index}' for index in range(60)]
    rewrite(folder, lambda content: content.update(
        categories=[*content['categories'], *(dict(id=10 + index, name=name) for index, name in enumerate(names))]))
    set_classes(config, (*CLASSES, *names[:40], names[41], names[40], *names[42:]))
    rows = fault_of(inspect_data(config, ['train'])).found.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ['43', '44']
    set_classes(config, (*CLASSES, *names[::-1]))
    assert fault_of(inspect_data(config, ['train'])).found.endswith('\n    … and 40 more')


def test_data_that_is_evaluated_has_to_number_classes_as_the_training_data(config, folder):
    content = json.loads((folder / 'all.json').read_text())
    content['categories'].reverse()
    (folder / 'reverse.json').write_text(json.dumps(content))
    config.val_dataloader.dataset.update(ann_file='reverse.json', metainfo=dict(classes=CLASSES[::-1]))
    config.val_evaluator.ann_file = f'{folder}/reverse.json'
    fault = fault_of(inspect_data(config, ['train', 'val']))
    assert (fault.subject, fault.found.splitlines()[1]) == ('val data labels', '    label  val data  train data')


def test_an_evaluator_with_a_file_of_its_own_has_to_number_classes_as_its_data(config, folder):
    content = json.loads((folder / 'all.json').read_text())
    content['categories'].reverse()
    (folder / 'reverse.json').write_text(json.dumps(content))
    config.val_evaluator.ann_file = f'{folder}/reverse.json'
    fault = fault_of(inspect_data(config, ['val']))
    assert fault.subject == 'val evaluator classes' and '0  red    blue' in fault.found
    assert fault.remedy.startswith('Give the evaluator the annotation file of its data set')


def test_each_of_joined_data_sets_is_read(config, folder):
    """And the files of a test that is not scored may lack annotations."""
    one, other = dataset_of(config), copy.deepcopy(dataset_of(config))
    (folder / 'other.json').write_text((folder / 'all.json').read_text().replace('"bbox"', '"box"', 1))
    other.ann_file = 'other.json'
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, dict(
        type='RepeatDataset', times=2, dataset=other)])
    fault = fault_of(inspect_annotations(config, ['train']))
    assert fault.found == f"'{folder}/other.json': annotation 0 (id 1): no 'bbox'"
    with pytest.raises(DiagnosisError, match="annotation 0 .id 1.: no 'bbox'"):
        check_config(config, ('train', ))


def test_data_that_is_not_scored_needs_no_annotations(config, folder):
    content = json.loads((folder / 'all.json').read_text())
    del content['annotations']
    (folder / 'test-dev.json').write_text(json.dumps(content))
    config.test_dataloader.dataset.ann_file = 'test-dev.json'
    config.test_evaluator = dict(type='CocoMetric', ann_file=f'{folder}/test-dev.json', format_only=True)
    assert [finding.mark for finding in inspect_annotations(config, ['test'])] == ['ok']
    config.test_evaluator.format_only = False
    assert fault_of(inspect_annotations(config, ['test'])).found.endswith("(no 'annotations')")


def test_a_data_set_that_reads_in_its_own_way_is_judged_once_it_is_built(config, folder):
    @DATASETS.register_module(force=True)
    class OwnCoco(CocoDataset):
        """Its file has no 'area'."""

        def parse_data_info(self, raw_data_info):
            for each in raw_data_info['raw_ann_info']:
                each['area'] = 1
            parsed = super().parse_data_info(raw_data_info)
            parsed['instances'][0]['bbox'][0] *= self.metainfo.get('factor', 1)
            return parsed

    try:
        rewrite(folder, lambda content: [each.pop('area') for each in content['annotations']])
        dataset = dataset_of(config)
        dataset.type, dataset.pipeline = 'OwnCoco', [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
        config.val_dataloader = config.val_evaluator = None
        assert not any(finding.fault for finding in inspect_data(config, ['train']))
        dataset.metainfo.factor = float('inf')
        assert "0.png'), instance 0: its bbox is [inf, " in fault_of(inspect_data(config, ['train'])).found
    finally:
        DATASETS.module_dict.pop('OwnCoco')


def test_an_evaluator_has_to_know_the_images_of_its_data_set(config, folder):
    """Else the run would end in an AssertionError after its first epoch."""
    content = json.loads((folder / 'all.json').read_text())
    (folder / 'part.json').write_text(json.dumps(dict(content, images=content['images'][2:])))
    config.val_evaluator.ann_file = f'{folder}/part.json'
    fault = fault_of(inspect_data(config, ['val']))
    assert fault.subject == 'val evaluator' and fault.found.startswith(
        '2 of the 8 images of the data set are not in its annotation file, such as that of the id ')
    dataset = DATASETS.build(config.val_dataloader.dataset)
    with pytest.raises(DiagnosisError, match='2 of the 8 images'):
        check_labels(dict(val=dataset), dict(val=Evaluator(config.val_evaluator).metrics))
    config.val_evaluator.ann_file, config.val_dataloader.dataset.ann_file = f'{folder}/all.json', 'part.json'
    finding = inspect_data(config, ['val'])[-1]
    assert finding.mark == 'note' and finding.found.startswith('2 of the 8 images of its file are not in the')


def test_joined_data_sets_have_to_number_classes_alike(config, folder):
    content = json.loads((folder / 'all.json').read_text())
    content['categories'].reverse()
    (folder / 'reverse.json').write_text(json.dumps(content))
    one, other = dataset_of(config), copy.deepcopy(dataset_of(config))
    other.update(ann_file='reverse.json', metainfo=dict(classes=CLASSES[::-1]))
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, other])
    fault = fault_of(inspect_data(config, ['train']))
    assert fault.subject == 'train data 1 labels' and '0  red           blue' in fault.found
    other.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs'), dict(type='Unlabelled')]
    assert not any(finding.fault for finding in inspect_data(config, ['train']))  # it has no labels


def test_a_data_set_that_can_not_be_built_is_a_fault(config):
    dataset_of(config).pipeline = [dict(type='NoSuchTransform')]
    assert 'NoSuchTransform' in fault_of(inspect_data(config, ['train'])).found


def test_unlabelled_images_have_no_annotations(config, folder):
    rewrite(folder, lambda content: content.pop('annotations'))
    dataset = dataset_of(config)
    assert "is no COCO annotation file (no 'annotations')" in fault_of(inspect_annotations(config, ['train'])).found
    dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs'), dict(type='Unlabelled')]
    finding, = inspect_annotations(config, ['train'])
    assert (finding.found, finding.fault) == ('8 images, unlabelled', False)
    dataset.filter_cfg = dict(filter_empty_gt=True)
    assert 'filter_empty_gt=False' in fault_of(inspect_annotations(config, ['train'])).remedy


def test_class_counts_look_into_all_heads(faster_rcnn):
    assert class_counts(faster_rcnn(classes=7)) == {7}
    assert class_counts(
        dict(rpn_head=dict(num_classes=1),
             roi_head=dict(bbox_head=[dict(num_classes=5), dict(num_classes=6)],
                           semantic_head=dict(num_classes=183)))) == {5, 6}  # of stuff, as HTC has it
    assert class_counts(dict(type='Detector')) == set()


@pytest.mark.parametrize('name', [
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365.py',
    'glip/glip_atss_swin-l_fpn_dyhead_16xb2_ms-2x_funtune_coco.py', 'htc/htc_r50_fpn_1x_coco.py'])
def test_mmdetections_own_configs_have_as_many_classes_as_their_data(name):
    """Stuff has no boxes, and of a detector that reads the names of classes it is a number of words."""
    own = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / name)
    assert not list(inspect_classes(own))


def test_numbers_of_classes_that_differ(config, retinanet):
    config.model = retinanet(classes=80)
    fault = fault_of(inspect_classes(config))
    assert 'num_classes=80, the data set has 3' in fault.found and 'metainfo' in fault.remedy


def test_classes_default_to_those_of_the_data_sets_type(config):
    dataset_of(config).pop('metainfo')
    assert 'the data set has 80' in fault_of(inspect_classes(config)).found


def test_a_forgotten_comma(config):
    dataset_of(config).metainfo.classes = 'cell'
    assert "('cell', )" in fault_of(inspect_classes(config, ['train'])).remedy


# ---------------------------------------------------------------- weights


def test_a_teacher_without_a_file(distilling):
    distilling.model.teacher.checkpoint = '/no/such.pth'
    fault = fault_of(inspect_checkpoints(distilling))
    assert fault.subject == 'teacher checkpoint' and '/no/such.pth' in fault.found
    distilling.model.teacher = [distilling.model.teacher]
    assert fault_of(inspect_checkpoints(distilling)).subject == 'teacher 0 checkpoint'


def test_a_teacher_without_a_checkpoint(distilling):
    distilling.model.teacher.checkpoint = None
    assert fault_of(inspect_checkpoints(distilling)).found == 'none is given'
    distilling.model.teacher.random_teacher = True
    assert not any(finding.fault for finding in inspect_checkpoints(distilling))


def test_initial_weights(config):
    for kind in ('Pretrained', PretrainedInit):  # a config in Python's own syntax names the class
        config.model.backbone.init_cfg = dict(type=kind, checkpoint='/no/backbone.pth')
        assert '/no/backbone.pth' in fault_of(inspect_checkpoints(config)).found
    config.model.backbone.init_cfg.checkpoint = 'torchvision://resnet18'
    assert [finding.fault for finding in inspect_checkpoints(config)] == [False]
    config.model.backbone = dict(config.model.backbone, init_cfg=None, pretrained='/no/older.pth')
    assert '/no/older.pth' in fault_of(inspect_checkpoints(config)).found


def test_checkpoint_to_start_from(config):
    assert not list(inspect_start(config))
    config.load_from = '/no/such.pth'
    assert '/no/such.pth' in fault_of(inspect_start(config)).found


@pytest.mark.parametrize('preflight', [None, dict(images=8)])
def test_a_teacher_of_other_classes(distilling, retinanet, preflight):
    """It could teach features; the pre-flight would stop it."""
    distilling.model.teacher.config = retinanet(classes=80)
    distilling.default_hooks.distill.preflight = preflight
    finding, = inspect_teacher_classes(distilling)
    assert finding.found == '80, the student has 3' and finding.fault is bool(preflight)


def test_classes_are_matched_by_name(distilling, retinanet):
    distilling.model.teacher.update(config=retinanet(classes=4), classes=['red', 'Dog', 'Green', 'cat'])
    finding, = inspect_teacher_classes(distilling)
    assert not finding.fault and "2 of the student's 3 are among the teacher's 4" in finding.found
    assert "Not shared: blue. Taken for the same: 'green' = 'Green'." in finding.found
    distilling.model.teacher.classes = ['ant', 'dog', 'bee', 'cat']
    assert 'no name in common' in fault_of(inspect_teacher_classes(distilling)).found
    distilling.model.teacher.classes = ['ant']
    assert 'gives 1 names, but the teacher tells 4' in fault_of(inspect_teacher_classes(distilling)).found


def test_the_checkpoint_names_the_teachers_classes(distilling, tmp_path):
    checkpoint = torch.load(distilling.model.teacher.checkpoint, weights_only=True)
    checkpoint['meta'] = dict(dataset_meta=dict(classes=('red', 'green', 'blue')))
    torch.save(checkpoint, tmp_path / 'named.pth')
    distilling.model.teacher.checkpoint = str(tmp_path / 'named.pth')
    finding, = inspect_teacher_classes(distilling)
    assert not finding.fault and "the teacher's 3 are the student's, in another order" in finding.found


def test_names_given_that_are_not_the_teachers(distilling):
    for given in ('abc', ['a', 'a', 'b'], ['a', 'b']):
        distilling.model.teacher.classes = given
        fault = fault_of(inspect_teacher_classes(distilling))
        assert (fault.subject, fault.remedy) == ('teacher classes', 'Correct model.teacher.classes')
        assert fault.found.endswith('by label')


def test_a_teacher_without_a_config(distilling):
    distilling.model.teacher.config = 'nowhere.py'
    assert 'nowhere.py' in fault_of(inspect_teacher_classes(distilling)).found


def test_the_weights_of_a_backbone_are_tried_as_those_of_a_detector(distilling, tmp_path):
    backbone = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
    guide = dict(type='Backbone', config=backbone, checkpoint=str(tmp_path / 'none.pth'),
                 mean=[120.0] * 3, std=[60.0] * 3)
    distilling.model.teacher = guide
    distilling.model.distill = dict(pkd=dict(type='PKD', tap='neck', levels=1))
    assert 'none.pth' in fault_of(inspect_checkpoints(distilling)).found
    torch.save(MODELS.build(dict(backbone, base_channels=4)).state_dict(), tmp_path / 'none.pth')
    assert 'does not fit the teacher ResNet' in fault_of(inspect_teacher_weights(distilling)).found
    torch.save(MODELS.build(backbone).state_dict(), tmp_path / 'none.pth')
    assert [finding.found for finding in inspect_teacher_weights(distilling)] == ['fit ResNet']
    distilling.model.teacher = [dict(type='Ensemble', of=[guide, guide])]
    assert [finding.subject for finding in inspect_teacher_weights(distilling)] == [
        'teacher 0.of[0] weights', 'teacher 0.of[1] weights']


def test_a_teacher_whose_weights_do_not_fit(distilling, retinanet):
    distilling.model.teacher.config = retinanet(depth=18)
    fault = fault_of(inspect_teacher_weights(distilling))
    assert 'layer1.0.conv3.weight' in fault.found
    distilling.model.teacher.checkpoint = 'https://host/teacher.pth'  # nothing is downloaded for a diagnosis
    assert not list(inspect_teacher_weights(distilling))


@pytest.mark.parametrize('key, value, said', [
    ('neck.lateral_convs.0.conv.weight', float('nan'), 'holds weights that are not finite: 1 of '),
    ('neck.lateral_convs.0.conv.weight', 1e38, 'are finite, but its features of an image of noise are not: level 0'),
    ('backbone.bn1.running_var', -1.0, 'are finite, but its features of an image of noise are not: level 0')])
def test_a_teacher_that_is_not_finite(key, value, said, distilling):
    file = distilling.model.teacher.checkpoint
    state = torch.load(file, weights_only=True)['state_dict']
    state[key].fill_(value)
    torch.save(dict(state_dict=state), file)
    fault = fault_of(inspect_teacher_weights(distilling))
    assert said in fault.found and 'Give config' not in fault.remedy


# ---------------------------------------------------------------- explaining a failure


def test_a_failure_is_explained_by_the_annotations(config, folder):
    (folder / 'all.json').write_text('{')
    with pytest.raises(DiagnosisError, match='no COCO annotation file'), explain(config):
        DATASETS.build(config.train_dataloader.dataset)


def test_a_failure_is_explained_by_the_config(config):
    with pytest.raises(ConfigurationError, match="can not be built: TypeError.*'unknown'"), explain(config):
        MODELS.build(dict(config.model, unknown=1))


def test_an_error_that_says_enough_passes(config):
    with pytest.raises(FileNotFoundError, match='^gone$'), explain(config):
        raise FileNotFoundError('gone')
    with pytest.raises(DiagnosisError, match='^mine$'), explain(config):
        raise DiagnosisError('mine')


def test_raise_faults_passes_over_the_rest():
    raise_faults([Finding('a', 'fine'), Finding('b', 'so so', 'do something')])


def test_sentences_of_faults_end_once():
    faults = [Finding('a', 'is wrong', 'Do this', fault=True), Finding('b', 'It is wrong.', 'Do this', fault=True)]
    with pytest.raises(DiagnosisError) as error:
        raise_faults(faults)
    assert str(error.value) == 'a: is wrong.\n  b: It is wrong.\n  Do this.'


# ---------------------------------------------------------------- installation


def test_installation_is_sound_here():
    findings = {finding.subject: finding for finding in environment.inspect_environment()}
    assert not any(finding.fault for finding in findings.values())
    assert findings['mmdet'].found.endswith('3.3.0') or findings['mmdet'].found.startswith('onedl')
    assert {'Python', 'kd_det', 'torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'operators',
            'GPU'} <= set(findings)


def test_a_module_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(environment.DISTRIBUTIONS, 'no_such_module', ('no-such', ))
    fault = fault_of(environment.inspect_environment())
    assert (fault.subject, fault.found, fault.remedy) == ('no_such_module', 'not installed',
                                                          "pip install 'kd-det[mmdet]'")


def test_a_module_that_breaks_when_imported(monkeypatch, tmp_path):
    (tmp_path / 'breaks_on_import.py').write_text("raise ImportError('libGL.so.1')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(environment.DISTRIBUTIONS, 'breaks_on_import', ())
    assert 'libGL.so.1' in fault_of(environment.inspect_environment()).found


def test_setuptools_without_pkg_resources(monkeypatch):
    find_spec = environment.find_spec
    monkeypatch.setattr(environment, 'find_spec', lambda name: None if name == 'pkg_resources' else find_spec(name))
    assert fault_of(environment.inspect_environment()).remedy == "pip install 'setuptools<81'"


# ---------------------------------------------------------------- a step


def test_a_step_is_tried(distilling):
    distilling.model.distill = dict(fgd=dict(type='FGD'), classes=dict(type='DenseClassification', head='bbox_head'))
    before, drawn = distilling.to_dict(), torch.random.get_rng_state()
    finding, = inspect_step(distilling)
    assert finding == Finding('a training step', 'computes fgd, classes')
    assert distilling.to_dict() == before and torch.equal(torch.random.get_rng_state(), drawn)


def test_terms_that_a_teacher_can_not_serve_are_found_before_the_run(distilling, faster_rcnn, retinanet):
    classes = dict(type='DenseClassification', head='bbox_head')
    for teacher, term, message in (
            (faster_rcnn(), classes, "A FasterRCNN has no 'bbox_head'"),
            (retinanet(neck=12), dict(type='PKD', tap='neck', adapter='none'), 'needs equal channels'),
            (retinanet(classes=5), classes, 'the teacher 5')):
        distilling.model.teacher.config = teacher
        distilling.model.distill = dict(term=term)
        assert message in fault_of(list(inspect_step(distilling))).found, message


def test_a_student_that_can_not_grow_from_its_teacher_is_found_before_the_run(distilling, retinanet):
    distilling.model.update(student=retinanet(width=8), inherit='auto', inherit_by='growth', distill={})
    distilling.model.teacher.config = retinanet(width=4)
    assert not any(finding.fault for finding in inspect_step(distilling))
    distilling.model.student = retinanet(width=8, depth=50)
    finding = fault_of(inspect_step(distilling))
    assert finding.subject == 'model.inherit_by' and 'backbone.layer1.0 can not: a BasicBlock' in finding.found


def test_terms_that_can_teach_nothing_are_told_before_the_run(distilling):
    """A fault where that is all of them, else a note."""
    distilling.model.student.backbone.frozen_stages = 4
    for weight in (1.0, dict(type='Start', epochs=5, value=dict(type='Balance'))):
        hint = dict(type='FeatureImitation', tap='backbone', weight=weight)
        distilling.model.distill = dict(hint=hint)
        assert "model.distill.hint: It reads 'backbone'" in fault_of(list(inspect_step(distilling))).found
        distilling.model.distill = dict(hint=hint, fgd=dict(type='FGD'))
        step, note = inspect_step(distilling)
        assert step == Finding('a training step', 'computes hint, fgd') and note.subject == 'term hint'
        assert not note.fault and 'teaches the student nothing' in note.found and 'neck' in note.remedy


@pytest.mark.parametrize('error, said', [
    (RuntimeError('stack expects each tensor to be equal'), 'RuntimeError: stack expects each'),
    (ZeroDivisionError('division'), 'ZeroDivisionError'),
    (AttributeError("'Conv2d' object has no attribute 'x'"), 'x')])
def test_an_error_of_a_step_is_a_fault_that_tells_the_size(error, said, distilling, monkeypatch):
    monkeypatch.setattr('mmdet.models.RetinaNet.loss', lambda *given: throw(error))
    distilling.train_dataloader.dataset.dataset.pipeline = [dict(type='Resize', scale=(70, 50))]
    finding = fault_of(inspect_step(distilling))
    assert said in finding.found and '50 × 70 pixels' in finding.found and 'kd-det inspect' in finding.remedy


def test_what_is_not_finite_in_a_step(distilling, monkeypatch):
    """A term's value is a fault; a gradient, or the detector's own loss, may come of noise."""
    whole = FGD.compare

    def spoil(term, level, position, make=lambda parts: dict(parts, background=parts['background'] * float('nan'))):
        return make(whole(term, level, position))

    distilling.model.distill = dict(fgd=dict(type='FGD'))
    monkeypatch.setattr(FGD, 'compare', spoil)
    fault = fault_of(inspect_step(distilling))
    assert "model.distill.fgd (part 'background' nan) is not finite on noise" in fault.found
    assert 'kd-det inspect CONFIG' in fault.remedy
    monkeypatch.setattr(FGD, 'compare', lambda *given: spoil(
        *given, lambda parts: dict(parts, background=(parts['background'] * 0).sqrt())))
    note, = inspect_step(distilling)
    assert not note.fault and 'has a gradient on noise that is not finite: ' in note.found
    monkeypatch.undo()
    monkeypatch.setattr('mmdet.models.RetinaNet.loss', lambda model, inputs, samples: dict(
        loss_own=model.extract_feat(inputs)[0].mean() * float('inf')))
    note, = inspect_step(distilling)
    assert not note.fault and "The student's own loss_own is not finite on noise" in note.found


def throw(error):
    raise error


def test_what_can_not_be_built_is_a_fault(distilling):
    distilling.model.student.neck.no_such = 1
    assert "can not be built: TypeError" in fault_of(inspect_step(distilling)).found


def test_what_noise_lacks_is_a_note(distilling, monkeypatch):
    monkeypatch.setattr('mmdet.models.RetinaNet.loss', lambda model, inputs, samples: samples[0].text)
    finding, = inspect_step(distilling)
    assert not finding.fault and "no attribute 'text'" in finding.found and 'kd-det inspect' in finding.remedy


@pytest.mark.parametrize('divisor, of_teacher', [(1, 32), (32, 1), (1, 1), (32, 32)])
def test_the_sizes_of_the_training_are_tried(divisor, of_teacher, distilling, one_stage):
    """A PAFPN puts levels together by doubling: the student's own is in no training of odd sizes."""
    student, teacher = (one_stage('yolox', classes=3) for _ in range(2))
    for model, pads in ((student, divisor), (teacher, of_teacher)):
        model.data_preprocessor = dict(type='DetDataPreprocessor', pad_size_divisor=pads)
        model.neck = dict(type='YOLOXPAFPN', in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1)
        model.backbone.out_indices = (1, 2, 3)
    distilling.model = dict(type='DetectionDistiller', student=student, teacher=dict(config=teacher),
                            distill=dict(pkd=dict(type='PKD')))
    pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]
    distilling.train_dataloader.dataset.dataset.pipeline = pipeline
    findings = list(inspect_step(distilling))  # the images are 64 × 64, which become 800 × 800
    assert not any(finding.fault for finding in findings)
    pipeline[0]['scale'] = (100, 100)
    distilling.train_dataloader.dataset.dataset.pipeline = pipeline
    if divisor == 32:
        assert not any(finding.fault for finding in inspect_step(distilling))
        return
    finding = fault_of(inspect_step(distilling))
    assert '100 × 100 pixels' in finding.found and "pad_size_divisor=32 in the student's config" in finding.remedy


def test_a_teacher_whose_levels_do_not_fit_is_told_of(distilling, one_stage, retinanet):
    teacher = one_stage('yolox', classes=3)
    teacher.data_preprocessor = dict(type='DetDataPreprocessor')
    teacher.neck = dict(type='YOLOXPAFPN', in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1)
    teacher.backbone.out_indices = (1, 2, 3)
    student = retinanet(levels=3)
    student.data_preprocessor = dict(type='DetDataPreprocessor')
    distilling.model = dict(type='DetectionDistiller', student=student, teacher=dict(config=teacher),
                            distill=dict(pkd=dict(type='PKD')))
    distilling.train_dataloader.dataset.dataset.pipeline = [dict(type='Resize', scale=(100, 100))]
    assert 'The teacher can not be run on a batch of 100 × 100 pixels' in fault_of(inspect_step(distilling)).found


def test_large_sizes_are_tried_by_smaller_ones_of_the_same_remainders(distilling):
    dataset = distilling.train_dataloader.dataset.dataset
    dataset.ann_file = 'none.json'  # then images are taken for wide and high ones
    dataset.pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]
    sizes = tried_sizes(distilling)
    assert sizes == [(288, 299), (299, 288)] and all(
        (large - small) % 128 == 0 for small, large in zip(sizes[0], (800, 1067)))
    assert tried_sizes(distilling, 512) == [(544, 555), (555, 544)]
    dataset.pipeline = [dict(type='RandomChoiceResize', scales=[(640, 640), (100, 90)])]
    assert tried_sizes(distilling) == [(90, 100), (256, 256)]  # odd ones first


def test_sizes_of_the_images_are_those_of_the_annotation_file(distilling, folder):
    assert original_sizes(distilling) == [(64, 64)]
    sizes = [(90, 50), (90, 50), (40, 60), (30, 70), (30, 70), (10, 5)]

    def resize(content):
        for image, (height, width) in zip(content['images'], sizes):
            image.update(height=height, width=width)
        del content['images'][len(sizes):]

    rewrite(folder, resize)
    assert original_sizes(distilling) == [(30, 70), (90, 50)]
    (folder / 'all.json').write_text('no images')
    assert original_sizes(distilling) == [(480, 640), (640, 480)]


def test_a_plain_detector_has_no_step_to_try(config):
    assert list(inspect_step(config)) == []


def test_a_teacher_both_random_and_from_a_checkpoint_is_a_fault():
    teacher = dict(config='teacher.py', checkpoint='teacher.pth', random_teacher=True)
    config = Config(dict(model=dict(type='DetectionDistiller', teacher=teacher, student=dict())))
    finding, = inspect_checkpoints(config)
    assert finding.fault and "'teacher.pth' contradicts random_teacher=True" in finding.found


def test_a_sentence_is_not_ended_twice():
    with pytest.raises(DiagnosisError, match=r'^teacher: Name all of them\.\n  data: there is none\.\n  Correct it\.$'):
        raise_faults([Finding('teacher', 'Name all of them.', 'Correct it', fault=True),
                      Finding('data', 'there is none', 'Correct it', fault=True)])
