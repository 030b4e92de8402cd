"""Detectors within others: semi-supervised pairs, trackers, MMDetection's own distillations."""
import copy
import re

import pytest
import torch
from mmengine.config import Config, ConfigDict

from kd_det.checks.doctor import check_config
from kd_det.checks.environment import DiagnosisError
from kd_det.config.composition import distillation_config
from kd_det.config.detectors import check_student, extract_plain_detector, find_detector, find_inner_detectors
from kd_det.config.files import ConfigurationError, get_type_name, load_config
from kd_det.registry import build_detector
from kd_det.teachers import TeacherError, read_model_config
from kd_det.teachers.loading import remove_pretrained

TEACHER = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'


def semi(detector: dict, **changes) -> dict:
    return ConfigDict(type='SoftTeacher', detector=detector, data_preprocessor=dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor), **changes)


def tracker(detector: dict, **changes) -> dict:
    """As MMDetection's: the preprocessor is that of videos, the detector has none; it stands beside another network."""
    detector = copy.deepcopy(detector)
    preprocessor = dict(detector.pop('data_preprocessor'), type='TrackDataPreprocessor', use_det_processor=True)
    return ConfigDict(type='DeepSORT', detector=detector, data_preprocessor=preprocessor, reid=dict(
        type='BaseReID', backbone=dict(type='ResNet', depth=18), head=dict(type='LinearReIDHead')), **changes)


def augmented(detector: dict) -> dict:
    return ConfigDict(type='DetTTAModel', module=detector, tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5)))


def distilled_by_mmdetection(gfl: dict) -> dict:
    head = dict(gfl.bbox_head, type='LDHead', loss_ld=dict(type='KnowledgeDistillationKLDivLoss', T=10))
    return ConfigDict({**gfl, 'type': 'KnowledgeDistillationSingleStageDetector', 'bbox_head': head,
                       'teacher_config': 'nowhere.py', 'teacher_ckpt': 'nowhere.pth', 'eval_teacher': True})


@pytest.mark.parametrize('name, detector, head', [
    ('soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py', 'FasterRCNN', 'roi_head'),
    ('qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py', 'FasterRCNN', 'roi_head'),
    ('ocsort/ocsort_yolox_x_8xb4-amp-80e_crowdhuman-mot20train_test-mot20test.py', 'YOLOX', 'bbox_head'),
    ('masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py', 'MaskRCNN', 'roi_head'),
    ('ld/ld_r18-gflv1-r101_fpn_1x_coco.py', 'SingleStageDetector', 'bbox_head'),
    ('lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py', 'SingleStageDetector', 'bbox_head'),
])
def test_of_mmdetections_own_configs_the_detector_teaches(name, detector, head):
    model = read_model_config(f'mmdet::{name}')
    assert get_type_name(model) == detector and head in model
    outer = load_config(f'mmdet::{name}').model
    built = build_detector(remove_pretrained(model))
    expected = outer.data_preprocessor.get('data_preprocessor', outer.data_preprocessor)
    assert type(built.data_preprocessor).__name__ == 'DetDataPreprocessor'
    if expected.get('mean'):
        assert built.data_preprocessor.mean.flatten().tolist() == pytest.approx(expected.mean)
    assert not any(key.startswith('teacher') for key in built.state_dict())


@pytest.mark.parametrize('wrap, path', [(semi, 'detector'), (tracker, 'detector'), (augmented, 'module'),
                                        (lambda model: augmented(semi(model)), 'module.detector')])
def test_the_detector_within_is_found(wrap, path, faster_rcnn):
    model = faster_rcnn()
    outer = wrap(model)
    before = outer.to_dict()
    (inner, ) = find_inner_detectors(outer)
    assert inner.path == path and outer.to_dict() == before
    found = find_detector(outer, 'x')
    assert {**found, 'data_preprocessor': None} == {**model, 'data_preprocessor': None}
    built, expected = build_detector(found).data_preprocessor, build_detector(model).data_preprocessor
    assert torch.equal(built.mean, expected.mean) and built.pad_size_divisor == expected.pad_size_divisor
    with pytest.raises(ConfigurationError, match=rf'model.student \({outer.type}\) is no detector itself, but holds '
                       rf"model.{path} \(FasterRCNN\). Put its part '{path}' in its place."):
        check_student(outer, 'model.student')


def test_a_detector_holds_none(faster_rcnn, retinanet, detr):
    for model in (faster_rcnn(), retinanet(), detr('DINO'), dict(type='SOLO', mask_head=dict(type='SOLOHead'))):
        assert not list(find_inner_detectors(model)) and extract_plain_detector(model) is model
        check_student(model, 'x')


def test_several_detectors_within_are_named(faster_rcnn, retinanet):
    outer = dict(type='Pair', architecture=retinanet(), teacher=faster_rcnn())
    with pytest.raises(ConfigurationError, match=r'\(Pair\) holds several detectors: model.architecture \(RetinaNet\) '
                       r'and model.teacher \(FasterRCNN\)'):
        read_model_config(dict(model=outer))
    with pytest.raises(TeacherError, match='holds no model'):
        read_model_config(dict(model=None))


