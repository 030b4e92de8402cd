"""Every method that is made of feature terms alone, as its config file has it, on both kinds of detectors."""
import pytest
import torch
from mmdet.registry import MODELS

from kd_det.composition import available_methods, head_family, method_terms
from kd_det.losses import FeatureTerm

DETECTORS = ('retinanet', 'faster_rcnn')
# They compare what blocks of their own make of the student, which is not the teacher's even if the student is.
WITHOUT_ZERO = ('fkd', 'mgd')
# They compare nothing that passes an adapter.
WITHOUT_ADAPTER = ('rkd', )


# Of which one is padded and one is without boxes; relations need as many.
THREE_IMAGES = ((64, 64), (48, 56), (64, 64)), (((8, 8, 40, 40), ), (), ((20, 4, 60, 30), ))


def reads_features_only(config: dict) -> bool:
    term = MODELS.build({key: value for key, value in config.items() if key != 'weight'})
    return isinstance(term, FeatureTerm) and not (term.student_heads or term.teacher_heads)


METHODS = [method for method, families in available_methods().items()
           if all(map(reads_features_only, method_terms(method, next(iter(families))).values()))]


@pytest.fixture(params=DETECTORS)
def detector(request):
    """Makes the model dict of a detector."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def step():
    """Runs one training step of a distiller on a batch."""

    def run(model, data) -> dict:
        data = model.data_preprocessor(data, training=True)
        return model.loss(data['inputs'], data['data_samples'])

    return run


def parts_of(losses: dict, terms) -> dict:
    return {name: value for name, value in losses.items()
            if name.startswith('distill/') or name in [f'loss_{term}' for term in terms]}


def test_the_feature_methods_are_all_here():
    assert {'cwd', 'defeat', 'dist', 'fgd', 'fgfi', 'fitnets', 'fkd', 'fsp', 'mgd', 'pkd', 'rkd'} <= set(METHODS)


@pytest.mark.parametrize('method', METHODS)
def test_method_trains_student_and_adapters_and_nothing_else(method, detector, distiller, batch, step):
    student = detector()
    terms = method_terms(method, head_family(student))
    model = distiller(student, detector(width=8, neck=12), distill=terms)
    # Blocks that start as the identity pass a gradient on to their last layer alone; here they have learnt something.
    for name, parameter in model.terms.named_parameters():
        if not parameter.any():
            torch.nn.init.constant_(parameter, 0.01)
    model.build_teachers()
    model.train()
    losses = step(model, batch(*THREE_IMAGES))
    parts = parts_of(losses, terms)
    assert parts and all(value.isfinite() for value in parts.values())
    loss = sum(losses[f'loss_{term}'] for term in terms)
    assert loss > 0
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.backbone.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    gradients = {name: parameter.grad for name, parameter in model.terms.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    # On the finest level, <term>.<modules>.0, all weights learn. On a coarser one there may be no box or a single cell,
    # and a bias may cancel where a softmax or a standardisation follows.
    finest = {name: gradient for name, gradient in gradients.items()
              if name.split('.')[2] == '0' and name.endswith('weight')}
    assert all(gradient.any() for gradient in finest.values())
    assert any('adapters' in name for name in finest) == (method not in WITHOUT_ADAPTER)


@pytest.mark.parametrize('method', METHODS)
def test_method_is_finite_on_the_hardest_batch(method, detector, distiller, batch, step):
    """One image without boxes, whose coarsest level is a single cell."""
    student = detector()
    terms = method_terms(method, head_family(student))
    model = distiller(student, detector(width=8, neck=12), distill=terms).train()
    losses = step(model, batch(shapes=((64, 64), ), boxes=((), )))
    assert all(value.isfinite() for value in parts_of(losses, terms).values())
    sum(losses[f'loss_{term}'] for term in terms).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.terms.parameters())
    gradients = [parameter.grad for parameter in model.backbone.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize('method', [method for method in METHODS if method not in WITHOUT_ZERO])
def test_method_is_exactly_0_where_the_student_equals_the_teacher(method, detector, distiller, batch, step):
    student = detector()
    terms = method_terms(method, head_family(student))
    model = distiller(student, detector(), distill=terms)
    model.build_teachers()[0].model.load_state_dict(model.state_dict())
    model.eval()  # BatchNorm by its running statistics, as in the teacher
    losses = step(model, batch(*THREE_IMAGES))
    assert all(value == 0 for value in parts_of(losses, terms).values())
