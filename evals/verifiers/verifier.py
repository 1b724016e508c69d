"""Verifiers: the score of an answer, by a rule and not by a model.

    score = verifier(answer, record)     # Score(1.0, 'got 42')

The record has the right answer, in fields that each verifier names. `check`
reads it before anything was generated, so a wrong record is an error at the
start.

`score_all` gives answers of many records their scores, some at a time. If a
verifier fails on an answer (it took too long, or crashed), the score is 0 and
has the failure: one answer must not end a run of days. Callers count failures.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import os
from typing import Any, NamedTuple

from checks import expect
from evals import judges
from evals.verifiers.sandbox import runner

Record = Mapping[str, Any]


class Score(NamedTuple):
  """The score of an answer."""

  value: float  # from 0 to 1
  reason: str  # in words
  # '' or the reason for a missing score: 'time' or 'error'. `value` is then 0.
  failure: str = ''


class Verifier(abc.ABC):
  """A rule that scores answers. Subclasses are frozen dataclasses."""

  # Whether a record says what is right; False: the answer alone is read.
  NEEDS_RECORD = True

  @abc.abstractmethod
  def check(self, record: Record) -> None:
    """Raises ValueError for a record that this verifier cannot use."""

  @abc.abstractmethod
  def __call__(self, answer: str, record: Record) -> Score:
    """Returns the score of the text of an answer.

    Raises:
      ValueError: the record is not in the form that `check` accepts.
    """


def guarded(verifier: Verifier, answer: str, record: Record) -> Score:
  """Returns the score; with `failure` set if the verifier fails.

  Raises:
    Unavailable: this system has no sandbox, and the verifier needs one.
  """
  try:
    return verifier(answer, record)
  except runner.Unavailable:
    raise
  except Exception as error:  # a verifier may fail on an answer in any way
    told = f'{type(error).__name__}: {error}'
    return Score(0.0, told[:300], failure='error')


def score_all(
  verifier: Verifier,
  answered: Sequence[tuple[str, Record]],
  workers: int = 0,
) -> list[Score]:
  """Returns the score of each answer, in order.

  Args:
    answered: the text of each answer, and its record.
    workers: answers at a time; 0: one per core that this process may use.
  """
  workers = workers or len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(lambda each: guarded(verifier, *each), answered))


def score_fn(
  verifier: Verifier, record_of: Callable[[judges.Prompt], Record]
) -> judges.ScoreFn:
  """Returns a verifier as a `ScoreFn`, for `judges.by_score` and best of n.

  Args:
    record_of: finds the record of a prompt.
  """

  def score(
    answered: Sequence[tuple[judges.Prompt, str]],
  ) -> list[float]:
    pairs = [(answer, record_of(prompt)) for prompt, answer in answered]
    return [found.value for found in score_all(verifier, pairs)]

  return score


def text_field(record: Record, name: str) -> str:
  """Returns a field that is text; raises ValueError for another."""
  value = record.get(name)
  if not isinstance(value, str) or not value.strip():
    raise wrong(record, name, 'text')
  return value


def texts_field(record: Record, name: str) -> tuple[str, ...]:
  """Returns a field that is a text or a list of texts."""
  value = record.get(name)
  found = (value,) if isinstance(value, str) else value
  if (
    not isinstance(found, list | tuple)
    or not found
    or not all(isinstance(each, str) and each.strip() for each in found)
  ):
    raise wrong(record, name, 'text, or a list of texts')
  return tuple(found)


def wrong(record: Record, name: str, expected: str) -> ValueError:
  """Returns the error about a field of a record."""
  got = expect.shown(record[name]) if name in record else 'none'
  return ValueError(
    f'{name}: got {got}, expected {expected}; mend the record, or name'
    ' another verifier'
  )


def passed(is_right: bool, reason: str) -> Score:
  """Returns the score 1 or 0."""
  return Score(float(is_right), reason)
