"""Box outputs: the formulas, and boxes without area."""
import pytest
import torch

from kd_det.functional import boxes, logits


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, extent = (torch.rand(count, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return 50 * torch.cat([first, first + extent], 1)


def test_bounded_regression():
    target = torch.zeros(4, 4)
    teacher = torch.tensor([[1., 1, 1, 1]] * 4)  # squared error 4
    student = torch.tensor([[2., 2, 2, 2], [1, 1, 1, 1], [0.9, 0.9, 0.9, 0.9], [0, 0, 0, 0]], requires_grad=True)
    torch.testing.assert_close(boxes.bounded_regression(student, teacher, target), torch.tensor([16., 0, 0, 0]))
    value = boxes.bounded_regression(student, teacher, target, margin=1.0)
    torch.testing.assert_close(value, torch.tensor([16., 4, 3.24, 0]))
    gradient, = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, 2 * student.detach())
    bounded, = torch.autograd.grad(boxes.bounded_regression(student, teacher, target).sum(), student)
    assert bounded[1:].abs().max() == 0


def test_a_box_without_extent_bounds_nothing():
    """Its encoded size is the logarithm of 0."""
    target = torch.tensor([[0.0, 0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0, 0.0]])
    student = torch.full((2, 4), 2.0, requires_grad=True)
    value = boxes.bounded_regression(student, torch.ones(2, 4), target)
    assert value.tolist() == [0, 16]
    gradient, = torch.autograd.grad(value.sum(), student)
    assert gradient.tolist() == [[0.0] * 4, [4.0] * 4]


def test_distribution_kl_is_soft_targets_summed_over_the_sides():
    student, teacher = (torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    per_side = torch.stack([logits.soft_target_kl(student[:, side], teacher[:, side], 10.0, reduction='none')
                            for side in range(4)])
    torch.testing.assert_close(boxes.distribution_kl(student, teacher, 10.0), per_side.sum(0))
    torch.testing.assert_close(boxes.distribution_kl(student, teacher, 10.0, 'mean'), per_side.mean(0) / 8)
    torch.testing.assert_close(boxes.distribution_kl(student[:, 0], teacher[:, 0], 10.0), per_side[0])
    boxes.distribution_kl(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    assert boxes.distribution_kl(student, student).abs().max() == 0
    with pytest.raises(ValueError, match="reduction='none': expected 'sum' or 'mean'"):
        boxes.distribution_kl(student, teacher, reduction='none')


def test_giou_imitation_of_known_boxes():
    teacher = torch.tensor([[0., 0, 10, 10]] * 4)
    student = torch.tensor([[0., 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10], [2, 2, 4, 4]])
    expected = torch.tensor([0, 1 - 50 / 150, 1 + 100 / 300, 1 - 4 / 100])
    torch.testing.assert_close(boxes.giou_imitation(student, teacher), expected)


def test_giou_imitation_pulls_the_student_to_the_teacher():
    student, teacher = random_boxes(20, 0).requires_grad_(), random_boxes(20, 1).requires_grad_()
    value = boxes.giou_imitation(student, teacher)
    assert 0 < value.min() and value.max() <= 2
    gradient, none = torch.autograd.grad(value.sum(), [student, teacher], allow_unused=True)
    assert none is None
    assert (boxes.giou_imitation(student - 0.01 * gradient, teacher) < value).all()
    assert torch.autograd.gradcheck(lambda s: boxes.giou_imitation(s, teacher.detach()), student)
    assert boxes.giou_imitation(student, student.detach()).abs().max() == 0


def test_boxes_without_area_and_no_boxes_are_finite():
    point, line = torch.tensor([[5., 5, 5, 5]]), torch.tensor([[5., 5, 9, 5]])
    for student in (point, line, random_boxes(1, 2).float()):
        student = student.clone().requires_grad_()
        for teacher in (point, line, torch.tensor([[9., 9, 1, 1]])):
            value = boxes.giou_imitation(student, teacher)
            gradient, = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all() and gradient.isfinite().all()
    none = torch.zeros(0, 4)
    assert boxes.giou_imitation(none, none).shape == boxes.bounded_regression(none, none, none).shape == (0, )
    assert boxes.distribution_kl(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8)).shape == (0, )
