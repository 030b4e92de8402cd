"""Every golden value of the papers' released code: the loss, its parts, its masks, and the student's gradient."""
import pytest
import torch
import torch.nn.functional as F

from kd_det.functional import features, focal_global, logits, masks, relations


def _conv(x, params, name, **options):
    return F.conv2d(x, params[f'{name}.weight'], params.get(f'{name}.bias'), **options)


def _global_context(x, params, side):
    context = focal_global.context_pool(x, _conv(x, params, f'context_mask_{side}'))
    hidden = _conv(context, params, f'context_mlp_{side}.reduce')
    norm = f'context_mlp_{side}.norm'
    hidden = F.layer_norm(hidden, hidden.shape[1:], params[f'{norm}.weight'], params[f'{norm}.bias']).relu()
    return x + _conv(hidden, params, f'context_mlp_{side}.expand')


@pytest.mark.parametrize('name', ['fgd_same', 'fgd_align', 'fgd_nogt', 'fgd_padded'])
def test_fgd(golden, close, check_gradient, name):
    data = golden(name)
    options = data.meta
    foreground = masks.box_foreground([data.gt0, data.gt1], options['batch_shape'], data.teacher.shape[2:],
                                      'inverse_area', image_shapes=options['img_shapes'])
    background = masks.normalized_background(foreground)
    assert torch.equal(foreground, data.mask_foreground)
    assert torch.equal(background, data.mask_background)
    close(masks.spatial_attention(data.teacher, options['temp']), data.teacher_spatial_attention)
    close(masks.channel_attention(data.teacher, options['temp']), data.teacher_channel_attention)

    student = data.student.requires_grad_()
    adapted = _conv(student, data.params, 'align') if 'align.weight' in data.params else student
    weights = {part: options[f'{letter}_fgd']
               for part, letter in zip(['foreground', 'background', 'attention', 'relation'],
                                       ['alpha', 'beta', 'gamma', 'lambda'])}
    parts = focal_global.fgd_loss(
        adapted, data.teacher, foreground, background, options['temp'],
        student_relation=_global_context(adapted, data.params, 'student'),
        teacher_relation=_global_context(data.teacher, data.params, 'teacher'),
        alpha=weights['foreground'], beta=weights['background'], gamma=weights['attention'],
        lambda_=weights['relation'])
    assert parts.keys() == weights.keys()
    for part, weight in weights.items():
        close(parts[part] / weight, getattr(data, f'loss_{part}'))
    check_gradient(sum(parts.values()), student, data.loss, data.grad_student)


def test_default_box_mapping_differs_from_the_authors_only_on_padded_images(golden):
    data = golden('fgd_padded')
    foreground = masks.box_foreground([data.gt0, data.gt1], data.meta['batch_shape'], (8, 12), 'inverse_area')
    assert torch.equal(foreground[0], data.mask_foreground[0])
    assert not torch.equal(foreground[1], data.mask_foreground[1])


def test_fkd(golden, close, check_gradient):
    data = golden('fkd')
    params, temperature = data.params, data.meta['temperature']
    student, teacher = data.student.requires_grad_(), data.teacher

    def relation(x, side):
        def embed(name, pool):
            return F.max_pool2d(_conv(x, params, f'{side}.{side}_non_local.{name}conv'), pool)

        # The released block pools keys and values twice, by 2 each.
        gathered = relations.non_local(embed('theta.', 1), embed('phi.0.0.', 4), embed('g.0.0.', 4))
        out = f'{side}.{side}_non_local.conv_out'
        norm = [params[f'{out}.bn.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias')]
        return x + F.batch_norm(_conv(gathered, params, f'{out}.conv'), *norm)

    student_relation = _conv(relation(student, 'student'), params, 'student.non_local_adaptation')
    teacher_relation = relation(teacher, 'teacher')
    close(student_relation, data.student_relation)
    close(teacher_relation, data.teacher_relation)
    attentions = [masks.spatial_attention(feature, temperature) for feature in (student, teacher)]
    close(attentions[0], data.student_spatial_attention[:, 0])
    close(attentions[1], data.teacher_spatial_attention[:, 0])

    parts = features.fkd_loss(
        _conv(student, params, 'student.adaptation_layers'), teacher, sum(attentions) / 2,
        student_channels=F.linear(student.mean((2, 3)), params['student.channel_wise_adaptation.weight'],
                                  params['student.channel_wise_adaptation.bias']),
        student_cells=_conv(student.mean(1, keepdim=True), params, 'student.spatial_wise_adaptation', padding=1),
        student_relation=student_relation, teacher_relation=teacher_relation)
    check_gradient(sum(parts.values()), student, data.loss, data.grad_student)


def test_mgd(golden, check_gradient):
    data = golden('mgd')
    student = data.student.requires_grad_()
    kept = _conv(student, data.params, 'align') * data.keep
    hidden = _conv(kept, data.params, 'generation.conv1', padding=1).relu()
    generated = _conv(hidden, data.params, 'generation.conv2', padding=1)
    loss = data.meta['alpha'] * features.generation_distance(generated, data.teacher)
    check_gradient(loss, student, data.loss, data.grad_student)


