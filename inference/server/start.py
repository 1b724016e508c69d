"""The start of the server: from checked values to a running listener.

    start.serve(start.Options(directory=..., name=..., ...))

The flags are read by serve.py.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import os
import signal
import sys
from typing import Any

import jax

from checks import expect
from frozen import (
  adapters as frozen_adapters,
  effort_predictor,
  format as frozen_format,
)
from frozen.quantize import quality
from hardware import compilation_cache
from inference import adapters as adapters_lib
from inference.engine import engine_config
from inference.search.routing import router as router_lib
from inference.server import (
  app as app_lib,
  engine_loop as engine_loop_lib,
  server_config,
  service,
)
from inference.server.access import api_keys, keys as keys_lib
from inference.server.http import listener
from inference.server.receipts import receipts, sealing
from inference.server.records import database
from inference.server.replicas import fleet as fleet_lib, followers
from inference.server.search import scoring
from inference.server.versions import (
  loader as loader_lib,
  served_adapter,
)
from parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The model to serve, and how to serve it."""

  directory: str  # frozen
  name: str  # of the model in requests
  engine: engine_config.EngineConfig
  limits: server_config.ServerConfig
  host: str
  port: int
  adapters: Sequence[str] = ()  # NAME=DIR, of adapters of the model
  api_keys: str | None = None  # file; None: all clients are answered
  records: str | None = None  # file; None: in memory
  has_receipts: bool = False
  receipts_key: str | None = None  # file of the key that seals receipts
  is_insecure: bool = False  # may answer all clients, without keys
  replicas: int | None = None  # see `num_replicas`
  compilation_cache: str | None = None  # the flag, for replicas
  heartbeat_timeout_s: int = processes.DEFAULT_HEARTBEAT_S
  # The processes that share the engine; None: the devices are of one process.
  cluster: processes.Cluster | None = None

  @property
  def num_replicas(self) -> int:
    """Processes with engines; 0: the engine is in the process of the server.

    In a process of its own, an engine does not wait for Python's lock, and
    neither does the event loop of the server.
    """
    if self.replicas is not None:
      return self.replicas
    # Reward models run in the process of the server.
    return 0 if self.limits.scorer_directories else 1


def serve(options: Options) -> None:
  """Serves HTTP until a signal stops the server.

  Raises:
    FileNotFoundError, ValueError: a value is wrong, or the model is damaged.
  """
  _check_processes(options)
  listener.allow_files(options.limits.max_connections)
  keys = None
  if options.api_keys is not None:  # '' is refused, see `api_keys`
    keys = api_keys.KeysFile(options.api_keys)
    signal.signal(signal.SIGHUP, lambda *_: keys.expire())
  fleet = _fleet(options) if options.num_replicas else None
  loader = loader_lib.Loader(
    options.engine, models_root=options.limits.models_root, fleet=fleet
  )
  found = _adapters(options)
  model = loader.load(
    options.directory,
    options.name,
    config=options.engine.holding(adapters_lib.ranks(found.values())),
    on_load_failure=lambda: setattr(server, 'should_exit', True),
  )
  records = database.Database(options.records, tables=app_lib.TABLES)
  keyring = keys_lib.Keyring(records, keys)
  keys_lib.check_exposure(
    options.host,
    has_keys=keyring.has_keys,
    is_insecure=options.is_insecure,
  )
  seal = _seal(options, has_keys=keyring.has_keys)
  beside = [
    served_adapter.ServedAdapter(name, adapter, model)
    for name, adapter in found.items()
  ]
  scorers = _scorers(options.limits, loader)
  routers = _routers(options.limits, [model, *beside])
  lines = [*_described(model), *(_adapter_line(each) for each in beside)]
  print('\n'.join(lines), flush=True)
  app = app_lib.create_app(
    [model, *beside],
    keyring,
    options.limits,
    records=records,
    loader=loader,
    observers=[receipts.Recorder(records, seal)]
    if options.has_receipts
    else [],
    routers=routers,
    scorers=scorers,
    **({'on_end': fleet.close} if fleet else {}),
  )
  server = listener.Listener(
    app,
    options.limits,
    end_requests=app.state.end_requests,
    health=app.state.health,
    draining=app.state.draining,
    host=options.host,
    port=options.port,
  )
  _run(server, app.state.engine_loops, model.engine_loop)


