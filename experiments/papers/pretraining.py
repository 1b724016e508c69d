"""Claims about pretraining, measured by training small models."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _shakespeare_cpu(), _muon(), _wsd(), _mup()


def _shakespeare_cpu() -> claims.Claim:
  return claims.Claim(
    name='shakespeare_cpu',
    paper='Karpathy 2022, https://github.com/karpathy/nanoGPT',
    where='README, the run on a CPU',
    statement='A transformer of 0.8M parameters reaches 1.88 nats per'
    ' character on tiny Shakespeare in 2,000 steps.',
    quantities=(
      claims.Quantity(
        name='validation loss, nats/character',
        published='1.88',
        low=1.85,
        high=1.91,
        why='theirs is the mean of 20 random batches, which varies by .03',
      ),
    ),
    seconds={'cpu': 600},
    seeds=3,
    inputs={
      'tiny_shakespeare': 'data/tinyshakespeare/input.txt of'
      ' https://github.com/karpathy/char-rnn'
    },
    note='Byte ids, 259, in place of 65 characters; the whole last tenth is'
    ' evaluated once.',
  )


def _muon() -> claims.Claim:
  return claims.Claim(
    name='muon_ahead',
    paper='Jordan et al. 2024, https://kellerjordan.github.io/posts/muon',
    where='comparison at equal steps',
    statement='At equal steps Muon reaches a lower loss than AdamW.',
    quantities=(
      claims.at_most(
        'Muon - AdamW, nats/token', 'below 0', 0.0, 'the direction alone'
      ),
    ),
    seconds={'cpu': 1500},
    seeds=5,
    note='250 steps of the quickstart; seeds are paired.',
  )


def _wsd() -> claims.Claim:
  return claims.Claim(
    name='wsd_costs_nothing',
    paper='Haegele et al. 2024, arXiv:2405.18392',
    where='the comparison of both schedules',
    statement='A constant rate with a decay at the end is as good as a cosine.',
    quantities=(
      claims.at_most(
        'WSD - cosine, nats/token',
        'about 0',
        0.01,
        'a gap that a figure would show',
      ),
    ),  # fmt: skip
    seconds={'cpu': 1500},
    seeds=5,
    note='250 steps of the quickstart; seeds are paired.',
  )


def _mup() -> claims.Claim:
  return claims.Claim(
    name='mup_transfer',
    paper='Yang et al. 2022, arXiv:2203.03466',
    where='figure 1',
    statement='With muP the best learning rate of a narrow model is the best of'
    ' a wide one; without it, a wide model needs a lower one.',
    quantities=(
      claims.Quantity(
        name='muP, shift of the best rate, factors of 2',
        published='about 0',
        low=-0.75,
        high=0.75,
        why='less than a step of the grid',
      ),
      claims.at_most(
        'standard, the same shift', 'clearly below 0', -0.75,
        'three quarters of a step of the grid; width grows by two steps',
      ),
    ),
    seconds={'cpu': 900},
    seeds=3,
    note='Widths 64 and 256, two layers, Adam, 100 steps of 1,024 tokens.',
  )  # fmt: skip
