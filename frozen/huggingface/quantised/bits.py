"""Codes of 4 or 8 bits in words of 32 bits, as quantised checkpoints have them.

The first code of a word lies in its lowest bits. Words are little-endian, as
are all machines that JAX runs on.
"""

import numpy as np

# Output of each nibble of a word in AWQ's GEMM files, from the lowest on: its
# GPU kernel unpacks even and odd nibbles together.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(count: int, bits: int) -> int:
  """Returns the number of words that hold `count` codes."""
  return -(-count * bits // 32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
  """Returns uint8 codes, [..., 32 / bits * n], of int32 words [..., n]."""
  packed = np.ascontiguousarray(words, '<i4').view(np.uint8)
  return packed if bits == 8 else nibbles(packed)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Returns int32 words of uint8 codes [..., n]; missing codes are 0."""
  *leading, count = codes.shape
  padding = [(0, 0)] * len(leading) + [(0, -count % (32 // bits))]
  codes = np.pad(codes.astype(np.uint8), padding)
  packed = codes if bits == 8 else pairs(codes)
  return np.ascontiguousarray(packed).view('<i4')


def nibbles(packed: np.ndarray) -> np.ndarray:
  """Returns codes of 4 bits, [..., 2n], of bytes [..., n]; low bits first."""
  codes = np.stack([packed & 0xF, packed >> 4], axis=-1)
  return codes.reshape((*packed.shape[:-1], -1))


def pairs(codes: np.ndarray) -> np.ndarray:
  """Returns bytes [..., n] of codes [..., 2n], of which 4 bits count."""
  codes = codes.astype(np.uint8) & 0xF
  return codes[..., ::2] | (codes[..., 1::2] << 4)


def in_awq_order(codes: np.ndarray) -> np.ndarray:
  """Returns codes [..., n] in the order of outputs."""
  words = codes.reshape((*codes.shape[:-1], -1, len(AWQ_ORDER)))
  return words[..., np.argsort(AWQ_ORDER)].reshape(codes.shape)
