"""Shapes of records: each is recognised, and all else is one clear error."""

import json

import pytest

from data.examples import shapes
from inference.server import feedback

SYSTEM = {'role': 'system', 'content': 'Be brief.'}
ASK = {'role': 'user', 'content': 'What colour is the sky?'}
BLUE = {'role': 'assistant', 'content': 'Blue.'}
GREEN = {'role': 'assistant', 'content': 'Green.'}
CALL = {
  'role': 'assistant',
  'content': '',
  'tool_calls': [
    {'type': 'function', 'function': {'name': 'look', 'arguments': '{}'}}
  ],
}
SEEN = {'role': 'tool', 'content': 'blue'}
TOOLS = [{'type': 'function', 'function': {'name': 'look'}}]
COLOUR = ASK['content']


def _recognise(record, kind):
  return shapes.recognise(record, kind, 'a.jsonl:3')


def _refused(record, kind, *parts):
  with pytest.raises(ValueError) as error:
    _recognise(record, kind)
  text = str(error.value)
  assert text.startswith('a.jsonl:3')
  for part in ('got', 'expected', *parts):
    assert part in text
  assert '\n' not in text


@pytest.mark.parametrize(
  'record',
  [
    {'messages': [ASK, CALL, SEEN, BLUE], 'tools': TOOLS},
    {'messages': [ASK, CALL, SEEN, BLUE], 'tools': json.dumps(TOOLS)},
    {'messages': json.dumps([ASK, CALL, SEEN, BLUE]), 'tools': TOOLS},
    {'id': 1, 'messages': [ASK, CALL, SEEN, BLUE], 'tools': TOOLS, 'x': None},
    # A table has null where a message has no such key.
    {
      'messages': [
        ASK | {'name': None},
        CALL,
        SEEN,
        BLUE | {'tool_calls': None},
      ],
      'tools': TOOLS,
      'parallel_tool_calls': False,
    },
  ],
)
def test_openai_messages_with_tools_and_calls(record):
  example = _recognise(record, 'chat')
  assert example.messages == [ASK, CALL, SEEN, BLUE]
  assert example.tools == TOOLS
  assert example.untrained == frozenset()


def test_a_weight_of_openai_leaves_an_answer_untrained():
  messages = [ASK, GREEN | {'weight': 0}, ASK, BLUE | {'weight': 1}]
  example = _recognise({'messages': messages}, 'chat')
  assert example.messages == [ASK, GREEN, ASK, BLUE]
  assert example.untrained == {1}
  _refused({'messages': [ASK, BLUE | {'weight': 0.5}]}, 'chat', '0.5', '0 or 1')


@pytest.mark.parametrize('key', ['completion', 'response'])
def test_a_prompt_and_its_answer(key):
  for record in (
    {'prompt': COLOUR, key: 'Blue.'},
    {'prompt': [ASK], key: [BLUE]},
  ):
    example = _recognise(record, 'chat')
    assert example.messages == [ASK, BLUE]
    assert example.untrained == {0}
  # Answers in the prompt are not trained, those of the completion are.
  record = {'prompt': [ASK, GREEN, ASK], key: [CALL, SEEN, BLUE]}
  example = _recognise(record, 'chat')
  assert example.messages == [ASK, GREEN, ASK, CALL, SEEN, BLUE]
  assert example.untrained == {0, 1, 2}


def test_openai_preferences():
  record = {
    'input': {
      'messages': [SYSTEM, ASK],
      'tools': TOOLS,
      'parallel_tool_calls': True,
    },
    'preferred_output': [BLUE],
    'non_preferred_output': [GREEN],
  }
  example = _recognise(record, 'pairs')
  assert example.prompt == [SYSTEM, ASK]
  assert (example.chosen, example.rejected) == ([BLUE], [GREEN])
  assert example.tools == TOOLS
  assert example.margin is None
  _refused(record | {'input': [ASK]}, 'pairs', 'input', 'messages')


@pytest.mark.parametrize(
  'record',
  [
    {'prompt': COLOUR, 'chosen': 'Blue.', 'rejected': 'Green.'},
    {'prompt': [ASK], 'chosen': [BLUE], 'rejected': [GREEN]},
    {'chosen': [ASK, BLUE], 'rejected': [ASK, GREEN]},
    # A text of the prompt beside whole conversations, as UltraFeedback has it.
    {'prompt': COLOUR, 'chosen': [ASK, BLUE], 'rejected': [ASK, GREEN]},
  ],
)
def test_pairs_of_trl(record):
  example = _recognise(record | {'margin': 2}, 'pairs')
  assert example.prompt == [ASK]
  assert (example.chosen, example.rejected) == ([BLUE], [GREEN])
  assert example.margin == 2.0


