"""A teacher's boxes as ground truth: which, beside which, how often, and in whose loss."""
import copy

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from kd_det.config.files import ConfigurationError
from kd_det.context import Progress
from kd_det.distillers.supervision import PseudoLabels, read_supervision

SURE = [(0., 0., 20., 20.), (1., 0., 21., 20.), (40., 40., 60., 60.), (0., 40., 20., 60.)]


def _found(boxes=SURE, scores=(0.9, 0.8, 0.7, 0.3), labels=(0, 0, 1, 2)) -> InstanceData:
    return InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), scores=torch.tensor(scores),
                        labels=torch.tensor(labels, dtype=torch.long))


def _sample(boxes=(), labels=(), **metainfo) -> DetDataSample:
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), **metainfo))
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4),
                                       labels=torch.tensor(labels, dtype=torch.long))
    return sample


def _labels(supervision):
    return [each.tolist() for each in supervision.labels]


def test_confident_boxes_without_their_doubles():
    pseudo_labels, nothing = PseudoLabels(), torch.zeros(0, 4)
    assert pseudo_labels.select_confident(_found(), nothing).scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(PseudoLabels(nms_iou=0.95).select_confident(_found(), nothing)) == 3
    assert len(pseudo_labels.select_confident(_found(labels=(0, 1, 1, 2)), nothing)) == 3  # doubles are of one class
    assert len(PseudoLabels(score=0.2).select_confident(_found(), nothing)) == 3
    assert len(pseudo_labels.select_confident(_found()[:0], nothing)) == 0
    flat = [(0., 0., 20., 20.), (64., 10., 64., 30.), (30., 30., 30.5, 50.), (40., 40., 60., 60.)]  # as heads clip them
    assert pseudo_labels.select_confident(_found(flat, (0.9, 0.9, 0.9, 0.9)), nothing).labels.tolist() == [0, 2]


def test_the_ground_truth_is_right_where_it_is():
    truth = torch.tensor([[38., 40., 60., 60.]])
    assert PseudoLabels().select_confident(_found(), truth).labels.tolist() == [0]
    assert PseudoLabels(iou=0.95).select_confident(_found(), truth).labels.tolist() == [0, 1]


def test_modes_and_images():
    people = [(38., 40., 60., 60.)]
    samples = [_sample(people, [2]), _sample(unlabelled=True), _sample(unlabelled=True)]
    before = copy.deepcopy(samples)
    found = [_found(), _found(), _found()[:0]]
    known = read_supervision(samples)
    assert known.labelled == (True, False, False)

    def joined(**options):
        return PseudoLabels(**options)(known, found, Progress())

    supervision = joined()
    assert _labels(supervision) == [[2, 0], [0, 1], []] and supervision.labelled == (True, True, False)
    assert supervision.boxes[0].tolist() == [list(people[0]), list(SURE[0])]
    assert supervision.log['distill/pseudo_boxes'] == 1
    supervision = joined(mode='replace')
    assert _labels(supervision) == [[0, 1], [0, 1], []] and supervision.labelled == (True, True, False)
    supervision = joined(images='unlabelled')
    assert _labels(supervision) == [[2], [0, 1], []] and supervision.labelled == (True, True, False)
    # An image of which a person told something is not known in mode 'replace' if the teacher is not sure of anything.
    supervision = joined(mode='replace', score=0.95)
    assert _labels(supervision) == [[], [], []] and supervision.labelled == (False, False, False)
    for sample, copied in zip(samples, before):  # the loader's objects are as they were
        assert torch.equal(sample.gt_instances.bboxes, copied.gt_instances.bboxes) and len(sample.gt_instances) <= 1


