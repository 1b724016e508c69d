"""Items of a response become the messages of a chat."""

from inference.server.answers import response_items


def _message(role, text, *, is_parted=False):
  kind = 'output_text' if role == 'assistant' else 'input_text'
  content = [{'type': kind, 'text': text}] if is_parted else text
  return {'type': 'message', 'role': role, 'content': content}


_CALL = {
  'type': 'function_call',
  'call_id': 'c1',
  'name': 'add',
  'arguments': '{"a": 1}',
}
_CHAT_CALL = {
  'id': 'c1',
  'type': 'function',
  'function': {'name': 'add', 'arguments': '{"a": 1}'},
}
_OUTPUT = {'type': 'function_call_output', 'call_id': 'c1', 'output': '2'}
_REASONING = {
  'type': 'reasoning',
  'summary': [],
  'content': [{'type': 'reasoning_text', 'text': 'hm'}],
}


def test_a_conversation_with_a_call_and_reasoning():
  items = [
    _message('user', 'What is 1 + 1?', is_parted=True),
    _REASONING,
    _CALL,
    {**_CALL, 'call_id': 'c2'},
    _OUTPUT,
    {**_OUTPUT, 'call_id': 'c2', 'output': [{'text': '3'}, {'text': '4'}]},
    _REASONING,
    _message('assistant', 'It is 2.', is_parted=True),
    _message('user', 'Thanks'),
  ]
  assert response_items.messages('Be short.', items) == [
    {'role': 'system', 'content': 'Be short.'},
    {'role': 'user', 'content': 'What is 1 + 1?'},
    {
      'role': 'assistant',
      'content': None,
      'reasoning_content': 'hm',
      'tool_calls': [_CHAT_CALL, {**_CHAT_CALL, 'id': 'c2'}],
    },
    {'role': 'tool', 'tool_call_id': 'c1', 'content': '2'},
    {'role': 'tool', 'tool_call_id': 'c2', 'content': '34'},
    {
      'role': 'assistant',
      'content': 'It is 2.',
      'reasoning_content': 'hm',
    },
    {'role': 'user', 'content': 'Thanks'},
  ]


def test_text_and_call_of_one_turn_are_one_message_and_two_turns_are_two():
  said = _message('assistant', 'Let me see.')
  (only,) = response_items.messages(None, [said, _CALL])
  assert only['content'] == 'Let me see.'
  assert only['tool_calls'] == [_CHAT_CALL]
  found = response_items.messages(None, [said, said])
  assert [each['content'] for each in found] == ['Let me see.'] * 2
  found = response_items.messages(None, [_CALL, _OUTPUT, _CALL])
  assert [each['role'] for each in found] == ['assistant', 'tool', 'assistant']


def test_developer_and_refusal_keep_their_text():
  refused = {'type': 'refusal', 'refusal': 'No.'}
  found = response_items.messages(
    None,
    [
      _message('developer', 'D'),
      {'type': 'message', 'role': 'assistant', 'content': [refused]},
    ],
  )
  assert found == [
    {'role': 'developer', 'content': 'D'},
    {'role': 'assistant', 'content': 'No.'},
  ]


def test_items_are_kept_with_an_id_and_in_parts():
  kept = response_items.identified(
    [_message('user', 'a'), _message('assistant', 'b'), _CALL, _OUTPUT]
  )
  assert [each['status'] for each in kept] == ['completed'] * 4
  prefixes = [each['id'].partition('_')[0] for each in kept]
  assert prefixes == ['msg', 'msg', 'fc', 'fco']
  assert len({each['id'] for each in kept}) == 4
  assert kept[0]['content'] == [{'type': 'input_text', 'text': 'a'}]
  assert kept[1]['content'][0]['type'] == 'output_text'
  (again,) = response_items.identified([{**_CALL, 'id': 'fc_given'}])
  assert again['id'] == 'fc_given'
