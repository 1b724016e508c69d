"""The two files of a peft adapter, written and read.

    adapter_config.json         rank, alpha, and the layers that are adapted
    adapter_model.safetensors   A [r, in] and B [out, r] of each layer

`tensor_map` knows which of their modules holds which of our layers. Where their
module joins several layers (query, key and value in one matrix), it has one
adapter for all of them: its A has the rows of all our A's, and its B their
columns, with zeros between layers. Read back, each of our layers gets the whole
A. A matrix of experts, an embedding and a head have no adapter here.

In families with experts, peft takes the name of any MLP for the experts, which
are one tensor there. So it loads adapters of attention only; all others are
read here.

Reference: peft 0.21 (`peft.utils.save_and_load`, `peft.tuners.lora`).
"""

import collections
from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from checks import expect
from frozen import format as frozen_format, stored_kernels
from frozen.huggingface import (
  config_json,
  exporting,
  layouts,
  safetensors_files,
  tensor_map,
)

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_NAME = re.compile(
  r'(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector)'
  r'(?:\.default)?(?:\.weight)?'
)
# Fields of adapter_config.json that change the function in a way that this code
# does not compute, with the values that change nothing.
_REFUSED: Mapping[str, Sequence[Any]] = {
  'bias': ('none',),
  'lora_bias': (False,),
  'modules_to_save': (None, []),
  'layer_replication': (None, []),
  'trainable_token_indices': (None, [], {}),
  'target_parameters': (None, []),
  'alora_invocation_tokens': (None,),
  'use_qalora': (False,),
  'use_bdlora': (None, False),
  'velora_config': (None,),
  'monteclora_config': (None,),
  'arrow_config': (None,),
  'kasa_config': (None,),
}
# Ways to start an adapter that also change the weights of the base.
_CHANGES_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


class Layer(NamedTuple):
  """The adapter of one of our layers, as it was trained; NumPy, float32."""

  a: np.ndarray  # [in, r]
  b: np.ndarray  # [r, out], without the scale
  alpha: float
  scale: float
  magnitude: np.ndarray | None = None  # [out], for DoRA


class Files(NamedTuple):
  """The adapter of a directory."""

  layers: dict[str, Layer]  # by path, such as layer_0/mlp/up
  rslora: bool
  dora: bool


def check_family(base: frozen_format.Opened) -> None:
  """Raises ValueError unless peft can adapt the model of a frozen directory."""
  _pieces(base)


def write(
  directory: pathlib.Path, files: Files, base: frozen_format.Opened
) -> None:
  """Writes both files into a directory that exists.

  Raises:
    ValueError: no family of `transformers` computes the model.
  """
  tensors: dict[str, np.ndarray] = {}
  sizes: dict[str, tuple[int, float]] = {}
  model_type, pieces = _pieces(base)
  for module, piece in pieces.items():
    owners = [path.removesuffix('/kernel') for path in piece.ours]
    layers = [files.layers.get(owner) for owner in owners]
    if not any(layers):
      continue
    a, parts, alpha = _joined(layers, _columns(base, owners), files.rslora)
    tensors[f'{_PREFIX}{module}.lora_A.weight'] = a.T
    b = piece.layout.write(*parts)
    # Conv1D of GPT-2 is [in, out], but its adapter is not.
    b = b.T if _is_as_ours(piece) else b
    tensors[f'{_PREFIX}{module}.lora_B.weight'] = b
    if files.dora:
      tensors[f'{_PREFIX}{module}.lora_magnitude_vector'] = _magnitude(
        piece, layers, module
      )
    sizes[module] = a.shape[1], alpha
  config = _config(files, sizes, set(pieces), model_type, base)
  text = json.dumps(config, indent=2, sort_keys=True)
  (directory / CONFIG).write_text(text + '\n', encoding='utf-8')
  safetensors_files.write_file(
    directory / WEIGHTS, tensors, np.dtype(np.float32)
  )


def _pieces(base) -> tuple[str, dict[str, tensor_map.Piece]]:
  """Returns the family, and the piece of each module with one matrix."""
  try:
    model_type, values = exporting.describe(base)
  except ValueError as error:
    raise ValueError(
      f'freeze.merge_adapter: got False ({error}); set it to True, which needs'
      ' no family of transformers'
    ) from None
  config = base.config
  return model_type, {
    piece.theirs.removesuffix('.weight'): piece
    for piece in tensor_map.pieces(model_type, config, values)
    if piece.expert is None
    and all(path.endswith('/kernel') for path in piece.ours)
  }


