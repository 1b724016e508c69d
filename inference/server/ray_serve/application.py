r"""The server as an application of Ray Serve, for clusters that have Ray.

    pip install -r requirements-ray.txt
    serve run inference.server.ray_serve.application:build model=runs/s/frozen \
      api_keys=keys.txt num_gpus=1 replicas=2 engine.max_sequences=64

Arguments are flags of serve.py, and those of `arguments.py`. Each replica of
Ray runs one serve.py and hands requests on to it, so API, limits and drain are
those of the server. Ray places replicas, starts one again that is not healthy,
and adds or removes some by their open requests (`replicas=auto`, `scaling.py`):

    serve run inference.server.ray_serve.application:build model=runs/s/frozen \
      api_keys=keys.txt num_gpus=1 replicas=auto max_replicas=16

Each has its own count of
requests and money: limits and budgets of a key are those of one replica.
"""

import os

import fastapi
from ray import serve  # pyright: ignore[reportMissingImports]

from inference.server.ray_serve import (
  arguments as arguments_lib,
  child as child_lib,
  forwarding,
)

app = fastapi.FastAPI(openapi_url=None)


@serve.deployment
@serve.ingress(app)
class Server:
  """A replica: one serve.py, and the way to it."""

  def __init__(self, arguments: arguments_lib.Arguments):
    """Starts the server, and waits until it is ready."""
    self._drain_seconds = arguments.drain_seconds
    self._child = child_lib.Child(arguments.flags(), os.environ)
    self._child.wait(arguments.start_seconds, may_be_open=arguments.insecure)
    self._forwarder = forwarding.Forwarder(lambda: self._child.url)

  @app.api_route('/{path:path}', methods=list(forwarding.METHODS))
  async def forward(self, request: fastapi.Request) -> fastapi.Response:
    """Answers every request as the server does."""
    return await self._forwarder.forward(request)

  def check_health(self) -> None:
    """Tells Ray to start another replica if this one's server is gone."""
    self._child.check()

  def __del__(self):
    # Ray calls it after the last request.
    if child := getattr(self, '_child', None):
      child.stop(self._drain_seconds + 5)


def build(arguments: arguments_lib.Arguments) -> serve.Application:
  """Returns the application, for `serve run` and for files of configuration.

  Raises:
    ValueError: an argument is wrong.
  """
  arguments.check()
  return Server.options(  # pyright: ignore[reportAttributeAccessIssue]
    **arguments.options()
  ).bind(arguments)
