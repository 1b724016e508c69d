"""Messages are fitted to what a template reads."""

import json

import pytest

from text.replies import detection, fitting

USER = {'role': 'user', 'content': 'Hi'}
ARGUMENTS = {'city': 'K\u00f6ln', 'days': None}
# Templates that print the arguments of calls, as an object and as a text.
OBJECTS = (
  '{% for m in messages %}{{ m.role }}{{ m.content }}'
  '{% for c in m.tool_calls or [] %}{{ c.function.name }}'
  '{{ c.function.arguments | tojson }}{% endfor %}'
  '{% endfor %}{{ tools | tojson }}'
)
TEXTS = OBJECTS.replace(
  'c.function.arguments | tojson', "'' + c.function.arguments"
)


def _style(template):
  return detection.style_of(template, names=(), special_tokens=frozenset())


def _call(arguments, **fields):
  function = {'name': 'f', 'arguments': arguments}
  call = {'type': 'function', 'function': function, **fields}
  return {'role': 'assistant', 'content': '', 'tool_calls': [call]}


@pytest.mark.parametrize(
  'arguments',
  [ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, indent=1)],
)
def test_arguments_are_an_object_or_a_text_as_the_template_wants(arguments):
  for template, expected in ((OBJECTS, dict), (TEXTS, str)):
    (message,) = fitting.fitted([_call(arguments)], _style(template))
    found = message['tool_calls'][0]['function']['arguments']
    assert type(found) is expected
    found = json.loads(found) if expected is str else found
    assert found == ARGUMENTS


def test_a_call_without_an_id_and_its_result():
  messages = [_call({}), {'role': 'tool', 'content': 'x'}]
  call, result = fitting.fitted(messages, _style(OBJECTS))
  assert 'id' not in call['tool_calls'][0]
  assert result['name'] is None
  messages = [_call({}, id='a'), {**messages[1], 'tool_call_id': 'a'}]
  call, result = fitting.fitted(messages, _style(OBJECTS))
  assert (call['tool_calls'][0]['id'], result['name']) == ('a', 'f')


def test_messages_are_copied():
  messages = [{'role': 'developer', 'content': 'x'}, _call('{}')]
  before = json.dumps(messages)
  fitted = fitting.fitted(messages, _style(OBJECTS))
  assert fitted[0]['role'] == 'system'
  assert json.dumps(messages) == before


def test_the_first_message_that_a_template_leaves_out():
  only_users = (
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
  )
  result = {'role': 'tool', 'content': 'x'}
  assert fitting.left_out([USER, USER], _style(only_users)) is None
  assert fitting.left_out([USER, _call({}), result], _style(only_users)) == 1
  assert fitting.left_out([USER, _call({}), result], _style(OBJECTS)) is None
