"""The tokenizer of a GGUF file, as the files of a Hugging Face tokenizer.

A GGUF file has the vocabulary, its merges or scores, the special tokens and the
chat template. Two kinds are read: byte-level BPE, which is named `gpt2`, and
SentencePiece's BPE, which is named `llama`.

Reference: github.com/ggml-org/ggml/blob/master/docs/gguf.md; `llama-vocab.cpp`
of llama.cpp.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import numpy as np

from checks import expect
from frozen.huggingface.gguf import pre_tokenizers, sampling
from text import hf_files
from text.sentencepiece import model_file, pipeline

BPE, SENTENCEPIECE = 'gpt2', 'llama'
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6  # kinds of tokens
# Names in tokenizer_config.json and in a GGUF file.
NAMES: Mapping[str, str] = {
  'bos_token': 'bos_token_id',
  'eos_token': 'eos_token_id',
  'unk_token': 'unknown_token_id',
  'pad_token': 'padding_token_id',
}
_END_IDS = ('eos_token_id', 'eot_token_id', 'eom_token_id')
# Control tokens that end a turn. A file may name the end of a document only.
_TURN_ENDS = (
  '<|im_end|>', '<|eot_id|>', '<|end|>', '<end_of_turn>', '<|eom_id|>',
)  # fmt: skip
# The converter's names for rows of the embedding without a token.
_PADDING = re.compile(r'\[PAD\d+\]')
_BYTE = re.compile('<0x[0-9A-Fa-f]{2}>')
_TEMPLATE = 'tokenizer.chat_template'


class _Fields:
  """The fields of a file about its tokenizer."""

  def __init__(self, fields: Mapping[str, Any]):
    self._fields = fields

  def get(self, name: str, default: Any = None) -> Any:
    """Returns tokenizer.ggml.NAME."""
    return self._fields.get(f'tokenizer.ggml.{name}', default)

  def flag(self, name: str, default: bool) -> bool:
    """Returns a field that is true or false."""
    value = self.get(name, default)
    if type(value) is not bool:
      raise ValueError(
        f'got tokenizer.ggml.{name} = {expect.shown(value)}, expected true or'
        ' false; the file is damaged'
      )
    return value

  def strings(self, name: str) -> list[str]:
    """Returns a field that is a list of strings."""
    value = self.get(name)
    if not isinstance(value, list) or not all(
      isinstance(x, str) for x in value
    ):
      raise ValueError(
        f'got tokenizer.ggml.{name} = {expect.shown(value)}, expected a list of'
        ' strings; name a Hugging Face directory with --tokenizer'
      )
    return value

  def numbers(self, name: str, count: int) -> np.ndarray:
    """Returns a field that is a list with a number per token."""
    value = self.get(name)
    if not isinstance(value, np.ndarray) or value.shape != (count,):
      got = 'none' if value is None else f'{np.size(value)} values'
      raise ValueError(
        f'got tokenizer.ggml.{name} with {got}, expected {count}: one of each'
        ' token; name a Hugging Face directory with --tokenizer'
      )
    return value


def is_byte(token: str) -> bool:
  """Returns whether a token stands for a single byte."""
  return _BYTE.fullmatch(token) is not None


def check(fields: Mapping[str, Any]) -> None:
  """Raises ValueError if the tokenizer is not one that this module reads.

  It is quick: the vocabulary is counted and not read.

  Args:
    fields: fields of the header.
  """
  read = _Fields(fields)
  kind = read.get('model')
  if kind is None:
    raise ValueError(
      '--tokenizer: got none, expected a directory with the tokenizer.json of'
      ' the model; the file has no tokenizer of its own'
    )
  if kind not in (BPE, SENTENCEPIECE):
    raise ValueError(
      f'got tokenizer.ggml.model = {expect.shown(kind)}, expected {BPE} or'
      f' {SENTENCEPIECE}; name a Hugging Face directory with --tokenizer'
    )
  tokens = read.strings('tokens')
  read.numbers('token_type', len(tokens))
  if kind == BPE:
    _rule(read)
    read.strings('merges')
    if read.flag('add_space_prefix', False):
      raise ValueError(
        'got tokenizer.ggml.add_space_prefix true, expected false for a'
        ' byte-level BPE; name a Hugging Face directory with --tokenizer'
      )
  else:
    scores = read.numbers('scores', len(tokens))
    if not np.isfinite(scores).all():
      raise ValueError(
        'got tokenizer.ggml.scores with values that are not finite, expected'
        ' finite ones; the file is damaged: copy it again'
      )
  for key in (*NAMES.values(), *_END_IDS):
    _named(tokens, read.get(key), key)


def write(
  fields: Mapping[str, Any],
  directory: pathlib.Path,
  recommended: Mapping[str, Any],
) -> None:
  """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

  Args:
    fields: fields of the header.
    directory: exists.
    recommended: fields of generation_config.json that win over the file's
      fields.

  Raises:
    ValueError: the tokenizer is not one that this module reads.
  """
  check(fields)
  read = _Fields(fields)
  tokens = read.strings('tokens')
  kinds = read.numbers('token_type', len(tokens))
  _check_vocabulary(tokens)
  names = {
    name: token
    for name, key in NAMES.items()
    if (token := _named(tokens, read.get(key), key)) is not None
  }
  is_bpe = read.get('model') == BPE
  parts = _bpe(read, tokens, kinds) if is_bpe else _pieces(read, tokens, kinds)
  adds_bos = _rule(read).adds_bos if is_bpe else True
  model = {
    'version': '1.0',
    'added_tokens': list(_added(tokens, kinds)),
    'post_processor': pipeline.around(
      names.get('bos_token') if read.flag('add_bos_token', adds_bos) else None,
      names.get('eos_token') if read.flag('add_eos_token', False) else None,
      {token: i for i, token in enumerate(tokens)},
    ),
    **parts,
  }
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    **names,
    **_templates(fields),
  }
  generation = {
    'eos_token_id': _ends(read, tokens, kinds),
    **sampling.read(fields),
    **recommended,
  }
  for name, value in (
    (hf_files.MODEL, model),
    (hf_files.CONFIG, config),
    (hf_files.GENERATION, generation),
  ):
    text = json.dumps(value, ensure_ascii=False)
    (directory / name).write_text(text, 'utf-8')


def _rule(read: _Fields) -> pre_tokenizers.Rule:
  return pre_tokenizers.rule(read.get('pre', 'default'))


def _bpe(
  read: _Fields, tokens: Sequence[str], kinds: np.ndarray
) -> dict[str, Any]:
  """Returns the parts of a tokenizer.json that a byte-level BPE has."""
  rule = _rule(read)
  return {
    'normalizer': None,
    'pre_tokenizer': pre_tokenizers.pre_tokenizer(rule),
    'decoder': pre_tokenizers.BYTE_LEVEL,
    'model': {
      'type': 'BPE',
      'ignore_merges': rule.ignores_merges,
      'vocab': {
        token: i
        for i, token in enumerate(tokens)
        if not (kinds[i] == UNUSED and _PADDING.fullmatch(token))
      },
      'merges': read.strings('merges'),
    },
  }


def _pieces(
  read: _Fields, tokens: list[str], kinds: np.ndarray
) -> dict[str, Any]:
  """Returns the parts of a tokenizer.json that a SentencePiece BPE has."""
  kinds_joined = (model_file.NORMAL, model_file.USER_DEFINED)
  is_joined = np.isin(kinds, kinds_joined)
  has_prefix = read.flag('add_space_prefix', True)
  model = pipeline.bpe(
    tokens,
    {tokens[i] for i in np.flatnonzero(is_joined).tolist()},
    read.numbers('scores', len(tokens)),
    unknown=_named(tokens, read.get('unknown_token_id'), 'unknown_token_id'),
  )
  prefix = pipeline.EACH if has_prefix else pipeline.NO_PREFIX
  return pipeline.parts(pipeline.Rules(prefix), model)


def _named(tokens: Sequence[str], token_id: Any, key: str) -> str | None:
  if token_id is None:
    return None
  if type(token_id) is not int or not 0 <= token_id < len(tokens):
    raise ValueError(
      f'got tokenizer.ggml.{key} = {expect.shown(token_id)}, expected an id'
      f' below {len(tokens)}, the number of tokens; the file is damaged'
    )
  return tokens[token_id]


def _check_vocabulary(tokens: Sequence[str]) -> None:
  if (num := len(set(tokens))) < len(tokens):
    raise ValueError(
      f'got {len(tokens) - num} tokens twice in tokenizer.ggml.tokens, expected'
      ' different ones; name a Hugging Face directory with --tokenizer'
    )


def _added(
  tokens: Sequence[str], kinds: np.ndarray
) -> Iterator[dict[str, Any]]:
  """Yields the tokens that are found in a text before it is split."""
  for i in np.flatnonzero(np.isin(kinds, (CONTROL, USER_DEFINED))).tolist():
    if tokens[i]:
      yield {
        'id': i,
        'content': tokens[i],
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': bool(kinds[i] == CONTROL),
      }


def _ends(read: _Fields, tokens: Sequence[str], kinds: np.ndarray) -> list[int]:
  """Returns the ids that end a text: the file's ids, and ends of turns."""
  ends = []
  for key in _END_IDS:
    if _named(tokens, read.get(key), key) is not None:
      ends.append(read.get(key))
  controls = {tokens[i]: i for i in np.flatnonzero(kinds == CONTROL).tolist()}
  turns = [controls[token] for token in _TURN_ENDS if token in controls]
  return list(dict.fromkeys([*ends, *turns]))


def _templates(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the chat templates, in the form of a tokenizer_config.json."""
  found = {
    name.removeprefix(_TEMPLATE).lstrip('.') or 'default': text
    for name, text in fields.items()
    if name == _TEMPLATE or name.startswith(f'{_TEMPLATE}.')
  }
  for name, text in found.items():
    if not isinstance(text, str):
      raise ValueError(
        f'got {expect.shown(text)} for the chat template {name}, expected text;'
        ' the file is damaged: copy it again'
      )
  if found.keys() <= {'default'}:
    return {'chat_template': found['default']} if found else {}
  named = [{'name': name, 'template': text} for name, text in found.items()]
  return {'chat_template': named}
