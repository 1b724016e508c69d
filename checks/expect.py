"""Checks of a value at the boundary, with one form of error.

    NAME: got VALUE, expected RANGE; FIX

NAME is the flag or the field as its user writes it. Every function raises
ValueError where the value is out of range and returns nothing where it is fine.
Imports no other package of the project, so that every package can use it.
"""

from collections.abc import Iterable
import difflib
import reprlib
from typing import Any

MOST_SHOWN = 120  # characters of a value in an error or a log line


def shown(value: Any) -> str:
  """Returns the repr of a value, cut to at most `MOST_SHOWN` characters.

  A value may come from a stranger and be large. It is cut before its repr is
  made. The repr escapes control characters, so that it stays one line.
  """
  return _SHORT.repr(value)


class _Short(reprlib.Repr):
  def __init__(self):
    super().__init__()
    self.maxlevel = 3
    self.maxstring = self.maxother = self.maxlong = MOST_SHOWN
    self.maxtuple = self.maxlist = self.maxdict = self.maxset = 8

  def repr(self, x: Any) -> str:
    text = super().repr(x)
    if len(text) <= MOST_SHOWN:
      return text
    return f'{text[: MOST_SHOWN - 3]}...'

  def repr_int(self, x: int, level: int) -> str:
    # Python refuses to write more than 4300 digits.
    if x.bit_length() > 4 * MOST_SHOWN:
      return f'an integer of {x.bit_length()} bits'
    return super().repr_int(x, level)


_SHORT = _Short()


def one_of(
  name: str, value: Any, allowed: Iterable[Any], fix: str = ''
) -> None:
  """Raises ValueError if `value` is not among `allowed`."""
  allowed = list(allowed)
  if value not in allowed:
    _refuse(name, value, f'one of {", ".join(map(str, allowed))}', fix)


def meant(value: Any, allowed: Iterable[Any]) -> str:
  """Returns '; did you mean lion?' for names like `value`, '' for none."""
  names = [name for name in allowed if isinstance(name, str)]
  near = difflib.get_close_matches(str(value), names, n=3)
  return f'; did you mean {" or ".join(near)}?' if near else ''


def at_least(name: str, value: float, least: float, fix: str = '') -> None:
  """Raises ValueError if `value` is below `least`, or NaN."""
  if not value >= least:
    _refuse(name, value, f'at least {least}', fix)


def divides(
  name: str, value: int, whole_name: str, whole: int, fix: str = ''
) -> None:
  """Raises ValueError if `value` is no divisor of `whole`."""
  if value < 1 or whole % value:
    _refuse(name, value, f'a divisor of {whole_name} = {whole}', fix)


def multiple_of(
  name: str, value: int, part_name: str, part: int, fix: str = ''
) -> None:
  """Raises ValueError if `value` is no multiple of `part`.

  Args:
    part_name: name of the divisor; '' where a number needs no name.
  """
  if value % part:
    named = f'{part_name} = {part}' if part_name else f'{part}'
    _refuse(name, value, f'a multiple of {named}', fix)


def _refuse(name: str, value: Any, expected: str, fix: str) -> None:
  end = f'; {fix}' if fix else ''
  raise ValueError(f'{name}: got {shown(value)}, expected {expected}{end}')
