"""The parts of the server that its routes share."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

from checks import expect
from frozen import manifest as manifest_lib
from inference import generate
from inference.engine import engine, requests as requests_lib
from inference.server import engine_loop as engine_loop_lib, server_config
from inference.server.access import admission as admission_lib, keys
from inference.server.api import errors
from inference.server.http import bodies as bodies_lib
from inference.server.records import database


class ServedModel:
  """A model under the name by which requests name it."""

  def __init__(
    self,
    name: str,
    engine_loop: engine_loop_lib.EngineLoop,
    manifest: manifest_lib.Manifest,
    *,
    context: int,
    admission: admission_lib.Admission,
  ):
    """Describes the model; its weights need not be loaded yet.

    Args:
      name: the name in requests.
      engine_loop: runs its engine.
      manifest: of its frozen directory.
      context: most tokens of a sequence.
      admission: admits and bills its requests.
    """
    self.name, self.engine_loop = name, engine_loop
    self._admission, self._digest = admission, manifest.weights_digest
    admission.ledger.note_model(name, manifest)
    self._card = {
      'id': name,
      'object': 'model',
      'created': int(time.time()),  # when this server began to load it
      'owned_by': 'two-lives',
      'max_model_len': context,
      'lineage': {
        'weights_digest': manifest.weights_digest,
        'num_params': manifest.num_params,
        'dtype': manifest.dtype,
        'experiment': manifest.name,
        'step': manifest.step,
        'tokens_seen': manifest.tokens_seen,
        'code_commit': manifest.code_commit,
        'knowledge_cutoff': manifest.knowledge_cutoff,
        'parents': manifest.lineage,
      },
    }

  def card(self) -> dict[str, Any]:
    """Returns its entry of /v1/models."""
    return self._card

  def generator(self) -> generate.Generator:
    """Returns the loaded generator.

    Raises:
      ApiError: status 503, the model still loads, or the engine has stopped.
    """
    loop = self.engine_loop
    if loop.state == engine_loop_lib.READY and loop.generator:
      return loop.generator
    if loop.state == engine_loop_lib.STOPPED:
      raise errors.stopping()
    raise errors.ApiError(
      503,
      f'the server is not ready: {loop.state}; ask /ready',
      param=None,
      code='not_ready',
    )

  async def submit(
    self, requests: Sequence[requests_lib.Request]
  ) -> engine_loop_lib.Updates:
    """Submits requests to the engine, all or none; returns their updates.

    The caller is billed for them, and its key has limits.

    Raises:
      ApiError: status 400, a prompt does not fit; 429, too many requests wait,
        or a limit is reached; 500 or 503, no request is answered any more.
    """
    admitted = await self._admission.admit(
      requests, model=self.name, weights_digest=self._digest
    )
    try:
      updates = await self.engine_loop.submit(admitted.requests, admitted.end)
      admitted.open()
      return updates
    except engine.Overloaded as error:
      raise errors.ApiError(
        429, str(error), param=None, code='overloaded'
      ) from error
    except ValueError as error:
      raise errors.refused_prompt(error) from error
    except (engine_loop_lib.Failed, engine_loop_lib.Stopped) as error:
      raise errors.failure(error) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """The parts that every route may use."""

  model: ServedModel
  bodies: bodies_lib.Bodies
  records: database.Database
  config: server_config.ServerConfig
  keyring: keys.Keyring
  admission: admission_lib.Admission

  @property
  def has_keys(self) -> bool:
    """Whether a request needs a key."""
    return self.keyring.has_keys

  def find(self, name: str) -> ServedModel:
    """Returns the model of a name.

    Raises:
      ApiError: status 404, there is none.
    """
    if name != self.model.name:
      raise errors.ApiError(
        404,
        f'model: got {expect.shown(name)}, expected {self.model.name!r}, the'
        ' model served here',
        param='model',
        code='model_not_found',
      )
    return self.model
