"""What a request may choose about its completion, checked when it is chosen.

Values come from flags, from HTTP and from a frozen directory's generation.json;
`inference.generate` turns them into arrays.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from frozen import format as frozen_format

NUM_SEEDS = 2**32


class SettingError(ValueError):
  """A generation setting out of range; `setting` names it."""

  def __init__(self, setting: str, got: Any, expected: str):
    super().__init__(f'{setting}: got {got!r}, expected {expected}')
    self.setting = setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a request may choose; checked when made.

  Raises:
    SettingError: a value is out of range.
  """

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # most probable tokens to keep; 0 keeps all
  top_p: float = 1.0  # probability mass to keep; 1 keeps all
  min_p: float = 0.0  # least share of the largest probability; 0 keeps all
  seed: int | None = None  # None draws one, reported in the completion
  max_tokens: int | None = None  # None is up to the end of the context
  stop: tuple[str, ...] = ()  # ends the completion, not part of its text

  def __post_init__(self):
    self._check('temperature', lambda x: 0 <= x < math.inf, 'a number >= 0')
    self._check('top_p', lambda x: 0 < x <= 1, 'a number above 0, at most 1')
    self._check('min_p', lambda x: 0 <= x < 1, 'a number >= 0 and below 1')
    self._check_count('top_k', 0, 2**31)
    if self.seed is not None:
      self._check_count('seed', 0, NUM_SEEDS)
    if self.max_tokens is not None:
      self._check_count('max_tokens', 1, 2**31)
    if not isinstance(self.stop, tuple) or not all(
      isinstance(stop, str) and stop for stop in self.stop
    ):
      raise SettingError('stop', self.stop, 'strings, none of them empty')

  def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str):
    value = getattr(self, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and is_valid(value)):
      raise SettingError(name, value, expected)

  def _check_count(self, name: str, low: int, high: int):
    self._check(
      name,
      lambda x: isinstance(x, int) and low <= x < high,
      f'an integer from {low} to {high - 1}',
    )


def recommended(generation: dict[str, Any]) -> Settings:
  """Returns the settings that a frozen directory recommends.

  Raises:
    ValueError: a setting is unknown or out of range.
  """
  known = [field.name for field in dataclasses.fields(Settings)]
  if unknown := sorted(set(generation) - set(known)):
    raise ValueError(
      f'{frozen_format.GENERATION_FILE}: got the settings {unknown}, expected'
      f' only {", ".join(known)}; freeze again without them'
    )
  fields = dict(generation)
  if isinstance(fields.get('stop'), list):
    fields['stop'] = tuple(fields['stop'])
  return Settings(**fields)