def _is_as_ours(piece: tensor_map.Piece) -> bool:
  """Returns whether their matrix is [in, out], as ours are."""
  return piece.layout.shape(*[(2, 3)] * len(piece.ours))[0] == 2


def _columns(base, owners: list[str]) -> list[int]:
  leaves = stored_kernels.by_path(base.shapes['params'])
  return [leaves[f'{owner}/kernel'].shape[-1] for owner in owners]


def _joined(
  layers: Sequence[Layer | None], columns: Sequence[int], rslora: bool
) -> tuple[np.ndarray, list[np.ndarray], float]:
  """Returns A [in, R], the part of B of each layer [R, out], and alpha."""
  some = [layer for layer in layers if layer is not None]
  first = some[0]
  is_shared = all(np.array_equal(layer.a, first.a) for layer in some)
  if is_shared:
    a = first.a
  else:
    a = np.concatenate([layer.a for layer in some], axis=1)
  parts, start, rank = [], 0, a.shape[1]
  for layer, width in zip(layers, columns, strict=True):
    part = np.zeros((rank, width), np.float32)
    if layer is not None:
      stop = start + layer.a.shape[1]
      # One scale for the whole module, taken from the first layer.
      part[start:stop] = layer.b * np.float32(layer.scale / first.scale)
      start = 0 if is_shared else stop
    parts.append(part)
  alpha = first.alpha
  if rank != first.a.shape[1]:
    alpha = first.scale * (rank**0.5 if rslora else rank)
  return a, parts, alpha


def _magnitude(piece, layers, module) -> np.ndarray:
  if any(layer is None for layer in layers):
    raise ValueError(
      f'freeze.merge_adapter: got False with adapter.dora, and {module} is'
      ' adapted in part, expected all of it or nothing: its columns have one'
      ' vector of magnitudes; set freeze.merge_adapter, or adapt all of'
      f' {", ".join(piece.ours)}'
    )
  return _of_vectors(piece).write(*[layer.magnitude for layer in layers])


def _of_vectors(piece: tensor_map.Piece) -> layouts.Layout:
  """Returns the layout of a value per column, as of biases."""
  is_plain = piece.layout is tensor_map.TRANSPOSED
  return tensor_map.AS_IT_IS if is_plain else piece.layout


def _config(
  files: Files,
  sizes: Mapping[str, tuple[int, float]],
  modules: set[str],
  model_type: str,
  base: frozen_format.Opened,
) -> dict[str, Any]:
  """Returns adapter_config.json.

  Args:
    sizes: rank and alpha of each module that is adapted.
    modules: all modules that could be adapted.
  """
  (rank, alpha), _ = collections.Counter(sizes.values()).most_common(1)[0]
  ends: dict[str, list[str]] = collections.defaultdict(list)
  for name in sorted(modules):
    ends[name.rpartition('.')[2]].append(name)
  targets = []
  for end, names in ends.items():
    adapted = [name for name in names if name in sizes]
    # Written by the last name where all such modules are adapted, as users do.
    targets += [end] if len(adapted) == len(names) else adapted
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base.manifest.origin.get('source') or None,
    'inference_mode': True,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': model_type == 'gpt2',
    'use_rslora': files.rslora,
    'use_dora': files.dora,
    'target_modules': targets,
    'rank_pattern': {n: r for n, (r, _) in sizes.items() if r != rank},
    'alpha_pattern': {n: x for n, (_, x) in sizes.items() if x != alpha},
  }


