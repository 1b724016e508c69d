"""Responses with calls and reasoning, of a model whose answers are known."""

import asyncio
import json

import openai
from openai.types import responses as openai_responses
import pydantic
import pytest

from inference import generate
from inference.engine import engine_config
from inference.requests import answer as answer_lib
from tests.helpers.serving import scripted_models, servers

_EVENT = pydantic.TypeAdapter(openai_responses.ResponseStreamEvent)
_CALL = '{"name": "weather", "arguments": {"city": "K\u00f6ln"}}'
_SCRIPTS = {
  'plain': ['Hel', 'lo'],
  'call': ['<think>', 'I need ', 'it.', '</think>', '<tool_call>', _CALL]
  + ['</tool_call>'],
  'answer': ['It is', ' sunny.'],
}
_TOOL = {
  'type': 'function',
  'name': 'weather',
  'description': 'The weather of a city.',
  'parameters': {
    'type': 'object',
    'properties': {'city': {'type': 'string'}},
  },
  'strict': False,
}
_ASKED = {'model': servers.MODEL, 'input': 'How is it?', 'tools': [_TOOL]}
_ENGINE = engine_config.EngineConfig(
  max_sequences=4,
  decode_shapes=(4,),
  chunk_tokens=32,
  max_chunks=1,
  max_mixed_chunks=1,
  page_size=16,
  decode_steps=1,
)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  directory = scripted_models.write(tmp_path_factory.mktemp('m'), _SCRIPTS)
  with servers.running(generate.load(directory, _ENGINE)) as served:
    yield served


def _check_call(response):
  reasoning, call = response.output
  assert reasoning.type == 'reasoning'
  assert [part.text for part in reasoning.content] == ['I need it.']
  assert call.type == 'function_call'
  assert call.name == 'weather'
  assert json.loads(call.arguments) == {'city': 'K\u00f6ln'}
  assert call.status == 'completed'
  assert response.status == 'completed'
  assert response.usage.output_tokens_details.reasoning_tokens > 0
  return call


@pytest.mark.slow
def test_a_call_its_output_and_the_answer(client):
  """The loop of an agent, by ids; then with all items sent back by itself."""
  first = client.responses.create(**_ASKED)
  call = _check_call(first)
  output = {
    'type': 'function_call_output',
    'call_id': call.call_id,
    'output': 'sunny',
  }
  second = client.responses.create(
    **{**_ASKED, 'input': [output]}, previous_response_id=first.id
  )
  assert second.output_text == 'It is sunny.'
  stateless = client.responses.create(
    **{
      **_ASKED,
      'input': [
        {'role': 'user', 'content': 'How is it?'},
        *(item.model_dump(exclude_none=True) for item in first.output),
        output,
      ],
    },
    store=False,
  )
  assert stateless.output_text == 'It is sunny.'
  assert stateless.usage.input_tokens == second.usage.input_tokens
  listed = client.responses.input_items.list(second.id).data
  assert [item.type for item in listed] == ['function_call_output']


@pytest.mark.slow
def test_a_stream_has_the_events_of_reasoning_and_of_the_call(client, http):
  with client.responses.stream(**_ASKED) as stream:
    events = list(stream)
    final = stream.get_final_response()
  _check_call(final)
  arguments = ''.join(
    event.delta
    for event in events
    if event.type == 'response.function_call_arguments.delta'
  )
  assert json.loads(arguments) == {'city': 'K\u00f6ln'}
  answer = http.post('/v1/responses', json={**_ASKED, 'stream': True})
  for line in answer.text.split('\n'):
    if line.startswith('data: '):
      _EVENT.validate_json(line.removeprefix('data: '))
  assert 'response.reasoning_text.delta' in answer.text


def test_without_a_choice_of_tools_the_model_sees_none(client):
  response = client.responses.create(**_ASKED, tool_choice='none')
  assert response.output_text == 'Hello'
  assert [tool.name for tool in response.tools] == ['weather']


def test_a_client_of_coroutines(served):
  async def run():
    async with openai.AsyncOpenAI(
      base_url=f'{served.url}/v1', api_key='none'
    ) as client:
      made = await asyncio.gather(
        *(client.responses.create(**_ASKED) for _ in range(6))
      )
      async with client.responses.stream(**_ASKED) as stream:
        made.append(await stream.get_final_response())
      return made

  for response in asyncio.run(run()):
    _check_call(response)


def test_a_generation_that_fails_in_mid_stream_says_so(
  http, served, monkeypatch
):
  body = {**_ASKED, 'tool_choice': 'none', 'stream': True}
  before = http.post('/v1/responses', json=body).text.count('event: ')
  asked = []
  live_push = answer_lib.Live.push

  def push(self, tokens, *args):
    asked.append(tokens)
    return live_push(self, [-1] if len(asked) == 2 else tokens, *args)

  with monkeypatch.context() as patched:
    patched.setattr(answer_lib.Live, 'push', push)
    answer = http.post('/v1/responses', json=body)
  assert answer.status_code == 200
  events = [
    json.loads(line.removeprefix('data: '))
    for line in answer.text.split('\n')
    if line.startswith('data: ')
  ]
  assert [each['type'] for each in events[-2:]] == ['error', 'response.failed']
  failed = events[-1]['response']
  assert failed['status'] == 'failed'
  assert failed['output'][0]['content'][0]['text'] == 'Hel'
  assert len(events) < before + 2
  # What failed is not kept.
  assert http.get(f'/v1/responses/{failed["id"]}').status_code == 404


def test_a_client_that_leaves_frees_its_sequence(http, served):
  body = {**_ASKED, 'stream': True}
  for _ in range(3):
    with http.stream('POST', '/v1/responses', json=body) as answer:
      next(answer.iter_bytes())
  servers.until(lambda: not served.generator.engine.has_work)
