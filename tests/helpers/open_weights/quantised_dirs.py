"""Directories of tiny quantised models, packed here by plain loops.

The packers know nothing of the readers. They follow the descriptions of the
formats: a matrix [in, out] of codes, word by word, nibble by nibble.
"""

from collections.abc import Callable, Mapping
import json
import pathlib
from typing import Any
import zlib

import ml_dtypes
import numpy as np

from frozen.huggingface import config_json, exporting, safetensors_files
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files

# Widths of whole words and groups; blocks of 24 x 20 are partial.
CONFIG = tiny_models.llama_like(
  vocab_size=400, num_layers=2, model_width=32, head_width=8, mlp_width=48
)
# Without shared experts, as Mixtral.
MIXTURE = tiny_models.mixture(
  vocab_size=400, model_width=32, head_width=8, expert_width=48,
  num_active_experts=2, num_shared_experts=0,
)  # fmt: skip
Parts = Mapping[str, np.ndarray]


def write(
  directory: pathlib.Path,
  quantise: Callable[[str, np.ndarray], tuple[Parts, np.ndarray]],
  field: Mapping[str, Any],
  config=CONFIG,
  **fields,
) -> dict[str, np.ndarray]:
  """Writes a model whose matrices in layers are quantised.

  Args:
    quantise: returns parts by name, and the floats that they stand for, of the
      name of a module and its weight [out, in].
    field: quantization_config.
    config: of the model.
    fields: other fields of config.json.

  Returns:
    The floats of every matrix, by the name of its tensor.
  """
  params = frozen_dirs.params(config)
  family, values = config_json.write(config)
  pieces = exporting.tensor_map.pieces(family, config, values)
  tensors, floats = {}, {}
  for name, x in exporting.tensors_of(params, pieces):
    module, _, kind = name.rpartition('.')
    if kind == 'weight' and '.layers.' in name and np.ndim(x) == 2:
      parts, floats[name] = quantise(module, np.asarray(x, np.float32))
      tensors |= {f'{module}.{part}': y for part, y in parts.items()}
    else:
      tensors[name] = np.asarray(x, np.float32)
  save(directory, tensors)
  hf_files.llama3(directory)
  (directory / 'config.json').write_text(
    json.dumps(values | {'quantization_config': dict(field)} | fields)
  )
  return floats


def seed(module: str) -> int:
  """Returns a seed for the random codes of a module: no two share them."""
  return zlib.crc32(module.encode())


def save(directory: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors of any dtypes."""
  directory.mkdir(exist_ok=True)
  safetensors_files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    {name: x.dtype for name, x in tensors.items()},
    iter(tensors.items()),
  )


def load(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a directory."""
  found = safetensors_files.open_directory(directory)
  return {name: tensor.whole() for name, tensor in found.items()}


def words(codes: np.ndarray, bits: int, order=range(8)) -> np.ndarray:
  """Returns int32 words [rows, columns * bits / 32] of codes [rows, columns].

  Args:
    codes: not negative.
    bits: of a code.
    order: order[k] is the column, within a word's, that lies at bits k * bits.
  """
  per_word = 32 // bits
  rows, columns = codes.shape
  packed = np.zeros((rows, columns // per_word), np.uint32)
  for row in range(rows):
    for word in range(columns // per_word):
      value = 0
      for k in range(per_word):
        column = word * per_word + list(order)[k]
        value |= int(codes[row, column]) << (k * bits)
      packed[row, word] = value
  return packed.view(np.int32)


class Grouped:
  """Codes with a scale and a zero per group of inputs, [in, out]."""

  def __init__(
    self, w_OI, bits, size, *, seed=0, ordered=False, symmetric=False
  ):
    rng = np.random.default_rng(seed)
    outputs, inputs = w_OI.shape
    num_groups = -(-inputs // size)
    self.groups = np.arange(inputs) // size
    if ordered:
      self.groups = rng.permutation(self.groups)
    self.codes = rng.integers(0, 2**bits, (inputs, outputs))
    self.zeros = rng.integers(1, 2**bits, (num_groups, outputs))
    if symmetric:
      self.zeros[:] = 2 ** (bits - 1)
    scales = rng.uniform(0.01, 0.05, (num_groups, outputs))
    self.scales = scales.astype(np.float16)

  def floats(self) -> np.ndarray:
    """Returns the matrix, [out, in]."""
    inputs, outputs = self.codes.shape
    w_OI = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
      for o in range(outputs):
        group = self.groups[i]
        number = int(self.codes[i, o]) - int(self.zeros[group, o])
        w_OI[o, i] = np.float32(number) * np.float32(self.scales[group, o])
    return w_OI


def gptq(bits, size, *, version=1, ordered=False, symmetric=False):
  """Returns a quantiser to GPTQ's tensors; codes are random."""

  def quantise(module, w_OI):
    num = w_OI.shape[1] if size == -1 else size
    made = Grouped(
      w_OI, bits, num, seed=seed(module), ordered=ordered, symmetric=symmetric
    )
    stored = (made.zeros - (version == 1)) % 2**bits
    return {
      'qweight': words(made.codes.T, bits).T,
      'qzeros': words(stored, bits),
      'scales': made.scales,
      'g_idx': made.groups.astype(np.int32),
    }, made.floats()

  return quantise


def awq(size):
  """Returns a quantiser to AWQ's tensors; codes are random."""
  order = (0, 2, 4, 6, 1, 3, 5, 7)

  def quantise(module, w_OI):
    made = Grouped(w_OI, 4, size, seed=seed(module))
    return {
      'qweight': words(made.codes, 4, order),
      'qzeros': words(made.zeros, 4, order),
      'scales': made.scales,
    }, made.floats()

  return quantise


def fp8(block, *, scale='weight_scale_inv', dtype=np.float32):
  """Returns a quantiser to fp8 with a scale per block; None: per matrix."""

  def quantise(module, w_OI):
    rows, columns = w_OI.shape
    of_out, of_in = block or (rows, columns)
    tiles = -(-rows // of_out), -(-columns // of_in)
    codes = w_OI.astype(ml_dtypes.float8_e4m3fn)
    rng = np.random.default_rng(seed(module))
    scales = np.exp2(rng.integers(-3, 3, tiles)).astype(dtype)
    floats = np.zeros_like(w_OI)
    for row in range(rows):
      for column in range(columns):
        number = np.float32(codes[row, column])
        tile = row // of_out, column // of_in
        floats[row, column] = number * np.float32(scales[tile])
    parts = {'weight': codes, scale: scales if block else scales.reshape(1)}
    return parts, floats

  return quantise
