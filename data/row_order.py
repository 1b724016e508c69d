"""The order in which rows are trained, as a function of (seed, index).

No list of rows is kept. Row i is computed without the rows before it, so a run
resumes from any step at once, and any number of workers agree on the order.

References: a permutation of n numbers is made from a permutation of a slightly
larger power of two by cycle walking (Black and Rogaway 2002, Ciphers with
arbitrary finite domains). The larger permutation is a Feistel network, with the
finaliser of SplitMix64 (Steele et al. 2014, Fast splittable pseudorandom number
generators) as its round function.
"""

import numpy as np

# Four rounds make a Feistel network pseudorandom if its round function is (Luby
# and Rackoff 1988). Tiny domains have halves of one or two bits and need more.
_NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values_N: np.ndarray) -> np.ndarray:
  """Returns uint64 [N], a hash of each value: equal values, equal hashes."""
  x_N = values_N.astype(np.uint64) + _GOLDEN
  x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_N ^ (x_N >> np.uint64(31))


def shuffled(indices_N: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Returns numbers below `size`, in another random order in each epoch.

  Args:
    indices_N: int64 [N], 0 or more; index // size is the epoch.
    size: number of rows of an epoch, up to 2**62.
    seed: seed of the order.

  Returns:
    int64 [N]; over the indices of one epoch, every number occurs once.
  """
  epochs_N, places_N = np.divmod(indices_N, size)
  keys_N = splitmix64(epochs_N.astype(np.uint64) ^ splitmix64(np.array([seed])))
  half_bits = max(1, -(-(size - 1).bit_length() // 2))
  result_N = places_N.astype(np.uint64)
  is_outside_N = np.ones(len(result_N), bool)
  # Cycle walking: permute again until the number is below `size`. The domain
  # has less than 4 x size numbers, so few steps are needed.
  while is_outside_N.any():
    result_N[is_outside_N] = _permute(
      result_N[is_outside_N], keys_N[is_outside_N], half_bits
    )
    is_outside_N = result_N >= np.uint64(size)
  return result_N.astype(np.int64)


def drawn(indices_N: np.ndarray, size: int, seed: int) -> np.ndarray:
  """Returns int64 [N]: a random number below `size` for every index."""
  mixed_N = splitmix64(
    indices_N.astype(np.uint64) ^ splitmix64(np.array([seed]))
  )
  # The 53 bits that float64 can hold.
  share_N = (mixed_N >> np.uint64(11)).astype(np.float64) * 2.0**-53
  return (share_N * size).astype(np.int64)


def _permute(
  values_N: np.ndarray, keys_N: np.ndarray, half_bits: int
) -> np.ndarray:
  """Permutes the numbers of 2 x `half_bits` bits; each value by its own key."""
  shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
  left_N, right_N = values_N >> shift, values_N & mask
  for _ in range(_NUM_ROUNDS):
    keys_N = keys_N + _GOLDEN
    round_N = splitmix64(right_N ^ keys_N) & mask
    left_N, right_N = right_N, left_N ^ round_N
  return (left_N << shift) | right_N
