"""The adapters of an engine: the weights of all in one table, a slot for each.

    slot = engine.adapters.load(digest, tree)
    engine.submit(Request(prompt_ids=..., adapter=digest))
    engine.adapters.unload(digest)

The table has a fixed number of slots, and each adapter is padded to a fixed
rank: the programs of the engine are compiled once, whatever adapters come and
go. Slot 0 is the base alone. Each token of a step has the slot of its sequence,
see `models.layers.adapters`. An engine without slots has no table, and its
programs know nothing of adapters.

An adapter is named by its digest, which covers its weights and its base. Cached
prefixes belong to that digest, so that an adapter never meets pages that
another one wrote, whatever names clients use.

Reference: S-LoRA, arXiv:2311.03285 (many adapters on one base).
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from checks import expect
from inference.engine import device_state, engine_config
from models import layout
from models.layers import adapters as adapters_lib
from models.linear.stored import tree as stored_tree

Table = dict[str, Any]  # of `models.layers.adapters.table`


class Places(Protocol):
  """The devices of a table."""

  def laid_out(self, shapes: Table) -> Table:
    """Returns the shapes of a table on its devices, from those of the model."""
    ...

  def row(self, row: Table, table: Table) -> Table:
    """Returns an adapter of `padded` on the devices of a table."""
    ...


class Placement(Protocol):
  """The devices of an engine, see `inference.engine.spread`."""

  @property
  def adapters(self) -> Places:
    """The devices of its table."""
    ...


class _Whole:
  """One device."""

  def laid_out(self, shapes):
    return shapes

  def row(self, row, table):
    return jax.device_put(row, jax.tree.leaves(table)[0].sharding)


WHOLE = _Whole()


class Mirror(Protocol):
  """Other engines of the model, which load the same adapters."""

  def load(self, digest: str, tree: adapters_lib.Tree) -> None:
    """Loads an adapter for the requests that come after it."""
    ...

  def unload(self, digest: str) -> None:
    """Unloads an adapter that no request uses any more."""
    ...


@dataclasses.dataclass(eq=False)
class Loaded:
  """An adapter in its slot."""

  digest: str
  slot: int
  num_params: int
  num_loads: int = 0  # number of loads, minus number of unloads
  num_open: int = 0  # sequences that use it


class AdapterTable:
  """The adapters of one engine; belongs to the thread of the engine."""

  def __init__(
    self,
    params: Any,
    *,
    num_adapters: int,
    rank: int,
    dtype: Any,
    places: Places = WHOLE,
  ):
    """Makes an empty table.

    Args:
      params: of the base, or their shapes; layers stacked or apart.
      num_adapters: slots, besides that of the base; 0: there is no table.
      rank: largest rank.
      dtype: of the computation.
      places: the devices of the table.
    """
    self.num_adapters, self.rank = num_adapters, rank
    self._places = places
    self._base = Loaded('', 0, 0)
    self._loaded = {'': self._base}
    self._free = list(range(1, num_adapters + 1))
    self.table: Table | None = None
    if num_adapters:
      self._shapes = _shapes(params, num_adapters, rank, dtype)
      self.table = _made(places.laid_out(self._shapes))
    # (table, slot, tree) -> table; compiled by the engine.
    self.put: Callable[[Table, int, Table], Table] = put
    self.mirror: Mirror | None = None

  def beside(self, params: Any) -> Any:
    """Returns the variables of a step: params, and the table if any."""
    if self.table is None:
      return params
    return {**params, adapters_lib.COLLECTION: self.table}

  @property
  def digests(self) -> list[str]:
    """The digests of the adapters that are loaded."""
    return [digest for digest in self._loaded if digest]

  @property
  def num_bytes(self) -> int:
    """Bytes of the table, on one device."""
    return _num_bytes(self.table)

  def find(self, digest: str) -> Loaded:
    """Returns a loaded adapter; '' is the base.

    Raises:
      ValueError: it is not loaded.
    """
    if digest not in self._loaded:
      raise ValueError(
        f'adapter: got {expect.shown(digest)}, which is not loaded, expected'
        f' {self._shown()}; load it first'
      )
    return self._loaded[digest]

  def load(
    self, digest: str, tree: adapters_lib.Tree, row: Table | None = None
  ) -> int:
    """Puts an adapter into a free slot; returns the slot.

    An adapter that is loaded under two names has one slot, until both are
    unloaded.

    Args:
      digest: of the adapter with its base.
      tree: separate layers, scales folded into B.
      row: `fitted`, if another thread has made it already.

    Raises:
      ValueError: no slot is free, or the adapter does not fit into one.
    """
    if (known := self._loaded.get(digest)) is None:
      self.check_room(digest)
      row = row or self.fitted(tree)
      assert self.table is not None
      known = Loaded(digest, self._free.pop(0), _num_params(tree))
      self.table = self.put(self.table, known.slot, row)
      self._loaded[digest] = known
      if self.mirror:
        self.mirror.load(digest, tree)
    known.num_loads += 1
    return known.slot

  def unload(self, digest: str) -> None:
    """Frees the slot of an adapter, unless it was loaded more than once.

    Raises:
      ValueError: it is not loaded, or a sequence uses it.
    """
    known = self.find(digest)
    if known is self._base or (known.num_loads == 1 and known.num_open):
      raise ValueError(
        f'adapter: got {expect.shown(digest)} to unload while'
        f' {known.num_open} sequences use it, expected one without; finish or'
        ' cancel them'
      )
    known.num_loads -= 1
    if not known.num_loads:
      del self._loaded[digest]
      self._free.append(known.slot)
      if self.mirror:
        self.mirror.unload(digest)

  def check_empty(self) -> None:
    """Checks that the base may change.

    Raises:
      ValueError: an adapter is loaded, which belongs to the base before.
    """
    if self.digests:
      raise ValueError(
        f'weights: got new ones while {len(self.digests)} adapters of the old'
        ' ones are loaded, expected none; unload them first'
      )

  def check_room(self, digest: str) -> None:
    """Checks that an adapter is loaded, or finds a free slot.

    Raises:
      ValueError: no slot is free.
    """
    if self.table is not None and not self._free and digest not in self._loaded:
      raise ValueError(
        f'adapter: got one more to load, expected at most {self.num_adapters}'
        ' (engine.max_adapters); unload another, or raise it'
      )

  def fitted(self, tree: adapters_lib.Tree) -> Table:
    """Returns the row of an adapter, on the device; any thread may call it.

    Raises:
      ValueError: it does not fit into one, or there are none.
    """
    if self.table is None:
      raise ValueError(
        'adapter: got one to load, expected none: this engine has no slots for'
        ' adapters; set engine.max_adapters'
      )
    return self._places.row(
      padded(tree, self._shapes, rank=self.rank), self.table
    )

  def _shown(self) -> str:
    shown = [each[:16] for each in self.digests]
    return f'one of {", ".join(shown)}' if shown else 'none: no adapter is'


def made(
  config: engine_config.EngineConfig,
  params: device_state.Unread,
  dtype: Any,
  placement: Placement,
) -> AdapterTable:
  """Returns the empty table of an engine, see `AdapterTable`."""
  return AdapterTable(
    params.shapes,
    num_adapters=config.max_adapters or 0,
    rank=config.max_adapter_rank or 0,
    dtype=dtype,
    places=placement.adapters,
  )


def layer_shapes(params: Any) -> dict[str, tuple[int, int]]:
  """Returns (in, out) of each layer that may be adapted, by path.

  Args:
    params: of the base, or their shapes; layers stacked or apart.
  """
  tree = params['params']
  num_layers = [leaf.shape[0] for leaf in jax.tree.leaves(tree.get('layers'))]
  paths, _ = jax.tree_util.tree_flatten_with_path(
    tree,
    is_leaf=lambda x: (
      isinstance(x, layout.Transposed) or stored_tree.is_stored(x)
    ),
  )
  found = {}
  for keys, leaf in paths:
    first, *names = [key.key for key in keys]
    if len(names) < 2 or names[-1] != 'kernel' or names[-2] in layout.RESHAPED:
      continue
    is_transposed = isinstance(leaf, layout.Transposed)
    shape = leaf.kernel_OI.shape[::-1] if is_transposed else leaf.shape
    rest = '/'.join(names[:-1])
    if first == 'layers' and len(shape) == 3:
      for n in range(num_layers[0]):
        found[f'layer_{n}/{rest}'] = shape[1:]
    elif first.startswith('layer_') and len(shape) == 2:
      found[f'{first}/{rest}'] = shape
  return found


def num_bytes(
  params: Any,
  *,
  num_adapters: int,
  rank: int,
  dtype: Any,
  places: Places = WHOLE,
) -> int:
  """Returns the bytes of a table on a device; arguments as `AdapterTable`'s."""
  return _num_bytes(
    shapes(
      params, num_adapters=num_adapters, rank=rank, dtype=dtype, places=places
    )
  )


