"""Validation loss, in nats per token and in bits per byte.

Nats per token compare runs with the same tokenizer. Bits per byte compare runs
with different tokenizers, too.
"""

from collections.abc import Callable, Iterable
import itertools
import math
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


class Stopped(Exception):
  """Raised if a run has to stop before an evaluation is complete."""


def evaluate(
  eval_step: Callable[[Any, Any], dict[str, Any]],
  params: Any,
  batches: Iterable[Batch],
  *,
  put_batch: Callable[[Batch], Any],
  num_bytes_V: np.ndarray,
  max_batches: int = 0,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
  """Returns `loss` (nats/token) and `bits_per_byte` over the batches.

  The end-of-document token is predicted like any other token and has no bytes.
  So bits per byte are the length of a code that also says where each document
  ends. Batches without targets and weights have a loss only.

  Args:
    eval_step: returns sums with 'loss' and 'weight', and with 'nll' if the
      loss has other terms, too.
    num_bytes_V: UTF-8 bytes of each token, 0 for special ones.
    max_batches: number of batches; 0 takes all.

  Raises:
    Stopped: `should_stop` returned True.
    ValueError: the batches hold no text.
  """
  loss = weight = 0.0
  num_bytes = 0
  if max_batches:
    batches = itertools.islice(batches, max_batches)
  is_text = True
  for batch in batches:
    if should_stop():
      raise Stopped
    is_text = {'targets', 'weights'} <= batch.keys()
    sums = eval_step(params, put_batch(batch))
    if is_text:
      counted_BT = batch['weights'] > 0
      num_bytes += int(num_bytes_V[batch['targets'][counted_BT]].sum())
    # The prediction loss alone: without z-loss and the losses of routers.
    loss += float(sums.get('nll', sums['loss']))
    weight += float(sums['weight'])
  if not weight or is_text and not num_bytes:
    raise ValueError(
      'evaluation: got no text, expected at least one byte to predict; look at'
      ' data.eval_split'
    )
  if not is_text:
    return {'loss': loss / weight}
  return {
    'loss': loss / weight,
    'bits_per_byte': loss / (num_bytes * math.log(2)),
  }


def report(values: dict[str, float]) -> str:
  """Returns the figures of `evaluate` as text.

  Args:
    values: loss and bits_per_byte. With `average_` in front, they are those of
      the averaged weights.
  """
  if 'bits_per_byte' not in values:
    text = f'validation loss {values["loss"]:.4f}'
    if 'average_loss' in values:
      text += f'; of the averaged weights {values["average_loss"]:.4f}'
    return text
  text = (
    f'validation loss {values["loss"]:.4f} nats/token,'
    f' {values["bits_per_byte"]:.4f} bits/byte'
  )
  if 'average_loss' in values:
    text += (
      f'; of the averaged weights {values["average_loss"]:.4f} and'
      f' {values["average_bits_per_byte"]:.4f}'
    )
  return text
