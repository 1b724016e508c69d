"""Inputs of a chat template: plain data in which special tokens are disarmed.

A template writes special tokens between the messages. If a message has the
string of a special token, the rendered text does not show the difference. So
before rendering, every such string in a message is cut by a mark, a character
that occurs nowhere else. After rendering, only the whole strings are special
tokens, and the marks are removed.

A template may join parts of messages. So a string that may be the start or the
end of a special token is cut, too. A template may also change the case of text.
There is no guard against the following:

- A template deletes text inside a message, and the rest joins to a token.
- A template makes a special token of a role ('<|' + role + '|>'). The server
  that accepts messages decides which roles are allowed.
- A format marks turns with ordinary text ('[INST]' of Llama 2).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import functools
import re
from typing import Any, NamedTuple

# Templates compare roles with these names, so they are never cut.
_ROLES = frozenset(
  {'system', 'developer', 'user', 'assistant', 'tool', 'function', 'ipython'}
)
_WORD = re.compile(r'[\w-]*')
# Keys under which clients send the reasoning of a model. Templates read the
# first key, and templates of gpt-oss the second.
_REASONING = ('reasoning_content', 'thinking', 'reasoning')


def plain(value: Any, where: str) -> Any:
  """Returns a copy of `value`, which has JSON values only.

  Objects with methods would be a way out of the sandbox.

  Raises:
    ValueError: `value` has other objects; names `where`.
  """
  if value is None or type(value) in (str, int, float, bool):
    return value
  if isinstance(value, Mapping):
    if all(type(key) is str for key in value):
      return {key: plain(item, where) for key, item in value.items()}
  elif isinstance(value, list | tuple):
    return [plain(item, where) for item in value]
  raise ValueError(
    f'{where}: got a {type(value).__name__}, expected JSON values'
  )


def plain_messages(messages: Iterable[Any]) -> list[dict[str, Any]]:
  """Returns a copy of the messages in the form that templates expect.

  Keys with the value None are left out, as templates test whether a key exists.

  Raises:
    ValueError: a message is malformed, or there is no message.
  """
  result = []
  for i, message in enumerate(messages):
    message = plain(message, f'message {i}')
    if not isinstance(message, dict):
      raise ValueError(f'message {i} is {message!r}, expected an object')
    _check_message(i, message)
    message = {key: item for key, item in message.items() if item is not None}
    thoughts = [message[key] for key in _REASONING if key in message]
    if thoughts:
      message = {
        'thinking': thoughts[0],
        **message,
        'reasoning_content': thoughts[0],
      }
    result.append(message)
  if not result:
    raise ValueError('got no messages, expected at least one')
  return result


def _check_message(i: int, message: Mapping[str, Any]) -> None:
  role, content = message.get('role'), message.get('content')
  if not isinstance(role, str):
    raise ValueError(f'message {i} has role {role!r}, expected a string')
  # An assistant that calls a tool may have no content.
  if content is None and role == 'assistant':
    return
  is_parts = isinstance(content, list) and all(
    isinstance(part, dict) for part in content
  )
  if not isinstance(content, str) and not is_parts:
    raise ValueError(
      f'message {i} has content {content!r}, expected a string or a list of'
      ' parts'
    )


def strings(value: Any) -> Iterator[str]:
  """Yields every string in plain data, keys included."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for key, item in value.items():
      yield key
      yield from strings(item)
  elif isinstance(value, list):
    for item in value:
      yield from strings(item)


def unused_characters(texts: Collection[str], count: int) -> tuple[str, ...]:
  """Returns characters that are in none of the texts; equal for equal texts.

  They are Unicode's noncharacters, which text does not have, or else characters
  for private use.

  Raises:
    ValueError: the texts have too many of these characters.
  """
  unused: list[str] = []
  for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)):
    if len(unused) == count:
      break
    if not any(chr(code) in text for text in texts):
      unused.append(chr(code))
  if len(unused) < count:
    raise ValueError(
      'got messages with every private character of Unicode, expected some'
      ' unused ones; remove these characters'
    )
  return tuple(unused)


