"""FidelityMetric on slim detectors: a student that is its teacher, one that is not, and cases done by hand."""
import pytest
import torch
from mmengine.structures import InstanceData

from kd_det.evaluation import FidelityMetric
from kd_det.evaluation.distributions import speaking_priors


@pytest.fixture
def saved(tmp_path):
    """Draws a detector, with scores that differ from cell to cell, and saves its weights."""
    from mmdet.registry import MODELS

    def save(model, seed=0):
        torch.manual_seed(seed)
        detector = MODELS.build(model).eval()
        for name, weight in detector.named_parameters():
            if 'bias' in name and ('cls' in name):
                torch.nn.init.uniform_(weight, -1, 1)
        file = tmp_path / f'{seed}.pth'
        torch.save(dict(state_dict=detector.state_dict()), file)
        return detector, dict(config=model, checkpoint=str(file))

    return save


def measure(metric, detector, data):
    with torch.no_grad():
        outputs = detector.val_step(data)
    metric.process(data, [output.to_dict() for output in outputs])
    return {name.split('/')[-1]: value for name, value in metric.evaluate(len(outputs)).items()}


@pytest.fixture(params=['retinanet', 'faster_rcnn'])
def model(request):
    made = request.getfixturevalue(request.param)()
    test_cfg = made.test_cfg.rcnn if request.param == 'faster_rcnn' else made.test_cfg
    test_cfg.score_thr = 0.05
    return made


def test_a_student_that_is_its_teacher(model, saved, batch):
    detector, teacher = saved(model)
    metric = FidelityMetric(teacher, confidence=0.2)
    metric.attach(detector)
    found = measure(metric, detector, batch())
    for name in ('found', 'copied_errors', 'agreement', 'teacher_iou'):
        assert found[name] == pytest.approx(1, abs=1e-4), name
    assert found['class_kl'] == pytest.approx(0, abs=1e-4)
    assert found['student_ece'] == pytest.approx(found['teacher_ece'], abs=1e-4)
    strides = [int(name[len('cka_'):]) for name in found if name.startswith('cka_')]
    assert len(strides) == 5 and found[f'cka_{strides[0]}'] == pytest.approx(1, abs=1e-5)
    assert metric.similarity == {}  # the next evaluation begins anew


def test_a_student_that_is_another(model, saved, batch):
    _, teacher = saved(model)
    detector, _ = saved(model, seed=1)
    metric = FidelityMetric(teacher, confidence=0.2)
    metric.attach(detector)
    found = measure(metric, detector, batch())
    assert found['found'] < 1 and found['class_kl'] > 1e-3
    assert all(value < 0.999 for name, value in found.items() if name in ('cka_4', 'cka_8'))


def test_without_modules_detections_alone_are_compared(model, saved, batch):
    detector, teacher = saved(model)
    found = measure(FidelityMetric(teacher, confidence=0.2), detector, batch())
    assert found['found'] == pytest.approx(1) and found['teacher_iou'] == pytest.approx(1, abs=1e-4)
    assert not any(name.startswith('cka') or name == 'class_kl' for name in found)


def test_numbers_by_hand(instances):
    """The teacher is sure of two right and two wrong boxes. The student has one of each, and one in another class."""
    metric = FidelityMetric(dict(config=dict(type='none')), confidence=0.5, bins=1, calibrated_from=0.5)
    metric._cka = {}
    sample = dict(scale_factor=(2.0, 2.0),
                  pred_instances=instances([(0, .9, 0), (40, .8, 1), (20, .7, 1), (60, .1, 1)]),
                  gt_instances=dict(bboxes=instances([(0, 1., 0), (20, 1., 0)])['bboxes'], labels=torch.tensor([0, 0])))
    teacher = instances([(0, .9, 0), (20, .9, 0), (40, .9, 1), (60, .9, 1), (80, .2, 0)])
    teacher['bboxes'] = teacher['bboxes'] * 2  # in pixels of the image as it was scaled for the network
    found = metric.compute_metrics([metric._compare(sample, InstanceData(**teacher))])
    assert found['found'] == pytest.approx(2 / 4)
    assert found['teacher_errors'] == pytest.approx(2 / 4)
    assert found['copied_errors'] == pytest.approx(1 / 2)
    assert found['agreement'] == pytest.approx(2 / 3)
    assert found['teacher_iou'] == pytest.approx(1)
    assert found['teacher_ece'] == pytest.approx(0.9 - 2 / 4)
    assert found['student_ece'] == pytest.approx(0.8 - 1 / 3, abs=1e-6)


def test_numbers_without_any_box_are_left_out(instances):
    metric = FidelityMetric(dict(config=dict(type='none')))
    metric._cka = {}
    sample = dict(scale_factor=(1.0, 1.0), pred_instances=instances([]), gt_instances=instances([]))
    assert metric.compute_metrics([metric._compare(sample, InstanceData(**instances([])))]) == {}


def test_the_prior_that_speaks_fits_and_is_sure(retinanet):
    """Against a loop over all priors."""
    from mmdet.registry import MODELS
    from torchvision.ops import box_iou, clip_boxes_to_image

    from kd_det.heads import read_dense
    torch.manual_seed(0)
    head = MODELS.build(retinanet()).bbox_head.eval()
    with torch.no_grad():
        dense = read_dense(head, head([torch.randn(1, 8, size, size) for size in (8, 4, 2, 1, 1)]))
    boxes = torch.tensor([[5.0, 6.0, 40.0, 44.0], [30.0, 2.0, 62.0, 30.0]])
    chosen = speaking_priors(dense, 0, boxes, (64, 64))
    decoded = clip_boxes_to_image(torch.cat([level[0] for level in dense.boxes]), (64, 64))
    scores = torch.cat([level[0].sigmoid().amax(-1) for level in dense.logits])
    for box, prior in zip(boxes, chosen):
        products = [float(score * box_iou(box[None], each[None])) for each, score in zip(decoded, scores)]
        assert products[prior] == pytest.approx(max(products), rel=1e-6)


def test_as_an_evaluator_of_a_run_beside_coco_metric(run_config, retinanet, saved, coco_folder):
    from mmengine.runner import Runner
    _, teacher = saved(retinanet())
    config = run_config(retinanet(), epochs=1, val=True, custom_hooks=[dict(type='FidelityHook')])
    config.val_evaluator = [config.val_evaluator, dict(type='FidelityMetric', teacher=teacher, confidence=0.01)]
    metrics = Runner.from_cfg(config).val()
    assert {'fidelity/teacher_errors', 'fidelity/class_kl', 'fidelity/cka_8'} <= set(metrics)
