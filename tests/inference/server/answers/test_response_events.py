"""Events of a response are OpenAI's, and add up to the response."""

import itertools

from hypothesis import given, strategies
from openai.types import responses as openai_responses
import pydantic

from inference.server.answers import response_events

_EVENT = pydantic.TypeAdapter(openai_responses.ResponseStreamEvent)
_USAGE = {
  'input_tokens': 3,
  'input_tokens_details': {'cached_tokens': 0, 'cache_write_tokens': 0},
  'output_tokens': 2,
  'output_tokens_details': {
    'reasoning_tokens': 0,
    'accepted_prediction_tokens': 1,
    'rejected_prediction_tokens': 2,
  },
  'total_tokens': 5,
}
_LOGPROB = {'token': 'a', 'bytes': [97], 'logprob': -1.0, 'top_logprobs': []}


def _writer():
  return response_events.Writer(
    {
      'id': 'resp_1',
      'object': 'response',
      'created_at': 1,
      'status': 'in_progress',
      'error': None,
      'incomplete_details': None,
      'model': 'tiny',
      'output': [],
      'parallel_tool_calls': True,
      'tool_choice': 'auto',
      'tools': [],
      'usage': None,
    }
  )


def _written(parts, reason='stop'):
  """Returns the writer and the events of (method, arguments)."""
  writer = _writer()
  events = list(writer.begin())
  for name, *arguments in parts:
    events += getattr(writer, name)(*arguments)
  events += writer.end(reason, _USAGE)
  return writer, events


def _folded(events):
  """Adds up the deltas alone, as a client that shows them does."""
  items = {}
  for event in events:
    if event['type'] == 'response.output_item.added':
      item = event['item']
      items[item['id']] = [item['type'], item.get('name'), '']
    elif event['type'].endswith('.delta'):
      items[event['item_id']][2] += event['delta']
  return list(items.values())


def _summed(response):
  return [
    [
      item['type'],
      item.get('name'),
      item['arguments']
      if item['type'] == 'function_call'
      else item['content'][0]['text'],
    ]
    for item in response['output']
  ]


_ALL = [
  ('reasoning', 'hm'),
  ('reasoning', '...'),
  ('text', 'Hel', [_LOGPROB]),
  ('text', 'lo', []),
  ('call', 'add', 'call_1'),
  ('arguments', '{"a"'),
  ('arguments', ': 1}'),
  ('call', 'sub', 'call_2'),
  ('arguments', '{}'),
]


def test_every_event_is_of_a_type_of_the_client_and_in_its_order():
  writer, events = _written(_ALL)
  for event in events:
    parsed = _EVENT.validate_python(event)
    assert parsed.type == event['type']
  assert [each['sequence_number'] for each in events] == list(
    range(len(events))
  )
  names = [
    name.removeprefix('response.')
    for name, _ in itertools.groupby(each['type'] for each in events)
  ]
  part = ['content_part.added', '{}.delta', '{}.done', 'content_part.done']
  item = ['output_item.added', *part, 'output_item.done']
  call = ['output_item.added', 'function_call_arguments.delta']
  call += ['function_call_arguments.done', 'output_item.done']
  assert names == [
    *('created', 'in_progress'),
    *(each.format('reasoning_text') for each in item),
    *(each.format('output_text') for each in item),
    *call,
    *call,
    'completed',
  ]
  assert events[-1]['response'] == writer.response
  assert writer.response['status'] == 'completed'
  assert writer.response['usage'] == _USAGE
  openai_responses.Response.model_validate(writer.response, strict=True)


def test_logprobs_go_with_their_text():
  writer, events = _written(_ALL)
  (_, message, *_) = writer.response['output']
  assert message['content'][0]['logprobs'] == [_LOGPROB]
  deltas = [e for e in events if e['type'] == 'response.output_text.delta']
  assert [each['logprobs'] for each in deltas] == [[_LOGPROB], []]


def test_events_do_not_change_after_they_were_made():
  _, events = _written(_ALL)
  added = [e for e in events if e['type'] == 'response.output_item.added']
  assert all(each['item']['status'] == 'in_progress' for each in added)
  assert not any(each['item'].get('arguments') for each in added)
  assert events[0]['response']['output'] == []
  assert events[0]['response']['status'] == 'in_progress'


@given(
  strategies.lists(
    strategies.one_of(
      strategies.tuples(strategies.just('text'), strategies.text()),
      strategies.tuples(strategies.just('reasoning'), strategies.text()),
      strategies.tuples(
        strategies.just('call'), strategies.text(), strategies.just('c')
      ),
    )
  )
)
def test_the_sum_of_the_deltas_is_the_response(parts):
  writer, events = _written(parts)
  assert _folded(events) == _summed(writer.response)
  assert ''.join(
    each[2] for each in _folded(events) if each[0] == 'message'
  ) == ''.join(part[1] for part in parts if part[0] == 'text')
  assert all(
    item['status'] == 'completed' for item in writer.response['output']
  )


def test_an_answer_without_text_has_an_empty_message():
  writer, _ = _written([])
  (message,) = writer.response['output']
  assert message['content'][0]['text'] == ''


def test_an_answer_that_is_cut_off_is_incomplete():
  writer, events = _written(
    [('call', 'add', 'c'), ('arguments', '{"a')], reason='length'
  )
  assert events[-1]['type'] == 'response.incomplete'
  assert writer.response['status'] == 'incomplete'
  assert writer.response['incomplete_details'] == {
    'reason': 'max_output_tokens'
  }
  (call,) = writer.response['output']
  assert call['status'] == 'incomplete'
  assert call['arguments'] == '{"a'


def test_a_generation_that_fails_says_so_in_two_events():
  writer = _writer()
  events = [*writer.begin(), *writer.text('Hel'), *writer.fail('it broke')]
  assert [each['type'] for each in events[-2:]] == ['error', 'response.failed']
  for event in events:
    assert _EVENT.validate_python(event).type == event['type']
  assert 'error' not in events[-2]  # a client would raise before the last one
  assert writer.response['status'] == 'failed'
  assert writer.response['error']['message'] == 'it broke'
