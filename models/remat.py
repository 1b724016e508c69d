"""Rematerialisation: which results of a layer wait for the backward pass.

What is not stored is computed again. Reference: Chen et al. 2016
(arXiv:1604.06174); the policies are JAX's.
"""

from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_LAYER_INPUT = 'layer_input'
_PRODUCT = 'product'
# What a fused attention kernel must remember, its output and log-sum-exp, is
# marked with this name. A kernel is no matrix product in the eyes of a policy:
# unless named ones are kept, `minimal` would run it a second time.
ATTENTION = 'attention'


def named_input(x: jax.Array) -> jax.Array:
  """Marks what enters a layer, so that `offload` can send it to the host."""
  return checkpoint_name(x, _LAYER_INPUT)


def named_product(y: jax.Array) -> jax.Array:
  """Marks the product with a weight, as `minimal` keeps it: in its dtype.

  The policy would find the product itself too, but as it was accumulated: in
  float32, twice the bytes of a bfloat16 activation.
  """
  return checkpoint_name(y, _PRODUCT)


def wrap(block: Any, remat: str, is_scanned: bool) -> Any:
  """Returns the module class, computing again what `remat` does not store.

  Args:
    block: a linen module class.
    remat: see `models.execution.REMAT`.
    is_scanned: whether the block is the body of a loop; elsewhere the compiler
      must be kept from finding out that the work is done twice.
  """
  if remat == 'none':
    return block
  return nn.remat(block, policy=policy(remat), prevent_cse=not is_scanned)


def policy(remat: str) -> Any:
  """Returns what `jax.checkpoint` takes as its policy, for a layer."""
  policies = jax.checkpoint_policies
  if remat == 'minimal':
    # Not the products of attention that exist as arrays: scores are made again.
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
