"""Claims about optimizers, and about the solutions that they find."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return (
    _newton_schulz(),
    _weight_equilibrium(),
    _edge_of_stability(),
    _superposition(),
  )


def _newton_schulz() -> claims.Claim:
  why = 'an error of about .3 that the author calls harmless'
  return claims.Claim(
    name='newton_schulz',
    paper='Jordan et al. 2024, https://kellerjordan.github.io/posts/muon',
    where='the choice of the coefficients',
    statement='Five steps of the tuned iteration bring the singular values of'
    ' an update near 1.',
    quantities=(
      claims.at_least('least singular value', 'about 0.7', 0.7, why),
      claims.at_most('largest singular value', 'about 1.3', 1.3, why),
    ),
    seconds={'cpu': 5},
    seeds=5,
    note='The update of the optimizer that training uses, in float32, of a'
    ' random matrix of 128 x 256.',
  )


def _weight_equilibrium() -> claims.Claim:
  return claims.Claim(
    name='weight_equilibrium',
    paper='Kosson et al. 2023, arXiv:2305.17212',
    where='the table of equilibria, AdamW on a random walk',
    statement='Under weight decay the norm of a weight tends to'
    ' sqrt(rate x size / (2 decay)), and a step turns it by'
    ' sqrt(2 rate decay (1 - beta1) / (1 + beta1)).',
    quantities=tuple(
      claims.Quantity(
        name=name,
        published='1 (formula)',
        low=0.97,
        high=1.03,
        why='the formulas leave out terms of the order rate x decay = .005',
      )
      for name in ('norm over formula', 'angle over formula')
    ),
    seconds={'cpu': 15},
    seeds=20,  # five were not enough to decide
    note='The optimizer that training uses, with random gradients in place of'
    ' those of a model: rate .01, decay .5, beta1 .9.',
  )


def _edge_of_stability() -> claims.Claim:
  return claims.Claim(
    name='edge_of_stability',
    paper='Cohen et al. 2021, arXiv:2103.00065',
    where='full-batch gradient descent at several step sizes',
    statement='Gradient descent makes the loss sharper, until the largest'
    ' eigenvalue of its Hessian stays just above 2 / step size.',
    quantities=tuple(
      claims.Quantity(
        name=f'sharpness x step size / 2, step size {rate:g}',
        published='just above 1',
        low=0.97,
        high=1.15,
        why='lines of their figures lie between 1 and about 1.1',
      )
      for rate in (0.12, 0.16)
    ),
    seconds={'cpu': 15},
    seeds=3,
    note='A tanh network of 32 units on 20 points of a Chebyshev polynomial of'
    ' degree 4, 16,000 steps; the mean over the last quarter. A pilot with'
    ' another seed chose the step sizes: .4 diverges, .05 does not get there.',
  )


def _superposition() -> claims.Claim:
  return claims.Claim(
    name='superposition',
    paper='Elhage et al. 2022, '
    'https://transformer-circuits.pub/2022/toy_model/index.html',
    where='the demonstration with 20 features in 5 dimensions',
    statement='Dense features get a dimension each; sparse features share'
    ' dimensions, and more are represented than there are dimensions.',
    quantities=(
      claims.Quantity(
        name='features in 5 dimensions, all active',
        published='5',
        low=4.5,
        high=5.5,
        why='half a feature, as the sum of squared norms of features counts',
      ),
      claims.at_least(
        'features in 5 dimensions, 1 % active', 'more than 5', 10.0,
        'twice the dimensions: pairs share each of them',
      ),
    ),
    seconds={'cpu': 20},
    seeds=3,
    note='Importances .7^i, Adam, 4,000 steps of 1,024 points.',
  )  # fmt: skip
