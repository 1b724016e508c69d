"""Rematerialisation: the results of a layer that the backward pass keeps.

Results that are not stored are computed again. The policies are JAX's.

Reference: Chen et al. 2016, arXiv:1604.06174.
"""

from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_LAYER_INPUT = 'layer_input'
_PRODUCT = 'product'
# The name of the output and the log-sum-exp of a fused attention kernel. A
# policy does not see a kernel as a matrix product: unless arrays of this name
# are kept, `minimal` would run the kernel a second time.
ATTENTION = 'attention'


def named_input(x: jax.Array) -> jax.Array:
  """Names the input of a layer, so that `offload` can send it to the host."""
  return checkpoint_name(x, _LAYER_INPUT)


def named_product(y: jax.Array) -> jax.Array:
  """Names the product with a weight, which `minimal` keeps in its own dtype.

  Without the name, JAX's policy for products would keep the accumulated float32
  product, which has twice the bytes of a bfloat16 activation.
  """
  return checkpoint_name(y, _PRODUCT)


def wrap(block: Any, remat: str, is_scanned: bool) -> Any:
  """Returns the module class with rematerialisation.

  Args:
    is_scanned: whether the block is the body of a loop. Outside a loop, common
      subexpression elimination would undo the recomputation and must be off.
  """
  if remat == 'none':
    return block
  return nn.remat(block, policy=policy(remat), prevent_cse=not is_scanned)


def policy(remat: str) -> Any:
  """Returns the policy of `jax.checkpoint` for a layer."""
  policies = jax.checkpoint_policies
  if remat == 'minimal':
    # The scores of plain attention have no name: they are computed again.
    return policies.save_only_these_names(_PRODUCT, ATTENTION)
  if remat == 'full':
    return policies.nothing_saveable
  if remat == 'offload':
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_LAYER_INPUT],
      offload_src='device',
      offload_dst='pinned_host',
    )
  raise ValueError(
    f'remat: got {remat!r}, expected one of none, minimal, full, offload'
  )
