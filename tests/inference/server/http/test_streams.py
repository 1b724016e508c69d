"""Streams: comments while nothing is sent, and nothing after the end."""

import asyncio

import pytest

from inference.server.http import streams

_START, _BODY = 'http.response.start', 'http.response.body'


class _Updates:
  is_closed = False

  def close(self):
    self.is_closed = True


def _sent(make_events, *, ping_seconds, send=None):
  """Returns the messages of a stream; `make_events` gets their list."""
  messages, updates = [], _Updates()

  async def stream():
    async def receive():
      await asyncio.Event().wait()

    async def keep(message):
      messages.append(message)
      if send:
        await send(message)

    scope = {'type': 'http', 'asgi': {'spec_version': '2.0'}}
    await streams.EventStream(
      make_events(messages), updates, ping_seconds=ping_seconds
    )(scope, receive, keep)

  asyncio.run(stream())
  assert updates.is_closed
  assert [message['type'] for message in messages[:1]] == [_START]
  assert all(message['type'] == _BODY for message in messages[1:])
  assert [m.get('more_body') for m in messages[1:]] == [
    *[True] * (len(messages) - 2), False
  ]  # fmt: skip
  return [message['body'] for message in messages[1:]]


def test_a_silent_stream_has_comments():
  async def events(messages):
    yield 'data: 1\n\n'
    while len(messages) < 5:  # two comments after the start and an event
      await asyncio.sleep(0.001)
    yield 'data: 2\n\n'

  found = _sent(events, ping_seconds=0.01)
  assert found[0] == b'data: 1\n\n'
  pings = found[1 : found.index(b'data: 2\n\n')]
  assert len(pings) >= 2
  assert set(pings) == {b': ping\n\n'}
  assert found[-1] == b''


def test_a_stream_that_waits_for_its_first_event_has_comments():
  async def events(messages):
    while len(messages) < 2:
      await asyncio.sleep(0.001)
    yield 'data: 1\n\n'

  assert _sent(events, ping_seconds=0.01)[0] == b': ping\n\n'


def test_a_stream_that_speaks_has_no_comments():
  async def events(_):
    for i in range(20):
      yield f'data: {i}\n\n'

  assert b': ping\n\n' not in _sent(events, ping_seconds=60.0)


def test_a_comment_never_splits_an_event_of_a_slow_reader():
  """While a message waits for its reader, none other is begun."""
  state = {'inside': 0, 'most': 0}

  async def slowly(_):
    state['inside'] += 1
    state['most'] = max(state['most'], state['inside'])
    await asyncio.sleep(0.02)
    state['inside'] -= 1

  async def events(_):
    for i in range(4):
      yield f'data: {i}\n\n'
      await asyncio.sleep(0.02)

  found = _sent(events, ping_seconds=0.005, send=slowly)
  assert [each for each in found if each.startswith(b'data')] == [
    f'data: {i}\n\n'.encode() for i in range(4)
  ]
  assert state['most'] == 1


def test_an_error_of_the_stream_ends_the_comments():
  async def events(_):
    yield 'data: 1\n\n'
    raise RuntimeError('lost')

  with pytest.raises(RuntimeError, match='lost'):
    _sent(events, ping_seconds=0.01)
