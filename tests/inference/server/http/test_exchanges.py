"""The exchange: seen by all code that runs for a request, ended once."""

import asyncio
import contextvars
import threading

from inference.server.http import exchanges


def _run(app, headers=()):
  """Runs an app within the middleware; returns what it has sent."""
  sent = []

  async def send(message):
    sent.append(message)

  scope = {
    'type': 'http',
    'headers': list(headers),
    'state': {'request_id': 'req_12ab', 'principal': 'alice', 'key': 'hers'},
  }
  whole = exchanges.Exchanges(exchanges.Ends(app))
  asyncio.run(whole(scope, None, send))
  return sent


def test_threads_and_tasks_see_the_exchange():
  seen = []

  def look():
    seen.append(exchanges.current())

  async def app(scope, receive, send):
    look()
    await asyncio.create_task(asyncio.to_thread(look))
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: context.run(look))
    thread.start()
    thread.join()

  _run(app, [(exchanges.CONVERSATION, b'talk')])
  assert len(set(seen)) == 1
  (exchange, *_) = seen
  assert exchange.request_id == 'req_12ab'
  assert exchange.answer_id('cmpl-') == 'cmpl-12ab'
  assert (exchange.principal, exchange.conversation) == ('alice', 'talk')
  assert exchange.key == 'hers'


def test_it_ends_whatever_ends_the_app():
  ended = []

  async def app(scope, receive, send):
    exchanges.current().at_end(lambda: ended.append(1))
    raise RuntimeError

  try:
    _run(app)
  except RuntimeError:
    ended.append(2)
  assert ended == [1, 2]


def test_what_comes_after_the_end_is_called_at_once():
  """A thread still works for a client that has left."""
  kept, ended = [], []

  async def app(scope, receive, send):
    kept.append(exchanges.current())

  _run(app)
  kept[0].at_end(lambda: ended.append(1))
  assert ended == [1]
  # Outside of any request nothing would end it.
  exchanges.current().at_end(lambda: ended.append(2))
  assert ended == [1, 2]


def test_headers_are_added_to_the_answer():
  async def app(scope, receive, send):
    exchanges.current().answer_headers[b'x-a'] = b'1'
    exchanges.current().limit_headers['x-c'] = '3'
    await send({'type': 'http.response.start', 'headers': [(b'x-b', b'2')]})

  (start,) = _run(app)
  assert start['headers'] == [
    (b'x-b', b'2'),
    (b'x-a', b'1'),
    (b'x-request-id', b'req_12ab'),
    (b'x-c', b'3'),
  ]
