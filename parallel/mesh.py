"""Builds the device mesh of a run."""

from collections.abc import Sequence
import math

import jax
from jax.sharding import AxisType, Mesh

from parallel import config as config_lib

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(
  config: config_lib.ParallelConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns the mesh of `config` over the given devices, or over all.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  if config.data == -1:
    sizes[0] = max(len(devices) // (config.fsdp * config.tensor), 1)
  if math.prod(sizes) != len(devices):
    raise ValueError(
      'parallel: got data x fsdp x tensor ='
      f' {" x ".join(map(str, sizes))} = {math.prod(sizes)}, expected the'
      f' number of devices, {len(devices)}; change the sizes so that their'
      ' product is that number'
    )
  # Linen's logical constraints need Auto axes; make_mesh defaults to Explicit.
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )
