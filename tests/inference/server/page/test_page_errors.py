"""What goes wrong is told in words, and nothing that was written is lost."""

import json

import pytest

from tests.helpers.serving import fake_server, servers

Refused = fake_server.Refused


def _problem(page):
  servers.until(lambda: page.find('#problem') or page.find('#key-dialog'))
  return page.text('#problem-text')


@pytest.mark.parametrize(
  ('reply', 'words'),
  [
    (Refused(429, retry_after=7), 'too many requests'),
    (Refused(429, retry_after=7), 'Try again in 7 s.'),
    (Refused(503, retry_after=3), 'takes no requests now. Try again in 3 s.'),
    (Refused(500), 'The server failed (500).'),
    (Refused(400), 'told by the server'),
  ],
)
def test_a_refusal_is_told_and_can_be_tried_again(page, fake, reply, words):
  fake.replies.append(reply)
  page.send('Keep this')
  assert words in _problem(page)
  assert page.answers() == []
  assert 'Keep this' in page.text('#turns')
  assert page.text('#cost') == ''
  if reply.status != 400:  # the same request would be refused again
    page.find('#retry').click()
    servers.until(lambda: page.answers() == ['Hello.'])
    assert not page.find('#problem')
    assert fake.asked[0] == fake.asked[1]
  else:
    assert not page.find('#retry')


def test_a_key_is_asked_for_and_stays_in_the_tab(page, fake):
  fake.key = 'right'
  page.reload()
  servers.until(lambda: page.find('#key-dialog'))
  assert page.text('#key-why').startswith('This server asks for an API key.')
  page.find('#key').send_keys('wrong\n')
  servers.until(lambda: 'does not know this key' in page.text('#key-why'))
  servers.until(lambda: page.find('#key-dialog'))
  page.find('#key').clear()
  page.find('#key').send_keys('right')
  page.button('Use this key').click()
  assert page.ask('Hello?') == 'Hello.'
  kept = page.script('return [{...sessionStorage}, {...localStorage}]')
  assert 'right' in kept[0].values()
  assert 'right' not in json.dumps(kept[1])
  assert page.driver.get_cookies() == []
  page.button('Key').click()
  page.button('Forget').click()
  page.send('Once more')
  servers.until(lambda: page.find('#key-dialog'))
  page.button('Cancel').click()


def test_a_stream_that_breaks_keeps_what_had_arrived(page, fake):
  reply = fake_server.said('Half of an answer')
  fake.replies.append([*reply[:3], 'cut'])
  page.send('Hello?')
  assert 'connection broke' in _problem(page)
  assert page.answers() == ['Half of'] or page.answers()[0].startswith('Half')
  assert 'broke off' in page.text('.assistant .figures-line')
  assert page.button('Thumbs up') is None
  page.find('#retry').click()
  servers.until(lambda: page.answers() == ['Hello.'])


def test_an_error_inside_a_stream_is_told(page, fake):
  error = {'error': {'message': 'the generation failed'}}
  fake.replies.append([*fake_server.said('Some')[:2], error])
  page.send('Hello?')
  assert 'ended with an error: the generation failed' in _problem(page)


def test_an_answer_at_its_limit_says_so(page, fake):
  reply = fake_server.said('Cut off')
  reply[-2] = fake_server.ended('length')
  fake.replies.append(reply)
  page.ask('Hello?')
  assert 'stopped at the limit of tokens' in page.text('.figures-line')


def test_a_server_that_is_gone_is_told(page, fake):
  page.wait_until_ready()
  page.driver.execute_cdp_cmd('Network.enable', {})
  network = {'latency': 0, 'downloadThroughput': -1, 'uploadThroughput': -1}
  offline = 'Network.emulateNetworkConditions'
  page.driver.execute_cdp_cmd(offline, {'offline': True, **network})
  try:
    page.send('Hello?')
    assert _problem(page).startswith('No connection to 127.0.0.1')
  finally:
    page.driver.execute_cdp_cmd(offline, {'offline': False, **network})
  page.find('#retry').click()
  servers.until(lambda: page.answers() == ['Hello.'])


def test_a_model_that_loads_is_waited_for(page, fake):
  fake.ready = 'compiling programs'
  page.reload()
  servers.until(lambda: page.find('#notice'))
  assert 'not ready yet: compiling programs' in page.text('#notice')
  box = page.find('#composer-text')
  box.send_keys('Early\n')
  assert not fake.asked
  assert box.get_attribute('value') == 'Early'
  fake.ready = 'ok'
  servers.until(lambda: not page.find('#notice'))
  page.find('#send').click()
  servers.until(lambda: page.answers() == ['Hello.'])
