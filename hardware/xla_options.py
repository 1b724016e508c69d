"""XLA's options for train steps, in one table.

    options = xla_options.of(devices)
    jax.jit(step, compiler_options=options)

Each row gives its reason and its measured effect. No option of the table
changes a result: an option that adds numbers in another order stays out. A flag
of the user's own, in XLA_FLAGS or LIBTPU_INIT_ARGS, wins over its row.

An unknown name in XLA_FLAGS ends the process. As an option of one program it is
an error that can be caught: `of` compiles an empty program with the options and
leaves out the rows that this version of XLA does not know.

Not in the table: --xla_gpu_exclude_nondeterministic_ops=true in XLA_FLAGS makes
GPUs add numbers in a fixed order (the gradients of queries and of embeddings),
so that a resumed run repeats an uninterrupted one bit for bit. It costs speed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """One row: a value that differs from XLA's default."""

  name: str
  value: bool | int | str
  platform: str  # gpu | tpu
  least_devices: int  # with fewer it has nothing to do
  why: str
  measured: str = 'not yet'


_MIB = 2**20
OPTIONS = (
  Option(
    name='xla_gpu_enable_latency_hiding_scheduler',
    value=True,
    platform='gpu',
    least_devices=2,
    why='Starts collectives early and waits for them late, so that products run'
    ' meanwhile. XLA:GPU keeps the order of the program without it.',
  ),
  Option(
    name='xla_gpu_all_gather_combine_threshold_bytes',
    value=256 * _MIB,
    platform='gpu',
    least_devices=2,
    why='One all-gather for the weights of a layer instead of one per 30 MiB.',
  ),
  Option(
    name='xla_gpu_reduce_scatter_combine_threshold_bytes',
    value=256 * _MIB,
    platform='gpu',
    least_devices=2,
    why='The same for the gradients of a layer.',
  ),
  Option(
    name='xla_gpu_enable_pipelined_all_gather',
    value=True,
    platform='gpu',
    least_devices=2,
    why='Gathers the weights of the next scanned layer during this one. Later'
    ' versions have no such option.',
  ),
  Option(
    name='xla_tpu_enable_async_collective_fusion',
    value=True,
    platform='tpu',
    least_devices=2,
    why='Runs collectives beside fused computations.',
  ),
  Option(
    name='xla_tpu_enable_async_collective_fusion_fuse_all_gather',
    value=True,
    platform='tpu',
    least_devices=2,
    why='The same for the all-gathers of weights that fsdp splits.',
  ),
  Option(
    name='xla_tpu_enable_async_collective_fusion_multiple_steps',
    value=True,
    platform='tpu',
    least_devices=2,
    why='Spreads one collective over several fusions.',
  ),
  Option(
    name='xla_tpu_overlap_compute_collective_tc',
    value=True,
    platform='tpu',
    least_devices=2,
    why='Lets a core compute while it takes part in a collective.',
  ),
)


def of(
  devices: Sequence[jax.Device], environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
  """Returns the options of programs on these devices; present or not."""
  platform = {'cuda': 'gpu'}.get(devices[0].platform, devices[0].platform)
  own = environ.get('XLA_FLAGS', '') + environ.get('LIBTPU_INIT_ARGS', '')
  taken = set(re.findall(r'--(?:no)?(xla_\w+)', own))
  options = {
    row.name: row.value
    for row in OPTIONS
    if row.platform == platform
    and row.least_devices <= len(devices)
    and row.name not in taken
  }
  if _is_known(options, devices):
    return options
  return {
    name: value
    for name, value in options.items()
    if _is_known({name: value}, devices)
  }


def _is_known(
  options: Mapping[str, Any], devices: Sequence[jax.Device]
) -> bool:
  """Returns whether the compiler of the devices takes the options."""
  if not options:
    return True
  mesh = jax.sharding.Mesh(np.array(devices), ('devices',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  number = jax.ShapeDtypeStruct((), np.float32, sharding=sharding)
  lowered = jax.jit(lambda x: x).lower(number)
  try:
    lowered.compile(compiler_options=dict(options))
  except Exception as error:  # each compiler raises a class of its own
    if 'No such compile option' in str(error):
      return False
    raise
  return True
