"""The frozen predictor of effort: one JSON file that crosses to serving.

It holds the weights of `models/effort_predictor.py`, the names of the efforts,
and the digest of the language model whose hidden states it reads. With another
model its numbers would be meaningless, so another model is refused.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from checks import expect
from models import effort_predictor
from storage import atomic

_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
  """The weights of a predictor, and the efforts and model that they fit."""

  params: dict[str, np.ndarray]
  efforts: tuple[str, ...]
  weights_digest: str  # digest of the features' model; '': unknown
  pooling: str = 'last'  # pooling of the hidden states among the features

  def __call__(self, features_BF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns P(correct) and the expected FLOPs, float64 [B, E] each.

    Raises:
      ValueError: the features have another width.
    """
    features_BF = np.asarray(features_BF, np.float32)
    width = len(self.params['mean_F'])
    if features_BF.ndim != 2 or features_BF.shape[1] != width:
      raise ValueError(
        f'features: got shape {features_BF.shape}, expected [B, {width}]'
      )
    params = {name: jax.numpy.asarray(x) for name, x in self.params.items()}
    inputs_BF = jax.numpy.asarray(features_BF)
    probs_BE = jax.nn.sigmoid(effort_predictor.logits(params, inputs_BF))
    costs_BE = effort_predictor.costs(params, inputs_BF)
    return np.asarray(probs_BE, np.float64), np.asarray(costs_BE, np.float64)


def save(path: str | os.PathLike, predictor: Predictor) -> None:
  """Writes a predictor."""
  tree = {
    'format': 'effort_predictor',
    'version': _VERSION,
    'efforts': list(predictor.efforts),
    'weights_digest': predictor.weights_digest,
    'pooling': predictor.pooling,
    'params': {
      name: np.asarray(x, np.float32).tolist()
      for name, x in predictor.params.items()
    },
  }
  atomic.write_text(pathlib.Path(path), json.dumps(tree) + '\n')


def read(path: str | os.PathLike, weights_digest: str = '') -> Predictor:
  """Returns the predictor of a file.

  Args:
    path: the file.
    weights_digest: digest of the model that will compute the features; ''
      accepts any model.

  Raises:
    ValueError: the file is no predictor, or belongs to another model.
    OSError: it cannot be read.
  """
  name = os.fspath(path)
  try:
    tree = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    if tree['format'] != 'effort_predictor' or tree['version'] != _VERSION:
      raise ValueError(f'format {tree["format"]!r}, version {tree["version"]}')
    params = {k: np.asarray(v, np.float32) for k, v in tree['params'].items()}
    efforts = tuple(map(str, tree['efforts']))
    found = Predictor(
      params=params,
      efforts=efforts,
      weights_digest=str(tree['weights_digest']),
      pooling=str(tree['pooling']),
    )
    _check_shapes(params, len(efforts))
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{name}: got no such file, expected the file of a predictor; python -m'
      ' training.effort makes one'
    ) from None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{name}: got no predictor of effort ({type(error).__name__}:'
      f' {expect.shown(str(error))}), expected a file that python -m'
      ' training.effort has written'
    ) from None
  if weights_digest and found.weights_digest != weights_digest:
    raise ValueError(
      f'{name}: got the predictor of the model {found.weights_digest!r},'
      f' expected the one of {weights_digest!r}; log outcomes with this model'
      ' and fit again'
    )
  return found


def _check_shapes(params: dict[str, Any], num_efforts: int) -> None:
  """Raises ValueError if the arrays do not fit together, or are not finite."""
  num_features, num_hidden = params['inner_FH'].shape
  expected = jax.eval_shape(
    lambda key: effort_predictor.init(
      key, num_features, num_hidden, num_efforts
    ),
    jax.random.key(0),
  )
  if {k: v.shape for k, v in params.items()} != {
    k: v.shape for k, v in expected.items()
  }:
    raise ValueError('arrays of other shapes')
  if not all(np.all(np.isfinite(x)) for x in params.values()):
    raise ValueError('numbers that are not finite')
