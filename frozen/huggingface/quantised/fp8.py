"""fp8 checkpoints with a scale per block, as DeepSeek-V3 has them.

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float [out / 128, in / 128]; a block may be partial

    w[o, i] = weight * weight_scale_inv of its block

In spite of its name the scale multiplies. With weight_block_size = null, the
whole matrix has one scale; vLLM calls it weight_scale.

Reference: DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
"""

from collections.abc import Mapping
import dataclasses
import functools

import numpy as np

from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  awq,
  matrix as matrix_lib,
  parts as parts_lib,
)

_SCALES = ('weight_scale_inv', 'weight_scale')
_BLOCK = [128, 128]
_EXCLUDED = ('modules_to_not_convert', 'ignored_layers')
_WITHOUT_EFFECT = frozenset({'quant_method', 'dequantize'})


@dataclasses.dataclass(frozen=True)
class Fp8:
  """A quantization_config of `quant_method` fp8."""

  block: tuple[int, int] | None  # None: a matrix has one scale
  excluded: tuple[str, ...]  # parts of the names of modules in floats
  activations: str
  path: str  # path of the fields, for errors

  parts = frozenset(_SCALES)
  unused = frozenset({'input_scale', 'activation_scale'})

  @property
  def title(self) -> str:
    """The method, for messages."""
    of = f'blocks of {list(self.block)}' if self.block else 'whole matrices'
    return f'fp8, scales of {of}'

  @property
  def notes(self) -> list[str]:
    """Notes that activations are floats here."""
    return [weight_only(f'fp8 ({self.activations})')]

  def check_names(self, classes: Mapping[str, str]) -> list[str]:
    """Checks the list of modules; raises ValueError for one without effect."""
    path = f'{self.path}{_EXCLUDED[0]}'
    awq.check_excluded(self.excluded, classes, path)
    return []

  def open(self, parts: parts_lib.Parts, kind: str) -> parts_lib.Tensor | None:
    """Returns a matrix; checks only the headers of its tensors."""
    del kind
    weight = parts.tensors.get('weight')
    is_narrow = weight is not None and weight.dtype not in parts_lib.FLOATS
    if not is_narrow and not parts.tensors.keys() & self.parts:
      return None
    name = parts.module
    if any(name == x or name.startswith(f'{x}.') for x in self.excluded):
      parts.refuse('weight', 'quantised', 'floats by modules_to_not_convert')
    weight = parts.need('weight', ('F8_E4M3',), 2)
    outputs, inputs = weight.shape
    scale = next((x for x in _SCALES if x in parts.tensors), _SCALES[0])
    if set(_SCALES) <= parts.tensors.keys():
      parts.refuse(scale, f'beside {_SCALES[1]}', 'one of the two')
    if self.block is None:
      parts.shaped(scale, (*parts_lib.FLOATS, 'F8_E8M0'), (), (1,), (1, 1))
      tile = outputs, inputs
    else:
      tile = self.block
      shape = -(-outputs // tile[0]), -(-inputs // tile[1])
      parts.shaped(scale, (*parts_lib.FLOATS, 'F8_E8M0'), shape)
    read = functools.partial(matrix_of, parts, scale, tile)
    return parts_lib.Tensor(parts, (outputs, inputs), read)


def matrix_of(
  parts: parts_lib.Parts, scale: str, tile: tuple[int, int]
) -> matrix_lib.Matrix:
  """Reads the codes and the scales of a matrix of fp8."""
  scales = parts.finite(scale)
  outputs, inputs = parts.tensors['weight'].shape
  shape = -(-outputs // tile[0]), -(-inputs // tile[1])
  return matrix_lib.Matrix(
    'fp8', parts.finite('weight'), np.reshape(scales, shape), tile
  )


def weight_only(activations: str) -> str:
  """Returns the note on activations that are quantised elsewhere."""
  return (
    'activations stay in floats: only weights are quantised here, not'
    f' activations ({activations})'
  )


def read(fields: fields_lib.Fields) -> Fp8:
  """Returns the method of a quantization_config.

  Raises:
    ValueError: a field has a value that is not supported.
  """
  fields.expect('activation_scheme', 'dynamic', 'static')
  fields.expect('fmt', None, 'e4m3')
  fields.expect('scale_fmt', None, 'float', 'ue8m0')
  fields.expect('expert_dtype', None, 'fp8')
  fields.expect('modules_to_convert', None, [])
  # transformers takes blocks of 128 for a config without the field.
  block = fields.get('weight_block_size', _BLOCK)
  is_pair = isinstance(block, list) and len(block) == 2
  if block is not None and not (
    is_pair and all(type(n) is int and 0 < n < fields_lib.MOST for n in block)
  ):
    fields.refuse('weight_block_size', 'two positive integers or null')
  excluded = [awq.excluded_names(fields, name) for name in _EXCLUDED]
  method = Fp8(
    block=None if block is None else (block[0], block[1]),
    excluded=excluded[0] + excluded[1],
    activations=fields.get('activation_scheme', 'dynamic'),
    path=fields.path,
  )
  fields.finish_object('of fp8', _WITHOUT_EFFECT)
  return method
