"""The quantised checkpoints that are read, by `quant_method` of config.json.

    quantization_config   of config.json, whose every field is read
    tensors               of which a matrix has several

Nothing here loads JAX, so that a checkpoint that cannot be imported is refused
at once.
"""

from collections.abc import Mapping
import os
import pathlib
from typing import Any, NamedTuple

from checks import expect
from frozen.huggingface import config_json, safetensors_files
from frozen.huggingface.families import fields as fields_lib
from frozen.huggingface.quantised import (
  awq,
  compressed_tensors,
  fp8,
  gptq,
  opening,
)

FIELD = 'quantization_config'
FLOAT, KEPT, AUTO = WEIGHTS = ('float', 'kept', 'auto')
_PACKED = ('.qweight', '.weight_packed')
_METHODS = ('compressed-tensors', 'gptq', 'awq', 'fp8')


class Quantised(NamedTuple):
  """The quantisation of a checkpoint's matrices."""

  title: str  # method and format, for messages
  notes: list[str]  # for the user
  formats: tuple[str, ...]  # of compressed-tensors


def without_field(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a config.json that describe the model in floats."""
  return {name: value for name, value in values.items() if name != FIELD}


def method_of(values: Mapping[str, Any], where: str) -> opening.Method | None:
  """Returns the method of a config.json; None if its weights are floats.

  Args:
    values: its fields.
    where: path of the file, for errors.

  Raises:
    ValueError: the method, or a field of it, is not supported.
  """
  found = values.get(FIELD)
  if found is None:
    return None
  if not isinstance(found, dict) or not found:
    raise ValueError(
      f'{where}: got {FIELD} = {expect.shown(found)}, expected an object with a'
      ' quant_method; remove it if the weights are floats'
    )
  fields = fields_lib.Fields(found, where, f'{FIELD}.')
  method = fields.get('quant_method')
  if method not in _METHODS:
    fields.refuse('quant_method', f'one of {", ".join(_METHODS)}')
  if values.get('model_type') == 'gpt2':
    raise ValueError(
      f'{where}: got {FIELD}.quant_method = {method!r} of model_type gpt2,'
      ' expected another family: its matrices lie [in, out]; import the'
      ' checkpoint in floats'
    )
  if method == 'compressed-tensors':
    return compressed_tensors.read(fields, where)
  return {'gptq': gptq, 'awq': awq, 'fp8': fp8}[method].read(fields)


def opened(
  values: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Quantised | None]:
  """Returns tensors with matrices in place of their parts.

  Args:
    values: fields of config.json.
    tensors: tensors of the files, by name.
    where: the directory, for errors.

  Returns:
    The tensors, and how they are quantised; None if they are floats.

  Raises:
    ValueError: the checkpoint is not supported, or damaged.
  """
  path = str(pathlib.Path(where) / config_json.FILE)
  method = method_of(values, path)
  if method is None:
    _check_floats(tensors, path)
    return dict(tensors), None
  result, notes = opening.opened(method, tensors, where)
  formats = getattr(method, 'formats', ())
  return result, Quantised(method.title, [*method.notes, *notes], formats)


def _check_floats(tensors: Mapping[str, Any], path: str) -> None:
  """Raises ValueError for tensors of quantised matrices."""
  name = next((x for x in sorted(tensors) if x.endswith(_PACKED)), None)
  if name is not None:
    raise ValueError(
      f'{path}: got no {FIELD} and a quantised {name}, expected the field;'
      ' earlier programs wrote it as quantize_config.json: add it, with its'
      ' quant_method'
    )


def check(directory: str | os.PathLike) -> None:
  """Checks config and headers of a directory, quantised or not.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the model is not supported, or a file is damaged.
  """
  directory = pathlib.Path(directory)
  values = config_json.load(directory)
  path = str(directory / config_json.FILE)
  config_json.read(without_field(values), path)
  method_of(values, path)  # before the headers of many files
  opened(values, safetensors_files.open_directory(directory), str(directory))
