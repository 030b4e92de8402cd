"""A head that overrides what is read, or is derived from no known one, is read once it is declared what it is like."""
import copy

import pytest
import torch
from mmdet.models.dense_heads import DeformableDETRHead, FCOSHead, GFLHead, SSDHead
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.registry import MODELS
from torch import nn

from kd_det.heads import HeadError, StudentHeads, TeacherTowers, check_head, find_head, read_dense, reads_like
from kd_det.heads.queries import QUERY_HEADS
from kd_det.heads.readers import READERS, find_reader
from kd_det.heads.towers import measure_moments, read_towers, record_towers


@pytest.fixture(autouse=True)
def declarations():
    """Forgets afterwards what a test declared."""
    readers, heads = dict(READERS), set(QUERY_HEADS)
    yield
    READERS.clear()
    READERS.update(readers)
    QUERY_HEADS.clear()
    QUERY_HEADS.update(heads)


class OwnForward(FCOSHead):
    """Overrides what is read, and returns the same all the same."""

    def forward(self, features):
        return super().forward(features)


class OwnTargets(OwnForward):

    def get_targets(self, *args, **kwargs):
        return super().get_targets(*args, **kwargs)


class Unrelated(nn.Module):
    """Derived from no head: has one of FCOS within it, and what its outputs are decoded with."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.assign = head, head.get_targets
        head.get_targets = lambda *args, **kwargs: self.get_targets(*args, **kwargs)  # looked up anew at each call
        for name in ('num_classes', 'cls_out_channels', 'use_sigmoid_cls', 'norm_on_bbox', 'prior_generator',
                     'bbox_coder'):
            setattr(self, name, getattr(head, name))

    def forward(self, features):
        return self.inner(features)

    def get_targets(self, *args, **kwargs):
        return self.assign(*args, **kwargs)

    def loss(self, features, samples):
        return self.inner.loss_by_feat(*self(features), [sample.gt_instances for sample in samples],
                                       [sample.metainfo for sample in samples])


def _assert_same(outputs, expected):
    for field in ('logits', 'regressions', 'boxes', 'priors', 'centerness'):
        assert all(map(torch.equal, getattr(outputs, field), getattr(expected, field)))
    assert outputs.strides == expected.strides == (8, 16, 32)


def test_a_subclass_that_overrides_what_is_read(dense_head, features):
    head, inputs = dense_head('fcos_normalized').train(), features()
    expected = read_dense(head, head(inputs))
    head.__class__ = OwnForward
    with pytest.raises(HeadError, match=r'OwnForward can not be read.*kd_det.heads.reads_like\(OwnForward, FCOSHead\)'):
        read_dense(head, head(inputs))
    reads_like(OwnForward, FCOSHead)
    _assert_same(read_dense(head, head(inputs)), expected)


@pytest.mark.parametrize('kind, named, has', [
    (OwnForward, (), {'positives'}), (OwnForward, ('towers', ), {'positives', 'towers'}),
    (OwnTargets, (), set()), (OwnTargets, ('positives', ), {'positives'}), (Unrelated, (), set()),
    (Unrelated, ('positives', 'towers'), {'positives', 'towers'})])
def test_parts_that_a_head_computes_in_its_own_way_are_read_where_they_are_named(kind, named, has):
    reads_like(kind, FCOSHead, parts=named)
    for part in ('positives', 'towers'):
        if part in has:
            check_head('Detector', dict(bbox_head=kind), f'bbox_head.{part}')
        else:
            with pytest.raises(HeadError, match='does not tell which' if part == 'positives' else 'has no towers'):
                check_head('Detector', dict(bbox_head=kind), f'bbox_head.{part}')
    with pytest.raises(HeadError, match='predicts no distributions'):
        check_head('Detector', dict(bbox_head=kind), 'bbox_head.distributions')


def test_distributions_are_among_the_maps():

    class OwnGFL(GFLHead):

        def forward_single(self, *args):
            return super().forward_single(*args)

    reads_like(OwnGFL, GFLHead)
    check_head('Detector', dict(bbox_head=OwnGFL), 'bbox_head.distributions')


def test_a_head_derived_from_none(one_stage, batch):
    """Its outputs and positives in the student's own loss are those of the head within it."""
    torch.manual_seed(0)
    model = MODELS.build(one_stage('fcos')).train()
    data = model.data_preprocessor(batch(), True)

    def read():
        heads = StudentHeads(model, ['bbox_head', 'bbox_head.positives'])
        with heads.capture() as outputs:
            model(**copy.deepcopy(data), mode='loss')
        return outputs['bbox_head']

    expected = read()
    model.bbox_head = Unrelated(model.bbox_head)
    with pytest.raises(HeadError, match=r'Unrelated can not be read.*reads_like\(Unrelated, FCOSHead\)'):
        find_head(model, 'bbox_head')
    reads_like(Unrelated, FCOSHead, parts=['positives'])
    outputs = read()
    _assert_same(outputs, expected)
    assert all(map(torch.equal, outputs.assigned, expected.assigned)) and any(map(torch.any, outputs.assigned))


