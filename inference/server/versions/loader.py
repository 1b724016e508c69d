"""The loader: from a frozen directory to a version that can be started.

The model of the command line and the models of POST /admin/models are loaded by
the same code, with the same layout of the engine. A path that arrives over HTTP
must lie below `--server.models_root`, after links are resolved: a client that
may load models must not read, or learn about, the rest of the disk.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib

from frozen import adapters as frozen_adapters, manifest as manifest_lib
from inference import adapters, generate
from inference.engine import engine_config
from inference.server import engine_loop as engine_loop_lib, service
from inference.server.api import errors
from inference.server.replicas import (
  fleet as fleet_lib,
  loop as replica_loop,
  values,
)
from inference.server.versions import loading, memory, served_adapter
from models.layers import reward_head


class Loader:
  """Makes served models, each with an engine and a thread of its own."""

  def __init__(
    self,
    config: engine_config.EngineConfig,
    *,
    models_root: str = '',
    fleet: fleet_lib.Fleet | None = None,
  ):
    """Takes the values that all models have in common.

    Args:
      config: the layout of every engine.
      models_root: directory of the models that HTTP may load; '': none.
      fleet: replicas that have the engines; None: they are in this process.

    Raises:
      ValueError: `models_root` is no directory.
    """
    if models_root and not pathlib.Path(models_root).is_dir():
      raise ValueError(
        f'server.models_root: got {models_root}, expected a directory of frozen'
        ' directories'
      )
    self._config, self._fleet = config, fleet
    self._root = pathlib.Path(models_root).resolve() if models_root else None

  def load(
    self,
    directory: str | os.PathLike,
    name: str,
    *,
    config: engine_config.EngineConfig | None = None,
    is_for_rewards: bool = False,
    **events,
  ) -> service.ServedModel:
    """Returns a model that loads once its engine loop is started.

    Args:
      directory: the frozen directory.
      name: name of the model in requests.
      config: the layout of its engine; None: the layout of every engine.
      is_for_rewards: whether it is a reward model, which scores answers.
      **events: callbacks of the engine loop.

    Raises:
      FileNotFoundError, ValueError: there is no frozen directory, its manifest
        is damaged, the config does not suit it, or it has another function.
    """
    config = config or self._config
    manifest = manifest_lib.read(pathlib.Path(directory))
    context = config.context(manifest.model['max_length'])
    if is_for_rewards and reward_head.NAME not in manifest.heads:
      raise ValueError(
        f'{name}: got {os.fspath(directory)}, a language model, expected a'
        ' reward model'
      )
    if self._fleet is not None:
      if is_for_rewards:
        raise ValueError(
          f'server.scorers: got {name} with --replicas, expected none: a reward'
          ' model runs in the process of the server; leave one of them out'
        )
      return self._on_replicas(directory, name, manifest, config, **events)

    def read() -> generate.Generator:
      # Not before: the first use of a device takes a while.
      model.memory = memory.plan(manifest, config)
      return loading.read(
        directory,
        config,
        version=model.version,
        plan=model.memory,
        is_for_rewards=is_for_rewards,
      )

    loop = engine_loop_lib.EngineLoop(
      read, on_compiled=loading.keep_objects, **events
    )
    model = service.ServedModel(name, loop, manifest, context=context)
    return model

  def _on_replicas(
    self,
    directory: str | os.PathLike,
    name: str,
    manifest: manifest_lib.Manifest,
    config: engine_config.EngineConfig,
    **events,
  ) -> service.ServedModel:
    assert self._fleet

    def loaded(facts: values.Facts) -> None:
      if model.memory is None:  # the first replica
        model.memory = facts.memory
        loading.keep_objects()

    loop = replica_loop.ReplicaLoop(
      self._fleet,
      values.Load(
        version=name, directory=os.path.abspath(directory), config=config
      ),
      on_loaded=loaded,
      **events,
    )
    context = config.context(manifest.model['max_length'])
    model = service.ServedModel(name, loop, manifest, context=context)
    loop.load = dataclasses.replace(loop.load, version=model.version)
    return model

  def load_asked(
    self, path: str, name: str, *, kv_memory: str | None
  ) -> service.ServedModel:
    """Returns a model that was asked for over HTTP.

    Its memory is not checked yet, see `check_memory`.

    Args:
      path: path of the frozen directory, below `models_root`.
      name: name of the model in requests.
      kv_memory: memory of its KV cache; None: as in all engines.

    Raises:
      ApiError: status 403, no model may be loaded; 404, there is none; 400, it
        is damaged or does not suit the engine.
    """
    directory = self._below_root(path)
    config = self._config
    try:
      if kv_memory is not None:
        config = dataclasses.replace(config, kv_memory=kv_memory, num_pages=0)
      model = self.load(directory, name, config=config)
      if self._fleet is not None:
        model.memory = self._fleet.plan(str(directory), config)
      else:
        model.memory = memory.plan(model.manifest, config)
    except FileNotFoundError as error:
      raise _refused(404, error, 'path', 'path_not_found') from error
    except (ValueError, OSError) as error:
      raise _refused(400, error, None, 'cannot_load') from error
    return model

  def check_memory(self, model: service.ServedModel, *, pending: int) -> None:
    """Refuses a model that does not fit beside the models that load now.

    Args:
      model: a model from `load_asked` or `adapter_asked`.
      pending: bytes that the versions that load now will take.

    Raises:
      ApiError: status 400, it does not fit.
    """
    if model.memory is None:
      return  # an adapter has its place in the memory of its base
    try:
      model.memory.check(pending=pending)
    except ValueError as error:
      raise _refused(400, error, None, 'cannot_load') from error

  def is_adapter(self, path: str) -> bool:
    """Returns whether a requested path is the directory of an adapter.

    Raises:
      ApiError: status 403 or 400, no such path may be asked for.
    """
    return frozen_adapters.is_adapter(self._below_root(path))

  def adapter_asked(
    self,
    path: str,
    name: str,
    *,
    base: str | None,
    models: Sequence[service.ServedModel],
  ) -> service.ServedModel:
    """Returns an adapter that was asked for over HTTP, after all checks.

    Args:
      path: path of its directory, below `models_root`.
      name: name of the adapter in requests.
      base: NAME@DIGEST of the version beside which it is loaded; None: the
        version with the weights that it was trained on.
      models: all versions.

    Raises:
      ApiError: status 400, it is damaged, has no base here, or does not fit;
        503, its base is not ready.
    """
    directory = self._below_root(path)
    try:
      manifest = frozen_adapters.read_manifest(directory)
      found = _base_of(manifest, base, models)
      generator = found.generator()
      (adapter,) = adapters.read(
        {name: str(directory)}, generator.frozen
      ).values()
      found.engine_loop.check_adapter(adapter)
    except (ValueError, OSError) as error:
      raise _refused(400, error, None, 'cannot_load') from error
    return served_adapter.ServedAdapter(name, adapter, found)

  def _below_root(self, path: str) -> pathlib.Path:
    if self._root is None:
      raise errors.ApiError(
        403,
        'path: got a model to load, expected none: this server has no directory'
        ' of models; start it with --server.models_root=DIR',
        param='path',
        code='no_models_root',
      )
    outside = errors.ApiError(
      400,
      'path: got a path that is not below --server.models_root, expected the'
      ' path of a frozen directory relative to it',
      param='path',
      code='path_outside_root',
    )
    try:
      found = (self._root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL
      raise outside from None
    if not found.is_relative_to(self._root) or found == self._root:
      raise outside
    return found


def _base_of(
  manifest: frozen_adapters.AdapterManifest,
  asked: str | None,
  models: Sequence[service.ServedModel],
) -> service.ServedModel:
  """Returns the version that an adapter is loaded beside.

  Raises:
    ValueError: there is none.
  """
  bases = [each for each in models if not (each.base or each.is_draining)]
  for each in bases:
    if asked in (each.version, f'{each.name}@{each.digest}', each.name):
      return each
    if asked is None and each.digest == manifest.base_digest:
      return each
  wanted = asked or f'{manifest.base_name}@{manifest.base_digest[:16]}'
  shown = ', '.join(errors.printable(each.version) for each in bases)
  raise ValueError(
    f'base: got an adapter of {errors.printable(wanted)}, expected one of a'
    f' version that is loaded: {shown}; load its base first'
  )


def _refused(status: int, error: Exception, param, code) -> errors.ApiError:
  return errors.ApiError(status, str(error), param=param, code=code)
