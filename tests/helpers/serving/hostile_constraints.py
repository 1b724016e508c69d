"""Constraints that are made to take long, compiled in a process with limits.

    python -m tests.helpers.serving.hostile_constraints      # one line of JSON

Time is counted in units of work: the processor time that an ordinary schema of
400 properties takes to compile.
"""

from collections.abc import Iterator
import hashlib
import json
import pathlib
import random
import resource
import time
from typing import Any

import numpy as np

from inference.constraints import constraint as constraint_lib, grammars
from text import tokenizer as tokenizer_lib

SPARE_BYTES = 350 * 2**20  # that all of them together may take
_MOST_TOKENS, _WALKS = 300, 2


def _ref(number: int) -> dict[str, str]:
  return {'$ref': f'#/$defs/a{number}'}


def _chain(length: int, step) -> dict[str, Any]:
  """Returns a schema that names the next one twice: 2^length of them."""
  defs = {f'a{number}': step(_ref(number + 1)) for number in range(length)}
  return {'$defs': {**defs, f'a{length}': {'type': 'null'}}, **_ref(0)}


def _keys(num: int, value: Any) -> dict[str, Any]:
  return {f'k{number}': value for number in range(num)}


def _nested(length: int) -> Any:
  found: Any = 1
  for _ in range(length):
    found = {'a': found}
  return found


def _arrays(depth: int) -> dict[str, Any]:
  found: dict[str, Any] = {'type': 'integer'}
  for _ in range(depth):
    found = {
      'type': 'array',
      'minItems': 1999,
      'maxItems': 2000,
      'items': found,
    }
  return found


_TREE = {
  'type': 'object',
  'properties': {'left': _ref(0), 'right': _ref(0)},
}
_SLOW_PATTERNS = {
  'nested quantifiers': '^((a+)+)+$',
  'a million by two counts': '^(a{1000}){1000}$',
  'half a million letters': '^(\\p{L}{1,2000}){1,200}$',
  'states that double': '.*a.{200}',
  'optional before as many': '^(a?){5000}a{5000}$',
  'counts within counts': '^(.{0,1000}a){10}$',
  'alternatives': '|'.join(f'w{i}x{i * 7919 % 1000}' for i in range(8000)),
}
_SCHEMAS = {
  'a reference to itself': {'$ref': '#'},
  'a cycle of references': {'$defs': {'a0': _ref(1), 'a1': _ref(0)}, **_ref(0)},
  'anyOf of itself': {'$defs': {'a0': {'anyOf': [_ref(0)] * 2}}, **_ref(0)},
  'allOf of itself': {'$defs': {'a0': {'allOf': [_ref(0)] * 2}}, **_ref(0)},
  'a tree': {'$defs': {'a0': _TREE}, **_ref(0)},
  'a clique': {
    '$defs': {
      f'a{each}': {'anyOf': [_ref(other) for other in range(60)]}
      for each in range(60)
    },
    **_ref(0),
  },
  'anyOf, 2^40': _chain(40, lambda after: {'anyOf': [after, after]}),
  'allOf, 2^40': _chain(40, lambda after: {'allOf': [after, after]}),
  'properties, 2^40': _chain(
    40,
    lambda after: {
      'type': 'object',
      'properties': {'x': after, 'y': after},
      'required': ['x', 'y'],
    },
  ),
  'allOf of anyOf, 10^10': {
    'allOf': [
      {'anyOf': [{'type': 'string', 'minLength': n} for n in range(10)]}
      for _ in range(10)
    ]
  },
  'an enum of objects': {'enum': [_nested(10)] * 800},
  'an enum of texts': {
    'enum': [hashlib.sha256(b'%d' % n).hexdigest() for n in range(1000)]
  },
  'anyOf of a thousand objects': {
    'anyOf': [
      {'type': 'object', 'properties': {f'k{n}': {}}} for n in range(1000)
    ]
  },
  'anyOf of 3,900': {'anyOf': [{'const': n} for n in range(3900)]},
  '10^5 properties': {'properties': _keys(10**5, {})},
  '10^4 keys required': {'required': [*_keys(10**4, {})]},
  '9 objects of 400': {
    'properties': _keys(9, {'type': 'object', 'properties': _keys(400, {})})
  },
  'arrays, 2000^10': _arrays(10),
  'a text of 90,000': {'const': 'x' * 90_000},
  'a number of 4,000 digits': {'maximum': 10**4000},
  'multiples at once': {
    'allOf': [{'type': 'integer', 'multipleOf': n} for n in (997, 991, 983)]
  },
  'patterns of 400 lengths': {
    'anyOf': [
      {'type': 'string', 'pattern': f'.*{chr(97 + n % 26)}.{{{n}}}'}
      for n in range(1, 400)
    ]
  },
  'patterns at once': {
    'allOf': [{'pattern': f'.*{letter}.{{12}}'} for letter in 'abcdefgh']
  },
  **{
    f'pattern: {name}': {'type': 'string', 'pattern': pattern}
    for name, pattern in _SLOW_PATTERNS.items()
  },
}
_REGEXES = {
  **_SLOW_PATTERNS,
  'a billion': 'a{1000000000}',
  'a million by three counts': '((a{100}){100}){100}',
  'a thousand stars': '(' * 1000 + 'a' + ')*' * 1000,
  '40,000 parentheses': '(' * 40_000 + ')' * 40_000,
  'anything, often': '(.*)' * 2000,
  'ten that double': '|'.join(f'.*{letter}.{{20}}' for letter in 'abcdefghij'),
}
_LARKS = {
  'ambiguous': 'start: s\ns: s s s | s s | "a" | ""',
  'plus of plus': 'start: (("a"+)+)+',
  'a cycle': 'start: a\na: b\nb: a',
  'without an end': 'start: start',
  'a billion': 'start: "a"{1000000000}',
  'a billion rules': 'start: a{1000} \na: b{1000}\nb: c{1000}\nc: "x" | "y"',
  '8,000 words': 'start: ' + ' | '.join(f'"w{n}"' for n in range(8000)),
  '8,000 options': 'start: ' + '("a"?)' * 8000,
  '20,000 parentheses': 'start: ' + '(' * 20_000 + '"a"' + ')' * 20_000,
  'terms that double': 'start: T\nT: '
  + ' & '.join(f'/.*{letter}.{{12}}/' for letter in 'abcdefghijkl'),
  'not in others': 'start: T\nT: '
  + ' & '.join(f'~/.*{letter}.{{14}}/' for letter in 'abcdefgh'),
  'nothing, often': 'start: a a a a a a a a\na: b b b b b b b b |\nb: "x" |',
  'a schema, multiples': 'start: %json {"multipleOf": 999983}',
  'a schema, 4,000 keys': 'start: %json '
  + json.dumps({'properties': _keys(4000, {})}),
  'a schema, a long text': 'start: %json {"maxLength": 1000000000}',
}


