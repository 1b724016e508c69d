"""Rotary fields of a config.json, in the old and the new format.

The old format has `rope_theta` and `rope_scaling`, which describes how
positions are stretched. The new format has both in `rope_parameters`, which may
be nested by kind of layer. Old files are read as `transformers` reads them. An
export writes the old format, which every version and other programs read.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from frozen.huggingface.families import fields as fields_lib
from models.attention import rope_scaling

FULL, SLIDING = 'full_attention', 'sliding_attention'
_ORIGINAL = 'original_max_position_embeddings'


def _default(given, original, trained):
  return rope_scaling.RopeScaling(), 1.0


def _linear(given, original, trained):
  factor = given.number('factor')
  return rope_scaling.RopeScaling(kind='linear', factor=factor), 1.0


def _dynamic(given, original, trained):
  factor = given.number('factor')
  # The base grows from max_position_embeddings on, as in transformers.
  return rope_scaling.RopeScaling(
    kind='dynamic', factor=factor, original_length=trained
  ), 1.0


def _llama3(given, original, trained):
  low = given.number('low_freq_factor')
  high = given.number('high_freq_factor')
  if high <= low:
    given.refuse('high_freq_factor', f'more than low_freq_factor = {low}')
  return rope_scaling.RopeScaling(
    kind='llama3',
    factor=given.number('factor'),
    original_length=original,
    low_frequency=low,
    high_frequency=high,
  ), 1.0


def magnitude(factor: float, weight: float = 1.0) -> float:
  """Returns the magnitude of YaRN (equation 22), with DeepSeek's weight."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(given, original, trained):
  factor = given.number_or_none('factor', None) or trained / original
  weight, score_weight = (
    given.number_or_none(name, None) if given.get(name, None) != 0 else 0.0
    for name in ('mscale', 'mscale_all_dim')
  )
  amplitude = given.number_or_none('attention_factor', None)
  if not amplitude:
    amplitude = magnitude(factor)
    if weight and score_weight:
      amplitude = magnitude(factor, weight) / magnitude(factor, score_weight)
  scaling = rope_scaling.RopeScaling(
    kind='yarn',
    factor=factor,
    original_length=original,
    beta_fast=given.number_or_none('beta_fast', None) or 32.0,
    beta_slow=given.number_or_none('beta_slow', None) or 1.0,
    is_truncated=given.flag('truncate', True),
    amplitude=amplitude,
  )
  return scaling, magnitude(factor, score_weight) if score_weight else 1.0


def _longrope(given, original, trained):
  factor = given.number_or_none('factor', None) or trained / original
  amplitude = given.number_or_none('attention_factor', None)
  if not amplitude:
    amplitude = 1.0
    if factor > 1 and original == 1:
      given.refuse(_ORIGINAL, 'at least 2 tokens')
    if factor > 1:
      amplitude = math.sqrt(1 + math.log(factor) / math.log(original))
  return rope_scaling.RopeScaling(
    kind='longrope',
    original_length=original,
    amplitude=amplitude,
    short_divisors=given.numbers('short_factor'),
    long_divisors=given.numbers('long_factor'),
  ), 1.0


_KINDS = {
  'default': _default,
  'linear': _linear,
  'dynamic': _dynamic,
  'llama3': _llama3,
  'yarn': _yarn,
  'longrope': _longrope,
}


class Rope(NamedTuple):
  """The rotary positions of a config.json."""

  base: float
  scaling: rope_scaling.RopeScaling
  width: int  # channels of a head that are rotated
  # The scale of attention is multiplied by its square (DeepSeek with YaRN).
  score_amplitude: float = 1.0


class Family(NamedTuple):
  """Names and defaults of the rotary fields of a family."""

  base: float = 10_000.0
  base_name: str = 'rope_theta'
  partial: float = 1.0
  partial_name: str = ''  # '': transformers rotates all channels, see `_width`
  original_length: int | None = None  # takes precedence over rope_scaling
  width_name: str = 'head_dim'
  kinds: Mapping[str, str] = {kind: kind for kind in _KINDS}  # by their names


PHI3 = Family(
  partial_name='partial_rotary_factor',
  original_length=4096,
  # Two names are old ones.
  kinds=dict.fromkeys(('longrope', 'su', 'yarn'), 'longrope')
  | {'default': 'default'},
)


def read(
  fields: fields_lib.Fields, head_width: int, family: Family = Family()
) -> Rope:
  """Returns the rotary positions of all layers."""
  scaling, parameters = _objects(fields)
  given = parameters if fields.has('rope_parameters') else scaling
  nested = [kind for kind in (FULL, SLIDING) if given.has(kind)]
  # transformers knows such objects by the kinds of layers in the config.
  if nested and fields.has('layer_types'):
    first, *others = [given.get(kind) for kind in nested]
    for kind, other in zip(nested[1:], others, strict=True):
      if other != first:
        given.refuse(kind, f'the same as {nested[0]}')
    given.finish_object(f'{FULL} and {SLIDING}')
    given = given.inside(nested[0])
  original = fields.size_or_none(_ORIGINAL, family.original_length)
  return _rope(fields, given, head_width, family, original)


