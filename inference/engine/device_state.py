"""The state of an engine on the device: the KV cache and the slots."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference.sampling import penalties, sampler as sampler_lib
from models import axes, kv_cache as kv_cache_lib, transformer

Params = Any  # the variables of `models.transformer.Transformer`
# The pages of each layer. With a draft head, one more: the final hidden states
# of the same tokens, so they follow prefix hits, forks and preemptions as keys
# do.
KVCache = tuple[kv_cache_lib.Pages, ...]


class Unread(NamedTuple):
  """Params that are still on the disk; an engine reads them in a thread."""

  shapes: Params  # with their shardings
  # (convert) -> params; convert(path, weight) is the form of each to keep
  read: Callable[[Callable[[str, jax.Array], Any]], Params]

  @property
  def device(self) -> jax.Device:
    """Returns the only device of the params."""
    (device,) = jax.tree.leaves(self.shapes)[0].sharding.device_set
    return device

  @property
  def num_bytes(self) -> int:
    """Returns the bytes of all params."""
    leaves = jax.tree.leaves(self.shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def unread(params: Params | Unread) -> Unread:
  """Returns params that are there already as if they had to be read."""
  if isinstance(params, Unread):
    return params

  def read(convert: Callable[[str, jax.Array], Any]) -> Params:
    return jax.tree.map_with_path(
      lambda path, x: convert('/'.join(axes.names(path)), x), params
    )

  return Unread(params, read)


def abstract(tree: Any) -> Any:
  """Returns the shapes, dtypes and shardings of the arrays of a tree."""

  def of_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(of_leaf, tree)


def check_alike(params: Params, served: Params) -> None:
  """Checks that params can take the place of others.

  Raises:
    ValueError: names, shapes or dtypes differ.
  """
  got, expected = (
    jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)
    for tree in (params, served)
  )
  if got != expected:
    raise ValueError(
      'weights: got other names, shapes or dtypes than those served, expected'
      ' the same; make another engine for another model'
    )


class Slots(NamedTuple):
  """The sampling state of each slot; a running sequence has one slot.

  The last slot belongs to no sequence: padding writes there.
  """

  last_B: jax.Array  # int32, the token sampled last
  # bool: the sequence has ended, which the host may not know yet. No token of
  # it is computed any more.
  has_ended_B: jax.Array
  sampler: sampler_lib.Sampler
  seen_BV: jax.Array  # int32, token counts, see `penalties.recount`


class State(NamedTuple):
  """Everything that stays on the device between steps."""

  kv_cache: KVCache
  slots: Slots


def init_state(
  model: transformer.Transformer,
  *,
  num_slots: int,
  num_pages: int,
  page_size: int,
  kv_dtype: Any,
  channels: int,
  vocab_size: int,
  keeps_hidden: bool = False,
) -> State:
  """Returns the state of an engine without sequences.

  Args:
    model: the model that is served.
    num_slots: of sequences; the state has one more, for padding.
    num_pages: P, of each layer.
    page_size: Q, tokens per page.
    kv_dtype: of the pages.
    channels: C of the pages; some kernels want more than the model has.
    vocab_size: V, ids that may be sampled.
    keeps_hidden: whether pages hold final hidden states, too.
  """
  pages = kv_cache_lib.init_pages(
    model.config,
    num_pages=num_pages,
    page_size=page_size,
    dtype=kv_dtype,
    channels=channels,
  )
  if keeps_hidden:
    hidden = kv_cache_lib.init_hidden(
      model.config,
      num_pages=num_pages,
      page_size=page_size,
      dtype=hidden_dtype(model.dtype, kv_dtype),
    )
    pages = (*pages, hidden)
  slots = Slots(
    last_B=jnp.zeros((num_slots + 1,), jnp.int32),
    has_ended_B=jnp.zeros((num_slots + 1,), bool),
    sampler=sampler_lib.empty(num_slots + 1),
    seen_BV=jnp.zeros((num_slots + 1, vocab_size), jnp.int32),
  )
  return State(pages, slots)


def hidden_dtype(dtype: Any, kv_dtype: Any) -> Any:
  """Returns the dtype of the final hidden states in pages.

  They are never quantised, since one state is all that a draft begins with.

  Args:
    dtype: of the computation.
    kv_dtype: of keys and values.
  """
  if jnp.dtype(kv_dtype).name not in kv_cache_lib.QUANTIZED:
    return kv_dtype
  if jnp.dtype(dtype) == jnp.bfloat16:
    return kv_cache_lib.BFLOAT16_BITS
  return dtype


@functools.partial(jax.jit, donate_argnames=('slots',))
def seat(slots: Slots, seats_SW: jax.Array) -> Slots:
  """Gives slots the settings of sequences. Donates `slots`.

  Args:
    slots: of the engine.
    seats_SW: of `seats`.
  """
  slots_S = seats_SW[:, 0]
  return slots._replace(
    has_ended_B=slots.has_ended_B.at[slots_S].set(False),
    sampler=sampler_lib.put(slots.sampler, slots_S, seats_SW[:, 1:]),
  )


def seats(
  rows: Sequence[tuple[int, sampler_lib.Sampler]], size: int, padding_slot: int
) -> np.ndarray:
  """Returns slots and the settings of their sequences, int32 [size, 1 + W].

  Args:
    rows: slots and settings, `size` at most.
    size: number of rows.
    padding_slot: the slot of the rows that are left, which no sequence has.
  """
  seats_SW = np.tile(_idle_seat(padding_slot), (size, 1))
  if rows:
    seats_SW[: len(rows), 0] = [slot for slot, _ in rows]
    seats_SW[: len(rows), 1:] = sampler_lib.words([row for _, row in rows])
  return seats_SW


@functools.cache
def _idle_seat(slot: int) -> np.ndarray:
  """Returns a slot and the settings of no sequence, int32 [1 + W]."""
  (idle_W,) = sampler_lib.words([sampler_lib.idle()])
  return np.concatenate([np.array([slot], np.int32), idle_W])


@functools.partial(jax.jit, donate_argnames=('slots',))
def recount(
  slots: Slots,
  slot: jax.Array,
  ids_T: jax.Array,
  num_prompt_tokens: jax.Array,
) -> Slots:
  """Counts the tokens of a sequence for its penalties. Donates `slots`."""
  vocab_size = slots.seen_BV.shape[1]
  seen_V = penalties.recount(ids_T, num_prompt_tokens, vocab_size)
  return slots._replace(seen_BV=slots.seen_BV.at[slot].set(seen_V))
