"""The devices of each replica, as environment variables of its process.

The server may use some devices. With N devices per replica, replica i has the
devices iN to (i+1)N-1 of them. A process takes all devices that it sees, so
each sees its own alone. On a CPU all replicas share the cores, and no variable
is needed: each has as many devices as XLA's flags make.

A process that sees no GPU would compute on the CPU. So replicas that need more
GPUs than the machine has are refused, and so is one whose platform is not that
of the others (`loop`).

    GPU    CUDA_VISIBLE_DEVICES
    TPU    TPU_VISIBLE_CHIPS, TPU_CHIPS_PER_PROCESS_BOUNDS, TPU_PROCESS_BOUNDS;
           the names as in jax's own module `jax._src.test_multiprocess`, and
           the bounds of 1, 2 and 4 chips as in
           gist.github.com/skye/f82ba45d2445bb19d53545538754f9a3 ("processes
           that do not communicate")
"""

from collections.abc import Mapping
import glob

_CUDA = 'CUDA_VISIBLE_DEVICES'
_TPU = 'TPU_VISIBLE_CHIPS'
_TPU_OLD = 'TPU_VISIBLE_DEVICES'  # its name before
_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1'}


def environment(
  index: int,
  *,
  num_replicas: int,
  num_devices: int,
  inherited: Mapping[str, str],
  num_gpus: int = 0,
) -> dict[str, str]:
  """Returns the variables of a replica, in addition to those inherited.

  Args:
    index: of the replica.
    num_replicas: how many there are.
    num_devices: of each replica.
    inherited: environment of the server.
    num_gpus: of the machine; 0: it has none, or none that can be counted.

  Raises:
    ValueError: there are too few devices, or the server may use too few, or a
      TPU has no slice of that many chips.
  """
  if num_replicas == 1:
    return {}
  needed, is_open = num_replicas * num_devices, _CUDA not in inherited
  uses_gpus = inherited.get('JAX_PLATFORMS') != 'cpu'
  if is_open and uses_gpus and 0 < num_gpus < needed:
    raise ValueError(
      f'--replicas: got {num_replicas} replicas of {num_devices} devices each,'
      f' expected at most the {num_gpus} GPUs of this machine; lower it, or'
      ' --engine.tensor'
    )
  own = range(index * num_devices, (index + 1) * num_devices)
  bounds = _BOUNDS.get(num_devices)
  tpu = {
    _TPU: _chosen(_TPU, own, num_replicas, inherited),
    'TPU_CHIPS_PER_PROCESS_BOUNDS': bounds or '',
    'TPU_PROCESS_BOUNDS': '1,1,1',
    # libtpu refuses a second process on a host otherwise.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  if bounds is None:
    if _TPU in inherited or _TPU_OLD in inherited:
      raise ValueError(
        f'--replicas: got replicas of {num_devices} chips each, expected one of'
        f' {", ".join(map(str, _BOUNDS))}; change --engine.tensor, or start a'
        ' server for each slice'
      )
    tpu = {}
  return {_CUDA: _chosen(_CUDA, own, num_replicas, inherited), **tpu}


def num_gpus() -> int:
  """Returns the number of NVIDIA GPUs of this machine, without using them."""
  return len(glob.glob('/dev/nvidia[0-9]*'))


def _chosen(
  name: str, own: range, num_replicas: int, inherited: Mapping[str, str]
) -> str:
  """Returns the devices `own` of the list in a variable; see `environment`."""
  if name not in inherited:
    return ','.join(map(str, own))
  visible = [each for each in inherited[name].split(',') if each.strip()]
  if not visible:
    return inherited[name]  # none: the platform is not used
  if num_replicas * len(own) > len(visible):
    raise ValueError(
      f'--replicas: got {num_replicas} replicas of {len(own)} devices each,'
      f' expected at most the {len(visible)} devices of {name}; lower it, or'
      ' --engine.tensor'
    )
  return ','.join(visible[own.start : own.stop])
