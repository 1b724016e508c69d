"""Word problems: a story of as many steps as its level."""

from data.problems import draws as draws_lib, problem, working

NAMES = (
  'Ada', 'Amir', 'Anna', 'Ben', 'Bruno', 'Carla', 'Chen', 'Dana', 'David',
  'Elena', 'Emil', 'Fatima', 'Felix', 'Grace', 'Hana', 'Hugo', 'Ines', 'Ivan',
  'Jamal', 'Julia', 'Kofi', 'Lara', 'Leo', 'Lina', 'Marco', 'Maya', 'Nadia',
  'Noah', 'Olga', 'Omar', 'Priya', 'Rosa', 'Samir', 'Sofia', 'Tariq', 'Tom',
  'Vera', 'Wei', 'Yara', 'Zoe',
)  # fmt: skip
_THINGS = (
  'apples', 'books', 'cards', 'coins', 'eggs', 'marbles', 'oranges', 'pencils',
  'photos', 'plants', 'shells', 'stamps', 'stickers', 'tickets',
)  # fmt: skip

# The sentences of a step, by its sign. {a}: the person, {b}: another one,
# {n}: the number, {x}: the things.
_TOLD = {
  '+': (
    '{a} buys {n} more {x}.',
    '{b} gives {a} {n} {x}.',
    'Then {a} finds another {n} {x}.',
  ),
  '-': (
    '{a} gives {n} {x} to {b}.',
    '{a} loses {n} {x}.',
    '{b} borrows {n} of them.',
  ),
  '*': (
    'Then {a} gets enough {x} to have {n} times as many.',
    '{b} promises {a} a prize: the number of {x} is multiplied by {n}.',
  ),
  '/': (
    '{a} divides the {x} equally among {n} boxes and keeps only one box.',
    '{a} shares the {x} equally among {n} people and keeps one share.',
  ),
}
_MOST = 500  # things that somebody has in a story


def words(draws: draws_lib.Draws, level: int) -> problem.Problem:
  """Tells how the number of some things changes, in `level` steps."""
  person, other = draws.some(NAMES, 2)
  things = draws.pick(_THINGS)
  start = number = draws.between(2, 20 * level)
  steps, told = [], [f'{person} has {start} {things}.']
  for _ in range(level):
    sign, by = _step(draws, number)
    number = working.Working().calculate(number, sign, by)
    steps.append((sign, by))
    sentence = draws.pick(_TOLD[sign])
    told.append(sentence.format(a=person, b=other, n=by, x=things))
  price = draws.between(2, 12) if level >= 3 and draws.share() < 0.4 else 0
  if price:
    told.append(f'Then {person} sells all of them for ${price} each.')
    told.append(f'How many dollars does {person} get?')
  else:
    told.append(f'How many {things} does {person} have now?')

  def solve(work: working.Working) -> working.Number:
    total = start
    for sign, by in steps:
      line = f'{person} has {{}} {things}.'
      total = work.calculate(total, sign, by, line)
    if price:
      line = f'{person} gets {{}} dollars.'
      total = work.calculate(total, '*', price, line)
    return total

  return problem.Problem(
    family='words',
    level=level,
    question=' '.join(told),
    content=(start, *steps, price),
    kind='number',
    solve=solve,
  )


def _step(draws: draws_lib.Draws, number: working.Number) -> tuple[str, int]:
  """Returns a sign and a number that keep a story within whole things."""
  divisors = [by for by in range(2, 11) if number % by == 0 and number > by]
  signs = ['+']
  signs += ['-'] * (number > 3)
  signs += ['*'] * (number * 2 <= _MOST)
  signs += ['/'] * bool(divisors)
  sign = draws.pick(signs)
  if sign == '/':
    return sign, draws.pick(divisors)
  most = {
    '+': 50,
    '-': int(number) - 1,
    '*': min(5, _MOST // int(number)),
  }
  return sign, draws.between(2, most[sign])
