"""Checkpoints of the package compressed-tensors, quantised by itself.

Scales are those of the smallest and the largest number, by the package's own
`calculate_qparams`.
"""

import pathlib

from tests.helpers.open_weights import hf_files, open_weights

# Widths of whole groups; more rows than a block of [64, 48], not a multiple.
SIZES = {
  'vocab_size': 400,  # ids of the tokenizer, and more
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}


def args(**fields):
  """Returns QuantizationArgs of a matrix."""
  from compressed_tensors import (  # pyright: ignore[reportMissingImports]
    quantization,
  )

  return quantization.QuantizationArgs(**fields)


def quantise(
  model,
  weights,
  *,
  targets=('Linear',),
  ignore=('lm_head',),
  form: str | None = None,
  inputs=None,
):
  """Quantises a model of transformers in place, as its config will say."""
  from compressed_tensors import (  # pyright: ignore[reportMissingImports]
    compressors,
    quantization,
  )

  scheme = quantization.QuantizationScheme(
    targets=list(targets), weights=weights, input_activations=inputs
  )
  quantization.apply_quantization_config(
    model,
    quantization.QuantizationConfig(
      config_groups={'group_0': scheme}, ignore=list(ignore)
    ),
    show_progress=False,
  )
  for module in model.modules():
    if getattr(module, 'quantization_scheme', None) is not None:
      _calibrate(module, weights)
  compressor = compressors.ModelCompressor.from_pretrained_model(
    model, quantization_format=form
  )
  compressor.compress_model(model)
  return compressor


def _calibrate(module, weights) -> None:
  """Sets scales and zeros of a module."""
  from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
    utils,
  )
  import torch

  w = module.weight.data
  low, high = _extremes(w, weights)
  gain = None
  if hasattr(module, 'weight_global_scale'):
    gain = utils.generate_gparam(w.amin().reshape(1), w.amax().reshape(1))
    module.weight_global_scale.data.copy_(gain)
  scale, zero = utils.calculate_qparams(low, high, weights, global_scale=gain)
  module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
  if not weights.symmetric:
    zero = zero.reshape(module.weight_zero_point.shape)
    module.weight_zero_point.data.copy_(zero)
  for name in ('input_scale', 'input_global_scale'):
    if hasattr(module, name):
      getattr(module, name).data.copy_(torch.tensor(0.05))


def _extremes(w, weights):
  """Returns the smallest and the largest number of each tile."""
  import torch

  rows, columns = w.shape
  strategy = str(weights.strategy)
  if strategy == 'tensor':
    return w.amin().reshape(1), w.amax().reshape(1)
  if strategy == 'block':
    of_out, of_in = weights.block_structure
    w = torch.nn.functional.pad(w, (0, -columns % of_in, 0, -rows % of_out))
    tiles = w.reshape(-(-rows // of_out), of_out, -(-columns // of_in), of_in)
    return tiles.amin((1, 3)), tiles.amax((1, 3))
  size = columns if strategy == 'channel' else weights.group_size
  tiles = w.reshape(rows, -1, size)
  return tiles.amin(-1), tiles.amax(-1)


def linears(tensors):
  """Returns a torch module with these tensors: matrices are Linear layers.

  Args:
    tensors: names and values, with a Linear layer for each expert, as in the
      checkpoints that the package makes. The modules of transformers 5 have one
      parameter for all experts, which it does not quantise.
  """
  import torch

  root = torch.nn.Module()
  for name, x in tensors:
    *owners, last, kind = name.split('.')
    place = root
    for owner in owners:
      if not hasattr(place, owner):
        place.add_module(owner, torch.nn.Module())
      place = getattr(place, owner)
    leaf, x = torch.nn.Module(), torch.tensor(x)
    if x.ndim == 2 and not last.startswith('embed'):
      leaf = torch.nn.Linear(x.shape[1], x.shape[0], bias=False)
    setattr(leaf, kind, torch.nn.Parameter(x))
    place.add_module(last, leaf)
  return root


def save(model, compressor, directory: pathlib.Path) -> pathlib.Path:
  """Saves a quantised model as llm-compressor does."""
  open_weights.save(model, directory)
  hf_files.llama3(directory)
  compressor.update_config(str(directory))
  return directory
