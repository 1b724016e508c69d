"""The files of a Hugging Face tokenizer: read, checked and joined.

A tokenizer is spread over several files. `tokenizer.json` has the tokenizer
itself. `tokenizer_config.json` names the special tokens, and may add tokens or
change how they match. Older directories have the names in
`special_tokens_map.json` and added tokens in `added_tokens.json`. If files
differ, the rules of `transformers` decide.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import tokenizers

from text.sentencepiece import conversion

MODEL = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
GENERATION = 'generation_config.json'
# The kind, in the config, of a tokenizer that `text/bpe.py` has trained.
TRAINED = 'bpe'
_NAMES = 'special_tokens_map.json'
_ADDED = 'added_tokens.json'
TEMPLATE = 'chat_template.jinja'
MORE_TEMPLATES = 'additional_chat_templates'

# Files of tokenizers that were not converted to `tokenizer.json`.
_UNCONVERTED = re.compile(
  r'.*\.model|vocab\.(json|txt)|tekken\.json|.*tiktoken'
)

Files = Mapping[str, bytes]


class Specification(NamedTuple):
  """A tokenizer, joined from its files."""

  model: dict[str, Any]  # tokenizer.json, with all added tokens
  kind: str  # 'bpe' if trained by this project, else 'huggingface'
  names: dict[str, str]  # 'bos_token' -> '<s>', as in chat templates
  specials: dict[str, int]  # ids of the special tokens, by string
  eos_ids: tuple[int, ...]  # from generation_config.json; may be empty
  is_cleaned: bool  # clean_up_tokenization_spaces


def read_saved(directory: str | os.PathLike) -> dict[str, bytes]:
  """Returns the files of a saved tokenizer, by name.

  Raises:
    FileNotFoundError: there is no `tokenizer.json`; tells how to make one.
  """
  directory = pathlib.Path(directory)
  if not (directory / MODEL).is_file():
    raise FileNotFoundError(_no_model(directory))
  return _read(directory)


def _read(directory: pathlib.Path) -> dict[str, bytes]:
  names = (MODEL, CONFIG, GENERATION, _NAMES, _ADDED, TEMPLATE)
  return {
    name: (directory / name).read_bytes()
    for name in names
    if (directory / name).is_file()
  }


def _converted(directory: pathlib.Path) -> dict[str, bytes]:
  """Returns the files of a slow tokenizer, converted to a fast tokenizer."""
  files = _read(directory)
  config = _json(files, CONFIG)
  named = config
  if 'added_tokens_decoder' not in config:
    named = config | _json(files, _NAMES)
  with open(directory / conversion.FILE, 'rb') as file:
    data = file.read(conversion.MOST_BYTES + 1)
  model, written = conversion.convert(
    data, config, dict(_named(named)), _json(files, _ADDED)
  )
  # The ids of added tokens are in tokenizer.json from here on.
  others = {k: v for k, v in files.items() if k != _ADDED}
  return others | {
    name: json.dumps(value, ensure_ascii=False).encode()
    for name, value in ((MODEL, model), (CONFIG, written))
  }


def read_source(directory: str | os.PathLike) -> dict[str, bytes]:
  """Returns the files of a Hugging Face directory, by name.

  A directory with SentencePiece's `tokenizer.model` alone gets the
  `tokenizer.json` of the same tokenizer. Several chat templates are moved into
  the config, because a saved tokenizer has no subdirectories.

  Raises:
    FileNotFoundError: there is neither; tells how to make one.
    ValueError: a file is damaged.
  """
  directory = pathlib.Path(directory)
  is_slow = not (directory / MODEL).is_file()
  if is_slow and (directory / conversion.FILE).is_file():
    files = _converted(directory)
  else:
    files = read_saved(directory)
  config = _json(files, CONFIG)
  more = pathlib.Path(directory) / MORE_TEMPLATES
  if more.is_dir():
    default = files.pop(TEMPLATE, None)
    named = {'default': default.decode()} if default is not None else {}
    for path in sorted(more.glob('*.jinja')):
      named[path.name.removesuffix('.jinja')] = path.read_bytes().decode()
    if named:
      config['chat_template'] = [
        {'name': name, 'template': named[name]} for name in named
      ]
  config['kind'] = 'huggingface'
  # `transformers` writes the directory that a tokenizer was loaded from. It has
  # no effect, and must not be published with the files.
  for name in [n for n in config if n.endswith(('_file', 'name_or_path'))]:
    if str(config[name]).startswith(('/', '~')):
      del config[name]
  text = json.dumps(config, indent=2, ensure_ascii=False)
  return files | {CONFIG: f'{text}\n'.encode()}


def chat_templates(files: Files) -> dict[str, str]:
  """Returns the chat templates by name; a single one is 'default'.

  Raises:
    ValueError: the config has a chat_template that is not a template.
  """
  if TEMPLATE in files:
    return {'default': files[TEMPLATE].decode()}
  found = _json(files, CONFIG).get('chat_template')
  if found is None:
    return {}
  if isinstance(found, str):
    return {'default': found}
  try:
    if not isinstance(found, dict):
      found = {entry['name']: entry['template'] for entry in found}
    if all(isinstance(text, str) for text in found.values()):
      return found
  except (TypeError, KeyError):
    pass
  raise ValueError(
    f'{CONFIG}: got the chat_template {found!r}, expected a string or a list'
    ' of names and templates'
  )


def specification(files: Files) -> Specification:
  """Returns the tokenizer that the files describe together.

  Raises:
    ValueError: a file is damaged, or the files contradict each other.
  """
  config = _json(files, CONFIG)
  model = _model(files)
  is_trained = config.get('kind') == TRAINED
  if is_trained:
    config = _trained_config(config, model)
  elif 'added_tokens_decoder' not in config:  # written by transformers < 4.34
    config |= _json(files, _NAMES)
  names = dict(_named(config))
  extra = config.get('extra_special_tokens')
  if not extra:
    extra = config.get('additional_special_tokens')
  extra = (
    [_content(token) for token in extra] if isinstance(extra, list) else []
  )
  special = {*names.values(), *extra}
  known = {token['content']: token for token in model['added_tokens']}
  wanted = _declared(config, special)
  if wanted is None:  # older files: tokenizer.json decides how tokens match
    wanted = [
      tokenizers.AddedToken(
        token, normalized=token not in special, special=token in special
      )
      for token in _by_id(_json(files, _ADDED))
      if token not in known
    ]
  there = known.keys() | {token.content for token in wanted}
  wanted += [
    tokenizers.AddedToken(content, special=True)
    for content in dict.fromkeys((*names.values(), *extra))
    if content not in there
  ]
  if any(_differs(token, known.get(token.content)) for token in wanted):
    loaded = load_model(model)
    loaded.add_tokens(wanted)
    model = json.loads(loaded.to_str())
  _check_ids(config, model)
  return Specification(
    model=model,
    kind=TRAINED if is_trained else 'huggingface',
    names=names,
    specials={
      token['content']: token['id']
      for token in model['added_tokens']
      if token['special'] or token['content'] in special
    },
    eos_ids=tuple(eos_ids(_json(files, GENERATION))),
    is_cleaned=config.get('clean_up_tokenization_spaces') is True,
  )


def eos_ids(config: Mapping[str, Any]) -> list[int]:
  """Returns the ids that end a text, in the order of the config.

  Raises:
    ValueError: eos_token_id is not an id or a list of ids.
  """
  value = config.get('eos_token_id')
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ValueError(
      f'{GENERATION}: got eos_token_id {value!r}, expected an id or a list of'
      ' ids'
    )
  return list(dict.fromkeys(ids))


def load_model(model: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """Returns the `tokenizers` object of a `tokenizer.json`.

  Raises:
    ValueError: the library cannot read it.
  """
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(model))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(
      f'{MODEL} is not a tokenizer ({error}); copy it again'
    ) from None


def _model(files: Files) -> dict[str, Any]:
  """Returns `tokenizer.json`, parsed.

  Raises:
    ValueError: it is damaged, or has BPE dropout.
  """
  model = _json(files, MODEL)
  inner = model.get('model')
  if not isinstance(inner, dict) or not inner.get('vocab'):
    raise ValueError(
      f'{MODEL} is not a tokenizer (it has no vocabulary); copy it again'
    )
  if inner.get('dropout'):
    raise ValueError(
      f'{MODEL}: got BPE dropout {inner["dropout"]}, expected null: the same'
      ' text would have different ids each time; set it to null'
    )
  return {'added_tokens': [], **model}


def _json(files: Files, name: str) -> dict[str, Any]:
  """Returns a file, parsed; an empty dict if there is no such file."""
  try:
    value = json.loads(files.get(name, b'{}'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{name} is not JSON ({error}); copy it again') from None
  if not isinstance(value, dict):
    raise ValueError(f'{name} holds {type(value).__name__}, expected an object')
  return value


def _trained_config(
  config: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the config of a trained tokenizer as `transformers` spells it.

  Raises:
    ValueError: a special token is not in the vocabulary.
  """
  special = config.get('special_tokens')
  special = special if isinstance(special, dict) else {}
  known = {token['content'] for token in model['added_tokens']}
  for name in ('bos', 'eos', 'pad'):
    if special.get(name) not in known:
      raise ValueError(
        f'{CONFIG}: got {special.get(name)!r} for the {name} token, expected a'
        f' special token of {MODEL}; name one under special_tokens'
      )
  return {f'{name}_token': token for name, token in special.items()}


