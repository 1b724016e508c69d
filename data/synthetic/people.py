"""People and a fact about each, as statements and as questions.

A person has two names, and a value: a town, say. Three templates state it, and
a question asks for it. Between the ids of names and values stand marks:

    statements   1 n1 n2 v      2 v n1 n2      3 n1 5 n2 v
    question     4 n1 n2 v

Only statements tell the value of a person. So a model knows it from its
weights, where it was trained on statements, or from statements before the
question. Templates are the paraphrases of Allen-Zhu and Li 2023
(arXiv:2309.14316).
"""

import dataclasses

import numpy as np

PAD = 0
_QUESTION, _FILLER = 4, 5
NUM_TEMPLATES = 3
_FIRST_ID = 6
NUM_NAMES, NUM_VALUES = 40, 30  # ids of first names, of last names; of values
NUM_IDS = _FIRST_ID + 2 * NUM_NAMES + NUM_VALUES


@dataclasses.dataclass(frozen=True, kw_only=True)
class People:
  """Ids of first names, last names and values, each [M]."""

  first: np.ndarray
  last: np.ndarray
  value: np.ndarray

  def __len__(self) -> int:
    return len(self.value)

  def __getitem__(self, chosen) -> 'People':
    return People(
      first=self.first[chosen], last=self.last[chosen], value=self.value[chosen]
    )

  def statement(self, i: int, template: int) -> list[int]:
    """Returns the ids of a statement about person i.

    Raises:
      ValueError: there is no such template.
    """
    n1, n2, value = (int(x[i]) for x in (self.first, self.last, self.value))
    forms = [1, n1, n2, value], [2, value, n1, n2], [3, n1, _FILLER, n2, value]
    if not 0 <= template < NUM_TEMPLATES:
      raise ValueError(
        f'template: got {template}, expected 0 to {NUM_TEMPLATES - 1}'
      )
    return forms[template]

  def question(self, i: int) -> list[int]:
    """Returns the ids of the question about person i; its answer comes last."""
    ids = self.first[i], self.last[i], self.value[i]
    return [_QUESTION, *map(int, ids)]


def draw(rng: np.random.Generator, num_people: int) -> People:
  """Returns people with different names, and values that are independent.

  Raises:
    ValueError: there are fewer different names.
  """
  if not 1 <= num_people <= NUM_NAMES**2:
    raise ValueError(
      f'num_people: got {num_people}, expected 1 to {NUM_NAMES**2} different'
      ' names'
    )
  first, last = np.divmod(
    rng.choice(NUM_NAMES**2, size=num_people, replace=False), NUM_NAMES
  )
  return People(
    first=_FIRST_ID + first,
    last=_FIRST_ID + NUM_NAMES + last,
    value=_FIRST_ID + 2 * NUM_NAMES + rng.integers(NUM_VALUES, size=num_people),
  )


def draw_alike(rng: np.random.Generator) -> People:
  """Returns three people who share names: one name alone is not enough."""
  first = rng.choice(NUM_NAMES, size=2, replace=False)
  last = rng.choice(NUM_NAMES, size=2, replace=False)
  pairs = rng.permutation(4)[:3]
  return People(
    first=_FIRST_ID + first[pairs // 2],
    last=_FIRST_ID + NUM_NAMES + last[pairs % 2],
    value=_FIRST_ID + 2 * NUM_NAMES + rng.integers(NUM_VALUES, size=3),
  )


def is_name(ids: np.ndarray) -> np.ndarray:
  """Returns whether each id is a first or a last name."""
  return (ids >= _FIRST_ID) & (ids < _FIRST_ID + 2 * NUM_NAMES)
