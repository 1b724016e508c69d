"""The ports of a model of which each device holds a part.

In training the compiler splits the products of a model, as `parallel.rules`
says. In serving each device runs a model with fewer heads, a narrower MLP and a
part of the vocabulary, inside `jax.shard_map` over the devices of a mesh. It
computes with its own weights and its own pages alone, so that every kernel
works as on one device, and no compiler can decide to gather a weight. All that
devices send is written here:

  - after `out` and `down`, whose inputs are split: a sum of the stream, two per
    layer (Megatron-LM, arXiv:1909.08053, section 3). Where such a kernel is
    stored in fewer bits and its inputs cannot be split (`across_parts`), the
    inputs of all devices, and then their outputs;
  - after the experts of a mixture: a sum. Where their `down` is stored so, too,
    its inputs, and then its outputs, among the devices that share its experts;
  - before a norm over all heads together: a sum per token of squares;
  - after the embedding, of which each device has some rows: a sum.

Logits stay where they are: `inference.sampling.vocabulary` samples from them.

The devices are a grid, `expert` x `tensor`. All of them share heads, MLP and
vocabulary. Of a mixture each row of the grid has some of the experts whole, and
the devices of a row share their width. The sum after the experts is over the
grid, however it is shaped: tokens are everywhere, and so no token is sent.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# Axes of the mesh, see `parallel.rules`.
EXPERT, TENSOR = 'expert', 'tensor'
AXIS = (EXPERT, TENSOR)  # all devices, in their order
# Parts into which a sum over the vocabulary is cut, so that its bits do not
# depend on the number of devices, up to this one.
SUM_PARTS = 8


@dataclasses.dataclass(frozen=True)
class Joined:
  """The port `joined` of `models.execution`: inputs are split."""

  linear: Callable[..., Any]

  def __call__(self, x, w_IO, bias_O, dtype):
    y = jax.lax.psum(self.linear(x, w_IO, None, dtype), AXIS)
    return biased(y, bias_O, dtype)

  def over_parts(self, of_part, x, w_IO, dtype, pair=None):
    """Returns the product of a kernel that is cut as one of floats."""
    y = of_part(self.linear, x, w_IO, pair)
    return jax.lax.psum(y.astype(dtype), AXIS)

  def across_parts(self, of_part, x, w_IO, dtype):
    """Returns the product of a kernel of which devices have some outputs."""
    y = of_part(self.linear, gathered(x, w_IO.places), w_IO.kernel, None)
    return gathered(y.astype(dtype))[..., : w_IO.width]


@dataclasses.dataclass(frozen=True)
class HeadsMeanSquare:
  """The port `heads_mean_square`: heads are split.

  Heads of zeros add nothing, and a key head counts as often as it is copied.
  """

  queries: int  # numbers of which the mean is, of all devices
  keys: int

  def __call__(self, x, name):
    total = jax.lax.psum(jnp.sum(x * x, axis=-1, keepdims=True), AXIS)
    return total / self.count(name)

  def count(self, name: str) -> int:
    """Returns the numbers of which the mean is."""
    return {'query_norm': self.queries, 'key_norm': self.keys}[name]


@dataclasses.dataclass(frozen=True)
class Experts:
  """The port `apply_experts`: a device has a part of experts, or some."""

  apply_experts: Callable[..., jax.Array]
  linear: Callable[..., Any]

  def __call__(self, x_BTD, ids_BTA, gates_BTA, kernels, dtype, **stored):
    down = kernels['down']
    ids_BTA = ids_here(ids_BTA, down.shape[0])
    args = x_BTD, ids_BTA, gates_BTA, kernels, dtype
    if not is_across(down):
      return jax.lax.psum(self.apply_experts(*args, **stored), AXIS)
    port = _ExpertsAcross(self.linear)
    y_BTo = self.apply_experts(*args, **stored, multiply=port)
    y_BTD = gathered(y_BTo, over=TENSOR)[..., : down.width]
    return jax.lax.psum(y_BTD, EXPERT)


@dataclasses.dataclass(frozen=True)
class _ExpertsAcross:
  """The products of experts of whose `down` devices have some outputs."""

  linear: Callable[..., Any]

  def over_parts(self, of_part, x_JI, w_EIO, dtype, pair=None):
    """Returns the product of `up` or `gate`, of the columns that are here."""
    del dtype, pair
    return of_part(self.linear, x_JI, w_EIO)

  def across_parts(self, of_part, x_JI, w_EIO, dtype):
    """Returns the outputs of `down` that are here."""
    del dtype
    return of_part(self.linear, gathered(x_JI, over=TENSOR), w_EIO.kernel)


def is_across(kernel: Any) -> bool:
  """Returns whether devices have some outputs of a kernel of a sum each."""
  # Of models.linear.stored.across.Across, which nothing here may import.
  return hasattr(kernel, 'places')


def ids_here(ids_BTA: jax.Array, num_here: int) -> jax.Array:
  """Returns the ids of experts among those of a device.

  Args:
    ids_BTA: among the experts of the model.
    num_here: experts of this device.

  Returns:
    int32; `num_here` for an expert that another device has.
  """
  if jax.lax.axis_size(EXPERT) == 1:
    return ids_BTA
  ids_BTA = ids_BTA - jax.lax.axis_index(EXPERT) * num_here
  is_here_BTA = (ids_BTA >= 0) & (ids_BTA < num_here)
  return jnp.where(is_here_BTA, ids_BTA, num_here)


@dataclasses.dataclass(frozen=True)
class LookUp:
  """The port `look_up`: rows of the table are split."""

  look_up: Callable[..., jax.Array]
  num_rows: int  # of a device

  def __call__(self, table, ids_BT):
    ids_BT = ids_BT - jax.lax.axis_index(AXIS) * self.num_rows
    is_here_BT = (ids_BT >= 0) & (ids_BT < self.num_rows)
    rows_BTD = self.look_up(table, jnp.where(is_here_BT, ids_BT, 0))
    # A row that another device has must not be in the sum, not even times zero:
    # the row that is read in its place may be infinite.
    rows_BTD = jnp.where(is_here_BT[..., None], rows_BTD, 0)
    return jax.lax.psum(rows_BTD, AXIS)  # exact: one term, and zeros


def gathered(
  x: jax.Array, places_I: jax.Array | None = None, over: Any = AXIS
) -> jax.Array:
  """Returns the last axis of all devices, in their order.

  Args:
    x: the part of this device, [..., I / devices].
    places_I: the entries to return, in that order; None: all.
    over: the axes of the mesh along which the devices lie.
  """
  x = jax.lax.all_gather(x, over, axis=x.ndim - 1, tiled=True)
  return x if places_I is None else jnp.take(x, places_I, axis=-1)


@dataclasses.dataclass(frozen=True)
class Masked:
  """The port `masked`: ids count over the parts of all devices."""

  masked: Callable[..., jax.Array]

  def __call__(self, logits, spare_ids):
    start = jax.lax.axis_index(AXIS) * logits.shape[-1]
    return self.masked(
      logits, tuple((first - start, end - start) for first, end in spare_ids)
    )


def total(
  row_sum: Callable[[jax.Array], jax.Array], values_BV: jax.Array
) -> jax.Array:
  """Returns the sums of rows [B, V] that are split, [B].

  The parts of a row are summed by `row_sum`, and then in a fixed order.
  """
  num_local = max(SUM_PARTS // jax.lax.axis_size(AXIS), 1)
  rows = values_BV.shape[0]
  sums = row_sum(values_BV.reshape(rows * num_local, -1))
  sums_PB = jax.lax.all_gather(
    sums.reshape(rows, num_local).T, AXIS, tiled=True
  )
  return in_order(sums_PB)


def in_order(terms: jax.Array) -> jax.Array:
  """Returns the sum over the first axis, as a tree of pairs."""
  while len(terms) > 1:
    last = terms[len(terms) // 2 * 2 :]
    terms = jnp.concatenate([terms[:-1:2] + terms[1::2], last])
  return terms[0]


def biased(y: jax.Array, bias_O: jax.Array | None, dtype: Any) -> jax.Array:
  """Returns a sum over devices with the bias, which is added once."""
  if bias_O is None:
    return y
  return y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
