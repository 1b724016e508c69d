"""Claims about facts that a model keeps in its weights."""

from evals import claims

_PAPER = 'Allen-Zhu and Li 2024, arXiv:2404.05405'


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _capacity(), _capacity_large(), _extraction()


def _quantities() -> tuple[claims.Quantity, ...]:
  return (
    claims.Quantity(
      name='bits per parameter, 1,000 exposures', published='2', low=1.6,
      high=2.4, why='a fifth: models of one size do not show the best size',
    ),
    claims.at_least(
      'bits per parameter, 100 exposures', '1', 0.8,
      'a fifth less, for the same reason',
    ),
    claims.at_most(
      'lost by int8, bits per parameter', '0', 0.1, 'a twentieth of the bits'
    ),
    claims.Quantity(
      name='left by int4, bits per parameter', published='0.7', low=0.3,
      high=1.1, why='the rounding differs; clearly below 2, and above 0',
    ),
  )  # fmt: skip


def _capacity() -> claims.Claim:
  return claims.Claim(
    name='knowledge_capacity',
    paper=_PAPER,
    where='results 1, 2 and 8',
    statement='A model stores two bits of facts per parameter in 1,000'
    ' exposures and one in 100; int8 keeps them, int4 does not.',
    quantities=_quantities(),
    seconds={'cpu': 600},
    seeds=3,
    note='1,536 people of 34 bits each, 22,000 parameters, embedding included;'
    ' names are not counted. int8 and int4 are rounded to the nearest, with one'
    ' scale per column.',
  )


def _capacity_large() -> claims.Claim:
  return claims.Claim(
    name='knowledge_capacity_large',
    paper=_PAPER,
    where='results 1, 2 and 8',
    statement="The same with the paper's attributes.",
    quantities=_quantities(),
    seconds={'gpu': 600},
    seeds=2,
    note='20,480 people of 47.6 bits each, 330,000 parameters, a vocabulary of'
    ' its own; the paper has models of 1 to 300 million.',
  )


def _extraction() -> claims.Claim:
  return claims.Claim(
    name='knowledge_extraction',
    paper='Allen-Zhu and Li 2023, arXiv:2309.14316',
    where='figure 2',
    statement='Facts that were trained in one form can be recited, and not be'
    ' asked for; facts that were trained in many forms can.',
    quantities=(
      claims.at_most(
        'right answers, one form', '9.7 %', 0.3,
        'a few values out of 30 to 40 are right by chance; clearly below half',
      ),
      claims.at_least(
        'right answers, five phrases in any order', '96.2 %', 0.9,
        'a model of 0.4 million parameters, where the paper has 124',
      ),
    ),
    seconds={'cpu': 900},
    seeds=3,
    note='1,024 people, five attributes of one id each. Questions about half of'
    ' the people are trained by adapters; the others are asked.',
  )  # fmt: skip
