"""The claim about grokking: late generalisation, and the frequencies in it."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claim."""
  return (_grokking(),)


def _grokking() -> claims.Claim:
  return claims.Claim(
    name='grokking',
    paper='Nanda et al. 2023, arXiv:2301.05217',
    where='figures 2 and 7, and section 5.1',
    statement='A model that adds modulo a prime knows the trained pairs long'
    ' before the others, and adds by a few frequencies that are there before it'
    ' generalises.',
    quantities=(
      claims.at_least(
        'right trained pairs', '1', 0.99, 'all, but for a step of noise'
      ),
      claims.at_least('right held-out pairs', '1', 0.99, 'the same'),
      claims.at_least(
        'steps until held-out pairs are known, over trained', 'about 10', 4.0,
        'a delay that a figure shows; the task is smaller here',
      ),
      claims.Quantity(
        name='key frequencies', published='5', low=1.5, high=9.5,
        why='few of the 29: the paper has 3 to 6 in other runs',
      ),
      claims.at_least(
        "variance of the logits by key frequencies", '95 %', 0.9,
        'most of it, with fewer parameters',
      ),
      claims.at_least(
        'steps from excluded loss up to held-out accuracy up', 'above 0', 0.0,
        'the order of events alone',
      ),
    ),
    seconds={'cpu': 400},
    seeds=3,
    note='p = 59 for 113, width 64 for 128, 35 % of the pairs for 30 %, rate'
    ' 2e-3 for 1e-3, 3,000 steps for 40,000, and norms, which the paper has'
    ' not. The excluded loss is taken from the logits.',
  )  # fmt: skip
