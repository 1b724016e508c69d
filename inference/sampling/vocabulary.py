"""The vocabulary of the logits that are sampled from: whole, or split.

A device of several (`--engine.tensor`) has the logits [B, V] of a part of the
ids. No device gathers the logits of the others. Each finds its own candidates,
and a few numbers per row are exchanged: the largest value with its id, a sum,
or the most probable K. `here` says which of the two the program that is being
traced has: inside `jax.shard_map` over the axis of `parallel.tensor.ports`, the
vocabulary is split.

The token is the same at any number of devices. The noise of an id is a function
of the key and the id (threefry, which counts: Salmon et al., SC 2011), so that
a device draws that of its own ids alone. Equal values rank by id. A mask, a
largest value and a rank are exact. Sums over the vocabulary are rounded in
another order, unless they are cut into fixed parts.
"""

import jax
from jax.extend import random as jax_random
import jax.numpy as jnp

from models.layers import cross_entropy, row_sums
from parallel.tensor import ports

_GROUP = 256  # tokens that `argmax` compares together
_WORD = 32  # bits
_TINY = jnp.finfo(jnp.float32).tiny


class Whole:
  """The vocabulary of a program that has the logits of all ids."""

  def size(self, logits_BV: jax.Array) -> int:
    """Returns the number of ids."""
    return logits_BV.shape[-1]

  def ids(self, num_local: int) -> jax.Array:
    """Returns the ids of an array [V], int32."""
    return jnp.arange(num_local, dtype=jnp.int32)

  def own(self, logits_BV: jax.Array, num_local: int) -> jax.Array:
    """Returns the part [B, V] of the logits of all ids that is used here."""
    del num_local
    return logits_BV

  def local(self, ids: jax.Array, num_local: int) -> jax.Array:
    """Returns ids as indices of an array [.., V]; -1 for those not in it."""
    del num_local
    return ids

  def words(self, allowed_BW: jax.Array, num_local: int) -> jax.Array:
    """Returns the words of bits, one bit per id, of an array [B, V]."""
    del num_local
    return allowed_BW

  def spare(self, num_local: int) -> int:
    """Returns how many zeros behind a row make its sums cheaper."""
    return -num_local % row_sums.UNIT if num_local > row_sums.UNIT else 0

  def max(self, values_BV: jax.Array) -> jax.Array:
    """Returns the largest value of each row, [B, 1]."""
    return jnp.max(values_BV, axis=-1, keepdims=True)

  def all(self, is_so_BV: jax.Array) -> jax.Array:
    """Returns whether all values of each row are true, [B]."""
    return jnp.all(is_so_BV, axis=-1)

  def sum(self, values_BV: jax.Array) -> jax.Array:
    """Returns the sum of each row, [B], see `row_sums.row_sum`."""
    return row_sums.row_sum(values_BV)

  def argmax(self, values_BV: jax.Array) -> jax.Array:
    """Returns the least id of the largest value of each row, int32 [B]."""
    return argmax(values_BV)

  def num_before(self, is_so_BV: jax.Array) -> jax.Array:
    """Returns how many smaller ids of a row are true as well, [B, V].

    It counts for ids that are true themselves.
    """
    return jnp.cumsum(is_so_BV, axis=-1) - 1

  def take(self, values_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """Returns the value of one id per row, [B, 1]."""
    return jnp.take_along_axis(values_BV, ids_B[:, None], axis=-1, mode='clip')

  def top(self, values_BV: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Returns the largest values of each row, and their ids, [B, K] each."""
    values_BK, ids_BK = jax.lax.top_k(values_BV, num)
    return values_BK, ids_BK.astype(jnp.int32)

  def gumbel(self, key_B, positions_B, num_local: int) -> jax.Array:
    """Returns noise [B, V]; a row depends on its key and position only."""

    def row(key, position):
      key = jax.random.fold_in(key, position)
      return jax.random.gumbel(key, (num_local,))

    return jax.vmap(row)(key_B, positions_B)


class Split(Whole):
  """The vocabulary of a device that has the logits of some ids.

  All devices have as many. Methods are those of `Whole`; arrays [B, V] are the
  device's own, and all other results are those of the whole rows.
  """

  def size(self, logits_BV):
    return logits_BV.shape[-1] * jax.lax.axis_size(ports.AXIS)

  def ids(self, num_local):
    return self._start(num_local) + super().ids(num_local)

  def own(self, logits_BV, num_local):
    spare = num_local * jax.lax.axis_size(ports.AXIS) - logits_BV.shape[-1]
    padded = jnp.pad(
      logits_BV, ((0, 0), (0, spare)), constant_values=cross_entropy.MASKED
    )
    start = self._start(num_local)
    return jax.lax.dynamic_slice_in_dim(padded, start, num_local, 1)

  def local(self, ids, num_local):
    ids = ids - self._start(num_local)
    return jnp.where((ids >= 0) & (ids < num_local), ids, -1)

  def words(self, allowed_BW, num_local):
    num = num_local // _WORD
    total = num * jax.lax.axis_size(ports.AXIS)
    spare = ((0, 0), (0, total - allowed_BW.shape[1]))
    return jax.lax.dynamic_slice_in_dim(
      jnp.pad(allowed_BW, spare), jax.lax.axis_index(ports.AXIS) * num, num, 1
    )

  def spare(self, num_local):
    del num_local  # parts of a row must stay what they are
    return 0

  def max(self, values_BV):
    return jax.lax.pmax(super().max(values_BV), ports.AXIS)

  def all(self, is_so_BV):
    return jax.lax.pmin(super().all(is_so_BV).astype(jnp.int32), ports.AXIS) > 0

  def sum(self, values_BV):
    return ports.total(row_sums.row_sum, values_BV)

  def argmax(self, values_BV):
    ids_B = argmax(values_BV)
    best_B = jnp.take_along_axis(values_BV, ids_B[:, None], axis=1)[:, 0]
    best_NB, ids_NB = jax.lax.all_gather(
      (best_B, ids_B + self._start(values_BV.shape[-1])), ports.AXIS
    )
    # The first of equal values, which has the least id.
    device_B = jnp.argmax(best_NB, axis=0)
    return jnp.take_along_axis(ids_NB, device_B[None], axis=0)[0]

  def num_before(self, is_so_BV):
    num_NB = jax.lax.all_gather(
      jnp.sum(is_so_BV, axis=-1, dtype=jnp.int32), ports.AXIS
    )
    is_before_N1 = jnp.arange(len(num_NB))[:, None] < jax.lax.axis_index(
      ports.AXIS
    )
    num_B = jnp.sum(jnp.where(is_before_N1, num_NB, 0), axis=0)
    return super().num_before(is_so_BV) + num_B[:, None]

  def take(self, values_BV, ids_B):
    ids_B = self.local(ids_B, values_BV.shape[-1])
    found_B1 = super().take(values_BV, jnp.maximum(ids_B, 0))
    found_B1 = jnp.where(ids_B[:, None] >= 0, found_B1, 0)
    return jax.lax.psum(found_B1, ports.AXIS)  # exact: one term, and zeros

  def top(self, values_BV, num):
    num_local = values_BV.shape[-1]
    found, ids = super().top(values_BV, min(num, num_local))
    found_BJ, ids_BJ = jax.lax.all_gather(
      (found, ids + self._start(num_local)), ports.AXIS, axis=1, tiled=True
    )
    # Equal values keep the order of ids: devices are in that order.
    found_BK, places_BK = jax.lax.top_k(found_BJ, num)
    return found_BK, jnp.take_along_axis(ids_BJ, places_BK, axis=1)

  def gumbel(self, key_B, positions_B, num_local):
    ids_V = self.ids(num_local)

    def row(key, position):
      words = jax.random.key_data(jax.random.fold_in(key, position))
      return _gumbel(words, ids_V.astype(jnp.uint32))

    return jax.vmap(row)(key_B, positions_B)

  def _start(self, num_local: int) -> jax.Array:
    """Returns the first id of this device."""
    return jax.lax.axis_index(ports.AXIS) * num_local


_WHOLE, _SPLIT = Whole(), Split()


def here() -> Whole:
  """Returns the vocabulary of the program that is being traced."""
  names = jax.sharding.get_abstract_mesh().manual_axes
  return _SPLIT if ports.TENSOR in names else _WHOLE


def argmax(values_BV: jax.Array) -> jax.Array:
  """Returns the least index of the largest value of each row, int32.

  Finds the group with the largest value, then the index in the group.
  `jnp.argmax` reduces pairs, which XLA does not vectorise on CPU, and the
  operations that made the values are fused into that reduction: measured on
  CPU for 32 rows of 32k, 5 ms against 0.25.
  """
  num_spare = -values_BV.shape[-1] % _GROUP
  spare = ((0, 0), (0, num_spare))
  values_BV = jnp.pad(values_BV, spare, constant_values=-jnp.inf)
  groups = values_BV.reshape(values_BV.shape[0], -1, _GROUP)
  group_B = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
  group = jnp.take_along_axis(groups, group_B[:, None, None], axis=1).squeeze(1)
  index_B = group_B * _GROUP + jnp.argmax(group, axis=-1)
  return index_B.astype(jnp.int32)


def _gumbel(words: jax.Array, ids_V: jax.Array) -> jax.Array:
  """Returns `jax.random.gumbel` of a threefry key at some indices.

  Index i of an array has the bits of the counter i, in two words of 32 bits
  (`jax_threefry_partitionable`, JAX's default). They are made floats as
  `jax.random.uniform` does: 23 bits of mantissa, in [tiny, 1).
  """
  high_V = jnp.zeros_like(ids_V)
  first_V, second_V = jax_random.threefry2x32_p.bind(
    words[0], words[1], high_V, ids_V
  )
  bits_V = (first_V ^ second_V) >> 9 | jnp.uint32(0x3F800000)  # of 1.0
  floats_V = jax.lax.bitcast_convert_type(bits_V, jnp.float32) - 1.0
  uniform_V = jnp.maximum(_TINY, floats_V * (1.0 - _TINY) + _TINY)
  return -jnp.log(-jnp.log(uniform_V))
