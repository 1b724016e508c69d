"""Scorers that are models: a reward model, or the model that answers.

Their scores are requests of the search, so that an engine computes them beside
samples, and a server admits and bills them like any other request.

A reward model reads a whole answer (an outcome reward model), or in a search
over steps the steps so far, so that the score of the last step counts for the
answer, as in Snell et al. 2024 (arXiv:2408.03314), appendix E.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from inference import chat_prompts, generate, model_port
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  samples as samples_lib,
  thought,
)
from models.layers import reward_head
from text import chat
from text.replies import fitting

# What the model is asked about its answer, and the beginnings of its verdict.
QUESTION = 'Is the answer above right? Reply with Yes or No only.'
_YES, _NO = ('Yes', ' Yes', 'yes'), ('No', ' No', 'no')
# Ids by which a conversation may be longer than its prompt and its answer: of
# markers of turns, and of words that are cut in another way.
_MARGIN = 24
_READ = {'temperature': 0.0, 'max_tokens': 1, 'seed': 0}


def sigmoid(reward: float) -> float:
  """Returns a reward as the weight of a vote, from 0 to 1."""
  return float(1 / (1 + np.exp(-np.clip(reward, -500, 500))))


def rewarded(
  generator: generate.Generator,
  *,
  costs: budget_lib.Costs,
  num_turns: int,
  place: Any = None,
  link: Callable[[float], float] = float,
) -> samples_lib.Requested:
  """Returns the scorer of a reward model.

  Args:
    generator: of the reward model.
    costs: of it.
    num_turns: of a conversation with its answer; its chat template may write
      more around each than the model's own.
    place: to which its requests go.
    link: maps rewards, as `sigmoid` does for votes.
  """

  def request(
    question: samples_lib.Question, sample: samples_lib.Sample
  ) -> requests_lib.Request:
    ids = model_port.encode_answer(generator, question.prompt, sample.answer)
    asked = question.request
    return requests_lib.Request(
      prompt_ids=ids,
      settings=settings_lib.Settings(**_READ),
      target=0,
      pooling='last',
      principal=asked.principal,
      priority=asked.priority,
    )

  def read(completion: requests_lib.Completion) -> float:
    head = generator.heads[reward_head.NAME]
    states_BD = jnp.asarray([completion.pooled_D])
    return link(float(np.asarray(reward_head.rewards(head, states_BD))[0]))

  around = len(model_port.encode_answer(generator, 'x', 'x'))
  return samples_lib.Requested(
    request=request,
    read=read,
    costs=costs,
    num_more=num_turns * around + _MARGIN,
    place=place,
  )


def self_verified(
  generator: generate.Generator, *, costs: budget_lib.Costs
) -> samples_lib.Requested:
  """Returns the scorer that asks the model whether its answer is right.

  The score is P(yes) / (P(yes) + P(no)) of the next token, from 0 to 1. A word
  that is not among the likeliest tokens counts as 0.

  Reference: Kadavath et al. 2022 (arXiv:2207.05221), section 3: P(True).
  """
  yes, no = (_first_ids(generator, words) for words in (_YES, _NO))

  def request(
    question: samples_lib.Question, sample: samples_lib.Sample
  ) -> requests_lib.Request:
    asked = question.request
    return requests_lib.Request(
      prompt_ids=_asked(generator, question.prompt, sample.answer),
      settings=settings_lib.Settings(
        logprobs=settings_lib.MAX_LOGPROBS, **_READ
      ),
      target=yes[0],
      principal=asked.principal,
      priority=asked.priority,
      adapter=asked.adapter,
    )

  def read(completion: requests_lib.Completion) -> float:
    assert completion.logprobs is not None
    (found,) = completion.logprobs
    probs = dict(zip(found.ids, map(math.exp, found.values), strict=True))
    probs[yes[0]] = math.exp(found.chosen)
    is_right, is_wrong = (
      sum(probs.get(token, 0.0) for token in ids) for ids in (yes, no)
    )
    # Both underflow where the model would never say either.
    return is_right / (is_right + is_wrong) if is_right + is_wrong else 0.5

  words = _asked(generator, '', '')
  return samples_lib.Requested(
    request=request, read=read, costs=costs, num_more=len(words) + _MARGIN
  )


def _asked(
  generator: generate.Generator,
  prompt: str | Sequence[Any],
  answer: str,
) -> tuple[int, ...]:
  """Returns the ids of a conversation that ends before the verdict."""
  if isinstance(prompt, str):
    prompt = [{'role': 'user', 'content': prompt}]
  messages = [
    *prompt,
    {'role': 'assistant', 'content': answer},
    {'role': 'user', 'content': QUESTION},
  ]
  style = chat_prompts.style_of(generator, 'auto')
  conversation = chat.Conversation(
    messages=fitting.fitted(messages, style), add_generation_prompt=True
  )
  rendered = chat_prompts.render(generator, conversation)
  ids = chat_prompts.encode(generator, rendered)
  begun = thought.begun(generator, ids)
  if begun.is_open and begun.style.reasoning:
    closing = begun.style.reasoning[1]
    special = generator.tokenizer.special_tokens.get(closing)
    more = generator.tokenizer.encode(closing) if special is None else [special]
    ids = (*ids, *more)
  return ids


def _first_ids(
  generator: generate.Generator, words: Sequence[str]
) -> tuple[int, ...]:
  found = [generator.tokenizer.encode(word)[0] for word in words]
  return tuple(dict.fromkeys(found))
