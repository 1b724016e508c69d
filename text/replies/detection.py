"""The style of a model's answers, found by rendering its chat template.

A template writes the calls of earlier turns, so its text shows the format in
which the model calls tools. A probe conversation with a tool and a call is
rendered, and the result is searched. So the source of the template does not
matter.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
from typing import Any

from text import chat, chat_inputs
from text.replies import formats, parser

AUTO, NONE = 'auto', 'none'
# A system message after another one, and a message with calls.
LATE_SYSTEM, CALLS = 'late_system', 'calls'
_TOOL = 'probe_tool'
_KEY = 'probe_key'
_ID = 'abcdefghi'
_WORD = 'probe_word'
_USER = {'role': 'user', 'content': 'Hello'}
_SYSTEM = {'role': 'system', 'content': _WORD}
_TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': _TOOL,
      'description': 'Probes.',
      'parameters': {
        'type': 'object',
        'properties': {_KEY: {'type': 'string', 'description': 'A key.'}},
        'required': [_KEY],
      },
    },
  }
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateStyle:
  """The features of a chat template: its formats and kinds of messages."""

  replies: parser.Style
  has_tools: bool  # it shows the model the tools of a request
  # Kinds of messages that it leaves out without an error: LATE_SYSTEM, roles.
  left_out: frozenset[str]
  # The arguments of a call are an object for it; else a JSON text.
  takes_objects: bool
  has_developer: bool  # it knows the role 'developer'


def check_name(name: str) -> None:
  """Checks the name of a reply format.

  Raises:
    ValueError: there is no such format.
  """
  known = AUTO, NONE, *formats.CALLS, *formats.REASONING
  parts = name.split('+')
  if not set(parts) <= set(known) or (
    len(parts) > 1 and {AUTO, NONE} & set(parts)
  ):
    raise ValueError(
      f'reply_format: got {name!r}, expected one of {", ".join(known)}, or a'
      ' format of calls and one of reasoning, as hermes+think'
    )


@functools.lru_cache(maxsize=64)
def style_of(
  template: str,
  *,
  names: tuple[tuple[str, str], ...],
  special_tokens: frozenset[str],
  reply_format: str = AUTO,
) -> TemplateStyle:
  """Returns the style of a template.

  Args:
    template: Jinja source.
    names: variables of the tokenizer, such as 'bos_token', and their values.
    special_tokens: strings that are special tokens if the template writes them.
    reply_format: format of the answers: AUTO, NONE, or names of `formats`,
      joined by +.
  """

  def rendered(*messages: Mapping[str, Any], **fields: Any) -> str:
    conversation = chat.Conversation(messages=messages, **fields)
    try:
      return chat.prompt(
        template,
        conversation,
        names=dict(names),
        special_tokens=special_tokens,
      ).text
    except ValueError:  # a template may refuse an unknown role or key
      return ''

  arguments: dict[str, Any] = {_KEY: 'x'}
  objects = rendered(_USER, _call(arguments), tools=_TOOLS)
  texts = rendered(_USER, _call(json.dumps(arguments)), tools=_TOOLS)
  # Where a template joins text, it fails with an object, or Python prints it.
  takes_objects = bool(objects) and f"{{'{_KEY}'" not in objects
  seen = f'{template}\n{objects if takes_objects else texts}'
  replies = _chosen(reply_format) or parser.Style(
    calls=_calls_in(seen), reasoning=_reasoning_in(seen)
  )
  return TemplateStyle(
    replies=replies,
    has_tools=_TOOL in rendered(_USER, tools=_TOOLS),
    takes_objects=takes_objects or not texts,
    has_developer='developer' in template,
    left_out=_left_out(rendered, arguments if takes_objects else '{}'),
  )


def _left_out(rendered: Callable[..., str], arguments: Any) -> frozenset[str]:
  said = {'role': 'assistant', 'content': 'Hi'}
  call = _call(arguments)
  result = {'role': 'tool', 'tool_call_id': _ID, 'name': _TOOL}
  result['content'] = _WORD
  found = {
    'system': (_WORD, rendered(_SYSTEM, _USER)),
    LATE_SYSTEM: (_WORD, rendered(_USER, said, _SYSTEM, _USER)),
    CALLS: (_TOOL, rendered(_USER, call)),
    'tool': (_WORD, rendered(_USER, call, result)),
  }
  # The template raises its own error later, with a better text than this probe.
  return frozenset(
    kind for kind, (word, text) in found.items() if text and word not in text
  )


def _call(arguments: Any) -> dict[str, Any]:
  function = {'name': _TOOL, 'arguments': arguments}
  call = {'id': _ID, 'type': 'function', 'function': function}
  return {'role': 'assistant', 'content': '', 'tool_calls': [call]}


def _chosen(reply_format: str) -> parser.Style | None:
  """Returns the style that a flag names; None: the style of the template."""
  if reply_format == AUTO:
    return None
  check_name(reply_format)
  parts = reply_format.split('+')
  calls = [formats.CALLS[part] for part in parts if part in formats.CALLS]
  reasoning = [
    formats.REASONING[part] for part in parts if part in formats.REASONING
  ]
  return parser.Style(
    calls=next(iter(calls), None), reasoning=next(iter(reasoning), None)
  )


def _calls_in(seen: str) -> formats.CallFormat | None:
  for each in formats.CALLS.values():
    # Without the opening marker, Llama's calls are named by their keys.
    is_bare = each.has_bare and f'"name": "{_TOOL}", "parameters": ' in seen
    if each.begin in seen or is_bare:
      return each
  return None


def _reasoning_in(seen: str) -> tuple[str, str] | None:
  return next(
    (
      markers
      for markers in formats.REASONING.values()
      if markers[0] in seen or markers[1] in seen
    ),
    None,
  )


def is_opened(
  text: str,
  conversation: chat.Conversation,
  reasoning: tuple[str, str] | None,
  *,
  without_prompt: Callable[[], str],
) -> bool:
  """Returns whether a rendered prompt ends inside of reasoning.

  Args:
    text: the prompt.
    conversation: the conversation of the prompt.
    reasoning: the markers around it, if the model has them.
    without_prompt: renders the conversation without the start of an answer, in
      which the template, and not a message, must have the opening marker.
  """
  if reasoning is None:
    return False
  opening, closing = reasoning
  if conversation.continue_final_message:
    said = chat_inputs.strings(conversation.messages[-1].get('content'))
    texts = ''.join(said), text
    return all(each.rfind(opening) > each.rfind(closing) for each in texts)
  if not text.rstrip().endswith(opening):
    return False
  return text.removeprefix(without_prompt()).rstrip().endswith(opening)
