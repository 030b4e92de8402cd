"""One step as tables and pictures."""
import copy
import json

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from PIL import Image

from kd_det.config.files import ConfigurationError
from kd_det.study.inspection import describe_step, draw_step, load_image, load_training_batch, observe_step
from kd_det.study.maps import restore_images

TERMS = dict(
    neck=dict(type='FeatureImitation', weight=dict(type='Warmup', value=2.0, epochs=1), mask=dict(
        type='MaskProduct', masks=['BoxForeground', dict(type='ChannelAttention', temperature=0.5)])),
    fgd=dict(type='FGD', levels=(0, 1), weight=dict(type='Balance', ratio=0.5)),
    regions=dict(type='RoIClassification'),
    proposals=dict(type='RPNImitation'))


@pytest.fixture
def observed(faster_rcnn, distiller, batch):
    """A distiller, and the step that was observed."""
    model = distiller(faster_rcnn(), faster_rcnn(depth=50, neck=12), distill=TERMS).train()
    return model, observe_step(model, batch(shapes=((64, 96), (40, 64))))


def test_taps_are_shown_with_what_they_are_paired_with(observed):
    rows = describe_step(*observed).tabulate_taps().rows
    assert rows[0] == ('neck[0]', '2 × 8 × 16 × 24', '4', 'neck[0]', '2 × 12 × 16 × 24', 'neck, fgd')
    assert rows[4] == ('neck[4]', '2 × 8 × 1 × 2', '64', 'neck[4]', '2 × 12 × 1 × 2', 'neck')
    by_path = {row[0]: row for row in rows}
    assert by_path['roi_head logits'][1:] == ('32 × 4', '–', 'roi_head logits', '32 × 4', 'regions')
    assert by_path['rpn_head logits'][1:3] == ('2 × 4 × 1', '64') and by_path['rpn_head logits'][-1] == 'proposals'


def test_queries_and_encoders_of_detrs_are_shown(detr, distiller, batch):
    terms = dict(classes=dict(type='QueryClassification'), encoder=dict(type='PKD', tap='encoder', levels=1))
    model = distiller(detr(), detr(queries=12, layers=3), distill=terms).train()
    step = observe_step(model, batch())
    rows = {row[0]: row[1:] for row in describe_step(model, step).tabulate_taps().rows}
    assert rows['bbox_head.queries logits'] == ('2 × 2 × 10 × 3', '–', 'bbox_head.queries logits', '3 × 2 × 12 × 3',
                                                'classes')
    assert rows['encoder[0]'] == ('2 × 32 × 8 × 8', '8', 'encoder[0]', '2 × 32 × 8 × 8', 'encoder')
    measured = {row[0]: row[4] for row in describe_step(model, step).tabulate_terms().rows}
    assert measured['classes'] == 'neck' and measured['encoder'] == 'encoder'


def test_a_decoder_is_shown_by_the_memory_that_it_reads(detr, distiller, batch):
    pair = detr('DABDETR'), detr('DABDETR', embed=64)
    model = distiller(*pair, distill=dict(asked=dict(type='TargetQueries'))).train()
    (row, ) = describe_step(model, observe_step(model, batch())).tabulate_taps().rows
    assert row == ('bbox_head.decoder memory', '2 × 4 × 32', '–', 'bbox_head.decoder memory', '2 × 4 × 64', 'asked')


def test_terms_are_shown_with_value_weight_and_pull(observed):
    model, step = observed
    table = describe_step(model, step).tabulate_terms().rows
    rows = {row[0]: row for row in table}
    losses = step.observation.losses
    assert rows["the student's own loss"][1] == f'{model.parse_losses(losses)[0].item():.4g}'
    name, value, weight, weighted, path, gradient, task, ratio = rows['neck']
    assert weight == '2 (Warmup)' and path == 'neck'  # not what it is in the first step: 0
    assert float(weighted) == pytest.approx(2 * float(value), rel=1e-3) and float(gradient) > 0
    assert float(ratio) == pytest.approx(float(gradient) / float(task), rel=1e-2)
    assert rows['fgd'][-1] == '0.50' and rows['fgd'][2].endswith(' (Balance)')
    parts = table[table.index(rows['fgd']) + 1:][:4]
    assert [row[0].strip() for row in parts] == ['foreground', 'background', 'attention', 'relation']
    assert sum(float(row[1]) for row in parts) == pytest.approx(float(rows['fgd'][1]), rel=1e-2)
    assert rows['regions'][4] == 'neck'  # it reads heads alone


