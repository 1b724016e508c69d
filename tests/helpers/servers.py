"""A real server on a free port, for tests of the HTTP API."""

from concurrent import futures
import contextlib
import json
import threading
import time
from typing import Any

from inference.server import (
  app as app_lib,
  engine_loop as engine_loop_lib,
  server_config,
)
from inference.server.http import listener

MODEL = 'tiny'
GREEDY = {'model': MODEL, 'temperature': 0.0, 'max_tokens': 8}
CHAT = {**GREEDY, 'messages': [{'role': 'user', 'content': 'hi'}]}


class Served:
  """A running server and its parts."""

  def __init__(self, url: str, engine_loop: engine_loop_lib.EngineLoop):
    self.url, self.engine_loop = url, engine_loop

  @property
  def generator(self) -> Any:
    return self.engine_loop.generator

  def offline(self, *args):
    """Returns what `generate` does, in the thread that owns the engine."""
    done = futures.Future()
    self.engine_loop._inbox.put(
      lambda: done.set_result(self.generator.generate(*args))
    )
    return done.result(timeout=60)

  def counted(self, name: str, **labels: str) -> float:
    """Returns a metric after the engine has finished its steps."""
    until(lambda: not self.generator.engine.has_work)
    return self.generator.engine.metrics.value(name, **labels)


@contextlib.contextmanager
def running(generator: Any, keys=None, *, records=None, **limits):
  """Serves on a free loopback port; yields a `Served` that is ready."""
  engine_loop = engine_loop_lib.EngineLoop(lambda: generator)
  manifest = generator.frozen.manifest
  config = server_config.ServerConfig(**limits)
  app = app_lib.create_app(
    engine_loop, manifest, MODEL, keys, config, records=records
  )
  with running_app(app, config) as url:
    until(lambda: engine_loop.state == engine_loop_lib.READY)
    yield Served(url, engine_loop)


@contextlib.contextmanager
def running_app(app, config=server_config.ServerConfig()):
  """Serves an app on a free loopback port; yields the base URL."""
  server = listener.Listener(
    app,
    config,
    end_requests=app.state.end_requests,
    host='127.0.0.1',
    port=0,
    log_config=None,
  )
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f'http://127.0.0.1:{port}'
  finally:
    server.should_exit = True
    thread.join(timeout=60)
  assert not thread.is_alive()


def until(condition, seconds=30):
  """Waits for a condition."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'gave up waiting'
    time.sleep(0.01)


def events(content: bytes) -> list[dict[str, Any]]:
  """Returns the events of a stream without the final [DONE]."""
  *texts, done, rest = content.split(b'\n\n')
  assert (done, rest) == (b'data: [DONE]', b'')
  return [json.loads(text.removeprefix(b'data: ')) for text in texts]
