"""Claims about tasks that a small model learns in minutes."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _reversed_sums(), _emergence(), _reversal_curse()


def _reversed_sums() -> claims.Claim:
  return claims.Claim(
    name='reversed_sums',
    paper='Lee et al. 2023, arXiv:2307.03381',
    where='the comparison of plain and reversed additions',
    statement='A small model learns additions whose digits are reversed from'
    ' far fewer examples than plain ones.',
    quantities=(
      claims.at_least(
        'reversed, right sums', 'about 1', 0.9,
        'the paper has 100 %, of a model that is larger',
      ),
      claims.at_least(
        'reversed less plain, right sums', 'clearly above 0', 0.1,
        'about the distance that the paper has at four times the examples',
      ),
    ),
    seconds={'cpu': 240},
    seeds=3,
    note='Two digits, 2,500 different additions, 2 layers of width 48, 2,000'
    ' steps of 64; the right sums of 2,000 others.',
  )  # fmt: skip


def _emergence() -> claims.Claim:
  return claims.Claim(
    name='emergence',
    paper='Schaeffer et al. 2023, arXiv:2304.15004',
    where='additions, by exact match and by token edit distance',
    statement='The same models improve suddenly by exact match, and smoothly by'
    ' the share of right tokens.',
    quantities=(
      claims.at_least(
        'largest gain of one size, exact less per token', 'above 0', 0.1,
        'a tenth of the range of a score',
      ),
      claims.at_most(
        'smallest model, exact', 'near 0', 0.1,
        'the score that would be called no ability',
      ),
      claims.at_least(
        'smallest model, per token', 'clearly above 0', 0.2,
        'twice the chance of a digit',
      ),
    ),
    seconds={'cpu': 300},
    seeds=3,
    note='Reversed additions of two digits, models of width 4, 8, 16 and 32. A'
    " score's gain from one size to the next is a share of its whole range.",
  )  # fmt: skip


def _reversal_curse() -> claims.Claim:
  return claims.Claim(
    name='reversal_curse',
    paper='Berglund et al. 2023, arXiv:2309.12288',
    where='invented names and descriptions, in one order',
    statement='A model that learns "A is B" does not know that B is A.',
    quantities=(
      claims.at_least(
        'right descriptions of a name', 'near 1', 0.9, 'facts that were trained'
      ),
      claims.at_most(
        'right names of a description', 'near 0', 0.1,
        'the paper has chance, which is near 0 for names of two tokens',
      ),
      claims.at_least(
        'right names, pairs seen in both orders', 'near 1', 0.9,
        'the form of the question is known to the model',
      ),
    ),
    seconds={'cpu': 120},
    seeds=3,
    note='100 pairs in one order and 100 in both, names of two tokens,'
    ' descriptions of three; trained from scratch, not fine-tuned.',
  )  # fmt: skip
