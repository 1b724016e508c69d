"""The fields of a GGUF file about its tokenizer: `tokenizer`, reversed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from checks import expect
from frozen.huggingface.gguf import (
  pre_tokenizers,
  tokenizer as tokenizer_lib,
)
from text import hf_files, hf_tokenizer
from text.sentencepiece import pipeline

_NORMAL = 1  # kind of a token
_MORE_ENDS = ('eot_token_id', 'eom_token_id')  # after eos_token_id


def fields(
  tokenizer: hf_tokenizer.HuggingFaceTokenizer,
  specification: hf_files.Specification,
  *,
  num_ids: int,
  stop_ids: list[int],
  chat_template: str,
) -> tuple[dict[str, Any], list[str]]:
  """Returns the fields of a tokenizer, and notes for the user.

  Args:
    tokenizer: tokenizer of the model.
    specification: specification of the same tokenizer.
    num_ids: rows of the embedding.
    stop_ids: ids that end a text.
    chat_template: '' for none.

  Raises:
    ValueError: llama.cpp has no such tokenizer.
  """
  model = specification.model
  inner = model['model']
  tokens, kinds = _tokens(specification, num_ids)
  if inner.get('type', 'BPE') != 'BPE' or 'merges' not in inner:
    raise ValueError(
      f'got a tokenizer of type {inner.get("type")}, expected a BPE'
    )
  parts = _pieces if inner.get('byte_fallback') else _bpe
  found = {
    **parts(model, len(tokens)),
    'tokens': tokens,
    'token_type': kinds,
    'add_bos_token': tokenizer.adds_bos,
    'add_eos_token': tokenizer.adds_eos,
  }
  for name, key in tokenizer_lib.NAMES.items():
    token = specification.names.get(name)
    if token in specification.specials:
      found[key] = specification.specials[token]
  found.setdefault('eos_token_id', tokenizer.eos_id)
  others = [i for i in stop_ids if i != found['eos_token_id']]
  found |= dict(zip(_MORE_ENDS, others, strict=False))
  notes = []
  if lost := others[len(_MORE_ENDS) :]:
    notes.append(
      f'stop ids {lost} are not in the file: it has places for'
      f' {1 + len(_MORE_ENDS)}'
    )
  if pipeline.is_first_prefixed(model.get('pre_tokenizer')):
    notes.append(
      'llama.cpp puts a space after each special token, not before the first'
      ' text alone as this tokenizer does'
    )
  if (model.get('normalizer') or {}).get('type') == 'NFC':
    notes.append(
      'llama.cpp does not normalise text: it has other tokens for letters whose'
      ' accents are characters of their own'
    )
  named = {f'tokenizer.ggml.{name}': value for name, value in found.items()}
  if chat_template:
    named['tokenizer.chat_template'] = chat_template
  return named, notes


def _bpe(model: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
  inner = model['model']
  name = pre_tokenizers.name_of(
    model.get('pre_tokenizer'), bool(inner.get('ignore_merges'))
  )
  if name is None:
    raise ValueError(
      f'got the pre_tokenizer {expect.shown(model.get("pre_tokenizer"))},'
      ' expected one that llama.cpp has a name for'
    )
  normalizer = model.get('normalizer')
  if normalizer is not None and normalizer.get('type') != 'NFC':
    raise ValueError(
      f'got the normalizer {expect.shown(normalizer)}, expected none or NFC'
    )
  merges = [m if isinstance(m, str) else ' '.join(m) for m in inner['merges']]
  return {'model': tokenizer_lib.BPE, 'pre': name, 'merges': merges}


def _pieces(model: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
  normalizer = model.get('normalizer') or {}
  steps = normalizer.get('normalizers', [normalizer])
  kinds = [step.get('type') for step in steps]
  if kinds not in (['Replace'], ['Prepend', 'Replace']):
    raise ValueError(
      f'got the normalizer {expect.shown(normalizer)}, expected one that writes'
      f' spaces as {pipeline.SPACE}, and may put one in front'
    )
  before = model.get('pre_tokenizer')
  if pipeline.changes_pieces(before) and not pipeline.is_first_prefixed(before):
    raise ValueError(
      f'got the pre_tokenizer {expect.shown(before)}, expected none, as'
      ' llama.cpp joins pieces across the whole text'
    )
  return {
    'model': tokenizer_lib.SENTENCEPIECE,
    'pre': 'default',
    'scores': pipeline.scores_of(model['model'], num_tokens),
    'add_space_prefix': kinds[0] == 'Prepend'
    or pipeline.is_first_prefixed(before),
  }


def _tokens(
  specification: hf_files.Specification, num_ids: int
) -> tuple[list[str], np.ndarray]:
  """Returns the strings of all ids, and their kinds."""
  inner = specification.model['model']
  # An id without a token has the name that llama.cpp's converter gives it.
  tokens = [f'[PAD{i}]' for i in range(num_ids)]
  kinds = np.full(num_ids, tokenizer_lib.UNUSED, np.int32)
  for token, i in inner['vocab'].items():
    tokens[i], kinds[i] = token, _NORMAL
    is_byte = inner.get('byte_fallback') and tokenizer_lib.is_byte(token)
    if is_byte:
      kinds[i] = tokenizer_lib.BYTE
  for token in specification.model['added_tokens']:
    is_special = token['content'] in specification.specials
    kind = tokenizer_lib.CONTROL if is_special else tokenizer_lib.USER_DEFINED
    tokens[token['id']], kinds[token['id']] = token['content'], kind
  return tokens, kinds