@pytest.mark.parametrize('weight, expected', [('score', (0.9, 0.7)), (0.25, (0.25, 0.25))])
def test_a_box_counts_as_often_as_it_weighs(weight, expected):
    pseudo_labels, counts = PseudoLabels(weight=weight), torch.zeros(2)
    torch.manual_seed(0)
    for _ in range(600):
        supervision = pseudo_labels(read_supervision([_sample(unlabelled=True)]), [_found()], Progress())
        assert supervision.labelled == (True, )  # the draw does not decide whether the image is known
        counts[supervision.labels[0]] += 1
    assert counts.div(600).tolist() == pytest.approx(expected, abs=0.06)


def test_a_weight_of_one_draws_nothing():
    state = torch.get_rng_state()
    PseudoLabels()(read_supervision([_sample()]), [_found()], Progress())
    assert torch.equal(torch.get_rng_state(), state)


def test_when_the_teacher_detects():
    labelled, partly = read_supervision([_sample()]), read_supervision([_sample(), _sample(unlabelled=True)])
    scheduled = PseudoLabels(weight=dict(type='Stop', value=1.0, epochs=2))
    assert scheduled.is_due(labelled, Progress(0, 0.0)) and not scheduled.is_due(labelled, Progress(9, 2.0))
    assert not PseudoLabels(images='unlabelled').is_due(labelled, Progress())
    assert PseudoLabels(images='unlabelled').is_due(partly, Progress())


@pytest.mark.parametrize('arguments, message', [
    (dict(mode='add'), "mode: expected one of join, replace, got 'add'"), (dict(images='some'), 'all, unlabelled'),
    (dict(score=5), 'score: expected a number from 0 to 1, got 5'),
    (dict(weight=2.0), 'weight: expected score, a number from 0 to 1'), (dict(weight='area'), "weight: .*, got 'area'"),
    (dict(weight=dict(type='Balance')), 'weight: expected score'), (dict(teacher=1), 'teacher: expected .*below 1'),
    (dict(threshold=1), r'model\.pseudo_labels\.threshold: there is no such key')])
def test_mistakes_in_the_config(retinanet, distiller, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        distiller(retinanet(), retinanet(), distill={}, pseudo_labels=arguments)


def test_a_sharded_teacher_is_asked_on_all_ranks_or_on_none(retinanet, distiller):
    teacher = dict(config=retinanet(), random_teacher=True, shard=True)
    with pytest.raises(ConfigurationError, match="images='unlabelled' asks the teacher on those ranks alone"):
        distiller(retinanet(), None, teacher=teacher, distill={}, pseudo_labels=dict(images='unlabelled'))
    assert not distiller(retinanet(), None, teacher=teacher, distill={}, pseudo_labels={}).pseudo_labels.only_unlabelled


def test_a_teacher_that_is_asked_by_words_is_refused(retinanet, distiller):
    teacher = dict(retinanet(), type='GroundingDINO', language_model=dict(type='BertModel'))
    with pytest.raises(ConfigurationError, match=r"a GroundingDINO, is asked by words.*dict\(type='Detections'"):
        distiller(retinanet(), teacher, distill={}, pseudo_labels={})
    distiller(retinanet(), teacher, distill={})


def test_boxes_of_a_file_are_for_pseudo_labels(retinanet, distiller):
    """A term that reads them, and a file that nothing reads, are refused before anything is loaded."""
    file = dict(type='Detections', file='found.json')
    with pytest.raises(ConfigurationError, match='model.distill.fgd: .*a Detections puts out none'):
        distiller(retinanet(), None, teacher=file, pseudo_labels={})
    for options in (dict(teacher=file), dict(teacher=[dict(file, file='other.json'), file], pseudo_labels={})):
        with pytest.raises(ConfigurationError, match="Nothing learns from the boxes of 'found.json': .*teacher="):
            distiller(retinanet(), None, distill={}, **options)


def test_masks_have_no_pseudo_labels(faster_rcnn, distiller):
    student = faster_rcnn()
    student.roi_head.update(
        mask_roi_extractor=student.roi_head.bbox_roi_extractor,
        mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3))
    student.train_cfg.rcnn.mask_size = 6
    with pytest.raises(ConfigurationError, match='learns the masks of its boxes, and pseudo-labels have none'):
        distiller(dict(student, type='MaskRCNN'), faster_rcnn(), distill={}, pseudo_labels={})


