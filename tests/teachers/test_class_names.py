"""A teacher's class names: given, from its checkpoint, or from its config; whichever fits its head."""
import pytest
import torch
from mmdet.registry import MODELS

from kd_det.teachers import Teacher, TeacherError
from kd_det.teachers.loading import find_class_names

NAMES, OTHERS = ('cat', 'dog'), ('bird', 'fish')


@pytest.mark.parametrize('meta', [dict(dataset_meta=dict(classes=NAMES)), dict(dataset_meta=dict(CLASSES=NAMES)),
                                  dict(CLASSES=list(NAMES)), dict(dataset_meta=[None, dict(classes=NAMES)]),
                                  dict(dataset_meta=['bird', 'fish'], CLASSES=NAMES),
                                  dict(dataset_meta=None, CLASSES=NAMES)])
def test_checkpoints_of_all_ages(meta):
    config = dict(train_dataloader=dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=OTHERS))))
    assert find_class_names(2, (), meta, config) == NAMES
    assert find_class_names(2, OTHERS, meta, {}) == OTHERS  # what is given has the last word


def test_configs(tmp_path):
    inner = dict(type='CocoDataset', metainfo=dict(classes=NAMES))
    config = dict(train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=inner)))
    assert find_class_names(2, (), {}, config) == NAMES
    (tmp_path / 'teacher.py').write_text(f'model = dict(type="A")\nval_dataloader = {config["train_dataloader"]}')
    assert find_class_names(2, (), {}, tmp_path / 'teacher.py') == NAMES
    assert len(find_class_names(80, (), {}, dict(val_dataloader=dict(dataset=dict(type='CocoDataset'))))) == 80


def test_names_that_do_not_fit_the_head_are_not_its_names():
    config = dict(train_dataloader=dict(dataset=dict(type='CocoDataset', metainfo=dict(classes=NAMES))))
    assert find_class_names(2, (), dict(dataset_meta=dict(classes=('cat', ))), config) == NAMES
    assert find_class_names(3, (), dict(CLASSES='cat'), config) is None
    with pytest.raises(TeacherError, match='gives 2 names, but the teacher tells 3 classes apart'):
        find_class_names(3, NAMES, {}, {})
    for given in ('cat', ('cat', 'cat', 'dog')):
        with pytest.raises(TeacherError, match='name each class once, by label'):
            find_class_names(3, given, {}, {})
    assert find_class_names(2, None, dict(CLASSES=NAMES), {}) == NAMES


def test_a_teacher_knows_them(retinanet, tmp_path):
    model = MODELS.build(retinanet())
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a', 'b', 'c')))),
               tmp_path / 'a.pth')
    options = dict(taps=['neck'], student_preprocessor=model.data_preprocessor)
    assert Teacher(retinanet(), str(tmp_path / 'a.pth'), **options).classes == ('a', 'b', 'c')
    assert Teacher(retinanet(), random_teacher=True, **options).classes is None
    assert Teacher(retinanet(), random_teacher=True, classes=['x', 'y', 'z'], **options).classes == ('x', 'y', 'z')
