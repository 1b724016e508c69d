"""The loss over a mesh: each device sums its own tokens, all add up once.

A chunked loss adds the gradient of the head up over its chunks. Left to the
compiler (GSPMD), the chunks are counted from the global shape, and that sum,
which is split over devices by tokens, would be completed across them in every
chunk. Here a device sees only its own tokens: as many chunks as these need,
and one sum across devices behind the loop.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from checks import expect
from parallel import rules

# As around the head every axis but `tensor` splits tokens, stages included.
TIME_AXES = ('context', 'stage')
_VOCAB_AXIS = 'tensor'

# (hidden_BTD, head_VD, targets_BT, weights_BT, form) -> a tree of sums over
# tokens; and, as `vocab_shards`, over how many devices the vocabulary is split
# meanwhile. What the form of the loss is, is the model's business.
Nll = Callable[..., Any]


def check_row_length(row_length: int, mesh: Mesh) -> None:
  """Raises ValueError for rows that cannot be split for the head."""
  split = [f'parallel.{axis}' for axis in TIME_AXES if mesh.shape[axis] > 1]
  expect.multiple_of(
    'data.row_length',
    row_length,
    ' x '.join(split),
    rules.num_parts(mesh, TIME_AXES),
    'the head splits the tokens of a row over them: change one of them',
  )


def make_weighted_nll(nll: Nll, mesh: Mesh) -> Nll:
  """Returns `nll` summed over the mesh, on whole arrays.

  Tokens are split by hand; the vocabulary is left to the compiler, which
  splits the logits as the head is (over `tensor`) and adds across devices what
  a softmax needs: two numbers per token, and the gradient of its hidden state.

  Args:
    nll: computes the loss in place; sums over tokens.
    mesh: from `parallel.mesh`.
  """
  manual = tuple(name for name in mesh.axis_names if name != _VOCAB_AXIS)
  tokens = PartitionSpec(rules.BATCH_AXES, TIME_AXES)

  def weighted_nll(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    form: Any,
  ) -> Any:
    check_row_length(hidden_BTD.shape[1], mesh)
    if all(mesh.shape[name] == 1 for name in manual):
      # Only the vocabulary is split. XLA refuses to add up over manual axes
      # that are all of size one (a failed check in its partitioner).
      return nll(
        hidden_BTD,
        head_VD,
        targets_BT,
        weights_BT,
        form,
        vocab_shards=mesh.shape[_VOCAB_AXIS],
      )

    def local(hidden_BTD, head_VD, targets_BT, weights_BT):
      sums = nll(
        hidden_BTD,
        head_VD,
        targets_BT,
        weights_BT,
        form,
        vocab_shards=mesh.shape[_VOCAB_AXIS],
      )
      return jax.lax.psum(sums, manual)

    return jax.shard_map(
      local,
      mesh=mesh,
      # The head is gathered at the entrance, split over `tensor` alone: a
      # gather inside would collect the vocabulary as well.
      in_specs=(tokens, PartitionSpec(), tokens, tokens),
      out_specs=PartitionSpec(),
      axis_names=set(manual),
      # The loss is not to know of mesh axes, which its loop would have to say.
      check_vma=False,
    )(hidden_BTD, head_VD, targets_BT, weights_BT)

  return weighted_nll
