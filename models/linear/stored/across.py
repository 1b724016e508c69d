"""A stored kernel of a sum over devices of which each device has some outputs.

Devices that share a model each have some inputs of the kernels `out` and
`down`. A stored kernel cannot always be cut so: an order mixes its inputs, or a
tile or a block of them would be cut. Then each device has some outputs of it,
with all inputs, and the devices exchange inputs and outputs in place of terms.
"""

from typing import Any

import jax

from models.linear.stored import blocks as blocks_lib, kernel as kernel_lib


@jax.tree_util.register_pytree_with_keys_class
class Across:
  """Some outputs of a kernel, filled with zeros so that they divide."""

  def __init__(
    self,
    kernel: kernel_lib.Kernel | blocks_lib.Blocks,
    places: Any,
    width: int,
  ):
    """Takes the fields.

    Args:
      kernel: [in, out], without an order.
      places: int32 [in], where each input of the kernel is among the inputs
        that all devices have together; None: at its own place.
      width: number of the outputs of all devices that are no filling.
    """
    self.kernel, self.places, self.width = kernel, places, width

  def tree_flatten_with_keys(self):
    """Returns the arrays by name, for JAX."""
    key = jax.tree_util.DictKey
    children = (key('kernel'), self.kernel), (key('places'), self.places)
    return children, self.width

  @classmethod
  def tree_unflatten(cls, width, children):
    """Returns the kernel of the arrays, for JAX."""
    kernel, places = children
    return cls(kernel, places, width)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the part of the kernel, [in, out]."""
    return self.kernel.shape

  @property
  def ndim(self) -> int:
    """The number of axes of the kernel."""
    return self.kernel.ndim