def read_local_and_global(
  fields: fields_lib.Fields,
  head_width: int,
  local_base: float,
  global_base: float,
) -> tuple[float, Rope]:
  """Returns the base of local layers, and the Rope of global ones (Gemma 3)."""
  full, parameters = _objects(fields, FULL)
  if fields.has('rope_parameters'):
    full = parameters.inside(FULL)
  elif not full.has('rope_type'):
    full.expect('type', None, 'default')  # transformers ignores the old name
  local = parameters.inside(SLIDING)
  parameters.finish_object(f'{FULL} and {SLIDING}')
  local_base = _base(fields, local, Family(local_base, 'rope_local_base_freq'))
  for name in ('rope_type', 'type'):
    local.expect(name, 'default', None)
  local.finish_object('of sliding_attention, which is not stretched')
  # transformers reads this field outside of the objects, where it is not.
  full.expect('truncate', True, None)
  rope = _rope(fields, full, head_width, Family(global_base), 0)
  return local_base, rope


def _objects(
  fields: fields_lib.Fields, inner: str = ''
) -> tuple[fields_lib.Fields, fields_lib.Fields]:
  """Returns rope_scaling and rope_parameters, which must not disagree.

  Args:
    inner: the part of rope_parameters that rope_scaling is; '' for all of it.
  """
  scaling, parameters = (
    fields.inside(name) for name in ('rope_scaling', 'rope_parameters')
  )
  if fields.has('rope_scaling') and fields.has('rope_parameters'):
    other = (
      parameters.get(inner, None) if inner else fields.get('rope_parameters')
    )
    if other != fields.get('rope_scaling'):
      name = f'rope_parameters.{inner}' if inner else 'rope_parameters'
      fields.refuse('rope_scaling', f'the same as {name}, or only one')
  return scaling, parameters


def _base(fields, given, family) -> float:
  base = fields.number(family.base_name, family.base)
  if not given.has('rope_theta'):
    return base
  inner = given.number('rope_theta')
  if fields.has(family.base_name) and inner != base:
    fields.refuse(
      family.base_name, f'{inner}, as in {given.path}rope_theta, or only one'
    )
  return inner


def _width(fields, given, head_width, family) -> int:
  """Returns the channels of a head that are rotated."""
  inner = 'partial_rotary_factor'
  if family.partial_name and given.has(inner):
    owner, name = given, inner
    fields.get(family.partial_name, None)  # transformers reads the inner one
  elif family.partial_name:
    owner, name = fields, family.partial_name
  else:
    # The family rotates all channels, for any values of these fields.
    for owner in (fields, given):
      owner.expect(inner, None, 1, 1.0)
    owner, name = fields, ''
  share = owner.number(name, family.partial) if name else 1.0
  width = int(head_width * share)
  if not 2 <= width <= head_width or width % 2:
    named = fields.has(family.width_name)
    owner.refuse(
      name or (family.width_name if named else 'hidden_size'),
      f'an even number of rotated channels, not {width} of {head_width} (of'
      ' head_dim, or of hidden_size / num_attention_heads)',
    )
  return width


def _rope(
  fields: fields_lib.Fields,
  given: fields_lib.Fields,
  head_width: int,
  family: Family,
  original: int,
) -> Rope:
  """Returns the Rope of an object; an `original` length of 0 is not given."""
  base = _base(fields, given, family)
  width = _width(fields, given, head_width, family)
  given.get('type', None)  # the old name of rope_type
  name = 'rope_type' if given.has('rope_type') else 'type'
  asked = given.get(name, None)
  asked = 'default' if asked is None else asked
  kind = family.kinds.get(asked) if isinstance(asked, str) else None
  if kind is None:
    given.refuse(name, f'one of {", ".join(family.kinds)}')
  trained = fields.size('max_position_embeddings')
  if kind == 'yarn' and base <= 1:
    given.refuse('rope_theta', f'more than 1 with {name} yarn', base)
  inner = given.size_or_none(_ORIGINAL, None)
  scaling, score_amplitude = _KINDS[kind](
    given, original or inner or trained, trained
  )
  given.finish_object(f'of rope_type {kind}')
  for name, divisors in (
    ('short_factor', scaling.short_divisors),
    ('long_factor', scaling.long_divisors),
  ):
    if divisors and len(divisors) != width // 2:
      given.refuse(name, f'{width // 2} numbers, one per pair of channels')
  return Rope(base, scaling, width, score_amplitude)


def write(scaling: rope_scaling.RopeScaling) -> dict[str, Any] | None:
  """Returns the `rope_scaling` of a config.json; None without a stretch."""
  if scaling.kind == 'none':
    return None
  written: dict[str, Any] = {'rope_type': scaling.kind}
  original = {'original_max_position_embeddings': scaling.original_length}
  if scaling.kind in ('linear', 'dynamic', 'llama3', 'yarn'):
    written['factor'] = scaling.factor
  if scaling.kind == 'llama3':
    written |= original | {
      'low_freq_factor': scaling.low_frequency,
      'high_freq_factor': scaling.high_frequency,
    }
  if scaling.kind == 'yarn':
    written |= original | {
      'beta_fast': scaling.beta_fast,
      'beta_slow': scaling.beta_slow,
      'attention_factor': scaling.amplitude,
    }
    if not scaling.is_truncated:
      written['truncate'] = False
  if scaling.kind == 'longrope':
    written |= original | {
      'attention_factor': scaling.amplitude,
      'short_factor': list(scaling.short_divisors),
      'long_factor': list(scaling.long_divisors),
    }
  return written
