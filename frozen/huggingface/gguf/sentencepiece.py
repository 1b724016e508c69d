"""SentencePiece's BPE of a GGUF file, as a tokenizer.json.

The file has pieces with scores. llama.cpp joins the two neighbours whose piece
has the highest score, again and again. A tokenizer.json has a list of merges in
order instead, so each way to make a piece becomes a merge at the rank of the
score.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SPACE = '\u2581'
_NORMAL, _USER_DEFINED = 1, 4  # kinds of pieces that others are joined to


def model(
  tokens: list[str],
  kinds: np.ndarray,
  scores: np.ndarray,
  *,
  has_prefix: bool,
  unknown: str | None,
) -> dict[str, Any]:
  """Returns normalizer, pre-tokenizer, decoder and model of a tokenizer.json.

  Args:
    tokens: the pieces, by id.
    kinds: of the pieces, as in llama.cpp.
    scores: float32, of the pieces; higher ones are joined first.
    has_prefix: whether a space is put in front of each text.
    unknown: the piece of a character that is not known; used if a byte of it
      has no piece.
  """
  space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  prefix = {'type': 'Prepend', 'prepend': SPACE}
  back = {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}
  strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
  steps = [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}]
  return {
    'normalizer': {
      'type': 'Sequence',
      'normalizers': [*([prefix] if has_prefix else []), space],
    },
    'pre_tokenizer': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [*steps, *([strip] if has_prefix else [])],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': unknown,
      'fuse_unk': True,
      'byte_fallback': True,
      'ignore_merges': False,
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': list(_merges(tokens, kinds, scores)),
    },
  }


def _merges(
  tokens: list[str], kinds: np.ndarray, scores: np.ndarray
) -> Iterator[tuple[str, str]]:
  """Yields the pairs that make a piece, of the highest score first."""
  joined = {
    tokens[i]
    for i in np.flatnonzero(np.isin(kinds, (_NORMAL, _USER_DEFINED))).tolist()
  }
  # Pieces with equal scores keep the order of their ids.
  for i in np.argsort(-scores, kind='stable').tolist():
    piece = tokens[i]
    if piece in joined:
      for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in joined and right in joined:
          yield left, right


def scores_of(model: Mapping[str, Any], num_tokens: int) -> np.ndarray:
  """Returns scores that join pieces in the order of a tokenizer.json.

  The score of a piece is the negative rank of its first merge. A character is
  made by no merge; its score has no effect.
  """
  vocabulary = model['vocab']
  scores = np.zeros(num_tokens, np.float32)
  seen = set()
  for rank, merge in enumerate(model['merges']):
    left, right = merge.split(' ', 1) if isinstance(merge, str) else merge
    piece = left + right
    if piece not in seen:
      seen.add(piece)
      scores[vocabulary[piece]] = -rank - 1
  return scores
