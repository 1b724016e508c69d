"""Kernels in fewer bits over devices: what each device holds of one.

A stored kernel W [in, out] takes the place of floats, and has their logical
axes. A cut along outputs goes between rows of the stored arrays, so it is
always possible; outputs of one tile then have a scale each. A cut along inputs
must not go through a tile, a block or a byte. Where it would, and where an
order mixes the inputs, the kernel is cut along its outputs in place of its
inputs (`models.linear.stored.across`): a device has the same share of it, and
devices send inputs and outputs in place of terms.

Of the experts of a mixture, W [expert, in, out], a group of devices has some
whole, and the devices of a group cut these as above, among themselves. With one
device per group no expert is cut.

The filling is zero: codes of zero, and scales whose bytes are zero.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from inference.engine.spread import layout as layout_lib
from models import axes
from models.linear import products as products_lib
from models.linear.stored import (
  across as across_lib,
  block_kinds,
  blocks as blocks_lib,
  kernel as kernel_lib,
  tree as stored_tree,
)
from parallel.tensor import ports

_ZERO_BYTES = {'nf4': 0x77}  # two codes of zero; in other forms 0
_PLACES = 'places'


class Array(NamedTuple):
  """An array of all parts, before it exists."""

  shape: tuple[int, ...]
  dtype: Any
  cut: Mapping[int, Any]  # axes that are cut, and the axes of the mesh there

  def sharding(self, mesh: Mesh) -> NamedSharding:
    """Returns how the array lies over devices."""
    spec = [self.cut.get(n) for n in range(len(self.shape))]
    return NamedSharding(mesh, PartitionSpec(*spec))

  def num_bytes(self, num_devices: int, num_groups: int) -> int:
    """Returns the bytes on one of the devices of so many groups."""
    shared = {
      ports.AXIS: num_devices,
      ports.EXPERT: num_groups,
      ports.TENSOR: num_devices // num_groups,
    }
    num = math.prod(shared[axis] for axis in self.cut.values())
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize // num


class _Gather(NamedTuple):
  """The pieces of an axis that all parts have, in their order."""

  pieces: np.ndarray  # of the model; -1: filling
  width: int  # of a piece
  size: int  # of the axis in the model

  @property
  def total(self) -> int:
    """The size of the axis of all parts."""
    return len(self.pieces) * self.width

  def of_parts(self, x: np.ndarray, axis: int, fill: int) -> np.ndarray:
    """Returns the array of all parts; `fill` is a byte."""
    x = np.moveaxis(x, axis, 0)
    rest, num = x.shape[1:], -(-self.size // self.width)
    wide = _filled((num * self.width, *rest), x.dtype, fill)
    wide[: self.size] = x
    made = _filled((len(self.pieces), self.width, *rest), x.dtype, fill)
    is_some = self.pieces >= 0
    made[is_some] = wide.reshape((num, self.width, *rest))[self.pieces[is_some]]
    return np.moveaxis(made.reshape((self.total, *rest)), 0, axis)

  def of_model(self, x: np.ndarray, axis: int) -> np.ndarray:
    """Returns the array of the model: the inverse of `of_parts`."""
    x = np.moveaxis(x, axis, 0)
    found, first = np.unique(self.pieces, return_index=True)
    first = first[found >= 0]
    x = x.reshape((-1, self.width, *x.shape[1:]))[first]
    x = x.reshape((-1, *x.shape[2:]))[: self.size]
    return np.moveaxis(x, 0, axis)


def _filled(shape: tuple[int, ...], dtype: Any, fill: int) -> np.ndarray:
  # By bytes: float8_e8m0fnu has no zero, and 0 would become NaN.
  made = np.zeros(shape, dtype)
  if fill:
    made[...] = fill
  return made


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
  """How a stored kernel lies over parts."""

  layout: layout_lib.Layout
  kernel: kernel_lib.Kernel | blocks_lib.Blocks  # of the model; shapes
  into: str | None  # logical axis of the inputs
  out: str | None  # of the outputs

  @property
  def has_experts(self) -> bool:
    """Whether the kernel has a matrix per expert."""
    return self.kernel.ndim > 2

  @property
  def _num_parts(self) -> int:
    """The parts that share a matrix."""
    groups = self.layout.num_expert_groups if self.has_experts else 1
    return self.layout.num_parts // groups

  @property
  def is_across(self) -> bool:
    """Whether outputs are cut in place of inputs."""
    return self.layout.is_cut(self.into) and self._units is None

  @property
  def width_in(self) -> int:
    """The number of inputs of all parts."""
    return len(self._inputs)

  def num_weights(self, num_devices: int) -> int:
    """Returns the weights that a device would have of a kernel of floats."""
    names = self.into, self.out
    *leading, rows, columns = self.kernel.shape
    total = math.prod(leading) * math.prod(
      len(self.layout.index(name, size))
      for name, size in zip(names, (rows, columns), strict=True)
    )
    is_cut = self.has_experts or any(map(self.layout.is_cut, names))
    return total // num_devices if is_cut else total

  def num_bytes(self, num_devices: int) -> int:
    """Returns the bytes of the kernel on one of so many devices."""
    groups = min(self.layout.num_expert_groups, num_devices)
    arrays = self.arrays.values()
    return sum(each.num_bytes(num_devices, groups) for each in arrays)

  @functools.cached_property
  def arrays(self) -> Mapping[str, Array]:
    """The arrays of all parts, by name."""
    found = {}
    for name, array in _arrays(self.kernel).items():
      shape = list(array.shape)
      cut: dict[int, Any] = {0: ports.EXPERT} if self.has_experts else {}
      for n, gather in self._gathers(name):
        shape[n] = gather.total
        cut[n] = ports.TENSOR if self.has_experts else ports.AXIS
      found[name] = Array(tuple(shape), array.dtype, cut)
    if self._has_places:
      found.pop('order', None)
      shape = self.kernel.shape[-2:-1]
      found[_PLACES] = Array(shape, np.dtype(np.int32), {})
    return found

  def shapes(self, mesh: Mesh) -> Any:
    """Returns the shapes of the kernel of all parts, with shardings."""
    return self._built(
      {
        name: jax.ShapeDtypeStruct(
          each.shape, each.dtype, sharding=each.sharding(mesh)
        )
        for name, each in self.arrays.items()
      }
    )

  def laid_out(
    self, name: str, array: np.ndarray, mesh: Mesh
  ) -> tuple[np.ndarray, NamedSharding]:
    """Returns an array of the model as that of all parts, and how it lies.

    Args:
      name: 'values', 'scales', 'mins', 'order', 'gain' or 'data'.
      array: of one layer, on the host.
      mesh: the devices.
    """
    if name == 'order' and self._has_places:
      name, array = _PLACES, self._places[array].astype(np.int32)
    fill = 0
    if name == 'values' and isinstance(self.kernel, kernel_lib.Kernel):
      fill = _ZERO_BYTES.get(self.kernel.form, 0)
    for axis, gather in self._gathers(name):
      array = gather.of_parts(array, axis, fill)
    return array, self.arrays[name].sharding(mesh)

  def served(self, kernel: Any, mesh: Mesh) -> Any:
    """Returns the kernel that programs take.

    Args:
      kernel: of the model's form, whose arrays are laid out.
      mesh: the devices.
    """
    arrays = _arrays(kernel)
    if self._has_places:
      places = arrays.pop('order', None)
      if places is None:
        sharding = self.arrays[_PLACES].sharding(mesh)
        own = self._places.astype(np.int32)
        places = jax.make_array_from_callback(
          own.shape, sharding, lambda index: own[index]
        )
      arrays[_PLACES] = places
    return self._built(arrays)

  def of_model(self, kernel: Any, lazily: Any) -> Any:
    """Returns a kernel of programs as that of the model.

    Args:
      kernel: of `served`.
      lazily: (array, shape, inverse) -> an array that becomes `inverse` of the
        other one when it is asked for.
    """
    arrays = {}
    if isinstance(kernel, across_lib.Across):
      arrays[_PLACES], kernel = kernel.places, kernel.kernel
    arrays |= _arrays(kernel)
    places = arrays.pop(_PLACES, None)
    if self.kernel.order is not None and places is not None:
      arrays['order'] = places
    made = {
      name: lazily(
        array,
        _arrays(self.kernel)[name].shape,
        functools.partial(self._of_model, name),
      )
      for name, array in arrays.items()
    }
    return _rebuilt(self.kernel, made)

  def _of_model(self, name: str, array: np.ndarray) -> np.ndarray:
    if name == 'order' and self._has_places:
      return self._inputs[array].astype(array.dtype)
    for axis, gather in self._gathers(name):
      array = gather.of_model(array, axis)
    return array

  # --------------------------------------------------------------------------

  @functools.cached_property
  def _inputs(self) -> np.ndarray:
    """The inputs of the model that all parts have, in their order; -1: none."""
    return self.layout.index(self.into, self.kernel.shape[-2])

  @functools.cached_property
  def _units(self) -> np.ndarray | None:
    """The same in units; None: inputs are not cut, or cannot be."""
    unit, inputs, size = self._unit, self._inputs, self.kernel.shape[-2]
    is_possible = self.layout.is_cut(self.into) and self.kernel.order is None
    if not is_possible or len(inputs) % (unit * self._num_parts):
      return None
    found = inputs.reshape(-1, unit)
    first = found[:, 0]
    expected = first[:, None] + np.arange(unit)
    # The last unit of the model may be a part of one.
    expected[(expected >= size) | (first[:, None] < 0)] = -1
    if (found != expected).any() or (first[first >= 0] % unit).any():
      return None
    if getattr(self.kernel, 'mins', None) is not None:
      # There a code of zero stands for the smallest number of its tile.
      is_filled = (found < 0).any(axis=1)
      if (is_filled & ((first >= 0) | self._has_wide_tiles)).any():
        return None
    return np.where(first < 0, -1, first // unit)

  @property
  def _unit(self) -> int:
    """The inputs of a unit: cuts go between them."""
    if isinstance(self.kernel, blocks_lib.Blocks):
      return block_kinds.KINDS[self.kernel.kind].weights
    tile = 1 if self._has_wide_tiles else self.kernel.tile[1]
    return math.lcm(tile, 2 if self.kernel.form in kernel_lib.PACKED else 1)

  @property
  def _has_wide_tiles(self) -> bool:
    """Whether all inputs of an output share a scale."""
    kernel = self.kernel
    is_kernel = isinstance(kernel, kernel_lib.Kernel)
    return is_kernel and kernel.scales.shape[-1] == 1

  @functools.cached_property
  def _outputs(self) -> np.ndarray | None:
    """The outputs of the model that all parts have; None: they are not cut."""
    width = self.kernel.shape[-1]
    if self.is_across:
      spare = -width % self._num_parts
      return np.concatenate([np.arange(width), np.full(spare, -1)])
    if not self.layout.is_cut(self.out):
      return None
    return self.layout.index(self.out, width)

  @property
  def _has_places(self) -> bool:
    """Whether the kernel says where its inputs are among those of all parts."""
    # Experts are filled with nothing, and keep an order of theirs.
    if not self.is_across or self.has_experts:
      return False
    own = np.arange(self.kernel.shape[-2])
    is_alike = np.array_equal(self._inputs, own)
    return not is_alike or self.kernel.order is not None

  @property
  def _places(self) -> np.ndarray:
    """The place of each input of the model among those of all parts."""
    found, first = np.unique(self._inputs, return_index=True)
    return first[found >= 0]

  def _gathers(self, name: str) -> Iterable[tuple[int, _Gather]]:
    """Yields how each axis of an array that is cut is laid out."""
    if name not in ('values', 'data', 'scales', 'mins'):
      return
    *leading, rows, columns = _arrays(self.kernel)[name].shape
    axis_out, axis_in = len(leading), len(leading) + 1
    tile_out, tile_in = 1, None
    if isinstance(self.kernel, kernel_lib.Kernel) and name != 'values':
      tile_out, tile_in = self.kernel.tile
    if (pieces := self._outputs) is not None:
      yield (
        axis_out,
        _Gather(np.where(pieces < 0, -1, pieces // tile_out), 1, rows),
      )
    if (pieces := self._units) is not None:
      if tile_in is None:
        # Codes may share a byte, and blocks have bytes of scales.
        size = self.kernel.shape[-2]
        yield axis_in, _Gather(pieces, self._unit * columns // size, columns)
      elif not self._has_wide_tiles:
        yield axis_in, _Gather(pieces, self._unit // tile_in, columns)

  def _built(self, arrays: Mapping[str, Any]) -> Any:
    """Returns the kernel of the arrays of all parts."""
    arrays = dict(arrays)
    places = arrays.pop(_PLACES, None)
    made = _rebuilt(self.kernel, arrays)
    if isinstance(made, kernel_lib.Kernel):
      tile_out, tile_in = made.tile
      if self._outputs is not None:
        tile_out = 1
      if self._units is not None and self._has_wide_tiles:
        tile_in = self.width_in
      made.tile = tile_out, tile_in
    if not self.is_across:
      return made
    return across_lib.Across(made, places, self.kernel.shape[-1])


def cuts(layout: layout_lib.Layout, shapes: Any) -> dict[str, Cut]:
  """Returns how each stored kernel of a model lies over parts, by path.

  Args:
    layout: of the parts.
    shapes: shapes of the parameters, with separate layers.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    shapes, is_leaf=stored_tree.is_stored
  )
  found = {}
  for path, leaf in leaves:
    if stored_tree.is_stored(leaf):
      found['/'.join(axes.names(path))] = cut(layout, path, leaf)
  return found


