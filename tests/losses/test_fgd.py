import pytest
import torch
from mmdet.registry import MODELS

from kd_det.losses import FGD

BLOCKS = dict(student='student_context.0', teacher='teacher_context.0')
WEIGHTS = dict(alpha='alpha', beta='beta', gamma='gamma', lambda_='lambda')


def _load_parameters(term, params):
    """Fills the term from the authors' parameters."""
    state = {}
    for side, block in BLOCKS.items():
        for ours, theirs in dict(attend=f'context_mask_{side}', reduce=f'context_mlp_{side}.reduce',
                                 norm=f'context_mlp_{side}.norm', expand=f'context_mlp_{side}.expand').items():
            state.update({f'{block}.{ours}.{kind}': params[f'{theirs}.{kind}'] for kind in ('weight', 'bias')})
    if 'align.weight' in params:
        state.update({f'adapters.0.{kind}': params[f'align.{kind}'] for kind in ('weight', 'bias')})
    term.load_state_dict(state, strict=True)


@pytest.mark.parametrize('name', ['fgd_same', 'fgd_align', 'fgd_nogt', 'fgd_padded'])
def test_reproduces_the_authors_values(name, golden, make_context, connected):
    values = golden(name)
    meta, student = values.meta, values.student.requires_grad_()
    context = make_context(student, values.teacher, [values.gt0, values.gt1], tuple(meta['batch_shape']),
                           [tuple(shape) for shape in meta['img_shapes']])
    weights = {ours: meta[f'{theirs}_fgd'] for ours, theirs in WEIGHTS.items()}
    # The padded golden holds the authors' own box mapping; where no image is padded, the two are the same.
    mapping = 'image' if name == 'fgd_padded' else 'batch'
    term = connected(FGD(temperature=meta['temp'], box_mapping=mapping, **weights), context)
    _load_parameters(term, values.params)
    parts = term(context)
    sum(parts.values()).backward()
    torch.testing.assert_close(sum(parts.values()).detach(), values.loss, rtol=1e-5, atol=0)
    for (part, value), weight in zip(parts.items(), weights.values()):
        torch.testing.assert_close(value.detach(), weight * getattr(values, f'loss_{part}'), rtol=1e-5, atol=0)
    assert (student.grad - values.grad_student).norm() < 1e-5 * values.grad_student.norm()


@pytest.mark.parametrize('box_mapping', ['batch', 'image'])
def test_equals_its_composition(padded, connected, box_mapping):
    pad_aware = box_mapping == 'batch'
    fused = connected(FGD(temperature=0.5, alpha=0.3, beta=0.2, gamma=0.5, lambda_=0.7, box_mapping=box_mapping),
                      padded)
    torch.nn.init.normal_(fused.student_context[0].expand.weight)
    attentions = [dict(type=kind, temperature=0.5, pad_aware=pad_aware)
                  for kind in ('SpatialAttention', 'ChannelAttention')]

    def imitation(where):
        return dict(type='FeatureImitation', normalizer='batch',
                    mask=dict(type='MaskProduct', masks=[where, *attentions]))

    composition = dict(foreground=imitation(dict(type='BoxForeground', weighting='inverse_area',
                                                 box_mapping=box_mapping)),
                       background=imitation(dict(type='BoxBackground', box_mapping=box_mapping)),
                       attention=dict(type='AttentionImitation', temperature=0.5, pad_aware=pad_aware),
                       relation=dict(type='GlobalRelation', pad_aware=pad_aware))
    weights = dict(foreground=0.3, background=0.2, attention=0.5, relation=0.7)
    parts, student = fused(padded), padded.student['neck'][0]
    for name, config in composition.items():
        term = connected(MODELS.build(config), padded)
        if name == 'relation':
            term.load_state_dict(fused.state_dict())
        (value, ) = term(padded).values()
        torch.testing.assert_close(parts[name], weights[name] * value)
        ours, = torch.autograd.grad(parts[name], student, retain_graph=True)
        theirs, = torch.autograd.grad(weights[name] * value, student)
        torch.testing.assert_close(ours, theirs)


def test_padding_gets_no_weight_and_no_gradient(padded, connected):
    term = connected(FGD(), padded)
    torch.nn.init.normal_(term.student_context[0].expand.weight)
    student = padded.student['neck'][0]
    sum(term(padded).values()).backward()
    inside = padded.valid((8, 12)).unsqueeze(1).expand_as(student)
    assert student.grad[inside].abs().min() > 0 and student.grad[~inside].abs().max() == 0


def test_is_0_where_the_student_equals_the_teacher(padded, connected):
    padded.student['neck'] = padded.teachers[0]['neck']
    assert all(value == 0 for value in connected(FGD(), padded)(padded).values())


def test_gradient_reaches_what_trains_and_nothing_else(padded, connected):
    padded.teachers[0]['neck'][0].requires_grad_()
    term = connected(FGD(adapter='conv1x1'), padded)
    torch.nn.init.normal_(term.student_context[0].expand.weight)
    torch.nn.init.normal_(term.teacher_context[0].expand.weight)
    sum(term(padded).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in term.parameters())
    # A bias before a softmax cancels: the one parameter whose gradient is 0 by its place.
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in term.named_parameters()
               if not name.endswith('attend.bias'))


def test_unknown_box_mapping():
    with pytest.raises(ValueError, match="^box_mapping: expected one of batch, image, got 'pad'"):
        FGD(box_mapping='pad')
