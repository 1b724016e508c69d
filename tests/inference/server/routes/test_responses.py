"""Responses over HTTP: made, streamed, stored, continued, listed, deleted."""

import httpx2
import openai
from openai.types import responses as openai_responses
import pydantic
import pytest

from inference.server.access import api_keys
from inference.server.api import response_shapes
from tests.helpers.serving import servers

_EVENT = pydantic.TypeAdapter(openai_responses.ResponseStreamEvent)
_ASKED = {
  'model': servers.MODEL,
  'input': 'a',
  'temperature': 0.0,
  'max_output_tokens': 8,
}


@pytest.fixture
def ask(http):
  """Returns a function that asks for a response and returns the answer."""

  def ask(**fields):
    answer = http.post('/v1/responses', json={**_ASKED, **fields})
    assert answer.status_code == 200, answer.text
    response_shapes.Response.model_validate(answer.json())
    openai_responses.Response.model_validate(answer.json())
    return answer.json()

  return ask


def _events(content):
  """Returns the events of a stream, each with its name checked."""
  *texts, rest = content.split(b'\n\n')
  assert rest == b''
  assert b'\r' not in content
  events = []
  for text in texts:
    name, data = text.split(b'\n')
    event = servers.json.loads(data.removeprefix(b'data: '))
    assert name == b'event: ' + event['type'].encode()
    _EVENT.validate_python(event)
    events.append(event)
  return events


def _stable(response):
  """Returns a response without what differs between two requests."""
  output = [
    {name: each[name] for name in each if name not in ('id', 'call_id')}
    for each in response['output']
  ]
  names = ('id', 'created_at', 'completed_at', 'store', 'usage')
  rest = {name: response[name] for name in response if name not in names}
  return {**rest, 'output': output}


def test_a_response_is_whole(ask, served):
  response = ask(instructions='Be short.', metadata={'k': 'v'}, user='u')
  (message,) = response['output']
  assert message['type'] == 'message'
  assert message['role'] == 'assistant'
  assert response['status'] in ('completed', 'incomplete')
  assert response['instructions'] == 'Be short.'
  assert response['metadata'] == {'k': 'v'}
  assert response['temperature'] == 0
  assert response['max_output_tokens'] == 8
  usage = response['usage']
  assert usage['input_tokens'] > len('Be short.a')
  assert usage['output_tokens'] <= 8
  assert usage['total_tokens'] == usage['input_tokens'] + usage['output_tokens']
  digest = served.generator.frozen.manifest.weights_digest
  assert response['system_fingerprint'].startswith(digest[:16])


def test_a_stream_is_the_events_of_the_same_response(ask, http):
  whole = ask()
  answer = http.post('/v1/responses', json={**_ASKED, 'stream': True})
  assert answer.headers['content-type'].startswith('text/event-stream')
  events = _events(answer.content)
  assert [each['sequence_number'] for each in events] == list(
    range(len(events))
  )
  last = events[-1]['response']
  assert _stable(last) == _stable(whole)
  text = ''.join(
    each['delta']
    for each in events
    if each['type'] == 'response.output_text.delta'
  )
  assert text == whole['output'][0]['content'][0]['text']
  assert len(events) > 8


def test_an_answer_that_reaches_its_limit_is_incomplete(ask):
  response = ask(max_output_tokens=2, temperature=0.0)
  assert response['usage']['output_tokens'] == 2
  assert response['status'] == 'incomplete'
  assert response['incomplete_details'] == {'reason': 'max_output_tokens'}
  assert response['completed_at'] is None


def test_a_conversation_continues_by_the_id(ask):
  first = ask(input='a', max_output_tokens=4)
  said = first['output'][0]['content'][0]['text']
  second = ask(input='b', previous_response_id=first['id'])
  assert second['previous_response_id'] == first['id']
  by_hand = ask(
    input=[
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': said},
      {'role': 'user', 'content': 'b'},
    ]
  )
  assert second['usage']['input_tokens'] == by_hand['usage']['input_tokens']
  assert second['output'][0]['content'] == by_hand['output'][0]['content']
  # Output items may be sent back as they came.
  sent_back = ask(
    input=[
      {'role': 'user', 'content': 'a'},
      *first['output'],
      {'role': 'user', 'content': 'b'},
    ]
  )
  assert sent_back['output'][0]['content'] == by_hand['output'][0]['content']