@pytest.mark.parametrize('name', ['cwd_tau1', 'cwd_tau4'])
def test_cwd(golden, check_gradient, name):
    data = golden(name)
    student = data.student.requires_grad_()
    loss = features.channel_wise_kl(student, data.teacher, data.meta['tau'])
    check_gradient(loss, student, data.loss, data.grad_student)


def test_pkd(golden, close):
    data = golden('pkd')
    students = [data.student0.requires_grad_(), data.student1.requires_grad_()]
    loss = data.meta['loss_weight'] * sum(map(features.pearson_distance, students, [data.teacher0, data.teacher1]))
    gradients = torch.autograd.grad(loss, students)
    for actual, expected in zip([loss, *gradients], [data.loss, data.grad_student0, data.grad_student1]):
        close(actual, expected)


def test_defeat(golden, close):
    data = golden('defeat')
    boxes, levels = [data.gt0, data.gt1], [data.level_gt0, data.level_gt1]
    for assigned, expected in zip(masks.assign_levels(boxes, len(data.meta['strides'])), levels):
        assert torch.equal(assigned, expected)
    foreground_loss = background_loss = 0
    for level, stride in enumerate(data.meta['strides']):
        student, teacher, mask = (getattr(data, f'{name}{level}') for name in ('student', 'teacher', 'mask'))
        foreground = masks.level_foreground(boxes, levels, stride, mask.shape[1:])
        assert torch.equal(foreground.double(), mask)
        losses = features.decoupled_imitation(student, teacher, foreground)
        foreground_loss, background_loss = foreground_loss + losses[0], background_loss + losses[1]
    close(data.meta['weight_foreground'] * foreground_loss / len(data.meta['strides']), data.loss_foreground)
    close(data.meta['weight_background'] * background_loss / len(data.meta['strides']), data.loss_background)


def _anchors(stride, scales, ratios, feature_shape):
    """Anchors of all cells, row by row, centred on the cells' top left corners as in mmdet."""
    sides = torch.tensor([[stride * scale / ratio**0.5, stride * scale * ratio**0.5]
                          for ratio in ratios for scale in scales])
    y, x = torch.meshgrid(*(stride * torch.arange(size) for size in feature_shape), indexing='ij')
    centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
    return torch.cat([centres - sides / 2, centres + sides / 2], -1).reshape(-1, 4)


def test_fgfi(golden):
    data = golden('fgfi')
    for level, stride in enumerate(data.meta['strides']):
        mask = getattr(data, f'mask{level}')
        priors = _anchors(stride, data.meta['scales'], data.meta['ratios'], mask.shape[1:])
        actual = masks.near_anchor_foreground([data.gt0, data.gt1], [data.level_gt0, data.level_gt1], level, priors,
                                              mask.shape[1:], data.meta['phi'])
        assert torch.equal(actual.double(), mask)


@pytest.mark.parametrize('name', ['kd_T1', 'kd_T2', 'kd_T10'])
def test_soft_targets(golden, check_gradient, name):
    data = golden(name)
    student = data.student.requires_grad_()
    loss = logits.soft_target_kl(student, data.teacher, data.meta['T'], class_reduction='mean')
    check_gradient(loss, student, data.loss, data.grad_student)


@pytest.mark.parametrize('name', ['dkd_T1_a1', 'dkd_T4_a1', 'dkd_T4_a0'])
def test_decoupled_kl(golden, check_gradient, name):
    data = golden(name)
    student = data.student.requires_grad_()
    parts = logits.decoupled_kl(student, data.teacher, data.labels, data.meta['T'])
    loss = logits.combine_decoupled(*parts, alpha=data.meta['alpha'], beta=data.meta['beta']).mean()
    check_gradient(loss, student, data.loss, data.grad_student)


def test_coupled_form_is_the_plain_divergence(golden, check_gradient):
    data = golden('dkd_coupled')
    student = data.student.requires_grad_()
    parts = logits.decoupled_kl(student, data.teacher, data.labels, data.meta['T'])
    loss = logits.combine_decoupled(*parts, alpha=1, beta=1, form='coupled').mean()
    check_gradient(loss, student, data.loss, data.grad_student)
    check_gradient(logits.soft_target_kl(student, data.teacher, data.meta['T']), student, data.loss, data.grad_student)


def test_dist(golden, check_gradient):
    data = golden('dist')
    student = data.student.requires_grad_()
    loss = relations.dist_loss(student, data.teacher, data.meta['tau'], data.meta['inter'], data.meta['intra'])
    check_gradient(loss, student, data.loss, data.grad_student)


@pytest.mark.parametrize('name, relation', [('rkd_distance', relations.distance_relation),
                                            ('rkd_angle', relations.angle_relation)])
def test_rkd(golden, check_gradient, name, relation):
    data = golden(name)
    student = data.student.requires_grad_()
    check_gradient(relation(student, data.teacher), student, data.loss, data.grad_student)
