"""Relations: the formulas in plain loops, invariances, and the edges."""
import pytest
import torch
import torch.nn.functional as F

from kd_det.functional import relations


def flow_of(members):
    return relations.flow_matrix(members[:, :, None, None], members[:, :, None, None])


LOSSES = dict(distance=relations.distance_relation, angle=relations.angle_relation, dist=relations.dist_loss,
              flow=lambda s, t: relations.flow_distance(flow_of(s), flow_of(t)),
              tokens=lambda s, t: relations.token_relations(s.T[None, :, None], t.T[None, :, None], 0.3))
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


@every_loss
def test_loss_is_positive_and_teaches_the_student_alone(loss, pair):
    student, teacher = pair
    value = loss(student, teacher)
    value.backward()
    assert value > 0 and student.grad.abs().sum() > 0 and teacher.grad is None


@every_loss
def test_gradient_is_that_of_the_formula(loss, pair):
    student, teacher = pair
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)


@every_loss
@pytest.mark.parametrize('make', [lambda: torch.randn(1, 5), lambda: torch.zeros(3, 5),
                                  lambda: torch.randn(1, 5).repeat(3, 1), lambda: torch.randn(3, 1).repeat(1, 5)],
                         ids=['one', 'zeros', 'equal members', 'equal classes'])
def test_loss_is_finite_without_variation_and_zero_for_equals(loss, make):
    student = make().requires_grad_()
    for teacher in (torch.randn(student.shape), student.detach().clone()):
        value = loss(student, teacher)
        gradient, = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()
    assert value == 0


def test_flow_matrix_equals_the_loop():
    a, b = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 4, 6)
    actual = relations.flow_matrix(a, b)
    assert actual.shape == (2, 3, 5)
    for n, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        expected = sum(a[n, i, y, x] * b[n, j, y, x] for y in range(4) for x in range(6)) / 24
        torch.testing.assert_close(actual[n, i, j], expected)


def test_flow_matrix_max_pools_the_larger_layer():
    a, b = torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6)
    expected = relations.flow_matrix(F.max_pool2d(a, 2), b)
    torch.testing.assert_close(relations.flow_matrix(a, b), expected)
    torch.testing.assert_close(relations.flow_matrix(b, a), expected.mT)


def test_flow_distance():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(relations.flow_distance(student, teacher), ((student - teacher)**2).sum() / 2)
    with pytest.raises(ValueError, match=r'flow matrices \(2, 3, 4\) of the student and \(2, 3, 5\) of the teacher'):
        relations.flow_distance(student[:, :, :4], teacher)


def smooth_l1(difference):
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def test_distance_relation_equals_the_loop(pair):
    pairs = [(i, j) for i in range(4) for j in range(4)]
    distances = [torch.stack([(side[i] - side[j]).norm() for i, j in pairs]) for side in pair]
    student, teacher = (side / side[side > 0].mean() for side in distances)
    expected = sum(smooth_l1(difference) for difference in student - teacher) / 16
    torch.testing.assert_close(relations.distance_relation(*pair), expected)


def test_angle_relation_equals_the_loop(pair):
    def cosine(side, i, j, k):
        if i in (j, k):
            return torch.zeros((), dtype=side.dtype)
        return F.cosine_similarity(side[j] - side[i], side[k] - side[i], dim=0)

    triples = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    expected = sum(smooth_l1(cosine(pair[0], *triple) - cosine(pair[1], *triple)) for triple in triples) / 64
    torch.testing.assert_close(relations.angle_relation(*pair), expected)


@pytest.mark.parametrize('relation', [relations.distance_relation, relations.angle_relation])
def test_relations_compare_spaces_of_different_size_up_to_scale_rotation_and_shift(relation, pair):
    student, _ = pair
    embedding, _ = torch.linalg.qr(torch.randn(7, 5, dtype=torch.float64))
    assert relation(student, 3 * student @ embedding.T + 1) < 1e-12
    assert relation(student.view(4, 5, 1, 1), student) == 0


def test_dist_loss_equals_the_correlations(pair):
    student, teacher = ((side / 2).softmax(1) for side in pair)

    def one_minus_correlation(a, b):
        return torch.stack([1 - torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(a, b)]).mean()

    between, within = one_minus_correlation(student, teacher), one_minus_correlation(student.T, teacher.T)
    actual = relations.dist_loss(*pair, temperature=2.0, inter=3.0, intra=5.0)
    torch.testing.assert_close(actual, 4 * (3 * between + 5 * within))


def test_token_relations_equal_the_loop_over_pairs_of_cells():
    student, teacher = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 7, 4, 6, dtype=torch.float64)
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[1, 3:], valid[1, :, 2:] = False, False
    expected = []
    for image in range(2):
        cells = valid[image].nonzero().tolist()
        tables = [[[F.cosine_similarity(side[image, :, i, j], side[image, :, k, m], dim=0) / 0.2 for k, m in cells]
                   for i, j in cells] for side in (student, teacher)]
        s, t = (torch.tensor(table).softmax(1) for table in tables)
        expected.append(sum((t[i] * (t[i] / s[i]).log()).sum() for i in range(len(cells))) / len(cells))
    actual = relations.token_relations(student, teacher, 0.2, valid)
    torch.testing.assert_close(actual, sum(expected) / 2)
    student, teacher, valid = (torch.cat([each, each]) for each in (student, teacher, valid))
    torch.testing.assert_close(relations.token_relations(student, teacher, 0.2, valid), actual)


def test_tokens_of_large_maps_are_means_of_cells():
    student, teacher = torch.randn(2, 3, 7, 10), torch.randn(2, 4, 7, 10)
    valid = torch.ones(2, 7, 10, dtype=torch.bool)
    valid[1, :, 5:] = False  # of the tokens in the third column there is one cell
    for tokens, side in ((70, 1), (69, 2), (20, 2), (19, 3), (1, 10)):
        places = [(i, j) for i in range(0, 7, side) for j in range(0, 10, side)]
        assert len(places) <= tokens
        means = []
        for feature in (student, teacher):
            each = [[feature[image, :, i:i + side, j:j + side][:, valid[image, i:i + side, j:j + side]].mean(1)
                     for i, j in places] for image in range(2)]
            means.append(torch.stack([torch.stack(image, 1) for image in each])[:, :, None].nan_to_num())
        inside = torch.stack([torch.stack([valid[image, i:i + side, j:j + side].any() for i, j in places])
                              for image in range(2)])[:, None]
        expected = relations.token_relations(*means, 0.2, inside)
        torch.testing.assert_close(relations.token_relations(student, teacher, 0.2, valid, tokens), expected)


def test_token_relations_of_padding_alone_are_0():
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    value = relations.token_relations(student, torch.randn(1, 3, 2, 2), valid=torch.zeros(1, 2, 2, dtype=torch.bool))
    gradient, = torch.autograd.grad(value, student)
    assert value == 0 and gradient.isfinite().all()


def test_non_local_equals_the_table_of_all_pairs():
    query, key, value = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 2), torch.randn(2, 6, 2, 2)
    weights = query.flatten(2).mT @ key.flatten(2) / 4
    expected = (weights @ value.flatten(2).mT).mT.view(2, 6, 4, 5)
    torch.testing.assert_close(relations.non_local(query, key, value), expected)