def test_a_term_that_can_teach_nothing_is_told(retinanet, distiller, batch):
    student = retinanet()
    student.backbone.frozen_stages = 4
    model = distiller(student, retinanet(), distill=dict(hint=dict(type='PKD', tap='backbone'), pkd=dict(type='PKD')))
    caption = describe_step(model.train(), observe_step(model, batch())).tabulate_terms().caption
    assert 'hint teaches the student nothing' in caption and 'pkd teaches' not in caption


def test_inspecting_leaves_the_model_able_to_train(observed, batch):
    model, _ = observed
    assert all(parameter.grad is None for parameter in model.parameters())
    losses = model(**model.data_preprocessor(batch(), True), mode='loss')
    model.parse_losses(losses)[0].backward()
    assert 'compare' not in vars(model.terms['fgd'])


def test_every_mask_and_attention_becomes_a_picture(observed, tmp_path):
    files = draw_step(*observed, tmp_path / 'pictures')
    assert sorted(tmp_path.glob('pictures/*')) == sorted(files)
    names = {file.stem for file in files}
    assert {f'{image}_{name}' for image in range(2) for name in (
        'neck_mask_MaskProduct', 'neck_mask_MaskProduct_channels', 'neck_mask_masks_0_BoxForeground',
        'neck_mask_masks_1_ChannelAttention_channels', 'fgd_foreground_BoxForeground', 'fgd_background_BoxBackground',
        'fgd_attention_student', 'fgd_attention_student_channels', 'fgd_attention_teacher',
        'fgd_attention_teacher_channels', 'neck_attention_student', 'neck_attention_teacher')} == names
    for file in files:
        with Image.open(file) as picture:
            assert np.ptp(np.asarray(picture.convert('RGB'))) > 100


def test_without_features_there_is_no_picture_and_no_folder(faster_rcnn, distiller, batch, tmp_path):
    model = distiller(faster_rcnn(), faster_rcnn(neck=12), distill=dict(regions=TERMS['regions'])).train()
    assert draw_step(model, observe_step(model, batch()), tmp_path / 'pictures') == []
    assert not (tmp_path / 'pictures').exists()


