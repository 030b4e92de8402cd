"""Arguments are refused by name and value, with what would fit."""
import pytest
import torch

from kd_det.config.arguments import check_choice, check_flags, check_number, check_weights, split_sides


def test_a_misspelt_choice_gets_the_nearest():
    check_choice('form', 'giou', ('giou', 'bounded'))
    with pytest.raises(ValueError, match=r"^form='bound': expected one of giou, bounded\. Nearest: bounded\.$"):
        check_choice('form', 'bound', ('giou', 'bounded'))


@pytest.mark.parametrize('value', [None, 1, ['giou'], torch.zeros(2)])
def test_a_choice_is_a_word(value):
    with pytest.raises(ValueError, match=r'^form=.*: expected one of giou, bounded\.$'):
        check_choice('form', value, ('giou', 'bounded'))


@pytest.mark.parametrize(('value', 'limits', 'expected'), [
    (0, dict(above=0), 'a number above 0.'),
    (float('nan'), dict(above=0), 'a number above 0.'),
    (float('inf'), dict(), 'a number.'),
    ('0.5', dict(), 'a number.'),
    (None, dict(), 'a number.'),
    (True, dict(), 'a number.'),
    (1.5, dict(most=1, least=0), 'a number of at least 0 and of at most 1.'),
    (1, dict(least=0, below=1), 'a number of at least 0 and below 1.'),
    (1.0, dict(whole=True), 'an integer.'),
    (0, dict(least=1, whole=True), 'an integer of at least 1.'),
])
def test_a_number_out_of_its_range(value, limits, expected):
    with pytest.raises(ValueError) as error:
        check_number('size', value, **limits)
    assert str(error.value) == f'size={value!r}: expected {expected}'


def test_what_fits_passes():
    check_number('ratio', 0, least=0, below=1)
    check_number('ratio', 1e-9, above=0, most=1)
    check_number('layers', 1, least=1, whole=True)
    check_flags(resize=True, pad_aware=False)
    check_weights(alpha=0, beta=1e-3)


def test_flags_and_weights_by_their_names():
    with pytest.raises(ValueError, match=r"^pad_aware='False': expected True or False\.$"):
        check_flags(resize=True, pad_aware='False')
    with pytest.raises(ValueError, match=r'^beta=-0\.5: expected a number of at least 0\.$'):
        check_weights(alpha=1.0, beta=-0.5)


@pytest.mark.parametrize('value', [3, '', None, dict(student='neck'), dict(student='neck', teacher=1),
                                   dict(student='neck', teacher='neck', other='neck')])
def test_names_of_both_sides(value):
    assert split_sides('tap', 'neck') == ('neck', 'neck')
    assert split_sides('tap', dict(teacher='backbone', student='neck')) == ('neck', 'backbone')
    with pytest.raises(ValueError, match=r'^tap=.*: expected a name, or dict\(student=…, teacher=…\) of names\.$'):
        split_sides('tap', value)
