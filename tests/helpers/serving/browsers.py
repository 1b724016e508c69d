"""Headless Chromium, for tests of the page."""

import contextlib
import os
import shutil
import tempfile

import pytest

from tests.helpers.serving import servers

# Keys, by their code points in the WebDriver standard.
NULL, TAB, ENTER, SHIFT, ESCAPE = (
  '\ue000',
  '\ue004',
  '\ue007',
  '\ue008',
  '\ue00c',
)
_CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
_DRIVER = shutil.which('chromedriver')
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
  pytest.importorskip('selenium', reason='requirements-dev.txt')
  if not (_CHROMIUM and _DRIVER):
    pytest.skip('needs chromium and chromedriver on the PATH')
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = _CHROMIUM
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
    service = webdriver.ChromeService(_DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
      yield driver
    finally:
      driver.quit()


def _without_sandbox() -> list[str]:
  return ['--no-sandbox'] if os.geteuid() == 0 else []


class Page:
  """The page in a browser, by the ids and words that it shows."""

  def __init__(self, driver, url: str):
    self.driver, self.url = driver, url

  def load(self) -> None:
    """Opens the page, without what it kept of an earlier test."""
    self.driver.get(self.url)
    self.script('sessionStorage.clear(); localStorage.clear()')
    self.reload()

  def reload(self) -> None:
    """Loads the page again."""
    self.driver.get('about:blank')
    self.driver.get_log('browser')
    self.driver.get(self.url)

  def script(self, text: str, *args):
    """Returns what a function body returns."""
    return self.driver.execute_script(text, *args)

  def find(self, selector: str):
    """Returns the first element of a selector, or None."""
    found = self.all(selector)
    return found[0] if found else None

  def all(self, selector: str) -> list:
    """Returns the elements of a selector that are shown."""
    # In one step: an element may be replaced between two.
    return self.script(
      """
      return [...document.querySelectorAll(arguments[0])].filter(
        (each) => each.checkVisibility() && each.getClientRects().length);
      """,
      selector,
    )

  def button(self, name: str):
    """Returns the last shown button with these words, or None."""
    return self.script(
      """
      return [...document.querySelectorAll('button')].findLast((each) =>
        each.checkVisibility() && each.textContent.trim() === arguments[0]);
      """,
      name,
    )

  def text(self, selector: str) -> str:
    """Returns the text of an element, shown or not."""
    return self.script(
      'return document.querySelector(arguments[0]).textContent', selector
    )

  def wait_until_ready(self) -> None:
    """Waits until a message can be sent: no answer runs, the model is here."""
    servers.until(lambda: self.find('#send:enabled'))

  def send(self, text: str) -> None:
    """Types a message and presses Enter, once the page is ready."""
    self.wait_until_ready()
    self.find('#composer-text').send_keys(text, '\n')

  def answers(self) -> list[str]:
    """Returns the texts of the answers that are finished."""
    return self.script("""
      return [...document.querySelectorAll(
        '.turn.assistant[aria-busy="false"] .answer')]
        .map((each) => each.innerText);
    """)

  def ask(self, text: str) -> str:
    """Sends a message and returns its answer."""
    num = len(self.answers())
    self.send(text)
    servers.until(lambda: len(self.answers()) > num)
    return self.answers()[-1]

  def width(self, pixels: int, height: int = 800) -> None:
    """Sets the width of the page; below 500 as a phone has it."""
    self.driver.execute_cdp_cmd(
      'Emulation.setDeviceMetricsOverride',
      {
        'width': pixels,
        'height': height,
        'deviceScaleFactor': 1,
        'mobile': pixels < 500,
      },
    )

  def prefer(self, **features: str) -> None:
    """Sets media features, as prefers_color_scheme='dark'."""
    self.driver.execute_cdp_cmd(
      'Emulation.setEmulatedMedia',
      {
        'features': [
          {'name': name.replace('_', '-'), 'value': value}
          for name, value in features.items()
        ]
      },
    )

  def complaints(self) -> list[str]:
    """Returns what the browser logged, as of its security policy."""
    return [
      entry['message']
      for entry in self.driver.get_log('browser')
      if entry['source'] != 'network'  # an error status is logged, too
    ]