def shapes(
  params: Any,
  *,
  num_adapters: int,
  rank: int,
  dtype: Any,
  places: Places = WHOLE,
) -> Table:
  """Returns the shapes of a table as it lies; arguments as `AdapterTable`'s."""
  return places.laid_out(_shapes(params, num_adapters, rank, dtype))


def _num_bytes(table: Table | None) -> int:
  def of(leaf: Any) -> int:
    sharding, shape = leaf.sharding, leaf.shape
    if sharding is not None:
      shape = sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(map(of, jax.tree.leaves(table)))


def padded(tree: adapters_lib.Tree, like: Any, *, rank: int) -> Table:
  """Returns an adapter with an entry of the same rank at every layer.

  Its function is the same, bit for bit: what is added is 0, and gains of 1.

  Args:
    tree: separate layers, scales folded into B.
    like: a table, whose layers and dtypes the result has.
    rank: of the result.

  Raises:
    ValueError: a rank is larger, a layer is unknown or has another shape, or a
      number is not finite.
  """
  given = dict(adapters_lib.entries(tree))
  places = dict(adapters_lib.entries(like))
  if unknown := sorted(given.keys() - places):
    raise ValueError(
      f'adapter: got weights of {", ".join(unknown[:3])}, expected only linear'
      ' layers of the base that tokens of different adapters can share, such as'
      f' {", ".join(sorted(places)[:3])}; merge it into a directory of its own'
    )
  found = {}
  for path, place in places.items():
    width, out = place['a'].shape[0], place['b'].shape[-1]
    entry = given.get(path, {})
    a = np.zeros((width, rank), np.float32)
    b = np.zeros((rank, out), np.float32)
    gain = np.ones((out,), np.float32)
    if entry:
      _check_entry(path, entry, width=width, out=out, rank=rank)
      own = entry['a'].shape[-1]
      a[:, :own], b[:own] = entry['a'], entry['b']
      gain[:] = entry.get('gain', 1)
    made = {'a': a, 'b': b, 'gain': gain}
    found[path] = {k: v.astype(place[k].dtype) for k, v in made.items()}
  return adapters_lib.nested(found)


