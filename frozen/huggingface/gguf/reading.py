"""Import of a GGUF file, llama.cpp's format, as a frozen directory.

A file is refused as soon as its header shows why: first for its architecture,
then for its tokenizer, then for its tensors. Matrices keep their blocks, byte
for byte, or become floats with the rounding of the file. The tokenizer comes
from the file, or from the Hugging Face directory of the same model.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from checks import expect
from frozen.huggingface import (
  config_json,
  fast_kernels,
  importing,
  tensor_map,
)
from frozen.huggingface.gguf import (
  families,
  header as header_lib,
  kept as kept_lib,
  names,
  refusals,
  tensors as tensors_lib,
  tokenizer as tokenizer_lib,
)
from models import model_config
from models.attention import rope_scaling
from text import hf_tokenizer

FLOAT, KEPT, AUTO = WEIGHTS = ('float', 'kept', 'auto')
_DIVISORS = 'rope_freqs.weight'
_SHORT, _LONG = 'rope_factors_short.weight', 'rope_factors_long.weight'


def open_file(
  path: str | os.PathLike,
) -> tuple[importing.Source, list[tensor_map.Piece]]:
  """Opens a GGUF file.

  Returns:
    The model, with a config.json and the tensor names of GGUF, and the tensor
    map.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of another family, or has an unsupported kind of
      weights.
  """
  return _opened(header_lib.read(path))


def _opened(
  header: header_lib.Header,
) -> tuple[importing.Source, list[tensor_map.Piece]]:
  values = families.read(header)
  where = str(header.path)
  found = header_lib.entries(header)
  tensors = tensors_lib.open_tensors(header.path, found)
  factors = {
    name: tensors.pop(name).whole().reshape(-1).tolist()
    for name in (_DIVISORS, _SHORT, _LONG)
    if name in tensors
  }
  if _LONG in factors and _SHORT in factors:
    values['rope_scaling'] |= {
      'short_factor': factors[_SHORT],
      'long_factor': factors[_LONG],
    }
  model_type, config = config_json.read(values, where)
  if _DIVISORS in factors:
    config = _divided(config, factors[_DIVISORS])
  return (
    importing.Source(where, model_type, values, config, tensors),
    names.pieces(model_type, config, values),
  )


def import_file(
  path: str | os.PathLike,
  out: str | os.PathLike,
  *,
  tokenizer_source: str = '',
  dtype: str = 'auto',
  weights: str = FLOAT,
  origin: Mapping[str, str] | None = None,
  recommended: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> importing.Imported:
  """Writes the model of a GGUF file as a frozen directory.

  Args:
    tokenizer_source: a directory with the tokenizer of the same model; '' takes
      the tokenizer of the file.
    dtype: one of `importing.DTYPES`, of floats; 'auto' is float32.
    weights: one of `WEIGHTS`: matrices become floats, keep their blocks, or
      keep their blocks if this machine computes with them fast.
    origin: further fields of the manifest's origin.
    recommended: fields of generation_config.json, in addition to the file's
      fields; only with the tokenizer of the file.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, or a file is damaged.
  """
  expect.one_of('weights', weights, WEIGHTS)
  header = refusals.check(path, has_tokenizer=bool(tokenizer_source))
  source, pieces = _opened(header)
  importing.check_tensors(source, pieces)
  with (
    tempfile.TemporaryDirectory(prefix='gguf_tokenizer_') as own_dir,
    tempfile.TemporaryDirectory(prefix='tokenizer_') as tokenizer_dir,
  ):
    if not tokenizer_source:
      tokenizer_source = own_dir
      _write_tokenizer(header, own_dir, recommended or {})
    tokenizer = hf_tokenizer.convert(tokenizer_source, tokenizer_dir)
    importing.check_vocabulary(source, tokenizer)
    generation, notes = importing.read_generation(
      pathlib.Path(tokenizer_source)
    )
    importing.check_ends(source, generation)
    kept = {}
    if weights != FLOAT:
      kept = kept_lib.blocks(source.tensors, pieces)
    if weights == AUTO:
      kept, why = fast_kernels.choose(kept)
      notes = [*notes, *why]
    return importing.freeze_source(
      source,
      out,
      pieces=pieces,
      kept=kept,
      record={'scheme': 'gguf', 'method': 'kept'},
      dtype=dtype,
      tokenizer_dir=tokenizer_dir,
      tokenizer=tokenizer,
      generation=generation,
      notes=notes,
      origin={**(origin or {}), 'format': 'gguf'},
      overwrite=overwrite,
    )


def _write_tokenizer(
  header: header_lib.Header, directory: str, recommended: Mapping[str, Any]
) -> None:
  try:
    tokenizer_lib.write(header.fields, pathlib.Path(directory), recommended)
  except ValueError as error:
    raise ValueError(f'{header.path}: {error}') from None


def _divided(
  config: model_config.ModelConfig, divisors: list[float]
) -> model_config.ModelConfig:
  """Returns the model with its rotary frequencies divided, pair by pair."""
  values = tuple(divisors)
  return dataclasses.replace(
    config,
    rope_scaling=rope_scaling.RopeScaling(
      kind='longrope',  # with the same divisors for short and long texts
      original_length=config.max_length,
      short_divisors=values,
      long_divisors=values,
    ),
  )
