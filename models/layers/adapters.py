"""Low-rank adapters of linear layers: a small change beside frozen weights.

    y = (x W + (x A) B) gain + bias

The collection `adapters` lies beside `params`. At the path of the module that
owns the kernel W [in, out] it has {'a': [in, r], 'b': [r, out]}, and for DoRA
'gain': [out] too. Layers that are not adapted have no entry. The scale of an
adapter is folded into B before the model sees it, see
models/adapter_config.py. Stacked layers have one more axis in front.

The rows of a batch may have different adapters. `table` joins the adapters of a
layer, and `routed` gives each token its slot in the table; slot 0 is the base
without an adapter. All slots are computed as one pair of products, of which a
token keeps the part of its own slot. So a token does not depend on the adapters
of others, and no adapter is gathered per token.

References: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import axes

COLLECTION = axes.ADAPTERS
A, B, GAIN = 'a', 'b', 'gain'
# int32 [B, T], in every entry of a tree that is `routed`, by either name.
_SLOTS, _SLOTS_APART = 'slots', 'slots_apart'

Tree = Mapping[str, Any]  # nested by module name, down to an entry per layer
Entry = Mapping[str, Any]
# (x[..., I], w_IO, bias_O | None) -> y[..., O]
Multiply = Callable[..., jax.Array]


def of(module: nn.Module) -> Entry | None:
  """Returns the adapter of the module that is being called, or None."""
  if not module.has_variable(COLLECTION, A):
    return None
  return {
    name: module.get_variable(COLLECTION, name)
    for name in (A, B, GAIN, _SLOTS, _SLOTS_APART)
    if module.has_variable(COLLECTION, name)
  }


def linear(
  adapter: Entry,
  multiply: Multiply,
  x: jax.Array,
  w_IO: Any,
  bias_O: Any,
  over_parts: Callable[..., jax.Array] | None = None,
) -> jax.Array:
  """Returns the output [..., O] of an adapted linear layer.

  Args:
    adapter: the adapter of the layer, or the routed adapters of many slots.
    multiply: computes a product, in the dtype of the result.
    x: input, [..., I].
    w_IO: the frozen kernel.
    bias_O: None if the layer has none. No gain applies to it.
    over_parts: (change, x, w_IO, pair) -> the sum of the product and of the
      change, where both are computed in parts, see `models.linear.stored`;
      change is a function (multiply, x, pair). None: they are not.
  """
  if over_parts is not None:

    def change(multiply: Multiply, x: jax.Array, pair: Any) -> jax.Array:
      a, b = pair
      return _change({**adapter, A: a, B: b}, multiply, x)

    y = over_parts(change, x, w_IO, (adapter[A], adapter[B]))
  elif GAIN not in adapter:
    return multiply(x, w_IO, bias_O) + _change(adapter, multiply, x)
  else:
    y = multiply(x, w_IO, None) + _change(adapter, multiply, x)
  if GAIN in adapter:
    y = _with_gain(adapter, y)
  if bias_O is not None:
    y = y + bias_O.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y


def _with_gain(adapter: Entry, y: jax.Array) -> jax.Array:
  gain = adapter[GAIN].astype(y.dtype)
  if (slots := _slots(adapter)) is not None:
    gain = jnp.take(gain, slots, axis=0)
  return y * gain.reshape((1,) * (y.ndim - gain.ndim) + gain.shape)


def _slots(adapter: Entry) -> jax.Array | None:
  """Returns the slot of each token, None if there is one adapter."""
  return adapter.get(_SLOTS, adapter.get(_SLOTS_APART))


def _change(adapter, multiply, x):
  """Returns (x A) B, of the slot of each token if there are several."""
  a, b = adapter[A], adapter[B]
  if _SLOTS_APART in adapter:
    return _change_apart(adapter, multiply, x)
  if _SLOTS not in adapter:
    return multiply(multiply(x, a, None), b, None)
  width, num_slots, rank = a.shape
  slots = adapter[_SLOTS][..., None]
  each = jnp.arange(num_slots).reshape((1,) * (slots.ndim - 1) + (-1,))
  is_mine = slots == each
  h = multiply(x, a.reshape((width, -1)), None)
  # Not a product with 0: the part of another slot may be infinite.
  h = jnp.where(jnp.repeat(is_mine, rank, axis=-1), h, jnp.zeros((), h.dtype))
  return multiply(h, b.reshape((-1, b.shape[-1])), None)


def _change_apart(adapter, multiply, x):
  """Returns the result of `_change`, computed one slot after the other."""
  a, b, slots = adapter[A], adapter[B], adapter[_SLOTS_APART]

  def add(y, slot):
    change = multiply(multiply(x, a[:, slot], None), b[slot], None)
    return jnp.where((slots == slot)[..., None], change, y), None

  like = jax.eval_shape(lambda: multiply(x, a[:, 0] @ b[0], None))
  empty = jnp.zeros(like.shape, like.dtype)
  y, _ = jax.lax.scan(add, empty, jnp.arange(b.shape[0]))
  return y


def kernel(adapter: Entry, w_IO: jax.Array, name: str) -> jax.Array:
  """Returns the adapted kernel, float32, for a use other than a plain product.

  Raises:
    ValueError: the adapter is of many slots.
  """
  if _slots(adapter) is not None:
    raise ValueError(
      f'adapters: got several adapters of {name}, expected one: latent'
      ' attention uses this kernel for all rows at once; merge the adapter into'
      ' a directory of its own'
    )
  return merged(w_IO, adapter)


def merged(w_IO: Any, adapter: Entry) -> Any:
  """Returns (W + A B) gain in float32, with any leading axes."""
  w_IO, a, b = (
    jnp.asarray(x, jnp.float32) for x in (w_IO, adapter[A], adapter[B])
  )
  whole = w_IO + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if GAIN in adapter:
    whole = whole * jnp.asarray(adapter[GAIN], jnp.float32)[..., None, :]
  return whole


def entries(tree: Tree, path: str = '') -> Iterator[tuple[str, Entry]]:
  """Yields each entry with the path of its layer, 'layer_0/mlp/up'."""
  for name in sorted(tree):
    here = f'{path}/{name}' if path else name
    if A in tree[name]:
      yield here, tree[name]
    else:
      yield from entries(tree[name], here)


def nested(by_path: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of entries that are given by path."""
  tree: dict[str, Any] = {}
  for path, entry in by_path.items():
    *above, last = path.split('/')
    place = tree
    for name in above:
      place = place.setdefault(name, {})
    place[last] = entry
  return tree