def cut(layout: layout_lib.Layout, path: Any, kernel: Any) -> Cut:
  """Returns how the kernel of a path lies over parts."""
  *_, into, out = axes.names_of(path, kernel)
  if into == axes.VOCAB:  # a table is the kernel of its product
    into, out = out, into
  if kernel.ndim > 2 and layout.num_parts == layout.num_expert_groups:
    into = out = None  # each part has whole experts
  return Cut(layout, kernel, into, out)


def described(layout: layout_lib.Layout, shapes: Any) -> str:
  """Returns how stored kernels are multiplied over devices; '' for none."""
  found = cuts(layout, shapes).values()
  if not found:
    return ''
  text = f'{products_lib.PLAIN}: native products are for one device'
  if num := sum(each.is_across for each in found):
    text += (
      f'; {num} of {len(found)} stored kernels are cut along their outputs in'
      ' place of their inputs, since tiles, blocks or an order keep inputs'
      ' together'
    )
  return text


def _arrays(kernel: Any) -> dict[str, Any]:
  """Returns the arrays that a kernel has, by name."""
  if isinstance(kernel, blocks_lib.Blocks):
    return {'data': kernel.data}
  found = {name: getattr(kernel, name) for name in kernel_lib.ARRAYS}
  return {name: each for name, each in found.items() if each is not None}


def _rebuilt(like: Any, arrays: Mapping[str, Any]) -> Any:
  """Returns a kernel of the form of another one."""
  if isinstance(like, blocks_lib.Blocks):
    return blocks_lib.Blocks(arrays['data'], like.kind)
  given = {name: arrays.get(name) for name in kernel_lib.ARRAYS}
  return kernel_lib.Kernel(**given, form=like.form, tile=like.tile)