def _step(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    torch.manual_seed(0)
    return model.loss(**data), data


@pytest.fixture
def teaching(retinanet, distiller, batch):
    """A distiller whose teacher finds one box in the second image alone, and the batch with and without that box."""

    def make(**changes):
        model = distiller(retinanet(), retinanet(neck=12), pseudo_labels=dict(), distill=dict(
            fgd=dict(type='FeatureImitation', mask='BoxForeground')), **changes).eval()
        teacher = model.build_teachers()[0]
        teacher.detect = lambda images, samples: [_found([], [], [])[:0], _found([(4., 4., 30., 30.)], [0.9], [2])]
        some, all_boxes = batch(), batch()
        truth = all_boxes['data_samples'][1].gt_instances
        all_boxes['data_samples'][1].gt_instances = InstanceData(
            bboxes=torch.cat([truth.bboxes, torch.tensor([[4., 4., 30., 30.]])]),
            labels=torch.cat([truth.labels, torch.tensor([2])]))
        return model, some, all_boxes

    return make


def test_the_students_loss_and_the_terms_see_the_joined_boxes(teaching):
    model, some, all_boxes = teaching()
    taught, _ = _step(model, some)
    model.pseudo_labels = None
    without, _ = _step(model, some)
    told, _ = _step(model, all_boxes)
    assert taught['distill/pseudo_boxes'] == 0.5 and 'distill/pseudo_boxes' not in told
    for name, loss in told.items():
        expected, actual, plain = (sum(each) if isinstance(each, list) else each
                                   for each in (loss, taught[name], without[name]))
        assert torch.equal(actual, expected) and not torch.equal(actual, plain), name


def test_the_teachers_labels_are_translated(teaching, retinanet):
    model, some, all_boxes = teaching()
    model.teachers[0].classes = ('c', 'b', 'a')
    model.match_classes(('a', 'b', 'c'))
    taught, _ = _step(model, some)
    model.pseudo_labels = None
    all_boxes['data_samples'][1].gt_instances.labels[-1] = 0
    told, _ = _step(model, all_boxes)
    assert torch.equal(sum(taught['loss_cls']), sum(told['loss_cls']))


def test_classes_that_can_not_be_translated(retinanet, distiller, batch):
    model = distiller(retinanet(), retinanet(classes=5), distill={}, pseudo_labels={})
    with pytest.raises(ConfigurationError, match='teacher tells 5 classes apart, the student 3.*teacher.classes='):
        _step(model, batch())


@pytest.mark.parametrize('family', ['retinanet', 'faster_rcnn'])
def test_a_teacher_detects_in_the_coordinates_of_the_batch(family, request, distiller, batch):
    make = request.getfixturevalue(family)
    model = distiller(make(), make(neck=12), distill={})
    data = batch(shapes=((64, 64), (40, 56)))
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    data = model.data_preprocessor(data, True)
    teacher, keys = model.build_teachers()[0], data['data_samples'][0].keys()
    found = teacher.detect(data['inputs'], data['data_samples'])
    rescaled = teacher.predict(data['inputs'], copy.deepcopy(data['data_samples']))
    for each, sample, shape in zip(found, rescaled, ((64, 64), (40, 56))):
        assert len(each) and torch.equal(each.scores, sample.pred_instances.scores)
        torch.testing.assert_close(each.bboxes * 2, sample.pred_instances.bboxes)
        assert (each.bboxes <= each.bboxes.new_tensor([shape[1], shape[0]] * 2)).all() and not each.bboxes.requires_grad
    assert data['data_samples'][0].keys() == keys  # what the loader gave has no predictions now