def follow(options: Options, given: dict[str, Any]) -> int:
  """Takes part in the engine of a server on another machine.

  Args:
    options: as of `serve`; the cluster has the index of this process.
    given: fields of the config of the engine that flags have set.

  Returns:
    An exit code.

  Raises:
    ValueError: the processes cannot share an engine.
  """
  _check_processes(options)
  assert options.cluster
  print(
    f'process {options.cluster.process_id} of'
    f' {options.cluster.num_processes}: computes for the server of'
    f' {options.cluster.coordinator}',
    flush=True,
  )
  return followers.keep(
    followers.Setup(
      directory=options.directory,
      given=given,
      cluster=options.cluster,
      heartbeat_timeout_s=options.heartbeat_timeout_s,
      compilation_cache=_cache(options),
    ),
    environment=os.environ,
    drain_seconds=options.limits.drain_seconds,
  )


def _cache(options: Options) -> str | None:
  """Returns the directory of compiled programs; None: there is none."""
  given = options.compilation_cache
  is_given = given is not None or compilation_cache.VARIABLE in os.environ
  if options.cluster and not is_given:
    return None  # GPUs of several processes must find the same programs
  directory = compilation_cache.directory_of(given)
  return str(directory) if directory else None


def _check_processes(options: Options) -> None:
  """Refuses what an engine over several processes does not do."""
  if (cluster := options.cluster) is None:
    return
  if cluster.process_id is None or cluster.num_processes is None:
    raise ValueError(
      'several processes: got a launcher whose indices jax alone can read,'
      ' expected --coordinator, --num_processes and --process_id with --port;'
      ' give them, as in --process_id=$SLURM_PROCID'
    )
  if options.num_replicas != 1:
    raise ValueError(
      f'--replicas: got {options.num_replicas} over {cluster.num_processes}'
      ' processes, expected 1; start a server for each replica, or leave it out'
    )
  if options.limits.audit_share:
    raise ValueError(
      f'--server.audit_share: got {options.limits.audit_share} over'
      f' {cluster.num_processes} processes, expected 0: an audit computes on'
      ' the devices of one; use --receipts and inference.server.replay'
    )


def _fleet(options: Options) -> fleet_lib.Fleet:
  """Returns the replicas of the options, and leaves them all devices.

  Raises:
    ValueError: there are too few devices.
  """
  fleet = fleet_lib.Fleet(
    options.num_replicas,
    num_devices=options.engine.num_devices,
    environment=os.environ,
    compilation_cache=_cache(options),
    audit_threshold=options.limits.audit_threshold,
    heartbeat_timeout_s=options.heartbeat_timeout_s,
    cluster=options.cluster,
  )
  # A process that uses a GPU or a TPU takes it: this one reads shapes alone.
  jax.config.update('jax_platforms', 'cpu')
  return fleet


def _adapters(options: Options) -> dict[str, frozen_adapters.Adapter]:
  """Returns the adapters of the options by name, read and verified.

  Raises:
    FileNotFoundError, ValueError: one cannot be served beside the model.
  """
  named = adapters_lib.parsed(options.adapters)
  if options.name in named:
    raise ValueError(
      f'--adapters: got the name {expect.shown(options.name)}, expected another'
      ' than that of the base; rename it, or give --name'
    )
  if not named:
    return {}
  base = frozen_format.open_directory(options.directory)
  return adapters_lib.read(named, base)


