"""Claims about several answers to a question, and about estimates of a KL."""

from evals import claims


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return (
    _best_of_n_kl(),
    _kl_estimators(),
    _voting(),
    _pass_at_k_law(),
    _pass_at_k_bias(),
    _dpo_optimum(),
    _over_optimisation(),
  )


def _best_of_n_kl() -> claims.Claim:
  values = {2: '.1931', 4: '.6363', 8: '1.2044', 16: '1.8351', 128: '3.8598'}
  return claims.Claim(
    name='best_of_n_kl',
    paper='Beirami et al. 2024, arXiv:2401.01879',
    where='the bound on the KL of best of n',
    statement='The best of n answers is at most log n - (n - 1) / n nats from'
    ' the policy, and as much where no two answers are equal.',
    quantities=tuple(
      claims.digits(f'n = {n}, nats', value) for n, value in values.items()
    ),
    seconds={'cpu': 2},
  )


def _kl_estimators() -> claims.Claim:
  near, far = 'p = N(0.1, 1)', 'p = N(1, 1)'
  return claims.Claim(
    name='kl_estimators',
    paper='Schulman 2020, http://joschu.net/blog/kl-approx.html',
    where='both tables',
    statement='k1 has no bias and a large deviation, k2 a small bias; k3 has'
    ' neither.',
    quantities=(
      claims.digits(f'k1 deviation, {near}', '20'),
      claims.digits(f'k2 deviation, {near}', '1.42'),
      claims.digits(f'k2 bias, {near}', '.002', 'the paper has two digits'),
      claims.digits(f'k3 deviation, {near}', '1.42'),
      claims.digits(f'k1 deviation, {far}', '2'),
      claims.digits(f'k2 deviation, {far}', '1.73'),
      claims.digits(f'k2 bias, {far}', '.25'),
      claims.digits(f'k3 deviation, {far}', '1.70'),
    ),
    seconds={'cpu': 4},
    note='The estimators are the functions that training uses. Expectations are'
    ' integrated numerically.',
  )


def _voting() -> claims.Claim:
  values = {1: '.6250', 3: '.6456', 5: '.6454', 11: '.6219', 101: '.5104'}
  return claims.Claim(
    name='voting',
    paper='Chen et al. 2024, arXiv:2403.02419',
    where='the case p = .85 and .4 in equal shares',
    statement='More votes help at first and harm later, where some questions'
    ' are more often answered wrong.',
    quantities=tuple(
      claims.digits(f'{votes} votes', value) for votes, value in values.items()
    ),
    seconds={'cpu': 1},
  )


def _pass_at_k_law() -> claims.Claim:
  return claims.Claim(
    name='pass_at_k_law',
    paper='Schaeffer et al. 2025, arXiv:2502.17578',
    where='difficulties with a Beta distribution',
    statement='Failures fall as k^-a, where Beta(a, b) problems are hard.',
    quantities=(
      claims.within(
        'exponent',
        '0.3, the a of Beta',
        0.3,
        0.05,
        'the law is that of large k, and k is 100 to 1,000',
      ),
    ),  # fmt: skip
    seconds={'cpu': 20},
    seeds=25,  # five were not enough to decide
  )


def _pass_at_k_bias() -> claims.Claim:
  return claims.Claim(
    name='pass_at_k_bias',
    paper='Chen et al. 2021, arXiv:2107.03374',
    where='equation 1 and figure 3',
    statement='1 - C(n - c, k) / C(n, k) has no bias; 1 - (1 - c / n)^k is too'
    ' low.',
    quantities=(
      claims.Quantity(
        name='bias of the estimate',
        published='0',
        low=-1e-9,
        high=1e-9,
        why='an expectation in float64, whose sums round',
      ),
      claims.at_most(
        'bias of the other one', 'below 0', -0.01, 'a bias that matters'
      ),
    ),
    seconds={'cpu': 1},
    note='The expectation over c of n = 20 samples, each right with probability'
    ' .1, at k = 10. The function is the one that evaluations use.',
  )


def _dpo_optimum() -> claims.Claim:
  return claims.Claim(
    name='dpo_optimum',
    paper='Rafailov et al. 2023, arXiv:2305.18290',
    where='equation 4 and theorem 1',
    statement='With all preferences of a Bradley-Terry model, DPO ends at the'
    ' optimum of its reward under a KL penalty, reference x exp(r / beta).',
    quantities=(
      claims.at_most(
        'total variation from the optimum', '0', 1e-3, 'float32 and an end'
      ),
      claims.at_most(
        'implicit reward, largest error', '0', 0.02,
        'the rewards have deviation 1',
      ),
    ),
    seconds={'cpu': 10},
    seeds=3,
    note='One prompt with 32 answers, beta .5; the loss is the one that'
    ' training uses, over all pairs.',
  )  # fmt: skip


def _over_optimisation() -> claims.Claim:
  return claims.Claim(
    name='over_optimisation',
    paper='Gao et al. 2022, arXiv:2210.10760',
    where='figure 1a and equation 1',
    statement='The true reward of the best of n by a learnt reward is'
    ' d (alpha - beta d), d = sqrt(KL); it rises and then falls.',
    quantities=(
      claims.at_least(
        'R^2 of the form', 'the form fits', 0.95, 'the form has two numbers'
      ),
      claims.at_least(
        'lost after the peak, gold reward',
        'gold falls',
        0.01,
        'a fall that two decimals show',
      ),
    ),  # fmt: skip
    seconds={'cpu': 120},
    seeds=3,
    note='A gold reward that is known, and a proxy of 1,024 pairs: its numbers'
    ' are not those of the paper, whose models are larger.',
  )
