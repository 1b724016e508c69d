"""Kinds of layers in a config.json: local, global, and without positions.

A config.json has one of four forms: a list `layer_types`; a period, in which
one layer is global; the number of first layers that are global
(`max_window_layers`); or a list of the layers that are rotated.
`ModelConfig.layer_pattern` is the shortest pattern that repeats to all layers.
"""

from typing import Any

from frozen.huggingface.families import fields as fields_lib
from models import model_config

_NEEDS_WINDOW = (
  'no sliding_attention without use_sliding_window and sliding_window'
)
_LETTERS = {'full_attention': 'g', 'sliding_attention': 'l'}


def pattern(letters: str) -> str:
  """Returns the shortest pattern that repeats to these layers.

  It is '' if all layers are global or all are local: `ModelConfig.window` alone
  then tells the kind.
  """
  if set(letters) in ({'g'}, {'l'}):
    return ''
  sizes = range(1, len(letters) + 1)
  return next(
    letters[:size]
    for size in sizes
    if (letters[:size] * len(letters))[: len(letters)] == letters
  )


def letters_of(config: model_config.ModelConfig) -> str:
  """Returns the letter in `LAYER_KINDS` of every layer, as one string."""
  given = config.layer_pattern or ('l' if config.window else 'g')
  return ''.join(given[n % len(given)] for n in range(config.num_layers))


def _fields(letters: str, window: int) -> dict[str, Any]:
  has_local = bool(set(letters) & set('lm'))
  return {
    'layer_pattern': pattern(letters),
    'window': window if has_local else 0,
  }


def _from_types(fields: fields_lib.Fields, num_layers: int) -> str | None:
  """Returns a letter per layer; None if the config has no list."""
  types = fields.get('layer_types', None)
  if types is None:
    return None
  if (
    not isinstance(types, list)
    or len(types) != num_layers
    or not all(isinstance(x, str) and x in _LETTERS for x in types)
  ):
    fields.refuse(
      'layer_types',
      f'{" or ".join(sorted(_LETTERS))} for each of num_hidden_layers ='
      f' {num_layers}',
    )
  return ''.join(_LETTERS[kind] for kind in types)


def read_alternating(
  fields: fields_lib.Fields, num_layers: int, *, every: int
) -> dict[str, Any]:
  """Returns local layers, with each `every`-th one global (Gemma)."""
  window = fields.size_or_none('sliding_window', 4096)
  letters = _from_types(fields, num_layers) or ''.join(
    'g' if (n + 1) % every == 0 else 'l' for n in range(num_layers)
  )
  if 'l' in letters and not window:
    fields.refuse('sliding_window', 'the window of the local layers')
  return _fields(letters, window)


def read_qwen(fields: fields_lib.Fields, num_layers: int) -> dict[str, Any]:
  """Returns global layers; layers from max_window_layers on may be local."""
  is_used = fields.flag('use_sliding_window', False)
  window = fields.size_or_none('sliding_window', 4096) if is_used else 0
  first = fields.count('max_window_layers', 28)
  fields.get('sliding_window', None)
  letters = _from_types(fields, num_layers) or ''.join(
    'l' if window and n >= first else 'g' for n in range(num_layers)
  )
  if 'l' in letters and not window:
    fields.refuse('layer_types', _NEEDS_WINDOW)
  return _fields(letters, window)


def read_smollm3(fields: fields_lib.Fields, num_layers: int) -> dict[str, Any]:
  """Returns layers of which some have no positions, and some may be local."""
  every = fields.size('no_rope_layer_interval', 4)
  has_rope = fields.get('no_rope_layers', None)
  if has_rope is None:
    has_rope = [int((n + 1) % every != 0) for n in range(num_layers)]
  if (
    not isinstance(has_rope, list)
    or len(has_rope) < num_layers
    or not all(type(x) is int and x in (0, 1) for x in has_rope)
  ):
    fields.refuse(
      'no_rope_layers', f'0 or 1 for each of num_hidden_layers = {num_layers}'
    )
  is_used = fields.flag('use_sliding_window', False)
  window = fields.size_or_none('sliding_window', None) if is_used else 0
  # Published files have the second, which transformers ignores here.
  for name in ('sliding_window', 'max_window_layers'):
    fields.get(name, None)
  types = _from_types(fields, num_layers) or ''.join(
    'l' if window and not has_rope[n] else 'g' for n in range(num_layers)
  )
  if 'l' in types and not window:
    # In transformers, this depends on the implementation of attention.
    fields.refuse('layer_types', _NEEDS_WINDOW)
  kinds = {('g', 1): 'g', ('g', 0): 'n', ('l', 1): 'l', ('l', 0): 'm'}
  letters = ''.join(kinds[kind, has_rope[n]] for n, kind in enumerate(types))
  return _fields(letters, window)


def write_types(config: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the fields `layer_types` and `sliding_window`."""
  names = {'g': 'full_attention', 'n': 'full_attention'}
  return {
    'sliding_window': config.window or None,
    'layer_types': [
      names.get(letter, 'sliding_attention') for letter in letters_of(config)
    ],
  }


def write_qwen(config: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_qwen` reads."""
  letters = letters_of(config)
  return write_types(config) | {
    'use_sliding_window': bool(config.window),
    'max_window_layers': letters.find('l') if 'l' in letters else len(letters),
  }


def write_smollm3(config: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the fields that `read_smollm3` reads."""
  return write_types(config) | {
    'use_sliding_window': bool(config.window),
    'no_rope_layers': [int(x in 'gl') for x in letters_of(config)],
  }
