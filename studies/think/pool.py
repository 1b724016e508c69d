"""Pools of samples: many answers to each question, drawn once per model.

    pool = draw(generator, problems, num_samples=64)

Strategies that only choose among independent samples are evaluated from a pool
without sampling again (`studies/think/estimates.py`). A pool keeps of each
answer its value, whether it is right, its tokens, and the scores of verifiers
that do not know the right answer.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import io
import os
import pathlib
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from evals import ports
from evals.verifiers import column_sum
from inference import generate, model_port
from inference.engine import engine_config
from inference.search import budget
from inference.search.routing import features
from models import model_config
from storage import atomic
from text.replies import answers

ENGINE = engine_config.EngineConfig(
  max_sequences=64, decode_shapes=(64,), max_chunks=4, max_mixed_chunks=4
)
_TOGETHER = 20  # questions of one call
# Scores of a sample: exp of the mean log-probability of its tokens, exp of that
# of the least likely token, and the share of its lines that are right sums.
STEPS = 'steps'
SCORES = 'likelihood', 'weakest token', STEPS
_STEPS = column_sum.ColumnSum()


class Asked(Protocol):
  """A question with its right answer; `Problem` is one."""

  @property
  def id(self) -> str: ...

  @property
  def level(self) -> int: ...

  @property
  def question(self) -> str: ...

  @property
  def answer(self) -> answers.Answer: ...


# Returns the value that an answer votes for, None for none, and whether it is
# right.
Read = Callable[[Asked, ports.Completion], tuple[Hashable, bool]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Samples of one model: Q questions, N samples of each, C scores."""

  ids: np.ndarray  # of the questions, [Q]
  levels_Q: np.ndarray
  codes_QN: np.ndarray  # equal answers have equal numbers; -1: none
  is_right_QN: np.ndarray
  tokens_QN: np.ndarray
  scores_CQN: np.ndarray  # by `SCORES`, from 0 to 1
  prompt_flops_Q: np.ndarray
  answer_flops_QN: np.ndarray
  last_QF: np.ndarray  # features of the prefill, hidden state of the last token
  mean_QF: np.ndarray  # those with the mean of the hidden states

  @property
  def flops_QN(self) -> np.ndarray:
    """FLOPs of each sample on its own, its prompt included."""
    return self.prompt_flops_Q[:, None] + self.answer_flops_QN

  def take(self, which: np.ndarray) -> Self:
    """Returns the pool of some questions, by places or a mask."""
    found = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      is_score = field.name == 'scores_CQN'
      found[field.name] = value[:, which] if is_score else value[which]
    return dataclasses.replace(self, **found)

  @classmethod
  def joined(cls, pools: Sequence[Self]) -> Self:
    """Returns the pool of the questions of several, in this order."""
    found = {}
    for field in dataclasses.fields(cls):
      values = [getattr(each, field.name) for each in pools]
      axis = 1 if field.name == 'scores_CQN' else 0
      found[field.name] = np.concatenate(values, axis=axis)
    return cls(**found)

  def save(self, path: str | os.PathLike) -> None:
    """Writes all arrays into one file."""
    file = io.BytesIO()
    np.savez_compressed(file, **vars(self))
    atomic.write_bytes(pathlib.Path(path), file.getvalue())


