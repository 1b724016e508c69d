"""Rotary fields of a config.json, in the old and the new format.

The old format has `rope_theta` and `rope_scaling`, which describes how
positions are stretched. The new format has both in `rope_parameters`, which may
be nested by kind of layer. Old files are read as `transformers` reads them. An
export writes the old format, which every version and other programs read.
"""

import math
from typing import Any, NamedTuple

from frozen.huggingface.families import fields as fields_lib
from models.attention import rope_scaling

FULL, SLIDING = 'full_attention', 'sliding_attention'


class Rope(NamedTuple):
  """The rotary positions of a config.json."""

  base: float
  scaling: rope_scaling.RopeScaling
  partial: float  # share of the channels that are rotated
  # The scale of attention is multiplied by its square (DeepSeek with YaRN).
  score_amplitude: float = 1.0


class Family(NamedTuple):
  """Names and defaults of the rotary fields of a family."""

  base: float = 10_000.0
  base_name: str = 'rope_theta'
  partial: float = 1.0
  partial_name: str = ''  # '': transformers rotates all channels, see `_share`
  original_length: int | None = None  # takes precedence over rope_scaling


def read(fields: fields_lib.Fields, family: Family = Family()) -> Rope:
  """Returns the rotary positions of all layers."""
  name, given = _given(fields)
  nested = [key for key in given if key in (FULL, SLIDING)]
  if nested:
    parts = [given[key] for key in nested]
    if any(part != parts[0] for part in parts):
      fields.refuse(name, 'the same for all kinds of layers')
    given = dict(parts[0])
  return _rope(fields, name, given, family)


def read_local_and_global(
  fields: fields_lib.Fields, local_base: float, global_base: float
) -> tuple[float, Rope]:
  """Returns the base of local layers, and the Rope of global ones (Gemma 3)."""
  name, given = _given(fields)
  is_nested = any(key in (FULL, SLIDING) for key in given)
  full = dict(given.get(FULL) or {}) if is_nested else given
  local = dict(given.get(SLIDING) or {}) if is_nested else {}
  local_base = fields.number('rope_local_base_freq', local_base)
  local_base = local.pop('rope_theta', local_base)
  if local.pop('rope_type', local.pop('type', 'default')) != 'default' or local:
    fields.refuse(name, 'sliding_attention that is not stretched')
  return local_base, _rope(fields, name, full, Family(global_base))


def _given(fields: fields_lib.Fields) -> tuple[str, dict[str, Any]]:
  """Returns the name of the field that has the values, and the values."""
  scaling = fields.get('rope_scaling', None)
  parameters = fields.get('rope_parameters', None)
  if scaling and parameters and scaling != parameters:
    fields.refuse('rope_scaling', 'the same as rope_parameters, or only one')
  name = 'rope_parameters' if parameters else 'rope_scaling'
  given = parameters or scaling or {}
  if not isinstance(given, dict):
    fields.refuse(name, 'an object')
  return name, dict(given)


def _base(fields, name, given, family) -> float:
  base = fields.number(family.base_name, family.base)
  inner = given.pop('rope_theta', None)
  if inner and fields.has(family.base_name) and inner != base:
    fields.refuse(family.base_name, f'{inner}, as in {name}, or only one')
  return float(inner or base)


def _share(fields, name, given, family) -> float:
  """Returns the share of the channels that are rotated."""
  inner = given.pop('partial_rotary_factor', None)
  if family.partial_name:
    return float(inner or fields.number(family.partial_name, family.partial))
  # The family rotates all channels whatever these fields say.
  fields.expect('partial_rotary_factor', None, 1, 1.0)
  if inner not in (None, 1):
    fields.refuse(name, f'partial_rotary_factor 1, not {inner!r}')
  return 1.0


def _rope(fields, name, given, family) -> Rope:
  base = _base(fields, name, given, family)
  share = _share(fields, name, given, family)
  kind = given.pop('type', 'default')
  kind = given.pop('rope_type', kind)
  outer = fields.get('original_max_position_embeddings', family.original_length)
  trained = fields.count('max_position_embeddings')
  inner = given.pop('original_max_position_embeddings', None)
  original = outer or inner or trained
  if kind == 'su' or (kind == 'yarn' and 'short_factor' in given):
    kind = 'longrope'  # old names in Phi-3
  read_kind = _KINDS.get(kind)
  if read_kind is None:
    fields.refuse(name, f'a type of {", ".join(_KINDS)}, not {kind!r}')
    raise AssertionError
  try:
    scaling, score_amplitude = read_kind(given, original, trained)
  except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
    fields.refuse(name, f'all numbers of type {kind} ({error!r})')
    raise AssertionError from error
  if given := {k: v for k, v in given.items() if v is not None}:
    fields.refuse(name, f'no {", ".join(sorted(given))} of {kind}')
  return Rope(base, scaling, share, score_amplitude)


def _default(given, original, trained):
  return rope_scaling.RopeScaling(), 1.0


def _linear(given, original, trained):
  factor = float(given.pop('factor'))
  return rope_scaling.RopeScaling(kind='linear', factor=factor), 1.0


def _dynamic(given, original, trained):
  factor = float(given.pop('factor'))
  # The base grows from max_position_embeddings on, as in transformers.
  return rope_scaling.RopeScaling(
    kind='dynamic', factor=factor, original_length=trained
  ), 1.0


def _llama3(given, original, trained):
  return rope_scaling.RopeScaling(
    kind='llama3',
    factor=float(given.pop('factor')),
    original_length=original,
    low_frequency=float(given.pop('low_freq_factor')),
    high_frequency=float(given.pop('high_freq_factor')),
  ), 1.0


def magnitude(factor: float, weight: float = 1.0) -> float:
  """Returns the magnitude of YaRN (equation 22), with DeepSeek's weight."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(given, original, trained):
  factor = float(given.pop('factor', None) or trained / original)
  weight = given.pop('mscale', None)
  score_weight = given.pop('mscale_all_dim', None)
  amplitude = given.pop('attention_factor', None)
  if amplitude is None:
    amplitude = magnitude(factor)
    if weight and score_weight:
      amplitude = magnitude(factor, weight) / magnitude(factor, score_weight)
  scaling = rope_scaling.RopeScaling(
    kind='yarn',
    factor=factor,
    original_length=original,
    beta_fast=float(given.pop('beta_fast', None) or 32),
    beta_slow=float(given.pop('beta_slow', None) or 1),
    is_truncated=bool(given.pop('truncate', True)),
    amplitude=float(amplitude),
  )
  return scaling, magnitude(factor, score_weight) if score_weight else 1.0


def _longrope(given, original, trained):
  factor = given.pop('factor', None) or trained / original
  amplitude = given.pop('attention_factor', None)
  if amplitude is None:
    amplitude = 1.0
    if factor > 1:
      amplitude = math.sqrt(1 + math.log(factor) / math.log(original))
  return rope_scaling.RopeScaling(
    kind='longrope',
    original_length=original,
    amplitude=float(amplitude),
    short_divisors=tuple(map(float, given.pop('short_factor'))),
    long_divisors=tuple(map(float, given.pop('long_factor'))),
  ), 1.0


_KINDS = {
  'default': _default,
  'linear': _linear,
  'dynamic': _dynamic,
  'llama3': _llama3,
  'yarn': _yarn,
  'longrope': _longrope,
}


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
