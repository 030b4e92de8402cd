"""What ``kd-det methods`` shows is in the methods' files."""
import pytest

from kd_det.config.composition import available_methods
from kd_det.config.detectors import DETECTORS, FAMILIES
from kd_det.config.files import ConfigurationError
from kd_det.config.methods import READS, catalogue, read_first_line


@pytest.fixture(scope='module')
def entries():
    return {entry.name: entry for entry in catalogue()}


@pytest.mark.parametrize('method', available_methods())
def test_every_file_of_a_method_says_what_it_is(method, entries):
    entry = entries[method]
    assert all(entry) and set(entry.families) <= set(FAMILIES) and set(entry.needs) <= set(READS.values())
    for file in available_methods()[method].values():
        assert read_first_line(file) == dict(paper=entry.paper, idea=entry.idea)


def test_entries_are_what_the_files_hold(entries):
    assert entries['fgd'].paper == 'arXiv 2111.11837' and entries['fgd'].families == FAMILIES[:3]
    assert entries['fsp'].paper == 'Yim et al., CVPR 2017' and entries['fsp'].needs == ('backbone features', )
    assert entries['dkd'].families == ('two_stage', ) and entries['dkd'].needs == ('RoI head', )
    assert entries['frs'].needs == ('neck features', 'dense head', 'RPN')  # for one-stage and for two-stage detectors
    assert entries['pgd'].needs == ('neck features', 'dense head')  # a mask reads the teacher's head alone
    assert entries['pkd'].families == FAMILIES  # two files: one family's, and all others'
    assert entries['querykd'].families == ('detr', ) and entries['querykd'].needs == ('queries', )
    assert entries['encoder'].needs == ('encoder features', 'queries')


def test_a_method_serves_the_detectors_whose_heads_have_what_its_terms_read(entries):
    assert entries['cwd'].detectors == tuple(DETECTORS)
    assert set(DETECTORS) - set(entries['fgd'].detectors) == {*entries['querykd'].detectors}  # the DETRs
    assert entries['dkd'].detectors == ('Faster R-CNN', 'Cascade R-CNN', 'Mask R-CNN')
    assert entries['ld'].detectors == ('GFL', )  # distributions
    assert entries['crosskd'].detectors == ('RetinaNet', 'ATSS', 'GFL', 'FCOS')  # towers
    assert {*DETECTORS} - {*entries['kd'].detectors} == {*entries['querykd'].detectors}
    assert {*entries['rm'].detectors} == {*entries['kd'].detectors} - {*entries['dkd'].detectors}  # positives
    assert 'FCOS' not in entries['fgfi'].detectors  # no weights for its family
    assert 'DETR' not in entries['fsp'].detectors and 'DINO' in entries['fsp'].detectors  # several levels


@pytest.mark.parametrize('text', ['', '"""FGD."""', '"""FGD (arXiv 2111.11837) for FCOS."""', 'fgd = dict()'])
def test_a_file_that_does_not_say_what_it_is_is_named(text, tmp_path):
    (tmp_path / 'fgd.py').write_text(text)
    with pytest.raises(ConfigurationError, match=r'fgd.py: its first line is .*expected the form NAME \(PAPER\): IDEA'):
        read_first_line(tmp_path / 'fgd.py')