def _constraints() -> Iterator[tuple[str, Any, Any]]:
  for kind, make, cases in (
    ('schema', constraint_lib.json_schema, _SCHEMAS),
    ('regex', constraint_lib.regex, _REGEXES),
    ('lark', constraint_lib.lark, _LARKS),
  ):
    for name, case in cases.items():
      yield f'{kind}: {name}', make, case


def _unit(found: grammars.Grammars) -> float:
  """Returns the seconds of processor time that an ordinary schema takes."""
  seconds = []
  for number in range(5):
    schema = {'title': str(number), 'properties': _keys(400, {})}
    start = time.process_time()
    found.compile(constraint_lib.json_schema(schema))
    seconds.append(time.process_time() - start)
  return min(seconds)


def _walk(grammar: grammars.Grammar, eos_id: int, rng) -> dict[str, Any]:
  """Returns the seconds of the masks of a random answer, and how it ended."""
  matcher, seconds = grammar.matcher(), []
  while len(seconds) < _MOST_TOKENS:
    start = time.process_time()
    bits_W = np.zeros(9, np.uint32)
    matcher.fill(bits_W)
    if matcher.failure:
      seconds.append(time.process_time() - start)
      break
    allowed = np.flatnonzero(
      np.unpackbits(bits_W.view(np.uint8), bitorder='little')
    ).tolist()
    others = [token for token in allowed if token != eos_id]
    token = rng.choice(others or allowed)
    matcher.push(token)
    seconds.append(time.process_time() - start)
    if token == eos_id:
      break
  return {'seconds': seconds, 'failure': matcher.failure}


def _measured(found: grammars.Grammars, make, case) -> dict[str, Any]:
  result: dict[str, Any] = {'refused': '', 'walks': []}
  start, grammar = time.process_time(), None
  try:
    grammar = found.compile(make(case))
  except constraint_lib.ConstraintError as error:
    result['refused'] = str(error)
  result['seconds'] = time.process_time() - start
  rng = random.Random(0)
  if grammar:
    eos_id = found.tokenizer.eos_id
    result['walks'] = [_walk(grammar, eos_id, rng) for _ in range(_WALKS)]
  return result


def main() -> None:
  """Limits the memory of this process, and prints what it measures."""
  found = grammars.Grammars(tokenizer_lib.ByteTokenizer())
  unit = _unit(found)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  most = pages * resource.getpagesize() + SPARE_BYTES
  resource.setrlimit(resource.RLIMIT_AS, (most, most))
  cases = {
    name: _measured(found, make, case) for name, make, case in _constraints()
  }
  print(json.dumps({'unit': unit, 'cases': cases}))


if __name__ == '__main__':
  main()
