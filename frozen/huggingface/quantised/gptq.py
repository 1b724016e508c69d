"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

    qweight  int32 [in * bits / 32, out]      8 or 4 inputs per word
    qzeros   int32 [groups, out * bits / 32]  8 or 4 outputs per word
    scales   float [groups, out]
    g_idx    int32 [in], the group of each input

    w[o, i] = (code - zero) * scale of group g_idx[i]

`checkpoint_format` gptq (v1) stores zero - 1, modulo 2^bits; gptq_v2 stores the
zero. Act-order (`desc_act`) groups inputs of similar importance, so that the
inputs of a group do not lie together.

Reference: GPTQ, arXiv:2210.17323; packing of AutoGPTQ's QuantLinear.
"""

from collections.abc import Mapping
import dataclasses
import functools

import numpy as np

from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  bits as bits_lib,
  matrix as matrix_lib,
  opening,
  parts as parts_lib,
)

# Fields about the making of the checkpoint, and about other programs that run
# it.
_WITHOUT_EFFECT = frozenset(
  {
    'quant_method', 'true_sequential', 'damp_percent', 'damp_auto_increment',
    'model_name_or_path', 'model_file_base_name', 'meta', 'tokenizer',
    'dataset', 'batch_size', 'pad_token_id', 'use_exllama', 'disable_exllama',
    'exllama_config', 'max_input_length', 'use_cuda_fp16', 'model_seqlen',
    'block_name_to_quantize', 'module_name_preceding_first_block',
    'cache_block_outputs', 'backend', 'act_group_aware', 'static_groups',
    'mse', 'pack_impl',
  }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gptq:
  """A quantization_config of `quant_method` gptq."""

  bits: int
  group_size: int  # -1: all inputs
  is_ordered: bool
  is_symmetric: bool
  zero_offset: int  # added to stored zeros
  has_head: bool
  modules: tuple[str, ...] | None  # last words of quantised ones; None: any
  path: str  # path of the fields, for errors

  parts = frozenset({'qweight', 'qzeros', 'scales', 'g_idx'})
  unused = frozenset()

  @property
  def title(self) -> str:
    """The method, for messages."""
    order = ', act-order' if self.is_ordered else ''
    return f'gptq, {self.bits} bits, groups of {self.group_size}{order}'

  @property
  def notes(self) -> list[str]:
    """No notes: the checkpoint's own activations are floats, too."""
    return []

  def check_names(self, classes: Mapping[str, str]) -> list[str]:
    """Checks the list of modules; raises ValueError for one without effect."""
    for name in self.modules or ():
      if not any(module.endswith(f'.{name}') for module in classes):
        path = f'{self.path}modules_in_block_to_quantize'
        raise opening.names_nothing(path, name)
    return []

  def open(self, parts: parts_lib.Parts, kind: str) -> parts_lib.Tensor | None:
    """Returns a matrix; checks only the headers of its tensors."""
    del kind
    if not parts.tensors.keys() & self.parts:
      return None
    module = parts.module
    if module in opening.HEADS and not self.has_head:
      parts.refuse('qweight', 'for a head', 'floats, as lm_head is not true')
    if self.modules is not None and not module.endswith(
      tuple(f'.{name}' for name in self.modules)
    ):
      parts.refuse(
        'qweight', 'quantised', 'floats by modules_in_block_to_quantize'
      )
    packed = parts.need('qweight', ('I32',), 2)
    per_word = 32 // self.bits
    inputs, outputs = packed.shape[0] * per_word, packed.shape[1]
    size = inputs if self.group_size == -1 else self.group_size
    groups = -(-inputs // size)
    parts.shaped('scales', parts_lib.FLOATS, (groups, outputs))
    words = bits_lib.words_of(outputs, self.bits)
    parts.shaped('qzeros', ('I32',), (groups, words))
    if self.is_ordered or 'g_idx' in parts.tensors:
      parts.shaped('g_idx', ('I32',), (inputs,))
    if 'weight' in parts.tensors:
      parts.refuse('weight', 'beside qweight', 'one of the two')
    read = functools.partial(self._read, parts, size)
    return parts_lib.Tensor(parts, (outputs, inputs), read)

  def _read(self, parts: parts_lib.Parts, size: int) -> matrix_lib.Matrix:
    scales = np.ascontiguousarray(parts.finite('scales').T)
    outputs, num_groups = scales.shape
    words = parts.tensors['qzeros'].whole()
    # AutoGPTQ's modulo: a zero of 0 is stored as the largest code.
    zeros = bits_lib.unpack(words, self.bits)[:, :outputs].T
    zeros = (zeros.astype(np.int32) + self.zero_offset) % 2**self.bits
    middle = 2 ** (self.bits - 1)
    if self.is_symmetric and np.any(zeros != middle):
      parts.refuse(
        'qzeros', 'with other zeros', f'{middle} alone, as sym is true'
      )
    groups = self._groups(parts, size, num_groups)
    packed = parts.tensors['qweight'].whole()
    codes = bits_lib.unpack(packed.T, self.bits)
    return in_form(
      codes, zeros, scales, bits=self.bits, size=size, groups=groups
    )

  def _groups(self, parts, size: int, num_groups: int) -> np.ndarray | None:
    """Returns the group of each input; None if they lie together."""
    if 'g_idx' not in parts.tensors:
      return None
    groups = parts.tensors['g_idx'].whole()
    if groups.size and not 0 <= groups.min() <= groups.max() < num_groups:
      parts.refuse(
        'g_idx',
        f'from {groups.min()} to {groups.max()}',
        f'groups from 0 to {num_groups - 1}',
      )
    if np.array_equal(groups, np.arange(groups.size) // size):
      return None
    if not self.is_ordered:
      parts.refuse('g_idx', 'out of order', 'rising, as desc_act is false')
    return groups


def in_form(
  codes: np.ndarray,
  zeros: np.ndarray,
  scales: np.ndarray,
  *,
  bits: int,
  size: int,
  groups: np.ndarray | None = None,
) -> matrix_lib.Matrix:
  """Returns a matrix of unsigned codes.

  Args:
    codes: uint8 [out, in], of which `bits` bits count.
    zeros: integers [out, groups], subtracted from codes.
    scales: [out, groups].
    bits: 4 or 8.
    size: inputs of a group.
    groups: group of each input; None if a group's inputs lie together.
  """
  middle = 2 ** (bits - 1)
  is_centred = bool(np.all(zeros == middle))
  form = 'uint4'
  if bits == 8 or is_centred:
    codes = (codes.astype(np.int16) - middle).astype(np.int8)
    form, zeros = f'int{bits}', zeros.astype(np.int32) - middle
  return matrix_lib.Matrix(
    form,
    codes,
    scales,
    (1, size),
    zeros=None if is_centred else zeros,
    groups=groups,
  )


def read(fields: fields_lib.Fields) -> Gptq:
  """Returns the method of a quantization_config.

  Raises:
    ValueError: a field has a value that is not supported.
  """
  bits = fields.size('bits')
  if bits not in (4, 8):
    fields.refuse('bits', '4 or 8')
  group_size = fields.get('group_size')
  if group_size != -1:
    group_size = fields.size('group_size')
  formats = [
    fields.get(name)
    for name in ('checkpoint_format', 'format')
    if fields.has(name)
  ]
  for name in ('checkpoint_format', 'format'):
    fields.expect(name, None, 'gptq', 'gptq_v2')
  fields.agree('checkpoint_format', 'format')
  fields.expect('method', None, 'gptq')
  fields.expect('pack_dtype', None, 'int32')
  fields.expect('is_marlin_format', None, False)
  fields.expect('dynamic', None, {})  # other settings for some modules
  lists = fields.get('modules_in_block_to_quantize', None)
  try:
    modules = None if lists is None else tuple(x for y in lists for x in y)
    assert modules is None or all(isinstance(name, str) for name in modules)
  except (TypeError, AssertionError):
    fields.refuse('modules_in_block_to_quantize', 'lists of names')
  method = Gptq(
    bits=bits,
    group_size=group_size,
    is_ordered=fields.flag('desc_act', False),
    is_symmetric=fields.flag('sym', True),
    zero_offset=0 if 'gptq_v2' in formats else 1,
    has_head=fields.flag('lm_head', False),
    modules=modules,
    path=fields.path,
  )
  fields.finish_object('of gptq', _WITHOUT_EFFECT)
  return method
