"""Claims: results of papers, as values that a program can check.

A file in `experiments/papers/` returns claims from `get_claims`;
`python -m studies.reproduce` measures them. A claim has one or more quantities.
Each quantity has a range of values that count as reproduced, with a reason. The
range is written before anything is measured, and does not depend on the
measurement.
"""

from collections.abc import Mapping
import dataclasses
import math
import re

from checks import expect

DEVICES = ('cpu', 'gpu')
_NAME = re.compile(r'[a-z][a-z0-9_]*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
  """One number of a claim, and the values that count as reproduced."""

  name: str  # with its unit, where it has one
  published: str  # in the spelling of the paper
  low: float  # the least value that counts as reproduced
  high: float  # the largest such value
  why: str  # the reason for this range

  def accepts(self, value: float) -> bool:
    """Returns whether a value counts as reproduced."""
    return self.low <= value <= self.high


def digits(name: str, published: str, why: str = '') -> Quantity:
  """Returns a quantity that is reproduced to the digits of its paper.

  Args:
    name: name of the quantity.
    published: a decimal number, such as '0.1931'.
    why: a reason beyond the rule that the range is half a unit of the last
      digit.

  Raises:
    ValueError: `published` is not a plain decimal number.
  """
  if not re.fullmatch(r'-?\d*\.?\d+', published):
    raise ValueError(
      f'published: got {published!r}, expected a decimal number such as 0.1931;'
      ' write a Quantity with low and high'
    )
  value = float(published)
  half = 0.5 * 10.0 ** -len(published.partition('.')[2])
  # A number between two decimals of the paper's length may round to either.
  slack = half * (1 + 1e-9)
  return Quantity(
    name=name,
    published=published,
    low=value - slack,
    high=value + slack,
    why=why or "half a unit of the paper's last digit",
  )


def within(
  name: str, published: str, value: float, share: float, why: str
) -> Quantity:
  """Returns a quantity that is reproduced within a share of its value."""
  width = abs(value) * share
  return Quantity(
    name=name, published=published, low=value - width, high=value + width,
    why=f'within {share:.2g} of it: {why}',
  )  # fmt: skip


def at_least(name: str, published: str, low: float, why: str) -> Quantity:
  """Returns a quantity that is reproduced by values from `low` on."""
  return Quantity(
    name=name, published=published, low=low, high=math.inf, why=why
  )


def at_most(name: str, published: str, high: float, why: str) -> Quantity:
  """Returns a quantity that is reproduced by values up to `high`."""
  return Quantity(
    name=name, published=published, low=-math.inf, high=high, why=why
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """A result of a paper, and the way to measure it."""

  name: str  # name of the function in studies/papers/ that measures it
  paper: str  # authors, year and address
  where: str  # table, figure, equation or section
  statement: str  # one sentence
  quantities: tuple[Quantity, ...]
  # Seconds of one measurement with all seeds, by kind of device. A missing kind
  # is too slow to be of use.
  seconds: Mapping[str, float]
  # 0: the result does not depend on a seed. Others need at least 2: one run
  # does not show how much runs vary.
  seeds: int = 0
  # Files that the project does not contain, by the name that --inputs gives,
  # and where they come from.
  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # A difference to the paper's recipe, and other things to know.
  note: str = ''

  def validate(self) -> None:
    """Raises ValueError for a claim that cannot be checked."""
    where = f'claim {self.name!r}'
    if not _NAME.fullmatch(self.name):
      raise ValueError(
        f'{where}: got this name, expected lower-case letters, digits and _'
      )
    for field in ('paper', 'where', 'statement'):
      if not getattr(self, field).strip():
        raise ValueError(f'{where}: got no {field}, expected its text')
    if not self.quantities:
      raise ValueError(f'{where}: got no quantities, expected at least one')
    names = [quantity.name for quantity in self.quantities]
    if len(set(names)) < len(names):
      raise ValueError(f'{where}: got quantities {names}, expected each once')
    for quantity in self.quantities:
      self._check(quantity, where)
    if self.seeds < 0 or self.seeds == 1:
      raise ValueError(
        f'{where}: got {self.seeds} seeds, expected 0 for a result without'
        ' seeds, or at least 2 for an interval'
      )
    if not self.seconds:
      raise ValueError(
        f'{where}: got no seconds, expected the seconds of a CPU, a GPU or both'
      )
    for device, seconds in self.seconds.items():
      expect.one_of(f'{where}, seconds', device, DEVICES)
      if not 0 < seconds < math.inf:
        raise ValueError(
          f'{where}: got {seconds} seconds on a {device}, expected more than 0'
        )

  def _check(self, quantity: Quantity, where: str) -> None:
    for field in ('name', 'published', 'why'):
      text = getattr(quantity, field)
      # Cells of a table in Markdown.
      if not text.strip() or '|' in text or '\n' in text:
        raise ValueError(
          f'{where}: got {field} = {text!r} of a quantity, expected one line of'
          ' text without |'
        )
    if not quantity.low < quantity.high:
      raise ValueError(
        f'{where}: got the range {quantity.low} to {quantity.high} of'
        f' {quantity.name}, expected low < high'
      )
