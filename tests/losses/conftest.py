"""Golden values and a padded batch for the feature terms; pairs for the terms that compare outputs of heads."""
import copy

import pytest
import torch
from mmdet.registry import MODELS


@pytest.fixture
def check_gradient():
    """Asserts a loss, and its gradients with respect to students, with a relative error under 1e-5."""

    def check(loss, students, expected_loss, expected_gradients) -> None:
        torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-5, atol=0)
        for actual, expected in zip(torch.autograd.grad(loss, students), expected_gradients):
            assert (actual - expected).norm() < 1e-5 * expected.norm()

    return check


@pytest.fixture
def term_of(connected):
    """Builds a term from its config and connects it to a context."""
    return lambda context, **config: connected(MODELS.build(config), context)


@pytest.fixture
def padded(make_context):
    """Two images, the second padded in height and width, with features that differ between student and teacher."""
    torch.manual_seed(0)
    boxes = [torch.tensor([[4., 4., 60., 40.], [50., 8., 90., 60.]]), torch.tensor([[0., 0., 30., 20.]])]
    return make_context(torch.randn(2, 6, 8, 12, requires_grad=True), torch.randn(2, 6, 8, 12), boxes,
                        image_shapes=[(64, 96), (40, 56)])


@pytest.fixture
def check_padding(padded):
    """Asserts that a term's value and the student's gradient know nothing of the padding of :func:`padded`."""

    def check(term) -> None:
        student, teacher = padded.student['neck'][0], padded.teachers[0]['neck'][0]
        outside = ~padded.valid((8, 12))[:, None].expand_as(student)

        def value():
            torch.manual_seed(0)
            return sum(term(padded).values())

        before = value()
        gradient, = torch.autograd.grad(before, student)
        assert gradient[outside].abs().max() == 0 and gradient[~outside].abs().max() > 0
        with torch.no_grad():
            student[outside] += 3
            teacher[outside] -= 2
        torch.testing.assert_close(value(), before)

    return check


@pytest.fixture
def parts_of(batch):
    """Runs one training step of a distiller; returns the parts of its only term, and its loss with the gradient."""

    def run(model, data=None):
        data = model.data_preprocessor(copy.deepcopy(data or batch()), True)
        losses = model.loss(**data)
        name, = model.terms
        return {key[len(f'distill/{name}_'):]: value for key, value in losses.items() if key.startswith('distill/')}, \
            losses[f'loss_{name}']

    return run


@pytest.fixture
def pupil_of_itself(distiller):
    """Makes a distiller whose student has the teacher's weights and BatchNorm statistics, and computes as it does."""

    def make(config: dict, **term):
        as_loaded = dict(fuse=False, channels_last=False)  # folded convolutions round otherwise
        model = distiller(config, None, teacher=dict(config=config, random_teacher=True, **as_loaded),
                          distill=dict(term=term))
        state = model.student.state_dict()
        model.build_teachers()[0].model.load_state_dict({key: value.clone() for key, value in state.items()})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return model

    return make
