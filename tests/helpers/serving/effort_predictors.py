"""Predictors of effort that are known: more effort helps longer prompts."""

import jax
import numpy as np

from frozen import effort_predictor
from inference.search.routing import features
from models import effort_predictor as network

EFFORTS = 'once', 'self_consistency:4'
FLOPS = 1e3, 1e12  # that they are said to cost


def of_length(
  model_width: int,
  digest: str,
  *,
  least: int,
  efforts: tuple[str, str] = EFFORTS,
  flops: tuple[float, float] = FLOPS,
) -> effort_predictor.Predictor:
  """Returns a predictor that prefers the second effort of long prompts.

  Args:
    model_width: D of the model.
    digest: of the model's weights.
    least: tokens from which the second effort is more probably right.
    efforts: two.
    flops: that each of them costs.
  """
  num_features = model_width + features.NUM_SCALARS
  params = network.init(jax.random.key(0), num_features, 1, 2)
  inner_FH = np.zeros((num_features, 1), np.float32)
  inner_FH[-1] = 1.0  # the log of the length
  params |= {
    'inner_FH': inner_FH,
    'inner_H': np.array([-np.log(least - 0.5)], np.float32),
    'outer_HE': np.array([[0.0, 6.0]], np.float32),
    'least_cost_E': np.array(flops, np.float32),
  }
  return effort_predictor.Predictor(
    params={name: np.asarray(x) for name, x in params.items()},
    efforts=efforts,
    weights_digest=digest,
  )
