"""Measurements of claims about drawing several answers, and about KL."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evals import best_of_n as best_of_n_lib, claims as claims_lib
from evals.results import pass_at_k as pass_at_k_lib, voting as voting_lib
from studies import over_optimisation as lab
from studies.papers import port
from training.objectives import preference_losses
from training.objectives.policy import estimators

_NUM_ANSWERS = 1_000_000  # of the policy, all as likely
_NODES = 200  # of the quadrature


def best_of_n_kl(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns KL(best of n || policy), by enumeration of all answers.

  The answer of rank i among M is the best of n with probability (i/M)^n -
  ((i-1)/M)^n.
  """
  del claim, setting
  ranks = np.arange(_NUM_ANSWERS + 1) / _NUM_ANSWERS
  found = {}
  for n in (2, 4, 8, 16, 128):
    probs = np.diff(ranks**n)
    some = probs[probs > 0]
    found[f'n = {n}, nats'] = float(np.sum(some * np.log(some * _NUM_ANSWERS)))
    gap = abs(found[f'n = {n}, nats'] - best_of_n_lib.kl(n))
    # The formula of our own studies must agree.
    if gap > 1e-4:
      raise ValueError(f'best_of_n.kl({n}): got {gap} off the enumeration')
  return found


def kl_estimators(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns bias and deviation of k1, k2 and k3, over the true KL.

  Samples are of q = N(0, 1); the reference is p = N(mean, 1), as in the source.
  The expectations are Gauss-Hermite quadratures of the functions that train.
  """
  del claim, setting
  nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
  weights /= weights.sum()
  found = {}
  for mean in (0.1, 1.0):
    true = mean**2 / 2
    # log q(x) - log p(x)
    log_ratio = (mean**2 - 2 * mean * nodes) / 2
    for name in ('k1', 'k2', 'k3'):
      values = np.asarray(
        estimators.ESTIMATORS[name](log_ratio, 1.0), np.float64
      )
      average = float(weights @ values)
      deviation = math.sqrt(float(weights @ (values - average) ** 2))
      found[f'{name} deviation, p = N({mean:g}, 1)'] = deviation / true
      if name == 'k2':
        found[f'{name} bias, p = N({mean:g}, 1)'] = average / true - 1
  return found


def voting(claim: claims_lib.Claim, setting: port.Setting) -> port.Measured:
  """Returns the accuracy of a majority over easy and hard questions."""
  del claim, setting
  return {
    f'{votes} votes': voting_lib.mixed_accuracy((0.85, 0.4), (0.5, 0.5), votes)
    for votes in (1, 3, 5, 11, 101)
  }


def pass_at_k_law(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the exponent of 1 - pass@k, by the unbiased estimator.

  Problems are solved with a probability that is Beta(a, b) distributed. Their
  numbers of right samples are drawn, and estimated as any benchmark is.
  """
  del claim
  num_samples, num_problems, ks = 5_000, 10_000, (100, 1_000)
  slopes = []
  for seed in setting.seeds:
    rng = np.random.default_rng([seed, 0])
    difficulty = rng.beta(0.3, 3.0, num_problems)
    counts, repeats = np.unique(
      rng.binomial(num_samples, difficulty), return_counts=True
    )
    failing = [
      1 - np.average(
        pass_at_k_lib.values([num_samples] * len(counts), counts.tolist(), k),
        weights=repeats,
      )
      for k in ks
    ]  # fmt: skip
    slopes.append(
      float(np.log(failing[0] / failing[1]) / np.log(ks[1] / ks[0]))
    )
  return {'exponent': slopes}


def over_optimisation(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the fit of the form, and the fall after the peak, by seed."""
  del claim
  proxy = lab.PROXIES[0]
  results = [lab.measure(proxy, seed=seed) for seed in setting.seeds]
  return {
    'R^2 of the form': [result.fit.r_squared for result in results],
    'lost after the peak, gold reward': [
      result.curve.decline().value for result in results
    ],
  }


def pass_at_k_bias(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns expected estimates of pass@10 less the true one."""
  del setting
  num_samples, rate, k = 20, 0.1, 10
  true = 1 - (1 - rate) ** k
  probs = [
    math.comb(num_samples, c) * rate**c * (1 - rate) ** (num_samples - c)
    for c in range(num_samples + 1)
  ]
  estimates = [
    pass_at_k_lib.pass_at_k(num_samples, c, k) for c in range(num_samples + 1)
  ]
  others = [1 - (1 - c / num_samples) ** k for c in range(num_samples + 1)]
  return {
    quantity.name: math.fsum(map(math.prod, zip(probs, values, strict=True)))
    - true
    for quantity, values in zip(
      claim.quantities, (estimates, others), strict=True
    )
  }


def dpo_optimum(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the distance of a policy that DPO trained to its optimum."""
  pairs = [_dpo_distance(seed) for seed in setting.seeds]
  variation, reward = claim.quantities
  return {
    variation.name: [distance for distance, _ in pairs],
    reward.name: [error for _, error in pairs],
  }


def _dpo_distance(seed: int) -> tuple[float, float]:
  """Trains one policy; returns total variation and the error of rewards."""
  num_answers, num_steps, beta = 32, 4000, 0.5
  keys = jax.random.split(jax.random.key(seed), 2)
  rewards_A = jax.random.normal(keys[0], (num_answers,))
  reference_A = jax.nn.log_softmax(jax.random.normal(keys[1], (num_answers,)))
  # Probability that the row's answer is preferred to the column's answer.
  preferred_AA = jax.nn.sigmoid(rewards_A[:, None] - rewards_A)
  options = preference_losses.Options(beta, 0.0, 0.0)
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, num_steps))

  def loss(logits_A):
    ratios_A = jax.nn.log_softmax(logits_A) - reference_A
    losses_AA = preference_losses.dpo(ratios_A[:, None], ratios_A, options)
    return jnp.mean(preferred_AA * losses_AA)

  def step(carry, _):
    logits_A, state = carry
    updates, state = optimizer.update(jax.grad(loss)(logits_A), state)
    return (optax.apply_updates(logits_A, updates), state), None

  @jax.jit
  def train():
    carry = reference_A, optimizer.init(reference_A)
    return jax.lax.scan(step, carry, length=num_steps)[0][0]

  policy_A = jax.nn.log_softmax(train())
  optimum_A = jax.nn.log_softmax(reference_A + rewards_A / beta)
  variation = 0.5 * jnp.abs(jnp.exp(policy_A) - jnp.exp(optimum_A)).sum()
  # Rewards are known up to a constant.
  error_A = beta * (policy_A - reference_A) - rewards_A
  return float(variation), float(jnp.abs(error_A - error_A.mean()).max())
