"""What is asked of a head is parsed in one place, and stays the string that names it."""
import copy
import pickle

import pytest

from kd_det.heads import ROI_HEAD, HeadError, HeadRequest


@pytest.mark.parametrize('name, head, part', [('bbox_head', 'bbox_head', ''), ('roi_head', 'roi_head', ''),
                                              ('bbox_head.towers', 'bbox_head', 'towers'),
                                              ('rpn_head.positives', 'rpn_head', 'positives'),
                                              ('bbox_head.distributions', 'bbox_head', 'distributions'),
                                              ('bbox_head.queries', 'bbox_head', 'queries')])
def test_a_request_is_the_string_that_names_it(name, head, part):
    request = HeadRequest.parse(name)
    assert (request.head, request.part) == (head, part) and request == HeadRequest(head, part) == name
    assert HeadRequest.parse(request) is request
    assert {name: 1}[request] == 1 and {request: 1}[name] == 1 and repr(request) == repr(name)
    for other in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
        assert type(other) is HeadRequest and (other, other.head, other.part) == (name, head, part)
    assert (ROI_HEAD == request) == (name == 'roi_head')


@pytest.mark.parametrize('name, message', [
    ('bbox_head.tower', "'bbox_head.tower': no head has a part 'tower'. Parts are towers, positives, distributions, "
                        r"queries. Did you mean 'bbox_head.towers'\?"),
    ('bbox_head.masks', 'Parts are towers, positives, distributions, queries.$'),
    ('bbox_head.towers.positives', "no head has a part 'towers.positives'")])
def test_a_part_that_no_head_has(name, message):
    with pytest.raises(HeadError, match=message):
        HeadRequest.parse(name)
