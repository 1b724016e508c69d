"""The quantization_config of compressed-tensors: groups, targets, ignore list.

A target, and an entry of the ignore list, is the name of a module, a pattern
after `re:` which matches a name from its start, or a class of torch: Linear or
Embedding. A module has the scheme of the first target that names it: exact
names come first, then patterns, then classes.

Reference: the package compressed-tensors, its modules quantization and
utils.match.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import re
from typing import Any

from checks import expect
from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  fp8,
  opening,
  parts as parts_lib,
  schemes,
)

_CLASSES = ('Linear', 'Embedding')
_MOST_PATTERN = 400  # characters
_WITHOUT_EFFECT = frozenset(
  {
    'quant_method', 'version', 'global_compression_ratio', 'run_compressed',
    'dequantize', 'use_optimized_inference',
  }
)  # fmt: skip
_OF_ACTIVATIONS = (
  'num_bits', 'type', 'symmetric', 'group_size', 'strategy', 'block_structure',
  'dynamic', 'actorder', 'scale_dtype', 'zp_dtype', 'observer',
  'observer_kwargs',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
  """A quantization_config of `quant_method` compressed-tensors."""

  schemes: Mapping[str, schemes.Scheme]  # by target, in order of preference
  ignored: tuple[str, ...]
  activations: tuple[str, ...]  # quantised elsewhere; for messages
  path: str  # path of the fields, for errors

  parts = frozenset(
    {
      'weight_packed', 'weight_shape', 'weight_scale', 'weight_zero_point',
      'weight_g_idx', 'weight_global_scale',
    }
  )  # fmt: skip
  unused = frozenset({'input_scale', 'input_zero_point', 'input_global_scale'})

  @property
  def title(self) -> str:
    """The method and its schemes, for messages."""
    titles = {scheme.title: None for scheme in self.schemes.values()}
    return f'compressed-tensors, {" and ".join(titles)}'

  @property
  def formats(self) -> tuple[str, ...]:
    """The formats of all schemes."""
    return tuple(sorted({scheme.format for scheme in self.schemes.values()}))

  @property
  def notes(self) -> list[str]:
    """Notes that activations are floats here."""
    return [fp8.weight_only(text) for text in self.activations]

  def check_names(self, classes: Mapping[str, str]) -> list[str]:
    """Checks targets and ignore list.

    Raises:
      ValueError: a name that is no pattern names no module.
    """
    notes = []
    for field, names in (('targets', self.schemes), ('ignore', self.ignored)):
      for name in names:
        if any(_names(name, *module) for module in classes.items()):
          continue
        is_pattern = name.startswith('re:')
        if not is_pattern and name not in (*opening.HEADS, *_CLASSES):
          raise opening.names_nothing(f'{self.path}{field}', name)
        if is_pattern:
          notes.append(f'{field}: {expect.shown(name)} names no module')
    return notes

  def open(self, parts: parts_lib.Parts, kind: str) -> parts_lib.Tensor | None:
    """Returns a matrix; checks only the headers of its tensors."""
    module = parts.module
    weight = parts.tensors.get('weight')
    found = parts.tensors.keys() & self.parts
    if weight is not None and weight.dtype not in parts_lib.FLOATS:
      found |= {'weight'}
    scheme = next(
      (x for name, x in self.schemes.items() if _names(name, module, kind)),
      None,
    )
    if any(_names(name, module, kind) for name in self.ignored):
      scheme = None
    if found and scheme is None:
      parts.refuse(
        min(found), 'quantised', 'floats by the targets and the ignore list'
      )
    if scheme is None:
      return None
    if not found and opening.is_router(module):
      return None  # no Linear layer in newer versions of transformers
    return scheme.open(parts)


def _names(name: str, module: str, kind: str) -> bool:
  """Returns whether an entry of a list names a module."""
  if name.startswith('re:'):
    return re.match(name.removeprefix('re:'), module) is not None
  return name in (module, kind) and name != ''


def read(fields: fields_lib.Fields, where: str) -> CompressedTensors:
  """Returns the method of a quantization_config.

  Args:
    fields: fields of the config.
    where: path of the file, for errors.

  Raises:
    ValueError: a field has a value that is not supported.
  """
  fields.expect('quantization_status', None, 'compressed', 'frozen')
  fields.expect('kv_cache_scheme', None)
  fields.expect('moe_sparsity_config', None)
  sparsity = fields.get('sparsity_config', None)
  if sparsity and not (
    isinstance(sparsity, dict) and sparsity.get('format') == 'dense'
  ):
    fields.refuse('sparsity_config', 'none: sparse weights are not read')
  transforms = fields.get('transform_config', None)
  if transforms and transforms != {'config_groups': {}}:
    fields.refuse('transform_config', 'none: rotations are not computed')
  form = fields.get('format', None)
  if form is not None:
    fields.expect('format', *schemes.FORMATS, 'mixed-precision')
  groups = fields.get('config_groups')
  if not isinstance(groups, dict) or not groups:
    fields.refuse('config_groups', 'an object of groups')
  found, activations = {}, {}
  for name, group in groups.items():
    path = f'{fields.path}config_groups.{name}.'
    if not isinstance(group, dict):
      raise ValueError(
        f'{where}: got {path[:-1]} = {expect.shown(group)}, expected an object'
        ' with targets and weights'
      )
    inside = fields_lib.Fields(group, where, path)
    targets = _list(inside, 'targets')
    scheme = _scheme(inside, form)
    activations |= dict.fromkeys(_activations(inside))
    inside.finish_object('of a group')
    # A target of two groups has the scheme of the last one.
    found |= dict.fromkeys(targets, scheme)
  ignored = _list(fields, 'ignore')
  fields.finish_object('of compressed-tensors', _WITHOUT_EFFECT)
  return CompressedTensors(
    schemes={name: found[name] for name in _by_preference(found)},
    ignored=tuple(ignored),
    activations=tuple(activations),
    path=f'{where}: {fields.path}',
  )


def _by_preference(targets: Iterable[str]) -> list[str]:
  """Returns targets: names, then patterns, then classes."""
  return sorted(targets, key=lambda x: (x in _CLASSES, 're:' in x, x))


def _list(fields: fields_lib.Fields, name: str) -> list[str]:
  values = fields.get(name, None) or []
  if not isinstance(values, list) or not all(
    isinstance(value, str) and value for value in values
  ):
    fields.refuse(name, 'a list of names')
  for value in values:
    if value.startswith('re:'):
      try:
        assert len(value) <= _MOST_PATTERN
        re.compile(value.removeprefix('re:'))
      except (re.error, AssertionError, RecursionError, OverflowError):
        fields.refuse(name, f'patterns of at most {_MOST_PATTERN} characters')
  return values


def _scheme(group: fields_lib.Fields, form: Any) -> schemes.Scheme:
  """Returns the scheme of the weights of a group."""
  if group.has('format'):
    group.expect('format', *schemes.FORMATS)
    form = group.get('format')
  if form not in schemes.FORMATS:
    group.refuse('format', f'one of {", ".join(schemes.FORMATS)}', form)
  if not group.has('weights'):
    group.refuse('weights', 'an object: groups without weights are not read')
  group.expect('output_activations', None)
  return schemes.read(group.inside('weights'), form)


def _activations(group: fields_lib.Fields) -> Iterator[str]:
  """Yields the quantisation of a group's inputs in other programs."""
  if not group.has('input_activations'):
    return
  inside = group.inside('input_activations')
  values = {name: inside.get(name, None) for name in _OF_ACTIVATIONS}
  inside.finish_object('of activations')
  when = {False: 'static', None: 'static'}.get(values['dynamic'], 'dynamic')
  kind, num_bits = values['type'] or 'int', values['num_bits'] or 8
  yield f'{when} {kind}{num_bits}'
