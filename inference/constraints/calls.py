"""Tool calls in the format of a model, with arguments that match the schemas.

    constraint = calls('hermes', [Tool(name='weather', parameters=...)], ...)

A forced answer is a call. Otherwise an answer is text, in which the marker that
opens a call is followed by a call. `text.replies.formats` reads the same
formats. Formats whose values are not JSON, such as Gemma's, are refused.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple

from inference.constraints import constraint as constraint_lib
from text.replies import formats

FORMATS = 'hermes', 'llama3', 'mistral', 'deepseek'
_OBJECT = {'type': 'object'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
  """A tool that may be called; `parameters` None: any object."""

  name: str
  parameters: Mapping[str, Any] | None


def calls(
  call_format: str,
  tools: Sequence[Tool],
  *,
  is_forced: bool,
  is_single: bool,
  answer: constraint_lib.Constraint | None = None,
) -> constraint_lib.Constraint:
  """Returns the constraint to texts with calls, or to calls alone.

  Args:
    call_format: a name of FORMATS.
    tools: the tools that may be called.
    is_forced: whether the answer must be a call, without text.
    is_single: whether the answer has at most one call.
    answer: the language of an answer without calls; None: any text.

  Raises:
    ConstraintError: the format has no grammar, or the constraint is too long.
  """
  if call_format not in FORMATS:
    raise constraint_lib.ConstraintError(
      f'got a model that calls tools in the format {call_format}, expected one'
      f' of {", ".join(FORMATS)}; leave strict out, and tool_choice at auto'
    )
  asked = {
    'format': call_format,
    'tools': [
      [tool.name, None if tool.parameters is None else dict(tool.parameters)]
      for tool in tools
    ],
    'is_forced': is_forced,
    'is_single': is_single,
    'answer': answer and {'kind': answer.kind, 'text': answer.text},
  }
  return constraint_lib.Constraint(
    kind=constraint_lib.CALLS, text=json.dumps(asked)
  )


class _Block(NamedTuple):
  """The calls behind an opening marker."""

  rule: str  # with `call` for a call
  one: Callable[[str, str], str]  # (name as JSON, rule of arguments): a call
  repeats: bool = False  # another block may follow


_Marker = Callable[[str], str]


def rules(
  asked: Mapping[str, Any],
  marker: _Marker,
  json_rule: Callable[[Any], str],
) -> str:
  """Returns the rules of `body`, in llguidance's Lark.

  Args:
    asked: the parsed text of a constraint of `calls`.
    marker: returns the Lark symbol of a marker: the name of a special token,
      which begins with <, or a string.
    json_rule: returns the Lark symbol of JSON that matches a schema.
  """
  block = _BLOCKS[asked['format']](marker, asked['is_single'])
  lines = [f'block: {block.rule}', r'TEXT: /(?s:.*)/']
  names = range(len(asked['tools']))
  for index, (name, schema) in enumerate(asked['tools']):
    schema = {**_OBJECT, **(schema or {})}
    one = block.one(json.dumps(name), f'arguments{index}')
    lines += [f'arguments{index}: {json_rule(schema)}', f'call{index}: {one}']
  lines.append(f'call: {" | ".join(f"call{index}" for index in names)}')
  found = formats.CALLS[asked['format']]
  return '\n'.join([*lines, *_body(asked, found, marker, block.repeats)])


def _body(
  asked: Mapping[str, Any],
  found: formats.CallFormat,
  marker: _Marker,
  repeats: bool,
) -> list[str]:
  """Returns the rules of an answer: the calls, and text if it is allowed."""
  begin = marker(found.begin)
  is_special = begin.startswith('<')
  forced = f'{begin} block' + (rf' (/\n?/ {begin} block)*' if repeats else '')
  if found.has_bare:  # the whole answer may be calls without a marker
    forced = f'({begin})? block'
  if asked['is_forced']:
    return [f'body: {forced}']
  if asked['answer']:
    return [f'body: answer | {forced}']
  if found.has_bare:  # text that begins with { is a call
    behind = f' ({begin} block)?' if is_special else ''
    return [f'body: block | TALK?{behind}', r'TALK: /[^{\s](?s:.*)/']
  if is_special:
    free = f'TEXT {begin} block'
    return [f'body: ({free})* TEXT' if repeats else f'body: TEXT | {free}']
  return [
    'body: free* TEXT' if repeats else 'body: TEXT | free',
    'free: opened block',
    f'opened[lazy]: TEXT {begin}',  # TEXT ends at the first marker
  ]


def _object(name: str, key: str, arguments: str) -> str:
  head = json.dumps(f'{{"name": {name}, "{key}": ')
  return f'{head} {arguments} "}}"'


def _hermes(marker: _Marker, is_single: bool) -> _Block:
  end = marker('</tool_call>')
  return _Block(
    rf'/\n?/ call /\n?/ {end}',
    lambda name, arguments: _object(name, 'arguments', arguments),
    repeats=not is_single,
  )


def _llama3(marker: _Marker, is_single: bool) -> _Block:
  return _Block(
    'call' if is_single else 'call ("; " call)*',
    lambda name, arguments: _object(name, 'parameters', arguments),
  )


def _mistral(marker: _Marker, is_single: bool) -> _Block:
  between = marker('[ARGS]')
  if between.startswith('<'):  # a special token of the newer form
    return _Block(
      'call',
      lambda name, arguments: f'{name} {between} {arguments}',
      repeats=not is_single,
    )
  again = '' if is_single else ' (", " call)*'
  return _Block(
    f'" "? "[" call{again} "]"',
    lambda name, arguments: _object(name, 'arguments', arguments),
  )


def _deepseek(marker: _Marker, is_single: bool) -> _Block:
  found = formats.CALLS['deepseek']
  begin, end, between = map(marker, found.inner)
  again = '' if is_single else r' (/\n?/ call)*'

  def one(name: str, arguments: str) -> str:
    head = json.dumps(f'{json.loads(name)}\n```json\n')
    tail = json.dumps('\n```')
    return f'{begin} "function" {between} {head} {arguments} {tail} {end}'

  return _Block(f'call{again} {marker(found.end)}', one)


_BLOCKS = {
  'hermes': _hermes,
  'llama3': _llama3,
  'mistral': _mistral,
  'deepseek': _deepseek,
}
