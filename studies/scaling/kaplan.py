"""Kaplan's and Chinchilla's exponents reconciled, as an exact computation.

    python -m studies.scaling.kaplan

Kaplan et al. (arXiv:2001.08361) found N_opt = k C^0.73, Hoffmann et al.
(arXiv:2203.15556) C^0.5. Pearce and Song (arXiv:2406.12907) explain most of the
gap: Kaplan et al. counted parameters and FLOPs without the embeddings, for
small models. With N parameters besides embeddings a model has

    N_total = N + 47491 N^(1/3)

(their equation 6, fitted to Chinchilla's models). Here the law of
all parameters is minimised under C = 6 N D, and the exponent of the optimal N
is read off as the slope of log N over log C, in Kaplan's range of budgets.
"""

from absl import app
import numpy as np
from scipy import optimize

from training.planning import scaling_laws

EMBEDDING_SCALE = 47_491  # arXiv:2406.12907, equation 6
RANGE = 1e14, 1e20  # FLOPs without embeddings
REPORTED = 0.73  # arXiv:2001.08361, equation 1.7


def num_total(num_params: float) -> float:
  """Returns all parameters of a model with `num_params` besides embeddings."""
  return num_params + EMBEDDING_SCALE * num_params ** (1 / 3)


def best_params(law: scaling_laws.Fit, flops: float) -> float:
  """Returns the best parameters besides embeddings of a budget 6 N D."""

  def loss(log_n: float) -> float:
    size = float(np.exp(log_n))
    return law.loss(num_total(size), flops / (6 * size))

  # Sizes of one parameter to one token: the optimum is between them, and the
  # law convex in log N near it.
  grid = np.linspace(0, np.log(flops / 6), 400)
  best = int(np.argmin([loss(x) for x in grid]))
  found = optimize.minimize_scalar(
    loss,
    bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
    method='bounded',
    options={'xatol': 1e-10},
  )
  return float(np.exp(found.x))


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
    '| law | all parameters | without embeddings, 1e14 to 1e20 | lower half |'
    ' upper half |\n|---|---|---|---|---|'
  )
  for law in scaling_laws.FITS:
    alpha, beta = law.params_exponent, law.tokens_exponent
    print(
      f'| {law.source} | {beta / (alpha + beta):.3f} |'
      f' {exponent(law):.3f} | {exponent(law, RANGE[0], middle):.3f} |'
      f' {exponent(law, middle, RANGE[1]):.3f} |'
    )
  print(f'Kaplan et al. reported {REPORTED}')


if __name__ == '__main__':
  app.run(main)
