"""``kd-det methods --for``: which methods fit a student and a teacher, and what is told of them."""
import json

import pytest

from benchmarks.measurements import collect
from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.config.fitting import find_fitting
from kd_det.config.methods import MEASURED


@pytest.fixture
def files(run_config, detector_config, tmp_path):
    """Writes configs of detectors of these kinds, and returns their names."""

    def write(*kinds) -> list[str]:
        for kind in kinds:
            run_config(detector_config(kind)).dump(tmp_path / f'{kind}.py')
        return [str(tmp_path / f'{kind}.py') for kind in kinds]

    return write


def test_what_is_told_of_measurements_is_in_the_records():
    assert json.loads(MEASURED.read_text(encoding='utf-8')) == collect()


def test_methods_that_fit_are_ordered_by_what_they_gained(files):
    student, teacher = files('RetinaNet', 'Faster R-CNN')
    alone = find_fitting(student, methods=['pkd', 'kd', 'rm', 'ld', 'dkd'])
    assert [method.name for method in alone.methods] == ['kd', 'pkd', 'rm'] and alone.measured == 'RetinaNet'
    assert alone.is_own and alone.methods[0].gain == (5.4, 3.1, 7.7) and alone.methods[0].cost == 0.51
    assert 'no distributions' in alone.others['ld'] and 'no weights for one_stage' in alone.others['dkd']
    pair = find_fitting(student, teacher, ['pkd', 'kd'])
    assert [method.name for method in pair.methods] == ['pkd'] and "has no 'bbox_head'" in pair.others['kd']


def test_a_kind_that_was_not_measured_is_told_of_its_family_or_of_none(files):
    atss, fcos = files('ATSS', 'FCOS')
    of_family = find_fitting(atss, methods=['kd'])
    assert of_family.measured == 'RetinaNet' and not of_family.is_own and 'of this family' in of_family.caption
    unknown = find_fitting(fcos, methods=['pkd', 'fgd'])
    assert unknown.measured is None and [(each.name, each.gain) for each in unknown.methods] == [('fgd', None),
                                                                                                 ('pkd', None)]
    costs = json.loads(MEASURED.read_text(encoding='utf-8'))['costs']
    assert [each.cost for each in find_fitting(fcos, methods=['kd', 'fgd']).methods] == [
        costs['Faster R-CNN']['fgd'], costs['FCOS']['kd']]  # of its own kind, or else of any
    with pytest.raises(ConfigurationError, match='Nearest: fgd'):
        find_fitting(fcos, methods=['fgdd'])


def test_the_command_shows_what_fits_and_why_others_do_not(files, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    student, = files('RetinaNet')
    assert main(['methods', '--for', student, 'pkd', 'dkd']) == 0
    shown = capsys.readouterr().out
    assert '+4.9 (+3.0 to +6.8)' in shown and 'dkd: The method' in shown and 'slim and briefly trained' in shown
    assert main(['methods', '--teacher', student]) == 2 and '--for STUDENT_CONFIG' in capsys.readouterr().err
