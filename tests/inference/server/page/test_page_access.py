"""The page is for everybody: names, contrast, keyboard, width, motion."""

import pytest

from tests.helpers.serving import browsers, fake_server, servers

# Returns selector and contrast of each shown text below the ratio of WCAG AA.
_CONTRAST = """
  const canvas = document.createElement('canvas').getContext('2d', {
    willReadFrequently: true,
  });
  const rgba = (color, under = [255, 255, 255]) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = `rgb(${under.join(',')})`;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (color) => {
    const [r, g, b] = color.map((part) => {
      const x = part / 255;
      return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(e);
    return chain.reduce(
      (color, e) => rgba(getComputedStyle(e).backgroundColor, color),
      [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const hasText = [...element.childNodes].some(
      (child) => child.nodeType === 3 && child.data.trim());
    const isField = element.matches('input, textarea, select');
    if (!(hasText || isField) || !element.checkVisibility()) continue;
    if (element.disabled || element.closest('.sr')) continue;
    const below = under(element);
    const kinds = isField ? [null, '::placeholder'] : [null];
    for (const kind of kinds) {
      const text = rgba(getComputedStyle(element, kind).color, below);
      const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) {
        found.push([element.tagName, element.id, element.className,
          element.textContent.slice(0, 30), ratio]);
      }
    }
  }
  return found;
"""

# Returns the controls that a screen reader could not name.
_NAMELESS = """
  return [...document.querySelectorAll(
    'button, input, select, textarea, summary, [role=meter], a')]
    .filter((control) => {
      const by = (control.getAttribute('aria-labelledby') ?? '').split(' ')
        .map((id) => document.getElementById(id)?.textContent ?? '').join('');
      const label = [...(control.labels ?? [])]
        .map((each) => each.textContent).join('');
      return !(by + label + (control.getAttribute('aria-label') ?? '') +
        (control.matches('input, select, textarea')
          ? '' : control.textContent)).trim();
    })
    .map((control) => control.outerHTML);
"""


def _fill(page, fake):
  """Makes the page show all that it can show."""
  text = '# Title\n\n> quote\n\n- `code` **bold**\n\n```py\nx = 1\n```'
  reply = fake_server.said(text, read=850)
  call = {'index': 0, 'id': 'c', 'function': {'name': 'f', 'arguments': '{}'}}
  fake.replies += [
    [fake_server.delta(reasoning_content='why'), *reply],
    [
      fake_server.delta(tool_calls=[call]),
      fake_server.ended('tool_calls'),
      fake_server.usage(850, 3),
    ],
    fake_server.Refused(429),
  ]
  page.ask('Hello?')
  page.button('Thumbs down').click()
  servers.until(lambda: page.find('form.better'))
  page.send('Call')
  servers.until(lambda: page.find('.calls form'))
  page.script('document.querySelectorAll("details").forEach(d => d.open = 1)')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_text_has_contrast(page, fake, scheme):
  page.prefer(prefers_color_scheme=scheme)
  assert page.script(_CONTRAST) == []
  _fill(page, fake)
  assert page.script(_CONTRAST) == []
  page.send('Busy')
  servers.until(lambda: page.find('#problem'))
  assert page.script(_CONTRAST) == []
  page.button('Edit').click()
  assert page.script(_CONTRAST) == []
  page.button('Status').click()
  servers.until(lambda: page.find('.figure'))
  assert page.script(_CONTRAST) == []
  page.button('Key').click()
  assert page.script(_CONTRAST) == []
  page.button('Cancel').click()


def test_the_check_of_contrast_finds_what_is_too_faint(page):
  page.script('document.querySelector("#about").style.color = "#bbb"')
  servers.until(lambda: page.text('#about'))
  assert [each[1] for each in page.script(_CONTRAST)] == ['about']


def test_every_control_has_a_name(page, fake):
  _fill(page, fake)
  page.button('Status').click()
  servers.until(lambda: page.find('.figure'))
  assert page.script(_NAMELESS) == []
  page.script('document.querySelector("[for=seed]").remove()')
  assert len(page.script(_NAMELESS)) == 1


def test_landmarks_and_headings_are_an_outline(page, fake):
  _fill(page, fake)
  assert page.script('return document.documentElement.lang') == 'en'
  for tag in ('header', 'main', 'nav[aria-label]', 'aside[aria-labelledby]'):
    assert len(page.all(tag)) == 1
  levels = page.script("""
    return [...document.querySelectorAll('h1, h2, h3, h4')]
      .filter((each) => each.checkVisibility())
      .map((each) => Number(each.tagName[1]));
  """)
  assert levels[0] == 1
  assert levels.count(1) == 1
  assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
  ids = page.script(
    'return [...document.querySelectorAll("[id]")].map((e) => e.id)'
  )
  assert len(set(ids)) == len(ids)


def test_tokens_are_not_read_aloud_one_by_one(page, fake):
  reply = fake_server.said('A long answer')
  fake.replies.append([*reply[:3], 0.5, *reply[3:]])
  page.send('Hello?')
  servers.until(lambda: 'A lo' in page.text('#turns'))
  assert page.text('#said') == ''
  turn = page.find('.turn.assistant')
  assert turn.get_attribute('aria-busy') == 'true'
  live = page.script("""
    return document.querySelector('#turns').closest('[aria-live], [role=log]')
  """)
  assert live is None
  servers.until(lambda: page.text('#said').endswith(': A long answer'))
  assert page.find('#said').get_attribute('aria-live') == 'polite'


