"""Families of arithmetic: sums, additions, products, fractions, remainders.

A family is a function of (draws, level) that returns a problem.
"""

import fractions
import math

from data.problems import draws as draws_lib, problem, working

_ASKED = (
  'What is {}?',
  'Calculate {}.',
  'Work out {}.',
  'Find the value of {}.',
)


def sums(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Adds and subtracts 2 to 4 numbers of 1 to 4 digits."""
  num_terms = (2, 2, 3, 3, 4)[level - 1]
  most = (20, 100, 100, 1_000, 10_000)[level - 1]
  terms = [draws.between(1, most) for _ in range(num_terms)]
  signs = ['+', *(draws.pick('+-') for _ in terms[1:])]

  def solve(work: working.Working) -> working.Number:
    total = terms[0]
    for sign, term in zip(signs[1:], terms[1:], strict=True):
      total = work.calculate(total, sign, term)
    return total

  written = ' '.join(
    f'{sign} {term}' for sign, term in zip(signs, terms, strict=True)
  ).removeprefix('+ ')
  return problem.Problem(
    family='sums',
    level=level,
    question=draws.pick(_ASKED).format(written),
    content=tuple(sorted(zip(signs, terms, strict=True))),
    kind='number',
    solve=solve,
  )


def additions(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Adds two numbers of `level` digits each."""
  low, high = 10 ** (level - 1), 10**level - 1
  terms = [draws.between(low, high) for _ in range(2)]
  return problem.Problem(
    family='additions',
    level=level,
    question=draws.pick(_ASKED).format(f'{terms[0]} + {terms[1]}'),
    content=('+', *sorted(terms)),
    kind='number',
    solve=lambda work: work.calculate(terms[0], '+', terms[1]),
  )


def columns(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Adds two numbers of `level` + 1 digits, a column and a carry at a time."""
  low, high = 10**level, 10 ** (level + 1) - 1
  terms = [draws.between(low, high) for _ in range(2)]

  def solve(work: working.Working) -> working.Number:
    total = carry = 0
    for place in range(level + 1):
      digits = [term // 10**place % 10 for term in terms]
      right = sum(digits) + carry
      # A slip of one; or the carry is forgotten, or added twice.
      others = [right + 1, right - carry if carry else right + 2]
      written = '+'.join(map(str, (*digits, carry)))
      column = work.choose(right, others, f'{written}={{}}')
      total += column % 10 * 10**place
      carry = column // 10
    return total + carry * 10 ** (level + 1)

  return problem.Problem(
    family='columns',
    level=level,
    question=draws.pick(_ASKED).format(f'{terms[0]} + {terms[1]}'),
    content=('+', *sorted(terms)),
    kind='number',
    solve=solve,
  )


def products(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Multiplies, or divides without a remainder, digit by digit."""
  digits = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))[level - 1]
  low, high = (
    (draws.between(max(2, 10 ** (n - 1)), max(12, 10**n - 1)))
    for n in reversed(digits)
  )
  is_division = draws.share() < 0.5
  sign = '/' if is_division else '*'
  # A division takes the product apart again: high is its quotient.
  whole = high * low if is_division else high

  def solve(work: working.Working) -> working.Number:
    # Splits a factor of a product, or the quotient: 27 into 20 and 7.
    split = high if is_division else low
    places = [
      int(digit) * 10**place
      for place, digit in enumerate(reversed(str(split)))
      if digit != '0'
    ][::-1]
    parts = [
      work.calculate(place * low, '/', low)
      if is_division
      else work.calculate(high, '*', place)
      for place in places
    ]
    total = parts[0]
    for part in parts[1:]:
      total = work.calculate(total, '+', part)
    return total

  return problem.Problem(
    family='products',
    level=level,
    question=draws.pick(_ASKED).format(f'{whole} {sign} {low}'),
    content=('/', high, low) if is_division else ('*', *sorted((high, low))),
    kind='number',
    solve=solve,
  )


