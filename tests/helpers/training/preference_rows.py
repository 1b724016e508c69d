"""Rows of preferences made by hand, with the keys and rules of `data/rows.py`.

A unit is two documents. A document is the ids of a prompt and of a completion,
of which the completion is trained, and one more id that is not.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
  """A prompt and its completion; label and log-probabilities of a reference."""

  prompt: tuple[int, ...]
  completion: tuple[int, ...]
  label: float = 0.0
  ref_logprobs: tuple[float, ...] = ()  # of the completion's ids

  @property
  def length(self) -> int:
    """The number of inputs: all ids, because one more follows them."""
    return len(self.prompt) + len(self.completion)


Unit = tuple[Document, Document]


def draw(
  num_units: int,
  *,
  vocab_size: int,
  longest: int = 8,
  labelled: bool = False,
  seed: int = 0,
) -> list[Unit]:
  """Returns random units: prompts of 1 to 3 ids, completions up to `longest`.

  The completions of a unit share the prompt. Their reference is made up: it
  likes mismatched completions less than a uniform policy does, so that their
  divergence, which counts from 0 on, is above 0.
  """
  rng = np.random.default_rng(seed)

  def ids(least, most):
    size = rng.integers(least, most + 1)
    return tuple(rng.integers(1, vocab_size, size).tolist())

  def document(prompt, label, worse=0.0):
    completion = ids(1, longest)
    drawn = rng.uniform(2, 6, len(completion)) + worse
    ref_logprobs = -drawn.astype(np.float32)
    return Document(prompt, completion, label, tuple(ref_logprobs.tolist()))

  units = []
  for i in range(num_units):
    prompt = ids(1, 3)
    label = (1.0 if i % 3 else -1.0) if labelled else 0.0
    worse = 3.0 if labelled else 0.0
    units.append((document(prompt, label), document(prompt, 0.0, worse)))
  return units


def pack(
  units: Sequence[Unit], row_length: int, units_per_row: int
) -> list[list[Unit]]:
  """Returns rows of at most `units_per_row` units, in order."""
  rows: list[list[Unit]] = []
  used = row_length
  for unit in units:
    size = sum(document.length for document in unit)
    if used + size > row_length or len(rows[-1]) == units_per_row:
      rows.append([])
      used = 0
    rows[-1].append(unit)
    used += size
  return rows


def batch(
  rows: Sequence[Sequence[Unit]],
  *,
  row_length: int,
  num_rows: int | None = None,
  is_padded_left: bool = False,
) -> dict[str, np.ndarray]:
  """Returns the arrays of a batch; all that any loss of preferences reads."""
  shape = num_rows or len(rows), row_length
  arrays = {
    **{
      name: np.zeros(shape, np.int32)
      for name in ('tokens', 'targets', 'positions', 'segment_ids')
    },
    **{
      name: np.zeros(shape, np.float32)
      for name in ('weights', 'labels', 'ref_logprobs')
    },
  }
  for b, row in enumerate(rows):
    documents = [document for unit in row for document in unit]
    at = row_length - sum(d.length for d in documents) if is_padded_left else 0
    for number, document in enumerate(documents, 1):
      place = b, slice(at, at + document.length)
      at += document.length
      _fill({k: x[place] for k, x in arrays.items()}, document, number)
  return arrays


def _fill(row: dict[str, np.ndarray], document: Document, number: int) -> None:
  ids = np.array([*document.prompt, *document.completion, 0])
  row['tokens'][:] = ids[:-1]
  row['targets'][:] = ids[1:]
  row['positions'][:] = np.arange(document.length)
  row['segment_ids'][:] = number
  row['labels'][:] = document.label
  # The targets of the completion follow the last id of the prompt.
  trained = slice(len(document.prompt) - 1, document.length - 1)
  row['weights'][trained] = 1.0
  row['ref_logprobs'][trained] = document.ref_logprobs
