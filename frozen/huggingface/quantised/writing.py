"""Export of stored kernels as a checkpoint of compressed-tensors.

    form of a kernel  format
    int4, uint4       pack-quantized
    int8              pack-quantized; int-quantized if it was imported from it
    fp8               float-quantized; mxfp8-quantized with powers of two
    fp4               mxfp4-pack-quantized, nvfp4-pack-quantized: by its scales

The codes and scales of the kernels are written byte for byte. So an import that
was kept and is written again has the bytes of its checkpoint. Other kernels
become floats: act-order, which compressed-tensors no longer reads, nf4, blocks
of a GGUF file, and tiles that compressed-tensors does not have.

Each expert has tensors of its own, as in the checkpoints that the package
makes. transformers 5.24 loads no such mixture, not even those: its modules have
one parameter for all experts.

Reference: see `schemes.py`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from frozen.huggingface import layouts, tensor_map
from frozen.huggingface.quantised import bits as bits_lib, schemes
from models.linear.stored import kernel as kernel_lib, tree as stored_tree

_E4M3, _E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
_TABLES = ('embed/embedding', 'head/embedding')
_OF_EXPERTS = (
  'transformers (5.24) loads no experts in compressed-tensors; leave --format'
  ' out for it'
)


class Plan(NamedTuple):
  """The tensors of a checkpoint, and how its config describes them."""

  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, np.dtype]
  tensors: Iterator[tuple[str, np.ndarray]]  # in the order of shapes
  field: dict[str, Any]  # quantization_config
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Planned:
  """A tensor of the family, in floats or in the tensors of a scheme."""

  piece: tensor_map.Piece
  scheme: schemes.Scheme | None
  inputs: int = 0  # of the scheme
  why: str = ''  # reason why quantised matrices are written in floats

  def arrays(self, leaves: Mapping[str, Any], dtype: Any):
    """Returns the tensors by name."""
    parts = _parts(self.piece, leaves)
    if self.scheme is None:
      floats = [
        _whole(path, leaf, dtype)
        for path, leaf in zip(self.piece.ours, parts, strict=True)
      ]
      return {self.piece.theirs: self.piece.layout.write(*floats)}
    module = self.piece.theirs.rpartition('.')[0]
    arrays = _arrays(self.scheme, _joined(self.piece, parts))
    return {f'{module}.{name}': x for name, x in arrays.items()}


def plan(
  leaves: Mapping[str, Any],
  pieces: list[tensor_map.Piece],
  *,
  dtype: Any,
  formats: list[str],
) -> Plan:
  """Returns the tensors to write.

  Args:
    leaves: parameters of separate layers, by path.
    pieces: the tensor map.
    dtype: dtype of floats.
    formats: formats of the checkpoint from which the kernels were imported.

  Raises:
    ValueError: no kernel can be written so.
  """
  planned = _uniform([_planned(piece, leaves, formats) for piece in pieces])
  if not any(each.scheme for each in planned):
    reasons = sorted({each.why for each in planned if each.why})
    raise ValueError(
      '--format: got compressed-tensors of a model without kernels for it'
      f' ({"; ".join(reasons) or "all are floats"}), expected int8, int4,'
      ' uint4, fp8 or fp4 in rows of whole tiles; quantise it with `python -m'
      ' frozen.quantize`, or leave --format out'
    )
  shapes, dtypes = {}, {}
  for each in planned:
    for name, x in each.arrays(leaves, dtype).items():
      shapes[name], dtypes[name] = x.shape, x.dtype
  whys: dict[str, int] = {}
  for each in planned:
    if each.why:
      whys[each.why] = whys.get(each.why, 0) + 1
  notes = [
    f'{n} kernels are written as floats: {why}' for why, n in whys.items()
  ]
  if any(each.scheme and each.piece.expert is not None for each in planned):
    notes.append(_OF_EXPERTS)
  return Plan(
    shapes,
    dtypes,
    (item for each in planned for item in each.arrays(leaves, dtype).items()),
    _field(planned),
    notes,
  )


def _uniform(planned: list[_Planned]) -> list[_Planned]:
  """Returns rows of one tile as groups, if all others are such groups.

  transformers dequantises all matrices by the first group of a config.
  """
  schemed = {each.scheme for each in planned if each.scheme}
  sizes = {scheme.size for scheme in schemed if scheme.strategy == 'group'}
  if len(sizes) != 1:
    return planned
  (size,) = sizes
  return [
    dataclasses.replace(
      each,
      scheme=dataclasses.replace(each.scheme, strategy='group', size=size),
    )
    if each.scheme and each.scheme.strategy == 'channel' and each.inputs == size
    else each
    for each in planned
  ]


def _planned(
  piece: tensor_map.Piece, leaves: Mapping[str, Any], formats: list[str]
) -> _Planned:
  parts = _parts(piece, leaves)
  if not any(map(stored_tree.is_stored, parts)):
    return _Planned(piece, None)
  if not all(isinstance(part, kernel_lib.Kernel) for part in parts):
    return _Planned(piece, None, why='blocks of a GGUF file')
  found = [_scheme(part, formats) for part in parts]
  # Tiles of several rows would be cut where one tensor joins matrices.
  has_wide = len(parts) > 1 and any(part.tile[0] > 1 for part in parts)
  for each in found:
    if isinstance(each, str):
      return _Planned(piece, None, why=each)
  if has_wide or len(set(found)) > 1:
    why = 'matrices that one tensor joins differ'
    return _Planned(piece, None, why=why)
  (scheme,) = set(found)
  assert isinstance(scheme, schemes.Scheme)
  return _Planned(piece, scheme, inputs=parts[0].shape[-2])


def _parts(piece: tensor_map.Piece, leaves: Mapping[str, Any]) -> list[Any]:
  """Returns the leaves that a tensor holds; of experts, that of one alone."""
  parts = [leaves[path] for path in piece.ours]
  if piece.expert is None:
    return parts
  return [
    jax.tree.map(lambda x: np.asarray(x)[piece.expert], part) for part in parts
  ]


def _scheme(
  kernel: kernel_lib.Kernel, formats: list[str]
) -> schemes.Scheme | str:
  """Returns the scheme of a kernel, or why there is none."""
  inputs, outputs = kernel.shape
  of_out, of_in = kernel.tile
  form, scales = kernel.form, jnp.dtype(kernel.scales.dtype)
  if kernel.order is not None:
    return 'act-order, which compressed-tensors no longer reads'
  if form == 'nf4':
    return 'compressed-tensors has no nf4'
  is_block = of_out > 1
  if (of_out, of_in) == (outputs, inputs) and outputs > 1:
    strategy = 'tensor'
  elif is_block:
    strategy = 'block'
  else:
    is_mx = form in ('fp8', 'fp4') and scales == _E8M0
    strategy = 'channel' if of_in >= inputs and not is_mx else 'group'
  if strategy == 'group' and inputs % of_in:
    return f'{inputs} inputs are no whole tiles of {of_in}'
  if is_block and form != 'fp8':
    return f'tiles of several outputs of {form}'
  if kernel.mins is not None and _zeros(kernel) is None:
    return 'smallest numbers that are no whole steps'
  chosen = schemes.PACKED
  if form == 'int8' and formats == [schemes.INT]:
    chosen = schemes.INT
  elif form == 'fp8':
    is_mx = scales == _E8M0 and strategy == 'group' and of_in == 32
    chosen = schemes.MXFP8 if is_mx else schemes.FLOAT
  elif form == 'fp4':
    if scales == _E8M0 and kernel.gain is None and kernel.tile == (1, 32):
      chosen = schemes.MXFP4
    elif scales == _E4M3 and kernel.gain is not None and of_in == 16:
      chosen, strategy = schemes.NVFP4, 'tensor_group'
    else:
      return 'fp4 with other tiles or scales than MXFP4 and NVFP4'
  if kernel.gain is not None and chosen != schemes.NVFP4:
    return f'{form} with a scale of its scales'
  return schemes.Scheme(
    format=chosen,
    bits=8 if form in ('int8', 'fp8') else 4,
    is_float=form in ('fp8', 'fp4'),
    strategy=strategy,
    size=of_in if 'group' in strategy else 0,
    block=kernel.tile if strategy == 'block' else None,
    is_symmetric=kernel.mins is None and form != 'uint4',
    is_ordered=False,
  )


def _zeros(kernel: kernel_lib.Kernel) -> np.ndarray | None:
  """Returns zeros [out, groups] that give the mins; None if none do."""
  scales = np.asarray(kernel.scales, np.float32)
  mins = np.asarray(kernel.mins, np.float32)
  is_some = scales != 0
  zeros = np.round(-mins / np.where(is_some, scales, 1))
  least, most = (-128, 127) if kernel.form == 'int8' else (0, 15)
  is_whole = np.array_equal(zeros * scales, -mins)
  if not is_whole or zeros.min() < least or zeros.max() > most:
    return None
  return zeros.astype(np.int16)


def _joined(
  piece: tensor_map.Piece, kernels: list[kernel_lib.Kernel]
) -> dict[str, Any]:
  """Returns the arrays of kernels whose rows one tensor joins."""
  is_turned = piece.layout is not layouts.AS_IT_IS
  is_single = piece.layout in (layouts.AS_IT_IS, layouts.TRANSPOSED)

  def join(arrays):
    if is_single:
      return arrays[0]
    rows = [x.T if is_turned else x for x in arrays]
    return np.ascontiguousarray(piece.layout.write(*rows))

  first = kernels[0]
  joined: dict[str, Any] = {
    'form': first.form,
    'inputs': first.shape[-2],
    'values': join([np.asarray(kernel.values) for kernel in kernels]),
    'scales': join([np.asarray(kernel.scales) for kernel in kernels]),
    'gain': first.gain,
  }
  if first.mins is not None:
    joined['zeros'] = join([_zeros(kernel) for kernel in kernels])
  elif first.form == 'uint4':
    joined['zeros'] = np.zeros(joined['scales'].shape, np.int16)
  return joined


def _arrays(
  scheme: schemes.Scheme, kernel: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a matrix, by the last word of their names."""
  values, scales = kernel['values'], kernel['scales']
  shape = {'tensor': (1,)}.get(scheme.strategy, scales.shape)
  if scales.dtype == _E8M0 and scheme.format != schemes.MXFP8:
    is_exponents = scheme.format == schemes.MXFP4
    scales = scales.view(np.uint8) if is_exponents else scales.astype('f4')
  elif scales.dtype == _E8M0:
    scales = scales.view(np.uint8)
  found = {'weight_scale': scales.reshape(shape)}
  zeros = kernel.get('zeros')
  if scheme.format == schemes.PACKED:
    rows, inputs = len(values), kernel['inputs']
    # Codes plus 2^(bits - 1): only the highest bit of each changes.
    flip = {'int4': 0x88, 'int8': 0x80, 'uint4': 0}[kernel['form']]
    packed = values.view(np.uint8) ^ np.uint8(flip)
    found['weight_packed'] = bits_lib.pack(packed, 8)
    found['weight_shape'] = np.array([rows, inputs], np.int64)
    if zeros is not None:
      lowest = 128 if kernel['form'] == 'int8' else 0
      words = bits_lib.pack((zeros + lowest).T, scheme.bits)
      found['weight_zero_point'] = np.ascontiguousarray(words.T)
  elif scheme.format in (schemes.MXFP4, schemes.NVFP4):
    found['weight_packed'] = values
    if scheme.format == schemes.NVFP4:
      divisor = np.float32(1) / np.asarray(kernel['gain'], np.float32)
      found['weight_global_scale'] = divisor.reshape(1)
  else:
    found['weight'] = values
    if zeros is not None:
      found['weight_zero_point'] = zeros.astype(np.int8).reshape(shape)
  return found


