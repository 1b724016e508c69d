"""Samples: text that a run writes while it trains, shown in its report.

Each evaluation continues the same few prompts of the validation split: the
first half of a document, or the question of a conversation. It uses the
training model on the run's own devices, without a cache: rows are short, and a
pass per token costs less than compiling a second program with caches.
`serve.py` samples quickly, from a frozen directory.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data import data_config
from models import transformer
from text import tokenizer as tokenizer_lib
from training import learner as learner_lib, step as step_lib
from training.evaluation import validation
from training.objectives import port

_LENGTH = 256  # positions of a row at most: prompt and continuation
_MOST_TOKENS = 48  # in a continuation
_TEMPERATURE = 0.8
_MOST_BATCHES = 16  # batches of the validation split to search for prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A prompt and its continuation."""

  prompt: str
  text: str


class Sampler:
  """Continues prompts with given weights. Compiles at the first use."""

  def __init__(
    self,
    learner: learner_lib.Learner,
    tokenizer: tokenizer_lib.Tokenizer,
    eval_batches: Iterable[validation.Batch],
    stop_ids: Sequence[int] = (),
  ):
    """Chooses the prompts.

    Args:
      eval_batches: batches of the validation split.
      stop_ids: ids that end a continuation, besides EOS.
    """
    experiment = learner.experiment
    data = experiment.data
    self._tokenizer = tokenizer
    self._ends = {tokenizer.eos_id, *stop_ids}
    # Devices that split the tokens of a row must divide its length.
    is_cut = experiment.parallel.context not in (1, -1)
    length = data.row_length if is_cut else min(data.row_length, _LENGTH)
    self._shape = data.batch_size, length
    self._num_tokens = min(_MOST_TOKENS, length // 2)
    self._seed = experiment.seed
    self.prompts = (
      choose_prompts(
        eval_batches,
        min(experiment.evals.samples, data.batch_size),
        most=length - self._num_tokens,
        is_text=data.examples == data_config.TEXT,
      )
      if experiment.objective.predicts_text
      else []
    )
    self._put_batch = learner.placement.put_batch
    self._step = learner.placement.compile_eval(
      lambda all_sum, _: make_sample_step(
        learner.any_rows_model,
        num_rows=data.batch_size,
        joined=learner.joined,
        all_sum=all_sum,
      ),
      learner.frozen_fields,
    )

  def draw(
    self,
    params: Any,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
    frozen: tuple[Any, ...] = (),
  ) -> list[Sample]:
    """Returns a continuation of each prompt.

    Args:
      step: step of the run; with the run's seed it decides the draws.
      should_stop: called before every token; True raises.
      frozen: frozen_params of the state, if it has any.

    Raises:
      validation.Stopped: `should_stop` returned True.
    """
    written: list[list[int]] = [[] for _ in self.prompts]
    going = set(range(len(written)))
    for n in range(self._num_tokens):
      if not going:
        break
      if should_stop():
        raise validation.Stopped
      batch = self._batch(written, step, n)
      next_B = jax.device_get(
        self._step(params, self._put_batch(batch), *frozen)
      )
      for i in sorted(going):
        token = int(next_B[i])
        if token in self._ends:
          going.remove(i)
        else:
          written[i].append(token)
    return [
      Sample(
        prompt=self._tokenizer.decode(prompt),
        text=self._tokenizer.decode(own),
      )
      for prompt, own in zip(self.prompts, written, strict=True)
    ]

  def _batch(
    self, written: Sequence[Sequence[int]], step: int, n: int
  ) -> dict[str, np.ndarray]:
    """Returns the rows so far; rows without a prompt repeat the first."""
    tokens_BT = np.full(self._shape, self._tokenizer.pad_id, np.int32)
    is_last_BT = np.zeros(self._shape, np.int32)
    segments_BT = np.zeros(self._shape, np.int32)
    for row in range(self._shape[0]):
      i = row if row < len(written) else 0
      ids = [*self.prompts[i], *written[i]]
      tokens_BT[row, : len(ids)] = ids
      segments_BT[row, : len(ids)] = 1
      is_last_BT[row, len(ids) - 1] = 1
    rows_B = np.arange(self._shape[0])
    drawn = np.random.default_rng((self._seed % 2**63, step, n))
    seeds_B = drawn.integers(2**31, size=self._shape[0])
    return {
      'tokens': tokens_BT,
      'positions': np.broadcast_to(
        np.arange(self._shape[1], dtype=np.int32), self._shape
      ).copy(),
      'segment_ids': segments_BT,
      'is_last': is_last_BT,
      # [B, T], like all arrays of a batch: devices share only such arrays.
      'rows': _repeated(rows_B, self._shape),
      'seeds': _repeated(seeds_B, self._shape),
    }


def _repeated(values_B: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  return np.repeat(values_B.astype(np.int32)[:, None], shape[1], axis=1)


def make_sample_step(
  model: transformer.Transformer,
  *,
  num_rows: int,
  joined: step_lib.Joined = lambda params, _: params,
  all_sum: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., jax.Array]:
  """Builds `sample_step(params, batch, frozen_params=None)`: next tokens.

  Args:
    num_rows: B of the whole batch.
    joined: see `training.step.make_train_step`.
    all_sum: adds a tree of sums across devices, under pmap.

  Returns:
    A function of the model's variables and of a batch: tokens, positions,
    segment_ids, is_last, rows and seeds, int32 [B, T]. `is_last` is 1 at the
    last token of a row. It returns int32 [B]: the token that follows there,
    drawn at temperature 0.8 with the row's seed.
  """
  model_port = port.Model(model)

  def sample_step(params, batch, frozen_params=None):
    params = joined(params, frozen_params)
    hidden = model_port.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    # A sum in place of an index: time may be laid out in any order.
    is_last_BT1 = batch['is_last'][:, :, None] > 0
    last_BD = jnp.where(is_last_BT1, hidden.states_BTD, 0).sum(axis=1)
    logits_B1V = model_port.logits(params, last_BD[:, None])
    draw = jax.vmap(
      lambda seed, logits_V: jax.random.categorical(
        jax.random.key(seed), logits_V / _TEMPERATURE
      )
    )
    next_B = draw(batch['seeds'][:, 0], logits_B1V[:, 0])
    # Each device has its own rows: the sum over devices has all of them.
    return all_sum(
      jnp.zeros(num_rows, jnp.int32)
      .at[batch['rows'][:, 0]]
      .set(next_B.astype(jnp.int32))
    )

  return sample_step


def choose_prompts(
  batches: Iterable[validation.Batch], count: int, *, most: int, is_text: bool
) -> list[list[int]]:
  """Returns the beginnings of the first documents that are long enough.

  Args:
    batches: batches of the validation split.
    count: number of prompts; fewer if there are not as many.
    most: tokens of a prompt.
    is_text: whether a prompt is the first half of its document; else it ends
      where the first trained token begins.
  """
  found: list[list[int]] = []
  for batch in itertools.islice(batches, _MOST_BATCHES if count else 0):
    if not {'tokens', 'segment_ids', 'weights'} <= batch.keys():
      return []
    for tokens_T, segments_T, weights_T in zip(
      batch['tokens'], batch['segment_ids'], batch['weights'], strict=True
    ):
      size = int((segments_T == segments_T[0]).sum()) if segments_T[0] else 0
      if is_text:
        size = min(size // 2, most)
      else:
        # The weight of a target stands at the token before it.
        trained = np.flatnonzero(weights_T[:size])
        size = int(trained[0]) + 1 if trained.size else 0
      if 1 < size <= most:
        found.append(tokens_T[:size].tolist())
      if len(found) == count:
        return found
  return found