def _content(token: Any) -> str:
  """Returns the string of a token, given alone or with its properties."""
  content = token.get('content') if isinstance(token, dict) else token
  if not isinstance(content, str) or not content:
    raise ValueError(
      f'{CONFIG}: got the special token {token!r}, expected a string or an'
      ' object with its content'
    )
  return content


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields name and string of each special token, model-specific ones too."""
  for source in (
    config,
    config.get('model_specific_special_tokens'),
    config.get('extra_special_tokens'),
  ):
    for name, token in source.items() if isinstance(source, dict) else ():
      # Skips add_bos_token, which is a bool, and tokens that are null.
      is_own = source is not config
      if isinstance(token, str | dict) and (is_own or name.endswith('_token')):
        yield name, _content(token)


def _by_id(added: Mapping[str, Any]) -> list[str]:
  """Returns the tokens of `added_tokens.json` in the order of their ids."""
  try:
    return sorted(added, key=lambda token: int(added[token]))
  except (TypeError, ValueError):
    raise ValueError(
      f'{_ADDED}: got {dict(added)!r}, expected an id for each token'
    ) from None


def _declared(
  config: Mapping[str, Any], special: set[str]
) -> list[tokenizers.AddedToken] | None:
  """Returns the tokens that the config adds or changes; None in older files."""
  declared = config.get('added_tokens_decoder')
  if declared is None:
    return None
  try:
    by_id = sorted((int(i), dict(fields)) for i, fields in declared.items())
    for _, fields in by_id:
      fields.pop('__type', None)
      fields['special'] = fields.get('special') or fields['content'] in special
    return [tokenizers.AddedToken(**fields) for _, fields in by_id]
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{CONFIG}: added_tokens_decoder is damaged ({error}); expected tokens'
      ' by id, with their content and how they match'
    ) from None


def _differs(
  token: tokenizers.AddedToken, known: Mapping[str, Any] | None
) -> bool:
  flags = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
  return known is None or any(
    getattr(token, flag) != known[flag] for flag in flags
  )


def _check_ids(config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
  """Raises ValueError if a token has another id than in the config."""
  found = {token['content']: token['id'] for token in model['added_tokens']}
  for token_id, fields in (config.get('added_tokens_decoder') or {}).items():
    content = fields['content']
    if found.get(content) != int(token_id):
      raise ValueError(
        f'{CONFIG}: got {content!r} with id {token_id}, expected'
        f' {found.get(content)}, its id by {MODEL}; the files are not of the'
        ' same tokenizer'
      )


def _no_model(directory: pathlib.Path) -> str:
  """Returns the error text for a directory without `tokenizer.json`."""
  names = sorted(path.name for path in directory.glob('*') if path.is_file())
  found = [name for name in names if _UNCONVERTED.fullmatch(name)]
  if not found:
    return (
      f'no {MODEL} in {os.fspath(directory)!r}; expected the files of a Hugging'
      ' Face tokenizer; copy them beside the weights'
    )
  return (
    f'no {MODEL} in {os.fspath(directory)!r}, only {", ".join(found)}; convert'
    ' it once, where transformers and sentencepiece are installed:'
    ' transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)'
  )