def alone(
  tree: adapters_lib.Tree, params: Any, *, rank: int, dtype: Any
) -> Table:
  """Returns an adapter as a slot of an engine has it, for its params alone.

  Args:
    tree: separate layers, scales folded into B.
    params: of the base; layers stacked or apart.
    rank: that the engine pads to.
    dtype: of the computation.
  """
  shapes = _shapes(params, 0, rank, dtype)
  return jax.tree.map(jnp.asarray, padded(tree, shapes, rank=rank))


def _check_entry(
  path: str, entry: Mapping[str, Any], *, width: int, out: int, rank: int
) -> None:
  own = entry['a'].shape[-1]
  if own > rank:
    raise ValueError(
      f'adapter: got rank {own} at {path}, expected at most {rank}'
      ' (engine.max_adapter_rank); raise it'
    )
  shapes = entry['a'].shape, entry['b'].shape
  if shapes != ((width, own), (own, out)):
    raise ValueError(
      f'adapter: got shapes {shapes} at {path}, expected {(width, own)} and'
      f' {(own, out)}; it is an adapter of another model'
    )
  # A row of another adapter is multiplied by 0, which is no number then.
  if not all(np.isfinite(np.asarray(x)).all() for x in entry.values()):
    raise ValueError(
      f'adapter: got numbers that are not finite at {path}, expected finite'
      ' ones; its training has diverged'
    )


def _shapes(params: Any, num_adapters: int, rank: int, dtype: Any) -> Table:
  """Returns the shapes of a table; arguments as of `AdapterTable`."""
  num_slots = num_adapters + 1

  def entry(path: str, width: int, out: int) -> dict[str, Any]:
    # A router is computed in float32 in every dtype.
    kind = jnp.float32 if path.endswith('/router') else dtype
    shapes = {
      'a': (width, num_slots, rank),
      'b': (num_slots, rank, out),
      'gain': (num_slots, out),
    }
    return {
      name: jax.ShapeDtypeStruct(shape, kind) for name, shape in shapes.items()
    }

  return adapters_lib.nested(
    {path: entry(path, *shape) for path, shape in layer_shapes(params).items()}
  )


def _made(shapes: Table) -> Table:
  """Returns a table without adapters."""

  def array(path, leaf):
    fill = jnp.ones if path[-1].key == 'gain' else jnp.zeros
    return fill(leaf.shape, leaf.dtype, device=leaf.sharding)

  return jax.tree_util.tree_map_with_path(array, shapes)


def row_shapes(table: Table) -> Table:
  """Returns the shapes of `padded` for a table, as they lie beside it."""

  def shape(leaf, axis):
    kept = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return jax.ShapeDtypeStruct(kept, leaf.dtype, sharding=_without(leaf, axis))

  return adapters_lib.nested(
    {
      path: {
        'a': shape(place['a'], 1),
        'b': shape(place['b'], 0),
        'gain': shape(place['gain'], 0),
      }
      for path, place in adapters_lib.entries(table)
    }
  )


def _without(leaf: Any, axis: int) -> NamedSharding | None:
  """Returns how an entry of an array of a mesh lies, without an axis."""
  if not isinstance(leaf.sharding, NamedSharding):
    return None
  spec = list(leaf.sharding.spec)
  del spec[axis]
  return NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec))


def put(table: Table, slot: Any, tree: Table) -> Table:
  """Returns the table with an adapter of `padded` in a slot."""

  def entry(place, own):
    return {
      'a': place['a'].at[:, slot].set(own['a']),
      'b': place['b'].at[slot].set(own['b']),
      'gain': place['gain'].at[slot].set(own['gain']),
    }

  own = dict(adapters_lib.entries(tree))
  return adapters_lib.nested(
    {
      path: entry(place, own[path])
      for path, place in adapters_lib.entries(table)
    }
  )


def _num_params(tree: adapters_lib.Tree) -> int:
  """Returns the numbers in the matrices of an adapter."""
  return sum(
    entry['a'].size + entry['b'].size for _, entry in adapters_lib.entries(tree)
  )
