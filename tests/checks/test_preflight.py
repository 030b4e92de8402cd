"""The teacher is judged before training: by its boxes, whatever evaluates the student, and by what they lie on."""
import json
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kd_det.checks.preflight import Skill, classes_on, count_votes, evaluate_teacher, require_names, wrong_names
from kd_det.config.classes import match_classes
from kd_det.config.files import ConfigurationError
from kd_det.teachers import Teacher, TeacherError

CLASSES = ('blue', 'green', 'red')


@pytest.fixture
def runner(retinanet, make_runner):
    """Makes the runner of a plain detector of the three classes."""
    return lambda **options: make_runner(retinanet(), val=True, epochs=1, **options)


@pytest.fixture
def teacher(retinanet, monkeypatch):
    """Makes a teacher that finds every box and calls the classes by other labels; ``truth`` is by an image's id."""

    def make(truth, labels=(0, 1, 2), classes=CLASSES):
        made = Teacher(retinanet(classes=len(labels)), random_teacher=True, classes=classes, taps=['neck'],
                       student_preprocessor=MODELS.build(retinanet()).data_preprocessor)

        def detect(images, samples):
            for sample in samples:
                boxes, of_boxes = truth(sample.img_id)
                sample.pred_instances = InstanceData(bboxes=boxes, labels=torch.tensor(labels)[of_boxes],
                                                     scores=torch.full((len(boxes), ), 0.9))
            return samples

        monkeypatch.setattr(made, 'predict', detect)
        return made

    return make


@pytest.fixture
def truth(coco_folder):
    annotations = json.loads((coco_folder / 'all.json').read_text())['annotations']

    def of_image(number):
        boxes = [each for each in annotations if each['image_id'] == number]
        places = torch.tensor([each['bbox'] for each in boxes], dtype=torch.float32).view(-1, 4)
        return (torch.cat([places[:, :2], places[:, :2] + places[:, 2:]], 1),
                torch.tensor([each['category_id'] - 1 for each in boxes], dtype=torch.long))

    return of_image


@pytest.mark.parametrize('evaluator', [
    dict(type='CocoMetric', metric=['bbox', 'segm']), dict(type='VOCMetric', metric='mAP'),
    [dict(type='CocoMetric', metric='segm'), dict(type='CocoMetric', metric='proposal_fast')]])
def test_boxes_are_measured_whatever_evaluates_the_student(runner, teacher, truth, evaluator, coco_folder):
    parts = evaluator if isinstance(evaluator, list) else [evaluator]
    for part in parts:
        if part['type'] == 'CocoMetric':
            part['ann_file'] = str(coco_folder / 'all.json')
    skill = evaluate_teacher(runner(val_evaluator=evaluator), teacher(truth), images=8)
    assert skill.metrics['coco/bbox_mAP'] == 1
    assert skill.votes.sum() == skill.votes.diag().sum() == 16


def test_the_first_images_that_have_boxes(runner, teacher, truth, coco_folder, tmp_path):
    content = json.loads((coco_folder / 'all.json').read_text())
    content['annotations'] = [each for each in content['annotations'] if each['image_id'] > 4]
    (tmp_path / 'late.json').write_text(json.dumps(content))
    data = {'val_dataloader.dataset.ann_file': str(tmp_path / 'late.json'), 'val_evaluator.ann_file': 'unread'}
    skill = evaluate_teacher(runner(**data), teacher(truth), images=3)
    assert skill.metrics['coco/bbox_mAP'] == 1 and skill.votes.sum() == 6
    (tmp_path / 'late.json').write_text(json.dumps(dict(content, annotations=[])))
    with pytest.raises(ConfigurationError, match='validation data has no boxes'):
        evaluate_teacher(runner(**data), teacher(truth), images=3)


@pytest.mark.parametrize('metainfo, boxes, message', [
    ({}, False, 'has no boxes: .*metainfo.*preflight=None'), ({}, True, 'does not name its classes')])
def test_validation_data_without_names_or_boxes(
        runner, teacher, truth, coco_folder, tmp_path, metainfo, boxes, message):
    image = json.loads((coco_folder / 'all.json').read_text())['images'][0]
    objects = dict(instances=[dict(bbox=[0, 0, 9, 9], bbox_label=0, ignore_flag=0)]) if boxes else {}
    listed = dict(img_path=image['file_name'], img_id=image['id'], height=64, width=64, **objects)
    (tmp_path / 'data.json').write_text(json.dumps(dict(metainfo=metainfo, data_list=[listed])))
    run = runner()
    dataset = run.cfg.val_dataloader.dataset
    dataset.type, dataset.ann_file = 'BaseDetDataset', str(tmp_path / 'data.json')
    dataset.data_prefix, dataset.metainfo = dict(img_path=''), metainfo
    with pytest.raises(ConfigurationError, match=message):
        evaluate_teacher(run, teacher(truth), images=8)


