"""The claim about repeated text, measured by training."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claim."""
  return (_repeated_text(),)


def _repeated_text() -> claims.Claim:
  return claims.Claim(
    name='repeated_text',
    paper='Muennighoff et al. 2023, arXiv:2305.16264',
    where='figure 3, and the law of repeated tokens',
    statement='Four epochs of the same text are worth almost as much as text'
    ' that is four times as long; of sixteen, a third is lost.',
    quantities=(
      claims.within(
        '4 epochs are worth', '3.73 times', 3.73, 0.15,
        'runs of one size do not decide the law to more',
      ),
      claims.within(
        '16 epochs are worth', '10.58 times', 10.58, 0.15, 'the same'
      ),
      claims.at_most(
        '4 epochs less new text, nats/byte', 'about 0', 0.02,
        'about 1 % of the loss',
      ),
    ),
    seconds={'cpu': 400},
    seeds=5,
    note="64 KiB to 1 MiB of the Python library's source, 68,000 parameters;"
    ' the paper has 0.1 to 178 billion tokens. The rate falls to 0 in each run.'
    ' Rows of 128 bytes, drawn from all files at random.',
  )  # fmt: skip
