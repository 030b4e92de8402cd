import pytest

from kd_det.study.results import paired_difference


def test_interval_is_students_t():
    """Differences 1, 2 and 3: mean 2, standard deviation 1; t with 2 degrees of freedom at 97.5 % is 4.303."""
    difference = paired_difference({0: 30.0, 1: 35.0, 2: 31.0}, {0: 31.0, 1: 37.0, 2: 34.0})
    assert difference.by_seed == {0: 1.0, 1: 2.0, 2: 3.0} and difference.mean == 2.0
    low, high = difference.interval
    assert high - 2 == 2 - low == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert difference.verdict == 'no difference shown'


@pytest.mark.parametrize('differences, verdict', [
    ((1.0, 1.1, 0.9), 'gain'),
    ((-1.0, -1.1, -0.9), 'loss'),
    ((1.0, -1.0, 0.5), 'no difference shown'),
    ((0.0, 0.0, 0.0), 'no difference shown'),
    ((9.0, ), 'one seed, no statement'),
])
def test_only_an_interval_without_zero_is_a_statement(differences, verdict):
    plain = {seed: 30.0 + seed for seed in range(3)}
    other = {seed: plain[seed] + difference for seed, difference in enumerate(differences)}
    assert paired_difference(plain, other).verdict == verdict


def test_pairing_takes_the_spread_of_seeds_away():
    """Seeds that differ by ten points do not hide a gain of one."""
    assert paired_difference({0: 20.0, 1: 30.0, 2: 40.0}, {0: 21.0, 1: 31.1, 2: 40.9}).verdict == 'gain'


def test_only_common_seeds_count():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 4.0, 2: 9.0}).by_seed == {1: 2.0}
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
