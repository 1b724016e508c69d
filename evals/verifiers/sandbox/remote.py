"""Tests and the program that they test, in two processes.

    solution                          tests
    add = lambda a, b: a + b          assert add(1, 2) == 3
                    <- call add(1, 2) -
                    -      3         ->

The tests' process sends calls and compares the replies. The right values never
reach the program. The program can only answer calls: it may print, exit, or
change the meaning of equality, and no test passes for that.

A name that the tests use and do not define belongs to the program, unless it is
a builtin of Python. Values that are not plain (`values.py`), such as objects of
a class, stay with the program: their attributes, calls, items and iteration are
calls, too.
"""

import builtins
from collections.abc import Iterator, Mapping, Sequence
import itertools
import traceback
from typing import Any

from evals.verifiers.sandbox import values

_SHOWN = 300  # characters of an error


def serve(source: str, requests: int, replies: int) -> None:
  """Runs a program, then answers calls of its functions until the pipe ends."""
  namespace: dict[str, Any] = {'__name__': 'solution'}
  objects: list[Any] = []
  failed = ''
  try:
    exec(compile(source, 'answer', 'exec'), namespace)
  except BaseException as error:  # SystemExit, too: no test has run yet
    failed = _told(error)

  def refer(value: Any) -> int:
    objects.append(value)
    return len(objects) - 1

  while True:
    try:
      verb, target, encoded = values.receive(requests)
    except EOFError:
      return
    if failed:
      values.send(replies, {'raised': ['Exception', failed]})
      continue
    try:
      given = values.decode(encoded, objects.__getitem__)
      owner = namespace if target is None else objects[target]
      found = _done(verb, owner, given)
      reply = {'value': values.encode(found, refer)}
      if verb == 'call':  # a function may change its arguments in place
        reply['given'] = values.encode(given, refer)
    except BaseException as error:
      reply = {'raised': [type(error).__name__, _told(error)]}
    values.send(replies, reply)


def _done(verb: str, owner: Any, given: Any) -> Any:
  if verb == 'name':
    return owner[given]
  if verb == 'call':
    args, kwargs = given
    return owner(*args, **kwargs)
  if verb == 'get':
    return getattr(owner, given)
  if verb == 'item':
    return owner[given]
  kinds = {'next': next, 'iter': iter, 'len': len, 'str': str, 'repr': repr}
  return kinds[verb](owner)


def _told(error: BaseException) -> str:
  return f'{type(error).__name__}: {error}'[:_SHOWN]


class SolutionError(Exception):
  """The program raised an exception of its own class."""


class _Link:
  """The tests' end of the pipes."""

  def __init__(self, requests: int, replies: int):
    self._requests, self._replies = requests, replies

  def ask(self, verb: str, target: int | None, given: Any) -> Any:
    encoded = values.encode(given, self._refer)
    try:
      values.send(self._requests, [verb, target, encoded])
      reply = values.receive(self._replies)
    except (EOFError, OSError):
      raise SolutionError('the program ended before the tests did') from None
    if not isinstance(reply, dict):
      raise SolutionError('the program wrote no reply')
    if 'raised' in reply:
      raise _error(*map(str, reply['raised']))
    if 'given' in reply:
      after = values.decode(reply['given'], self._follow)
      for before, changed in _pairs(given, after):
        _change(before, changed)
    return values.decode(reply.get('value'), self._follow)

  def _follow(self, number: int) -> '_Remote':
    return _Remote(self, number)

  def _refer(self, value: Any) -> int:
    if isinstance(value, _Remote):
      return object.__getattribute__(value, '_number')
    raise TypeError(
      f'the tests give a value of type {type(value).__name__} to the program,'
      ' expected plain data, or a value that the program returned'
    )


def _error(name: str, told: str) -> Exception:
  """Returns an exception of the program: of Python's type, or another."""
  kind = getattr(builtins, name, None)
  if isinstance(kind, type) and issubclass(kind, Exception):
    try:
      return kind(told)
    except TypeError:  # it wants other arguments, as UnicodeDecodeError does
      pass
  return SolutionError(told)


def _pairs(given: Any, after: Any) -> Iterator[tuple[Any, Any]]:
  (args, kwargs), (args_after, kwargs_after) = given, after
  yield from zip(args, args_after, strict=False)
  yield from ((kwargs[k], kwargs_after[k]) for k in kwargs if k in kwargs_after)


def _change(before: Any, after: Any) -> None:
  """Changes a list, set or dict as the program has changed its copy."""
  if type(before) is not type(after) or before == after:
    return
  if isinstance(before, list):
    before[:] = after
  elif isinstance(before, dict | set):
    before.clear()
    before.update(after)


class _Remote:
  """A value that stays with the program."""

  def __init__(self, link: _Link, number: int):
    self._link, self._number = link, number

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._link.ask('call', self._number, [list(args), kwargs])

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    return self._link.ask('get', self._number, name)

  def __getitem__(self, key: Any) -> Any:
    return self._link.ask('item', self._number, key)

  def __iter__(self) -> Any:
    return self._link.ask('iter', self._number, None)

  def __next__(self) -> Any:
    return self._link.ask('next', self._number, None)

  def __len__(self) -> int:
    return int(self._link.ask('len', self._number, None))

  def __str__(self) -> str:
    return str(self._link.ask('str', self._number, None))

  def __repr__(self) -> str:
    return str(self._link.ask('repr', self._number, None))


class _Names(dict):
  """The names of the tests; other names belong to the program."""

  def __init__(self, link: _Link):
    super().__init__(__name__='tests')
    self._link = link

  def __missing__(self, name: str) -> Any:
    if hasattr(builtins, name):  # a program cannot redefine `all`
      raise KeyError(name)
    try:
      return self._link.ask('name', None, name)
    except KeyError:
      raise NameError(f'the program defines no {name}') from None


def test(
  tests: Sequence[str], entry_point: str, requests: int, replies: int
) -> list[str]:
  """Runs tests; returns the fault of each test, '' for a passed test.

  Args:
    tests: Python code with asserts; a name that one test defines is known to
      the next.
    entry_point: '' or the name of the function that `check` of the tests gets.
  """
  names = _Names(_Link(requests, replies))
  calls = [f'check({entry_point})'] if entry_point else []
  sources = {
    f'test {number}': source
    for number, source in enumerate(itertools.chain(tests, calls))
  }
  results = []
  for name, source in sources.items():
    try:
      exec(compile(source, name, 'exec'), names)
      results.append('')
    except Exception as error:
      results.append(_where(error, sources))
  return results


def _where(error: Exception, sources: Mapping[str, str]) -> str:
  """Returns an error with the line of the tests where it was raised."""
  places = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename in sources and frame.lineno
  ]
  told = _told(error) if str(error) else type(error).__name__
  if not places:
    return told
  lines = sources[places[-1].filename].splitlines()
  return f'{told} at {lines[(places[-1].lineno or 1) - 1].strip()}'[:_SHOWN]