@pytest.mark.parametrize('labels, classes, renamed', [
    ((0, 1, 2), ('green', 'blue', 'red'), ['blue', 'green', 'red']),  # two names exchanged
    ((1, 2, 0), CLASSES, ['red', 'blue', 'green']),  # all labels turned
    ((1, 2, 0), None, ['red', 'blue', 'green'])])  # nothing names them
def test_names_that_the_boxes_contradict(runner, teacher, truth, labels, classes, renamed):
    made = teacher(truth, labels, classes)
    skill = evaluate_teacher(runner(), made, images=8)
    with pytest.raises(TeacherError, match='lie on objects of other classes') as error:
        require_names(skill, made)
    assert f'teacher.classes={renamed!r}' in str(error.value)
    made = teacher(truth, labels, renamed)
    skill = evaluate_teacher(runner(), made, images=8)
    require_names(skill, made)
    assert skill.metrics['coco/bbox_mAP'] == 1


def test_features_of_the_teacher_that_are_not_finite(runner, retinanet):
    made = Teacher(retinanet(), random_teacher=True, classes=CLASSES, taps=['neck'], precision='bfloat16',
                   student_preprocessor=MODELS.build(retinanet()).data_preprocessor)
    with torch.no_grad():
        made.model.neck.lateral_convs[0].conv.weight[0] = 1e38
    with pytest.raises(TeacherError, match='features of validation images are not finite, in 2 batches. Set '
                                           r"model.teacher.precision='float32': bfloat16 may overflow"):
        evaluate_teacher(runner(), made, images=8)


@pytest.mark.parametrize('teachers, place', [(1, ''), (2, 'model.teacher[1]: ')])
def test_a_run_stops_before_its_first_step_and_shows_the_confusion(teachers, place, retinanet, make_runner, teacher,
                                                                   truth, tmp_path):
    torch.save(dict(state_dict=MODELS.build(retinanet(neck=12)).state_dict(),
                    meta=dict(dataset_meta=dict(classes=CLASSES))), tmp_path / 'teacher.pth')
    of_file = dict(config=retinanet(neck=12), checkpoint=str(tmp_path / 'teacher.pth'))
    run = make_runner(dict(type='DetectionDistiller', student=retinanet(),
                           distill={f'fgd{each}': dict(type='FGD', teacher=each) for each in range(teachers)},
                           teacher=of_file if teachers == 1 else [of_file] * teachers),
                      val=True, preflight=dict(min_map=0.0))
    shifted = teacher(truth, (1, 2, 0))
    run.model.build_teachers()[-1].predict = shifted.predict
    with pytest.raises(TeacherError) as error:
        run.train()
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{place}Pre-flight: the teacher's boxes lie on") and lines[1].split() == list(CLASSES)
    rows = {line.split()[0]: list(map(int, line.split()[1:])) for line in lines[2:5]}
    assert rows['green'][0] > 0 and rows['green'][1:] == [0, 0] and sum(map(sum, rows.values())) == 16
    assert run.iter == 0


def skill_of(votes, match=None, names=None):
    votes = torch.tensor(votes)
    return Skill({}, names or tuple('abcdefgh'[:votes.shape[1]]), match, votes)


@pytest.mark.parametrize('votes', [
    [[9, 1, 0], [1, 6, 2], [0, 2, 4]],  # a teacher that is mostly right
    [[9, 8, 7], [0, 1, 0], [0, 0, 1]],  # one that takes everything for the most frequent class
    [[9, 0, 0], [0, 0, 3], [0, 2, 4]],  # buses are taken for trucks, lorries for both
    [[9, 0, 0], [0, 2, 7], [0, 0, 0]],  # few objects, and no other name is wrong
    [[0, 2, 0], [0, 0, 2], [2, 0, 0]],  # too few to tell
    [[2, 40], [0, 0]],  # what is frequent in training is rare here
    [[5, 60, 10], [0, 0, 0], [0, 0, 0]],
    [[2, 12, 0], [0, 1, 0], [0, 0, 30]],  # a class that was never learnt looks like another
    [[0, 0, 0], [0, 0, 0], [0, 0, 0]]])
def test_what_is_no_wrong_name(votes):
    assert wrong_names(skill_of(votes)) == {}


@pytest.mark.parametrize('votes, wrong', [
    ([[0, 9, 0], [7, 1, 0], [0, 0, 5]], {0: 1, 1: 0}),
    ([[0, 0, 0, 0], [8, 0, 0, 0], [1, 7, 0, 0], [0, 0, 6, 0]], {1: 0, 2: 1, 3: 2}),  # an offset by the background
    ([[0, 5, 1, 0], [0, 0, 4, 0], [0, 0, 0, 3], [0, 0, 0, 0]], {0: 1, 1: 2, 2: 3}),  # a shift by one
    ([[0, 12, 0], [0, 1, 0], [0, 0, 5]], {0: 1})])  # one alone, by many objects
def test_wrong_names(votes, wrong):
    assert wrong_names(skill_of(votes)) == wrong


