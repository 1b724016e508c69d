"""The tokenizer of an experiment: bytes, trained BPE, or loaded from disk.

It is built once, at the start of training, and saved in the workdir. A resumed
run loads it from there.
"""

from collections.abc import Iterator
import itertools
import math
from typing import Any

from checks import paths
from data import data_config, sources
from text import bpe, tokenizer as tokenizer_lib


def build_tokenizer(
  config: data_config.TokenizerConfig, *mixed: tuple[sources.Source, float]
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer that `config` describes.

  Args:
    config: the tokenizer to build, validated.
    *mixed: the training sources, each with its weight, which is its share of
      the text that 'bpe' learns from. Only kind 'bpe' reads them.

  Raises:
    FileNotFoundError: `config.path` holds no tokenizer.
    ValueError: the text is too small for the vocabulary, or the vocabulary is
      too small for all bytes and special tokens.
  """
  if config.kind == 'byte':
    return tokenizer_lib.ByteTokenizer()
  if config.kind == 'directory':
    return tokenizer_lib.load(
      paths.expanded('data.tokenizer.path', config.path)
    )
  total = sum(weight for _, weight in mixed)
  texts = itertools.chain.from_iterable(
    _texts(source, math.ceil(config.train_bytes * weight / total))
    for source, weight in mixed
  )
  tokenizer = bpe.train(texts, config.vocab_size)
  if tokenizer.vocab_size != config.vocab_size:
    raise ValueError(
      f'the text gives {tokenizer.vocab_size} tokens, expected '
      f'tokenizer.vocab_size = {config.vocab_size}; ask for fewer ids or give '
      'more text'
    )
  return tokenizer


def _texts(source: sources.Source, max_bytes: int) -> Iterator[str]:
  """Yields texts in order, up to `max_bytes` in all; the last one is cut."""
  left = max_bytes
  for i in range(len(source)):
    document = source[i]
    text = document['text'] if 'text' in document else _text_of(document)
    data = text.encode('utf-8')[:left]
    # A cut may fall inside a character.
    yield data.decode('utf-8', errors='ignore')
    left -= len(data)
    if left <= 0:
      return


def _text_of(value: Any) -> str:
  """Returns all strings in the record of an example."""
  if isinstance(value, str):
    return value
  items = value.values() if isinstance(value, dict) else value
  if not isinstance(items, str | list) and not isinstance(value, dict):
    return ''
  return '\n'.join(filter(None, map(_text_of, items)))
