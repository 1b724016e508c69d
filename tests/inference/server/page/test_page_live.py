"""The page with the real server and a tiny model."""

import time

from prometheus_client import parser
import pytest

from tests.helpers.serving import browsers, servers


@pytest.fixture(scope='module')
def page(served):
  with browsers.chromium() as driver:
    yield browsers.Page(driver, served.url)


def _num_ended(served):
  text = served.generator.engine.metrics.text().decode()
  return sum(
    sample.value
    for family in parser.text_string_to_metric_families(text)
    for sample in family.samples
    if sample.name.endswith('finished_total')
  )


def test_it_talks_rates_and_shows_the_status(page, served):
  num_before = _num_ended(served)  # the engine has served other tests
  page.load()
  page.width(1280)
  page.find('#max_tokens').send_keys('5')
  page.find('#temperature').send_keys('0')
  page.ask('Hello')
  figures = page.text('.assistant .figures-line')
  assert 'FLOP' in figures
  assert 'Context: ' in page.text('#context-text')
  assert 'tokens are sent again' in page.text('#context-text')
  page.button('Thumbs up').click()
  servers.until(lambda: page.find('[aria-pressed="true"]'))
  before = page.answers()
  page.button('Regenerate').click()
  servers.until(lambda: not page.find('[aria-pressed="true"]'))
  servers.until(lambda: page.answers())
  assert page.answers() == before  # greedy
  page.button('Status').click()
  ended = f'{num_before + 2:,.0f} ended since start'
  servers.until(lambda: ended in page.text('#figures'))
  assert servers.MODEL in page.text('#models')
  digest = served.generator.frozen.manifest.weights_digest
  assert digest in page.text('#models')
  assert not page.complaints()


def test_stop_ends_the_work_of_the_engine(page, served, monkeypatch):
  engine = served.generator.engine
  step = engine.step

  def slow_step():
    time.sleep(0.2)
    return step()

  monkeypatch.setattr(engine, 'step', slow_step)
  page.load()
  page.find('#max_tokens').send_keys('40')
  num = engine.metrics.value('finished_total', reason='cancelled')
  page.send('Hello')
  servers.until(lambda: page.find('#stop'))
  servers.until(lambda: engine.has_work)
  page.find('#stop').click()
  servers.until(lambda: page.find('#send'))
  servers.until(lambda: not engine.has_work)
  assert engine.metrics.value('finished_total', reason='cancelled') == num + 1
