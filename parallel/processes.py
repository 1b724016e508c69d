"""Several processes, one run: who they are, and how they wait for each other.

Every process runs the same program on its own devices; `jax.distributed` makes
one machine of them. `train.py` calls `start` before any device is used. How
many processes there are, and which one this is, comes from flags or from what
the launcher has left in the environment (`detect`):

    flags        --coordinator=host:port --num_processes=2 --process_id=0
    Kubernetes   JAX_COORDINATOR_ADDRESS=host[:port] and NUM_PROCESSES, from the
                 manifest; JOB_COMPLETION_INDEX, which an Indexed Job sets, or
                 PROCESS_ID
    torchrun     MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK; LOCAL_RANK and
                 LOCAL_WORLD_SIZE give each process one GPU of its host
    Slurm        srun's SLURM_* variables, read by jax: one GPU per process
                 unless JAX_LOCAL_DEVICE_IDS lists others
    Open MPI     mpirun's OMPI_* variables, read by jax in the same way; version
                 5 does not name a coordinator: set JAX_COORDINATOR_ADDRESS
    TPU pods     TPU_WORKER_HOSTNAMES with several hosts, read by jax
    --coordinator=auto   whatever jax finds by itself: TPU virtual machines that
                 are described by their metadata server only

Flags come before the environment, and the rest in this order. An environment
of one process, or none, means one process, and nothing here does anything.
(Flags of one process do: on CPU, jax then adds up across devices as it does
between processes, by gloo, in an order of its own, and the numbers are those
of several processes to the bit instead of to the last digits.)

In one process every helper below is trivial, so callers need not ask.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import socket
import zlib

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

from checks import expect

_DAY_MS = 24 * 60 * 60 * 1000

AUTO = 'auto'
DEFAULT_PORT = 8476  # where an address names none
DEFAULT_HEARTBEAT_S = 60  # jax's own is 100


class PeerError(RuntimeError):
  """Another process failed where all have to succeed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """What `jax.distributed.initialize` is told; None: jax finds it out."""

  coordinator: str | None = None  # host:port of process 0
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None  # GPUs; None: all there are
  method: str | None = 'deactivate'  # jax's cluster detection; None: any


def detect(
  environ: Mapping[str, str],
  *,
  coordinator: str = '',
  num_processes: int = -1,
  process_id: int = -1,
) -> Cluster | None:
  """Returns the cluster that this process is one of, or None if it is alone.

  A pure function of its arguments: neither jax nor the network is asked.

  Args:
    environ: environment variables.
    coordinator: flag, 'host:port' or 'auto'; empty if not given.
    num_processes: flag; -1 if not given.
    process_id: flag; -1 if not given.

  Raises:
    ValueError: something is missing, or values contradict each other.
  """
  given = {
    '--coordinator': coordinator,
    '--num_processes': '' if num_processes == -1 else str(num_processes),
    '--process_id': '' if process_id == -1 else str(process_id),
  }
  if coordinator == AUTO:
    if num_processes != -1 or process_id != -1:
      raise ValueError(
        f'--coordinator={AUTO}: got --num_processes or --process_id besides,'
        ' expected neither; leave them out, or give host:port'
      )
    return Cluster(method=None)
  if any(given.values()):
    return _explicit(given, *given)
  for find in (_kubernetes, _torchrun, _slurm, _open_mpi, _tpu):
    is_there, cluster = find(environ)
    if is_there:
      return cluster
  return None


def start(
  cluster: Cluster | None, *, heartbeat_timeout_s: int = DEFAULT_HEARTBEAT_S
) -> None:
  """Joins `cluster`; does nothing for None. Call before any device is used.

  A process that dies without a word ends all others (SIGABRT) within the
  timeout: they could not go on without its devices. Start all of them again to
  go on from the last checkpoint.

  Raises:
    ValueError: the timeout is none, the coordinator's port is taken, or the
      processes were told different numbers of them.
  """
  expect.at_least('--heartbeat_timeout_s', heartbeat_timeout_s, 1)
  if cluster is None:
    return
  if cluster.process_id == 0 and cluster.coordinator is not None:
    _check_port(cluster.coordinator)
  # jax would take SIGTERM for itself, from here to the end, and the process
  # could no longer be ended by it. training/lifecycle/interrupt.py does better.
  jax.config.update('jax_enable_preemption_service', False)
  ids = cluster.local_device_ids
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.num_processes,
    cluster.process_id,
    local_device_ids=None if ids is None else list(ids),
    cluster_detection_method=cluster.method,
    heartbeat_timeout_seconds=heartbeat_timeout_s,
    # One that failed alone waits so long for the others, then tells them.
    shutdown_timeout_seconds=heartbeat_timeout_s,
  )
  if cluster.num_processes is not None:
    check_same('--num_processes', str(cluster.num_processes))


