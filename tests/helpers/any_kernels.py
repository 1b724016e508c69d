"""Kernels in fewer bits of any numbers, for tests of their products."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  kernel as kernel_lib,
  round as rounding,
)
from tests.helpers.open_weights import stored_params

# Where a block has its float16 scales; any other bytes are fine.
SCALES = {
  'Q8_0': (0,), 'Q4_0': (0,), 'Q4_1': (0, 2), 'Q5_0': (0,), 'Q5_1': (0, 2),
  'IQ4_NL': (0,), 'Q2_K': (80, 82), 'Q3_K': (108,), 'Q4_K': (0, 2),
  'Q5_K': (0, 2), 'Q6_K': (208,), 'IQ4_XS': (0,),
}  # fmt: skip
SCHEMES = (
  'int8', 'int8-g32', 'int4', 'uint4', 'nf4', 'fp8', 'mxfp4', 'nvfp4',
  'ordered', 'tiles',
)  # fmt: skip


def block_bytes(kind: str, columns: int, num_blocks: int) -> np.ndarray:
  """Returns rows of any bytes, but float16 scales that are finite."""
  rng = np.random.default_rng(0)
  size = block_kinds.KINDS[kind].bytes
  data = rng.integers(0, 256, (columns, num_blocks, size), np.uint8)
  for at in SCALES[kind]:
    scales = rng.normal(size=(columns, num_blocks, 1)).astype(np.float16)
    data[..., at : at + 2] = scales.view(np.uint8)
  return data.reshape(columns, -1)


def narrow(rows: int, columns: int) -> kernel_lib.Kernel:
  """Returns int8 with a scale per 8 inputs, which native code refuses."""
  found = kernel('int8', rows, columns)
  found.tile, found.scales = (1, 8), jnp.ones((columns, -(-rows // 8)))
  return found


def kernel(name: str, rows: int, columns: int) -> Any:
  """Returns a kernel [rows, columns] of a kind of blocks or a scheme.

  Blocks have whole blocks, of at least `rows` inputs. 'tiles' is int8 with
  tiles of 3 outputs and 48 inputs.
  """
  if name in SCALES:
    num_blocks = -(-rows // block_kinds.KINDS[name].weights)
    data = block_bytes(name, columns, num_blocks)
    return blocks_lib.Blocks.make(jnp.asarray(data), kind=name)
  w_IO = np.random.default_rng(0).normal(size=(rows, columns))
  w_IO = jnp.asarray(w_IO, jnp.float32)
  if name == 'tiles':
    return rounding.quantise(w_IO, 'int8', (3, 48))
  return stored_params.kernel(w_IO, name)
