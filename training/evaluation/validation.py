"""Validation loss, in nats per token and in bits per byte.

Nats per token compare runs with the same tokenizer. Bits per byte compare runs
with different tokenizers, too.
"""

import collections
from collections.abc import Callable, Iterable
import itertools
import math
from typing import Any

import numpy as np

from training.objectives import port

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
  predicts_text: bool = True,
  max_batches: int = 0,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
  """Returns `loss` (nats/token) and `bits_per_byte` over the batches.

  A sum that has its own denominator (`port.Mean`) is reported by its name; a
  `port.Share` with its standard error, as `accuracy_error`. The end-of-document
  token is predicted like any other token and has no bytes. So bits per byte are
  the length of a code that also marks the end of each document. Bits per byte
  are left out if the loss is not the loss of the targets.

  Args:
    eval_step: returns sums with 'loss' and 'weight', and with 'nll' if the
      loss has other terms, too.
    num_bytes_V: UTF-8 bytes of each token, 0 for special ones.
    predicts_text: whether the loss is the loss of the targets.
    max_batches: number of batches; 0 takes all.

  Raises:
    Stopped: `should_stop` returned True.
    ValueError: the batches hold no text.
  """
  loss = weight = 0.0
  num_bytes = 0
  if max_batches:
    batches = itertools.islice(batches, max_batches)
  means = collections.defaultdict(lambda: np.zeros(2))
  shares = set()
  is_text = predicts_text
  for batch in batches:
    if should_stop():
      raise Stopped
    is_text = predicts_text and {'targets', 'weights'} <= batch.keys()
    sums = eval_step(params, put_batch(batch))
    if is_text:
      counted_BT = batch['weights'] > 0
      num_bytes += int(num_bytes_V[batch['targets'][counted_BT]].sum())
    # The prediction loss alone: without z-loss and the losses of routers.
    loss += float(sums.get('nll', sums['loss']))
    weight += float(sums['weight'])
    for name, value in sums.items():
      if isinstance(value, port.Mean):
        means[name] += float(value.total), float(value.weight)
      if isinstance(value, port.Share):
        shares.add(name)
  if not weight or is_text and not num_bytes:
    raise ValueError(
      'evaluation: got no text, expected at least one byte to predict; look at'
      ' data.eval_split'
    )
  values = {'loss': loss / weight}
  if is_text:
    values['bits_per_byte'] = loss / (num_bytes * math.log(2))
  # A figure without a value, such as for absent labels, is left out.
  counted = {name: mean for name, mean in means.items() if mean[1] > 0}
  values |= {name: float(t / w) for name, (t, w) in counted.items()}
  return values | {
    f'{name}_error': _share_error(*counted[name])
    for name in sorted(shares & counted.keys())
    if counted[name][1] > 1
  }


def _share_error(total: float, count: float) -> float:
  """Returns the standard error of a share, as evals/results has it."""
  share = total / count
  return math.sqrt(share * (1 - share) / (count - 1))


def report(values: dict[str, float]) -> str:
  """Returns the figures of `evaluate` as text.

  Args:
    values: loss and bits_per_byte; with the prefix `average_`, the values of
      the averaged weights.
  """
  if 'bits_per_byte' not in values:
    text = f'validation loss {values["loss"]:.4f}'
    if 'average_loss' in values:
      text += f'; of the averaged weights {values["average_loss"]:.4f}'
    if 'accuracy' in values:
      text += f'; accuracy {values["accuracy"]:.4f}'
      if 'accuracy_error' in values:
        text += f' +- {values["accuracy_error"]:.4f}'
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
