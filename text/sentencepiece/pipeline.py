"""SentencePiece's models as the parts of a `tokenizer.json`.

A unigram model is one there as well. A BPE model has pieces with scores: the
two neighbours whose piece has the highest score are joined, again and again. A
tokenizer.json has a list of merges in order instead, so each way to make a
piece becomes a merge at the rank of the score.

Reference: Kudo and Richardson, SentencePiece (2018), arxiv.org/abs/1808.06226;
`normalizer.cc` and `bpe_model.cc` of github.com/google/sentencepiece.
"""

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
import re
from typing import Any, NamedTuple

import numpy as np

SPACE = '\u2581'
# Where a space is put: nowhere, before each text between special tokens
# (`legacy` in transformers), or before the first alone.
NO_PREFIX, EACH, FIRST = '', 'each', 'first'


class Rules(NamedTuple):
  """The changes to a text before its pieces are found."""

  prefix: str = NO_PREFIX
  charsmap: bytes = b''  # SentencePiece's table, see `model_file`
  has_lines_joined: bool = False  # whether it maps '\r' and '\n' alike
  is_stripped: bool = False  # no spaces at the ends, and no two in a row
  # Pieces of a BPE that the user has defined: never joined, and never cut.
  whole: Collection[str] = ()


def parts(rules: Rules, model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns normalizer, pre-tokenizer, decoder and model of a tokenizer.json.

  Args:
    model: from `bpe` or `unigram`.
  """
  back = {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}
  bytes_step = [{'type': 'ByteFallback'}] if model['byte_fallback'] else []
  is_first_cut = rules.prefix or rules.is_stripped
  strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
  steps = list(_pre_tokenizers(rules, model))
  return {
    'normalizer': {
      'type': 'Sequence',
      'normalizers': list(_normalizers(rules)),
    },
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps}
    if steps
    else None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        back,
        *bytes_step,
        {'type': 'Fuse'},
        *([strip] if is_first_cut else []),
      ],
    },
    'model': dict(model),
  }


def bpe(
  tokens: Sequence[str],
  joined: Collection[str],
  scores: np.ndarray,
  *,
  unknown: str | None,
  has_bytes: bool = True,
  is_whole_first: bool = False,
) -> dict[str, Any]:
  """Returns the model of a BPE.

  Args:
    tokens: the pieces, by id.
    joined: the pieces that merges make, and of which they are made.
    scores: float32, of the pieces; higher ones are joined first.
    unknown: the piece of a character that is not known.
    has_bytes: whether such a character becomes its bytes, if all have a piece.
    is_whole_first: whether a word that is a piece is not cut.
  """
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': unknown,
    'fuse_unk': True,
    'byte_fallback': has_bytes,
    'ignore_merges': is_whole_first,
    'vocab': {token: i for i, token in enumerate(tokens)},
    'merges': list(_merges(tokens, joined, scores)),
  }


def unigram(
  tokens: Sequence[str],
  scores: Sequence[float],
  unknown_id: int,
  *,
  has_bytes: bool,
) -> dict[str, Any]:
  """Returns the model of a unigram language model."""
  return {
    'type': 'Unigram',
    'unk_id': unknown_id,
    'vocab': [list(pair) for pair in zip(tokens, scores, strict=True)],
    'byte_fallback': has_bytes,
  }


def around(
  bos: str | None, eos: str | None, ids: Mapping[str, int]
) -> dict[str, Any] | None:
  """Returns the post_processor that puts BOS before and EOS after a text.

  Args:
    bos: None for none.
    eos: None for none.
    ids: ids of these tokens.
  """
  if bos is None and eos is None:
    return None
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  before, after = (
    [] if token is None else [{'SpecialToken': {'id': token, 'type_id': 0}}]
    for token in (bos, eos)
  )
  single = [*before, text, *after]
  return {
    'type': 'TemplateProcessing',
    'single': single,
    'pair': [*single, {'Sequence': {'id': 'B', 'type_id': 0}}],
    'special_tokens': {
      token: {'id': token, 'ids': [ids[token]], 'tokens': [token]}
      for token in (bos, eos)
      if token is not None
    },
  }


def _normalizers(rules: Rules) -> Iterator[dict[str, Any]]:
  if rules.charsmap:
    if rules.has_lines_joined:
      # `tokenizers` replaces both characters of a line end as one.
      yield {
        'type': 'Replace',
        'pattern': {'String': '\r\n'},
        'content': '\n\n',
      }
    yield {
      'type': 'Precompiled',
      'precompiled_charsmap': base64.b64encode(rules.charsmap).decode(),
    }
  if rules.is_stripped:
    # Only spaces count. The end loses the sign for a space as well, since the
    # library looks there after it has written the sign.
    yield _replace(rf'\A +|[ {SPACE}]+\z', '')
    yield _replace(' {2,}', ' ')
  if rules.prefix == EACH:
    yield {'type': 'Prepend', 'prepend': SPACE}
  yield {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}


def _replace(regex: str, content: str) -> dict[str, Any]:
  return {'type': 'Replace', 'pattern': {'Regex': regex}, 'content': content}


def _pre_tokenizers(
  rules: Rules, model: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
  if rules.prefix == FIRST:
    yield from _first_prefix()
  if rules.whole:
    longest = sorted(rules.whole, key=len, reverse=True)
    yield _isolated('|'.join(map(re.escape, longest)))
  is_found_whole = model['type'] == 'Unigram' or model['ignore_merges']
  if is_found_whole and model['byte_fallback']:
    # `tokenizers` would find the string of a byte token in a text.
    yield _isolated('(?<=<0x)(?=[0-9A-F]{2}>)')


def _first_prefix() -> list[dict[str, Any]]:
  # Metaspace adds no sign before a text that begins with one, but SentencePiece
  # does. So a space is added, which no text has any more, and becomes a sign in
  # the second step.
  return [_metaspace(' ', 'first'), _metaspace(SPACE, 'never')]


def is_first_prefixed(pre_tokenizer: Mapping[str, Any] | None) -> bool:
  """Returns whether a pre_tokenizer only puts a space before the first text."""
  return (pre_tokenizer or {}).get('pretokenizers') == _first_prefix()


def changes_pieces(pre_tokenizer: Mapping[str, Any] | None) -> bool:
  """Returns whether a pre_tokenizer adds or cuts anything.

  Gemma's cuts at spaces, of which its normalizer leaves none.
  """
  found = pre_tokenizer or {}
  steps = found.get('pretokenizers', [found] if found else [])
  at_spaces = {'String': ' '}
  return any(
    step.get('type') != 'Split' or step.get('pattern') != at_spaces
    for step in steps
  )


def _metaspace(sign: str, scheme: str) -> dict[str, Any]:
  return {
    'type': 'Metaspace',
    'replacement': sign,
    'prepend_scheme': scheme,
    'split': False,
  }


def _isolated(regex: str) -> dict[str, Any]:
  return {
    'type': 'Split',
    'pattern': {'Regex': regex},
    'behavior': 'Isolated',
    'invert': False,
  }


def _merges(
  tokens: Sequence[str], joined: Collection[str], scores: np.ndarray
) -> Iterator[tuple[str, str]]:
  """Yields the pairs that make a piece, of the highest score first."""
  # Pieces with equal scores keep the order of their ids.
  for i in np.argsort(-scores, kind='stable').tolist():
    piece = tokens[i]
    if piece in joined:
      for cut in range(1, len(piece)):
        pair = str(piece[:cut]), str(piece[cut:])
        if pair[0] in joined and pair[1] in joined:
          yield pair


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