def test_an_implicit_prompt_is_what_both_conversations_share():
  start = [SYSTEM, ASK, GREEN, ASK]
  record = {'chosen': [*start, BLUE], 'rejected': [*start, GREEN]}
  example = _recognise(record, 'pairs')
  assert example.prompt == start
  # Answers that are equal are answers, and not the prompt's end.
  record = {'chosen': [ASK, BLUE], 'rejected': [ASK, BLUE]}
  example = _recognise(record, 'pairs')
  assert (example.prompt, example.chosen, example.rejected) == (
    [ASK], [BLUE], [BLUE],
  )  # fmt: skip


@pytest.mark.parametrize(
  ('chosen', 'rejected'),
  [
    ([ASK, BLUE], [ASK, GREEN]),
    ([SYSTEM, ASK, CALL, SEEN, BLUE], [SYSTEM, ASK, CALL, SEEN, GREEN]),
    ([SYSTEM, ASK, CALL, SEEN, BLUE], [SYSTEM, ASK, GREEN]),
    ('The sky is blue.', 'The sky is green.'),
  ],
)
def test_implicit_prompts_are_those_of_trl(chosen, rejected):
  data_utils = pytest.importorskip(
    'trl.data_utils', reason='the reference implementation is not installed'
  )
  record = {'chosen': chosen, 'rejected': rejected}
  expected = data_utils.maybe_extract_prompt(dict(record))
  example = _recognise(record, 'pairs')
  if isinstance(chosen, str):
    assert example.prompt[0]['content'] == expected['prompt'].strip()
    assert example.chosen[0]['content'] == expected['chosen'].strip()
    assert example.rejected[0]['content'] == expected['rejected'].strip()
  else:
    assert example.prompt == expected['prompt']
    assert example.chosen == expected['chosen']
    assert example.rejected == expected['rejected']


@pytest.mark.parametrize('label', [True, False, 1, 0])
def test_labelled_answers(label):
  for record in (
    {'prompt': COLOUR, 'completion': 'Blue.'},
    {'prompt': COLOUR, 'response': 'Blue.'},
    {'prompt': [ASK], 'completion': [BLUE]},
    {'messages': [ASK, BLUE]},
  ):
    example = _recognise(record | {'label': label}, 'labelled')
    assert (example.prompt, example.completion) == ([ASK], [BLUE])
    assert example.label is bool(label)


def test_exports_of_feedback():
  row = {
    'id': 'f1', 'principal': '', 'model': 'm', 'messages': [ASK],
    'answer': 'Green.', 'preferred': 'Blue.', 'thumb': 'down',
  }  # fmt: skip
  (pair,) = map(json.loads, map(json.dumps, feedback.pairs([row])))
  example = _recognise(pair, 'pairs')
  assert example.prompt == [ASK]
  assert (example.chosen, example.rejected) == ([BLUE], [GREEN])
  (label,) = feedback.labels([row])
  example = _recognise(label, 'labelled')
  assert (example.completion, example.label) == ([GREEN], False)


def test_parts_of_text_are_joined_as_a_server_joins_them():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  message = {'role': 'user', 'content': parts}
  example = _recognise({'messages': [message, BLUE]}, 'chat')
  assert example.messages[0]['content'] == 'a\nb'
  image = {'type': 'image_url', 'image_url': {'url': 'x'}}
  message = {'role': 'user', 'content': [image]}
  _refused({'messages': [message, BLUE]}, 'chat', 'image_url', 'with text')


