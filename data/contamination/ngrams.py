"""A search for the n-grams of one text in another, of any length.

The n-grams of the evaluation text are hashed to 64 bits and sorted. The
training text is read once, in pieces of any size. Two different n-grams have
the same hash about once in 2**60 pairs. So a search of 10**9 tokens for 10**6
n-grams reports an n-gram that is not there once in a thousand searches.

Reference: Karp and Rabin 1987 (Efficient randomized pattern-matching
algorithms) for the hash, here of randomly numbered symbols, modulo 2**64.
"""

import numpy as np

# Odd, so that multiplication by it is invertible modulo 2**64.
_MULTIPLIER = 0x5851F42D4C957F2D
# Entries of the filter per n-gram: at most one in 16 other hashes passes it.
_FILTER_PER_NGRAM = 16


class Documents:
  """Evaluation documents whose n-grams are looked for in training text.

  A document of fewer than n symbols counts as one n-gram. It is found if a
  training document is the same as a whole.
  """

  def __init__(self, codes_N: np.ndarray, edges_D: np.ndarray, ngram: int):
    """Hashes the n-grams.

    Args:
      codes_N: uint64 [N], a random number for each symbol of all documents.
      edges_D: int64 [documents + 1], the start of each document, and the end.
    """
    self.ngram = ngram
    lengths_D = np.diff(edges_D)
    is_long_D = lengths_D >= ngram
    hashes_N = hashes(codes_N, ngram)
    num_grams_D = np.where(is_long_D, lengths_D - ngram + 1, 0)
    self._document_G = np.repeat(np.arange(len(lengths_D)), num_grams_D)
    first_D = np.cumsum(num_grams_D) - num_grams_D
    at_G = (edges_D[:-1] - first_D)[self._document_G] + np.arange(
      len(self._document_G)
    )
    self._grams = _Wanted(hashes_N[at_G])
    self._short = {
      int(length): (
        np.flatnonzero(lengths_D == length),
        _Wanted(whole_hashes(codes_N, edges_D, int(length))),
      )
      for length in np.unique(lengths_D[~is_long_D & (lengths_D > 0)])
    }
    self._num_documents = len(lengths_D)

  def mark(self, codes_N: np.ndarray) -> None:
    """Marks the n-grams of a training text as found.

    Consecutive pieces of a longer text must overlap by n - 1 symbols.
    """
    self._grams.mark(hashes(codes_N, self.ngram))

  def mark_documents(self, codes_N: np.ndarray, edges_D: np.ndarray) -> None:
    """Marks short documents that equal a whole training document."""
    for length, (_, wanted) in self._short.items():
      wanted.mark(whole_hashes(codes_N, edges_D, length))

  def found_D(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the n-grams of each document and the found ones, int64 [D]."""
    total_D = np.bincount(self._document_G, minlength=self._num_documents)
    found_D = np.bincount(
      self._document_G,
      weights=self._grams.found(),
      minlength=self._num_documents,
    ).astype(np.int64)
    for documents, wanted in self._short.values():
      total_D[documents] = 1
      found_D[documents] = wanted.found()
    return total_D, found_D


class _Wanted:
  """A set of hashes that are looked for."""

  def __init__(self, hashes_G: np.ndarray):
    self._hashes_U, self._places_G = np.unique(hashes_G, return_inverse=True)
    self._found_U = np.zeros(len(self._hashes_U), bool)
    bits = max(8, int(_FILTER_PER_NGRAM * len(hashes_G)).bit_length())
    # Most hashes of a long text are not in the set. A look at one byte of this
    # table, by the highest bits of the hash, rejects most of them.
    self._shift = np.uint64(64 - bits)
    self._filter = np.zeros(1 << bits, bool)
    self._filter[self._hashes_U >> self._shift] = True

  def mark(self, hashes_N: np.ndarray) -> None:
    """Marks the hashes of the set that are among `hashes_N`."""
    maybe_N = hashes_N[self._filter[hashes_N >> self._shift]]
    if not len(maybe_N) or not len(self._hashes_U):
      return
    places_N = np.searchsorted(self._hashes_U, maybe_N)
    places_N = np.minimum(places_N, len(self._hashes_U) - 1)
    self._found_U[places_N[self._hashes_U[places_N] == maybe_N]] = True

  def found(self) -> np.ndarray:
    """Returns bool [n-grams], whether each was found, in the given order."""
    return self._found_U[self._places_G]


def hashes(codes_N: np.ndarray, ngram: int) -> np.ndarray:
  """Returns uint64 [N - n + 1], the hash of every n-gram; empty if N < n.

  h(i, a + b) = h(i, a) + M**a h(i + a, b) for the hash h(i, a) of `a` symbols
  from i. So the hashes of n symbols are joined from hashes of powers of two, in
  about 2 log2(n) passes.
  """
  num = max(0, len(codes_N) - ngram + 1)
  result_N = np.zeros(num, np.uint64)
  if not num:
    return result_N
  # power_N: hashes of `size` symbols; result_N: hashes of `done` symbols.
  power_N, size, done = codes_N, 1, 0
  while done < ngram:
    if (ngram - done) & size:
      shifted_N = power_N[done : done + num]
      result_N = result_N + _power(done) * shifted_N
      done += size
    if done < ngram:
      power_N = power_N[:-size] + _power(size) * power_N[size:]
      size *= 2
  return result_N


def whole_hashes(
  codes_N: np.ndarray, edges_D: np.ndarray, length: int
) -> np.ndarray:
  """Returns uint64, the hashes of all documents of exactly `length` symbols."""
  first_D = edges_D[:-1][np.diff(edges_D) == length]
  text_N = codes_N[(first_D[:, None] + np.arange(length)[None, :]).ravel()]
  return hashes(text_N, length)[::length]


def _power(exponent: int) -> np.uint64:
  return np.uint64(pow(_MULTIPLIER, exponent, 2**64))
