"""Held-out questions with numbers as answers, to measure a small model.

The measures are accuracy, loss and distance of a frozen model, each over the
same questions, through the engine that serves.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

from data.problems import generator as problems_lib, records
from evals import ports
from evals.results import statistics
from evals.verifiers import texts
from inference import generate, model_port
from inference.engine import engine_config

_ENGINE = engine_config.EngineConfig(
  max_sequences=32, decode_shapes=(32,), max_chunks=4, max_mixed_chunks=4
)


class Score(NamedTuple):
  """A mean over questions, and its standard error."""

  mean: float
  error: float

  def text(self, form: str) -> str:
    """Returns both numbers in a format, as in '.3f'."""
    return f'{self.mean:{form}} +- {self.error:{form}}'


class Question(NamedTuple):
  """A held-out question as every stage sees it."""

  prompt_ids: tuple[int, ...]
  answer_ids: tuple[int, ...]  # the right answer, with its stop token
  record: records.Record  # with `answer`, for the verifier


def open_model(directory: pathlib.Path) -> ports.Model:
  """Returns the model of a frozen directory in an engine."""
  return model_port.evaluated(generate.load(directory, _ENGINE))


def questions_of(
  directory: pathlib.Path, settings: problems_lib.Settings
) -> list[Question]:
  """Returns held-out questions in the chat template of a frozen directory.

  Raises:
    ValueError: the template changes a prompt when its answer is there.
  """
  chatting = generate.load(directory, _ENGINE, compile_all=False)
  encode_chat = model_port.evaluated(chatting).encode_chat
  assert encode_chat is not None
  found = []
  for record in records.make(settings, 'validation'):
    asked = [{'role': 'user', 'content': record['question']}]
    prompt = tuple(encode_chat(asked))
    whole = model_port.encode_answer(chatting, asked, record['answer'])
    if whole[: len(prompt)] != prompt:
      raise ValueError(
        f'{directory}: got a chat template that changes the prompt when the'
        ' answer is there, expected a template that continues it'
      )
    found.append(Question(prompt, whole[len(prompt) :], record))
  return found


def score(
  model: ports.Model,
  base: ports.Model,
  questions: Sequence[Question],
  max_tokens: int,
) -> tuple[Score, Score, Score]:
  """Returns accuracy, loss per token, and the KL from a base per answer.

  Accuracy is of greedy answers; the loss is that of the right ones, in nats per
  token; KL is the mean of log p(answer) - log p_base(answer) over one sampled
  answer per question.

  Args:
    max_tokens: the most tokens of an answer.
  """
  prompts = [each.prompt_ids for each in questions]
  sample, logprobs = model.required_sample_fn(), model.required_logprob_fn()
  greedy = ports.SampleSettings(max_tokens=max_tokens)
  is_right = texts.Number(is_strict=True)
  right = [
    is_right(completion.text, question.record).value
    for question, (completion,) in zip(
      questions, sample(prompts, greedy, 1), strict=True
    )
  ]
  losses = [
    -found.logprob / len(found.token_logprobs)
    for found in logprobs([(x.prompt_ids, x.answer_ids) for x in questions])
  ]
  drawn = [
    (prompt, completion.all_ids)
    for prompt, (completion,) in zip(
      prompts,
      sample(prompts, dataclasses.replace(greedy, temperature=1.0), 1),
      strict=True,
    )
  ]
  gaps = [
    own.logprob - other.logprob
    for own, other in zip(
      logprobs(drawn), base.required_logprob_fn()(drawn), strict=True
    )
  ]
  accuracy, loss, kl = (mean_of(x) for x in (right, losses, gaps))
  return accuracy, loss, kl


def mean_of(values: Sequence[float]) -> Score:
  """Returns the mean of values, one per question, and its standard error."""
  return Score(float(np.mean(values)), statistics.standard_error(values))
