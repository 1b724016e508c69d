"""Claims about learning in context."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return _gradient_descent(), _markov(), _induction()


def _gradient_descent() -> claims.Claim:
  return claims.Claim(
    name='gd_in_context',
    paper='von Oswald et al. 2022, arXiv:2212.07677',
    where='one layer of linear attention on linear regression',
    statement='A trained layer of linear attention is one step of gradient'
    ' descent on the examples in its context.',
    quantities=(
      claims.Quantity(
        name='loss over that of the best step',
        published='1',
        low=0.97,
        high=1.03,
        why='their curves lie on each other; the loss of 50,000 tasks has an'
        ' error of about .01',
      ),
      claims.Quantity(
        name='prediction, correlation with that of the best step',
        published='1',
        low=0.99,
        high=1.001,
        why='the same function but for training that has not ended',
      ),
    ),
    seconds={'cpu': 30},
    seeds=3,
    note='10 examples in 10 dimensions, inputs uniform in (-1, 1), 4,000 steps'
    ' of Adam. The best step size is found by least squares.',
  )


def _markov() -> claims.Claim:
  floors = {'bigram': 0.8861, 'unigram': 1.0081}
  return claims.Claim(
    name='markov_in_context',
    paper='Edelman et al. 2024, arXiv:2402.11004',
    where='chains of three states, attention alone',
    statement='Two layers of attention learn the statistics of pairs in'
    ' context; one layer does not.',
    quantities=(
      *(
        claims.Quantity(
          name=f'{name} floor, nats',
          published=f'{value:g} (Bayes)',
          low=value - 0.006,
          high=value + 0.006,
          why='the error of a mean over 2,048 chains is about .006',
        )
        for name, value in floors.items()
      ),
      claims.Quantity(
        name='two layers above the bigram floor, nats',
        published='about 0',
        low=-0.005,
        high=0.02,
        why='a sixth of the distance between both floors',
      ),
      claims.at_least(
        'one layer above two, nats', 'clearly worse', 0.06,
        'half of the distance between both floors',
      ),
    ),
    seconds={'cpu': 180},
    seeds=3,
    note='Width 32, 2 heads, 100 states, batches of 16, Adam at 3e-3, 2,000'
    ' steps; rotary positions.',
  )  # fmt: skip


def _induction() -> claims.Claim:
  return claims.Claim(
    name='induction',
    paper='Olsson et al. 2022, arXiv:2209.11895',
    where='models of attention alone with one and two layers',
    statement='Two layers form induction heads, at once; one layer cannot.',
    quantities=(
      claims.at_least(
        'two layers, right repeated tokens', 'near 1', 0.9,
        'copying is right, but for places that a position disturbs',
      ),
      claims.at_least(
        'two layers less one, right repeated tokens', 'a wide gap', 0.25,
        'one layer was right about .6 of the tokens in a pilot with another'
        ' seed',
      ),
      claims.at_least(
        'two layers, share of the fall in one tenth of the steps',
        'a sudden fall', 0.5,
        'a steady fall has .1 in a tenth',
      ),
    ),
    seconds={'cpu': 180},
    seeds=3,
    note='Blocks of 5 to 14 different tokens of 16, repeated up to 40 tokens;'
    ' width 32, 2 heads. The sizes were chosen in the same pilot, in which two'
    ' layers had 1.0 and .7 of the fall. Attention patterns are not read.',
  )  # fmt: skip
