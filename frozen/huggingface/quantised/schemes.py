"""Schemes of compressed-tensors: how a group of its config stores a matrix.

    format                tensors of a matrix [out, in]
    pack-quantized        weight_packed int32 [out, in * bits / 32], codes plus
                          2^(bits - 1); weight_shape [2]; weight_scale;
                          weight_zero_point int32 [out * bits / 32, groups],
                          packed along outputs; weight_g_idx int32 [in]
    int-quantized,        weight int8 [out, in]; weight_scale;
    naive-quantized       weight_zero_point int8, as scales
    float-quantized,      weight float8_e4m3fn [out, in]; weight_scale
    naive-quantized
    mxfp8-quantized       the same, with exponents of scales in bytes
    nvfp4-pack-quantized  weight_packed uint8 [out, in / 2];
                          weight_scale float8_e4m3fn [out, in / 16];
                          weight_global_scale float32 [1], which divides
    mxfp4-pack-quantized  weight_packed; weight_scale uint8, exponents of powers
                          of two plus 127

Scales are [1] of a tensor, [out, 1] of channels, [out, groups], or of blocks.

Reference: the package compressed-tensors, `compressors/`; OCP Microscaling
Formats v1.0.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  bits as bits_lib,
  matrix as matrix_lib,
  parts as parts_lib,
)

PACKED, INT, FLOAT = 'pack-quantized', 'int-quantized', 'float-quantized'
NAIVE, MXFP8 = 'naive-quantized', 'mxfp8-quantized'
NVFP4, MXFP4 = 'nvfp4-pack-quantized', 'mxfp4-pack-quantized'
FORMATS = (PACKED, INT, FLOAT, NAIVE, MXFP8, NVFP4, MXFP4)
_FP4 = (NVFP4, MXFP4)
_GLOBAL = 'weight_global_scale'
# Observers chose the scales; other fields repeat facts that the tensors show.
_WITHOUT_EFFECT = frozenset(
  {'observer', 'observer_kwargs', 'scale_dtype', 'zp_dtype'}
)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """The field `weights` of a group, and its format."""

  format: str  # one of FORMATS
  bits: int
  is_float: bool
  strategy: str
  size: int  # of a group; 0: none
  block: tuple[int, int] | None
  is_symmetric: bool
  is_ordered: bool

  @property
  def title(self) -> str:
    """The scheme, for messages."""
    kind = 'float' if self.is_float else 'int'
    size = self.block or self.size or ''
    return f'{self.format} {kind}{self.bits} {self.strategy} {size}'.rstrip()

  def open(self, parts: parts_lib.Parts) -> parts_lib.Tensor:
    """Returns a matrix; checks only the headers of its tensors.

    Raises:
      ValueError: its tensors do not fit the scheme.
    """
    outputs, inputs = self._shape(parts)
    if self.size and self.format in (*_FP4, MXFP8) and inputs % self.size:
      parts.refuse(
        'weight_scale', f'for {inputs} inputs', f'groups of {self.size}'
      )
    tile = self._tile(outputs, inputs)
    tiles = -(-outputs // tile[0]), -(-inputs // tile[1])
    shapes = [tiles]
    if tiles == (1, 1) or self.strategy == 'channel':
      shapes += [(tiles[0],)] if tiles[1] == 1 else []
      shapes += [()] if self.strategy == 'tensor' else []
    parts.shaped('weight_scale', self._scale_dtypes(), *shapes)
    allowed = {'weight_scale', 'bias'}
    if self.format in (PACKED, *_FP4):
      allowed |= {'weight_packed', 'weight_shape'}
    else:
      allowed.add('weight')
    if not self.is_symmetric:
      allowed.add('weight_zero_point')
      if self.format == PACKED:
        words = bits_lib.words_of(outputs, self.bits)
        parts.shaped('weight_zero_point', ('I32',), (words, tiles[1]))
      else:
        parts.shaped('weight_zero_point', ('I8',), *shapes)
    if self.is_ordered:
      allowed.add('weight_g_idx')
      parts.shaped('weight_g_idx', ('I32',), (inputs,))
    if self.format == NVFP4:
      allowed.add(_GLOBAL)
      parts.shaped(_GLOBAL, ('F32',), (1,), ())
    if unknown := sorted(parts.tensors.keys() - allowed):
      parts.refuse(unknown[0], 'with it', f'{", ".join(sorted(allowed))} alone')
    read = functools.partial(self._read, parts, (outputs, inputs), tile)
    return parts_lib.Tensor(parts, (outputs, inputs), read)

  def _shape(self, parts: parts_lib.Parts) -> tuple[int, int]:
    """Returns the shape of the matrix, [out, in]."""
    if self.format in _FP4:
      outputs, num_bytes = parts.need('weight_packed', ('U8',), 2).shape
      return outputs, 2 * num_bytes
    if self.format != PACKED:
      dtype = 'F8_E4M3' if self.is_float else 'I8'
      return parts.need('weight', (dtype,), 2).shape
    packed = parts.need('weight_packed', ('I32',), 2)
    told = parts.shaped('weight_shape', ('I64', 'I32'), (2,)).whole()
    outputs, inputs = (int(n) for n in told)
    held = packed.shape[1] * 32 // self.bits
    if (
      outputs != packed.shape[0] or not held - 32 // self.bits < inputs <= held
    ):
      parts.refuse(
        'weight_shape',
        f'= {[outputs, inputs]}',
        f'{[packed.shape[0], held]}, as in weight_packed',
      )
    return outputs, inputs

  def _tile(self, outputs: int, inputs: int) -> tuple[int, int]:
    if self.block is not None:
      return self.block
    if self.strategy == 'tensor':
      return max(outputs, 1), max(inputs, 1)
    return 1, self.size or max(inputs, 1)

  def _scale_dtypes(self) -> tuple[str, ...]:
    if self.format in (MXFP4, MXFP8):
      return 'U8', 'F8_E8M0'
    return ('F8_E4M3',) if self.format == NVFP4 else parts_lib.FLOATS

  def _read(
    self,
    parts: parts_lib.Parts,
    shape: tuple[int, int],
    tile: tuple[int, int],
  ) -> matrix_lib.Matrix:
    outputs, inputs = shape
    tiles = -(-outputs // tile[0]), -(-inputs // tile[1])
    scales = self._scales(parts).reshape(tiles)
    zeros, groups, divisor = None, None, None
    if self.is_ordered:
      groups = parts.tensors['weight_g_idx'].whole()
      if groups.size and not 0 <= groups.min() <= groups.max() < tiles[1]:
        parts.refuse(
          'weight_g_idx',
          f'from {groups.min()} to {groups.max()}',
          f'groups from 0 to {tiles[1] - 1}',
        )
      if np.array_equal(groups, np.arange(groups.size) // tile[1]):
        groups = None
    if self.format in _FP4:
      codes = bits_lib.nibbles(parts.tensors['weight_packed'].whole())
      if self.format == NVFP4:
        divisor = parts.finite(_GLOBAL).reshape(())
        if divisor == 0:
          parts.refuse(_GLOBAL, '= 0', 'another divisor')
      return matrix_lib.Matrix('fp4', codes, scales, tile, divisor=divisor)
    if self.format != PACKED:
      if self.is_float:
        codes = parts.finite('weight')
        return matrix_lib.Matrix('fp8', codes, scales, tile)
      codes = parts.tensors['weight'].whole()
      if not self.is_symmetric:
        zeros = parts.tensors['weight_zero_point'].whole().reshape(tiles)
      return matrix_lib.Matrix('int8', codes, scales, tile, zeros=zeros)
    return self._unpacked(parts, scales, tile, inputs, groups)

  def _unpacked(self, parts, scales, tile, inputs, groups):
    words = parts.tensors['weight_packed'].whole()
    codes = bits_lib.unpack(words, self.bits)[:, :inputs]
    middle, zeros, form = 2 ** (self.bits - 1), None, f'int{self.bits}'
    if not self.is_symmetric:
      words = parts.tensors['weight_zero_point'].whole()
      zeros = bits_lib.unpack(words.T, self.bits)[:, : len(codes)].T
      zeros = np.ascontiguousarray(zeros).astype(np.int32)
    if self.is_symmetric or self.bits == 8:
      codes = (codes.astype(np.int16) - middle).astype(np.int8)
      zeros = None if zeros is None else zeros - middle
    else:
      form = 'uint4'
    return matrix_lib.Matrix(
      form, codes, scales, tile, zeros=zeros, groups=groups
    )

  def _scales(self, parts: parts_lib.Parts) -> np.ndarray:
    scales = parts.tensors['weight_scale'].whole()
    if self.format not in (MXFP4, MXFP8):
      return parts.finite('weight_scale')
    exponents = scales.view(np.uint8)
    if np.any(exponents == 255):  # NaN of e8m0
      parts.refuse('weight_scale', 'with 255', 'exponents of at most 254')
    return exponents.view(ml_dtypes.float8_e8m0fnu)


def read(fields: fields_lib.Fields, form: str) -> Scheme:
  """Returns the scheme of the fields `weights` of a group.

  Args:
    fields: fields of a quantization_config's group.
    form: the format of the group.

  Raises:
    ValueError: a field has a value that is not supported.
  """
  bits = fields.size('num_bits', 8)
  is_float = fields.get('type', 'int') == 'float'
  fields.expect('type', 'int', 'float')
  fields.expect('dynamic', False)
  allowed = {
    PACKED: (('int', 4), ('int', 8)),
    INT: (('int', 8), ('int', 4)),
    FLOAT: (('float', 8),),
    NAIVE: (('int', 8), ('float', 8)),
    MXFP8: (('float', 8),),
    NVFP4: (('float', 4),),
    MXFP4: (('float', 4),),
  }[form]
  if (fields.get('type', 'int'), bits) not in allowed:
    names = ' or '.join(f'{n} for {kind}' for kind, n in allowed)
    fields.refuse('num_bits', f'{names}, as the format is {form}', 8)
  size, block = fields.get('group_size', None), None
  strategy = fields.get('strategy', None)
  if strategy is None:
    strategy = {None: 'tensor', -1: 'channel'}.get(size, 'group')
  wanted = {
    NVFP4: ('tensor_group',), MXFP4: ('group',), MXFP8: ('group',),
  }.get(form, ('tensor', 'channel', 'group', 'block'))  # fmt: skip
  fields.expect('strategy', None, *wanted)
  if strategy in ('group', 'tensor_group'):
    size = fields.size('group_size')
  else:
    fields.expect('group_size', None, -1, 0)
    size = 0
  if strategy == 'block':
    block = _block(fields, form)
  else:
    fields.expect('block_structure', None)
  is_symmetric = fields.flag('symmetric', True)
  if not is_symmetric and (is_float or strategy in ('tensor', 'block')):
    fields.refuse('symmetric', 'true of floats, tensors and blocks')
  fields.expect('actorder', None, False, 'weight', 'static', 'group', 'dynamic')
  is_ordered = fields.get('actorder', None) in ('group', 'dynamic')
  if is_ordered and (form != PACKED or strategy != 'group'):
    fields.refuse('actorder', f'none of {form} by {strategy}')
  fields.finish_object('of weights', _WITHOUT_EFFECT)
  return Scheme(
    format=form,
    bits=bits,
    is_float=is_float,
    strategy=strategy,
    size=size,
    block=block,
    is_symmetric=is_symmetric,
    is_ordered=is_ordered,
  )


def _block(fields: fields_lib.Fields, form: str) -> tuple[int, int]:
  block = fields.get('block_structure')
  if isinstance(block, str):  # '128x128' of earlier versions
    block = [int(n) if n.isdecimal() else 0 for n in block.split('x')]
  if (
    form not in (FLOAT, NAIVE)
    or not isinstance(block, list)
    or len(block) != 2
    or not all(type(n) is int and 0 < n < fields_lib.MOST for n in block)
  ):
    fields.refuse('block_structure', 'two positive integers, of floats')
  return block[0], block[1]
