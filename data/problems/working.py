"""The working of a solution: its lines, with one mistake on request.

A family solves its problem with the methods of a `Working`, which writes the
lines and returns the value that the next lines use. A wrong solution is the
same working with another value at one step: the lines after it follow from the
mistake, and so does the final answer. Such a solution can only be told from a
right one by checking its steps.
"""

from collections.abc import Callable, Sequence
import dataclasses
import fractions
from typing import Any

from data.problems import draws as draws_lib

Number = int | fractions.Fraction

# Kinds of mistakes, from easy to hard to see.
NO_WORK, OPERATION, SLIP = DIFFICULTIES = (1, 2, 3)

_OPERATIONS: dict[str, Callable[[Any, Any], Number]] = {
  '+': lambda a, b: a + b,
  '-': lambda a, b: a - b,
  '*': lambda a, b: a * b,
  '/': lambda a, b: fractions.Fraction(a) / b,
  'mod': lambda a, b: a % b,
}

# Operations that are taken for another one.
_CONFUSED = {'+': '-', '-': '+', '*': '+', '/': '-*', 'mod': '-'}


@dataclasses.dataclass(frozen=True)
class Mistake:
  """One wrong step.

  A mistake of `OPERATION` adds in place of subtracting, or takes the largest in
  place of the smallest. A `SLIP` is a result that is near the right one.
  """

  step: int  # counted from 0
  difficulty: int  # OPERATION | SLIP
  draws: draws_lib.Draws


class Working:
  """The lines of a solution while it is written."""

  def __init__(self, mistake: Mistake | None = None):
    """Starts with no line; `mistake` is None for a right solution."""
    self.lines: list[str] = []
    self.is_whole = True  # every result so far is an integer
    self._mistake = mistake

  def calculate(
    self, left: Number, sign: str, right: Number, line: str = '{}.'
  ) -> Number:
    """Writes a line with 'left sign right = result'; returns the result."""
    result = _simple(_OPERATIONS[sign](left, right))
    if mistake := self._mistake_here():
      sign, result = _miscalculated(mistake, left, sign, right, result)
    self.is_whole &= isinstance(result, int)
    written = f'{_operand(left)} {sign} {_operand(right)} = {shown(result)}'
    self.lines.append(line.format(written))
    return result

  def choose(self, right: Any, others: Sequence[Any], line: str) -> Any:
    """Writes a line with a choice; returns it.

    Args:
      right: the right choice.
      others: wrong choices, the likeliest first; at least one.
      line: text of the line, with {} for the choice.
    """
    chosen = right
    if mistake := self._mistake_here():
      chosen = others[0 if mistake.difficulty == SLIP else -1]
    self.lines.append(line.format(shown(chosen)))
    return chosen

  def _mistake_here(self) -> Mistake | None:
    is_here = self._mistake and self._mistake.step == len(self.lines)
    return self._mistake if is_here else None


def shown(item: Any) -> str:
  """Returns a number, or another item, as a solution writes it."""
  return str(_simple(item))


def _simple(item: Any) -> Any:
  """Returns a fraction that is whole as an integer."""
  if isinstance(item, fractions.Fraction) and item.denominator == 1:
    return item.numerator
  return item


def _operand(number: Number) -> str:
  text = shown(number)
  return text if text.isdigit() else f'({text})'


def _miscalculated(
  mistake: Mistake, left: Number, sign: str, right: Number, result: Number
) -> tuple[str, Number]:
  """Returns the sign and the result of a calculation with a mistake."""
  if mistake.difficulty == OPERATION:
    others = {
      other: _simple(_OPERATIONS[other](left, right))
      for other in _CONFUSED[sign]
    }
    found = [
      other
      for other, value in others.items()
      if value != result and _is_plausible(value, result)
    ]
    if found:
      other = mistake.draws.pick(found)
      return other, others[other]
  # One or two too many, a carry that was forgotten, or the next table.
  steps = (-2, -1, 1, 2) if result < 20 else (-10, -2, -1, 1, 2, 10)
  near = [result + step for step in steps]
  near = [value for value in near if _is_plausible(value, result)]
  if sign == 'mod':
    near = [value for value in range(int(right)) if value != result]
  return sign, _simple(mistake.draws.pick(near))


def _is_plausible(value: Number, result: Number) -> bool:
  """Returns whether a wrong value has the sign of the right one."""
  # A story with -5 apples would show its mistake, and 0 may be a divisor.
  return value > 0 or result <= 0