def _scorers(
  limits: server_config.ServerConfig, loader: loader_lib.Loader
) -> dict[str, service.ServedModel]:
  """Returns the reward models of strategies, which are not loaded yet.

  Raises:
    FileNotFoundError, ValueError: a directory holds none, or a name is taken.
  """
  directories = limits.scorer_directories
  scoring.check_names(directories, limits.verifier_names)
  return {
    name: loader.load(directory, name, is_for_rewards=True)
    for name, directory in directories.items()
  }


def _routers(
  limits: server_config.ServerConfig, models: Sequence[service.ServedModel]
) -> dict[str, router_lib.Router]:
  """Returns the router of the predictor, by the digest of its version.

  Raises:
    OSError, ValueError: it cannot be read, or belongs to no version here.
  """
  path = limits.effort_predictor
  if not path:
    return {}
  digests = [each.digest for each in models]
  found = effort_predictor.read(path).weights_digest
  digest = found if found in digests else digests[0]
  budget = limits.effort_flops or None
  return {digest: router_lib.Router.open(path, digest, budget=budget)}


def _adapter_line(model: served_adapter.ServedAdapter) -> str:
  manifest = model.adapter.manifest
  return (
    f'adapter  {model.name!r}, {manifest.num_params:,} parameters, digest'
    f' {model.digest}'
  )


def _described(model: service.ServedModel) -> Iterator[str]:
  """Yields the lines about a model from its manifest."""
  manifest = model.manifest
  yield f'serving {model.name!r}, weights {model.digest}'
  yield (
    f'model    {manifest.name}: {manifest.num_params:,} parameters,'
    f' {manifest.dtype}, context {model.context:,} tokens'
  )
  if storage := frozen_format.storage_text(manifest):
    yield f'stored   {storage}'
  if measured := quality.told(manifest):
    yield f'quality  {measured}'
  parents = [f'{role} {digest}' for role, digest in manifest.lineage.items()]
  yield f'lineage  {", ".join(parents) or "none"}'
  yield (
    f'trained  {manifest.step:,} steps, {manifest.tokens_seen:,} tokens; code'
    f' {manifest.code_commit or "unknown"}'
  )
  yield f'knows    texts up to {manifest.knowledge_cutoff or "an unknown day"}'


def _seal(options: Options, *, has_keys: bool) -> sealing.Seal | None:
  """Returns the seal of receipts, None if they are not sealed.

  Raises:
    ValueError: receipts have no file to be stored in, receipts of tenants would
      be stored without encryption, or there is a key but no receipts.
  """
  if not options.has_receipts:
    if options.receipts_key is not None:
      raise ValueError(
        f'--receipts_key: got {options.receipts_key} without --receipts,'
        ' expected both; add --receipts or leave it out'
      )
    return None
  if options.records is None:
    raise ValueError(
      '--receipts: got no --records, expected a file to keep them in; add'
      ' --records=FILE'
    )
  if options.receipts_key is not None:
    return sealing.read(options.receipts_key, flag='--receipts_key')
  if has_keys:
    raise ValueError(
      '--receipts: got API keys and no --receipts_key, expected a key: prompts'
      ' of tenants are private, and receipts hold them; add'
      ' --receipts_key=FILE, made with `openssl rand -base64 32`'
    )
  return None


def _run(
  server: listener.Listener,
  engine_loops: Callable[[], list[engine_loop_lib.Port]],
  first: engine_loop_lib.Port,
) -> None:
  # After each of its system calls the event loop waits for the thread that runs
  # Python: 5 ms by default, thousands of times per second.
  sys.setswitchinterval(5e-4)
  try:
    with contextlib.suppress(KeyboardInterrupt):
      server.run()
  finally:
    if any(each.is_compiling for each in engine_loops()):
      # XLA cannot be interrupted, and an ordinary exit of the process would
      # wait for XLA, or crash.
      sys.stdout.flush()
      os._exit(1 if first.is_loading or first.failure else 0)
  if first.failure:
    raise first.failure
