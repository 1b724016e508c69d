"""The page with the real server and a tiny model."""

import time

import pytest

from tests.helpers import browsers, servers


@pytest.fixture(scope='module')
def page(served):
  with browsers.chromium() as driver:
    yield browsers.Page(driver, served.url)


def test_it_talks_rates_and_shows_the_status(page, served):
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
  servers.until(lambda: '2 ended since start' in page.text('#figures'))
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
