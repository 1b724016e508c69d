"""The start of the server: from checked values to a running listener.

    start.serve(start.Options(directory=..., name=..., ...))

`Loader` makes a served model of a frozen directory. The model of the command
line is loaded by it, and so is every other one.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib
import signal
import sys

from frozen import manifest as manifest_lib
from inference import generate
from inference.engine import engine_config
from inference.server import (
  app as app_lib,
  engine_loop as engine_loop_lib,
  server_config,
  service,
)
from inference.server.access import api_keys
from inference.server.http import listener
from inference.server.records import database


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The model to serve, and the way to serve it."""

  directory: str  # frozen
  name: str  # of the model in requests
  engine: engine_config.EngineConfig
  limits: server_config.ServerConfig
  host: str
  port: int
  api_keys: str | None = None  # file; None: all clients are answered
  records: str | None = None  # file; None: in memory


class Loader:
  """Makes served models, each with an engine and a thread of its own."""

  def __init__(self, config: engine_config.EngineConfig):
    """Takes the layout of every engine."""
    self._config = config

  def load(
    self, directory: str | os.PathLike, name: str, **events
  ) -> service.ServedModel:
    """Returns a model that loads once its engine loop is started.

    Args:
      directory: frozen.
      name: of the model in requests.
      **events: callbacks of the engine loop.

    Raises:
      FileNotFoundError, ValueError: there is no frozen directory, its manifest
        is damaged, or the config does not suit it.
    """
    manifest = manifest_lib.read(pathlib.Path(directory))
    context = self._config.context(manifest.model['max_length'])
    loop = engine_loop_lib.EngineLoop(
      lambda: self._generator(directory), on_compiled=_keep_objects, **events
    )
    return service.ServedModel(name, loop, manifest, context=context)

  def _generator(self, directory: str | os.PathLike) -> generate.Generator:
    generator = generate.load(directory, self._config, compile_all=False)
    gc.freeze()  # it stays: see `_keep_objects`
    gc.enable()
    return generator


def serve(options: Options) -> None:
  """Serves HTTP until a signal stops the server.

  Raises:
    FileNotFoundError, ValueError: a value is wrong, or the model is damaged.
  """
  listener.allow_files(options.limits.max_connections)
  keys = None
  if options.api_keys is not None:  # '' is refused, see `api_keys`
    keys = api_keys.KeysFile(options.api_keys)
    signal.signal(signal.SIGHUP, lambda *_: keys.expire())
  model = Loader(options.engine).load(
    options.directory,
    options.name,
    on_load_failure=lambda: setattr(server, 'should_exit', True),
  )
  digest = model.manifest.weights_digest
  print(f'serving {options.name!r}, weights {digest}')
  app = app_lib.create_app(
    [model],
    keys,
    options.limits,
    records=database.Database(options.records, tables=app_lib.TABLES),
  )
  server = listener.Listener(
    app,
    options.limits,
    end_requests=app.state.end_requests,
    host=options.host,
    port=options.port,
  )
  _run(server, model.engine_loop)


def _run(server: listener.Listener, loop: engine_loop_lib.EngineLoop) -> None:
  # After each of its system calls the event loop waits for the thread that runs
  # Python: 5 ms by default, thousands of times per second.
  sys.setswitchinterval(5e-4)
  try:
    with contextlib.suppress(KeyboardInterrupt):
      server.run()
  finally:
    if loop.is_compiling:
      # XLA cannot be interrupted, and an ordinary exit of the process would
      # wait for XLA, or crash.
      sys.stdout.flush()
      os._exit(1 if loop.is_loading or loop.failure else 0)
  if loop.failure:
    raise loop.failure


def _keep_objects() -> None:
  """Tells the garbage collector that programs and weights stay.

  Otherwise it walks them now and then, for 60 to 150 ms, and all clients wait.
  """
  gc.collect()
  gc.freeze()
  # Requests in progress are walked as well, 80 ms for 256: once a minute then.
  gc.set_threshold(700, 10, 100)
