"""A vocabulary of as many ids as those of large models have, made of a seed.

No file is read. Half of the words begin with a space, a few are capitalised,
punctuation as JSON has it, or letters with accents, as in vocabularies of BPE.
"""

from collections.abc import Mapping
import random
import types

_LETTERS = 'etaoinshrdlucmfwypvbgkjqxz'  # the usual ones first
_SIGNS = '{}[]":,. \n0123456789()_-/'


class Vocabulary:
  """The parts of a tokenizer that grammars read; EOS is id 1."""

  bos_id, eos_id = 0, 1
  special_tokens: Mapping[str, int] = types.MappingProxyType({})

  def __init__(self, vocab_size: int = 128_256, seed: int = 0):
    """Makes the words.

    Args:
      vocab_size: V, at least 258.
      seed: of the words.
    """
    rng = random.Random(seed)
    words = {bytes([each]) for each in range(256)}
    while len(words) < vocab_size - 2:
      words.add(_word(rng).encode())
    self.vocab_size = vocab_size
    self._words = [b'', b'', *sorted(words)]
    self._ids = {word: index for index, word in enumerate(self._words) if word}
    self._most = max(map(len, words))

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of an id, b'' for BOS and EOS."""
    return self._words[token_id]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, the longest word first."""
    data, found = text.encode(), []
    while data:
      length = next(
        num for num in range(self._most, 0, -1) if data[:num] in self._ids
      )
      found.append(self._ids[data[:length]])
      data = data[length:]
    return found


def _word(rng: random.Random) -> str:
  length = min(max(int(rng.gauss(6, 3)), 2), 16)
  word = ''.join(
    _LETTERS[min(int(rng.expovariate(0.2)), 25)] for _ in range(length)
  )
  kind = rng.random()
  if kind < 0.5:
    return f' {word}'
  if kind < 0.6:
    return word.capitalize()
  if kind < 0.68:
    return ''.join(rng.choice(_SIGNS) for _ in range(rng.randint(2, 6)))
  if kind < 0.75:
    return ''.join(chr(rng.randint(0xC0, 0x4FF)) for _ in range(length // 2))
  return word
