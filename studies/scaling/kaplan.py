"""Kaplan's and Chinchilla's exponents reconciled, as an exact computation.

    python -m studies.scaling.kaplan

Kaplan et al. (arXiv:2001.08361) found N_opt = k C^0.73, Hoffmann et al.
(arXiv:2203.15556) C^0.5. Pearce and Song (arXiv:2406.12907) explain most of the
gap: Kaplan et al. counted parameters and FLOPs without the embeddings, for
small models. With N parameters besides embeddings a model has

    N_total = N + 47491 N^(1/3)

(their equation 6, fitted to Chinchilla's models). Minimising the law
of all parameters under C = 6 N D gives the optimal N as an exact function of C.
The exponent is the slope of log N over log C in Kaplan's range of budgets. They
report 0.78 with the coefficients of Besiroglu et al. and 0.74 with Hoffmann's.
"""

from absl import app
import numpy as np
from scipy import optimize

from training.planning import scaling_laws

EMBEDDING_SCALE = 47_491  # arXiv:2406.12907, equation 6
# Budgets without embeddings, FLOPs: Kaplan's sizes, 768 to 1.5 billion, are
# optimal there (the authors' published script).
RANGE = 10**12.95, 10**20.7
REPORTED = 0.73  # arXiv:2001.08361, equation 1.7
# Hoffmann's coefficients with more digits, as in the LaTeX source of their
# paper; Pearce and Song compute with them.
HOFFMANN = scaling_laws.Fit(
  source='Hoffmann et al. 2022, more digits',
  floor=1.6934,
  params_scale=406.4,
  tokens_scale=410.7,
  params_exponent=0.3392,
  tokens_exponent=0.2849,
)
LAWS = scaling_laws.BESIROGLU, HOFFMANN


def num_total(num_params: float) -> float:
  """Returns all parameters of a model with `num_params` besides embeddings."""
  return num_params + EMBEDDING_SCALE * num_params ** (1 / 3)


def budget(law: scaling_laws.Fit, num_params: float) -> float:
  """Returns the budget 6 N D whose best N is `num_params`.

  The derivative of A / T^alpha + B (6 N / C)^beta by N is zero, for T(N) all
  parameters, where B / D^beta = (alpha / beta) A N T' / T^(alpha + 1).
  """
  total = num_total(num_params)
  # N T'(N)
  growth = num_params + EMBEDDING_SCALE / 3 * num_params ** (1 / 3)
  left = (
    law.params_exponent
    / law.tokens_exponent
    * law.params_scale
    * growth
    / total ** (law.params_exponent + 1)
  )
  tokens = (law.tokens_scale / left) ** (1 / law.tokens_exponent)
  return 6 * num_params * tokens


def best_params(law: scaling_laws.Fit, flops: float) -> float:
  """Returns the best parameters besides embeddings of a budget 6 N D."""
  found, _ = optimize.brentq(
    lambda log_n: np.log(budget(law, float(np.exp(log_n))) / flops),
    0.0,
    np.log(1e15),
    xtol=1e-13,
    full_output=True,
  )
  return float(np.exp(found))


def exponent(
  law: scaling_laws.Fit, low: float = RANGE[0], high: float = RANGE[1]
) -> float:
  """Returns the slope of log N_opt over log C, least squares of a log grid."""
  budgets = np.geomspace(low, high, 61)
  sizes = [best_params(law, flops) for flops in budgets.tolist()]
  return float(np.polyfit(np.log(budgets), np.log(sizes), 1)[0])


def main(argv: list[str]) -> None:
  """Prints the exponents of both laws, with and without embeddings."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected none')
  middle = float(np.sqrt(RANGE[0] * RANGE[1]))
  print(
    'exponent of N, budgets without embeddings from'
    f' {RANGE[0]:.1e} to {RANGE[1]:.1e} FLOPs'
    '\n| law | all parameters | without embeddings | lower half | upper half |'
    '\n|---|---|---|---|---|'
  )
  for law in LAWS:
    alpha, beta = law.params_exponent, law.tokens_exponent
    print(
      f'| {law.source} | {beta / (alpha + beta):.3f} |'
      f' {exponent(law):.3f} | {exponent(law, RANGE[0], middle):.3f} |'
      f' {exponent(law, middle, RANGE[1]):.3f} |'
    )
  print(f'Kaplan et al. reported {REPORTED}')


if __name__ == '__main__':
  app.run(main)