@pytest.mark.parametrize('wrap', [semi, tracker, lambda model: augmented(tracker(model))])
def test_the_lines_that_the_error_names_make_a_student(wrap, faster_rcnn, run_config, tmp_path):
    config = run_config(wrap(faster_rcnn()))
    config.dump(tmp_path / 'wrapped.py')
    with pytest.raises(ConfigurationError) as error:
        distillation_config(str(tmp_path / 'wrapped.py'), TEACHER, 'x.pth', 'fgd')
    lines = re.findall(r'^  (.*)$', str(error.value), re.MULTILINE)
    assert len(lines) == 2
    (tmp_path / 'mine.py').write_text('\n'.join(lines))
    made = distillation_config(str(tmp_path / 'mine.py'), TEACHER, 'x.pth', 'fgd')
    assert made.model.student.type == 'FasterRCNN'
    built, expected = build_detector(made.model.student), build_detector(faster_rcnn())
    assert built.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(built.data_preprocessor.mean, expected.data_preprocessor.mean)


@pytest.mark.parametrize('file, remedy', [(None, "Put its part 'detector' in its place."), ('gone.py', "'./gone.py'")])
def test_a_config_that_is_in_no_file_is_refused_alike(file, remedy, faster_rcnn):
    config = Config(dict(model=semi(faster_rcnn())), cfg_text=' ', filename=file)
    with pytest.raises(ConfigurationError, match=re.escape(remedy)):
        distillation_config(config, TEACHER, 'x.pth', 'fgd')


def test_the_lines_for_a_pure_python_config(retinanet, tmp_path):
    (tmp_path / 'wrapped.py').write_text(
        'from mmengine.config import read_base\nfrom mmdet.models import SoftTeacher\n'
        f'model = dict(type=SoftTeacher, detector={retinanet().to_dict()})\n')
    with pytest.raises(ConfigurationError) as error:
        distillation_config(str(tmp_path / 'wrapped.py'), TEACHER, 'x.pth', 'fgd')
    (tmp_path / 'mine.py').write_text('\n'.join(
        line[2:] for line in str(error.value).splitlines() if line.startswith('  ')))
    assert distillation_config(str(tmp_path / 'mine.py'), TEACHER, 'x.pth', 'fgd').model.student.type == 'RetinaNet'


def test_before_a_run_a_student_that_holds_a_detector_is_a_fault(faster_rcnn, retinanet, run_config, tmp_path):
    """As it may stand in a config that kd-det distill did not write."""
    config = run_config(dict(type='DetectionDistiller', student=semi(faster_rcnn()), distill={},
                             teacher=dict(config=retinanet(), random_teacher=True)))
    with pytest.raises(DiagnosisError, match=r'student: model.student \(SoftTeacher\) is no detector itself'):
        check_config(config, splits=('train', ))
    with pytest.raises(ConfigurationError, match=r'model.student \(SoftTeacher\) is no detector itself'):
        build_detector(config.model)


def test_of_mmdetections_own_distillation_the_plain_detector_is_the_student(one_stage, run_config, batch):
    gfl = one_stage('gfl')
    ld = distilled_by_mmdetection(gfl)
    before = ld.to_dict()
    config = distillation_config(run_config(ld), TEACHER, 'x.pth', 'ld')
    student = config.model.student
    assert ld.to_dict() == before
    assert (student.type, student.bbox_head.type) == ('mmdet.SingleStageDetector', 'mmdet.GFLHead')
    assert {**student, 'type': 0, 'bbox_head': 0} == {**gfl, 'type': 0, 'bbox_head': 0}
    assert {**student.bbox_head, 'type': 0} == {**gfl.bbox_head, 'type': 0}
    for model in (student, ld):  # written, and in a config by hand
        distiller = build_detector(dict(config.model, student=model, inherit=(),
                                        teacher=dict(config=one_stage('gfl'), random_teacher=True)))
        assert distiller.state_dict().keys() == build_detector(gfl).state_dict().keys()
    distiller.build_teachers()
    assert 'loss_ld' in distiller.loss(**distiller.data_preprocessor(batch(), True))


def test_a_users_own_distilled_head_gives_way_to_the_one_that_learns_from_boxes(one_stage):
    from mmdet.models import LDHead

    class OwnHead(LDHead):

        def __init__(self, *args, sharpness: float = 1.0, **kwargs) -> None:
            super().__init__(*args, **kwargs)

    ld = distilled_by_mmdetection(one_stage('gfl'))
    ld.bbox_head.update(type=OwnHead, sharpness=2.0)
    plain = extract_plain_detector(ld)
    assert plain.bbox_head.type == 'mmdet.GFLHead' and not {'sharpness', 'loss_ld'} & set(plain.bbox_head)
    build_detector(plain)


def test_inner_detectors_keep_their_scope(faster_rcnn):
    (inner, ) = find_inner_detectors(dict(semi(faster_rcnn()), _scope_='mmdet'))
    assert inner.model._scope_ == 'mmdet'
    config = Config(dict(default_scope='mmdet', model=semi(faster_rcnn())))
    assert read_model_config(config.to_dict())._scope_ == 'mmdet'
