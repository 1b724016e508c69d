"""GGUF: a file of llama.cpp with a model of the Llama family.

The `gguf` package (requirements-hub.txt) parses the file and dequantises it row
by row. The weights become floats with the rounding of the file. In GGUF, the
rows of queries and keys are ordered for rotations of neighbours; here, they are
put into halves.

The tokenizer is that of the file (`gguf_tokenizer.py`), or that of the Hugging
Face directory of the same model.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from frozen.huggingface import (
  config_json,
  gguf_tokenizer,
  importing,
  layouts,
  tensor_map,
)
from models import model_config
from models.attention import rope_scaling
from text import hf_tokenizer

# Kinds of weights: plain floats, or groups of numbers that share a scale.
PLAIN = ('F32', 'F16', 'BF16')
QUANTIZED = ('Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K')
_ARCHITECTURE = 'llama'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in an open file."""

  path: pathlib.Path
  kind: str  # of PLAIN and QUANTIZED
  shape: tuple[int, ...]  # [out, in]
  data: Any  # mapped rows: of floats, or of bytes if quantised

  @property
  def dtype(self) -> str:
    """The name in safetensors, or GGML_ and the kind."""
    return self.kind if self.kind in PLAIN else f'GGML_{self.kind}'

  @property
  def place(self) -> tuple[str, int]:
    """The sort key in which tensors are read: their order in the file."""
    return str(self.path), int(self.data.ctypes.data)

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start` to `stop` - 1, as float32."""
    gguf = _library()
    kind = gguf.GGMLQuantizationType[self.kind]
    rows = np.asarray(self.data[start:stop])
    x = gguf.quants.dequantize(rows, kind)
    return np.asarray(x, np.float32).reshape((stop - start, *self.shape[1:]))

  def whole(self) -> np.ndarray:
    """Reads the whole tensor, as float32."""
    return self.rows(0, self.shape[0])


def open_file(path: str | os.PathLike) -> tuple[importing.Source, Any]:
  """Opens a GGUF file.

  Returns:
    The model, with the config.json of a Llama and the tensor names of GGUF, and
    the tensor map.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of another family, or has an unsupported kind of
      weights.
  """
  path = pathlib.Path(path)
  return _opened(path, _reader(path))


def _reader(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise FileNotFoundError(f'{path}: got no such file, expected a GGUF file')
  gguf = _library()
  try:
    return gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError) as error:
    raise ValueError(
      f'{path}: got {error}, expected a GGUF file; it is truncated or of'
      ' another format: copy it again'
    ) from None


def _opened(path: pathlib.Path, reader: Any) -> tuple[importing.Source, Any]:
  tensors = dict(_tensors(path, reader))
  divisors = tensors.pop('rope_freqs.weight', None)
  has_head = 'output.weight' in tensors
  values = _config(path, _metadata(reader), tensors, has_head)
  _, config = config_json.read(values, str(path))
  if divisors is not None:
    config = _divided(config, divisors.whole())
  return (
    importing.Source(str(path), _ARCHITECTURE, values, config, tensors),
    list(_pieces(config)),
  )


def import_file(
  path: str | os.PathLike,
  out: str | os.PathLike,
  *,
  tokenizer_source: str = '',
  dtype: str = 'auto',
  origin: Mapping[str, str] | None = None,
  recommended: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> importing.Imported:
  """Writes the model of a GGUF file as a frozen directory.

  Args:
    tokenizer_source: a directory with the tokenizer of the same model; '' takes
      the tokenizer of the file.
    dtype: one of `importing.DTYPES`; 'auto' is float32.
    origin: further fields of the manifest's origin.
    recommended: fields of generation_config.json, in addition to those of the
      file; only with the tokenizer of the file.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, or a file is damaged.
  """
  path = pathlib.Path(path)
  reader = _reader(path)
  source, pieces = _opened(path, reader)
  with (
    tempfile.TemporaryDirectory(prefix='gguf_tokenizer_') as own_dir,
    tempfile.TemporaryDirectory(prefix='tokenizer_') as tokenizer_dir,
  ):
    if not tokenizer_source:
      tokenizer_source = own_dir
      _write_tokenizer(path, reader, own_dir, recommended or {})
    tokenizer = hf_tokenizer.convert(tokenizer_source, tokenizer_dir)
    importing.check_vocabulary(source, tokenizer)
    generation, notes = importing.read_generation(
      pathlib.Path(tokenizer_source)
    )
    importing.check_ends(source, generation)
    return importing.freeze_source(
      source,
      out,
      pieces=pieces,
      dtype=dtype,
      tokenizer_dir=tokenizer_dir,
      tokenizer=tokenizer,
      generation=generation,
      notes=notes,
      origin={**(origin or {}), 'format': 'gguf'},
      overwrite=overwrite,
    )


def _write_tokenizer(
  path: pathlib.Path,
  reader: Any,
  directory: str,
  recommended: Mapping[str, Any],
) -> None:
  if not gguf_tokenizer.is_whole(reader.fields):
    raise ValueError(
      '--tokenizer: got none, expected a directory with the tokenizer.json of'
      f' the model; {path} has no byte-level BPE of its own'
    )
  try:
    gguf_tokenizer.write(reader.fields, pathlib.Path(directory), recommended)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _library() -> Any:
  try:
    import gguf
  except ImportError:
    raise ValueError(
      'gguf is not installed, expected it to read a GGUF file; pip install -r'
      ' requirements-hub.txt'
    ) from None
  return gguf


def _tensors(path: pathlib.Path, reader: Any) -> Iterator[tuple[str, Tensor]]:
  for found in reader.tensors:
    kind = found.tensor_type.name
    if kind not in (*PLAIN, *QUANTIZED):
      raise ValueError(
        f'{path}: got {found.name} of kind {kind}, expected one of'
        f' {", ".join((*PLAIN, *QUANTIZED))}; convert the model to one of them'
      )
    shape = tuple(int(n) for n in reversed(found.shape.tolist()))
    yield found.name, Tensor(path, kind, shape, found.data)


def _metadata(reader: Any) -> dict[str, Any]:
  """Returns the fields that describe the model, without the prefix llama."""
  found = {
    name: field.contents()
    for name, field in reader.fields.items()
    if not name.startswith(('GGUF.', 'tokenizer.'))
  }
  architecture = found.get('general.architecture')
  if architecture != _ARCHITECTURE:
    raise ValueError(
      f'got a GGUF file of architecture {architecture!r}, expected'
      f' {_ARCHITECTURE!r}: other families are read from safetensors'
    )
  prefix = f'{_ARCHITECTURE}.'
  return {
    name.removeprefix(prefix): _number(value)
    for name, value in found.items()
    if name.startswith(prefix)
  }


def _number(value: Any) -> Any:
  """Returns a float32 with its shortest decimals: 1e-5, not 9.99999974e-6."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(path, metadata, tensors, has_head) -> dict[str, Any]:
  """Returns the metadata as the fields of a config.json."""
  rest = dict(metadata)

  def take(name, *default):
    if name not in rest and not default:
      raise ValueError(f'{path}: got no llama.{name}, expected one')
    return rest.pop(name, *default)

  table = tensors.get('token_embd.weight')
  if table is None:
    raise ValueError(
      f'{path}: got no token_embd.weight, expected the embedding'
    )
  heads = take('attention.head_count')
  width = take('embedding_length')
  head_width = take('attention.key_length', width // heads)
  values = {
    'model_type': _ARCHITECTURE,
    'vocab_size': take('vocab_size', table.shape[0]),
    'hidden_size': width,
    'num_hidden_layers': take('block_count'),
    'intermediate_size': take('feed_forward_length'),
    'num_attention_heads': heads,
    'num_key_value_heads': take('attention.head_count_kv', heads),
    'head_dim': head_width,
    'max_position_embeddings': take('context_length'),
    'rms_norm_eps': take('attention.layer_norm_rms_epsilon'),
    'rope_theta': take('rope.freq_base', 10_000.0),
    'tie_word_embeddings': not has_head,
  }
  for name in ('attention.value_length', 'rope.dimension_count'):
    if (got := take(name, head_width)) != head_width:
      raise ValueError(
        f'{path}: got llama.{name} = {got}, expected {head_width}: a whole head'
      )
  scaling = take('rope.scaling.type', 'none')
  if scaling in ('linear', 'yarn'):
    values['rope_scaling'] = {
      'rope_type': scaling,
      'factor': take('rope.scaling.factor'),
      'original_max_position_embeddings': take(
        'rope.scaling.original_context_length', None
      ),
    }
  elif scaling != 'none':
    raise ValueError(
      f'{path}: got llama.rope.scaling.type = {scaling!r}, expected none,'
      ' linear or yarn'
    )
  take('rope.scaling.finetuned', None)  # says how the model was trained
  if rest:
    raise ValueError(
      f'{path}: got {", ".join(f"llama.{x}" for x in sorted(rest))}, expected'
      ' only fields of Llama; their effect on the model is not known here'
    )
  return values


def _divided(config, divisors: np.ndarray) -> model_config.ModelConfig:
  """Returns the model with its rotary frequencies divided, pair by pair."""
  values = tuple(float(x) for x in divisors.reshape(-1))
  return dataclasses.replace(
    config,
    rope_scaling=rope_scaling.RopeScaling(
      kind='longrope',  # with the same divisors for short and long texts
      original_length=config.max_length,
      short_divisors=values,
      long_divisors=values,
    ),
  )


def _pieces(config: model_config.ModelConfig) -> Iterator[tensor_map.Piece]:
  def piece(theirs, ours, layout=layouts.TRANSPOSED):
    return tensor_map.Piece(f'{theirs}.weight', (ours,), layout)

  def rotated(heads):
    order = layouts.halves_of_pairs(heads, 0, config.head_width)
    return layouts.joined([heads * config.head_width], order=order)

  yield piece('token_embd', 'embed/embedding', layouts.AS_IT_IS)
  yield piece('output_norm', 'final_norm/scale', layouts.AS_IT_IS)
  if not config.tie_embeddings:
    yield piece('output', 'head/embedding', layouts.AS_IT_IS)
  for n in range(config.num_layers):
    at, ours = f'blk.{n}', f'layer_{n}'
    for theirs, name in (
      ('attn_norm', 'attention_norm'),
      ('ffn_norm', 'mlp_norm'),
    ):
      yield piece(f'{at}.{theirs}', f'{ours}/{name}/scale', layouts.AS_IT_IS)
    for theirs, name, heads in (
      ('attn_q', 'query', config.num_heads),
      ('attn_k', 'key', config.num_kv_heads),
    ):
      leaf = f'{ours}/attention/{name}/kernel'
      yield piece(f'{at}.{theirs}', leaf, rotated(heads))
    for theirs, name in (
      ('attn_v', 'attention/value'),
      ('attn_output', 'attention/out'),
      ('ffn_gate', 'mlp/gate'),
      ('ffn_up', 'mlp/up'),
      ('ffn_down', 'mlp/down'),
    ):
      yield piece(f'{at}.{theirs}', f'{ours}/{name}/kernel')
