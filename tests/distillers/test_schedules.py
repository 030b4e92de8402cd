"""The weight of a term: a number, or a schedule that follows the training."""
import pytest

from kd_det.context import Progress
from kd_det.distillers import build_schedule


def _at(config, *points):
    weight = build_schedule(config)
    return [weight(Progress(iteration=100 * epoch, epoch=epoch)) for epoch in points]


@pytest.mark.parametrize('config, expected', [
    (2, [2, 2, 2, 2]),
    (dict(type='Warmup', value=2.0, epochs=2), [0, 1, 2, 2]),
    (dict(type='Warmup', value=2.0, iterations=200, start=0.5), [1, 1.5, 2, 2]),
    (dict(type='Decay', value=2.0, epochs=2, begin=1), [2, 2, 1, 0]),
    (dict(type='Decay', value=2.0, epochs=1, end=0.25), [2, 0.5, 0.5, 0.5]),
    (dict(type='Stop', value=2.0, epochs=2), [2, 2, 0, 0]),
    (dict(type='Start', value=2.0, epochs=2), [0, 0, 2, 2]),
    (dict(type='Stop', value=dict(type='Warmup', value=2.0, epochs=2), epochs=3), [0, 1, 2, 0]),
])
def test_weight_at_epochs_0_to_3(config, expected):
    assert _at(config, 0, 1, 2, 3) == pytest.approx(expected)


@pytest.mark.parametrize('length, begin, iteration', [(0.2, 0.1, 3), (0.1, 0.2, 3), (0.7, 0.0, 7), (0.6, 0.3, 9)])
def test_fractions_of_an_epoch_end_where_they_say(length, begin, iteration):
    """Of ten iterations, although in floating point 0.3 - 0.1 is less than 0.2."""
    for kind, before in (('Stop', 2.0), ('Start', 0.0)):
        weight = build_schedule(dict(type=kind, value=2.0, epochs=length, begin=begin))
        found = [weight(Progress(iteration=each, epoch=each / 10)) for each in (iteration - 1, iteration)]
        assert found == [before, 2.0 - before]


def test_length_is_given_in_one_unit():
    for faulty in (dict(type='Stop', value=1.0), dict(type='Stop', value=1.0, epochs=1, iterations=2)):
        with pytest.raises(ValueError, match='either in epochs or in iterations'):
            build_schedule(faulty)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_are_finite(value):
    for config in (value, dict(type='Warmup', value=value, epochs=1), dict(type='Balance', ratio=value)):
        with pytest.raises(ValueError, match='expected a number of at least 0, or a schedule'):
            build_schedule(config)


def test_zero_throughout():
    assert build_schedule(0).is_zero and build_schedule(dict(type='Warmup', value=0, epochs=1)).is_zero
    assert not build_schedule(dict(type='Warmup', value=1, epochs=1)).is_zero


def test_a_schedule_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no 'Warmupp'. Nearest: Warmup"):
        build_schedule(dict(type='Warmupp', value=1.0, epochs=1))
