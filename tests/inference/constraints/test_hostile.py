"""Hostile constraints take bounded time and memory, or are refused.

Each of them is compiled, and gives random answers, in a process whose memory
has a limit. An allocation beyond it would end that process.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from inference.constraints import constraint as constraint_lib, grammars
from tests.helpers import commands, tiny_models
from text import tokenizer as tokenizer_lib

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_REFUSED = {
  'schema: a reference to itself': 'no token may come next',
  'schema: a clique': 'no token may come next',
  'schema: allOf of anyOf, 10^10': 'schema too large',
  'schema: 10^5 properties': 'got 1,388,906 characters, expected 1 to 100,000',
  'schema: multiples at once': '#/allOf: got schemas that may hold at once',
  'schema: pattern: a million by two counts': 'simplify it',
  'regex: optional before as many': 'too many states; simplify it',
  'regex: a billion': 'simplify it',
  'regex: a million by three counts': 'simplify it',
  'regex: a thousand stars': 'simplify it',
  'lark: a cycle': 'no token may come next',
  'lark: 8,000 options': 'simplify it',
  'lark: a schema, multiples': '%json, number 1: #/multipleOf: got 999983',
  'lark: a schema, 4,000 keys': '#/properties: got 4000 properties, expected',
}
_KEPT = (
  'schema: an enum of texts',
  'schema: properties, 2^40',
  'schema: 10^4 keys required',
  'regex: states that double',
  'lark: ambiguous',
)


@pytest.mark.slow
def test_hostile_constraints_take_bounded_time_and_memory():
  done = subprocess.run(
    [sys.executable, '-m', 'tests.helpers.serving.hostile_constraints'],
    cwd=commands.ROOT,
    env=tiny_models.subprocess_env(num_devices=1),
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-2000:]
  found = json.loads(done.stdout)
  unit, cases = found['unit'], found['cases']
  assert len(cases) > 50
  for name, words in _REFUSED.items():
    assert words in cases[name]['refused'], name
  for name in _KEPT:
    assert not cases[name]['refused'], name
  for name, case in cases.items():
    # The largest that was measured is 50.
    assert case['seconds'] < 200 * unit, name
    for walk in case['walks']:
      seconds = walk['seconds']
      # A batch waits for the slowest mask. Measured: 2.1 units.
      assert max(seconds) < 20 * unit, name
      most = grammars._SPARE_SECONDS + len(seconds) * grammars._MASK_SECONDS
      # The last one may be beyond it.
      assert sum(seconds[:-1]) < 1.5 * most, name
  slow = cases['lark: plus of plus']['walks'][0]
  assert 'masks take too long' in slow['failure']


def _letters(grammar, num):
  """Returns why an answer of letters from all over the world fails, or ''."""
  matcher, bits_W = grammar.matcher(), np.zeros(9, np.uint32)
  for letter in 'aäßжשلक中あ한' * num:
    for token in letter.encode():
      matcher.fill(bits_W)
      assert matcher.failure or bits_W[token >> 5] >> (token & 31) & 1
      matcher.push(token)
  return matcher.failure


def test_an_answer_does_not_use_up_the_states_of_the_next_one(monkeypatch):
  """The library shares them among all answers of a grammar, without end."""
  monkeypatch.setitem(grammars._LIMITS, 'max_lexer_states', 3000)
  found = grammars.Grammars(tokenizer_lib.ByteTokenizer())
  constraint = constraint_lib.regex('\\p{L}{1,2000}x')
  grammar = found.compile(constraint)
  roots = {grammar.root: None}
  for _ in range(6):
    # One answer alone has more states than there may be, too.
    assert not _letters(grammar, 30)
    roots[grammar.root] = None
  assert len(roots) > 2
  # Without it the second answer fails at its first token.
  monkeypatch.setattr(grammars.Matcher, '_is_worn', lambda self: False)
  grammar = grammars.Grammars(tokenizer_lib.ByteTokenizer()).compile(constraint)
  assert 'too many states' in _letters(grammar, 30)
  assert 'too many states' in _letters(grammar, 1)


def test_grammars_that_took_long_are_not_kept(monkeypatch):
  found = grammars.Grammars(tokenizer_lib.ByteTokenizer())
  asked = [constraint_lib.regex(f'{n}+') for n in range(4)]
  first = found.compile(asked[0])
  assert found.compile(asked[0]) is first
  first.seconds = grammars._MOST_SECONDS
  second = found.compile(asked[0])
  assert second is not first
  second.seconds = grammars._MOST_SECONDS_OF_ALL - 0.5
  found.compile(asked[1])
  assert [*found._kept] == asked[:2]
  found.compile(asked[2]).seconds = 0.6
  found.compile(asked[3])
  assert [*found._kept] == asked[1:]


def test_a_draft_is_charged_to_its_sequence():
  found = grammars.Grammars(tokenizer_lib.ByteTokenizer())
  matcher = found.compile(constraint_lib.regex('a+')).matcher()
  bits_W = np.zeros(9, np.uint32)
  matcher.ahead()._clock.spent(1.0)
  matcher.fill(bits_W)
  assert 'masks take too long' in matcher.failure
  # The time of one that is not slow is not saved up.
  other = found.compile(constraint_lib.regex('b+')).matcher()
  for _ in range(1000):
    other._clock.allow()
  assert other._clock.spent(0.3)
