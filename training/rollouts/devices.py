"""The devices of a run with rollouts: some train, and some may only sample.

By default the sampler has a copy of the weights on the first device of the run,
and both take turns. With `rollouts.sampler_devices = N` it has the last N
devices to itself, and they share its model; the others train. Batches that are
drawn ahead (`rollouts.staleness`) then cost the train steps no time.
"""

from collections.abc import Sequence
from typing import Any

import jax


def training(
  experiment: Any, devices: Sequence[jax.Device] | None = None
) -> Sequence[jax.Device]:
  """Returns the devices that train.

  Args:
    experiment: experiment of the run.
    devices: devices of the run, or of an ahead-of-time target; None: all.

  Raises:
    ValueError: no device is left.
  """
  devices = jax.devices() if devices is None else devices
  return devices[: len(devices) - _num_sampling(experiment, devices)]


def sampling(experiment: Any) -> tuple[jax.Device, ...]:
  """Returns the devices of the sampler; it shares the first one by default.

  Raises:
    ValueError: no device is left to train.
  """
  devices = jax.devices()
  num = _num_sampling(experiment, devices)
  return tuple(devices[len(devices) - num :] if num else devices[:1])


def _num_sampling(experiment: Any, devices: Sequence[jax.Device]) -> int:
  num = experiment.rollouts.sampler_devices if experiment.rollouts else 0
  if num >= len(devices):
    raise ValueError(
      f'rollouts.sampler_devices: got {num} of {len(devices)} devices, expected'
      f' at most {len(devices) - 1}: one at least trains; 0 lets the sampler'
      ' share a device'
    )
  return num
