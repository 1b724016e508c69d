"""A small network: how probable is a right answer at each level of effort?

    logits_BE = logits(params, features_BF)
    costs_BE = costs(params, features_BF)

The features are of one prefill of the question (`inference/search/routing/`).
Training fits the weights to logged outcomes (`training/effort/`), and serving
chooses an effort by their predictions. The table of a frozen predictor has the
names of the efforts. F features, H hidden units, E efforts in this file.

A calibrated logit is a line in the network's own (Platt 1999), one line for
each effort; temperature scaling (Guo et al. 2017, arXiv:1706.04599) is the case
without an offset.
"""

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]


def init(
  key: jax.Array, num_features: int, num_hidden: int, num_efforts: int
) -> Params:
  """Returns weights of the network; features are taken as they are."""
  inner, outer = jax.random.split(key)
  return {
    'mean_F': jnp.zeros(num_features),
    'scale_F': jnp.ones(num_features),
    'inner_FH': jax.random.normal(inner, (num_features, num_hidden))
    / num_features**0.5,
    'inner_H': jnp.zeros(num_hidden),
    'outer_HE': jax.random.normal(outer, (num_hidden, num_efforts))
    / num_hidden**0.5,
    'outer_E': jnp.zeros(num_efforts),
    'slope_E': jnp.ones(num_efforts),
    'offset_E': jnp.zeros(num_efforts),
    'cost_FE': jnp.zeros((num_features, num_efforts)),
    'cost_E': jnp.zeros(num_efforts),
    'least_cost_E': jnp.zeros(num_efforts),
  }


def logits(params: Params, features_BF: jax.Array) -> jax.Array:
  """Returns the calibrated logits of a right answer, float32 [B, E]."""
  raw_BE = raw_logits(params, features_BF)
  return raw_BE * params['slope_E'][None] + params['offset_E'][None]


def raw_logits(params: Params, features_BF: jax.Array) -> jax.Array:
  """Returns the logits before calibration, float32 [B, E]."""
  inner_BH = jnp.tanh(
    _scaled(params, features_BF) @ params['inner_FH'] + params['inner_H'][None]
  )
  return inner_BH @ params['outer_HE'] + params['outer_E'][None]


def costs(params: Params, features_BF: jax.Array) -> jax.Array:
  """Returns the expected cost at each effort, float32 [B, E].

  In the unit of the outcomes. Never below the least cost that was logged.
  """
  scaled_BF = _scaled(params, features_BF)
  costs_BE = scaled_BF @ params['cost_FE'] + params['cost_E'][None]
  return jnp.maximum(costs_BE, params['least_cost_E'][None])


def _scaled(params: Params, features_BF: jax.Array) -> jax.Array:
  centred_BF = features_BF - params['mean_F'][None]
  return centred_BF / params['scale_F'][None]
