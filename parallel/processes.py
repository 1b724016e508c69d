"""The processes of one run: detection, start and messages.

Every process runs the same program on its own devices, and `jax.distributed`
connects them. `train.py` calls `start` before any device is used. The number of
processes and the index of this one come from flags or from the launcher's
environment variables (`detect`):

    flags        --coordinator=host:port --num_processes=2 --process_id=0
    Kubernetes   JAX_COORDINATOR_ADDRESS=host[:port] and NUM_PROCESSES, from the
                 manifest; JOB_COMPLETION_INDEX, which an Indexed Job sets, or
                 PROCESS_ID
    torchrun     MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK; LOCAL_RANK and
                 LOCAL_WORLD_SIZE give each process one GPU of its host
    Open MPI 5   mpirun's OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_RANK; names
                 no coordinator: set JAX_COORDINATOR_ADDRESS
    Slurm, Open MPI 4, TPU pods   read by jax; one GPU per process, unless
                 JAX_LOCAL_DEVICE_IDS lists others
    --coordinator=auto   jax's own detection, e.g. for TPU virtual machines that
                 only their metadata server describes

Flags override the environment; launchers are tried in this order. Without a
launcher, or if the launcher started only one process, `start` does nothing, and
every helper below works for one process: callers need not check.

`jax.distributed.initialize()` alone is not enough. It fails without a launcher,
and for one process it starts a cluster of one. On CPU such a cluster sums over
devices by gloo, as several processes do, in another order than one process: its
numbers equal the numbers of several processes to the bit, and the numbers of
one process except for the last digits. Flags with --num_processes=1 ask for it.

Breaks first when jax moves: `Channel` and `publish` use the private
`jax._src.distributed.global_state`: `coordinator_address`, and the methods
key_value_set, blocking_key_value_get and key_value_delete of `client`.
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

AUTO = 'auto'  # value of --coordinator
DEFAULT_PORT = 8476  # of an address without a port
DEFAULT_HEARTBEAT_S = 60  # jax's own default is 100


class PeerError(RuntimeError):
  """Another process failed in a section that all processes must complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """Arguments of `jax.distributed.initialize`; None: jax detects the value."""

  coordinator: str | None = None  # host:port of process 0
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None  # GPUs; None: all of the host
  method: str | None = 'deactivate'  # jax's cluster detection; None: any


def detect(
  environ: Mapping[str, str],
  *,
  coordinator: str = '',
  num_processes: int = -1,
  process_id: int = -1,
) -> Cluster | None:
  """Returns the cluster of this process, or None for a single process.

  A pure function of its arguments: it asks neither jax nor the network.

  Args:
    environ: environment variables.
    coordinator: flag, 'host:port' or 'auto'; empty if not given.

  Raises:
    ValueError: a value is missing, or values contradict each other.
  """
  given = {
    '--coordinator': coordinator,
    '--num_processes': '' if num_processes == -1 else str(num_processes),
    '--process_id': '' if process_id == -1 else str(process_id),
  }
  if coordinator == AUTO:
    if num_processes != -1 or process_id != -1:
      raise ValueError(
        f'--coordinator={AUTO}: got --num_processes or --process_id as well,'
        ' expected neither; leave them out, or give host:port'
      )
    return Cluster(method=None)
  if any(given.values()):
    return _explicit(given, *given)
  for find in (_kubernetes, _torchrun, _open_mpi_5, _known_to_jax):
    is_there, cluster = find(environ)
    if is_there:
      return cluster
  return None


def start(
  cluster: Cluster | None, *, heartbeat_timeout_s: int = DEFAULT_HEARTBEAT_S
) -> None:
  """Joins `cluster`; does nothing for None. Call before any device is used.

  If a process dies without a message, jax ends all others (SIGABRT) within the
  timeout, because they cannot continue without its devices. Restart all
  processes to resume from the last checkpoint.

  Raises:
    ValueError: the timeout is below 1 s, the coordinator's port is taken, or
      processes have different values of --num_processes.
  """
  expect.at_least('--heartbeat_timeout_s', heartbeat_timeout_s, 1)
  if cluster is None:
    return
  if cluster.process_id == 0 and cluster.coordinator is not None:
    _check_port(cluster.coordinator)
  # jax's service would catch SIGTERM until the end, and the signal could no
  # longer stop the process. training/lifecycle/interrupt.py handles SIGTERM.
  jax.config.update('jax_enable_preemption_service', False)
  ids = cluster.local_device_ids
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.num_processes,
    cluster.process_id,
    local_device_ids=None if ids is None else list(ids),
    cluster_detection_method=cluster.method,
    heartbeat_timeout_seconds=heartbeat_timeout_s,
    # A process that failed waits this long for the other processes; then they
    # hear of its end.
    shutdown_timeout_seconds=heartbeat_timeout_s,
  )
  if cluster.num_processes is not None:
    check_same('--num_processes', str(cluster.num_processes))


def _check_port(coordinator: str) -> None:
  """Raises ValueError for a taken port, on which jax would crash."""
  port = int(coordinator.rpartition(':')[2])
  with socket.socket(socket.AF_INET) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind(('', port))
    except OSError as error:
      raise ValueError(
        f'--coordinator: got port {port}, which process 0 cannot listen on'
        f' ({error.strerror}), expected a free port; choose another for all'
        ' processes'
      ) from None


def count() -> int:
  """Returns the number of processes."""
  return jax.process_count()


def index() -> int:
  """Returns the index of this process, from 0."""
  return jax.process_index()


def is_first() -> bool:
  """Returns whether this process writes the files of the run."""
  return index() == 0