def test_the_keyboard_reaches_everything_in_order_and_shows_where(page, fake):
  page.ask('Hello?')
  page.script('document.querySelector(".skip").focus()')
  seen = ['Skip to the message box']
  for _ in range(40):
    page.driver.switch_to.active_element.send_keys(browsers.TAB)
    focused = page.script("""
      const e = document.activeElement;
      return [e.id || e.textContent.trim(), e === document.body,
        getComputedStyle(e).outlineStyle];
    """)
    if focused[1]:
      break
    assert focused[2] != 'none', focused
    seen.append(focused[0])
  expected = [
    'Skip to the message box', 'model', 'show-chat', 'show-status', 'open-key',
    'theme', 'Edit', 'Regenerate', 'Thumbs up', 'composer-text', 'send',
    'new-chat', 'temperature', 'Reset all',
  ]  # fmt: skip
  places = [seen.index(each) for each in expected]
  assert places == sorted(places)


@pytest.mark.parametrize('width', [360, 320, 768, 1280])
def test_no_width_scrolls_sideways(page, fake, width):
  page.width(width)
  page.reload()
  code = f'```\n{"x" * 300}\n```\n\n{"word" * 100}\n\n- {"y" * 200}'
  fake.replies.append(fake_server.said(code, read=900))
  page.send('w' * 200)
  servers.until(lambda: page.answers())
  page.script('document.querySelectorAll("details").forEach(d => d.open = 1)')
  wide = 'return document.documentElement.scrollWidth - innerWidth'
  assert page.script(wide) <= 0
  page.button('Status').click()
  servers.until(lambda: page.find('.figure'))
  assert page.script(wide) <= 0
  small = page.script("""
    return [...document.querySelectorAll('button')]
      .filter((each) => each.checkVisibility())
      .map((each) => [each.textContent, each.getBoundingClientRect()])
      .filter(([_, box]) => box.height < 24 || box.width < 24).length;
  """)
  assert small == 0  # WCAG 2.2, 2.5.8


def test_the_settings_are_folded_on_a_phone(page):
  page.width(360)
  page.reload()
  assert not page.find('#system')
  page.find('#settings summary').click()
  assert page.find('#system')


def test_the_theme_follows_the_system_unless_chosen(page):
  color = 'return getComputedStyle(document.body).backgroundColor'
  page.prefer(prefers_color_scheme='light')
  light = page.script(color)
  page.prefer(prefers_color_scheme='dark')
  dark = page.script(color)
  assert light != dark
  button = page.find('#theme')
  assert button.text == 'Theme: auto'
  button.click()
  assert (button.text, page.script(color)) == ('Theme: light', light)
  button.click()
  assert (button.text, page.script(color)) == ('Theme: dark', dark)
  page.prefer(prefers_color_scheme='light')
  page.reload()
  assert page.script(color) == dark


def test_nothing_moves_for_those_who_want_no_motion(page, fake):
  reply = fake_server.said('Late')
  name = """
    return getComputedStyle(
      document.querySelector('.waiting .answer'), '::after').animationName
  """
  for preference, animation in (
    ('no-preference', 'breathe'),
    ('reduce', 'none'),
  ):
    page.prefer(prefers_reduced_motion=preference)
    fake.replies.append([1, *reply])
    page.send('Hello?')
    servers.until(lambda: page.find('.waiting'))
    assert page.script(name) == animation
    servers.until(lambda: not page.find('.waiting'))


def test_the_status_shows_queue_pages_throughput_and_lineage(page, fake):
  fake.models = [fake_server.card('a'), fake_server.card('b')]
  page.reload()
  page.wait_until_ready()
  page.button('Status').click()
  servers.until(lambda: page.find('.figure'))
  text = page.text('#figures')
  for words in (
    '3 answers run now', '4 wait', '30 of the KV cache in use', '50 free',
    '0.50 s, mean since start', '9 ended since start', '7 stop', '1 refused',
  ):  # fmt: skip
    assert words in text
  # 100 tokens between two readings that are two seconds apart.
  servers.until(lambda: '0.0 tokens/s written' not in page.text('#figures'))
  (words,) = [
    text
    for text in page.script(
      'return [...document.querySelectorAll(".value")].map(e => e.innerText)'
    )
    if 'tokens/s' in text
  ]
  speed = float(words.split()[0])
  assert 5 < speed <= 51
  models = page.text('#models')
  assert models.count('2cb54fc9') == 2
  assert '134,515,008' in models


def test_the_status_tells_why_it_has_no_figures(page, fake):
  page.wait_until_ready()
  fake.key = 'some'
  page.button('Status').click()
  servers.until(lambda: page.find('#status-problem'))
  assert 'asks for an API key' in page.text('#status-problem')
  fake.key = None
  servers.until(lambda: not page.find('#status-problem'))
  assert page.find('.figure')
  page.button('Chat').click()
  assert page.find('#composer-text')
  assert not page.find('#status')
