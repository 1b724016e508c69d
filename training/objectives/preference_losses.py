"""The losses of preferences: formulas of scores, one row of a table each.

A score is a number per completion: its log-probability under the policy. Where
the loss has a reference, the reference's log-probability is subtracted (a log
ratio). Where the loss takes means, the score is divided by the number of
tokens. `training.objectives.preference` makes the scores; the formulas know
neither models nor rows.

A new loss is a function and its row in `LOSSES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNSET = -1.0  # value of an option: the loss takes its own default


class Options(NamedTuple):
  """The numbers in the formulas."""

  beta: float
  label_smoothing: float
  gamma: float


def dpo(chosen: jax.Array, rejected: jax.Array, options: Options) -> jax.Array:
  """Returns -log sigmoid(beta h), h the difference of log ratios.

  Equation 7 of DPO (arXiv:2305.18290). With label smoothing it is conservative
  DPO, which believes a label with the probability 1 - label_smoothing
  (equation 3 of https://ericmitchell.ai/cdpo.pdf).
  """
  return _logistic(options.beta * (chosen - rejected), options.label_smoothing)


def robust(
  chosen: jax.Array, rejected: jax.Array, options: Options
) -> jax.Array:
  """Returns the loss whose mean over flipped labels is DPO's loss.

  Robust DPO (arXiv:2403.00409, section 3): a share of label_smoothing of
  the labels is flipped. It has no lower bound.
  """
  margin, flipped = options.beta * (chosen - rejected), options.label_smoothing
  right, wrong = _logistic(margin, 0.0), _logistic(-margin, 0.0)
  return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


def ipo(chosen: jax.Array, rejected: jax.Array, options: Options) -> jax.Array:
  """Returns (h - 1 / (2 tau))^2, h the difference of log ratios, tau = beta.

  Equation 17 of IPO (arXiv:2310.12036). Its authors report results with log
  ratios per token: `length_normalised`, which TRL always does.
  """
  return (chosen - rejected - 1 / (2 * options.beta)) ** 2


def simpo(
  chosen: jax.Array, rejected: jax.Array, options: Options
) -> jax.Array:
  """Returns -log sigmoid(beta h - gamma), h of log-probabilities per token.

  Equation 6 of SimPO (arXiv:2405.14734); no reference.
  """
  margin = options.beta * (chosen - rejected) - options.gamma
  return _logistic(margin, options.label_smoothing)


def cpo(chosen: jax.Array, rejected: jax.Array, options: Options) -> jax.Array:
  """Returns -log sigmoid(beta h), h of log-probabilities; no reference.

  L_prefer of equation 3 of CPO (arXiv:2401.08417); the loss adds L_NLL, which
  imitates the chosen completion.
  """
  return dpo(chosen, rejected, options)


def orpo(chosen: jax.Array, rejected: jax.Array, options: Options) -> jax.Array:
  """Returns -lambda log sigmoid(log odds ratio), lambda = beta.

  L_OR of equation 7 of ORPO (arXiv:2403.07691), of probabilities per token (a
  geometric mean); the loss (equation 6) adds L_SFT. No reference.
  """
  log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
  return options.beta * _logistic(log_odds, 0.0)


def kto(
  scores: jax.Array, is_desirable: jax.Array, beta: float, divergence: jax.Array
) -> jax.Array:
  """Returns 1 - v / lambda of single examples, before their weights lambda.

  Equation 7 of KTO (arXiv:2402.01306). The value v of a desirable example is
  lambda sigmoid(beta (r - z)), of an undesirable one lambda sigmoid(beta (z -
  r)), r its log ratio.

  Args:
    scores: log ratios.
    is_desirable: whether each example is desirable.
    beta: risk aversion.
    divergence: z, a constant: the mean log ratio of completions of other
      prompts, at least 0, which estimates KL(policy || reference).
  """
  sign = jnp.where(is_desirable, 1.0, -1.0)
  return jax.nn.sigmoid(-sign * beta * (scores - divergence))


def _logistic(margin: jax.Array, label_smoothing: float) -> jax.Array:
  right = -jax.nn.log_sigmoid(margin)
  if not label_smoothing:
    return right
  wrong = -jax.nn.log_sigmoid(-margin)
  return (1 - label_smoothing) * right + label_smoothing * wrong


def _log1mexp(x: jax.Array) -> jax.Array:
  """Returns log(1 - exp(x)) for x < 0."""
  # A probability that rounds to 1 gets finite odds, and a finite gradient.
  x = jnp.minimum(x, -1e-7)
  # Each form is exact where the other one loses digits. The inner `where`s keep
  # the gradient of the form that is not taken finite.
  near_0 = x > -0.6931472  # -log 2
  near = jnp.log(-jnp.expm1(jnp.where(near_0, x, -1.0)))
  return jnp.where(
    near_0, near, jnp.log1p(-jnp.exp(jnp.where(near_0, -1.0, x)))
  )


class Loss(NamedTuple):
  """A loss, the options that it has, and their values unless set."""

  of_pairs: Callable[[jax.Array, jax.Array, Options], jax.Array] | None
  has_reference: bool
  is_per_token: bool  # whether scores are always means over tokens
  beta: float
  options: frozenset[str]  # fields of `preference.Preference` besides beta
  gamma: float = 0.0
  imitation_weight: float = 0.0


_PAIRS = frozenset({'imitation_weight'})
_SMOOTHED = _PAIRS | {'label_smoothing'}
_NORMALISED = frozenset({'length_normalised', 'reference'})
_WEIGHTED = {'desirable_weight', 'undesirable_weight', 'reference'}

LOSSES = {
  'dpo': Loss(dpo, True, False, 0.1, _SMOOTHED | _NORMALISED),
  'robust': Loss(robust, True, False, 0.1, _SMOOTHED | _NORMALISED),
  'ipo': Loss(ipo, True, False, 0.1, _PAIRS | _NORMALISED),
  'kto': Loss(None, True, False, 0.1, frozenset(_WEIGHTED)),
  'orpo': Loss(orpo, False, True, 0.1, _PAIRS, imitation_weight=1.0),
  # gamma / beta = 0.5 is where the paper's searches begin (its appendix B).
  'simpo': Loss(simpo, False, True, 2.0, _SMOOTHED | {'gamma'}, gamma=1.0),
  'cpo': Loss(cpo, False, False, 0.1, _SMOOTHED, imitation_weight=1.0),
}
