"""From the items of a response to the messages of a chat.

The items of one turn of the assistant are one message: its reasoning, its text
and its calls. The output of a call is a message of the role `tool`.
"""

from collections.abc import Iterable
from typing import Any
import uuid

_PREFIXES = {
  'message': 'msg',
  'function_call': 'fc',
  'function_call_output': 'fco',
  'reasoning': 'rs',
}


def new_id(kind: str) -> str:
  """Returns an id for an item of a type."""
  return f'{_PREFIXES[kind]}_{uuid.uuid4().hex}'


def identified(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns input items as they are kept: each with an id, and completed."""
  return [
    {
      **_parted(item),
      'id': item.get('id') or new_id(item['type']),
      'status': 'completed',
    }
    for item in items
  ]


def messages(
  instructions: str | None, items: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
  """Returns the messages of a chat.

  Args:
    instructions: a system message before all others.
    items: items of the conversation, oldest first.
  """
  found: list[dict[str, Any]] = []
  if instructions:
    found.append({'role': 'system', 'content': instructions})
  for item in items:
    kind = item['type']
    if kind == 'function_call_output':
      found.append(
        {
          'role': 'tool',
          'tool_call_id': item['call_id'],
          'content': _text(item['output']),
        }
      )
    elif kind == 'message' and item['role'] != 'assistant':
      found.append({'role': item['role'], 'content': _text(item['content'])})
    else:
      _add(_turn(found, kind), item)
  return found


def _turn(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
  """Returns the message of the assistant that an item belongs to."""
  last = found[-1] if found else {}
  is_open = last.get('role') == 'assistant' and (
    kind == 'function_call' or not (last['content'] or last.get('tool_calls'))
  )
  if not is_open:
    found.append({'role': 'assistant', 'content': None})
  return found[-1]


def _add(message: dict[str, Any], item: dict[str, Any]) -> None:
  if item['type'] == 'message':
    message['content'] = _text(item['content'])
  elif item['type'] == 'reasoning':
    parts = item.get('content') or item.get('summary') or []
    text = ''.join(part['text'] for part in parts)
    message['reasoning_content'] = message.get('reasoning_content', '') + text
  else:
    call = {'name': item['name'], 'arguments': item['arguments']}
    message.setdefault('tool_calls', []).append(
      {'id': item['call_id'], 'type': 'function', 'function': call}
    )


def _text(content: str | list[dict[str, Any]]) -> str:
  if isinstance(content, str):
    return content
  return ''.join(part.get('text', part.get('refusal', '')) for part in content)


def _parted(item: dict[str, Any]) -> dict[str, Any]:
  """Returns an item in the shape in which OpenAI lists it."""
  if item['type'] == 'reasoning':
    return {'summary': [], **item}
  if item['type'] != 'message' or not isinstance(item['content'], str):
    return item
  if item['role'] == 'assistant':
    part = {'type': 'output_text', 'text': item['content'], 'annotations': []}
  else:
    part = {'type': 'input_text', 'text': item['content']}
  return {**item, 'content': [part]}
