"""FidelityMetric on slim detectors: a student that is its teacher, one that is not, and cases done by hand."""
import pytest
import torch
from mmengine.structures import InstanceData

from kd_det.functional.fidelity import moments
from kd_det.study.distributions import select_priors
from kd_det.study.fidelity import FidelityMetric


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


@pytest.fixture
def by_hand(instances):
    """Compares one image, given as rows of x, score and label, with a metric for which 0.5 is confident."""

    def compare(teacher, student, truth, ignored=(), scale=1.0):
        metric = FidelityMetric(dict(config=dict(type='none')), confidence=0.5, bins=1, calibrated_from=0.5)
        metric._cka = {}
        truth, ignored = (instances([(x, 1.0, label) for x, label in rows]) for rows in (truth, ignored))
        sample = dict(scale_factor=(scale, scale), pred_instances=instances(student), gt_instances=truth,
                      ignored_instances=ignored)
        teacher = instances(teacher)
        teacher['bboxes'] = teacher['bboxes'] * scale  # in pixels of the image as it was scaled for the network
        return metric.compute_metrics([metric._compare(sample, InstanceData(**teacher))])

    return compare


def test_numbers_by_hand(by_hand):
    """The teacher is sure of two right and two wrong boxes. The student has one of each, and one in another class."""
    found = by_hand(teacher=[(0, .9, 0), (20, .9, 0), (40, .9, 1), (60, .9, 1), (80, .2, 0)],
                    student=[(0, .9, 0), (40, .8, 1), (20, .7, 1), (60, .1, 1)], truth=[(0, 0), (20, 0)], scale=2.0)
    assert found['found'] == pytest.approx(2 / 4)
    assert found['teacher_errors'] == pytest.approx(2 / 4)
    assert found['copied_errors'] == pytest.approx(1 / 2)
    assert found['agreement'] == pytest.approx(2 / 3)
    assert found['teacher_iou'] == pytest.approx(1)
    assert found['teacher_ece'] == pytest.approx(0.9 - 2 / 4)
    assert found['student_ece'] == pytest.approx(0.8 - 1 / 3, abs=1e-6)


def test_a_box_of_another_class_that_fits_better_hides_nothing(by_hand):
    found = by_hand(teacher=[(0, .9, 0)], student=[(1, .9, 0), (0, .6, 1)], truth=[(0, 0)])
    assert found['found'] == found['agreement'] == 1
    assert found['teacher_iou'] == pytest.approx(9 / 11)


def test_at_one_place_the_surest_classes_are_compared(by_hand):
    """Both say 0 before 1, in boxes that are swapped by a pixel; then the student says 1 before 0."""
    teacher = [(0, .8, 0), (1, .6, 1)]
    alike = by_hand(teacher, student=[(1, .7, 0), (0, .6, 1)], truth=[])
    assert alike['found'] == alike['agreement'] == 1
    unlike = by_hand(teacher, student=[(0, .6, 0), (1, .7, 1)], truth=[])
    assert unlike['found'] == 1 and unlike['agreement'] == 0


def test_pairs_are_one_to_one(by_hand):
    found = by_hand(teacher=[(0, .9, 0), (1, .8, 0)], student=[(0, .9, 0)], truth=[])
    assert found['found'] == 1 / 2 and found['teacher_iou'] == 1


def test_a_duplicate_of_a_right_box_is_no_error(by_hand):
    """Errors are the box at 20, on nothing, and that of class 1 on the object. The duplicate calibrates, as in COCO."""
    found = by_hand(teacher=[(0, .9, 0), (1, .7, 0), (20, .6, 0), (0, .6, 1)], student=[(20, .9, 0)], truth=[(0, 0)])
    assert found['teacher_errors'] == 2 / 4
    assert found['copied_errors'] == 1 / 2
    assert found['teacher_ece'] == pytest.approx((.9 + .7 + .6 + .6) / 4 - 1 / 4)


def test_boxes_on_ignored_regions_are_not_judged(by_hand):
    """Half the box at 45 lies on the crowd of class 0 at 40, a fifth of that at 48; the class of that at 41 differs."""
    teacher = [(0, .9, 0), (45, .8, 0), (48, .6, 0), (41, .6, 1)]
    found = by_hand(teacher, student=[(0, .7, 0), (40, .9, 0)], truth=[(0, 0)], ignored=[(40, 0)])
    assert found['teacher_errors'] == 2 / 4
    assert found['copied_errors'] == 0
    assert found['teacher_ece'] == pytest.approx((.9 + .6 + .6) / 3 - 1 / 3)
    assert found['student_ece'] == pytest.approx(1 - .7)
    assert found['found'] == 1 / 4  # whatever it lies on


def test_a_right_box_on_a_crowd_is_right(by_hand):
    found = by_hand(teacher=[(0, .9, 0)], student=[(0, .8, 0)], truth=[(0, 0)], ignored=[(0, 0)])
    assert found['teacher_ece'] == pytest.approx(1 - .9) and found['teacher_errors'] == 0


def test_features_that_do_not_vary_have_no_cka(instances):
    metric = FidelityMetric(dict(config=dict(type='none')))
    varied = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    metric.similarity = {8: moments(varied, varied), 16: moments(varied, torch.full((50, 3), 0.1))}
    sample = dict(scale_factor=(1.0, 1.0), pred_instances=instances([]), gt_instances=instances([]))
    metric.results.append(metric._compare(sample, InstanceData(**instances([]))))
    assert metric.evaluate(1) == {'fidelity/cka_8': pytest.approx(1)}


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
    chosen = select_priors(dense, 0, boxes, (64, 64))
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