def _whole(path: str, leaf: Any, dtype: Any) -> np.ndarray:
  """Returns a leaf in floats; a stored table is turned."""
  if not stored_tree.is_stored(leaf):
    return np.asarray(leaf)
  whole = np.asarray(leaf.whole(dtype))
  return whole.T if path.endswith('/embedding') else whole


def _field(planned: list[_Planned]) -> dict[str, Any]:
  """Returns the quantization_config."""
  groups: dict[schemes.Scheme, list[str]] = {}
  ignored = []
  classes = set()
  for each in planned:
    module, _, kind = each.piece.theirs.rpartition('.')
    is_matrix = kind == 'weight' and each.piece.ours[0].endswith(
      ('/kernel', *_TABLES)
    )
    is_table = each.piece.ours[0] == _TABLES[0]
    if each.scheme is not None:
      groups.setdefault(each.scheme, []).append(module)
      classes.add('Embedding' if is_table else 'Linear')
    elif is_matrix and not is_table:
      ignored.append(module)
  if not any(each.piece.ours[0] == _TABLES[1] for each in planned):
    is_neox = planned[0].piece.theirs.startswith('gpt_neox.')
    # A Linear layer in torch, with the tied table.
    ignored.append('embed_out' if is_neox else 'lm_head')
  if len(groups) == 1:
    groups = {scheme: sorted(classes) for scheme in groups}
  formats = {scheme.format for scheme in groups}
  return {
    'quant_method': 'compressed-tensors',
    'format': formats.pop() if len(formats) == 1 else 'mixed-precision',
    'quantization_status': 'compressed',
    'config_groups': {
      f'group_{n}': {
        'targets': targets,
        'weights': _weights(scheme),
        'input_activations': None,
        'output_activations': None,
        'format': scheme.format,
      }
      for n, (scheme, targets) in enumerate(groups.items())
    },
    'ignore': ignored,
    'kv_cache_scheme': None,
  }


def _weights(scheme: schemes.Scheme) -> dict[str, Any]:
  """Returns the field `weights` of a group."""
  found = {
    'num_bits': scheme.bits,
    'type': 'float' if scheme.is_float else 'int',
    'symmetric': scheme.is_symmetric,
    'strategy': scheme.strategy,
    'group_size': scheme.size or None,
    'dynamic': False,
  }
  if scheme.block is not None:
    found['block_structure'] = list(scheme.block)
  if scheme.format in (schemes.MXFP4, schemes.MXFP8):
    found['scale_dtype'] = 'torch.uint8'
  elif scheme.format == schemes.NVFP4:
    found['scale_dtype'] = 'torch.float8_e4m3fn'
  return found
