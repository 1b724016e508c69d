"""Measurements of claims about optimizers and their solutions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evals import claims as claims_lib
from models import model_config
from studies.papers import port
from training.optimizer import chain, update_rules

_WIDTH = 64  # of a matrix whose norm is followed
_RATE, _DECAY, _BETA1 = 0.01, 0.5, 0.9
_POINTS, _UNITS = 20, 32  # of a network at the edge of stability
_FEATURES, _DIMENSIONS, _DRAWN = 20, 5, 1024


def _optimizer(
  config: chain.OptimizerConfig, num_steps: int, params: Any
) -> optax.GradientTransformation:
  """Returns the optimizer of a run with these params."""
  # Only muP reads the sizes of a model.
  sizes = model_config.ModelConfig(
    vocab_size=2, num_layers=1, model_width=2, num_heads=1, num_kv_heads=1,
    head_width=2, mlp_width=2, max_length=2,
  )  # fmt: skip
  return chain.make_optimizer(config, num_steps, sizes, params)


def _matrix(kernel: jax.Array) -> Any:
  """Returns params with one matrix, named as in a model."""
  return {'params': {'layer_0': {'mlp': {'up': {'kernel': kernel}}}}}


def newton_schulz(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the extreme singular values of an update of Muon."""
  least, largest = claim.quantities
  config = chain.OptimizerConfig(
    rule=update_rules.Muon(momentum=0.0),
    peak_lr=1.0, schedule='constant', warmup_steps=0, weight_decay=0.0,
    clip_norm=0.0,
  )  # fmt: skip
  found: dict[str, list[float]] = {least.name: [], largest.name: []}
  for seed in setting.seeds:
    gradient = _matrix(jax.random.normal(jax.random.key(seed), (256, 128)))
    optimizer = _optimizer(config, 1, gradient)
    update, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    values = np.linalg.svd(jax.tree.leaves(update)[0], compute_uv=False)
    found[least.name].append(float(values.min()))
    found[largest.name].append(float(values.max()))
  return found


def weight_equilibrium(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the norm and the turn of a random walk, over the formulas."""
  norm, angle = claim.quantities
  num_steps = 2000
  config = chain.OptimizerConfig(
    rule=update_rules.AdamW(beta1=_BETA1, beta2=0.999),
    peak_lr=_RATE, schedule='constant', warmup_steps=0, weight_decay=_DECAY,
    clip_norm=0.0,
  )  # fmt: skip
  params = _matrix(jnp.ones((_WIDTH, _WIDTH)))
  optimizer = _optimizer(config, num_steps, params)

  def step(carry, key):
    params, state = carry
    gradient = _matrix(jax.random.normal(key, (_WIDTH, _WIDTH)))
    updates, state = optimizer.update(gradient, state, params)
    new = optax.apply_updates(params, updates)
    lengths = optax.tree.norm(params), optax.tree.norm(new)
    cosine = optax.tree.vdot(params, new) / (lengths[0] * lengths[1])
    return (new, state), (lengths[1], jnp.arccos(jnp.minimum(cosine, 1.0)))

  @jax.jit
  def walk(key):
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(key, num_steps))[1]

  expected_norm = _WIDTH * (_RATE / (2 * _DECAY)) ** 0.5
  share = (1 - _BETA1) / (1 + _BETA1)
  expected_angle = (2 * _RATE * _DECAY * share) ** 0.5
  walks = [walk(jax.random.key(seed)) for seed in setting.seeds]
  # The first half forgets the start: it decays by exp(-rate decay) a step.
  half = num_steps // 2
  return {
    norm.name: [float(n[half:].mean()) / expected_norm for n, _ in walks],
    angle.name: [float(a[half:].mean()) / expected_angle for _, a in walks],
  }


def edge_of_stability(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the sharpness that gradient descent ends with, times rate / 2."""
  found = {}
  for quantity, rate in zip(claim.quantities, (0.12, 0.16), strict=True):
    found[quantity.name] = [
      _last_sharpness(seed, rate) * rate / 2 for seed in setting.seeds
    ]
  return found


def _last_sharpness(seed: int, rate: float) -> float:
  x_P = jnp.linspace(-1, 1, _POINTS)
  y_P = jnp.cos(4 * jnp.arccos(x_P))  # the polynomial T_4
  keys = jax.random.split(jax.random.key(seed), 2)
  start = jnp.concatenate(
    [
      jax.random.normal(keys[0], (2 * _UNITS,)),
      jax.random.normal(keys[1], (_UNITS,)) / _UNITS**0.5,
    ]
  )

  def loss(params):
    slopes, shifts, outs = params.reshape(3, _UNITS)
    hidden = jnp.tanh(x_P[:, None] * slopes + shifts)
    return jnp.mean((hidden @ outs - y_P) ** 2) / 2

  @jax.jit
  def descend(params):
    def step(params, _):
      return params - rate * jax.grad(loss)(params), None

    return jax.lax.scan(step, params, length=200)[0]

  @jax.jit
  def sharpness(params):
    return jnp.linalg.eigvalsh(jax.hessian(loss)(params))[-1]

  params, seen = start, []
  for _ in range(80):
    params = descend(params)
    seen.append(float(sharpness(params)))
  return float(np.mean(seen[60:]))


def superposition(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the number of features, as the squared norm of the weights."""
  return {
    quantity.name: [_num_features(seed, share) for seed in setting.seeds]
    for quantity, share in zip(claim.quantities, (1.0, 0.01), strict=True)
  }


def _num_features(seed: int, active: float) -> float:
  """Trains x -> relu(W' W x + b) on features that are active so often."""
  importance_F = 0.7 ** jnp.arange(_FEATURES)
  optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, 4000))
  start = {
    'w': jax.random.normal(jax.random.key(seed), (_DIMENSIONS, _FEATURES))
    * (_FEATURES**-0.5),
    'b': jnp.zeros(_FEATURES),
  }

  def loss(params, key):
    values_key, active_key = jax.random.split(key)
    shape = _DRAWN, _FEATURES
    x = jax.random.uniform(values_key, shape) * (
      jax.random.uniform(active_key, shape) < active
    )
    out = jax.nn.relu(x @ params['w'].T @ params['w'] + params['b'])
    # Over the rate of activity: else sparse features would have no gradient.
    return jnp.mean(importance_F * (out - x) ** 2) / active

  def step(carry, key):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, key), state)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def train(key):
    carry = start, optimizer.init(start)
    return jax.lax.scan(step, carry, jax.random.split(key, 4000))[0][0]

  weights = train(jax.random.key(seed + 1000))['w']
  return float(jnp.sum(weights**2))
