"""The tokenizer of a GGUF file, as the files of a Hugging Face tokenizer.

A GGUF file has the vocabulary, the merges, the special tokens and the chat
template. For the rule that splits text before merges it only has a name. The
meaning of a name is in llama.cpp's code, so only the names below are read.

Reference: github.com/ggml-org/ggml/blob/master/docs/gguf.md; `llama-vocab.cpp`
of llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from checks import expect
from text import hf_files

_BYTES = {
  'type': 'ByteLevel',
  'add_prefix_space': False,
  'trim_offsets': True,
  'use_regex': True,  # GPT-2's expression
}
_DIGITS = {'type': 'Digits', 'individual_digits': True}
# llama.cpp splits text at each digit for all of the second line.
_SPLITS: dict[str, list[dict[str, Any]]] = {
  'gpt-2': [_BYTES],
  **dict.fromkeys(('smollm', 'starcoder', 'refact'), [_DIGITS, _BYTES]),
}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens
_NAMES = {
  'bos_token': 'bos_token_id',
  'eos_token': 'eos_token_id',
  'unk_token': 'unknown_token_id',
  'pad_token': 'padding_token_id',
}
_SAMPLING = {
  'temp': 'temperature',
  'penalty_repeat': 'repetition_penalty',
}


def is_whole(fields: Mapping[str, Any]) -> bool:
  """Returns whether a file has a byte-level BPE, which this module reads.

  Args:
    fields: of the file, from the `gguf` package.
  """
  names = ('model', 'tokens', 'token_type', 'merges')
  return (
    all(f'tokenizer.ggml.{name}' in fields for name in names)
    and fields['tokenizer.ggml.model'].contents() == 'gpt2'
  )


def write(
  fields: Mapping[str, Any],
  directory: pathlib.Path,
  recommended: Mapping[str, Any],
) -> None:
  """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

  Args:
    fields: of the file, from the `gguf` package.
    directory: exists.
    recommended: fields of generation_config.json that go before those of the
      file.

  Raises:
    ValueError: the tokenizer is not one that this module reads.
  """

  def read(name: str, default: Any = None) -> Any:
    field = fields.get(f'tokenizer.ggml.{name}')
    return default if field is None else field.contents()

  # Each array is read once: the package makes an object of each element.
  tokens, kinds = read('tokens'), read('token_type')
  if read('add_space_prefix', False):
    raise ValueError(
      'got tokenizer.ggml.add_space_prefix true, expected false for a'
      ' byte-level BPE; name a Hugging Face directory with --tokenizer'
    )
  names = {
    name: _named(tokens, read(key), key)
    for name, key in _NAMES.items()
    if read(key) is not None
  }
  model = {
    'version': '1.0',
    'added_tokens': list(_added(tokens, kinds)),
    'normalizer': None,
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': _split(read('pre', 'default')),
    },
    'post_processor': _around(
      names.get('bos_token') if read('add_bos_token') else None,
      names.get('eos_token') if read('add_eos_token') else None,
      tokens,
    ),
    'decoder': _BYTES,
    'model': {
      'type': 'BPE',
      'vocab': _vocabulary(tokens),
      'merges': read('merges'),
    },
  }
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    **names,
  }
  if template := fields.get('tokenizer.chat_template'):
    config['chat_template'] = template.contents()
  ends = [read('eos_token_id'), read('eot_token_id')]
  generation = {
    'eos_token_id': [i for i in ends if i is not None],
    **_sampling(fields),
    **recommended,
  }
  for name, value in (
    (hf_files.MODEL, model),
    (hf_files.CONFIG, config),
    (hf_files.GENERATION, generation),
  ):
    text = json.dumps(value, ensure_ascii=False)
    (directory / name).write_text(text, 'utf-8')


def _split(name: str) -> list[dict[str, Any]]:
  if name not in _SPLITS:
    raise ValueError(
      f'got tokenizer.ggml.pre = {expect.shown(name)}, expected one of'
      f' {", ".join(_SPLITS)}; name a Hugging Face directory with --tokenizer'
    )
  return _SPLITS[name]


def _named(tokens: Sequence[str], token_id: int, key: str) -> str:
  if not 0 <= token_id < len(tokens):
    raise ValueError(
      f'got tokenizer.ggml.{key} = {token_id}, expected an id below'
      f' {len(tokens)}, the number of tokens; the file is damaged'
    )
  return tokens[token_id]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
  vocabulary = {token: i for i, token in enumerate(tokens)}
  if len(vocabulary) < len(tokens):
    raise ValueError(
      f'got {len(tokens) - len(vocabulary)} tokens twice in'
      ' tokenizer.ggml.tokens, expected different ones; name a Hugging Face'
      ' directory with --tokenizer'
    )
  return vocabulary


def _added(tokens: Sequence[str], kinds: Sequence[int]):
  """Yields the tokens that are found in a text before it is split."""
  for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
    if kind in (_CONTROL, _USER_DEFINED):
      yield {
        'id': i,
        'content': token,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': kind == _CONTROL,
      }


def _around(
  bos: str | None, eos: str | None, tokens: Sequence[str]
) -> dict[str, Any] | None:
  """Returns the processor that puts BOS before and EOS after a text."""
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
      token: {'id': token, 'ids': [tokens.index(token)], 'tokens': [token]}
      for token in (bos, eos)
      if token is not None
    },
  }


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sampling that a file recommends, in words of transformers."""
  prefix = 'general.sampling.'
  found = {
    name.removeprefix(prefix): field.contents()
    for name, field in fields.items()
    if name.startswith(prefix)
  }
  if not found:
    return {}
  values = {
    _SAMPLING.get(name, name): float(f'{value:.6g}')
    if isinstance(value, float)
    else value
    for name, value in found.items()
  }
  return {'do_sample': True, **values}
