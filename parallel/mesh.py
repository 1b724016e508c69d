"""The device mesh of a run: devices arranged along the axes of its config."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from parallel import parallel_config

AXES = parallel_config.AXES


def make_mesh(
  config: parallel_config.ParallelConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns the mesh of `config` over the given devices, or over all.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.sizes(len(devices))
  # Physical neighbours become neighbours in the mesh. CPU devices, real or
  # fake, have no topology and keep their order.
  array = mesh_utils.create_device_mesh(
    sizes, devices=list(devices), allow_split_physical_axes=True
  )
  # Flax linen's logical constraints work with Auto axes only.
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
