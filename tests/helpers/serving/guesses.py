"""A drafter of engines in tests: guesses that are right or wrong."""

import collections
from collections.abc import Hashable, Iterable, Iterator, Sequence
import contextlib

import numpy as np

from inference.engine import engine as engine_lib, steps
from inference.speculation import drafter as drafter_lib, source


def install(
  engine: engine_lib.Engine,
  drafter: drafter_lib.Drafter,
  costs: 'Costs | None' = None,
) -> None:
  """Gives an engine that speculates a drafter, and costs of its programs."""
  engine._speculator.source = source.OfHost(drafter)
  engine._speculator._choice.costs = costs or Costs()


def counted(engine: engine_lib.Engine) -> list[float]:
  """Returns the accepted and the rejected tokens of drafts so far."""
  return [
    engine.metrics.value('speculation_tokens_total', kind=kind)
    for kind in ('accepted', 'rejected')
  ]


@contextlib.contextmanager
def verified_beside(
  engine: engine_lib.Engine,
) -> Iterator[collections.Counter[steps.Shape]]:
  """Counts the steps that verify drafts beside chunks, by their shape."""
  found = collections.Counter()
  programs, forward = engine._programs, engine._programs.forward
  accept = programs.accept_beside
  shapes = []

  def watched_forward(shape, *args):
    shapes.append(shape)
    return forward(shape, *args)

  def watched_accept(*args):
    found[shapes[-1]] += 1
    return accept(*args)

  programs.forward, programs.accept_beside = watched_forward, watched_accept
  try:
    yield found
  finally:
    del programs.forward, programs.accept_beside


class Costs:
  """Seconds of programs that a test chooses."""

  def __init__(self, verified: float = 1.0):
    """Starts with the seconds of a step of any width above 1."""
    self._verified = verified

  def seconds(self, rows: int, width: int) -> float:
    """Returns the seconds; a decode step takes one."""
    return self._verified if width > 1 else 1.0


class Guesses:
  """Drafts known texts, with mistakes."""

  def __init__(
    self,
    texts: Iterable[Sequence[int]],
    *,
    seed: int = 0,
    wrong: float = 0.2,
    is_longest: bool = False,
  ):
    """Starts with texts of prompts and their answers.

    Args:
      texts: token ids; the first that begins as a sequence does is guessed.
      seed: of the mistakes.
      wrong: share of the guessed tokens that are others.
      is_longest: every draft has the most tokens; otherwise, any number.
    """
    self._is_longest = is_longest
    self._texts = [tuple(text) for text in texts]
    self._rng, self._wrong = np.random.default_rng(seed), wrong
    self.forgotten: list[Hashable] = []
    self.drafted: list[Hashable] = []

  def draft(
    self, id: Hashable, tokens: Sequence[int], most: int
  ) -> tuple[int, ...]:
    """Returns guesses of some length; of unknown texts, any tokens."""
    length = most if self._is_longest else int(self._rng.integers(1, most + 1))
    known, end = tuple(tokens), len(tokens)
    text = next((x for x in self._texts if x[:end] == known), ())
    found = [
      *text[end : end + length],
      *self._rng.integers(0, 12, most).tolist(),
    ]
    for index in range(length):
      if self._rng.random() < self._wrong:
        found[index] = (found[index] + 1) % 12
    self.drafted += [id] * bool(length)
    return tuple(found[:length])

  def forget(self, id: Hashable) -> None:
    """Notes the end of a sequence."""
    self.forgotten.append(id)
