"""The formats in which families of models write calls of tools.

A call counts only if it names a tool of the request and its arguments are one
JSON object. All else stays text, as the model wrote it: broken JSON, an unknown
name, text that only looks like a call.

    hermes     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, of
               ChatML and Qwen; also with <function=...><parameter=...> inside,
               as Qwen3-Coder writes it
    llama3     <|python_tag|>{...}, or the whole answer is {"name": ...,
               "parameters": {...}}; several are separated by ;
    mistral    [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or
               [TOOL_CALLS]name[ARGS]{...} for each call
    gemma      <start_function_call>call:name{key:<escape>text<escape>}
               <end_function_call>; in gemma4 the markers are others
    deepseek   calls between their own markers, of V3 and R1 with a JSON block
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any, NamedTuple

from text.replies import events, gemma_values

# The parameters of each tool, by its name, as a JSON schema.
Tools = Mapping[str, Mapping[str, Any]]
# Returns a marker as it is in the text, see `text.replies.markers`.
Form = Callable[[str], str]


MOST_BARE = 512  # characters that tell whether a bare call may begin


class Found(NamedTuple):
  """The calls in the body of a block, and the text after them."""

  calls: list[events.Call]
  rest: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallFormat:
  """A format of calls."""

  begin: str  # marker that opens a block of calls
  end: str = ''  # closes the block; '': the next block or the end does
  inner: tuple[str, ...] = ()  # markers inside a block
  # Reads the body of a block: (body, tools, form). None: it has no calls.
  read: Callable[[str, Tools, Form], Found | None]
  has_bare: bool = False  # the whole answer may be a body without markers
  has_short_ids: bool = False  # its template wants ids of 9 letters and digits

  @property
  def markers(self) -> tuple[str, ...]:
    """All its markers."""
    return tuple(filter(None, (self.begin, self.end, *self.inner)))


def may_be_bare(text: str, tools: Tools) -> bool:
  """Returns whether a bare call of one of the tools may begin so."""
  squeezed = ''.join(text[:MOST_BARE].split())
  for name in tools:
    for start in ('{"name":"', '{"type":"function","name":"'):
      begin = f'{start}{name}"'
      if squeezed.startswith(begin) or begin.startswith(squeezed):
        return True
  return False


def _call(name: Any, arguments: Any, tools: Tools) -> events.Call | None:
  if isinstance(arguments, str):  # JSON in JSON
    arguments = _loaded(arguments)
  if not isinstance(name, str) or name not in tools:
    return None
  if not isinstance(arguments, dict):
    return None
  try:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # raises for a lone surrogate, which JSON can escape
  except (ValueError, RecursionError):
    return None
  return events.Call(name, text)


def _loaded(text: str) -> Any:
  """Returns the value of a JSON text; None: it is broken."""
  found = _next_value(text)
  return found[0] if found and not text[found[1] :].strip() else None


def _next_value(text: str) -> tuple[Any, int] | None:
  """Returns the JSON value at the start of a text, and the place of its end."""
  start = len(text) - len(text.lstrip())
  try:
    # Models write line ends inside of strings, which strict JSON forbids.
    return json.JSONDecoder(strict=False).raw_decode(text, start)
  except (ValueError, RecursionError):
    return None


def _from_object(value: Any, tools: Tools) -> events.Call | None:
  if not isinstance(value, dict):
    return None
  if isinstance(value.get('function'), dict):
    value = value['function']
  given = [value[k] for k in ('arguments', 'parameters') if k in value]
  return _call(value.get('name'), given[0] if given else {}, tools)


def _all(calls: Sequence[events.Call | None], rest: str = '') -> Found | None:
  """Returns the calls; None if there are none or one of them is invalid."""
  found = [call for call in calls if call is not None]
  return Found(found, rest) if found and len(found) == len(calls) else None


def _read_hermes(body: str, tools: Tools, form: Form) -> Found | None:
  if body.lstrip().startswith('<function='):
    return _read_xml(body, tools)
  return _all([_from_object(_loaded(body), tools)])


_FUNCTION = re.compile(r'\s*<function=([^>\n]+)>(.*)</function>\s*', re.DOTALL)
_PARAMETER = re.compile(
  r'\s*<parameter=([^>\n]+)>(?:\n)?(.*?)(?:\n)?</parameter>', re.DOTALL
)


def _read_xml(body: str, tools: Tools) -> Found | None:
  function = _FUNCTION.fullmatch(body)
  if not function:
    return None
  name, inside = function.groups()
  known = tools.get(name, {}).get('properties')
  known = known if isinstance(known, Mapping) else {}
  arguments, at = {}, 0
  while parameter := _PARAMETER.match(inside, at):
    key, value = parameter.groups()
    arguments[key] = _typed(value, known.get(key))
    at = parameter.end()
  if inside[at:].strip():
    return None
  return _all([_call(name, arguments, tools)])


def _typed(value: str, schema: Any) -> Any:
  """Returns the value of a parameter: text, unless its schema has a type."""
  kinds = schema.get('type') if isinstance(schema, Mapping) else 'string'
  if 'string' in (kinds if isinstance(kinds, list) else [kinds]):
    return value
  lowered = value.strip().lower()
  if lowered in ('true', 'false', 'null'):  # Python's spelling, too
    value = lowered
  found = _next_value(value)
  return found[0] if found and not value[found[1] :].strip() else value


def _read_llama3(body: str, tools: Tools, form: Form) -> Found | None:
  calls = []
  while body.strip():
    found = _next_value(body)
    if not found:
      return None
    calls.append(_from_object(found[0], tools))
    body = body[found[1] :].lstrip().removeprefix(';')
  return _all(calls)


def _read_mistral(body: str, tools: Tools, form: Form) -> Found | None:
  if body.lstrip().startswith('['):
    found = _next_value(body)
    if not found or not isinstance(found[0], list):
      return None
    calls = [_from_object(value, tools) for value in found[0]]
    return _all(calls, body[found[1] :])
  name, is_split, arguments = body.partition(form('[ARGS]'))
  if not is_split:  # the first models of this form have no [ARGS]
    name = body[: max(body.find('{'), 0)]
    arguments = body[len(name) :]
  name = name.partition(form('[CALL_ID]'))[0].strip()
  found = _next_value(arguments)
  if not found:
    return None
  return _all([_call(name, found[0], tools)], arguments[found[1] :])


def _gemma_reader(quote: str) -> Callable[[str, Tools, Form], Found | None]:
  def read(body: str, tools: Tools, form: Form) -> Found | None:
    name, _, inside = body.strip().partition('{')
    if not name.startswith('call:'):
      return None
    arguments = gemma_values.read(f'{{{inside}', form(quote))
    return _all([_call(name.removeprefix('call:'), arguments, tools)])

  return read


_FENCE = re.compile(r'\s*```(?:json)?\n(.*?)\n?```\s*', re.DOTALL)


def _deepseek(name: str) -> str:
  """Returns a marker of DeepSeek, in which bars and spaces are other signs."""
  return f'<\uff5c{name.replace("_", chr(0x2581))}\uff5c>'


def _read_deepseek(body: str, tools: Tools, form: Form) -> Found | None:
  begin, end, between = map(form, _DEEPSEEK_INNER)
  calls = []
  for part in body.split(end)[:-1]:
    before, _, call = part.partition(begin)
    head, is_split, arguments = call.partition(between)
    if before.strip() or not is_split:
      return None
    # The type, 'function', then the name, and the arguments in a fence.
    if head.strip() == 'function' and '\n' in arguments:
      head, arguments = arguments.split('\n', 1)
    if fenced := _FENCE.fullmatch(arguments):
      arguments = fenced.group(1)
    calls.append(_call(head.strip(), arguments, tools))
  if body.rpartition(end)[2].strip():
    return None
  return _all(calls)


_DEEPSEEK_INNER = (
  _deepseek('tool_call_begin'),
  _deepseek('tool_call_end'),
  _deepseek('tool_sep'),
)
# Formats of calls by their names in flags.
CALLS = {
  'hermes': CallFormat(
    begin='<tool_call>', end='</tool_call>', read=_read_hermes
  ),
  'mistral': CallFormat(
    begin='[TOOL_CALLS]',
    inner=('[ARGS]', '[CALL_ID]'),
    read=_read_mistral,
    has_short_ids=True,
  ),
  'gemma': CallFormat(
    begin='<start_function_call>',
    end='<end_function_call>',
    inner=('<escape>',),
    read=_gemma_reader('<escape>'),
  ),
  'gemma4': CallFormat(
    begin='<|tool_call>',
    end='<tool_call|>',
    inner=('<|"|>',),
    read=_gemma_reader('<|"|>'),
  ),
  'deepseek': CallFormat(
    begin=_deepseek('tool_calls_begin'),
    end=_deepseek('tool_calls_end'),
    inner=_DEEPSEEK_INNER,
    read=_read_deepseek,
  ),
  'llama3': CallFormat(
    begin='<|python_tag|>', read=_read_llama3, has_bare=True
  ),
}
# Markers around reasoning by their names in flags.
REASONING = {
  'think': ('<think>', '</think>'),
  'mistral_think': ('[THINK]', '[/THINK]'),
}
