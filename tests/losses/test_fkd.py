import pytest
import torch

# Ours to the authors', whose pooling makes Sequentials of the convolutions.
RELATION = dict(query='theta.conv', key='phi.0.0.conv', value='g.0.0.conv', expand='conv_out.conv', norm='conv_out.bn')
ADAPTERS = {'adapters.0': 'student.adaptation_layers', 'blocks.0.channels': 'student.channel_wise_adaptation',
            'blocks.0.cells': 'student.spatial_wise_adaptation',
            'blocks.0.student_relation.1': 'student.non_local_adaptation'}


def test_reproduces_the_authors_values(golden, make_context, term_of, check_gradient):
    data = golden('fkd')
    student = data.student.requires_grad_()
    # At stride 16 keys and values are pooled by 4, as the authors pool here: twice by 2.
    context = make_context(student, data.teacher, [torch.zeros(0, 4)] * 2, stride=16)
    term = term_of(context, type='FKD', temperature=data.meta['temperature']).eval()
    names = dict(ADAPTERS)
    for side, block in dict(student='student_relation.0', teacher='teacher_relation').items():
        names.update({f'blocks.0.{block}.{ours}': f'{side}.{side}_non_local.{theirs}'
                      for ours, theirs in RELATION.items()})
    state = {f'{ours}.{name[len(theirs) + 1:]}': value for ours, theirs in names.items()
             for name, value in data.params.items() if name.startswith(f'{theirs}.')}
    assert len(state) == len(data.params)
    term.load_state_dict(state)
    check_gradient(sum(term(context).values()), [student], data.loss, [data.grad_student])


def test_every_block_learns(padded, term_of):
    term = term_of(padded, type='FKD')
    for module in term.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # it starts at 0, and then passes no gradient on
    sum(term(padded).values()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in term.parameters())


def test_padding_does_not_count(padded, term_of, check_padding):
    term = term_of(padded, type='FKD').eval()
    torch.nn.init.ones_(term.blocks[0].student_relation[0].norm.weight)
    check_padding(term)


@pytest.mark.parametrize('stride, pool', [(4, 16), (8, 8), (16, 4), (32, 4), (64, 4)])
def test_keys_are_pooled_to_cells_of_64_pixels_but_at_least_4_into_one(stride, pool, make_context, term_of):
    context = make_context(torch.zeros(1, 4, 8, 12), torch.zeros(1, 4, 8, 12), [torch.zeros(0, 4)], stride=stride)
    blocks = term_of(context, type='FKD').blocks[0]
    assert blocks.student_relation[0].pool == blocks.teacher_relation.pool == pool
