"""Export of a frozen directory as a GGUF file, llama.cpp's format.

Kernels that were kept in the blocks of a GGUF file are written with the same
bytes. Other matrices become floats of the dtype of the directory, or blocks of
a requested kind. Vectors are float32, as llama.cpp reads them.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from checks import expect
from frozen import format as frozen_format, stored_kernels
from frozen.huggingface import exporting, tensor_map
from frozen.huggingface.gguf import (
  header as header_lib,
  kept,
  metadata,
  names,
  sampling,
  tensors as tensors_lib,
  token_fields,
)
from models import layout
from models.linear.stored import tree as stored_tree
from text import hf_files, hf_tokenizer, tokenizer as tokenizer_lib

# Kinds that matrices can be written in.
KINDS = ('auto', 'F32', 'F16', 'BF16', 'Q8_0', 'Q5_1', 'Q5_0', 'Q4_1', 'Q4_0')
_OF_DTYPE = {'float32': 'F32', 'bfloat16': 'BF16'}


@dataclasses.dataclass(frozen=True)
class _Planned:
  """A tensor that will be written."""

  piece: tensor_map.Piece
  shape: tuple[int, ...]
  kind: str

  @property
  def byte_shape(self) -> tuple[int, ...]:
    """Returns the shape in bytes."""
    _, numbers, num_bytes = header_lib.KINDS[self.kind]
    return (*self.shape[:-1], self.shape[-1] // numbers * num_bytes)


def export_file(
  source: str | os.PathLike,
  out: str | os.PathLike,
  *,
  family: str = '',
  kind: str = 'auto',
) -> exporting.Exported:
  """Writes a frozen directory as a GGUF file.

  Args:
    out: the file to write; must not exist.
    family: the `model_type` to write; '' for the family that the model was
      imported as, or else the first that computes the same function.
    kind: kind of matrices, one of `KINDS`; auto keeps their dtype.

  Raises:
    FileNotFoundError: there is no frozen directory.
    ValueError: no architecture computes this function, or `out` is there.
  """
  target = pathlib.Path(out).absolute()
  if target.exists():
    raise ValueError(
      f'{target}: got a file that is there, expected none; choose another --out'
    )
  expect.one_of('kind', kind, KINDS)
  library = tensors_lib.library()
  frozen = frozen_format.read(source)
  if frozen.manifest.step:  # rows of ids without a token are cut off
    frozen = frozen_format.read_whole(source)
  frozen, notes = exporting.trimmed(frozen)
  if frozen.manifest.heads:
    raise ValueError(
      f'{source}: got a reward model, expected a language model; export it to'
      ' a Hugging Face directory'
    )
  params, config = layout.unstack(frozen.params, frozen.config)
  described = metadata.describe(
    config,
    metadata.candidates(family, frozen.manifest.origin.get('family', '')),
    _optional(config),
  )
  pieces = names.pieces(described.model_type, config, described.values)
  leaves = stored_kernels.by_path(params['params'])
  dtype = _OF_DTYPE[frozen.manifest.dtype]
  planned = [_planned(piece, leaves, kind, dtype) for piece in pieces]
  tokens, more = _token_fields(frozen, config.vocab_size)
  recommended, unwritten = sampling.write(frozen.generation)
  fields = {
    'general.name': frozen.manifest.experiment,
    'general.quantization_version': library.GGML_QUANT_VERSION,
    **described.fields,
    **tokens,
    **recommended,
  }
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix='.partial_', dir=target.parent
  ) as partial:
    path = pathlib.Path(partial, target.name)
    _write(path, library, fields, described.factors, planned, leaves)
    os.replace(path, target)
  notes += [*_notes(planned, frozen.manifest.quantization, kind), *more]
  notes += unwritten
  return exporting.Exported(described.model_type, notes)


def _write(
  path: pathlib.Path,
  library: Any,
  fields: Mapping[str, Any],
  factors: Mapping[str, np.ndarray],
  planned: list[_Planned],
  leaves: Mapping[str, Any],
) -> None:
  """Writes a file; matrices are made one after the other."""
  writer = _writer(library, path, fields)
  for theirs, x in factors.items():
    writer.add_tensor_info(theirs, x.shape, x.dtype, x.nbytes)
  for each in planned:
    writer.add_tensor_info(
      each.piece.theirs,
      each.byte_shape,
      np.dtype(np.uint8),
      int(np.prod(each.byte_shape)),
      raw_dtype=library.GGMLQuantizationType[each.kind],
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for x in factors.values():
    writer.write_tensor_data(x)
  for x in _rows(planned, leaves, library):
    writer.write_tensor_data(x)
  writer.close()


def _optional(config) -> dict[str, header_lib.Listed]:
  """Returns the tensors that tell a reader facts which no field states."""
  shapes: dict[str, tuple[int, ...]] = {
    'token_embd.weight': (config.vocab_size, config.model_width)
  }
  if not config.tie_embeddings:
    shapes['output.weight'] = shapes['token_embd.weight']
  if config.num_experts:
    router = (config.num_experts, config.model_width)
    shapes['blk.0.ffn_gate_inp.weight'] = router
  if config.use_bias or config.out_bias:
    shapes['blk.0.attn_output.bias'] = (config.model_width,)
  if config.use_bias or config.mlp_bias:
    shapes['blk.0.ffn_down.bias'] = (config.model_width,)
  return {
    name: header_lib.Listed(name, shape, 0, 0) for name, shape in shapes.items()
  }


def _planned(
  piece: tensor_map.Piece, leaves: Mapping[str, Any], kind: str, dtype: str
) -> _Planned:
  """Returns a tensor in the requested kind, if its shape allows it."""
  shapes = [_shape(path, leaves[path]) for path in piece.ours]
  shape = tuple(piece.layout.shape(*shapes))
  if kind == 'auto':
    kind = kept.kind_of([leaves[path] for path in piece.ours]) or dtype
  _, numbers, _ = header_lib.KINDS[kind]
  # llama.cpp adds vectors and computes routers in float32.
  is_small = len(shape) == 1 or 'ffn_gate_inp' in piece.theirs
  if is_small or piece.theirs.startswith('position_embd'):
    kind = 'F32'
  elif shape[-1] % numbers:
    kind = 'F16'
  return _Planned(piece, shape, kind)


def _notes(
  planned: list[_Planned], quantization: Mapping[str, Any], kind: str
) -> Iterator[str]:
  """Yields a note for each part that is written unlike the source."""
  kernels = quantization.get('kernels', {}).values()
  forms = {kernel['form'] for kernel in kernels if 'form' in kernel}
  if forms:
    yield f'kernels in {", ".join(sorted(forms))} became floats first'
  num = sum(each.kind == 'F16' for each in planned)
  if num and kind not in ('auto', 'F16'):
    yield f'{num} matrices are in F16: their rows are no whole blocks of {kind}'


def _shape(path: str, leaf: Any) -> tuple[int, ...]:
  """Returns the shape of a leaf in floats; a stored table is turned."""
  is_turned = stored_tree.is_stored(leaf) and path.endswith('/embedding')
  return tuple(leaf.shape[::-1] if is_turned else leaf.shape)


def _whole(path: str, leaf: Any) -> np.ndarray:
  """Returns a leaf in floats."""
  if not stored_tree.is_stored(leaf):
    return np.asarray(leaf)
  x = np.asarray(leaf.whole(jnp.float32))
  return x.T if path.endswith('/embedding') else x


def _rows(
  planned: list[_Planned], leaves: Mapping[str, Any], library: Any
) -> Iterator[np.ndarray]:
  """Yields the bytes of each tensor."""
  for each in planned:
    parts = [leaves[path] for path in each.piece.ours]
    if kept.kind_of(parts) == each.kind:
      yield kept.rows(each.piece, parts)
      continue
    floats = [_whole(path, leaves[path]) for path in each.piece.ours]
    x = np.ascontiguousarray(each.piece.layout.write(*floats))
    if each.kind in tensors_lib.PLAIN:
      yield x.astype(tensors_lib.PLAIN[each.kind]).view(np.uint8)
    else:
      kind = library.GGMLQuantizationType[each.kind]
      yield library.quants.quantize(x.astype(np.float32), kind)


def _token_fields(
  frozen: frozen_format.Frozen, num_ids: int
) -> tuple[dict[str, Any], list[str]]:
  """Returns the fields of the tokenizer, and notes for the user."""
  found = tokenizer_lib.load(frozen.tokenizer_dir)
  try:
    if found.kind not in ('huggingface', hf_files.TRAINED):
      raise ValueError(f'got a tokenizer of kind {found.kind}, expected a BPE')
    files = hf_files.read_saved(frozen.tokenizer_dir)
    return token_fields.fields(
      hf_tokenizer.load(frozen.tokenizer_dir),
      hf_files.specification(files),
      num_ids=num_ids,
      stop_ids=list(frozen.generation.get('stop_ids', ())),
      chat_template=frozen.chat_template,
    )
  except ValueError as error:
    note = f'no tokenizer was written, llama.cpp has none like it: {error}'
    return {'tokenizer.ggml.model': 'none'}, [note]


def _writer(library: Any, path: pathlib.Path, fields: Mapping[str, Any]) -> Any:
  architecture = fields['general.architecture']
  writer = library.GGUFWriter(path, architecture)
  kinds = library.GGUFValueType
  for name, value in fields.items():
    if name == 'general.architecture':  # the writer has written it
      continue
    if isinstance(value, np.ndarray):
      writer.add_array(name, value.tolist())
    elif isinstance(value, np.integer):  # a number that may be negative
      writer.add_key_value(name, int(value), kinds.INT32)
    elif isinstance(value, list):
      writer.add_array(name, value)
    else:
      kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32}.get(
        type(value), kinds.STRING
      )
      writer.add_key_value(name, value, kind)
  return writer
