"""Messages in the form that a chat template takes, for training and serving.

Templates differ: the role 'developer' is 'system' for a template that does not
know it, the arguments of calls are objects where the template takes objects,
and the result of a call gets the name of its function.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from text.replies import detection

_SYSTEM = 'system', 'developer'


def fitted(
  messages: Sequence[Mapping[str, Any]], style: detection.TemplateStyle
) -> list[dict[str, Any]]:
  """Returns the messages in the form that the template takes."""
  names: dict[str, str] = {}  # names of functions, by the ids of calls
  result = []
  for message in messages:
    message = dict(message)
    if message['role'] == 'developer' and not style.has_developer:
      message['role'] = 'system'
    if calls := message.pop('tool_calls', None):
      names |= {
        call['id']: call['function']['name'] for call in calls if 'id' in call
      }
      message['tool_calls'] = [_call(call, style) for call in calls]
    if message['role'] == 'tool' and not message.get('name'):
      message['name'] = names.get(message.get('tool_call_id', ''))
    result.append(message)
  return result


def left_out(
  messages: Sequence[Mapping[str, Any]], style: detection.TemplateStyle
) -> int | None:
  """Returns the first message that the template leaves out in part."""
  for index, message in enumerate(messages):
    kind = 'system' if message['role'] in _SYSTEM else message['role']
    kinds = {kind}
    if kind == 'system' and index:
      kinds.add(detection.LATE_SYSTEM)
    if message.get('tool_calls'):
      kinds.add(detection.CALLS)
    if kinds & style.left_out:
      return index
  return None


def _call(
  call: Mapping[str, Any], style: detection.TemplateStyle
) -> dict[str, Any]:
  function = call['function']
  arguments = function.get('arguments') or ''
  if style.takes_objects and isinstance(arguments, str):
    try:
      read = json.loads(arguments or '{}')
    except (ValueError, RecursionError):
      read = None
    # Text that is no object is shown as it is, so that a model sees its error.
    arguments = read if isinstance(read, dict) else arguments
  elif not style.takes_objects and not isinstance(arguments, str):
    arguments = json.dumps(arguments, ensure_ascii=False)
  named = {'id': call['id']} if 'id' in call else {}
  function = {'name': function['name'], 'arguments': arguments}
  return {**named, 'type': 'function', 'function': function}
