"""AWQ checkpoints in the layout of its GEMM kernels, as AutoAWQ writes them.

    qweight  int32 [in, out / 8]      8 outputs per word
    qzeros   int32 [groups, out / 8]  8 outputs per word
    scales   float [groups, out]

    w[o, i] = (code - zero) * scale of group i // group_size

The nibbles of a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7, from the lowest
bits on.

Reference: AWQ, arXiv:2306.00978; packing of AutoAWQ's WQLinear_GEMM.
"""

from collections.abc import Mapping
import dataclasses
import functools

import numpy as np

from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  bits as bits_lib,
  gptq,
  matrix as matrix_lib,
  opening,
  parts as parts_lib,
)

_BITS = 4
# Fields about the making of the checkpoint, and about other programs that run
# it. Newer versions of transformers write the fields of gptq, too.
_WITHOUT_EFFECT = frozenset(
  {
    'quant_method', 'backend', 'do_fuse', 'fuse_max_seq_len',
    'modules_to_fuse', 'exllama_config', 'damp_percent', 'true_sequential',
    'act_group_aware', 'tokenizer', 'dataset', 'batch_size', 'pad_token_id',
    'max_input_length', 'model_seqlen', 'block_name_to_quantize',
    'module_name_preceding_first_block', 'cache_block_outputs', 'meta', 'sym',
    'checkpoint_format',
  }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Awq:
  """A quantization_config of `quant_method` awq."""

  group_size: int  # -1: all inputs
  excluded: tuple[str, ...]  # parts of the names of modules in floats
  path: str  # path of the fields, for errors

  parts = frozenset({'qweight', 'qzeros', 'scales'})
  unused = frozenset()

  @property
  def title(self) -> str:
    """The method, for messages."""
    return f'awq, {_BITS} bits, groups of {self.group_size}'

  @property
  def notes(self) -> list[str]:
    """No notes: the checkpoint's own activations are floats, too."""
    return []

  def check_names(self, classes: Mapping[str, str]) -> list[str]:
    """Checks the list of modules; raises ValueError for one without effect."""
    check_excluded(self.excluded, classes, f'{self.path}modules_to_not_convert')
    return []

  def open(self, parts: parts_lib.Parts, kind: str) -> parts_lib.Tensor | None:
    """Returns a matrix; checks only the headers of its tensors."""
    del kind
    if not parts.tensors.keys() & self.parts:
      return None
    if any(name in parts.module for name in self.excluded):
      parts.refuse('qweight', 'quantised', 'floats by modules_to_not_convert')
    packed = parts.need('qweight', ('I32',), 2)
    inputs, outputs = packed.shape[0], packed.shape[1] * 32 // _BITS
    size = inputs if self.group_size == -1 else self.group_size
    groups = -(-inputs // size)
    parts.shaped('scales', parts_lib.FLOATS, (groups, outputs))
    parts.shaped('qzeros', ('I32',), (groups, packed.shape[1]))
    if 'weight' in parts.tensors:
      parts.refuse('weight', 'beside qweight', 'one of the two')
    read = functools.partial(self._read, parts, size)
    return parts_lib.Tensor(parts, (outputs, inputs), read)

  def _read(self, parts: parts_lib.Parts, size: int) -> matrix_lib.Matrix:
    scales = np.ascontiguousarray(parts.finite('scales').T)
    codes, zeros = (
      np.ascontiguousarray(
        bits_lib.in_awq_order(
          bits_lib.unpack(parts.tensors[name].whole(), _BITS)
        ).T
      )
      for name in ('qweight', 'qzeros')
    )
    return gptq.in_form(codes, zeros, scales, bits=_BITS, size=size)


def check_excluded(
  excluded: tuple[str, ...], classes: Mapping[str, str], path: str
) -> None:
  """Raises ValueError for a name that is no part of any module's name."""
  for name in excluded:
    if name not in opening.HEADS and not any(name in x for x in classes):
      raise opening.names_nothing(path, name)


def excluded_names(fields: fields_lib.Fields, name: str) -> tuple[str, ...]:
  """Returns a list of names; null is empty."""
  values = fields.get(name, None) or []
  if not isinstance(values, list) or not all(
    isinstance(value, str) and value for value in values
  ):
    fields.refuse(name, 'a list of names of modules')
  return tuple(values)


def read(fields: fields_lib.Fields) -> Awq:
  """Returns the method of a quantization_config.

  Raises:
    ValueError: a field has a value that is not supported.
  """
  fields.expect('bits', _BITS)
  group_size = fields.get('group_size')
  if group_size != -1:
    group_size = fields.size('group_size')
  for name in ('version', 'format'):  # gemv and others lie in another order
    fields.expect(name, None, 'gemm', 'GEMM')
  fields.expect('zero_point', True)
  fields.expect('backend', None, 'auto', 'autoawq')  # llm-awq packs otherwise
  fields.expect('desc_act', None, False)
  fields.expect('modules_in_block_to_quantize', None)
  method = Awq(
    group_size=group_size,
    excluded=excluded_names(fields, 'modules_to_not_convert'),
    path=fields.path,
  )
  fields.finish_object('of awq', _WITHOUT_EFFECT)
  return method
