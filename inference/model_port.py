"""The model port: functions that score and sample with the engine.

    score = model_port.scorer(engine)
    scores = score([(context_ids, continuation_ids), ...])

Evaluations and on-policy RL use the engine that serves, so that they see what
clients get. `evals/ports.py` has the contracts; this file keeps to them without
importing them, since evaluations are not part of serving.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from inference.engine import engine as engine_lib, requests
from inference.sampling import settings as settings_lib


class Score(NamedTuple):
  """The log-probabilities of a continuation."""

  logprob: float  # of the whole continuation, in nats
  is_greedy: bool  # whether every token is the most probable one
  token_logprobs: np.ndarray  # float32, of each token


class Sample(NamedTuple):
  """A completion and the log-probabilities of its tokens."""

  text: str  # without EOS, stop id or stop string
  ids: tuple[int, ...]  # the ids that spell the text
  all_ids: tuple[int, ...]  # all sampled ids, with EOS, stop id or string
  logprobs: np.ndarray  # float32, of `all_ids`, before temperature and filters


def scorer(
  engine: engine_lib.Engine,
) -> Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[Score]]:
  """Returns a function that scores continuations of contexts, in order.

  Context and continuation have at least one token each. Together they have at
  most one token more than the model's context: the last one is predicted and
  never computed.
  """
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1
  )

  def score(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]):
    asked = []
    for context, continuation in pairs:
      if not len(context) or not len(continuation):
        raise ValueError(
          f'scoring: got a context of {len(context)} tokens and a continuation'
          f' of {len(continuation)}, expected at least one of each; put BOS in'
          ' front'
        )
      *read, target = (*context, *continuation)
      asked.append(
        requests.Request(
          prompt_ids=tuple(map(int, read)),
          target=int(target),
          settings=settings,
        )
      )
    answers = answer_all(engine, asked)
    return [
      _score(completion, len(continuation))
      for (completion,), (_, continuation) in zip(answers, pairs, strict=True)
    ]

  return score


def sampler(
  engine: engine_lib.Engine, **fixed: Any
) -> Callable[[Sequence[Sequence[int]], Any, int], list[list[Sample]]]:
  """Returns a function that samples several completions of each prompt.

  Args:
    engine: that samples.
    **fixed: fields of `Settings` for every call.

  Returns:
    A function of prompts, settings and the number of samples per prompt. The
    settings are any object with fields named like those of
    `inference.sampling.settings.Settings`. Samples of one call differ from each
    other, even for equal prompts. The same call gives the same samples again.
  """

  def sample(prompts: Sequence[Sequence[int]], wanted: Any, num_samples: int):
    known = settings_lib.Settings.__dataclass_fields__
    chosen = {
      name: getattr(wanted, name) for name in known if hasattr(wanted, name)
    }
    chosen.update(fixed, n=num_samples, logprobs=0)
    seed = chosen.pop('seed', None) or 0
    asked = [
      requests.Request(
        prompt_ids=tuple(map(int, prompt)),
        settings=settings_lib.Settings(
          **chosen, seed=(seed + index * num_samples) % settings_lib.NUM_SEEDS
        ),
      )
      for index, prompt in enumerate(prompts)
    ]
    return [
      [_sample(completion) for completion in completions]
      for completions in answer_all(engine, asked)
    ]

  return sample


def answer_all(
  engine: engine_lib.Engine, asked: Sequence[requests.Request]
) -> list[list[requests.Completion]]:
  """Returns the n completions of each request.

  Raises:
    ValueError: a request could never be answered; before any work.
  """
  answers: list[list[Any]] = [[None] * each.settings.n for each in asked]
  for which, update in engine.answer(asked):
    if update.completion:
      answers[which][update.index] = update.completion
  return answers


def _score(completion: requests.Completion, length: int) -> Score:
  read, target = completion.prompt_logprobs or [], completion.logprobs or []
  # The first token of a prompt has no logprob; it belongs to the context.
  found = [each for each in (*read, *target)[-length:] if each]
  token_logprobs = np.asarray([each.chosen for each in found], np.float32)
  return Score(
    # In float64: a float32 sum over a long text loses digits.
    logprob=float(token_logprobs.sum(dtype=np.float64)),
    is_greedy=all(each.chosen >= each.values[0] for each in found),
    token_logprobs=token_logprobs,
  )


def _sample(completion: requests.Completion) -> Sample:
  assert completion.logprobs is not None
  ids = tuple(completion.token_ids)
  return Sample(
    text=completion.text,
    ids=ids[: completion.num_text_ids],
    all_ids=ids,
    logprobs=np.asarray(
      [each.chosen for each in completion.logprobs], np.float32
    ),
  )
