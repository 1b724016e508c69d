"""Families of order and of logic: comparisons, sorting, chains, statements."""

from collections.abc import Sequence
import fractions

from data.problems import draws as draws_lib, problem, stories, working

_TRAITS = (
  ('taller', 'shorter', 'tallest', 'shortest'),
  ('older', 'younger', 'oldest', 'youngest'),
  ('faster', 'slower', 'fastest', 'slowest'),
  ('richer', 'poorer', 'richest', 'poorest'),
)
_YES_NO = ('yes', 'no')


def comparisons(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Compares integers, decimals or fractions."""
  num = 3 if level in (3, 5) else 2
  is_largest = draws.share() < 0.5
  asked = 'largest' if is_largest else 'smallest'
  if level == 1:
    return _compared_integers(draws, asked)
  # (as written, value in units of 1 / base)
  if level in (2, 3):
    base, unit = 1_000, 'thousandths'
    items = _decimals(draws, num)
  else:
    items, base = _fractions(draws, num, 9 if level == 4 else 12)
    unit = f'parts of 1/{base}'

  def solve(work: working.Working) -> str:
    sizes = [
      work.choose(
        size,
        [size // 10 or size + 1, size + base],
        f'{text} is {{}} {unit}.',
      )
      for text, size in items
    ]
    return _most(work, [text for text, _ in items], sizes, asked)

  return problem.Problem(
    family='comparisons',
    level=level,
    question=f'Which is the {asked}: {_listed([text for text, _ in items])}?',
    content=tuple(sorted(fractions.Fraction(n, base) for _, n in items)),
    kind='number',
    solve=solve,
  )


def _compared_integers(draws: draws_lib.Draws, asked: str) -> problem.Problem:
  """Returns a comparison of integers whose digits look alike."""
  first = draws.between(10, 999)
  second = draws.pick(
    [first + 1, first * 10, int(str(first)[::-1]), draws.between(10, 999)]
  )
  numbers = [first, second if second != first else first + 9]
  numbers = draws.some(numbers, 2)
  texts = [str(number) for number in numbers]
  return problem.Problem(
    family='comparisons',
    level=1,
    question=f'Which is the {asked}: {_listed(texts)}?',
    content=tuple(sorted(numbers)),
    kind='number',
    solve=lambda work: _most(work, texts, numbers, asked),
  )


def _listed(texts: Sequence[str]) -> str:
  """Returns 'a, b or c'."""
  return f'{", ".join(texts[:-1])} or {texts[-1]}'


def _decimals(draws: draws_lib.Draws, num: int) -> list[tuple[str, int]]:
  """Returns decimals with up to three places and equal whole parts."""
  whole = draws.between(0, 9)
  found: dict[int, str] = {}
  while len(found) < num:
    places = draws.between(1, 3)
    part = draws.between(1, 10**places - 1)
    size = whole * 1_000 + part * 10 ** (3 - places)
    found.setdefault(size, f'{whole}.{part:0{places}}')
  return [(text, size) for size, text in found.items()]


def _fractions(
  draws: draws_lib.Draws, num: int, most: int
) -> tuple[list[tuple[str, int]], int]:
  """Returns fractions of different values, and a common denominator."""
  found: dict[fractions.Fraction, str] = {}
  base = 1
  while len(found) < num:
    under = draws.between(2, most)
    over = draws.between(1, under - 1)
    if found.setdefault(fractions.Fraction(over, under), '') == '':
      found[fractions.Fraction(over, under)] = f'{over}/{under}'
      base *= under
  return [(text, int(each * base)) for each, text in found.items()], base


def _most(
  work: working.Working, texts: Sequence[str], sizes: Sequence, asked: str
) -> str:
  """Writes which of the items has the largest or smallest size."""
  order = sorted(range(len(texts)), key=lambda i: sizes[i])
  if asked == 'largest':
    order.reverse()
  ranked = [texts[i] for i in order]
  return work.choose(ranked[0], ranked[1:], f'The {asked} is {{}}.')


def sorting(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Sorts 3 to 7 different numbers, some of them negative at high levels."""
  most = (50, 100, 500, 1_000, 5_000)[level - 1]
  numbers: list[int] = []
  while len(numbers) < level + 2:
    number = draws.between(-most if level >= 4 else 0, most)
    if number not in numbers:
      numbers.append(number)
  is_rising = draws.share() < 0.5
  end = 'smallest' if is_rising else 'largest'

  def solve(work: working.Working) -> list[int]:
    left, done = list(numbers), []
    while len(left) > 1:
      ranked = sorted(left, reverse=not is_rising)
      line = f'The {end} of {", ".join(map(str, left))} is {{}}.'
      done.append(work.choose(ranked[0], ranked[1:], line))
      left.remove(done[-1])
    return done + left

  ways = ('smallest to largest', 'largest to smallest')
  return problem.Problem(
    family='sorting',
    level=level,
    question=f'Sort these numbers from {ways[not is_rising]}:'
    f' {", ".join(map(str, numbers))}.',
    content=tuple(sorted(numbers)),
    kind='numbers',
    solve=solve,
  )


def logic(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Draws a conclusion from a chain of comparisons or from statements."""
  return (_chain if draws.share() < 0.5 else _statements)(draws, level)


def _chain(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Orders 3 to 7 people; every neighbour is compared once."""
  people = draws.some(stories.NAMES, level + 2)
  more, less, most, least = draws.pick(_TRAITS)
  facts = [
    f'{a} is {more} than {b}.'
    if draws.share() < 0.5
    else f'{b} is {less} than {a}.'
    for a, b in zip(people, people[1:], strict=False)
  ]
  # From one end to the person asked for: the first or the second.
  rank = draws.between(0, 1) if level >= 3 else 0
  is_most = draws.share() < 0.5
  asked = ('', 'second ')[rank] + (most if is_most else least)

  def solve(work: working.Working) -> str:
    left = people if is_most else people[::-1]
    word = more if is_most else less
    first = work.choose(left[0], left[1:], f'Nobody is {word} than {{}}.')
    if not rank:
      return first
    # After a mistake, the one who follows the person that was found.
    following = left[(left.index(first) + 1) % len(left)]
    others = [each for each in left if each not in (first, following)]
    line = f'After {first}, the next one is {{}}.'
    return work.choose(following, others, line)

  told = ' '.join(draws.some(facts, len(facts)))
  return problem.Problem(
    family='logic',
    level=level,
    question=f'{told} Who is the {asked}?',
    content=('chain', *people, rank, is_most),
    kind='word',
    choices=tuple(sorted(people)),
    solve=solve,
  )


def _statements(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Combines level + 1 statements with and, or and not."""
  letters = draws.some('ABCDEFGHKLMPQRSTUVW', level + 1)
  values = [draws.share() < 0.5 for _ in letters]
  negated = [draws.share() < 0.35 for _ in letters]
  words = [draws.pick(('and', 'or')) for _ in letters[1:]]
  terms = [
    f'not {letter}' if no else letter
    for letter, no in zip(letters, negated, strict=True)
  ]
  claim = terms[0]
  for word, term in zip(words, terms[1:], strict=True):
    claim = (
      f'({claim}) {word} {term}' if ' ' in claim else (f'{claim} {word} {term}')
    )

  def solve(work: working.Working) -> str:
    known = [
      _judged(work, term, value != no) if no else value
      for term, value, no in zip(terms, values, negated, strict=True)
    ]
    result, text = known[0], terms[0]
    for word, term, value in zip(words, terms[1:], known[1:], strict=True):
      joined = (result and value) if word == 'and' else (result or value)
      text = (
        f'({text}) {word} {term}' if ' ' in text else (f'{text} {word} {term}')
      )
      result = _judged(work, text, joined)
    return 'yes' if result else 'no'

  told = ' '.join(
    f'{letter} is {"true" if value else "false"}.'
    for letter, value in zip(letters, values, strict=True)
  )
  return problem.Problem(
    family='logic',
    level=level,
    question=f'{told} Is this true: {claim}?',
    # Which letter stands for a statement says nothing.
    content=('statements', *values, *negated, *words),
    kind='word',
    choices=_YES_NO,
    solve=solve,
  )


def _judged(work: working.Working, text: str, value: bool) -> bool:
  """Writes whether a statement is true; returns it."""
  words = 'true', 'false'
  right, wrong = words[not value], words[value]
  return work.choose(right, [wrong], f'{text} is {{}}.') == 'true'
