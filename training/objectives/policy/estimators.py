"""Estimators of KL(policy || reference) from the one token that was drawn.

They treat tokens as samples of the policy, as in
http://joschu.net/blog/kl-approx.html, and take r = log(policy / reference) of
each token. The divergence is of the next token given the tokens before it,
which have no gradient. A penalty in the reward (`TokenLoss.kl_reward`) has the
gradient of the divergence of whole texts.
"""

import jax.numpy as jnp


def k1(log_ratio, importance):
  """Returns rho r, r = log(policy / reference).

  Its mean is the divergence, and its gradient's mean the divergence's, because
  the importance ratio rho has a gradient. Without rho, the mean of the gradient
  is 0: the classic mistake.
  """
  return importance * log_ratio


def k2(log_ratio, importance):
  """Returns r^2 / 2: a biased value, with the gradient of the divergence.

  Its gradient is r grad log p: the gradient of `k1` without a part of mean 0.
  """
  del importance
  return jnp.square(log_ratio) / 2


def k3(log_ratio, importance):
  """Returns exp(-r) - 1 + r: an unbiased value of low variance, at least 0.

  Its gradient is the gradient of KL(reference || policy), as in GRPO
  (arXiv:2402.03300, equation 4).
  """
  del importance
  return jnp.expm1(-log_ratio) + log_ratio


def k3_unbiased(log_ratio, importance):
  """Returns rho (exp(-r) - 1 + r): value and gradient of the divergence.

  As in DeepSeek-V3.2 (arXiv:2512.02556, section 3.1).
  """
  return importance * k3(log_ratio, importance)


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'k3_unbiased': k3_unbiased}
