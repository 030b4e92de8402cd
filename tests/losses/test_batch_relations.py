import pytest
import torch
from mmdet.registry import MODELS

from kd_det.losses import batch_relations


@pytest.mark.parametrize('name, part', [('rkd_distance', 'distance'), ('rkd_angle', 'angle')])
def test_rkd_reproduces_the_authors_values(name, part, golden, make_context, term_of, check_gradient):
    data = golden(name)
    student = data.student.requires_grad_()
    context = make_context(student[..., None, None], data.teacher[..., None, None], [torch.zeros(0, 4)] * len(student))
    parts = term_of(context, type='RKD', distance_weight=1.0, angle_weight=1.0)(context)
    check_gradient(parts[part], [student], data.loss, [data.grad_student])


def test_dist_reproduces_the_authors_values(golden, make_context, term_of, check_gradient):
    data = golden('dist')
    student = data.student.requires_grad_()
    context = make_context(student[..., None, None], data.teacher[..., None, None], [torch.zeros(0, 4)] * len(student))
    options = dict(temperature=data.meta['tau'], inter=data.meta['inter'], intra=data.meta['intra'])
    loss = term_of(context, type='DIST', **options)(context)['correlation']
    check_gradient(loss, [student], data.loss, [data.grad_student])


@pytest.mark.parametrize('kind', ['RKD', 'DIST'])
def test_images_are_pooled_without_their_padding(kind, make_context, term_of):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 8, 12), torch.randn(3, 6, 8, 12)
    shapes = [(64, 96), (40, 56), (64, 48)]
    values = []
    for _ in range(2):
        context = make_context(student, teacher, [torch.zeros(0, 4)] * 3, image_shapes=shapes)
        values.append([sum(term_of(context, type=kind, pad_aware=aware)(context).values()) for aware in (True, False)])
        outside = ~context.valid((8, 12))[:, None].expand_as(student)
        student[outside] += 3
    (aware, paper), (aware_changed, paper_changed) = values
    assert aware > 0 and aware == aware_changed and paper != paper_changed


def test_rkd_needs_no_common_width(make_context, term_of):
    student = torch.randn(3, 4, 8, 12, requires_grad=True)
    context = make_context(student, torch.randn(3, 7, 8, 12), [torch.zeros(0, 4)] * 3)
    term = term_of(context, type='RKD')
    sum(term(context).values()).backward()
    assert not list(term.parameters()) and student.grad.abs().max() > 0
    with pytest.raises(TypeError, match='adapter'):
        MODELS.build(dict(type='RKD', adapter='conv1x1'))


@pytest.mark.parametrize('kind, images', [('RKD', 1), ('RKD', 2), ('DIST', 1)])
def test_too_few_images_are_finite_and_teach_nothing(kind, images, make_context, term_of, monkeypatch):
    """Of two images there is one distance, which is its own mean, and no angle. Rounding must not be balanced."""
    said = []
    monkeypatch.setattr(batch_relations, 'print_log', lambda message, *args: said.append(message))
    student = torch.randn(images, 4, 8, 12, requires_grad=True)
    context = make_context(student, torch.randn(images, 4, 8, 12), [torch.zeros(0, 4)] * images)
    term = term_of(context, type=kind)
    value = sum(term(context).values())
    value.backward()
    assert student.grad.isfinite().all()
    if kind == 'RKD':
        assert value == 0 and not student.grad.any()
        term(context)
        assert len(said) == 1 and f'here are {images}' in said[0]
