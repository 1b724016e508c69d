"""A real server on a free port, for tests of the HTTP API."""

from concurrent import futures
import contextlib
import json
import threading
import time
from typing import Any

from prometheus_client import parser

from inference.server import (
  app as app_lib,
  engine_loop as engine_loop_lib,
  server_config,
  service,
)
from inference.server.access import keys as keys_lib
from inference.server.http import listener
from inference.server.records import database

MODEL = 'tiny'
GREEDY = {'model': MODEL, 'temperature': 0.0, 'max_tokens': 8}
CHAT = {**GREEDY, 'messages': [{'role': 'user', 'content': 'hi'}]}


class Served:
  """A running server and its parts."""

  def __init__(self, url: str, engine_loop: engine_loop_lib.EngineLoop, app):
    self.url, self.engine_loop, self.app = url, engine_loop, app

  def stop(self) -> None:
    """Does what a signal to stop does."""
    self.app.state.listener.should_exit = True

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
def running(
  generator: Any,
  keys=None,
  *,
  records=None,
  app=None,
  has_door=False,
  **limits,
):
  """Serves on a free loopback port; yields a `Served` that is ready.

  Args:
    generator: answers under the name MODEL.
    keys: of the clients, besides those of the records.
    records: of the server; None: in memory.
    app: further arguments of `create_app`.
    has_door: whether a process answers probes, as that of serve.py.
    **limits: of the config.
  """
  engine_loop = engine_loop_lib.EngineLoop(lambda: generator)
  manifest = generator.frozen.manifest
  model = service.ServedModel(MODEL, engine_loop, manifest)
  config = server_config.ServerConfig(**limits)
  app = app_lib.create_app(
    [model], keys, config, records=records, **(app or {})
  )
  with running_app(app, config, has_door=has_door) as url:
    until(lambda: engine_loop.state == engine_loop_lib.READY)
    yield Served(url, engine_loop, app)


def with_admin() -> tuple[database.Database, dict[str, str]]:
  """Returns records in memory, and the headers of the only key in them."""
  records = database.Database(None, tables=app_lib.TABLES)
  made = records.submit(
    lambda connection: keys_lib.create(
      connection, name='operator', is_admin=True
    )
  )
  _, text = made.result()
  return records, {'authorization': f'Bearer {text}'}


@contextlib.contextmanager
def running_app(app, config=server_config.ServerConfig(), *, has_door=False):
  """Serves an app on a free loopback port; yields the base URL."""
  server = listener.Listener(
    app,
    config,
    end_requests=app.state.end_requests,
    health=app.state.health if has_door else None,
    draining=app.state.draining,
    host='127.0.0.1',
    port=0,
    log_config=None,
  )
  app.state.listener = server
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    until(lambda: server.port)
    yield f'http://127.0.0.1:{server.port}'
  finally:
    server.should_exit = True
    thread.join(timeout=60)
    # FastAPI's caches keep the app, which must not keep its connections.
    del app.state.listener
  assert not thread.is_alive()


def until(condition, seconds=30):
  """Waits for a condition."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'gave up waiting'
    time.sleep(0.01)


def metric(text: str, name: str, **labels: str) -> float:
  """Returns the only sample of a name that has labels; 0 without one."""
  found = [
    sample.value
    for family in parser.text_string_to_metric_families(text)
    for sample in family.samples
    if sample.name == name and labels.items() <= sample.labels.items()
  ]
  assert len(found) < 2, found
  return found[0] if found else 0.0


def events(content: bytes) -> list[dict[str, Any]]:
  """Returns the events of a stream without the final [DONE]."""
  *texts, done, rest = content.split(b'\n\n')
  assert (done, rest) == (b'data: [DONE]', b'')
  return [json.loads(text.removeprefix(b'data: ')) for text in texts]