def read(directory: pathlib.Path, base: frozen_format.Opened) -> Files:
  """Returns the adapter of a directory, for the model of a frozen directory.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, does something that is not computed here, or
      belongs to another model.
  """
  config = _read_config(directory)
  found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
  for name, tensor in safetensors_files.read_header(
    directory / WEIGHTS
  ).items():
    match = _NAME.fullmatch(name)
    if match is None:
      raise ValueError(
        f'{directory / WEIGHTS}: got {expect.shown(name)}, expected only'
        ' lora_A, lora_B and lora_magnitude_vector of linear layers; tables'
        ' of tokens and layers that were trained whole are not read'
      )
    found[match['module']][match['kind']] = tensor.whole().astype(np.float32)
  _, pieces = _pieces(base)
  layers: dict[str, Layer] = {}
  for module, tensors in found.items():
    if module not in pieces:
      raise ValueError(
        f'{directory / WEIGHTS}: got an adapter of {expect.shown(module)},'
        f' expected a linear layer of the base, as {next(iter(pieces))}; take'
        ' the frozen directory of the model that it was trained on'
      )
    layers |= _of_module(directory, module, tensors, pieces[module], config)
  if not layers:
    raise ValueError(
      f'{directory / WEIGHTS}: got no adapters, expected some; copy it again'
    )
  _check_shapes(directory, layers, base)
  return Files(
    layers, bool(config.get('use_rslora')), bool(config.get('use_dora'))
  )


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / CONFIG
  for needed in (path, directory / WEIGHTS):
    if not needed.is_file():
      raise FileNotFoundError(
        f'{needed}: got no such file, expected {CONFIG} and {WEIGHTS}, as'
        " peft's save_pretrained writes them"
      )
  config = config_json.read_object(path)
  if config.get('peft_type') != 'LORA':
    raise ValueError(
      f'{path}: got peft_type {expect.shown(config.get("peft_type"))}, expected'
      ' LORA; only low-rank adapters are read'
    )
  for name, neutral in _REFUSED.items():
    if name in config and config[name] not in neutral:
      raise ValueError(
        f'{path}: got {name} = {expect.shown(config[name])}, expected'
        f' {neutral[0]!r}: it is not computed here; merge the adapter with peft'
        ' and import the result'
      )
  start = str(config.get('init_lora_weights', ''))
  if start.startswith(_CHANGES_BASE):
    raise ValueError(
      f'{path}: got init_lora_weights = {start}, expected true: it changes the'
      ' weights of the base, too; convert the adapter with peft'
      ' (path_initial_model_for_weight_conversion)'
    )
  return config


def _of_module(directory, module, tensors, piece, config) -> dict[str, Layer]:
  """Returns the adapters of our layers that one of their modules holds."""
  wanted = {'A', 'B'} | (
    {'magnitude_vector'} if config.get('use_dora') else set()
  )
  if tensors.keys() != wanted:
    raise ValueError(
      f'{directory / WEIGHTS}: got lora_{", lora_".join(sorted(tensors))} of'
      f' {module}, expected lora_{", lora_".join(sorted(wanted))}; copy it'
      ' again'
    )
  a, b = tensors['A'].T, tensors['B']
  rank = a.shape[1]
  if b.shape[-1] != rank:
    raise ValueError(
      f'{directory / WEIGHTS}: got lora_A of rank {rank} and lora_B of rank'
      f' {b.shape[-1]} at {module}, expected one rank; copy it again'
    )
  alpha = config.get('lora_alpha', 8)
  for pattern, value in (config.get('alpha_pattern') or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      alpha = value
      break
  scale = alpha / (rank**0.5 if config.get('use_rslora') else rank)
  parts = piece.layout.read(b.T if _is_as_ours(piece) else b)
  norms: Sequence[Any] = [None] * len(parts)
  if config.get('use_dora'):
    vector = tensors['magnitude_vector'].reshape(-1)
    norms = _of_vectors(piece).read(vector)
  return {
    path.removesuffix('/kernel'): Layer(
      np.ascontiguousarray(a), np.ascontiguousarray(part), alpha, scale, norm
    )
    for path, part, norm in zip(piece.ours, parts, norms, strict=True)
  }


def _check_shapes(directory, layers: Mapping[str, Layer], base) -> None:
  leaves = stored_kernels.by_path(base.shapes['params'])
  for path, layer in layers.items():
    got = layer.a.shape[0], layer.b.shape[-1]
    expected = leaves[f'{path}/kernel'].shape[-2:]
    if got != expected:
      raise ValueError(
        f'{directory / WEIGHTS}: got an adapter of {got[0]} x {got[1]} for'
        f' {path}, expected {expected[0]} x {expected[1]}; take the frozen'
        ' directory of the model that it was trained on'
      )
    if not (np.isfinite(layer.a).all() and np.isfinite(layer.b).all()):
      raise ValueError(
        f'{directory / WEIGHTS}: got values of {path} that are not finite,'
        ' expected numbers; train it again'
      )