def _check_port(coordinator: str) -> None:
  """Refuses a port that is taken: jax's service would crash the process."""
  port = int(coordinator.rpartition(':')[2])
  with socket.socket(socket.AF_INET) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind(('', port))
    except OSError as error:
      raise ValueError(
        f'--coordinator: got port {port}, which process 0 cannot listen on'
        f' ({error.strerror}), expected a free one; choose another for all'
        ' processes'
      ) from None


def count() -> int:
  """Returns how many processes there are."""
  return jax.process_count()


def index() -> int:
  """Returns which of them this one is."""
  return jax.process_index()


def is_first() -> bool:
  """Returns whether this process writes what is written once per run."""
  return index() == 0


def barrier(name: str) -> None:
  """Returns when every process has called it, with the same name.

  Waits as long as it takes: a living process may be preparing a dataset, and a
  dead one is found out by its missing heartbeat.
  """
  if count() > 1:
    multihost_utils.sync_global_devices(name)


def gather(*values: int) -> np.ndarray:
  """Returns the values of all processes, int32 [processes, values].

  A collective: every process calls it, and waits for the others.
  """
  row = np.array(values, np.int32)
  if count() == 1:
    return row[None]
  return np.asarray(multihost_utils.process_allgather(row))


def check_same(what: str, value: str) -> None:
  """Refuses values that are not the same in all processes. A collective.

  Raises:
    ValueError: in every process; names those that differ from the first.
  """
  digests_P = gather(zlib.crc32(value.encode()) >> 1)[:, 0]
  others = np.flatnonzero(digests_P != digests_P[0])
  if others.size:
    raise ValueError(
      f'{what}: got other values in process {", ".join(map(str, others))},'
      ' expected those of process 0 in all; start every process with the same'
      ' flags'
    )


def agree(flag: bool) -> bool:
  """Returns whether any process says yes. A collective, as `gather`."""
  return bool(gather(int(flag)).any())


class Channel:
  """Texts that all processes tell each other, from any thread.

  `gather` and its kin are computed by the devices, in one order with the steps;
  a thread that saves meanwhile cannot use them. These texts go through the
  coordinator. Every process uses a channel equally often, in the same order.
  """

  def __init__(self, name: str):
    self._name = name
    self._count = 0
    self._previous: str | None = None  # the key of what was told last

  def gather(self, text: str) -> list[str]:
    """Returns the texts of all processes; waits for those of the others."""
    if count() == 1:
      return [text]
    # Public functions of jax make barriers of it, but pass no text on.
    client = distributed.global_state.client
    assert client is not None
    self._count += 1
    key = f'two_lives/{self._name}/{self._count}'
    client.key_value_set(f'{key}/{index()}', text)
    # However long it takes: the dead are found out by their heartbeat.
    texts = [
      client.blocking_key_value_get(f'{key}/{i}', _DAY_MS)
      for i in range(count())
    ]
    # All have told this one, so all have read the one before.
    if self._previous is not None:
      client.key_value_delete(self._previous)
    self._previous = f'{key}/{index()}'
    return texts


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """Leaves when every process has; if one fails inside, all of them do.

      with processes.together('tokenizer'):
        if processes.is_first():
          write()
      read()

  Nothing inside may wait for another process.

  Raises:
    PeerError: another process failed; it says why.
  """
  failure: Exception | None = None
  try:
    yield
  except Exception as error:
    failure = error
  if count() > 1:
    failed = np.flatnonzero(gather(failure is not None)[:, 0])
    if failed.size and failure is None:
      raise PeerError(
        f'{what}: got a failure in process'
        f' {", ".join(map(str, failed))}, expected none; its own message says'
        ' what to change'
      )
  if failure is not None:
    raise failure


# (is this launcher there, the cluster; None: one process)
_Found = tuple[bool, Cluster | None]


def _kubernetes(environ: Mapping[str, str]) -> _Found:
  if 'NUM_PROCESSES' not in environ:
    return False, None
  if _is_one(environ, 'NUM_PROCESSES'):
    return True, None
  id_name = 'PROCESS_ID' if 'PROCESS_ID' in environ else 'JOB_COMPLETION_INDEX'
  return True, _explicit(
    environ, 'JAX_COORDINATOR_ADDRESS', 'NUM_PROCESSES', id_name
  )


