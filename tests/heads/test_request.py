"""What is asked of a head is parsed in one place, and stays the string that names it."""
import copy
import pickle

import pytest
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.heads import ROI_HEAD, HeadError, HeadRequest
from kd_det.losses import DistillTerm


@pytest.mark.parametrize('name, head, part', [('bbox_head', 'bbox_head', ''), ('roi_head', 'roi_head', ''),
                                              ('bbox_head.towers', 'bbox_head', 'towers'),
                                              ('rpn_head.positives', 'rpn_head', 'positives'),
                                              ('bbox_head.distributions', 'bbox_head', 'distributions'),
                                              ('bbox_head.queries', 'bbox_head', 'queries'),
                                              ('bbox_head.decoder', 'bbox_head', 'decoder')])
def test_a_request_is_the_string_that_names_it(name, head, part):
    request = HeadRequest.parse(name)
    assert (request.head, request.part) == (head, part) and request == HeadRequest(head, part) == name
    assert HeadRequest.parse(request) is request
    assert {name: 1}[request] == 1 and {request: 1}[name] == 1 and repr(request) == repr(name)
    for other in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
        assert type(other) is HeadRequest and (other, other.head, other.part) == (name, head, part)
    assert (ROI_HEAD == request) == (name == 'roi_head')


def test_a_request_for_towers_names_their_depth():
    for name, remaining in (('bbox_head.towers', 0), ('bbox_head.towers.1', 1), ('bbox_head.towers.half', 'half')):
        request = HeadRequest.parse(name)
        for each in (request, HeadRequest('bbox_head', 'towers', remaining), pickle.loads(pickle.dumps(request))):
            assert (each, each.part, each.remaining) == (name, 'towers', remaining)


@pytest.mark.parametrize('name, message', [
    ('bbox_head.tower', "'bbox_head.tower': no head has a part 'tower'. Parts are towers, positives, distributions, "
                        r"queries, decoder. Did you mean 'bbox_head.towers'\?"),
    ('bbox_head.masks', 'Parts are towers, positives, distributions, queries, decoder.$'),
    ('bbox_head.towers.positives', "no head has a part 'towers.positives'"),
    ('bbox_head.towers.0', "no head has a part 'towers.0'"), ('bbox_head.positives.1', "a part 'positives.1'")])
def test_a_part_that_no_head_has(name, message):
    with pytest.raises(HeadError, match=message):
        HeadRequest.parse(name)


@pytest.fixture
def own_term():
    """Registers a term of a user's own, which says in plain strings what it reads."""

    class OwnTerm(DistillTerm):

        def __init__(self, heads=('bbox_head', 'bbox_head.positives'), **kwargs):
            super().__init__(**kwargs)
            self.heads = tuple(heads)

        @property
        def student_heads(self):
            return self.heads

        def forward(self, context):
            outputs = context.student_outputs['bbox_head']
            return sum(logits[assigned].square().mean() for logits, assigned in zip(outputs.logits, outputs.assigned)
                       if assigned.any())

    MODELS.register_module(module=OwnTerm)
    yield
    del MODELS.module_dict['OwnTerm']


def test_terms_of_your_own_say_it_in_plain_strings(own_term, retinanet, distiller, batch):
    model = distiller(retinanet(), retinanet(), distill=dict(own=dict(type='OwnTerm')))
    assert model(**model.data_preprocessor(batch(), True), mode='loss')['loss_own'] > 0


def test_a_wrong_part_is_told_when_the_distiller_is_built(own_term, retinanet, distiller):
    with pytest.raises(ConfigurationError, match=r"model.distill.own: .*no head has a part 'positive'.* Did you mean "
                                                 r"'bbox_head.positives'\?"):
        distiller(retinanet(), retinanet(), distill=dict(own=dict(type='OwnTerm', heads=['bbox_head.positive'])))
