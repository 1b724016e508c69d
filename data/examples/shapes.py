"""Shapes of records: how people write chats, preferences and labels as JSON.

    chat      {"messages", "tools"}                     OpenAI, TRL
              {"prompt", "completion"}                  TRL
              {"prompt", "response"}
    pairs     {"prompt", "chosen", "rejected"}          TRL, our feedback export
              {"chosen", "rejected"}                    TRL, implicit prompt
              {"input", "preferred_output", "non_preferred_output"}    OpenAI
    labelled  {"prompt", "completion" or "response", "label"}    TRL, our export
              {"messages", "label"}

A prompt and its answers are texts, or lists of messages. Other keys of a record
have no effect. Any other shape is an error that names the record.

References: platform.openai.com/docs/guides/supervised-fine-tuning and
/direct-preference-optimization; huggingface.co/docs/trl/dataset_formats.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import math
import os
import re
from typing import Any

from checks import expect

Message = dict[str, Any]

KINDS = ('chat', 'pairs', 'labelled')
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
_ANSWERS = ('completion', 'response')
_OPENAI = ('input', 'preferred_output', 'non_preferred_output')
_EXPECTED = {
  'chat': 'messages; prompt and completion; or prompt and response',
  'pairs': 'prompt, chosen and rejected; chosen and rejected, each with its'
  ' prompt; or input, preferred_output and non_preferred_output',
  'labelled': 'prompt, completion and label; prompt, response and label; or'
  ' messages and label',
}
# A transcript inside of one text, as in Anthropic's HH-RLHF.
_TRANSCRIPT = re.compile(r'(^|\n)(Human|User|Assistant):')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """A record whose shape was recognised; its kind says which fields are set."""

  kind: str
  tools: list[dict[str, Any]] | None = None
  # chat: the whole conversation, and the indices of the assistant's untrained
  # messages: messages of a prompt, and messages of weight 0.
  messages: list[Message] = dataclasses.field(default_factory=list)
  untrained: frozenset[int] = frozenset()
  # pairs and labelled: the messages or text before the answers.
  prompt: list[Message] = dataclasses.field(default_factory=list)
  chosen: list[Message] = dataclasses.field(default_factory=list)
  rejected: list[Message] = dataclasses.field(default_factory=list)
  margin: float | None = None
  completion: list[Message] = dataclasses.field(default_factory=list)
  label: bool = False


def recognise(record: Any, kind: str, where: str) -> Example:
  """Returns the example that a record holds.

  Args:
    record: a JSON value.
    kind: one of KINDS.
    where: names the record in errors, as 'train.jsonl:12'.

  Raises:
    ValueError: the record has another shape, or a value is malformed.
  """
  expect.one_of('kind', kind, KINDS)
  if not isinstance(record, Mapping):
    raise ValueError(
      f'{where}: got {expect.shown(record)}, expected an object with'
      f' {_EXPECTED[kind]}'
    )
  # A column of a table has null where a record has no such key.
  record = {key: value for key, value in record.items() if value is not None}
  made = {'chat': _chat, 'pairs': _pair, 'labelled': _labelled}[kind]
  example = made(record, where)
  if example is None:
    raise ValueError(
      f'{where}: got a record with {_named(record)}, expected the keys'
      f' {_EXPECTED[kind]}{_other_kind(record, kind)}'
    )
  return example


def _chat(record: Mapping[str, Any], where: str) -> Example | None:
  tools = _tools(record, where)
  if 'messages' in record:
    messages, untrained = _weighed(record['messages'], f'{where}: messages')
    return Example(
      kind='chat', tools=tools, messages=messages, untrained=untrained
    )
  if (name := _answer_key(record)) is None:
    return None
  prompt, (answer,) = _split(record, (name,), where)
  return Example(
    kind='chat',
    tools=tools,
    messages=prompt + answer,
    untrained=frozenset(range(len(prompt))),
  )


def _pair(record: Mapping[str, Any], where: str) -> Example | None:
  tools = _tools(record, where)
  if all(key in record for key in _OPENAI):
    given = record['input']
    if not isinstance(given, Mapping) or 'messages' not in given:
      raise ValueError(
        f'{where}: got the input {expect.shown(given)}, expected an object with'
        ' messages'
      )
    tools = _tools(given, f'{where}: input') or tools
    names = _OPENAI[1:]
    record = {**record, 'prompt': given['messages']}
  elif 'chosen' in record and 'rejected' in record:
    names = ('chosen', 'rejected')
  else:
    return None
  prompt, (chosen, rejected) = _split(record, names, where)
  return Example(
    kind='pairs',
    tools=tools,
    prompt=prompt,
    chosen=chosen,
    rejected=rejected,
    margin=_margin(record, where),
  )


def _labelled(record: Mapping[str, Any], where: str) -> Example | None:
  if 'label' not in record:
    return None
  label = record['label']
  if label not in (0, 1) or not isinstance(label, int):
    raise ValueError(
      f'{where}: got the label {expect.shown(label)}, expected true or false'
    )
  if 'messages' in record:
    messages = read_messages(record['messages'], f'{where}: messages')
    _check_roles(messages[:-1], messages[-1:], 'messages', where)
    prompt, answer = messages[:-1], messages[-1:]
  elif (name := _answer_key(record)) is not None:
    prompt, (answer,) = _split(record, (name,), where)
  else:
    return None
  return Example(
    kind='labelled',
    tools=_tools(record, where),
    prompt=prompt,
    completion=answer,
    label=bool(label),
  )


def _answer_key(record: Mapping[str, Any]) -> str | None:
  found = [name for name in _ANSWERS if name in record]
  return found[0] if 'prompt' in record and len(found) == 1 else None


def _split(
  record: Mapping[str, Any], names: Sequence[str], where: str
) -> tuple[list[Message], list[list[Message]]]:
  """Returns the prompt, and the answers under `names`."""
  answers = [record[name] for name in names]
  prompt = record.get('prompt')
  kinds = {isinstance(answer, str) for answer in answers}
  is_pair_with_prompt = kinds == {False} and len(names) == 2
  if len(kinds) > 1 or not (
    prompt is None
    or isinstance(prompt, str) in kinds
    or (isinstance(prompt, str) and is_pair_with_prompt)
  ):
    mixed = ', '.join(
      f'{name} as {type(record[name]).__name__}'
      for name in ('prompt', *names)
      if name in record
    )
    raise ValueError(
      f'{where}: got {mixed}, expected all as texts or all as lists of messages'
    )
  if kinds == {True}:
    if prompt is None:
      prompt, answers = _common_text(answers, names, where)
    return [{'role': 'user', 'content': prompt}], [
      [{'role': 'assistant', 'content': answer}] for answer in answers
    ]
  found = [
    read_messages(answer, f'{where}: {name}')
    for name, answer in zip(names, answers, strict=True)
  ]
  if prompt is None or isinstance(prompt, str):
    before = _common_messages(found)
    # Some data repeats the text of the prompt beside whole conversations.
    if prompt and not any(m.get('content') == prompt for m in before):
      raise ValueError(
        f'{where}: got the prompt {expect.shown(prompt)}, which is no message'
        f' at the start of both {" and ".join(names)}, expected one; write the'
        ' prompt as a list of messages'
      )
    found = [messages[len(before) :] for messages in found]
  else:
    before = read_messages(prompt, f'{where}: prompt')
  for name, answer in zip(names, found, strict=True):
    _check_roles(before, answer, name, where)
  return before, found


def _check_roles(
  prompt: Sequence[Message], answer: Sequence[Message], name: str, where: str
) -> None:
  if not prompt or prompt[-1]['role'] == 'assistant':
    last = 'no message' if not prompt else 'an answer of the assistant'
    raise ValueError(
      f'{where}: got a prompt of {name} that ends with {last}, expected one'
      ' that ends with a message of another role'
    )
  if not answer or answer[0]['role'] != 'assistant':
    first = answer[0]['role'] if answer else 'no message'
    raise ValueError(
      f'{where}: got {name} that begins with {first} after the prompt, expected'
      ' the role assistant'
    )


def _common_messages(found: Sequence[list[Message]]) -> list[Message]:
  """Returns the messages at the start of all conversations."""
  same = itertools.takewhile(
    lambda each: all(message == each[0] for message in each),
    zip(*found, strict=False),
  )
  common = [each[0] for each in same]
  # Equal answers at the end are answers.
  while common and common[-1]['role'] == 'assistant':
    common.pop()
  return common


def _common_text(
  answers: list[str], names: Sequence[str], where: str
) -> tuple[str, list[str]]:
  """Returns the start that all texts share, in whole words, and the rests."""
  common = os.path.commonprefix(answers)
  while common and not common[-1].isspace():
    common = common[:-1]
  if not common.strip() or any(map(_TRANSCRIPT.search, answers)):
    raise ValueError(
      f'{where}: got {" and ".join(names)} as texts in which the prompt cannot'
      ' be told from the answer, expected a prompt beside them; add the prompt,'
      ' or write lists of messages'
    )
  return common.strip(), [text[len(common) :] for text in answers]


def _weighed(value: Any, where: str) -> tuple[list[Message], frozenset[int]]:
  """Returns the messages without weights, and the places of weight 0."""
  messages = read_messages(value, where)
  untrained = set()
  for i, message in enumerate(messages):
    weight = message.pop('weight', 1)
    if weight not in (0, 1):
      raise ValueError(
        f'{where}[{i}]: got weight {expect.shown(weight)}, expected 0 or 1'
      )
    if not weight:
      untrained.add(i)
  return messages, frozenset(untrained)


def read_messages(value: Any, where: str) -> list[Message]:
  """Returns checked messages with one text, or none, as their content."""
  value = _parsed(value, where)
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(
      f'{where}: got {expect.shown(value)}, expected a list of messages'
    )
  return [_message(each, f'{where}[{i}]') for i, each in enumerate(value)]


def _message(value: Any, where: str) -> Message:
  if not isinstance(value, Mapping) or 'role' not in value:
    raise ValueError(
      f'{where}: got {expect.shown(value)}, expected a message: an object with'
      ' role and content'
    )
  message = {key: item for key, item in value.items() if item is not None}
  if message['role'] not in ROLES:
    raise ValueError(
      f'{where}: got role {expect.shown(message["role"])}, expected one of'
      f' {", ".join(ROLES)}'
    )
  content = message.get('content', message.pop('refusal', None))
  is_answer = message['role'] == 'assistant'
  if isinstance(content, list | tuple):
    content = '\n'.join(_part(part, where) for part in content)
  if content is None and is_answer:
    content = ''
  if not isinstance(content, str):
    raise ValueError(
      f'{where}: got content {expect.shown(content)}, expected a text or a list'
      ' of parts with text'
    )
  message['content'] = content
  if message.pop('function_call', None):
    raise ValueError(
      f'{where}: got function_call, expected tool_calls; write the call as'
      ' {"type": "function", "function": {"name", "arguments"}}'
    )
  if 'tool_calls' in message:
    message['tool_calls'] = _calls(message['tool_calls'], where)
  return message


def _part(part: Any, where: str) -> str:
  """Returns the text of a part of a content."""
  text = None
  if isinstance(part, Mapping):
    text = part.get('text', part.get('refusal'))
  if not isinstance(text, str):
    raise ValueError(
      f'{where}: got the part {expect.shown(part)}, expected parts with text'
    )
  return text


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
  calls = _parsed(value, f'{where}.tool_calls')
  if not isinstance(calls, list | tuple):
    calls = [calls]
  for call in calls:
    function = call.get('function') if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not (
      isinstance(function.get('name'), str)
      and isinstance(function.get('arguments', ''), str | Mapping)
    ):
      raise ValueError(
        f'{where}: got the call {expect.shown(call)}, expected {{"type":'
        ' "function", "function": {"name": ..., "arguments": ...}}'
      )
  return [dict(call) for call in calls]


def _tools(record: Mapping[str, Any], where: str) -> list | None:
  tools = _parsed(record.get('tools'), f'{where}: tools')
  if tools is None:
    return None
  if not isinstance(tools, list | tuple) or not all(
    isinstance(tool, Mapping) for tool in tools
  ):
    raise ValueError(
      f'{where}: got tools {expect.shown(tools)}, expected a list of objects'
    )
  return list(tools) or None


def _parsed(value: Any, where: str) -> Any:
  """Returns a value; tables often hold lists of objects as JSON texts."""
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError):
    raise ValueError(
      f'{where}: got the text {expect.shown(value)}, expected a list'
    ) from None


def _margin(record: Mapping[str, Any], where: str) -> float | None:
  margin = record.get('margin')
  if margin is None:
    return None
  if type(margin) not in (int, float) or not math.isfinite(margin):
    raise ValueError(
      f'{where}: got margin {expect.shown(margin)}, expected a finite number'
    )
  return float(margin)


def _named(record: Mapping[str, Any]) -> str:
  return f'the keys {", ".join(map(str, record))}' if record else 'no key'


def _other_kind(record: Mapping[str, Any], kind: str) -> str:
  """Returns the kind of example that a record has, as a fix; '' for none."""
  keys = record.keys()
  if {'chosen', 'rejected'} <= keys or set(_OPENAI) <= keys:
    found = 'pairs'
  elif 'messages' in keys or _answer_key(record):
    found = 'labelled' if 'label' in keys else 'chat'
  else:
    found = kind
  return '' if found == kind else f"; data.examples='{found}' reads these keys"
