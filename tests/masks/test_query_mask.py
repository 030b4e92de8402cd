"""The mask of a DETR's queries, against its definition."""
import pytest
import torch

from kd_det.heads import QueryOutputs
from kd_det.masks import build_mask

# Of the last decoder layer: the left half and the upper half of the first image; a corner of the second, and all of it.
BOXES = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.25, 1.0, 0.5]],
                      [[0.125, 0.125, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0]]])
LOGITS = torch.tensor([[[1.0, -2.0], [0.0, 2.0]], [[3.0, 0.0], [-1.0, -3.0]]])


@pytest.fixture
def level(make_context):
    feature = torch.zeros(2, 4, 8, 8)
    context = make_context(feature, feature, [torch.zeros(0, 4)] * 2, (64, 64), [(64, 64), (32, 64)])
    earlier = torch.zeros_like(BOXES), torch.full_like(LOGITS, 9.0)
    context.teacher_outputs = [{'bbox_head.queries': QueryOutputs(torch.stack([earlier[1], LOGITS]),
                                                                  torch.stack([earlier[0], BOXES]), 'sigmoid')}]
    return context.read_level()


def test_a_cell_has_the_largest_score_of_the_queries_that_cover_it(level):
    (weighting, ) = build_mask('QueryConfidence')(level)
    first, second, third, fourth = torch.tensor([1.0, 2.0, 3.0, -1.0]).sigmoid()
    expected = torch.zeros(2, 8, 8)
    expected[0, :, :4], expected[0, :4] = first, second  # the second is the surer
    expected[1, :4], expected[1, :1, :2] = fourth, third  # the image ends after half of the batch's height
    torch.testing.assert_close(weighting.cells, expected)


def test_only_the_surest_count(level):
    (weighting, ) = build_mask(dict(type='QueryConfidence', top_k=1))(level)
    assert weighting.cells[0, 4:].abs().max() == 0 and weighting.cells[1, 1:].abs().max() == 0


def test_it_asks_the_teacher_alone_for_its_queries():
    mask = build_mask('QueryConfidence')
    assert mask.teacher_heads == ('bbox_head.queries', ) and mask.student_heads == ()