def test_wrong_names_among_other_classes():
    """The data has c and a, the teacher a, b, c, d; where a and c are exchanged."""
    match = match_classes(('c', 'a'), ('a', 'b', 'c', 'd'))
    assert wrong_names(skill_of([[0, 6], [0, 0], [6, 0], [0, 0]], match, ('c', 'a'))) == {}
    assert wrong_names(skill_of([[6, 0], [0, 0], [0, 6], [0, 0]], match, ('c', 'a'))) == {0: 0, 2: 1}
    assert wrong_names(skill_of([[0, 0], [0, 6], [0, 0], [6, 0]], match, ('c', 'a'))) == {1: 1, 3: 0}  # by b and d


def test_a_class_that_the_data_does_not_have_may_lie_on_one_that_the_teacher_does_not_have():
    """The teacher knows persons and cars, the data persons and vehicles."""
    match = match_classes(('person', 'vehicle'), ('person', 'car'))
    assert wrong_names(skill_of([[5, 0], [0, 50]], match, ('person', 'vehicle'))) == {}


@pytest.mark.parametrize('classes, objects, rightly', [(20, 60, 0.), (80, 150, 0.1), (200, 64, 0.1), (365, 400, 0.15)])
def test_a_weak_teacher_of_many_classes_is_told_from_one_in_another_order(classes, objects, rightly):
    """Of many classes with few objects each, some assignment of names fits by chance."""
    generator = torch.Generator().manual_seed(classes)
    truth = torch.randint(classes, (objects, ), generator=generator)
    guessed = torch.randint(classes, (objects, ), generator=generator)
    called = truth.where(torch.rand(objects, generator=generator) < rightly, guessed)
    votes = torch.zeros(classes, classes, dtype=torch.long)
    votes.index_put_((called, truth), torch.tensor(1), accumulate=True)
    skill = skill_of(votes.tolist(), names=tuple(map(str, range(classes))))
    assert wrong_names(skill) == {}
    able = votes + torch.eye(classes, dtype=torch.long) * 3
    assert len(wrong_names(skill._replace(votes=able.roll(1, 0)))) > 0.9 * classes


def test_an_order_is_proposed_where_boxes_tell_all_of_it():
    names = tuple('abcd')
    offset = skill_of([[8, 0, 0, 0], [0, 7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
                      match_classes(names, ('background', 'a', 'b', 'c')), names)
    assert wrong_names(offset) == {0: 0, 1: 1, 2: 2}
    for made, line in ((('background', 'a', 'b', 'c'), "['a', 'b', 'c', 'd']"),
                       (('d', 'c', 'b', 'a'), "['a', 'b', 'c', 'd']")):
        with pytest.raises(TeacherError, match='lie on objects') as error:
            require_names(offset._replace(match=match_classes(names, made)), SimpleNamespace(classes=made))
        assert f'teacher.classes={line}' in str(error.value)
    random = offset._replace(votes=offset.votes[[2, 0, 3, 1]], match=match_classes(names, names))
    with pytest.raises(TeacherError, match=r'Name them by label with teacher.classes=\[…\]'):
        require_names(random, SimpleNamespace(classes=names))


def test_a_usual_order_is_told_by_an_object_or_two_of_each_class():
    """Twenty classes, the first a background that only the teacher counts, and a teacher that is right of most."""
    names = tuple('abcdefghijklmnopqrst')
    match = match_classes(names, ('background', *names[:-1]))
    votes = torch.zeros(20, 20, dtype=torch.long)
    votes[torch.arange(12), torch.arange(12)] = 1
    votes[torch.arange(5), torch.arange(5) + 6] = 1
    assert wrong_names(Skill({}, names, match, votes)) == {label: label for label in range(12)}
    assert wrong_names(Skill({}, names, match_classes(names, names), votes)) == {}
    turned = Skill({}, names, match_classes(names, names[::-1]), votes)
    assert wrong_names(turned) == {label: label for label in range(12)}


def test_a_vote_is_the_most_confident_box_on_an_object():
    boxes = torch.tensor([[0., 0., 10., 10.], [20., 20., 30., 30.], [40., 40., 50., 50.]])
    found = InstanceData(bboxes=boxes[[0, 0, 1, 2, 2]] + torch.tensor([0., 0., 1., 0.]),
                         scores=torch.tensor([0.3, 0.6, 0.2, 0.5, 0.4]), labels=torch.tensor([0, 2, 1, 1, 0]))
    votes = count_votes(found, boxes, torch.tensor([1, 0, 0]), 3, 2)
    assert votes.tolist() == [[0, 0], [1, 0], [0, 1]]  # the second object has no box that is sure
    assert count_votes(found[:0], boxes, torch.tensor([1, 0, 0]), 3, 2).sum() == 0
    assert count_votes(found, boxes[:0], torch.zeros(0, dtype=torch.long), 3, 2).shape == (3, 2)


def test_a_teacher_of_other_classes_can_teach_by_its_features():
    teacher = SimpleNamespace(classes=('car', 'bus'), num_classes=2)
    with pytest.raises(ConfigurationError, match='no name in common.*features alone, set default_hooks.distill.prefl'):
        classes_on(teacher, ('cat', 'dog'))
    assert classes_on(teacher, ('Bus', 'dog')).of_teacher == (1, )
