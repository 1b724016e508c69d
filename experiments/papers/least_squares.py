"""Claims about least squares: double descent, and learning in context."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _double_descent(), _in_context_floor()


def _double_descent() -> claims.Claim:
  # sigma^2 p / (n - p - 1), and 1 - n / p + sigma^2 n / (p - n - 1).
  values = {50: 0.255, 90: 2.50, 110: 2.869, 150: 0.844, 200: 0.753, 400: 0.834}
  return claims.Claim(
    name='double_descent',
    paper='Hastie et al. 2019, arXiv:1903.08560',
    where='the risk with isotropic features; here n = 100, sigma = .5',
    statement='The risk of minimum-norm regression explodes at as many'
    ' parameters as points, and falls again beyond.',
    quantities=tuple(
      claims.within(
        f'{width} parameters', f'{value:g} (formula)', value,
        0.2 if abs(width - 100) <= 10 else 0.05,
        'a simulation, whose mean has a heavy tail near 100 parameters',
      )
      for width, value in values.items()
    ),
    seconds={'cpu': 40},
    seeds=5,
  )  # fmt: skip


def _in_context_floor() -> claims.Claim:
  values = {5: 0.75, 10: 0.5, 15: 0.25, 19: 0.05}
  return claims.Claim(
    name='in_context_floor',
    paper='Garg et al. 2022, arXiv:2208.01066',
    where='least squares in dimension 20',
    statement='Least squares, which models come near in context, has the error'
    ' (d - k) / d after k examples.',
    quantities=tuple(
      claims.Quantity(
        name=f'{k} examples',
        published=f'{value:g} (formula)',
        low=value - 0.02,
        high=value + 0.02,
        why='a simulation: .02 is the width of a line of the figure',
      )
      for k, value in values.items()
    ),
    seconds={'cpu': 5},
    seeds=5,
    note='The floor alone. No model is trained.',
  )
