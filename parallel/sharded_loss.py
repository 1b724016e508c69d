"""The loss over a mesh: each device sums its own tokens, then all devices add.

A chunked loss accumulates the gradient of the head over chunks of tokens. The
compiler (GSPMD) would count the chunks from the global shape and would complete
that gradient across devices in every chunk. Here a device sees only its own
tokens: it runs as many chunks as they need, and the devices add once, after
the loop.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from checks import expect
from parallel import rules

# Around the head every mesh axis but `tensor` splits tokens: these two split
# the tokens of a row, `rules.BATCH_AXES` split the rows.
TIME_AXES = ('context', 'stage')
_VOCAB_AXIS = 'tensor'

# (hidden_BTD, head_VD, targets_BT, weights_BT, form, *, vocab_shards) -> a tree
# of sums over tokens. `vocab_shards` is the number of devices over which the
# vocabulary is split. `form` is the model's and only passed through.
Nll = Callable[..., Any]


def check_row_length(row_length: int, mesh: Mesh) -> None:
  """Raises ValueError if the head cannot split the tokens of a row evenly."""
  split = [f'parallel.{axis}' for axis in TIME_AXES if mesh.shape[axis] > 1]
  expect.multiple_of(
    'data.row_length',
    row_length,
    ' x '.join(split),
    rules.num_parts(mesh, TIME_AXES),
    'the head splits the tokens of a row over them: change one of them',
  )


def make_weighted_nll(nll: Nll, mesh: Mesh) -> Nll:
  """Returns `nll` for whole arrays, summed over the mesh.

  `shard_map` splits the tokens. The compiler splits the vocabulary: logits are
  split over `tensor` like the head. A softmax then adds across devices two
  numbers per token, and the gradient of the token's hidden state.
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
    arrays = hidden_BTD, head_VD, targets_BT, weights_BT

    def local(*arrays):
      return nll(*arrays, form, vocab_shards=mesh.shape[_VOCAB_AXIS])

    if all(mesh.shape[name] == 1 for name in manual):
      # Only the vocabulary is split. XLA's partitioner fails a check if it has
      # to sum over manual axes that all have size one.
      return local(*arrays)
    return jax.shard_map(
      lambda *arrays: jax.lax.psum(local(*arrays), manual),
      mesh=mesh,
      # The head is gathered where it enters, and stays split over `tensor`. A
      # gather inside would collect the vocabulary as well.
      in_specs=(tokens, PartitionSpec(), tokens, tokens),
      out_specs=PartitionSpec(),
      axis_names=set(manual),
      # With the check on, the loop of the loss would have to name mesh axes.
      check_vma=False,
    )(*arrays)

  return weighted_nll
