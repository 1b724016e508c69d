"""Invented people with random names and attributes, as rows of ids.

The attributes of a person are independent and uniform, so the bits that a model
must store to know them are known exactly (bioS of Allen-Zhu and Li,
arXiv:2404.05405 and arXiv:2309.14316). Each value and each part of a name is
one id of a small vocabulary of its own:

    a text       n1 n2 n3, then for each attribute   phrase value
    a question   n1 n2 n3 attribute value

A phrase introduces an attribute. Each attribute has several phrases; a text
takes one of them. Texts of a person may have the attributes in the same order,
or in a random one.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """How many parts of names, values and phrases there are."""

  names: tuple[int, ...]  # of the first part of a name, of the second ...
  values: tuple[int, ...]  # of each attribute
  phrases: int = 1  # of each attribute

  def __post_init__(self):
    """Raises ValueError where a number is below 1."""
    for field in ('names', 'values'):
      counts = getattr(self, field)
      if not counts or min(counts) < 1:
        raise ValueError(
          f'{field}: got {counts}, expected one number of at least 1 or more'
        )
    if self.phrases < 1:
      raise ValueError(f'phrases: got {self.phrases}, expected at least 1')

  @property
  def num_ids(self) -> int:
    """Returns the number of ids."""
    return self.first_value + sum(self.values)

  @property
  def bits_per_person(self) -> float:
    """Returns the bits of a person's attributes, without the name."""
    return sum(map(math.log2, self.values))

  @property
  def text_length(self) -> int:
    """Returns the ids of a text."""
    return len(self.names) + 2 * len(self.values)

  @property
  def question_length(self) -> int:
    """Returns the ids of a question with its answer."""
    return len(self.names) + 2

  # 0 is never used; then come attributes, phrases, names, values.

  @property
  def first_phrase(self) -> int:
    """Returns the first id of a phrase."""
    return 1 + len(self.values)

  @property
  def first_name(self) -> int:
    """Returns the first id of a part of a name."""
    return self.first_phrase + self.phrases * len(self.values)

  @property
  def first_value(self) -> int:
    """Returns the first id of a value."""
    return self.first_name + sum(self.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class People:
  """N people: ids of their names, [N, parts], and of their values, [N, A]."""

  vocabulary: Vocabulary
  names_NP: np.ndarray
  values_NA: np.ndarray

  def __len__(self) -> int:
    return len(self.names_NP)

  def texts(
    self,
    chosen_B: np.ndarray,
    rng: np.random.Generator,
    *,
    is_permuted: bool = False,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns a text about each chosen person, with random phrases.

    Args:
      chosen_B: indices of people.
      rng: draws the phrases and the order.
      is_permuted: whether each text has an order of its own.

    Returns:
      ids, int32 [B, T], and whether an id is a value, bool [B, T].
    """
    count = len(self.vocabulary.values)
    order_BA = np.broadcast_to(np.arange(count), (len(chosen_B), count))
    if is_permuted:
      order_BA = rng.permuted(order_BA, axis=1)
    phrase_BA = rng.integers(self.vocabulary.phrases, size=order_BA.shape)
    first = self.vocabulary.first_phrase
    phrases_BA = first + order_BA * self.vocabulary.phrases + phrase_BA
    values_BA = np.take_along_axis(self.values_NA[chosen_B], order_BA, axis=1)
    told_BT = np.stack([phrases_BA, values_BA], axis=-1).reshape(
      len(chosen_B), -1
    )
    ids_BT = np.concatenate([self.names_NP[chosen_B], told_BT], axis=1)
    place_T = np.arange(ids_BT.shape[1]) - self.names_NP.shape[1]
    is_value_T = (place_T >= 0) & (place_T % 2 == 1)
    return ids_BT.astype(np.int32), np.broadcast_to(is_value_T, ids_BT.shape)

  def questions(
    self, chosen_B: np.ndarray, attribute_B: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns a question about an attribute of each chosen person.

    The name, then an id of the attribute that no text has, then the answer.

    Returns:
      ids, int32 [B, T], and whether an id is the answer, bool [B, T].
    """
    ids_BT = np.concatenate(
      [
        self.names_NP[chosen_B],
        1 + attribute_B[:, None],
        self.values_NA[chosen_B, attribute_B][:, None],
      ],
      axis=1,
    )
    is_answer_T = np.arange(ids_BT.shape[1]) == ids_BT.shape[1] - 1
    return ids_BT.astype(np.int32), np.broadcast_to(is_answer_T, ids_BT.shape)


def draw(
  rng: np.random.Generator, vocabulary: Vocabulary, num_people: int
) -> People:
  """Returns people with different names and independent attributes.

  Raises:
    ValueError: there are fewer names than people.
  """
  num_names = math.prod(vocabulary.names)
  if not 1 <= num_people <= num_names:
    raise ValueError(
      f'people: got {num_people}, expected 1 to {num_names}: everybody has a'
      f' name of their own out of {vocabulary.names} parts'
    )
  places_N = rng.choice(num_names, num_people, replace=False)
  parts_NP = np.stack(np.unravel_index(places_N, vocabulary.names), axis=1)
  values_NA = np.stack(
    [rng.integers(count, size=num_people) for count in vocabulary.values],
    axis=1,
  )
  return People(
    vocabulary=vocabulary,
    names_NP=parts_NP + _starts(vocabulary.first_name, vocabulary.names),
    values_NA=values_NA + _starts(vocabulary.first_value, vocabulary.values),
  )


def _starts(first: int, counts: tuple[int, ...]) -> np.ndarray:
  """Returns the first id of each kind."""
  return first + np.concatenate([[0], np.cumsum(counts)[:-1]])
