"""Problems from a seed: families, levels, and splits that share no content.

    made = generator.make(generator.Settings(count=1000, seed=7), 'train')

Candidate i of a seed is a function of (seed, i) alone. Its split is a hash of
its content, so two splits never share a problem, under any seed, number or
wording. The problems of a short list are the first problems of a longer list.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
from typing import Self
import urllib.parse

from absl import logging

from checks import expect
from data.problems import (
  arithmetic,
  draws as draws_lib,
  orders,
  problem,
  stories,
  working,
)

FAMILIES: dict[str, Callable[[draws_lib.Draws, int], problem.Problem]] = {
  'sums': arithmetic.sums,
  'products': arithmetic.products,
  'fractions': arithmetic.fractions_,
  'modular': arithmetic.modular,
  'words': stories.words,
  'comparisons': orders.comparisons,
  'sorting': orders.sorting,
  'logic': orders.logic,
  # By name only: one skill, for reinforcement and for compute at test time.
  'additions': arithmetic.additions,
  'columns': arithmetic.columns,
}
_MIXED = tuple(x for x in FAMILIES if x not in ('additions', 'columns'))
# Families whose answers are whole numbers.
WHOLE = ('sums', 'products', 'modular', 'words', 'additions', 'columns')
KINDS = ('text', 'chat', 'pairs', 'labelled', 'questions')
LEVELS = (1, 2, 3, 4, 5)
# Shares of the contents.
SPLITS = {'train': 0.8, 'validation': 0.1, 'test': 0.1}
# Number of known candidates in a row after which a family and level counts as
# used up.
_MOST_KNOWN = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The settings of a list of problems; as text, the query of a URL."""

  count: int = 1000  # problems of the split
  families: tuple[str, ...] = _MIXED
  levels: tuple[int, ...] = (1, 2, 3)
  seed: int = 0  # 64 bits
  kind: str = 'chat'  # kind of records, see data/problems/records.py
  # How hard wrong solutions are to tell, see data/problems/working.py; drawn
  # with equal shares.
  difficulties: tuple[int, ...] = working.DIFFICULTIES
  # Percent of the chats whose solution is a wrong one: demonstrations of mixed
  # quality, for reinforcement to begin with.
  wrong: int = 0

  def __post_init__(self):
    """Raises ValueError, naming the value."""
    expect.at_least('count', self.count, 1)
    for name, values, allowed in (
      ('families', self.families, FAMILIES),
      ('levels', self.levels, LEVELS),
      ('difficulties', self.difficulties, working.DIFFICULTIES),
    ):
      expect.at_least(f'number of {name}', len(values), 1)
      for value in values:
        expect.one_of(name, value, allowed)
    expect.one_of('kind', self.kind, KINDS)
    if not 0 <= self.wrong <= 100 or (self.wrong and self.kind != 'chat'):
      raise ValueError(
        f'wrong: got {self.wrong} with kind = {self.kind}, expected a'
        ' percentage of the solutions of kind chat, else 0'
      )
    if self.kind == 'questions':
      for family in self.families:
        expect.one_of(
          'families',
          family,
          WHOLE,
          'evals/tasks/gsm8k.py, which reads the kind questions, reads whole'
          ' numbers',
        )
    draws_lib.check_seed('seed', self.seed)

  @classmethod
  def parse(cls, text: str) -> Self:
    """Returns settings of a text as 'count=500&levels=1,2&families=sums'.

    Raises:
      ValueError: a name or a value is not known.
    """
    if text and '=' not in text:
      raise ValueError(
        f'settings: got {text!r}, expected a text as count=500&levels=1,2'
      )
    fields = {}
    for name, value in urllib.parse.parse_qsl(text, keep_blank_values=True):
      allowed = [field.name for field in dataclasses.fields(cls)]
      expect.one_of('setting', name, allowed)
      fields[name] = _parsed(name, value)
    return cls(**fields)

  def __str__(self) -> str:
    fields = vars(self).items()
    return '&'.join(
      f'{name}={",".join(map(str, value))}'
      if isinstance(value, tuple)
      else f'{name}={value}'
      for name, value in fields
    )


def _parsed(name: str, value: str):
  items = value.split(',')
  if name == 'kind':
    return value
  if name == 'families':
    return tuple(items)
  try:
    numbers = tuple(int(item) for item in items)
  except ValueError:
    raise ValueError(
      f'{name}: got {expect.shown(value)}, expected whole numbers, as 1,2'
    ) from None
  if name in ('levels', 'difficulties'):
    return numbers
  if len(numbers) != 1:
    raise ValueError(f'{name}: got {value!r}, expected one number')
  return numbers[0]


def split_of(made: problem.Problem) -> str:
  """Returns the split of a problem; it depends on its content alone."""
  text = repr((made.family, made.content))
  digest = hashlib.sha256(text.encode('utf-8')).digest()
  position = int.from_bytes(digest[:8]) / 2**64
  ends = itertools.accumulate(SPLITS.values())
  named = zip(SPLITS, ends, strict=True)
  return next((name for name, end in named if position < end), 'test')


def make(settings: Settings, split: str) -> list[problem.Problem]:
  """Returns `settings.count` different problems of a split.

  Families and levels are drawn with equal shares. If a family and level has no
  more different problems, it is left out from then on, with a warning.

  Raises:
    ValueError: there is no such split, or there are fewer problems.
  """
  expect.one_of('split', split, SPLITS)
  found = list(itertools.islice(_different(settings, split), settings.count))
  if len(found) < settings.count:
    raise ValueError(
      f'count: got {settings.count}, expected at most {len(found)}, the number'
      f' of different problems in {split}; add families or higher levels'
    )
  return found


def _different(settings: Settings, split: str) -> Iterator[problem.Problem]:
  """Yields problems of a split, each question once, until none are left."""
  kinds = list(itertools.product(settings.families, settings.levels))
  known_in_row = dict.fromkeys(kinds, 0)
  seen: set[str] = set()
  for index in itertools.count():
    draws = draws_lib.Draws(settings.seed, index)
    kind = family, level = draws.pick(kinds)
    if known_in_row[kind] >= _MOST_KNOWN:
      if min(known_in_row.values()) >= _MOST_KNOWN:
        return
      continue
    made = FAMILIES[family](draws, level)
    if made.question in seen:
      known_in_row[kind] += 1
      if known_in_row[kind] == _MOST_KNOWN:
        logging.warning(
          'problems: %s of level %d has no more different problems in %s',
          family,
          level,
          split,
        )
    elif split_of(made) == split:
      known_in_row[kind] = 0
      seen.add(made.question)
      yield made
