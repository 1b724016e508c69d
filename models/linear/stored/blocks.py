"""A kernel whose rows are blocks of a GGUF file, kept byte for byte.

It stands where a kernel W [in, out] stands. A row is a column of W: the numbers
that one output sums over.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from models.linear.stored import block_kinds


@jax.tree_util.register_pytree_with_keys_class
class Blocks:
  """Rows of blocks, [..., out, bytes of a row]; leading axes as of layers."""

  order = None  # columns are never permuted; see `kernel.Kernel`

  def __init__(self, data: Any, kind: str):
    """Takes the bytes as they are; `make` checks them."""
    self.data, self.kind = data, kind

  @classmethod
  def make(cls, data: Any, *, kind: str) -> 'Blocks':
    """Returns the kernel of uint8 rows, or of their shape.

    Raises:
      ValueError: the kind is unknown, or rows are no whole number of blocks.
    """
    expect.one_of('kind', kind, block_kinds.KINDS)
    size = block_kinds.KINDS[kind].bytes
    if data.dtype != jnp.uint8 or len(data.shape) < 2 or data.shape[-1] % size:
      raise ValueError(
        f'data: got {jnp.dtype(data.dtype).name}{list(data.shape)}, expected'
        f' uint8 rows of {size} bytes per block of {kind}; check the file that'
        ' they come from'
      )
    return cls(data, kind)

  def tree_flatten_with_keys(self):
    """Returns the bytes by name, for JAX."""
    return ((jax.tree_util.DictKey('data'), self.data),), self.kind

  @classmethod
  def tree_unflatten(cls, kind, children):
    """Returns the kernel of the bytes, for JAX."""
    return cls(children[0], kind)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel that is stored, [..., in, out]."""
    *leading, columns, width = self.data.shape
    kind = block_kinds.KINDS[self.kind]
    return (*leading, width // kind.bytes * kind.weights, columns)

  @property
  def ndim(self) -> int:
    """The number of axes of the kernel."""
    return len(self.data.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all rows."""
    return math.prod(self.data.shape)

  @property
  def bits(self) -> float:
    """Bits per weight, scales included."""
    return 8 * self.nbytes / math.prod(self.shape)

  def matrix(self, n: Any) -> 'Blocks':
    """Returns matrix n of the first axis, by a static or traced number."""
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), self
    )

  def part(self, start: Any, size: int) -> 'Blocks':
    """Returns `size` columns of the kernel, from a static or traced one on."""
    axis = self.ndim - 2
    data = jax.lax.dynamic_slice_in_dim(self.data, start, size, axis)
    return Blocks(data, self.kind)

  def split(self, num: int, axis: int) -> list['Blocks']:
    """Returns equal parts of inputs (0) or outputs (1); cuts no block."""
    parts = jnp.split(self.data, num, -1 - axis)
    return [Blocks(data, self.kind) for data in parts]

  def columns(self, ids: jax.Array) -> 'Blocks':
    """Returns the columns of the ids [n], in that order."""
    data = jnp.take(self.data, ids, self.ndim - 2, mode='clip')
    return Blocks(data, self.kind)

  def rows(self, dtype: Any) -> jax.Array:
    """Returns the rows, decoded in float32, [..., out, in]."""
    kind = block_kinds.KINDS[self.kind]
    blocks = self.data.reshape((*self.data.shape[:-1], -1, kind.bytes))
    decoded = kind.decode(blocks).astype(dtype)
    return decoded.reshape((*self.data.shape[:-1], -1))

  def whole(self, dtype: Any) -> jax.Array:
    """Returns the kernel, [..., in, out], decoded in float32."""
    return jnp.swapaxes(self.rows(dtype), -1, -2)
