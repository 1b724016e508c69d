"""A browser and a scripted server for each module."""

import pytest

from tests.helpers.serving import browsers, fake_server


@pytest.fixture(scope='module')
def driver():
  with browsers.chromium() as driver:
    yield driver


@pytest.fixture(scope='module')
def scripted():
  fake = fake_server.Fake()
  with fake_server.running(fake) as url:
    yield fake, url


@pytest.fixture
def fake(scripted):
  """The script of the server, empty."""
  fake, _ = scripted
  fake.reset()
  return fake


@pytest.fixture
def page(driver, scripted, fake):
  """The page, just opened, at the width of a desktop."""
  del fake  # reset before the page asks
  page = browsers.Page(driver, scripted[1])
  page.width(1280)
  page.prefer()
  page.load()
  yield page
  assert not page.complaints()
