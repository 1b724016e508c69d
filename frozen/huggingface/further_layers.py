"""Layers after a model that predict further tokens, as in DeepSeek-V3.

Their number is `num_nextn_predict_layers`. Layer N + k takes the hidden states
of the layer before and the embedding of the next token, joins both with
`eh_proj`, and predicts the token after. The main model does not use them: its
logits are the same without them. Only speculative decoding would use them, and
here it drafts with another model. So an import leaves them out: otherwise
nothing would compute with these weights, and no test would cover them. They are
counted, and the notes of the import, the manifest and every export name them.

Reference: DeepSeek-AI, DeepSeek-V3 (2024), section 2.2,
arxiv.org/abs/2412.19437.
"""

from collections.abc import Mapping
import math
import re
from typing import Any, NamedTuple

from checks import expect
from frozen.huggingface.families import fields as fields_lib

FIELD = 'num_nextn_predict_layers'
ORIGIN = 'left_out'  # the field of a manifest's origin
_FAMILIES = ('deepseek_v3',)
_LAYER = re.compile(r'(?:model\.)?layers\.(\d{1,9})\.(.+)')
_JOINS = 'eh_proj.weight'  # a tensor that only such a layer has


class Split(NamedTuple):
  """The tensors of the main model, and a note about the others."""

  tensors: dict[str, Any]
  left_out: str  # '' if there were none


def split(
  model_type: str,
  values: Mapping[str, Any],
  num_layers: int,
  tensors: Mapping[str, Any],
  where: str,
) -> Split:
  """Returns the tensors without the tensors of further layers.

  Args:
    values: fields of config.json.
    num_layers: number of layers of the main model.
    where: the directory, for errors.

  Raises:
    ValueError: a layer after the last one does not predict further tokens, or
      `num_nextn_predict_layers` is no valid number.
  """
  if model_type not in _FAMILIES:
    return Split(dict(tensors), '')
  number = values.get(FIELD) or 0
  if type(number) is not int or not 0 <= number <= fields_lib.MOST_LAYERS:
    raise ValueError(
      f'{where}: got {FIELD} = {expect.shown(values[FIELD])}, expected an'
      f' integer from 0 to {fields_lib.MOST_LAYERS}'
    )
  further: dict[int, dict[str, str]] = {}
  for name in tensors:
    found = _LAYER.fullmatch(name)
    if found and num_layers <= int(found[1]) < num_layers + number:
      further.setdefault(int(found[1]), {})[found[2]] = name
  for n, names in sorted(further.items()):
    if _JOINS not in names:
      raise ValueError(
        f'{where}: got layer {n} without {_JOINS}, expected it in a layer'
        f' behind num_hidden_layers = {num_layers}, as {FIELD} = {number} says;'
        ' the config is wrong, or files are missing'
      )
  if not further:
    return Split(dict(tensors), '')
  dropped = {name for names in further.values() for name in names.values()}
  size = sum(math.prod(tensors[name].shape) for name in dropped)
  return Split(
    {name: x for name, x in tensors.items() if name not in dropped},
    f'{len(further)} layer{"s" if len(further) > 1 else ""} that'
    f' predict{"" if len(further) > 1 else "s"} further tokens:'
    f' {len(dropped)} tensors, {size:,} params',
  )
