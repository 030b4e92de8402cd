"""The published weights of the methods, where they differ between families of detectors."""
import re
from pathlib import Path

import pytest

from kd_det.config.choices import FAMILIES
from kd_det.config.composition import method_terms
from kd_det.config.methods import available_methods

DOCUMENTATION = Path(__file__).parents[2] / 'docs' / 'methods.md'


@pytest.mark.parametrize('method, two_stage, one_stage, anchor_free', [
    ('fgd', dict(temperature=0.5, alpha=5e-5, beta=2.5e-5, gamma=5e-5, lambda_=5e-7, levels=(0, 1, 2, 3)),
     dict(temperature=0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6),
     dict(temperature=0.8, alpha=1.6e-3, beta=8e-4, gamma=8e-4, lambda_=8e-6)),
    ('pkd', dict(weight=6.0, levels=4), *[dict(weight=10.0, levels=4)] * 2),
    ('cwd', *[dict(weight=10.0, temperature=1.0)] * 3),
    ('mgd', dict(weight=5e-7, ratio=0.45, levels=(0, 1, 2, 3)), *[dict(weight=2e-5, ratio=0.65)] * 2),
    ('defeat', *[dict(foreground_weight=3.0, background_weight=12.0)] * 3),
    ('fkd', dict(temperature=0.5, feature_weight=7e-5, pooling_weight=4e-3, relation_weight=7e-5),
     *[dict(temperature=0.1, feature_weight=4.2e-4, pooling_weight=2.4e-2, relation_weight=4.2e-4)] * 2),
    ('fgfi', *[dict(weight=0.01, normalizer='twice_mask')] * 2, None),
])
def test_method_has_the_published_weights_of_the_family(method, two_stage, one_stage, anchor_free):
    for family, expected in zip(FAMILIES, (two_stage, one_stage, anchor_free)):
        if expected is None:  # it needs anchors
            with pytest.raises(ValueError, match=f'no weights for {family}'):
                method_terms(method, family)
            continue
        (term, ) = method_terms(method, family).values()
        assert {key: term.get(key) for key in expected} == expected
        assert ('levels' in term) == ('levels' in expected)


def _warmed_up(two_stage: float, one_stage: float, anchor_free: float, **others) -> dict:
    values = dict(two_stage=two_stage, one_stage=one_stage, anchor_free=anchor_free)
    return {family: dict(weight=dict(type='mmdet.Warmup', value=value, iterations=500), **others)
            for family, value in values.items()}


@pytest.mark.parametrize('method, term, expected', [
    ('kd', 'kd', dict(two_stage=dict(type='mmdet.RoIClassification', form='plain', temperature=2.0),
                      **{family: dict(type='mmdet.DenseClassification', beta=0.0, temperature=1.0)
                         for family in ('one_stage', 'anchor_free')})),
    ('dkd', 'dkd', dict(two_stage=dict(form='decoupled', alpha=1.0, beta=0.25, temperature=1.0))),
    ('bckd', 'bckd_classes', {family: dict(beta=1.0, weight=1.0) for family in ('one_stage', 'anchor_free')}),
    ('bckd', 'bckd_boxes', {family: dict(weighting='gap', weight=4.0) for family in ('one_stage', 'anchor_free')}),
    ('ld', 'ld', dict(one_stage=dict(weighting='positives', weight=0.25, temperature=10.0, normalizer='none'))),
    ('ld', 'ld_valuable', dict(one_stage=dict(weighting='valuable', weight=0.25 * 4 / 16, temperature=10.0))),
    ('crosskd', 'crosskd', dict(one_stage=dict(remaining=1, beta=1.0, box_weight=1.0, distribution_weight=4.0,
                                               centerness_weight=1.0),
                                anchor_free=dict(remaining='half', weight=0.4, box_weight=0.75 / 0.4,
                                                 centerness_weight=0.0))),
    ('frs', 'frs_features', _warmed_up(0.002, 0.005, 0.01, adapter='conv3x3', normalizer='mask')),
    ('frs', 'frs_classes', _warmed_up(0.1, 0.02, 0.05, beta=0, weighting='richness')),
])
def test_method_that_reads_heads_has_the_published_weights(method, term, expected):
    assert set(available_methods()[method]) == set(expected)
    for family, arguments in expected.items():
        config = method_terms(method, family)[term]
        assert {key: config[key] for key in arguments} == arguments


def test_documentation_shows_methods_as_their_files_have_them():
    methods, shown = available_methods(), set()
    for snippet in re.findall(r'```python\n([a-z]\w* = .*?)```', DOCUMENTATION.read_text(encoding='utf-8'), re.DOTALL):
        values = {}
        exec(snippet, {}, values)
        for name in values.keys() & methods.keys():
            assert values[name] in [method_terms(name, family).to_dict() for family in methods[name]], name
            shown.add(name)
    assert shown == set(methods)