def fractions_(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Adds, subtracts, multiplies or divides two fractions."""
  most = (9, 6, 9, 12, 20)[level - 1]
  under = [draws.between(2, most) for _ in range(2)]
  if level == 1:
    under[1] = under[0]
  over = [draws.between(1, each - 1) for each in under]
  sign = draws.pick('+-' if level < 4 else '+-*/')
  left, right = (f'{a}/{b}' for a, b in zip(over, under, strict=True))

  # Without brackets, 1/2 / 3/4 would be read from left to right.
  written = f'({left}) / ({right})' if sign == '/' else f'{left} {sign} {right}'

  def solve(work: working.Working) -> fractions.Fraction:
    if sign in '+-':
      return _added(work, over, under, sign)
    second = [over[1], under[1]]
    if sign == '/':
      second.reverse()
      work.choose(
        f'{second[0]}/{second[1]}',
        [right, f'{second[0]}/{second[1] + 1}'],
        f'Dividing by {right} is multiplying by {{}}.',
      )
    top = work.calculate(over[0], '*', second[0], 'Numerator: {}.')
    bottom = work.calculate(under[0], '*', second[1], 'Denominator: {}.')
    return fractions.Fraction(top) / bottom

  # In lowest terms, and equal for a + b and b + a.
  pair = [fractions.Fraction(a, b) for a, b in zip(over, under, strict=True)]
  pair = sorted(pair) if sign in '+*' else pair
  return problem.Problem(
    family='fractions',
    level=level,
    question=draws.pick(_ASKED).format(written),
    content=(sign, *map(str, pair)),
    kind='number',
    solve=solve,
  )


def _added(
  work: working.Working, over: list[int], under: list[int], sign: str
) -> fractions.Fraction:
  """Adds or subtracts over the least common denominator."""
  bottom = math.lcm(*under)
  tops = []
  for a, b in zip(over, under, strict=True):
    line = f'{a}/{b} has the numerator {{}} over {bottom}.'
    is_there = b == bottom
    tops.append(a if is_there else work.calculate(a, '*', bottom // b, line))
  top = work.calculate(tops[0], sign, tops[1], f'Over {bottom}: {{}}.')
  return fractions.Fraction(top, bottom)


def modular(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Finds a remainder: of a number, a product or a power; or an hour."""
  if level <= 2 and draws.share() < 0.5:
    return _hour(draws, level)
  modulus = draws.between(3, (9, 12, 13, 19, 29)[level - 1])
  if level <= 2:
    number, other = draws.between(modulus, 100 ** (level - 1) * 99), 1
    written = f'{number}'
  elif level == 3:
    number, other = draws.between(10, 99), draws.between(10, 99)
    written = f'{number} * {other}'
  else:
    number, other = draws.between(2, 99), draws.between(3, level + 1)
    written = f'{number}^{other}'

  # A product is the same the other way round.
  swapped = f'{other} * {number}' if level == 3 else written

  def solve(work: working.Working) -> working.Number:
    rest = work.calculate(number, 'mod', modulus)
    if level == 3:
      second = work.calculate(other, 'mod', modulus)
      product = work.calculate(rest, '*', second)
      return work.calculate(product, 'mod', modulus)
    power = rest
    for _ in range(other - 1):  # a power, by one product after the other
      product = work.calculate(power, '*', rest)
      power = work.calculate(product, 'mod', modulus)
    return power

  asked = draws.pick(
    (
      'What is the remainder when {} is divided by {}?',
      'Divide {} by {}. What is the remainder?',
    )
  )
  return problem.Problem(
    family='modular',
    level=level,
    question=asked.format(written, modulus),
    content=('remainder', min(written, swapped), modulus),
    kind='number',
    solve=solve,
  )


def _hour(draws: draws_lib.Draws, level: int) -> problem.Problem:
  start, hours = draws.between(1, 12), draws.between(5, 100**level)

  def solve(work: working.Working) -> working.Number:
    later = work.calculate(start, '+', hours)
    hour = work.calculate(later, 'mod', 12)
    # A clock shows 12 where the remainder is 0.
    return hour or work.choose(12, [0], 'A clock shows {}.')

  return problem.Problem(
    family='modular',
    level=level,
    question=f"It is {start} o'clock. Which hour does a 12-hour clock show"
    f' after {hours} hours?',
    content=('hour', start, hours),
    kind='number',
    solve=solve,
  )
