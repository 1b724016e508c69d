"""Log-probabilities of any text under the weights of a run.

This is the `LogprobFn` of `evals/ports.py`, made of the run's own model on the
run's own devices. Requests are packed into rows as documents are in training,
so one compiled program scores requests of every length.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evals import ports
from models import transformer
from training import learner as learner_lib, step as step_lib
from training.evaluation import validation
from training.objectives import port

_Requests = Sequence[tuple[ports.Ids, ports.Ids]]


class _Slot(NamedTuple):
  """The place of a request in the rows."""

  request: int
  row: int
  first: int  # position in the row
  size: int  # tokens that the model reads


class Scorer:
  """Scores text with given weights. Compiles its program at the first use."""

  def __init__(self, learner: learner_lib.Learner):
    """Uses the learner's model, on its devices."""
    data = learner.experiment.data
    self.max_length = data.row_length
    self._shape = data.batch_size, data.row_length
    self._put_batch = learner.placement.put_batch
    self._step = learner.placement.compile_eval(
      lambda all_sum, _: make_score_step(
        learner.any_rows_model,
        num_places=data.batch_size * data.row_length,
        joined=learner.joined,
        all_sum=all_sum,
      ),
      learner.frozen_fields,
    )

  def logprob_fn(
    self,
    params: Any,
    should_stop: Callable[[], bool] = lambda: False,
    frozen: tuple[Any, ...] = (),
  ) -> ports.LogprobFn:
    """Returns the `LogprobFn` of these weights.

    Args:
      should_stop: called before every batch; if it returns True, the function
        raises `validation.Stopped`.
      frozen: frozen_params of the state, if it has any.
    """

    def score(requests: _Requests) -> Sequence[ports.Logprobs]:
      found: list[Any] = [None] * len(requests)
      slots = _pack(requests, self.max_length)
      for batch, members in _batches(requests, slots, self._shape):
        if should_stop():
          raise validation.Stopped
        sums = jax.device_get(
          self._step(params, self._put_batch(batch), *frozen)
        )
        for index, places in members:
          token_logprobs = np.asarray(sums['logprob'][places], np.float64)
          found[index] = ports.Logprobs(
            logprob=float(np.sum(token_logprobs)),
            is_greedy=bool(np.all(sums['is_greedy'][places] > 0)),
            token_logprobs=token_logprobs,
          )
      return found

    return score


def make_score_step(
  model: transformer.Transformer,
  *,
  num_places: int,
  joined: step_lib.Joined = lambda params, _: params,
  all_sum: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., dict[str, jax.Array]]:
  """Builds `score_step(params, batch, frozen_params=None)`: log p(target).

  Args:
    num_places: B x T of the whole batch.
    joined: see `training.step.make_train_step`.
    all_sum: adds a tree of sums across devices, under pmap.

  Returns:
    A function of the model's variables and of a batch: tokens, targets,
    positions, segment_ids and places, int32 [B, T]. Places are the numbers
    0..B x T - 1 in any order. It returns float32 [B x T] by place: `logprob`,
    and `is_greedy`, which is 1 where the target is the most probable token.
  """

  model_port = port.Model(model)

  def score_step(params, batch, frozen_params=None):
    params = joined(params, frozen_params)
    hidden = model_port.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )

    def score_chunk(states_BtD, targets_Bt):
      logits_BtV = model_port.logits(params, states_BtD)
      logprobs_BtV = jax.nn.log_softmax(logits_BtV, axis=-1)
      logprob_Bt1 = jnp.take_along_axis(
        logprobs_BtV, targets_Bt[:, :, None], axis=-1
      )
      is_greedy_Bt = jnp.argmax(logits_BtV, axis=-1) == targets_Bt
      return logprob_Bt1[:, :, 0], is_greedy_Bt.astype(jnp.float32)

    found = model_port.map_chunks(
      score_chunk, hidden.states_BTD, batch['targets']
    )
    # Each device has its own rows, and time may be laid out in any order. The
    # sum by place over the devices is the whole result.
    return all_sum(
      {
        name: jnp.zeros(num_places, jnp.float32)
        .at[batch['places'].reshape(-1)]
        .set(values_BT.reshape(-1))
        for name, values_BT in zip(('logprob', 'is_greedy'), found, strict=True)
      }
    )

  return score_step


def _pack(requests: _Requests, row_length: int) -> list[_Slot]:
  """Returns a slot for each request: longest first, row by row."""
  # The last token is predicted, not read.
  sizes = [len(context) + len(rest) - 1 for context, rest in requests]
  for size, (context, rest) in zip(sizes, requests, strict=True):
    if not context or not rest or size > row_length:
      raise ValueError(
        f'got a request of {len(context)} and {len(rest)} tokens, expected some'
        f' of both, and at most data.row_length + 1 = {row_length + 1} in all'
      )
  slots, row, used = [], -1, row_length
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    if used + sizes[i] > row_length:
      row, used = row + 1, 0
    slots.append(_Slot(i, row, used, sizes[i]))
    used += sizes[i]
  return slots


def _batches(
  requests: _Requests, slots: list[_Slot], shape: tuple[int, int]
) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[int, slice]]]]:
  """Yields each batch with its requests and the places of their answers."""
  num_rows, row_length = shape
  last_row = slots[-1].row if slots else -1
  for start in range(0, last_row + 1, num_rows):
    batch = {
      name: np.zeros(shape, np.int32)
      for name in ('tokens', 'targets', 'positions', 'segment_ids')
    }
    batch['places'] = np.arange(num_rows * row_length, dtype=np.int32).reshape(
      shape
    )
    members = []
    for slot in slots:
      if not start <= slot.row < start + num_rows:
        continue
      context, rest = requests[slot.request]
      ids = np.array([*context, *rest], np.int32)
      at = slot.row - start, slice(slot.first, slot.first + slot.size)
      batch['tokens'][at] = ids[:-1]
      batch['targets'][at] = ids[1:]
      batch['positions'][at] = np.arange(slot.size)
      # Any segment number except 0 that no other request in the row has.
      batch['segment_ids'][at] = slot.first + 1
      end = at[0] * row_length + slot.first + slot.size
      members.append((slot.request, slice(end - len(rest), end)))
    yield batch, members
