"""A source of documents for tests of data/, and operations on batches."""

import numpy as np


class Texts:
  """A source of the given texts that counts how many documents were read."""

  def __init__(self, *texts: str):
    self.texts = texts
    self.num_read = 0

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: int) -> dict[str, str]:
    self.num_read += 1
    return {'text': self.texts[index], 'id': f'document-{index}'}


def take(batches, n):
  """Returns the next `n` batches of an iterator that is then closed."""
  taken = [next(batches) for _ in range(n)]
  batches.close()
  return taken


def joined(batches):
  """Returns one batch with the rows of all batches."""
  return {
    name: np.concatenate([batch[name] for batch in batches])
    for name in batches[0]
  }


def assert_same(batch, other):
  """Asserts that two batches are equal, dtypes included."""
  assert batch.keys() == other.keys()
  for name in batch:
    assert batch[name].dtype == other[name].dtype
    np.testing.assert_array_equal(batch[name], other[name])
