"""From a completion, and the parts before it, to a sample."""

from collections.abc import Sequence

import numpy as np

from inference.requests import requests as requests_lib
from inference.search import samples as samples_lib, strategy as strategy_lib
from text import detokenize, tokenizer as tokenizer_lib


def joined(
  ask: strategy_lib.Ask,
  completion: requests_lib.Completion,
  *,
  number: int,
  tokenizer: tokenizer_lib.Tokenizer,
  read: samples_lib.Read,
) -> samples_lib.Sample:
  """Returns the sample of an ask, without a score.

  Args:
    ask: whose prefix the completion continues.
    completion: its last part.
    number: of that part in the search.
    tokenizer: of the model.
    read: the parts of a sampled text.
  """
  after, prefix = ask.after, ask.prefix
  ids = (*prefix, *completion.token_ids)
  text = completion.text
  if prefix:
    text = _decoded(tokenizer, prefix) + text
  old = {place for place in after.forced if place < ask.keep} if after else ()
  new = range(len(prefix) - len(ask.forced), len(prefix))
  if ask.is_anew:
    own = completion.token_ids
    reading = read(completion.text, own, completion.num_text_ids)
    reading = reading._replace(
      num_reasoning=len(prefix) + reading.num_reasoning
    )
  else:
    reading = read(text, ids, len(prefix) + completion.num_text_ids)
  return samples_lib.Sample(
    number=number,
    tag=ask.tag,
    parts=(*(after.parts if after else ()), completion),
    ids=ids,
    forced=frozenset([*old, *new]),
    text=text,
    reading=reading,
    logprobs=_logprobs(ask, completion, num_old=len(old)),
  )


def _logprobs(
  ask: strategy_lib.Ask, completion: requests_lib.Completion, *, num_old: int
) -> np.ndarray | None:
  """Returns those of all sampled ids, without `num_old` forced ones."""
  if completion.logprobs is None:
    return None
  own = [each.chosen for each in completion.logprobs]
  before = np.zeros(0)
  if ask.after is not None and ask.after.logprobs is not None:
    before = ask.after.logprobs[: ask.keep - num_old]
  return np.concatenate([before, np.asarray(own, np.float64)])


def _decoded(tokenizer: tokenizer_lib.Tokenizer, ids: Sequence[int]) -> str:
  decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
  return ''.join([*map(decoder.push, ids), decoder.finish()])
