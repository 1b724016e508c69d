"""Scaling laws: the best model size and number of tokens for a budget of FLOPs.

    L(N, D) = E + A / N^alpha + B / D^beta     nats per token

for N parameters and D tokens, minimised under C = 6 N D (Chinchilla, Hoffmann
et al., arXiv:2203.15556, section 3.3). Two fits of the same data are published,
and their optima differ: the authors' own fit, and the fit of Besiroglu et al.
(arXiv:2404.10102), who found that the first fit was reported with too few
digits and does not match its data.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """The five numbers of the law."""

  source: str
  floor: float  # E, nats per token
  params_scale: float  # A
  tokens_scale: float  # B
  params_exponent: float  # alpha
  tokens_exponent: float  # beta

  def loss(self, num_params: float, num_tokens: float) -> float:
    """Returns the expected loss, nats per token of the fit's own data."""
    return (
      self.floor
      + self.params_scale / num_params**self.params_exponent
      + self.tokens_scale / num_tokens**self.tokens_exponent
    )

  def optimum(self, flops: float) -> tuple[float, float]:
    """Returns the best (parameters, tokens) for a budget of FLOPs.

    Equation 4 of arXiv:2203.15556: N = G (C/6)^a and D = (C/6)^b / G with
    a = beta / (alpha + beta), b = alpha / (alpha + beta) and
    G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """
    total = self.params_exponent + self.tokens_exponent
    balance = (
      self.params_exponent
      * self.params_scale
      / (self.tokens_exponent * self.tokens_scale)
    ) ** (1 / total)
    budget = flops / 6
    num_params = balance * budget ** (self.tokens_exponent / total)
    return num_params, budget / num_params


HOFFMANN = Fit(
  source='Hoffmann et al. 2022',
  floor=1.69,
  params_scale=406.4,
  tokens_scale=410.7,
  params_exponent=0.34,
  tokens_exponent=0.28,
)
BESIROGLU = Fit(
  source='Besiroglu et al. 2024',
  floor=1.8172,
  params_scale=482.01,
  tokens_scale=2085.43,
  params_exponent=0.3478,
  tokens_exponent=0.3658,
)
FITS = HOFFMANN, BESIROGLU
# Hoffmann's fit with a digit more, as Sardana et al. use it.
SARDANA = Fit(
  source='Sardana et al. 2024',
  floor=1.69,
  params_scale=406.4,
  tokens_scale=410.7,
  params_exponent=0.336,
  tokens_exponent=0.283,
)

# Epochs after which repeated tokens have 1 - 1/e of the value that they can
# reach: R*_D of arXiv:2305.16264.
_REPEATED_EPOCHS = 15.387756


def effective_tokens(unique_tokens: float, epochs: float) -> float:
  """Returns the number of new tokens that are worth as much as repeated ones.

  D' = U + U R* (1 - exp(-(epochs - 1) / R*)) for U unique tokens (Muennighoff
  et al. 2023, arXiv:2305.16264): each further epoch is worth less.

  Args:
    unique_tokens: U.
    epochs: passes over them, at least 1.

  Raises:
    ValueError: less than one epoch.
  """
  if not epochs >= 1:
    raise ValueError(f'epochs: got {epochs}, expected at least 1')
  worth = _REPEATED_EPOCHS * -math.expm1((1 - epochs) / _REPEATED_EPOCHS)
  return unique_tokens * (1 + worth)