@pytest.mark.parametrize(
  ('record', 'kind', 'parts'),
  [
    ({'text': 'x'}, 'chat', ['the keys text', 'messages', 'completion']),
    ({}, 'chat', ['no key']),
    ({'conversations': []}, 'chat', ['the keys conversations']),
    ({'prompt': 'x'}, 'chat', ['the keys prompt']),
    ({'prompt': 'x', 'completion': 'y', 'response': 'z'}, 'chat', ['response']),
    ({'messages': [ASK, BLUE]}, 'pairs', ["data.examples='chat'"]),
    ({'chosen': 'x', 'rejected': 'y'}, 'chat', ["data.examples='pairs'"]),
    ({'chosen': [ASK, BLUE]}, 'pairs', ['the keys chosen']),
    ({'prompt': 'x', 'completion': 'y'}, 'labelled', ["data.examples='chat'"]),
    ({'messages': [ASK, BLUE], 'label': 'good'}, 'labelled', ["'good'"]),
    ({'messages': [ASK, BLUE], 'label': 1.0}, 'labelled', ['1.0']),
    ({'messages': [SYSTEM, ASK], 'label': 1}, 'labelled', ['with user']),
    ([ASK, BLUE], 'chat', ['an object']),
    ('x', 'pairs', ['an object']),
    ({'messages': []}, 'chat', ['[]', 'list of messages']),
    ({'messages': 'Hello'}, 'chat', ["'Hello'", 'a list']),
    ({'messages': [ASK, 'Blue.']}, 'chat', ['messages[1]', "'Blue.'"]),
    ({'messages': [{'content': 'x'}]}, 'chat', ['messages[0]', 'role']),
    ({'messages': [{'role': 'human', 'content': 'x'}]}, 'chat', ["'human'"]),
    ({'messages': [ASK | {'content': 3}]}, 'chat', ['content 3']),
    ({'messages': [{'role': 'user'}]}, 'chat', ['content None']),
    (
      {'messages': [ASK, BLUE | {'function_call': {'name': 'f'}}]},
      'chat',
      ['messages[1]', 'tool_calls'],
    ),
    (
      {'messages': [ASK, BLUE | {'tool_calls': [{'name': 'f'}]}]},
      'chat',
      ['messages[1]', '"function"'],
    ),
    ({'messages': [ASK, BLUE], 'tools': {'name': 'f'}}, 'chat', ['tools']),
    ({'prompt': COLOUR, 'completion': [BLUE]}, 'chat', ['prompt as str']),
    ({'prompt': [ASK], 'completion': 'x'}, 'chat', ['completion as str']),
    ({'prompt': COLOUR, 'completion': 5}, 'chat', ['completion as int']),
    (
      {'prompt': [ASK], 'chosen': 'x', 'rejected': [GREEN]},
      'pairs',
      ['chosen as str', 'rejected as list'],
    ),
    ({'prompt': [ASK, BLUE], 'completion': [BLUE]}, 'chat', ['ends with']),
    ({'prompt': [ASK], 'completion': [ASK]}, 'chat', ['begins with user']),
    (
      {'chosen': [BLUE], 'rejected': [GREEN]},
      'pairs',
      ['ends with no message'],
    ),
    (
      {'chosen': [ASK, BLUE], 'rejected': [SYSTEM, GREEN]},
      'pairs',
      ['ends with no message'],
    ),
    (
      {'prompt': 'Else?', 'chosen': [ASK, BLUE], 'rejected': [ASK, GREEN]},
      'pairs',
      ["'Else?'", 'list of messages'],
    ),
    ({'chosen': 'Blue.', 'rejected': 'Green.'}, 'pairs', ['add the prompt']),
    (
      {
        'chosen': '\n\nHuman: Hi\n\nAssistant: Hello',
        'rejected': '\n\nHuman: Hi\n\nAssistant: Bye',
      },
      'pairs',
      ['lists of messages'],
    ),
    (
      {'prompt': 'x', 'chosen': 'a', 'rejected': 'b', 'margin': 'wide'},
      'pairs',
      ["'wide'", 'finite'],
    ),
    (
      {'prompt': 'x', 'chosen': 'a', 'rejected': 'b', 'margin': float('nan')},
      'pairs',
      ['nan', 'finite'],
    ),
    (
      {'prompt': 'x', 'chosen': 'a', 'rejected': 'b', 'margin': True},
      'pairs',
      ['True', 'finite'],
    ),
  ],
)
def test_what_is_refused(record, kind, parts):
  _refused(record, kind, *parts)


def test_an_unknown_kind():
  with pytest.raises(ValueError, match="got 'chats', expected one of chat"):
    _recognise({'messages': [ASK, BLUE]}, 'chats')


def test_a_long_record_makes_a_short_error():
  with pytest.raises(ValueError) as error:
    _recognise({'messages': 'x' * 100_000}, 'chat')
  assert len(str(error.value)) < 400
