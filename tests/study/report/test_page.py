"""The page of a made-up study, read as text."""
import json
import re
from html.parser import HTMLParser

import pytest

from kd_det.study.report.page import choose_inks, render


class Outline(HTMLParser):
    """Notes which elements are opened and closed, and what they refer to."""
    EMPTY = {'meta', 'link', 'input', 'img', 'br', 'use', 'path', 'rect'}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.attributes, self.faults = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in self.EMPTY:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))


def test_a_page_is_whole_and_refers_to_nothing_outside(synthetic_study):
    page = render([synthetic_study(), synthetic_study(name='another')])
    outline = Outline(page)
    assert not outline.open and not outline.faults
    references = [value for _, attributes in outline.attributes for name, value in attributes.items()
                  if name in ('src', 'href', 'xlink:href')]
    assert references and all(value.startswith(('data:', '#')) for value in references)
    assert not re.search(r'@import|url\((?!#|\$)', page)
    assert all(attributes.get('alt') for tag, attributes in outline.attributes if tag == 'img')
    labels = {attributes['for'] for tag, attributes in outline.attributes if tag == 'label'}
    assert labels == {attributes['id'] for tag, attributes in outline.attributes
                      if tag in ('select', 'input')}  # every switch has its label, over both studies
    assert len(labels) == 4


def test_names_are_shown_as_they_are_written(synthetic_study):
    page = render([synthetic_study(methods=('<b>"kd" & co</b>', ))])
    assert '<b>"kd"' not in page and '&lt;b&gt;&#34;kd&#34; &amp; co&lt;/b&gt;' in page


def test_verdict_table_and_notes_are_on_the_page(synthetic_study):
    study = synthetic_study(methods=('fgd', ))
    page = render([study])
    assert study['verdict'] in page and 'fgd (+4.5 mAP' in study['verdict']
    assert '<th scope="row"><span>fgd</span></th>' in page and '35.5 ± 1.5' in page and 'A note.' in page


def test_what_remains_of_a_gain_is_plotted_against_the_epochs(synthetic_study):
    gains = {'fgd': {length: dict(difference=4.0 - length / 12, interval=interval)
                     for length, interval in ((12, (2.0, 4.0)), (24, None))}}
    page = render([dict(synthetic_study(methods=('fgd', )), lengths=gains)])
    section = page[page.index('What remains when all train longer'):]
    section = section[:section.index('</section>')]
    assert 'data-series="fgd"' in section and '>24</text>' in section and 'points of mAP' in section
    assert 'What remains' not in render([synthetic_study()])


def test_what_there_is_not_leaves_no_empty_section(synthetic_study):
    study = dict(synthetic_study(), images=[], maps={}, per_class=None, precision=None, table=None, statements=[],
                 terms={}, provenance={}, plain=None)
    page = render([study])
    for heading in ('Does it help?', 'All numbers', 'On images', 'Class by class', 'Precision and recall',
                    'How it was made'):
        assert heading not in page
    assert 'Learning curves' in page


def test_plots_follow_the_colours_of_the_page(synthetic_study):
    page = render([synthetic_study()])
    assert 'data-series="fgd"' in page and 'currentColor' in page
    assert not re.search('#010203|#040506|#070809|<metadata', page)


def test_numbers_that_are_not_finite_become_null(synthetic_study):
    """NaN is no JSON: a browser would read nothing of the page's data."""
    study = synthetic_study()
    study['maps']['fgd'][0]['attention'][0].update(low=float('nan'), high=float('inf'))
    study['curves']['validation mAP']['fgd'] = [{1: 1.0, 2: float('nan')}, {1: 2.0, 2: float('inf')}]
    text = re.search(r'<script type="application/json" class="data">(.*?)</script>', render([study]), re.S)[1]

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON.')

    level = json.loads(text, parse_constant=refuse)['maps']['fgd'][0]['attention'][0]
    assert level['low'] is None and level['high'] is None


def test_many_variants_look_different():
    variants = [f'method_{index}' for index in range(50)]
    assert len(set(choose_inks(['none', *variants, 'teacher'], 'none').values())) == 52


@pytest.mark.parametrize('validated, alone', [(True, False), (False, True)])
def test_a_curve_that_is_alone_fills_its_card(synthetic_study, validated, alone):
    study = synthetic_study()
    loss = {variant: [{1: 2.0, 2: 1.0}] for variant in study['variants']}
    study['curves'] = dict(loss=loss, **({'validation mAP': loss} if validated else {}))
    assert ('<div class="alone">' in render([study])) is alone


def test_every_section_of_curves_names_its_lines(synthetic_study):
    """A legend below the learning curves, and one below precision over recall, which has the teacher too."""
    page = render([synthetic_study(methods=('fgd', ))])
    assert page.count('data-choose="fgd"') == 2
    precision = page[page.index('Precision and recall'):]
    assert precision.index('</span>teacher</span>') < precision.index('data-choose="fgd"')


def test_features_are_compared_level_by_level(synthetic_study):
    columns = ['method', 'stride 8']
    fidelity = dict(columns=['method', 'cka'], rows=[dict(method='fgd', cka='0.500')], teacher={},
                    levels=dict(columns=columns, rows=[{'method': 'fgd', 'stride 8': '0.512 ± 0.003'}]))
    page = render([dict(synthetic_study(), fidelity=dict(val=fidelity))])
    assert '<th scope="col">stride 8</th>' in page and '<td>0.512 ± 0.003</td>' in page
