"""The files of a slow tokenizer, converted to the files of a fast one.

Older directories have a `tokenizer.model` of SentencePiece and no
`tokenizer.json`. Ids and text equal SentencePiece's own. The rest is
read as `transformers` reads it: `legacy` decides whether a space comes after
each special token or before the first text alone, add_bos_token and
add_eos_token decide which tokens are put around a text, and added tokens have
the ids after the pieces.

Two differences to SentencePiece remain, both of the library `tokenizers`, which
transformers uses as well. A table of characters (`precompiled_charsmap`) is
applied to a letter and its marks as one: marks after a character that they do
not belong to may be lost, and letters of Korean in parts stay in parts. In a
unigram model, a piece that the user has defined competes by its score alone (3
of 600 texts made of such pieces had other ids).

If `legacy` is absent, it is true, as in SentencePiece and in transformers 4;
LlamaTokenizer of version 5 takes false. If add_bos_token is absent, it is true.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from checks import expect
from text.sentencepiece import model_file, pipeline

FILE, CONFIG = 'tokenizer.model', 'tokenizer_config.json'
MOST_BYTES = model_file.MOST_BYTES
_BYTES = 256
_PROBE = ''.join(map(chr, range(1, 0x3100)))
# Fields that only the slow tokenizers of transformers read.
_SLOW = ('legacy', 'add_prefix_space', 'sp_model_kwargs', 'vocab_file')
_HARMLESS_KWARGS = ({}, None)


def convert(
  data: bytes,
  config: Mapping[str, Any],
  names: Mapping[str, str],
  added: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns tokenizer.json and tokenizer_config.json of a model file.

  Args:
    data: bytes of `tokenizer.model`.
    config: tokenizer_config.json as it is; empty if there is none.
    names: special tokens of the config, 'bos_token' -> '<s>'.
    added: added_tokens.json; empty if there is none.

  Raises:
    ValueError: a file is damaged, or has a setting that is not supported.
  """
  try:
    model = model_file.parse(data)
    _check_pieces(model)
  except ValueError as error:
    raise ValueError(f'{FILE}: {error}') from None
  if config.get('sp_model_kwargs') not in _HARMLESS_KWARGS:
    raise ValueError(
      f'{CONFIG}: got sp_model_kwargs ='
      f' {expect.shown(config["sp_model_kwargs"])}, expected none: sampled'
      ' pieces are not supported; remove it'
    )
  tokens, more = _with_added(model.tokens, config, names, added)
  names = model.names | dict(names)
  ids = {token: i for i, token in enumerate(tokens)}
  ids |= {token['content']: token['id'] for token in more}
  around = []
  for name, is_default in (('bos_token', True), ('eos_token', False)):
    token = names.get(name)
    is_added = _flag(config, f'add_{name}', is_default and token is not None)
    if is_added and token not in ids:
      raise ValueError(
        f'{CONFIG}: got add_{name} true and the {name} {expect.shown(token)},'
        f' expected one that {FILE} or an added token has; name it, or set'
        f' add_{name} to false'
      )
    around.append(token if is_added else None)
  known = {token['content'] for token in more}
  written = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': sorted(
      [*more, *_specials(model, tokens, known)], key=lambda token: token['id']
    ),
    'post_processor': pipeline.around(around[0], around[1], ids),
    **_parts(model, tokens, config),
  }
  changed = {k: v for k, v in config.items() if k not in _SLOW} | names
  if config.get('added_tokens_decoder') is not None:
    changed['added_tokens_decoder'] = {
      i: {**fields, 'normalized': False}
      for i, fields in config['added_tokens_decoder'].items()
    }
  return written, changed | {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'add_bos_token': around[0] is not None,
    'add_eos_token': around[1] is not None,
  }


def _check_pieces(model: model_file.Model) -> None:
  """Raises ValueError for pieces that a tokenizer.json cannot have."""
  seen: set[str] = set()
  for i, token in enumerate(model.tokens):
    if token in seen:
      raise ValueError(
        f'got piece {i} = {expect.shown(token)} twice, expected different'
        ' pieces; the file is damaged: copy it again'
      )
    seen.add(token)
  if (num := model.kinds.count(model_file.UNKNOWN)) != 1:
    raise ValueError(
      f'got {num} pieces for unknown characters, expected 1; the file is'
      ' damaged: copy it again'
    )
  if model_file.UNUSED in model.kinds:
    token = model.tokens[model.kinds.index(model_file.UNUSED)]
    raise ValueError(
      f'got the piece {expect.shown(token)} of kind UNUSED, expected none;'
      ' train the tokenizer without a list of allowed pieces'
    )
  if model.has_bytes and model.kinds.count(model_file.BYTE) != _BYTES:
    raise ValueError(
      f'got {model.kinds.count(model_file.BYTE)} byte pieces, expected'
      f' {_BYTES} with byte_fallback; the file is damaged: copy it again'
    )