def test_instructions_are_not_taken_over(ask):
  first = ask(input='a', instructions='x' * 9, max_output_tokens=4)
  second = ask(input='b', previous_response_id=first['id'])
  plain = ask(input='a', max_output_tokens=4)
  again = ask(input='b', previous_response_id=plain['id'])
  assert second['instructions'] is None
  said = [
    len(each['output'][0]['content'][0]['text'].encode())
    for each in (first, plain)
  ]
  assert (
    second['usage']['input_tokens'] - again['usage']['input_tokens']
    == said[0] - said[1]
  )


def test_a_stored_response_is_read_listed_and_deleted(ask, http):
  response = ask(input=[{'role': 'user', 'content': 'a'}], max_output_tokens=4)
  url = f'/v1/responses/{response["id"]}'
  assert http.get(url).json() == response
  listed = http.get(f'{url}/input_items').json()
  openai_responses.ResponseItemList.model_validate(listed)
  (item,) = listed['data']
  assert item['content'] == [{'type': 'input_text', 'text': 'a'}]
  assert http.delete(url).json() == {
    'id': response['id'],
    'object': 'response',
    'deleted': True,
  }
  for answer in (
    http.get(url),
    http.delete(url),
    http.get(f'{url}/input_items'),
    http.post(
      '/v1/responses', json={**_ASKED, 'previous_response_id': response['id']}
    ),
  ):
    assert answer.status_code == 404
    assert answer.json()['error']['code'] == 'response_not_found'


def test_a_response_that_is_not_to_be_stored_is_not(ask, http):
  response = ask(store=False)
  assert response['store'] is False
  assert http.get(f'/v1/responses/{response["id"]}').status_code == 404
  assert ask()['store'] is True


def test_a_streamed_response_is_stored_before_its_last_event(http):
  body = {**_ASKED, 'stream': True}
  with http.stream('POST', '/v1/responses', json=body) as answer:
    content = b''
    for part in answer.iter_bytes():
      content += part
      if b'event: response.completed' in content or (
        b'event: response.incomplete' in content
      ):
        break
  (response_id,) = {
    each['response']['id'] for each in _events(content) if 'response' in each
  }
  assert http.get(f'/v1/responses/{response_id}').status_code == 200


def test_the_pages_of_input_items(ask, http):
  items = [{'role': 'user', 'content': text} for text in 'abc']
  response = ask(input=items, max_output_tokens=1)
  url = f'/v1/responses/{response["id"]}/input_items'

  def page(**query):
    answer = http.get(url, params=query).json()
    texts = [each['content'][0]['text'] for each in answer['data']]
    return ''.join(texts), answer['has_more'], answer['last_id']

  assert page()[:2] == ('cba', False)
  text, has_more, last = page(order='asc', limit=2)
  assert (text, has_more) == ('ab', True)
  assert page(order='asc', after=last)[:2] == ('c', False)
  for query, param in (
    ({'limit': 0}, 'limit'),
    ({'limit': 101}, 'limit'),
    ({'order': 'x'}, 'order'),
    ({'after': 'x'}, 'after'),
    ({'include': 'x'}, 'include'),
  ):
    answer = http.get(url, params=query)
    assert answer.status_code == 400
    assert answer.json()['error']['param'] == param


def test_other_principals_have_no_such_response(generator, tmp_path):
  (tmp_path / 'keys').write_text('alice:key-a\nbob:key-b\n')
  keys = api_keys.read(tmp_path / 'keys')
  with servers.running(generator, keys) as served:
    alice, bob = (
      httpx2.Client(
        base_url=served.url,
        headers={'authorization': f'Bearer {key}'},
        timeout=60,
      )
      for key in ('key-a', 'key-b')
    )
    with alice, bob:
      made = alice.post('/v1/responses', json=_ASKED).json()
      url = f'/v1/responses/{made["id"]}'
      continued = {**_ASKED, 'previous_response_id': made['id']}
      for answer in (
        bob.get(url),
        bob.delete(url),
        bob.get(f'{url}/input_items'),
        bob.post('/v1/responses', json=continued),
      ):
        assert answer.status_code == 404
      assert alice.get(url).json() == made
      assert alice.post('/v1/responses', json=continued).status_code == 200