def load(path: str | os.PathLike) -> Pool:
  """Returns the pool of a file.

  Raises:
    ValueError: the file is no pool.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return Pool(**file)
  except (TypeError, ValueError, EOFError) as error:
    raise ValueError(
      f'{os.fspath(path)}: got no pool of samples ({error}), expected one;'
      ' remove it, and the study draws it again'
    ) from None


def draw(
  generator: generate.Generator, problems: Sequence[Asked], **how: Any
) -> Pool:
  """Returns the samples of a model; see `draw_with_texts`."""
  return draw_with_texts(generator, problems, **how)[0]


def draw_with_texts(
  generator: generate.Generator,
  problems: Sequence[Asked],
  *,
  num_samples: int,
  max_tokens: int,
  temperature: float = 1.0,
  seed: int = 0,
  read: Read | None = None,
) -> tuple[Pool, list[list[str]]]:
  """Returns the samples of a model, and their texts by question.

  Args:
    generator: of the model.
    problems: that it answers, each as a chat of one message.
    num_samples: of each.
    max_tokens: of a sample.
    temperature: of the samples.
    seed: of the samples.
    read: value and rightness of an answer; None: `read_strictly`.
  """
  model = model_port.evaluated(generator)
  assert model.encode_chat is not None
  prompts = [
    model.encode_chat([{'role': 'user', 'content': each.question}])
    for each in problems
  ]
  sample = model.required_sample_fn()
  drawn = []
  for start in range(0, len(prompts), _TOGETHER):
    settings = ports.SampleSettings(
      max_tokens=max_tokens,
      temperature=temperature,
      seed=seed * len(prompts) + start,
    )
    drawn += sample(prompts[start : start + _TOGETHER], settings, num_samples)
  config = generator.engine.model_config
  pool = of_completions(problems, prompts, drawn, config, read)
  last_QF, mean_QF = (
    features.of_prompts(generator.engine, prompts, pooling=pooling)
    for pooling in ('last', 'mean')
  )
  pool = dataclasses.replace(pool, last_QF=last_QF, mean_QF=mean_QF)
  return pool, [[each.text for each in row] for row in drawn]


def of_completions(
  problems: Sequence[Asked],
  prompts: Sequence[ports.Ids],
  drawn: Sequence[Sequence[ports.Completion]],
  config: model_config.ModelConfig,
  read: Read | None = None,
) -> Pool:
  """Returns the pool of completions; it has no features."""
  costs, read = budget.Costs(config), read or read_strictly
  rows = [
    [_row(problem, each, read) for each in completions]
    for problem, completions in zip(problems, drawn, strict=True)
  ]

  def flops(prompt: ports.Ids, completion: ports.Completion) -> float:
    # The prompt's last token is the answer's first prediction.
    whole = costs.sample_flops(len(prompt), len(completion.all_ids))
    return whole - costs.flops(0, len(prompt), 1)

  scores_QNC = np.array([[each.scores for each in row] for row in rows])
  nothing = np.zeros((len(problems), 0))
  return Pool(
    ids=np.array([each.id for each in problems]),
    levels_Q=np.array([each.level for each in problems]),
    codes_QN=np.array([_codes([each.value for each in row]) for row in rows]),
    is_right_QN=np.array([[each.is_right for each in row] for row in rows]),
    tokens_QN=np.array(
      [[len(each.all_ids) for each in completions] for completions in drawn]
    ),
    scores_CQN=np.moveaxis(scores_QNC, -1, 0),
    prompt_flops_Q=np.array(
      [costs.flops(0, len(prompt), 1) for prompt in prompts]
    ),
    answer_flops_QN=np.array(
      [
        [flops(prompt, each) for each in completions]
        for prompt, completions in zip(prompts, drawn, strict=True)
      ]
    ),
    last_QF=nothing,
    mean_QF=nothing,
  )


def read_strictly(
  problem: Asked, completion: ports.Completion
) -> tuple[Hashable, bool]:
  """Returns the value of the answer after '####', and whether it is right."""
  given = answers.given(completion.text, is_strict=True)
  value = answers.value(given) if given else None
  is_right = answers.is_right(problem.answer, completion.text, strict=True)
  return value, is_right


class _Row(NamedTuple):
  value: Hashable  # None: no answer
  is_right: bool
  scores: tuple[float, ...]  # by `SCORES`


def _row(problem: Asked, completion: ports.Completion, read: Read) -> _Row:
  value, is_right = read(problem, completion)
  logprobs = completion.logprobs
  assert logprobs is not None
  likelihoods = [float(np.exp(x)) for x in (logprobs.mean(), logprobs.min())]
  steps = _STEPS(completion.text, {}).value
  return _Row(value, is_right, (*likelihoods, steps))


def _codes(values: Sequence[Hashable]) -> list[int]:
  """Returns a number of each value, equal for equals; -1 for None."""
  found: dict[Hashable, int] = {}
  return [
    -1 if value is None else found.setdefault(value, len(found))
    for value in values
  ]