@pytest.mark.parametrize('preprocessor', [dict(bgr_to_rgb=True), dict(bgr_to_rgb=False), dict(mean=None, std=None)])
def test_images_are_restored(preprocessor, retinanet, batch):
    settings = {**retinanet()['data_preprocessor'], 'bgr_to_rgb': False, **preprocessor}
    preprocessor, data = MODELS.build(settings), batch()
    inputs = preprocessor(copy.deepcopy(data), True)['inputs']
    for image, expected in zip(restore_images(inputs.float(), preprocessor), data['inputs']):
        assert np.array_equal(image, expected.flip(0).permute(1, 2, 0).numpy())


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_images_of_any_channels_are_shown_in_colour(channels):
    preprocessor = MODELS.build(dict(type='DetDataPreprocessor', mean=[110.0], std=[58.0]))
    image = torch.randint(256, (channels, 32, 48), dtype=torch.uint8)
    shown, = restore_images(preprocessor(dict(inputs=[image], data_samples=None))['inputs'], preprocessor)
    of_image = image[:3].flip(0) if channels > 2 else image[:1].expand(3, -1, -1)
    assert shown.shape == (32, 48, 3) and np.array_equal(shown, of_image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize('low, high', [(0.0, 1.0), (-2.5, 2.5), (0.0, 4095.0)])
def test_what_is_no_colour_is_stretched(low, high):
    image = torch.rand(1, 4, 32, 48) * (high - low) + low
    shown, = restore_images(image, MODELS.build(dict(type='DetDataPreprocessor')))
    assert shown.min() < 5 and shown.max() > 250 and 100 < shown.mean() < 155


def test_a_step_on_gray_images_is_drawn(retinanet, distiller, batch, tmp_path):
    gray = retinanet()
    gray.data_preprocessor, gray.backbone.in_channels = dict(type='DetDataPreprocessor', mean=[110.0], std=[58.0]), 1
    model = distiller(gray, retinanet(neck=12), distill=dict(pkd=dict(type='PKD', levels=1))).train()
    data = {key: values[:1] for key, values in batch().items()}
    data['inputs'] = [data['inputs'][0][:1]]
    assert draw_step(model, observe_step(model, data), tmp_path)


def test_an_image_is_what_the_first_transform_reads(run_config, retinanet, tmp_path):
    @TRANSFORMS.register_module(force=True)
    class LoadArray(BaseTransform):

        def transform(self, results):
            image = np.load(results['img_path'])
            return dict(results, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    config = run_config(retinanet(), val=True)
    config.val_dataloader.dataset.pipeline[0] = dict(type='LoadArray')
    np.save(tmp_path / 'x.npy', np.zeros((64, 64, 4), np.uint8))
    assert load_image(config, tmp_path / 'x.npy')['inputs'][0].shape == (4, 64, 64)
    (tmp_path / 'x.png').write_bytes(b'no array')
    with pytest.raises(ConfigurationError, match="x.png' can not be read as an image by LoadArray, the first"):
        load_image(config, tmp_path / 'x.png')


def test_first_training_batch_is_that_of_a_run(run_config, retinanet, make_runner):
    config = run_config(retinanet(), seed=3)
    config.train_dataloader.update(num_workers=2, persistent_workers=True, prefetch_factor=2)
    first, names = load_training_batch(config)
    assert config.train_dataloader.num_workers == 2 and names == ('blue', 'green', 'red')
    expected = next(iter(make_runner(retinanet(), seed=3).build_dataloader(dict(
        config.train_dataloader, num_workers=0, persistent_workers=False, prefetch_factor=None), seed=3)))
    assert [sample.img_id for sample in first['data_samples']] == [sample.img_id for sample in expected['data_samples']]
    assert all(len(sample.gt_instances) for sample in first['data_samples'])


def test_an_image_has_no_boxes_and_is_prepared_as_for_validation(run_config, retinanet, distiller, coco_folder):
    config = run_config(retinanet(), val=True)
    config.val_dataloader.dataset.pipeline[2].scale = (96, 96)
    data = load_image(config, coco_folder / '0.png')
    assert data['inputs'][0].shape == (3, 96, 96) and not len(data['data_samples'][0].gt_instances)
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(fgd=TERMS['fgd'])).train()
    step = observe_step(model, data)
    assert step.observation.values['fgd']['foreground'] == 0 < step.observation.values['fgd']['background']
    assert 'there are no boxes' in describe_step(model, step).tabulate_terms().caption


def test_a_step_whose_boxes_come_from_a_file(run_config, retinanet, coco_folder, tmp_path):
    """The first training batch brings them; with no term to look at the task remains."""
    (tmp_path / 'found.json').write_text(json.dumps([
        dict(image_id=index, category_id=1, bbox=[30, 30, 30, 30], score=0.9) for index in range(8)]))
    config = run_config(dict(type='DetectionDistiller', student=retinanet(), distill={}, pseudo_labels=dict(
        mode='replace'), teacher=dict(type='Detections', file=str(tmp_path / 'found.json'))), val=True)
    model = MODELS.build(config.model).train()
    batch, names = load_training_batch(config, model)
    model.match_classes(names)
    step = observe_step(model, batch)
    assert [len(boxes) for boxes in step.observation.context.boxes] == [1] * 4 and not step.norms
    assert describe_step(model, step).has_boxes
    step = observe_step(MODELS.build(config.model).train(), load_image(config, coco_folder / '0.png'))
    assert [len(boxes) for boxes in step.observation.context.boxes] == [0]


@pytest.mark.parametrize('content, error, said', [
    (None, FileNotFoundError, "no image '.*x.png'"), (b'no image', ConfigurationError, "x.png' can not be read")])
def test_what_is_no_image_is_named(content, error, said, run_config, retinanet, tmp_path):
    if content:
        (tmp_path / 'x.png').write_bytes(content)
    with pytest.raises(error, match=said):
        load_image(run_config(retinanet(), val=True), tmp_path / 'x.png')


def test_an_image_needs_a_pipeline():
    with pytest.raises(ConfigurationError, match='no val_dataloader'):
        load_image(Config(dict(train_dataloader={})), 'x.png')


def test_of_several_teachers_the_table_says_which(retinanet, distiller, batch):
    teachers = [dict(config=retinanet(neck=width), random_teacher=True) for width in (12, 16)]
    terms = dict(a=dict(type='PKD'), b=dict(type='PKD', teacher=1))
    model = distiller(retinanet(), None, teacher=teachers, distill=terms).train()
    paired = {row[3]: row[4] for row in describe_step(model, observe_step(model, batch())).tabulate_taps().rows}
    assert paired['teacher 0: neck[0]'].startswith('2 × 12') and paired['teacher 1: neck[0]'].startswith('2 × 16')


def test_what_a_policy_chooses_between_is_told(retinanet, distiller, batch):
    terms = {f'pkd_{index}': dict(type='PKD', teacher=index) for index in range(2)}
    teachers = [dict(config=retinanet(), random_teacher=True)] * 2
    model = distiller(retinanet(), None, teacher=teachers, distill=terms, policy=dict(type='Random')).train()
    inspection = describe_step(model, observe_step(model, batch()))
    assert list(inspection.terms) == list(terms)  # the policy would let one of them wait
    assert 'the policy weighs guide0 (pkd_0), guide1 (pkd_1)' in inspection.tabulate_terms().caption
    assert inspection.to_dict()['arms'] == dict(guide0=['pkd_0'], guide1=['pkd_1'])


def test_levels_add_up_to_their_terms(observed):
    inspection = describe_step(*observed)
    assert {name: len(term.levels) for name, term in inspection.terms.items()} == dict(
        neck=5, fgd=2, regions=0, proposals=5)  # a RoI head has no levels
    for name in ('neck', 'fgd', 'proposals'):
        term = inspection.terms[name]
        for part, value in term.parts.items():
            assert sum(level.parts[part] for level in term.levels) == pytest.approx(value, rel=1e-4)
    first, second = inspection.terms['fgd'].levels
    assert (first.name, first.stride, second.name, second.stride) == ('neck[0]', 4, 'neck[1]', 8)
    assert first.student_shape == first.teacher_shape == (2, 12, 16, 24)  # after the adapter: the teacher's channels
    assert [level.stride for level in inspection.terms['proposals'].levels] == [4, 8, 16, 32, 64]


def test_the_mass_of_a_mask_is_the_sum_of_its_weights_over_an_image(observed):
    """Of 16 x 24 cells of stride 4 the second image, 40 x 64 pixels, covers 10 x 16."""
    model, step = observed
    level = describe_step(model, step).terms['fgd'].levels[0]
    assert level.cells == (16 * 24 + 10 * 16) / 2
    boxes = step.observation.context.boxes
    assert level.masks['foreground_BoxForeground'] == pytest.approx(
        model.terms['fgd'].foreground.cells(step.comparisons['fgd'][0].level).sum().item() / len(boxes))
    assert 0 < level.masks['foreground_BoxForeground'] <= max(map(len, boxes))  # each box weighs 1, overlaps less
    product = describe_step(model, step).terms['neck'].levels[0].masks
    assert 0 < product['mask_MaskProduct'] == pytest.approx(  # the channels' attention is 1 on average
        product['mask_masks_0_BoxForeground'], rel=1e-4)


def test_a_row_of_the_table_of_levels_has_shape_parts_and_masks(observed):
    rows = describe_step(*observed).tabulate_levels().rows
    term, level, stride, shape, value, parts, masks = next(row for row in rows if row[0] == 'fgd')
    assert (term, level, stride, shape) == ('fgd', 'neck[0]', '4', '2 × 12 × 16 × 24')
    assert [part.split()[0] for part in parts.split(', ')] == ['foreground', 'background', 'attention', 'relation']
    assert sum(float(part.split()[1]) for part in parts.split(', ')) == pytest.approx(float(value), rel=1e-2)
    assert masks.startswith('foreground_BoxForeground ') and masks.endswith(' of 272')
    proposals = next(row for row in rows if row[0] == 'proposals')
    assert proposals[1] == 'rpn_head[0]' and proposals[3] == '2 × 768 × 1'  # two anchors a cell


def test_an_inspection_is_json_and_a_page_of_a_notebook(observed, tmp_path):
    import json
    model, step = observed
    inspection = describe_step(model, step, draw_step(model, step, tmp_path))
    held = json.loads(json.dumps(inspection.to_dict()))
    assert held['terms']['fgd']['levels'][1]['stride'] == 8 and len(held['pictures']) == len(inspection.pictures)
    assert held['taps'][0]['read_by'] == ['neck', 'fgd'] and held['task_loss'] == step.task.item()
    html = inspection._repr_html_()
    assert html.count('<table>') == 3 and '<td style="text-align: left">neck[0]</td>' in html
    assert html.count('<img ') == sum(file.name.startswith('0_') for file in inspection.pictures) > 0
    assert 'the student&#x27;s own loss' in html
