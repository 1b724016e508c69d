"""Log-probabilities of any text under the weights of a run.

The port of `evals/ports.py`, made of the run's own model on the run's own
devices: requests are packed into rows like documents are in training, so one
program scores requests of every length.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from evals import ports
from models import cross_entropy
from training import learner as learner_lib
from training.evaluation import validation

_Requests = Sequence[tuple[ports.Ids, ports.Ids]]


class _Slot(NamedTuple):
  """Where a request lies."""

  request: int
  row: int
  first: int  # place in the row
  size: int  # tokens that are read


class Scorer:
  """Scores with the weights it is given; compiled when first used."""

  def __init__(self, learner: learner_lib.Learner):
    """Prepares to score with the learner's model, on its devices."""
    data = learner.experiment.data
    self.max_length = data.row_length
    self._shape = data.batch_size, data.row_length
    self._put_batch = learner.placement.put_batch
    self._step = learner.placement.compile_eval(
      lambda all_sum, _: make_score_step(
        learner.model,
        learner.experiment.model.vocab_size,
        num_places=data.batch_size * data.row_length,
        all_sum=all_sum,
      )
    )

  def logprob_fn(
    self, params: Any, should_stop: Callable[[], bool] = lambda: False
  ) -> ports.LogprobFn:
    """Returns the port for these weights.

    Args:
      params: the model's variables, placed on the devices.
      should_stop: asked before every batch; if it says so, the function raises
        `evaluate.Stopped`.
    """

    def score(requests: _Requests) -> Sequence[ports.Scored]:
      found: list[Any] = [None] * len(requests)
      slots = _pack(requests, self.max_length)
      for batch, members in _batches(requests, slots, self._shape):
        if should_stop():
          raise validation.Stopped
        sums = jax.device_get(self._step(params, self._put_batch(batch)))
        for index, places in members:
          token_logprobs = np.asarray(sums['logprob'][places], np.float64)
          found[index] = ports.Scored(
            logprob=float(np.sum(token_logprobs)),
            is_greedy=bool(np.all(sums['is_greedy'][places] > 0)),
            token_logprobs=token_logprobs,
          )
      return found

    return score


def make_score_step(
  model: nn.Module,
  vocab_size: int,
  *,
  num_places: int,
  all_sum: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """Builds `score_step(params, batch)`: log p(target) at every place.

  Args:
    model: the transformer.
    vocab_size: how many logits it has.
    num_places: B x T of the whole batch.
    all_sum: adds a tree of sums across devices where the caller must (pmap).

  Returns:
    A function of the model's variables and of tokens, targets, positions,
    segment_ids and places, int32 [B, T], where places are 0..B x T - 1 in any
    order. It returns float32 [B x T] by place: `logprob`, and `is_greedy`, 1
    where the target is the most probable token.
  """

  apply: Callable[..., Any] = model.apply

  def score_step(params, batch):
    hidden_BTD, _ = apply(
      params,
      batch['tokens'],
      batch['positions'],
      None,
      batch['segment_ids'],
      method='hidden',
    )
    # As in the loss, no more logits at a time than fit.
    batch_size, time = batch['tokens'].shape
    chunks = cross_entropy.num_chunks(batch_size, time, vocab_size)

    def score_chunk(part):
      hidden_BtD, targets_Bt = part
      logits_BtV = apply(params, hidden_BtD, method='unembed')
      logprobs_BtV = jax.nn.log_softmax(logits_BtV, axis=-1)
      logprob_Bt1 = jnp.take_along_axis(
        logprobs_BtV, targets_Bt[:, :, None], axis=-1
      )
      is_greedy_Bt = jnp.argmax(logits_BtV, axis=-1) == targets_Bt
      return logprob_Bt1[:, :, 0], is_greedy_Bt.astype(jnp.float32)

    parts = _split(hidden_BTD, chunks), _split(batch['targets'], chunks)
    found = jax.lax.map(score_chunk, parts)
    # Each device has rows of its own, and time may be laid out in any order:
    # by place they add up to the whole.
    return all_sum(
      {
        name: jnp.zeros(num_places, jnp.float32)
        .at[batch['places'].reshape(-1)]
        .set(_joined(values).reshape(-1))
        for name, values in zip(('logprob', 'is_greedy'), found, strict=True)
      }
    )

  return score_step


def _split(x, chunks):
  """Returns [chunks, B, T / chunks, ...] of [B, T, ...]."""
  batch, time = x.shape[:2]
  return x.reshape((batch, chunks, time // chunks, *x.shape[2:])).swapaxes(0, 1)


def _joined(x):
  """Returns [B, T] of [chunks, B, T / chunks]."""
  return x.swapaxes(0, 1).reshape((x.shape[1], -1))


def _pack(requests: _Requests, row_length: int) -> list[_Slot]:
  """Returns a slot for each request, longest first, row by row."""
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
  """Yields batches, each with the places of the requests that it answers."""
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
      # Any number that the neighbours in the row do not have, but 0.
      batch['segment_ids'][at] = slot.first + 1
      end = at[0] * row_length + slot.first + slot.size
      members.append((slot.request, slice(end - len(rest), end)))
    yield batch, members
