"""A problem, its right solution, and wrong ones."""

from collections.abc import Callable
import dataclasses
import hashlib
from typing import Any

from data.problems import draws as draws_lib, working
from text.replies import answers

_MOST_TRIES = 50


@dataclasses.dataclass(frozen=True)
class Solution:
  """Lines of work and a final answer."""

  lines: tuple[str, ...]
  answer: str
  is_whole: bool  # every calculation has an integer as its result

  @property
  def text(self) -> str:
    """Returns the solution as a model writes it."""
    return '\n'.join((*self.lines, f'{answers.MARK} {self.answer}'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A question with one right answer."""

  family: str
  level: int
  question: str
  # The problem without its wording: two problems that differ in names or in the
  # order of a sum are one. The split depends on it alone.
  content: tuple[Any, ...]
  kind: str  # kind of the answer, see `answers.KINDS`
  choices: tuple[str, ...] = ()
  # Writes the lines, and returns the answer that they lead to.
  solve: Callable[[working.Working], Any]

  @property
  def id(self) -> str:
    """Returns a name that is made of the question."""
    return hashlib.sha256(self.question.encode('utf-8')).hexdigest()[:16]

  @property
  def answer(self) -> answers.Answer:
    """Returns the right answer."""
    return answers.Answer(self.kind, self.solution().answer, self.choices)

  def solution(self, mistake: working.Mistake | None = None) -> Solution:
    """Returns the right solution, or the solution with a mistake."""
    work = working.Working(mistake)
    answer = self.solve(work)
    items = answer if isinstance(answer, list) else [answer]
    text = ', '.join(map(working.shown, items))
    return Solution(tuple(work.lines), text, work.is_whole)

  def wrong_solution(
    self, difficulty: int, draws: draws_lib.Draws
  ) -> tuple[Solution, float]:
    """Returns a solution with a wrong answer, and its margin.

    Args:
      difficulty: how hard the mistake is to see: `working.NO_WORK` gives a
        wrong answer alone, `OPERATION` and `SLIP` one wrong step.
      draws: random draws of the step and of the mistake.

    Returns:
      The solution, and the share of the lines of the right solution that it
      does not have, the answer included: from above 0 to 1.
    """
    right = self.solution()
    found = self._mistaken(right, max(difficulty, working.OPERATION), draws)
    if difficulty == working.NO_WORK:
      found = dataclasses.replace(found, lines=())
    lines = right.text.splitlines()
    written = found.text.splitlines()
    written += [''] * (len(lines) - len(written))
    same = sum(a == b for a, b in zip(lines, written, strict=False))
    return found, 1 - same / len(lines)

  def _mistaken(
    self, right: Solution, difficulty: int, draws: draws_lib.Draws
  ) -> Solution:
    """Returns a solution with one wrong step and a wrong answer."""
    last = len(right.lines) - 1
    for _ in range(_MOST_TRIES):
      # An early mistake may not change the answer, as in a comparison, and may
      # show itself by half an apple.
      step = draws.between(0, last)
      found = self.solution(working.Mistake(step, difficulty, draws))
      is_plausible = found.is_whole or not right.is_whole
      if is_plausible and not answers.is_right(self.answer, found.text):
        return found
    # The last step decides the answer.
    return self.solution(working.Mistake(last, working.SLIP, draws))
