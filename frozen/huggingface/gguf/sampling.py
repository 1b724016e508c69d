"""The sampling that a GGUF file recommends: read, and written.

llama.cpp samples with these fields unless its user sets others. There, a
temperature of 0 is greedy. Its penalty looks at the last 64 tokens unless
`penalty_last_n` says otherwise; our penalty looks at the whole context, -1.

Reference: `general.sampling.*` in `Keys.General` of the package gguf, and
`common_init_sampler_from_model` in llama.cpp.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_PREFIX = 'general.sampling.'
_TEMPERATURE, _LAST = 'temp', 'penalty_last_n'
# Names in a GGUF file, with our names and the names in generation_config.json.
_NAMES = {
  _TEMPERATURE: 'temperature',
  'top_k': 'top_k',
  'top_p': 'top_p',
  'min_p': 'min_p',
  'penalty_repeat': 'repetition_penalty',
}
_WHOLE_CONTEXT = -1
# Settings for which llama.cpp has no field; stop_ids belong to the tokenizer.
_ELSEWHERE = ('stop_ids',)


def read(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sampling of a file as fields of generation_config.json."""
  found = {
    name.removeprefix(_PREFIX): float(f'{value:.6g}')  # float32 in the file
    if isinstance(value, float)
    else value
    for name, value in fields.items()
    if name.startswith(_PREFIX)
  }
  if not found:
    return {}
  if found.get(_LAST) == _WHOLE_CONTEXT or found.get('penalty_repeat', 1) == 1:
    found.pop(_LAST, None)  # it changes nothing
  is_greedy = found.get(_TEMPERATURE) == 0
  if is_greedy:
    for name in ('temp', 'top_k', 'top_p', 'min_p'):
      found.pop(name, None)
  named = {_NAMES.get(name, name): value for name, value in found.items()}
  return {'do_sample': not is_greedy, **named}


def write(generation: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns the fields of recommended settings, and notes on others.

  Args:
    generation: defaults of a frozen directory.
  """
  written: dict[str, Any] = {}
  for theirs, ours in _NAMES.items():
    if (value := generation.get(ours)) is not None:
      is_count = theirs == 'top_k'
      written[theirs] = np.int32(value) if is_count else float(value)
  if written.get('penalty_repeat', 1.0) != 1.0:
    written[_LAST] = np.int32(_WHOLE_CONTEXT)
  known = {*_NAMES.values(), *_ELSEWHERE}
  notes = [
    f'{name} {value!r} was not written: llama.cpp has no field for it'
    for name, value in generation.items()
    if name not in known and value
  ]
  return {f'{_PREFIX}{name}': x for name, x in written.items()}, notes
