"""A server with the page and scripted answers, for tests in a browser.

The answers have the shapes of the API. A test chooses what a model would say,
and when, and how the server fails.
"""

import asyncio
import collections
import contextlib
import json
import threading
from typing import Any

import fastapi
from fastapi import responses
import uvicorn

from inference.server.http import page_files
from tests.helpers.serving import servers

MODEL = 'tiny-llama'
METRICS = """\
# HELP running Sequences that have a slot.
# TYPE running gauge
running{model="a"} 2.0
running{model="b"} 1.0
waiting 4.0
kv_pages_used 30.0
kv_pages_idle 20.0
kv_pages_free 50.0
sampled_tokens_total %d
finished_total{reason="stop"} 7.0
finished_total{reason="length"} 2.0
refused_total{reason="queue"} 1.0
time_to_first_token_seconds_sum 5.0
time_to_first_token_seconds_count 10.0
"""


def card(name: str = MODEL, *, context: int = 1000) -> dict[str, Any]:
  """Returns an entry of /v1/models."""
  return {
    'id': name,
    'object': 'model',
    'max_model_len': context,
    'lineage': {'weights_digest': '2cb54fc9', 'num_params': 134_515_008},
  }


class Fake:
  """What the server answers, and what it was asked."""

  def __init__(self):
    self.reset()

  def reset(self) -> None:
    """Forgets the script and the requests of the test before."""
    # Chunks to send, an error to answer, or functions that make one of both.
    self.replies: collections.deque[Any] = collections.deque()
    self.models = [card()]
    self.prices = {'prompt': 0, 'cached': 0, 'completion': 0}
    self.key: str | None = None
    self.ready = 'ok'
    self.feedback_status = 200
    self.asked: list[dict[str, Any]] = []
    self.rated: list[dict[str, Any]] = []
    self.deleted: list[str] = []
    self.num_left = 0  # streams whose client has gone
    self.tokens = 0  # in the metrics


class Refused(Exception):
  """An error of the API, as a reply of the script."""

  def __init__(self, status: int, code: str | None = None, retry_after=None):
    self.status, self.code, self.retry_after = status, code, retry_after

  def response(self) -> responses.Response:
    """Returns the answer."""
    headers = {'retry-after': str(self.retry_after)} if self.retry_after else {}
    error = {'message': 'told by the server', 'code': self.code}
    return responses.JSONResponse({'error': error}, self.status, headers)


def delta(**fields: Any) -> dict[str, Any]:
  """Returns a chunk of a stream."""
  return {'choices': [{'index': 0, 'delta': fields, 'finish_reason': None}]}


def ended(reason: str = 'stop', *, flops: float = 2e9) -> dict[str, Any]:
  """Returns the last chunk of a choice."""
  choice = {'index': 0, 'delta': {}, 'finish_reason': reason}
  return {'choices': [{**choice, 'accounting': {'flops': flops}}]}


def usage(read: int, written: int, cached: int = 0) -> dict[str, Any]:
  """Returns the chunk with the number of tokens."""
  counts = {
    'prompt_tokens': read,
    'completion_tokens': written,
    'total_tokens': read + written,
    'prompt_tokens_details': {'cached_tokens': cached},
  }
  return {'choices': [], 'usage': counts}


def said(text: str, *, read: int = 12, cached: int = 0) -> list[Any]:
  """Returns the chunks of an answer."""
  pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
  return [
    delta(role='assistant', content=''),
    *(delta(content=piece) for piece in pieces),
    ended(),
    usage(read, len(pieces), cached),
  ]


def create(fake: Fake) -> fastapi.FastAPI:
  """Returns the app."""
  app = fastapi.FastAPI()
  app.add_middleware(page_files.PageFiles)
  app.exception_handler(Refused)(lambda _, error: error.response())

  def check(request: fastapi.Request) -> None:
    sent = request.headers.get('authorization')
    if fake.key is not None and sent != f'Bearer {fake.key}':
      raise Refused(401, 'invalid_api_key')

  @app.get('/ready')
  async def ready():
    is_ok = fake.ready == 'ok'
    return responses.JSONResponse({'status': fake.ready}, 200 if is_ok else 503)

  @app.get('/v1/models')
  async def models(request: fastapi.Request):
    check(request)
    return {'data': fake.models}

  @app.get('/v1/prices')
  async def prices():
    return {'per_tokens': 1_000_000, **fake.prices}

  @app.get('/metrics')
  async def metrics(request: fastapi.Request):
    check(request)
    fake.tokens += 100
    return responses.PlainTextResponse(METRICS % fake.tokens)

  @app.post('/v1/chat/completions')
  async def chat(request: fastapi.Request):
    check(request)
    fake.asked.append(await request.json())
    reply = fake.replies.popleft() if fake.replies else said('Hello.')
    if isinstance(reply, Refused):
      raise reply
    return responses.StreamingResponse(
      _stream(fake, reply), media_type='text/event-stream'
    )

  @app.post('/v1/feedback')
  async def feedback(request: fastapi.Request):
    check(request)
    if fake.feedback_status != 200:
      raise Refused(fake.feedback_status)
    fake.rated.append(await request.json())
    return {'id': f'fb_{len(fake.rated)}', 'object': 'feedback'}

  @app.delete('/v1/feedback/{name}')
  async def delete(name: str):
    fake.deleted.append(name)
    return {'id': name, 'deleted': True}

  return app


async def _stream(fake: Fake, reply: list[Any]):
  """Sends chunks; a number waits, 'cut' ends without [DONE]."""
  head = {'id': f'chatcmpl-{len(fake.asked)}', 'object': 'x'}
  try:
    for chunk in reply:
      if chunk == 'cut':
        return
      if isinstance(chunk, int | float):
        await asyncio.sleep(chunk)
        continue
      data = f'data: {json.dumps({**head, **chunk}, ensure_ascii=False)}\n\n'
      yield data.encode()
      await asyncio.sleep(0.001)
    yield b'data: [DONE]\n\n'
  except asyncio.CancelledError:
    fake.num_left += 1
    raise


@contextlib.contextmanager
def running(fake: Fake):
  """Serves on a free loopback port; yields the base URL."""
  config = uvicorn.Config(
    create(fake), port=0, log_config=None, lifespan='off', ws='none'
  )
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    servers.until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f'http://127.0.0.1:{port}'
  finally:
    server.should_exit = server.force_exit = True
    thread.join(timeout=60)