def table(adapters: Sequence[Tree]) -> dict[str, Any]:
  """Returns the table of adapters: the given adapters have slots 1, 2, ...

  Args:
    adapters: with separate layers, scales folded into B; as
      `frozen.adapters.read` returns them. Ranks and adapted layers may differ.

  Returns:
    At each layer that any adapter adapts: a [in, S, r], b [S, r, out], and gain
    [S, out] if any adapter has a gain. Slots of adapters without this layer
    have zeros, and ones in gain. S is the number of adapters plus 1.
  """
  of_each = [dict(entries(tree)) for tree in adapters]
  joined = {}
  for path in sorted({path for entry in of_each for path in entry}):
    own = [entry.get(path) for entry in of_each]
    some = next(entry for entry in own if entry is not None)
    rank = max(entry[A].shape[1] for entry in own if entry is not None)
    (width, _), (_, out) = some[A].shape, some[B].shape
    num_slots, dtype = len(own) + 1, some[A].dtype
    a = jnp.zeros((width, num_slots, rank), dtype)
    b = jnp.zeros((num_slots, rank, out), dtype)
    gain = jnp.ones((num_slots, out), dtype)
    for slot, entry in enumerate(own, 1):
      if entry is None:
        continue
      mine = slice(0, entry[A].shape[1])
      a = a.at[:, slot, mine].set(entry[A])
      b = b.at[slot, mine].set(entry[B])
      gain = gain.at[slot].set(entry.get(GAIN, 1))
    joined[path] = {A: a, B: b}
    if any(entry is not None and GAIN in entry for entry in own):
      joined[path][GAIN] = gain
  return nested(joined)


def routed(
  tree: Tree, slots_BT: jax.Array, *, is_apart: bool = False
) -> dict[str, Any]:
  """Returns a table in which each token of a batch has its slot.

  Args:
    tree: the table.
    slots_BT: int32; 0 is the base.
    is_apart: compute slot by slot, for invariant numerics: the bits of a token
      then depend neither on its slot nor on the number of slots.
  """
  name = _SLOTS_APART if is_apart else _SLOTS
  return nested(
    {path: {**entry, name: slots_BT} for path, entry in entries(tree)}
  )
