"""Requests that are handed on to a server, and answers that come back."""

import asyncio
import contextlib
import threading
import time

import fastapi
import httpx2
import pytest
import uvicorn

from inference.server.ray_serve import forwarding
from tests.helpers.serving import servers


@contextlib.contextmanager
def _running(app):
  """Yields the address of an ASGI application on a free loopback port."""
  # Without `log_config`: else uvicorn's loggers stay as it sets them, and tests
  # that read the log later in this process find nothing.
  config = uvicorn.Config(app, port=0, log_config=None, loop='asyncio')
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    while not server.started:
      time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f'http://127.0.0.1:{port}'
  finally:
    server.should_exit = True
    thread.join()


def _front(url):
  """Returns an application that hands all requests on to an address."""
  forwarder = forwarding.Forwarder(lambda: url)

  @contextlib.asynccontextmanager
  async def lifespan(app):
    yield
    await forwarder.close()

  app = fastapi.FastAPI(openapi_url=None, lifespan=lifespan)

  @app.api_route('/{path:path}', methods=list(forwarding.METHODS))
  async def forward(request: fastapi.Request) -> fastapi.Response:
    return await forwarder.forward(request)

  return app


@pytest.fixture(scope='module')
def front(served):
  with _running(_front(served.url)) as url:
    yield url


def test_answers_are_those_of_the_server(front, served):
  body = {**servers.GREEDY, 'prompt': 'A tale', 'max_tokens': 6}
  with httpx2.Client(timeout=60) as http:
    for method, path, sent in (
      ('GET', '/v1/capabilities', None),
      ('GET', '/v1/models/no%2Fsuch%20one?a=1&b=%26', None),
      ('POST', '/v1/completions', body),
      ('POST', '/v1/completions', {**body, 'temperature': 'x'}),
      ('DELETE', '/v1/models', None),
      ('GET', '/nope', None),
    ):
      direct, handed_on = (
        http.request(method, url + path, json=sent)
        for url in (served.url, front)
      )
      assert handed_on.status_code == direct.status_code
      names = 'content-type', 'allow', 'retry-after'
      for name in names:
        assert handed_on.headers.get(name) == direct.headers.get(name)
      direct, handed_on = direct.json(), handed_on.json()
      if 'choices' in direct:  # beside them are times, and ids of the answer
        direct, handed_on = (
          [choice['text'] for choice in each['choices']]
          for each in (direct, handed_on)
        )
      assert handed_on == direct


def test_a_stream_arrives_event_by_event(front):
  body = {
    **servers.GREEDY,
    'prompt': 'A tale',
    'max_tokens': 20,
    'stream': True,
  }
  with (
    httpx2.Client(timeout=60) as http,
    http.stream('POST', f'{front}/v1/completions', json=body) as answer,
  ):
    assert answer.status_code == 200, answer.read()
    assert answer.headers['content-type'].startswith('text/event-stream')
    lines = [line for line in answer.iter_lines() if line.startswith('data:')]
  assert lines[-1] == 'data: [DONE]'
  assert len(lines) > 5


def test_a_stream_is_not_kept_back():
  upstream, may_end = fastapi.FastAPI(), threading.Event()

  @upstream.get('/slow')
  def slow():
    def pieces():
      yield b'first'
      assert may_end.wait(60)
      yield b'last'

    return fastapi.responses.StreamingResponse(pieces())

  with (
    _running(upstream) as url,
    _running(_front(url)) as front,
    httpx2.stream('GET', f'{front}/slow', timeout=60) as answer,
  ):
    pieces = answer.iter_raw()
    assert next(pieces) == b'first'
    may_end.set()
    assert b''.join(pieces) == b'last'


def test_a_client_that_leaves_ends_the_request_at_the_server():
  upstream, has_ended = fastapi.FastAPI(), threading.Event()

  @upstream.get('/endless')
  async def endless():
    async def pieces():
      try:
        while True:
          yield b'piece'
          await asyncio.sleep(0.01)
      finally:
        has_ended.set()

    return fastapi.responses.StreamingResponse(pieces())

  with _running(upstream) as url, _running(_front(url)) as front:
    with httpx2.stream('GET', f'{front}/endless', timeout=60) as answer:
      pieces = answer.iter_raw()  # the answer is closed when this is collected
      assert all(next(pieces) for _ in range(20))
      assert not has_ended.is_set()
    assert has_ended.wait(30)


def test_headers_of_a_connection_are_not_handed_on():
  seen = {}
  upstream = fastapi.FastAPI()

  @upstream.post('/echo')
  async def echo(request: fastapi.Request):
    seen.update(request.headers)
    headers = {'Connection': 'X-Own', 'X-Own': 'a', 'X-Kept': 'b'}
    return fastapi.Response(await request.body(), headers=headers)

  with _running(upstream) as url, _running(_front(url)) as front:
    answer = httpx2.post(
      f'{front}/echo',
      content=iter([b'a body', b' in chunks']),
      headers={'Connection': 'X-Hop', 'X-Hop': '1', 'X-Key': '2'},
    )
  assert answer.content == b'a body in chunks'
  assert seen['x-key'] == '2'
  assert 'x-hop' not in seen
  assert answer.headers['x-kept'] == 'b'
  assert 'x-own' not in answer.headers
  assert len(answer.headers.get_list('date')) == 1


def test_without_a_server_the_answer_is_503():
  with _running(_front('http://127.0.0.1:1')) as front:
    answer = httpx2.get(f'{front}/v1/models')
  assert answer.status_code == 503
  assert answer.headers['retry-after'] == '1'
  assert answer.json()['error']['type'] == 'service_unavailable_error'
