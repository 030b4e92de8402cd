"""Feature terms at the encoder and the neck of DETRs."""
import pytest
import torch

from kd_det.distillers.gradients import gradient_norms
from kd_det.taps import TapError

KINDS = ('DETR', 'ConditionalDETR', 'DABDETR', 'DeformableDETR', 'DINO')
# The second is padded; the third has no box.
IMAGES = dict(shapes=((64, 96), (48, 56), (64, 64)), boxes=(((8, 8, 40, 40), (50, 10, 90, 60)), ((4, 4, 40, 44), ), ()))
MASKED = dict(type='FeatureImitation', normalizer='mask',
              mask=dict(type='MaskProduct', masks=['BoxForeground', 'SpatialAttention']))
TERMS = dict(pkd=dict(type='PKD'), fgd=dict(type='FGD'), masked=MASKED,
             queries=dict(type='FeatureImitation', mask='QueryConfidence', normalizer='mask'))


@pytest.fixture
def observed(batch):

    def run(model):
        return model.observe(**model.data_preprocessor(batch(**IMAGES), True), names=model.terms)

    return run


@pytest.mark.parametrize('tap', ['encoder', 'neck'])
@pytest.mark.parametrize('kind', KINDS)
def test_terms_teach_student_and_adapters_and_nothing_else(kind, tap, detr, distiller, observed):
    width = 32 if kind not in ('ConditionalDETR', 'DINO') else 256
    terms = {name: dict(term, tap=tap, adapter='conv1x1') for name, term in TERMS.items()}
    teacher = detr(kind, depth=50, layers=3, embed=width if width == 256 else 64)
    model = distiller(detr(kind), teacher, distill=terms).train()
    losses, context, values = observed(model)
    strides = [8, 16, 32, 64] if kind in ('DeformableDETR', 'DINO') else [32]
    assert [level.stride for level in context.student_levels[tap]] == strides
    assert [tuple(level.shape[-2:]) for level in context.student[tap]] == [(-(-64 // s), -(-96 // s)) for s in strides]
    for name, value in values.items():
        assert all(part.isfinite() for part in value.values()) and sum(value.values()) > 0
        model.zero_grad()
        sum(value.values()).backward(retain_graph=True)
        assert model.backbone.conv1.weight.grad.any()
        assert model.terms[name].adapters[0].weight.grad.any()
        within = [parameter.grad for parameter in model.encoder.parameters()]
        assert any(gradient is not None and gradient.any() for gradient in within) == (tap == 'encoder')
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    norms = gradient_norms(model.parse_losses(losses)[0], {name: sum(value.values()) for name, value in values.items()},
                           {name: context.student[tap] for name in terms})
    assert all(norm.term > 0 and norm.task > 0 for norm in norms.values())  # the tokens lie before the task's loss


@pytest.mark.parametrize('kind', KINDS)
def test_0_where_the_student_equals_the_teacher(kind, detr, pupil_of_itself, observed):
    model = pupil_of_itself(detr(kind), type='PKD', tap='encoder')
    assert sum(observed(model).values['term'].values()) < 1e-6


def test_the_students_own_losses_do_not_change(detr, distiller, batch):
    """Splitting the tokens into maps and joining them again changes no bit."""
    model = distiller(detr('DINO'), detr('DINO'), distill=dict(term=dict(type='PKD', tap='encoder'))).train()
    data = model.data_preprocessor(batch(**IMAGES), True)
    given, losses = (data['inputs'], data['data_samples']), []
    for run in (lambda: model.student.loss(*given), lambda: model.observe(*given, names=[]).losses):
        torch.manual_seed(0)
        losses.append(model.parse_losses(run())[0])
    assert torch.equal(*losses)


def test_a_detector_without_an_encoder(retinanet, detr, distiller):
    with pytest.raises(TapError, match="RetinaNet has no module 'encoder'"):
        distiller(retinanet(), detr(), distill=dict(term=dict(type='PKD', tap='encoder')))
