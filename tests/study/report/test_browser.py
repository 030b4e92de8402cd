"""The page in headless Chromium, opened from disk; skipped where Chromium or playwright is not installed."""
import shutil

import pytest

from kd_det.study.report.page import render

playwright = pytest.importorskip('playwright.sync_api', reason="needs the extra 'browser'")
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
FLAGS = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page of studies from disk; all that goes wrong in it is in ``page.faults``."""

    def make(studies, width: int = 1280):
        file = tmp_path / 'report.html'
        file.write_text(render(studies), encoding='utf-8')
        page = browser.new_page(viewport=dict(width=width, height=844))
        page.set_default_timeout(20_000)
        page.faults = []
        page.on('console', lambda message: page.faults.append(message.text))
        page.on('pageerror', lambda error: page.faults.append(str(error)))
        page.on('request', lambda request: page.faults.append(request.url)
                if not request.url.startswith(('data:', file.as_uri())) else None)
        page.goto(file.as_uri(), wait_until='load')
        page.file = file
        return page

    return make


def count(page, selector: str) -> int:
    return page.locator(selector).count()


def test_it_opens_without_errors_and_every_image_loads(open_page, synthetic_study):
    page = open_page([synthetic_study()])
    assert count(page, '.panels img') == 4 and count(page, '.map-rows img') == (3 + 3) * 4
    page.wait_for_function('[...document.images].every(image => image.complete)')
    assert page.evaluate('[...document.images].every(image => image.naturalWidth > 0)')
    assert page.faults == []


def test_the_slider_hides_boxes_below_its_score_but_never_ground_truth(open_page, synthetic_study):
    page = open_page([synthetic_study()])
    slider, boxes = page.locator('input[type=range]'), '.panels figure:nth-child({}) rect'
    for score, left in ((0.05, 3), (0.3, 2), (0.5, 1), (0.95, 0)):
        slider.fill(str(score))
        assert [count(page, boxes.format(panel)) for panel in (1, 2, 3, 4)] == [2, left, left, left]
        assert page.locator('output').text_content() == f'{score:.2f}'
    slider.fill('0.05')
    assert count(page, boxes.format(2) + '.wrong') == 1
    slider.focus()
    page.keyboard.press('ArrowRight')
    assert page.locator('output').text_content() == '0.06'


def test_switches_change_method_image_and_study_by_themselves(open_page, synthetic_study):
    page = open_page([synthetic_study(), synthetic_study(name='another')])
    first, second = page.locator('.study').nth(0), page.locator('.study').nth(1)
    method, fourth = '<b>"kd" & co</b>', '.panels figcaption >> nth=3'
    assert first.locator(fourth).text_content().startswith(method)  # the one with the largest gain
    first.locator('select').select_option('fgd')
    assert first.locator(fourth).text_content().startswith('fgd')
    assert second.locator(fourth).text_content().startswith(method)
    assert first.locator('tr.on').get_attribute('data-row') == 'fgd'
    assert first.locator('[data-choose="none"]').first.is_disabled()  # the plain student is shown beside each
    first.locator(f"[data-choose='{method}']").first.click()
    assert first.locator('select').input_value() == method
    visible = first.locator('[data-method]:visible')
    assert {visible.nth(index).get_attribute('data-method') for index in range(visible.count())} == {method}
    before = first.locator('.panels img').first.get_attribute('src')
    first.locator('[data-image="1"]').click()
    assert first.locator('.panels img').first.get_attribute('src') != before
    assert first.locator('[data-image="1"]').get_attribute('aria-pressed') == 'true'
    assert first.locator('.map-rows p').count() == 0  # which would say that there are no masks
    assert page.faults == []


def test_on_a_phone_nothing_is_wider_than_the_screen(open_page, synthetic_study):
    methods = ('fgd', 'a_method_with_a_very_long_name@model.distill.fgd.temperature=0.8')
    note = f"There is no checkpoint '{'/a_folder' * 10}'."
    page = open_page([dict(synthetic_study(methods=methods), notes=[note])], width=390)
    for option in (0, 1):
        page.locator('select').select_option(index=option)
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
    columns = page.evaluate("getComputedStyle(document.querySelector('.panels')).gridTemplateColumns.split(' ').length")
    assert columns == 1


def test_a_table_that_is_wider_than_a_phone_says_so(open_page, synthetic_study):
    page = open_page([synthetic_study(methods=('fgd', 'kd@model.distill.kd.temperature=0.5'))], width=390)
    scroller, scroll = page.locator('.scroller').first, page.locator('.scroll').first
    scroller.and_(page.locator('.more')).wait_for()
    name = scroll.locator('tbody th').last
    assert name.bounding_box()['width'] < 390 / 3
    before = name.bounding_box()['x']
    scroll.evaluate('each => { each.scrollLeft = each.scrollWidth; }')
    page.wait_for_function("!document.querySelector('.scroller').classList.contains('more')")
    assert name.bounding_box()['x'] == before  # the column of names stays


@pytest.mark.parametrize('methods', [('fgd', 'kd'), [f'method_{index}' for index in range(8)]])
def test_the_chosen_variant_is_drawn_bold_and_others_fade(open_page, synthetic_study, methods):
    page = open_page([synthetic_study(methods=methods)])

    def drawn(variant):
        """Width and opacity of its line in each plot of curves and precision."""
        return page.evaluate("""variant => [...document.querySelectorAll('.grid:not(.still) [data-series]')]
            .filter(each => each.dataset.series === variant && each.querySelector(':scope > path'))
            .map(each => [getComputedStyle(each.querySelector(':scope > path')).strokeWidth,
                          Number(getComputedStyle(each).opacity)])""", variant)

    page.add_style_tag(content='* { transition: none !important; }')
    for find_images in methods[:2]:
        page.locator('select').select_option(find_images)
        other, = set(methods[:2]) - {find_images}
        plots = 1 + 2
        assert drawn(find_images) == [['3.2px', 1]] * plots
        assert all(width == '1.8px' and opacity == 1 for width, opacity in drawn('none'))
        faded = drawn(other)
        assert len(faded) == plots and all(width == '1.8px' and opacity <= 0.5 for width, opacity in faded)
        assert page.locator('.differences li.on').get_attribute('data-row') == find_images


def test_each_difference_lies_beside_its_name_and_on_the_axis(open_page, synthetic_study):
    page = open_page([synthetic_study(methods=('fgd', 'kd'))])
    centre = """selector => [...document.querySelectorAll(selector)].map(each => {
        const box = each.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })"""
    (mean, row), = page.evaluate(centre, '.differences [data-row="kd"] .mean')
    (_, name), (_, text) = (page.evaluate(centre, f'.differences [data-row="kd"] {each}')[0] for each in ('b', '.text'))
    assert abs(row - name) < 2 and abs(row - text) < 2
    (zero, _), = page.evaluate(centre, '.differences [data-row="kd"] .zero')
    ticks = {each: float(page.locator('.ticks i').nth(index).text_content()) for index, (each, _) in
             enumerate(page.evaluate(centre, '.ticks .strip i'))}
    (first, low), (last, high) = min(ticks.items()), max(ticks.items())
    assert low + (mean - first) / (last - first) * (high - low) == pytest.approx(9.0, abs=0.1)
    assert low + (zero - first) / (last - first) * (high - low) == pytest.approx(0.0, abs=0.1)


def test_maps_of_a_student_that_diverged_are_a_note(open_page, synthetic_study):
    study = synthetic_study(methods=('fgd', ))
    attention = study['maps']['fgd'][0]['attention']
    attention[0].update(low=float('nan'), high=float('nan'))
    attention[1] = dict(stride=8, not_finite=5, low=0.0, high=1.0, source=attention[1]['source'])
    page = open_page([study])
    assert page.locator('.cells p').all_text_contents() == ['not finite'] * 3  # of teacher, plain and distilled student
    assert page.locator('.levels figcaption', has_text='5 cells are not finite').count() == 3
    assert count(page, '.panels img') == 4 and page.faults == []


def test_fifty_images_stay_small_and_open_quickly(open_page, synthetic_study):
    methods = [f'method_{index}' for index in range(6)]
    page = open_page([synthetic_study(images=50, methods=methods, width=480, height=360)])
    assert page.file.stat().st_size < 15e6
    session = page.context.new_cdp_session(page)
    session.send('Performance.enable')
    metrics = {each['name']: each['value'] for each in session.send('Performance.getMetrics')['metrics']}
    assert 0 < metrics['ProcessTime'] < 2  # of a processor, in seconds: what else runs on the machine does not count
    assert count(page, '.picker img') == 50 and page.faults == []


def test_runs_without_images_or_a_plain_student_have_a_page_too(open_page, synthetic_study):
    study = dict(synthetic_study(), images=[], maps={}, per_class=None, precision=None, table=None, statements=[],
                 plain=None)
    page = open_page([study])
    page.locator('select').select_option('fgd')
    assert page.locator('[data-method="fgd"]').first.is_visible() and page.faults == []