def gather(*values: int) -> np.ndarray:
  """Returns the values of all processes, int32 [processes, values].

  A collective: every process must call it, and waits for the others.
  """
  row = np.array(values, np.int32)
  if count() == 1:
    return row[None]
  return np.asarray(multihost_utils.process_allgather(row))


def check_same(what: str, value: str) -> None:
  """Checks that `value` is the same in all processes. A collective.

  Raises:
    ValueError: in every process; names each process that differs from
      process 0.
  """
  # 31 bits, so that a digest fits into an int32.
  digests_P = gather(zlib.crc32(value.encode()) >> 1)[:, 0]
  others = np.flatnonzero(digests_P != digests_P[0])
  if others.size:
    raise ValueError(
      f'{what}: got other values in process {", ".join(map(str, others))},'
      ' expected the value of process 0 in all; start every process with the'
      ' same flags'
    )


def agree(flag: bool) -> bool:
  """Returns whether `flag` is true in any process. A collective."""
  return bool(gather(int(flag)).any())


def coordinator_host() -> str:
  """Returns the address of process 0, as all processes know it."""
  address = distributed.global_state.coordinator_address
  assert address is not None
  return address.rpartition(':')[0].strip('[]')


def publish(name: str, text: str) -> None:
  """Gives all processes a text, which `published` returns."""
  client = distributed.global_state.client
  assert client is not None
  client.key_value_set(f'two_lives/published/{name}', text)


def published(name: str, *, timeout_s: float) -> str:
  """Returns the text of a name; waits until a process gives it.

  Raises:
    jax.errors.JaxRuntimeError: none has within the timeout.
  """
  client = distributed.global_state.client
  assert client is not None
  return client.blocking_key_value_get(
    f'two_lives/published/{name}', int(timeout_s * 1000)
  )


class Channel:
  """A channel for texts between all processes, usable from any thread.

  The devices compute `gather` and the functions built on it, in one order with
  the train steps, so that a thread that saves a checkpoint cannot call them.
  Texts of a channel go through the coordinator instead. Every process must use
  a channel equally often and in the same order.
  """

  def __init__(self, name: str):
    self._name = name
    self._count = 0
    self._previous: str | None = None  # key of this process's last text

  def gather(self, text: str) -> list[str]:
    """Returns the texts of all processes, by index; waits for all of them."""
    if count() == 1:
      return [text]
    # jax's public functions built on this client send no text.
    client = distributed.global_state.client
    assert client is not None
    self._count += 1
    key = f'two_lives/{self._name}/{self._count}'
    client.key_value_set(f'{key}/{index()}', text)
    # A day, in effect no timeout: a dead process is detected by its heartbeat.
    texts = [
      client.blocking_key_value_get(f'{key}/{i}', _DAY_MS)
      for i in range(count())
    ]
    # All processes have sent this text, so all have read the previous one.
    if self._previous is not None:
      client.key_value_delete(self._previous)
    self._previous = f'{key}/{index()}'
    return texts


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """Waits at the end for all processes; if one fails inside, all raise.

      with processes.together('tokenizer'):
        if processes.is_first():
          write()
      read()

  The code inside must not wait for another process.

  Raises:
    PeerError: another process failed; its own message has the reason.
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


# (whether this launcher was found, its cluster or None for one process)
_Found = tuple[bool, Cluster | None]
_OPEN_MPI_4 = 'OMPI_MCA_orte_hnp_uri'


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
    # torchrun itself listens on MASTER_PORT; the coordinator takes the next.
    port = str(_integer('MASTER_PORT', port) + 1)
  for name, value in (('MASTER_ADDR', address), ('MASTER_PORT', port)):
    if not value:
      raise ValueError(
        f'{name}: got no value with WORLD_SIZE or RANK set, expected the'
        ' address and port of process 0; set it, or unset WORLD_SIZE and RANK'
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


def _open_mpi_5(environ: Mapping[str, str]) -> _Found:
  if 'OMPI_COMM_WORLD_SIZE' not in environ or _OPEN_MPI_4 in environ:
    return False, None
  if _is_one(environ, 'OMPI_COMM_WORLD_SIZE'):
    return True, None
  return True, _explicit(
    environ,
    'JAX_COORDINATOR_ADDRESS',
    'OMPI_COMM_WORLD_SIZE',
    'OMPI_COMM_WORLD_RANK',
  )


def _known_to_jax(environ: Mapping[str, str]) -> _Found:
  """Finds Slurm, Open MPI 4 and TPU pods, whose variables jax reads."""
  is_several = (
    (_OPEN_MPI_4 in environ and not _is_one(environ, 'OMPI_COMM_WORLD_SIZE'))
    # A batch script outside srun lacks the list of nodes. An interactive shell
    # has the list, in a step of one task.
    or (
      'SLURM_STEP_NODELIST' in environ
      and not _is_one(environ, 'SLURM_STEP_NUM_TASKS')
      and not _is_one(environ, 'SLURM_NTASKS')
    )
    or ',' in environ.get('TPU_WORKER_HOSTNAMES', '')
    or 'MEGASCALE_COORDINATOR_ADDRESS' in environ
  )
  return is_several, Cluster(method=None) if is_several else None


def _is_one(environ: Mapping[str, str], count_name: str) -> bool:
  value = environ.get(count_name, '')
  return bool(value) and _integer(count_name, value) == 1


def _explicit(
  values: Mapping[str, str], address_name: str, count_name: str, id_name: str
) -> Cluster:
  """Returns the cluster of three named values, all of which must be given."""
  names = (address_name, count_name, id_name)
  if missing := [name for name in names if not values.get(name)]:
    here = [f'{name}={values[name]}' for name in names if values.get(name)]
    raise ValueError(
      f'several processes: got {", ".join(here)}, expected'
      f' {", ".join(missing)} as well; give all three or none'
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
  """Returns host:port; the port is optional except in a flag."""
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