def test_towers_of_a_declared_head_resume_as_it_does(dense_head, features):
    head, inputs = dense_head('fcos', stacked_convs=2).eval().requires_grad_(False), features()
    head.__class__ = OwnForward
    reads_like(OwnForward, FCOSHead, parts=['towers'])
    with record_towers(head, 1) as readings:
        expected = read_dense(head, head(inputs))
    towers = read_towers(readings)
    _assert_same(TeacherTowers(head, 1, measure_moments(towers, ())).resume(*towers.activated()), expected)


def test_what_overrides_a_declared_head_again_is_refused():
    reads_like(OwnForward, FCOSHead)

    class Further(OwnForward):

        def forward(self, features):
            return None

    with pytest.raises(HeadError, match=r'Further can not be read.*reads_like\(Further, OwnForward\)'):
        find_reader(Further)


@pytest.mark.parametrize('like, parts, message', [
    (nn.Conv2d, (), r'outputs of a Conv2d can not be read'),
    (StandardRoIHead, (), 'Only dense heads and heads of DETRs'),
    (FCOSHead, ('distributions', ), 'a FCOSHead has no distributions that can be read; it has positives, towers'),
    (SSDHead, ('towers', 'masks'), 'a SSDHead has no masks and no towers'),
    (DeformableDETRHead, ('positives', ), 'a DeformableDETRHead has no positives that can be read; it has none')])
def test_what_can_not_be_declared(like, parts, message):
    with pytest.raises(HeadError, match=message):
        reads_like(OwnForward, like, parts)
    assert OwnForward not in READERS and OwnForward not in QUERY_HEADS


def test_positives_of_a_head_that_assigns_nothing():

    class Plain(nn.Module):
        pass

    with pytest.raises(HeadError, match="a Plain has no method 'get_targets', where a FCOSHead assigns"):
        reads_like(Plain, FCOSHead, parts=['positives'])


def test_a_head_of_queries_with_a_forward_of_its_own(detr, batch):
    torch.manual_seed(0)
    model = MODELS.build(detr()).train()

    class OwnQueries(type(model.bbox_head)):

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    data = model.data_preprocessor(batch(), True)

    def read():
        torch.manual_seed(1)
        with StudentHeads(model, ['bbox_head.queries']).capture() as outputs:
            model(**copy.deepcopy(data), mode='loss')
        return outputs['bbox_head.queries']

    expected = read()
    model.bbox_head.__class__ = OwnQueries
    with pytest.raises(HeadError, match='OwnQueries predicts no queries.*kd_det.heads.reads_like declares'):
        find_head(model, 'bbox_head.queries')
    reads_like(OwnQueries, DeformableDETRHead)
    outputs = read()
    assert torch.equal(outputs.assigned, expected.assigned) and torch.equal(outputs.boxes, expected.boxes)
