"""The table of adapters over devices: cut as the kernels that they belong to.

A token's change is (x A) B. Where devices share the outputs of a kernel, each
has its columns of B, and all of A; where they share inputs, its rows of A, and
all of B. So a change is computed where its product is, and the sum over devices
that the product needs anyway is that of both: no message is added.

A and B of rank r take r (in + out) numbers; a device of N has about a half of
them and an N-th of the other half.

Reference: S-LoRA, arXiv:2311.03285, section 6, which cuts both, and sends more.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from inference.engine.spread import layout as layout_lib
from models import axes
from models.layers import adapters as adapters_lib
from parallel import rules


@dataclasses.dataclass(frozen=True)
class Places:
  """The devices that share a model, see `adapter_table.Places`."""

  mesh: Any  # an `AbstractMesh` for a plan
  layout: layout_lib.Layout

  def laid_out(self, shapes: Any) -> Any:
    """Returns the shapes of a table of all parts, with shardings."""

    def entry(path, arrays):
      into, out = _axes(path, arrays)
      names = {'a': (into, None, None), 'b': (None, None, out)}
      names['gain'] = None, out
      parts = {
        name: self.layout.shape(arrays[name], names[name]) for name in arrays
      }
      return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding
        ),
        parts,
        rules.shardings(self.mesh, parts, names, rules.SERVING),
      )

    return adapters_lib.nested(
      {path: entry(path, x) for path, x in adapters_lib.entries(shapes)}
    )

  def row(self, row: Any, table: Any) -> Any:
    """Returns an adapter on the devices, from its arrays on the host."""
    del table

    def entry(path, arrays):
      into, out = _axes(path, arrays)
      names = {'a': (into, None), 'b': (None, out), 'gain': (out,)}
      parts = {
        name: self.layout.laid_out(np.asarray(x), names[name])
        for name, x in arrays.items()
      }
      found = rules.shardings(self.mesh, parts, names, rules.SERVING)
      return {
        name: jax.make_array_from_callback(
          x.shape, found[name], lambda index, x=x: x[index]
        )
        for name, x in parts.items()
      }

    return adapters_lib.nested(
      {path: entry(path, x) for path, x in adapters_lib.entries(row)}
    )


def _axes(path: str, arrays: Any) -> tuple[str | None, ...]:
  """Returns the logical axes of the kernel of a layer, (inputs, outputs)."""
  shape = arrays['a'].shape[0], arrays['b'].shape[-1]
  kernel = jax.ShapeDtypeStruct(shape, arrays['a'].dtype)
  return axes.names_of((*path.split('/'), 'kernel'), kernel)
