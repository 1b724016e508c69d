"""Claims about scaling laws. They are computed from published numbers."""

from evals import claims

_SIMULATED = (
  'the authors fit a grid of sizes; ours is the exact slope of the law'
)


def get_claims() -> tuple[claims.Claim, ...]:
  """Returns the claims."""
  return (
    _chinchilla_refit(),
    _inference_adjusted(),
    _kaplan_reconciled(),
    _parabola_bias(),
    _repeated_data(),
    _isoflop(
      'isoflop_bytes',
      {'cpu': 1500},
      '25 models of 13,000 to 248,000 parameters on the sources of Python.',
    ),
    _isoflop(
      'isoflop_bytes_large',
      {'gpu': 600},
      '19 models of 0.3 to 11 million parameters.',
      {'text': 'enwik9, from https://mattmahoney.net/dc/textdata.html'},
    ),
  )


def _chinchilla_refit() -> claims.Claim:
  error_of = {
    'E': ('1.8172', 0.03),
    'A': ('482.01', 124.58),
    'B': ('2085.43', 1293.23),
    'alpha': ('.3478', 0.02),
    'beta': ('.3658', 0.02),
  }
  return claims.Claim(
    name='chinchilla_refit',
    paper='Besiroglu et al. 2024, arXiv:2404.10102',
    where='table 1',
    statement="The points of Chinchilla's figure 4 have a law with a = .5126.",
    quantities=(
      *(
        claims.Quantity(
          name=name,
          published=f'{value} ({error:g})',
          low=float(value) - error / 10,
          high=float(value) + error / 10,
          why='a tenth of the published standard error: the points are the'
          ' same, the search is not',
        )
        for name, (value, error) in error_of.items()
      ),
      claims.within('a', '.5126', 0.5126, 0.005, 'the same points'),
    ),
    seconds={'cpu': 30},
    inputs={
      'points': 'the CSV file of'
      ' https://github.com/epoch-research/analyzing-chinchilla'
    },
  )


def _inference_adjusted() -> claims.Claim:
  return claims.Claim(
    name='inference_adjusted',
    paper='Sardana et al. 2024, arXiv:2401.00448',
    where='the example of 13B and 7B parameters',
    statement='With 2T tokens to serve, 7B parameters cost less than 13B of the'
    ' same loss.',
    quantities=(
      claims.Quantity(
        name='FLOPs saved',
        published='1.7e22',
        low=1.65e22,
        high=1.75e22,
        why="half a unit of the paper's last digit",
      ),
      claims.Quantity(
        name='share saved, %',
        published='17',
        low=16.5,
        high=17.5,
        why="half a unit of the paper's last digit",
      ),
    ),
    seconds={'cpu': 1},
  )


def _kaplan_reconciled() -> claims.Claim:
  return claims.Claim(
    name='kaplan_reconciled',
    paper='Pearce and Song 2024, arXiv:2406.12907',
    where='the simulated exponents',
    statement="Chinchilla's law, counted without embeddings at Kaplan's sizes,"
    ' has nearly the exponent of Kaplan et al. (.73).',
    quantities=(
      claims.within("Besiroglu's law", '.78', 0.78, 0.02, _SIMULATED),
      claims.within("Hoffmann's law", '.74', 0.74, 0.02, _SIMULATED),
    ),
    seconds={'cpu': 2},
  )


def _parabola_bias() -> claims.Claim:
  shares = {2: '0.3', 4: '1.3', 8: '3.0', 16: '5.4'}
  return claims.Claim(
    name='parabola_bias',
    paper='Problems with Chinchilla Approach 2, 2026, arXiv:2603.22339',
    where='losses of the law without noise',
    statement='Parabolas of IsoFLOP curves put the best size too high, and the'
    ' exponent right, on grids that are centred.',
    quantities=(
      *(
        claims.digits(f'N_opt too high, grid x{factor}, %', share)
        for factor, share in shares.items()
      ),
      claims.Quantity(
        name='exponent too high, grid x16',
        published='0',
        low=-1e-6,
        high=1e-6,
        why='the bias is the same factor at all budgets, but for rounding',
      ),
    ),
    seconds={'cpu': 1},
  )


def _repeated_data() -> claims.Claim:
  return claims.Claim(
    name='repeated_data',
    paper='Muennighoff et al. 2023, arXiv:2305.16264',
    where='the law of repeated tokens',
    statement='Four epochs of the same tokens are worth almost four of new'
    ' ones; forty are worth fifteen.',
    quantities=(
      claims.digits('4 epochs', '3.73'),
      claims.digits('16 epochs', '10.58'),
      claims.digits('40 epochs', '15.17'),
    ),
    seconds={'cpu': 1},
    note='Values of the formula. The experiment behind it is not repeated.',
  )


def _isoflop(
  name: str,
  seconds: dict[str, int],
  note: str,
  inputs: dict[str, str] | None = None,
) -> claims.Claim:
  return claims.Claim(
    name=name,
    paper='Hoffmann et al. 2022, arXiv:2203.15556',
    where='table 2, approaches 2 and 3',
    statement='The best number of parameters grows nearly as the square root of'
    ' the FLOPs, by parabolas and by a law of all losses.',
    quantities=(
      claims.Quantity(
        name='exponent, parabolas', published='.49', low=0.4, high=0.6,
        why='a tenth around the square root: other data, and small models',
      ),
      claims.Quantity(
        name='exponent, law', published='.46; .5126 when fitted again',
        low=0.4, high=0.6, why='the same',
      ),
      claims.Quantity(
        name='exponent that the parabolas add', published='0', low=-0.03,
        high=0.03, why='arXiv:2603.22339: none on grids that are centred',
      ),
    ),
    seconds=seconds,
    inputs=inputs or {},
    note=f'{note} Bytes, one seed; intervals by resampling.',
  )  # fmt: skip
