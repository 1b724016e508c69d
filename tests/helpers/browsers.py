"""Headless Chromium, for tests of the page."""

import contextlib
import shutil
import tempfile

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
# Without these, the browser asks its maker for updates at every start.
_QUIET = (
  '--headless=new',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--no-proxy-server',
  '--disable-dev-shm-usage',
)


@contextlib.contextmanager
def chromium(*, width: int = 1280, height: int = 900):
  """Yields a driver of a new browser without history."""
  selenium = pytest.importorskip('selenium', reason='requirements-dev.txt')
  del selenium
  if not (CHROMIUM and DRIVER):
    pytest.skip('needs chromium and chromedriver on the PATH')
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  with tempfile.TemporaryDirectory(prefix='chromium_') as profile:
    for argument in (
      *_QUIET,
      f'--user-data-dir={profile}',
      f'--window-size={width},{height}',
      # Chromium refuses its sandbox to root, as whom containers run.
      *_without_sandbox(),
    ):
      options.add_argument(argument)
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
      yield driver
    finally:
      driver.quit()


def _without_sandbox() -> list[str]:
  import os

  return ['--no-sandbox'] if os.geteuid() == 0 else []