def _torchrun(environ: Mapping[str, str]) -> _Found:
  if 'WORLD_SIZE' not in environ and 'RANK' not in environ:
    return False, None
  if _is_one(environ, 'WORLD_SIZE'):
    return True, None
  values = dict(environ)
  address, port = environ.get('MASTER_ADDR', ''), environ.get('MASTER_PORT', '')
  if port and environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
    # torchrun itself listens on MASTER_PORT.
    port = str(_integer('MASTER_PORT', port) + 1)
  for name, value in (('MASTER_ADDR', address), ('MASTER_PORT', port)):
    if not value:
      raise ValueError(
        f'{name}: got nothing beside WORLD_SIZE or RANK, expected the address'
        ' and port of process 0; set it, or unset WORLD_SIZE and RANK'
      )
  values['MASTER_ADDR and MASTER_PORT'] = f'{address}:{port}'
  cluster = _explicit(
    values, 'MASTER_ADDR and MASTER_PORT', 'WORLD_SIZE', 'RANK'
  )
  local_size = _integer(
    'LOCAL_WORLD_SIZE', environ.get('LOCAL_WORLD_SIZE', '1')
  )
  if local_size > 1:
    local_id = _integer('LOCAL_RANK', environ.get('LOCAL_RANK', ''))
    cluster = dataclasses.replace(cluster, local_device_ids=(local_id,))
  return True, cluster


def _slurm(environ: Mapping[str, str]) -> _Found:
  # Those that jax wants. A batch script itself, outside srun, lacks the list
  # of nodes; an interactive shell has it, in a step of one task.
  names = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
  )
  if not all(name in environ for name in names):
    return False, None
  count_name = (
    'SLURM_STEP_NUM_TASKS'
    if 'SLURM_STEP_NUM_TASKS' in environ
    else 'SLURM_NTASKS'
  )
  is_alone = _is_one(environ, count_name)
  return True, None if is_alone else Cluster(method='slurm')


def _open_mpi(environ: Mapping[str, str]) -> _Found:
  if 'OMPI_COMM_WORLD_SIZE' not in environ:
    return False, None
  if _is_one(environ, 'OMPI_COMM_WORLD_SIZE'):
    return True, None
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    return True, Cluster(method='ompi')
  return True, _explicit(
    environ,
    'JAX_COORDINATOR_ADDRESS',
    'OMPI_COMM_WORLD_SIZE',
    'OMPI_COMM_WORLD_RANK',
  )


def _tpu(environ: Mapping[str, str]) -> _Found:
  hosts = environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  is_pod = len(hosts) > 1 or 'MEGASCALE_COORDINATOR_ADDRESS' in environ
  # jax names a class per kind of TPU machine; only its own search picks one.
  return is_pod, Cluster(method=None) if is_pod else None


def _is_one(environ: Mapping[str, str], count_name: str) -> bool:
  value = environ.get(count_name, '')
  return bool(value) and _integer(count_name, value) == 1


def _explicit(
  values: Mapping[str, str], address_name: str, count_name: str, id_name: str
) -> Cluster:
  """Reads three values that belong together."""
  names = (address_name, count_name, id_name)
  if missing := [name for name in names if not values.get(name)]:
    here = [f'{name}={values[name]}' for name in names if values.get(name)]
    raise ValueError(
      f'several processes: got {", ".join(here)}, expected'
      f' {", ".join(missing)} besides; give all three or none'
    )
  num_processes = _integer(count_name, values[count_name])
  process_id = _integer(id_name, values[id_name])
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'{id_name}: got {process_id} with {count_name}={num_processes},'
      f' expected 0 to {count_name} - 1; processes are counted from 0'
    )
  return Cluster(
    coordinator=_address(address_name, values[address_name]),
    num_processes=num_processes,
    process_id=process_id,
  )


def _address(name: str, value: str) -> str:
  """Returns host:port; only flags must name the port."""
  host, _, port = value.rpartition(':')
  if not host and not name.startswith('--'):
    return f'{value}:{DEFAULT_PORT}'
  if not (host and port.isdigit() and 0 < int(port) < 2**16):
    raise ValueError(
      f'{name}: got {value!r}, expected host:port of process 0, as in'
      ' 10.0.0.1:8476'
    )
  return value


def _integer(name: str, value: str) -> int:
  try:
    return int(value)
  except ValueError:
    raise ValueError(f'{name}: got {value!r}, expected an integer') from None
