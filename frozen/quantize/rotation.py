"""A model of the same function, in which no channel is larger than the others.

The residual stream x becomes x R, with an orthogonal matrix R. A kernel W that
writes to it becomes W R, and one that reads it R' W. An RMSNorm divides by the
length, which R keeps, so it may stand before R or after it once its scale is
folded into the kernels that read its output. Values of each head are turned,
too, and turned back by the projection out of attention. Large channels, for
which a few bits are too coarse, are spread over all channels. Served weights
need nothing more: QuaRot, arXiv:2404.00456, section 4, stage 1; SliceGPT,
arXiv:2401.15024, section 3.

R is a Hadamard matrix with random signs. Where a width is 2^n times an odd
number, it is the Kronecker product with a random orthogonal matrix.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import numpy as np
import scipy.linalg

from models import model_config

# Of a layer, by path: what reads the stream behind a norm, and what writes.
_READERS = {
  'attention_norm': tuple(f'attention/{x}' for x in ('query', 'key', 'value')),
  'mlp_norm': (
    *(
      f'{owner}/{x}' for owner in ('mlp', 'moe/shared') for x in ('up', 'gate')
    ),
    'moe/router',
    'moe/expert_up',
    'moe/expert_gate',
  ),
}
_WRITERS = 'attention/out', 'mlp/down', 'moe/shared/down', 'moe/expert_down'


def check(config: model_config.ModelConfig) -> None:
  """Raises ValueError for a model whose stream cannot be turned."""
  for name, got, expected, why in (
    ('norm', config.norm, 'rmsnorm', 'a LayerNorm subtracts the mean'),
    (
      'norm_place',
      config.norm_place,
      'before',
      'a norm behind attention or MLP scales channels of the stream',
    ),
  ):
    if got != expected:
      raise ValueError(
        f'--rotate: got a model with {name} = {got!r}, expected {expected!r},'
        f' since {why}; quantise it without --rotate'
      )


def _check_known(path: str) -> None:
  """Raises ValueError for a kernel of a layer that is none of the above."""
  layer, _, name = path.partition('/')
  known = *(x for names in _READERS.values() for x in names), *_WRITERS
  is_kernel = layer.startswith('layer_') and name.endswith('/kernel')
  if is_kernel and name.removesuffix('/kernel') not in known:
    raise ValueError(
      f'--rotate: got a model with {path}, expected kernels of attention and'
      ' MLPs alone, since latents have norms of their own; quantise it without'
      ' --rotate'
    )


def matrix(width: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random orthogonal matrix, float64 [width, width]."""
  power = width & -width
  odd = width // power
  signs_D = rng.choice((-1.0, 1.0), width)
  q, r = np.linalg.qr(rng.normal(size=(odd, odd)))
  rest = q * np.sign(np.diag(r))  # uniform over all orthogonal ones
  hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
  return signs_D[:, None] * np.kron(hadamard, rest)


def rotated(
  params: Mapping[str, Any], config: model_config.ModelConfig, seed: int
) -> tuple[dict[str, Any], model_config.ModelConfig]:
  """Returns params of the same function, in their dtypes, and their config.

  The head has a table of its own then: that of the embedding has no scale of
  the last norm.

  Args:
    params: with separate layers.
    config: of the model.
    seed: of the random matrices.

  Raises:
    ValueError: the stream of the model cannot be turned.
  """
  check(config)
  rng = np.random.default_rng(seed)
  turn_DD = matrix(config.model_width, rng)
  flat: dict[str, Any] = traverse_util.flatten_dict(params['params'], sep='/')
  for path in flat:
    _check_known(path)
  found = {path: np.asarray(x, np.float64) for path, x in flat.items()}
  head = 'head/embedding'
  if config.tie_embeddings:
    found[head], flat[head] = found['embed/embedding'], flat['embed/embedding']
  found[head] = (
    found[head] * _take_scale(found, 'final_norm/scale', config) @ turn_DD
  )
  for path in ('embed/embedding', 'position_embed/embedding'):
    if path in found:
      found[path] = found[path] @ turn_DD
  for n in range(config.num_layers):
    values_CC = matrix(config.value_head_width, rng)
    _turn_layer(found, f'layer_{n}/', turn_DD, values_CC, config)
  made = {path: x.astype(flat[path].dtype) for path, x in found.items()}
  tree = traverse_util.unflatten_dict(made, sep='/')
  return {'params': tree}, dataclasses.replace(config, tie_embeddings=False)


def _take_scale(
  found: dict[str, np.ndarray], path: str, config: model_config.ModelConfig
) -> np.ndarray:
  """Returns the scale of a norm, which becomes 1."""
  start = float(config.norm_from_one)
  scale_D = found[path] + start
  found[path] = np.full_like(scale_D, 1 - start)
  return scale_D


def _turn_layer(
  found: dict[str, np.ndarray],
  layer: str,
  turn_DD: np.ndarray,
  values_CC: np.ndarray,
  config: model_config.ModelConfig,
) -> None:
  """Turns the kernels and biases of a layer, in place."""
  for norm, readers in _READERS.items():
    if f'{layer}{norm}/scale' not in found:
      continue  # a layer without MLP
    scale_D = _take_scale(found, f'{layer}{norm}/scale', config)
    for reader in readers:
      if (path := f'{layer}{reader}/kernel') in found:
        found[path] = turn_DD.T @ (scale_D[:, None] * found[path])
  for writer in _WRITERS:
    for name in ('kernel', 'bias'):
      if (path := f'{layer}{writer}/{name}') in found:
        found[path] = found[path] @ turn_DD
  width = len(values_CC)
  for name in ('kernel', 'bias'):
    if (path := f'{layer}attention/value/{name}') in found:
      whole = found[path]
      heads = whole.reshape(*whole.shape[:-1], -1, width)
      found[path] = (heads @ values_CC).reshape(whole.shape)
  path = f'{layer}attention/out/kernel'
  heads_HCD = found[path].reshape(-1, width, found[path].shape[-1])
  found[path] = (values_CC.T @ heads_HCD).reshape(found[path].shape)