class Guard:
  """Cuts the strings of special tokens in data, and finds whole ones."""

  def __init__(self, special_tokens: Iterable[str], mark: str):
    self._find = _finder(frozenset(special_tokens))
    self._mark = mark
    # A special token of one character cannot be cut. If the data has it, it is
    # text everywhere, even where the template writes it.
    self._uncut: set[str] = set()

  def cut(self, value: Any) -> Any:
    """Returns plain data with a mark in every string of a special token."""
    if isinstance(value, str):
      return self._cut(value)
    if isinstance(value, list):
      return [self.cut(item) for item in value]
    if not isinstance(value, dict):
      return value
    return {
      self._cut(key): item if _is_known_role(key, item) else self.cut(item)
      for key, item in value.items()
    }

  def whole(self, text: str) -> list[tuple[int, int]]:
    """Returns the spans of special tokens without a mark; call `cut` first."""
    return [
      match.span()
      for match in self._find.exact.finditer(text)
      if match.group() not in self._uncut
    ]

  def _cut(self, text: str) -> str:
    self._uncut |= self._find.single.intersection(text)
    places = sorted(self._places(_lower(text)))
    parts = (
      text[start:end]
      for start, end in zip((0, *places), (*places, len(text)), strict=True)
    )
    return self._mark.join(parts)

  def _places(self, text: str) -> set[int]:
    """Returns the places at which to cut a text in lower case."""
    places = {match.start() + 1 for match in self._find.lowered.finditer(text)}
    # A single word is not cut at its ends: templates compare names.
    if _WORD.fullmatch(text):
      return places
    # A prefix of a token at the end, or a suffix at the start, may join to a
    # whole token with the text next to it.
    for length in range(1, min(self._find.longest, len(text)) + 1):
      if text[-length:] in self._find.heads:
        places.add(len(text) - length + 1)
      if text[:length] in self._find.tails:
        places.add(min(length - 1, 1))
    return places


class _Finder(NamedTuple):
  """Patterns and sets that find special tokens, whole or in part."""

  exact: re.Pattern[str]  # longest token first, as tokenizers match
  lowered: re.Pattern[str]  # in lower case, overlapping matches included
  single: frozenset[str]  # tokens of one character
  heads: frozenset[str]  # proper prefixes of tokens, in lower case
  tails: frozenset[str]  # proper suffixes of tokens, in lower case
  longest: int  # length of the longest head or tail


@functools.lru_cache(maxsize=32)
def _finder(special_tokens: frozenset[str]) -> _Finder:
  lowered = {_lower(token) for token in special_tokens}
  cuts = [(token, n) for token in lowered for n in range(1, len(token))]
  return _Finder(
    exact=re.compile(_any_of(special_tokens)),
    lowered=re.compile(f'(?={_any_of(t for t in lowered if len(t) > 1)})'),
    single=frozenset(token for token in special_tokens if len(token) == 1),
    heads=frozenset(token[:n] for token, n in cuts),
    tails=frozenset(token[n:] for token, n in cuts),
    longest=max(map(len, lowered), default=1) - 1,
  )


def _any_of(tokens: Iterable[str]) -> str:
  # (?!) never matches.
  by_length = sorted(tokens, key=lambda token: (-len(token), token))
  return '|'.join(map(re.escape, by_length)) or '(?!)'


def _is_known_role(key: str, value: Any) -> bool:
  return key == 'role' and isinstance(value, str) and value in _ROLES


def _lower(text: str) -> str:
  """Returns `text` in lower case, except characters that would become two."""
  lowered = text.lower()
  if len(lowered) == len(text):
    return lowered
  return ''.join(c.lower() if len(c.lower()) == 1 else c for c in text)