def _with_added(
  pieces: Sequence[str],
  config: Mapping[str, Any],
  names: Mapping[str, str],
  added: Mapping[str, Any],
) -> tuple[list[str], list[dict[str, Any]]]:
  """Returns the pieces, some renamed, and the tokens after them.

  Raises:
    ValueError: an id is not the next one, or belongs to another token.
  """
  declared = config.get('added_tokens_decoder')
  where = f'{CONFIG}: added_tokens_decoder'
  if declared is None:  # written by transformers < 4.34
    where = 'added_tokens.json'
    special = set(names.values())
    declared = {
      i: {'content': token, 'special': token in special}
      for token, i in added.items()
    }
  tokens, more = list(pieces), []
  ids = {token: i for i, token in enumerate(tokens)}
  for token_id, fields in _by_id(declared, where):
    content = fields['content']
    # A piece may stand for a token that has got its name later.
    if token_id < len(tokens) and ids.get(content, token_id) == token_id:
      tokens[token_id] = content
    elif token_id == len(tokens) + len(more) and content not in ids:
      more.append(_added(token_id, content, fields))
    else:
      raise ValueError(
        f'{where}: got {expect.shown(content)} with id {token_id}, expected'
        f' {ids.get(content, len(tokens) + len(more))} by {FILE}; the files are'
        ' not of the same tokenizer'
      )
    ids[content] = token_id
  for content in dict.fromkeys(names.values()):
    if content not in ids:
      ids[content] = len(tokens) + len(more)
      more.append(_added(ids[content], content, {'special': True}))
  return tokens, more


def _by_id(declared: Any, where: str) -> list[tuple[int, dict[str, Any]]]:
  try:
    found = sorted((int(i), dict(fields)) for i, fields in declared.items())
  except (TypeError, ValueError, AttributeError):
    found = None
  if found is None or not all(
    i >= 0 and isinstance(fields.get('content'), str) and fields['content']
    for i, fields in found
  ):
    raise ValueError(
      f'{where}: got {expect.shown(declared)}, expected tokens by id; copy the'
      ' file again'
    )
  return found


def _added(
  token_id: int, content: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
  is_special = fields.get('special') is True
  return {
    'id': token_id,
    'content': content,
    'single_word': fields.get('single_word') is True,
    'lstrip': fields.get('lstrip') is True,
    'rstrip': fields.get('rstrip') is True,
    # A normalized one is not found after the space that a prefix puts there;
    # transformers matches these tokens in the raw text as well.
    'normalized': False,
    'special': is_special,
  }


def _specials(
  model: model_file.Model, tokens: Sequence[str], known: set[str]
) -> Iterator[dict[str, Any]]:
  """Yields the pieces that no text has: control tokens, and the unknown one."""
  for i, kind in enumerate(model.kinds):
    is_special = kind in (model_file.CONTROL, model_file.UNKNOWN)
    if is_special and tokens[i] not in known:
      yield _added(i, tokens[i], {'special': True})


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
  value = config.get(name)
  value = default if value is None else value
  if type(value) is not bool:
    raise ValueError(
      f'{CONFIG}: got {name} = {expect.shown(value)}, expected true or false'
    )
  return value


def _parts(
  model: model_file.Model, tokens: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the parts of tokenizer.json that find the pieces of a text."""
  of_kind = {
    kind: [
      token for token, k in zip(tokens, model.kinds, strict=True) if k == kind
    ]
    for kind in (model_file.NORMAL, model_file.USER_DEFINED)
  }
  whole = of_kind[model_file.USER_DEFINED]
  replace = _replacer(model.charsmap, whole)
  unknown_id = model.kinds.index(model_file.UNKNOWN)
  if model.model_type == model_file.UNIGRAM:
    found = pipeline.unigram(
      tokens, model.scores, unknown_id, has_bytes=model.has_bytes
    )
    whole = []  # its scores decide
  else:
    found = pipeline.bpe(
      tokens,
      set(of_kind[model_file.NORMAL]),
      np.array(model.scores, np.float32),
      unknown=tokens[unknown_id],
      has_bytes=model.has_bytes,
      is_whole_first=bool(whole),
    )
  rules = pipeline.Rules(
    prefix=_prefix(model, config),
    charsmap=model.charsmap,
    has_lines_joined=replace('\r') == replace('\n'),
    is_stripped=model.is_stripped,
    whole=whole,
  )
  return pipeline.parts(rules, found)


def _prefix(model: model_file.Model, config: Mapping[str, Any]) -> str:
  """Returns the rule for a space in front of a text."""
  if not _flag(config, 'add_prefix_space', model.is_prefixed):
    return pipeline.NO_PREFIX
  if _flag(config, 'legacy', True):
    return pipeline.EACH
  if model.is_stripped or model.charsmap:
    # A rule that removes the start of a text hides that it is the start.
    raise ValueError(
      f'{CONFIG}: got legacy = false for a {FILE} that replaces or removes'
      ' characters, expected true: the library puts no space before the first'
      ' text alone there; set it to true'
    )
  return pipeline.FIRST


def _replacer(charsmap: bytes, whole: Sequence[str]) -> Callable[[str], str]:
  """Returns the function that replaces characters of a text.

  Raises:
    ValueError: the table is damaged, or changes a piece that the user has
      defined, which SentencePiece would not.
  """
  if not charsmap:
    return str
  try:
    replace = tokenizers.normalizers.Precompiled(charsmap)
    changed = [
      token for token in whole if replace.normalize_str(token) != token
    ]
    replace.normalize_str(_PROBE)
  except BaseException as error:  # the library panics, which is no Exception
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
      raise
    raise ValueError(
      f'{FILE}: got a precompiled_charsmap of {len(charsmap)} bytes that the'
      ' library does not read, expected a table of characters; the file is'
      ' damaged: copy it again'
    ) from None
  if changed:
    piece, became = changed[0], replace.normalize_str(changed[0])
    raise ValueError(
      f'{FILE}: got the user-defined piece {expect.shown(piece)}, which the'
      f' precompiled_charsmap changes to {expect.shown(became)}, expected'
      ' pieces that it leaves alone; train the tokenizer without that piece'
    )
  return replace.normalize_str