def test_a_server_that_keeps_none_says_so(generator):
  with servers.running(generator, store_days=0) as served:
    url = f'{served.url}/v1/responses'
    answer = httpx2.post(url, json=_ASKED, timeout=60).json()
    assert answer['store'] is False
    assert httpx2.get(f'{url}/{answer["id"]}').status_code == 404
    refused = httpx2.post(url, json={**_ASKED, 'store': True}, timeout=60)
    assert refused.status_code == 400
    assert refused.json()['error']['param'] == 'store'


@pytest.mark.parametrize(
  ('fields', 'param', 'code'),
  [
    ({'input': []}, 'input', None),
    ({'input': 'x' * 5000}, 'input', 'context_length_exceeded'),
    ({'input': [{'type': 'computer_call'}]}, 'input', 'unsupported_parameter'),
    (
      {'tools': [{'type': 'web_search'}]},
      'tools',
      'unsupported_parameter',
    ),
    ({'tool_choice': 'required'}, 'tool_choice', None),  # of no tools
    ({'reasoning': {'effort': 'low'}}, 'reasoning.effort', None),  # marks none
    ({'reasoning': {'effort': 'none', 'budget': 3}}, 'reasoning.budget', None),
    (
      {'reasoning': {'summary': 'auto'}},
      'reasoning.summary',
      'unsupported_parameter',
    ),
    ({'background': True}, 'background', 'unsupported_parameter'),
    ({'truncation': 'auto'}, 'truncation', 'unsupported_parameter'),
    (
      {'include': ['file_search_call.results']},
      'include',
      'unsupported_parameter',
    ),
    ({'stream_options': {}}, 'stream_options', None),
    ({'temperature': -1}, 'temperature', None),
    ({'max_output_tokens': 0}, 'max_output_tokens', None),
    ({'max_output_tokens': 10**6}, 'input', 'context_length_exceeded'),
    ({'metadata': {'k': 'v' * 513}}, 'metadata', None),
    (
      {'previous_response_id': 'resp_x'},
      'previous_response_id',
      'response_not_found',
    ),
    ({'n': 2}, 'n', 'unsupported_parameter'),
  ],
)
def test_what_is_wrong_or_lacking_is_refused(http, fields, param, code):
  answer = http.post('/v1/responses', json={**_ASKED, **fields})
  error = answer.json()['error']
  assert answer.status_code == (404 if code == 'response_not_found' else 400)
  assert (error['param'], error['code']) == (param, code)


def test_the_client_of_openai_makes_streams_continues_and_deletes(client):
  asked = {'model': servers.MODEL, 'max_output_tokens': 8, 'temperature': 0}
  first = client.responses.create(input='a', **asked)
  assert first.output_text
  with client.responses.stream(
    input='a', previous_response_id=first.id, **asked
  ) as stream:
    events = list(stream)
  final = events[-1].response
  assert (
    ''.join(
      each.delta for each in events if each.type == 'response.output_text.delta'
    )
    == final.output_text
  )
  assert client.responses.retrieve(final.id).output_text == final.output_text
  items = client.responses.input_items.list(final.id)
  assert [item.content[0].text for item in items] == ['a']
  client.responses.delete(final.id)
  with pytest.raises(openai.NotFoundError):
    client.responses.retrieve(final.id)


def test_a_path_of_two_methods_names_both(http):
  answer = http.put('/v1/responses/x')
  assert answer.status_code == 405
  assert answer.headers['allow'] == 'DELETE, GET'


def test_logprobs_are_those_of_the_chat(ask, http):
  fields = {'include': ['message.output_text.logprobs'], 'top_logprobs': 2}
  (message,) = ask(**fields)['output']
  found = message['content'][0]['logprobs']
  chat = http.post(
    '/v1/chat/completions',
    json={
      'model': servers.MODEL,
      'messages': [{'role': 'user', 'content': 'a'}],
      'temperature': 0,
      'max_tokens': 8,
      'logprobs': True,
      'top_logprobs': 2,
    },
  ).json()['choices'][0]
  assert message['content'][0]['text'] == chat['message']['content']
  assert found == chat['logprobs']['content']
  assert len(found) == 8
  assert ask()['output'][0]['content'][0]['logprobs'] == []
