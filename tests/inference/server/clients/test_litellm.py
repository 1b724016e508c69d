"""litellm reads completions, streams, errors and embeddings of the server."""

import asyncio
import json

import pytest

litellm = pytest.importorskip(
  'litellm', reason='not installed: pip install -r requirements-clients.txt'
)
from tests.helpers.serving import servers  # noqa: E402

_TEXT = f'text-completion-openai/{servers.MODEL}'


@pytest.fixture
def options(wide):
  return {'api_base': f'{wide.url}/v1', 'api_key': 'none'}


def test_a_text_completion_whole_and_streamed(options, wide):
  asked = {'prompt': 'def f(', 'temperature': 0, 'max_tokens': 12, **options}
  whole = litellm.text_completion(model=_TEXT, **asked)
  stream = litellm.text_completion(model=_TEXT, stream=True, **asked)
  text = ''.join(chunk.choices[0].text or '' for chunk in stream)
  assert text == whole.choices[0].text
  assert text
  assert whole.usage.completion_tokens == 12
  assert whole.usage.prompt_tokens == len(wide.generator.prompt_ids('def f('))


def test_embeddings(options):
  answer = litellm.embedding(
    model=f'openai/{servers.MODEL}', input=['a text', 'b'], **options
  )
  assert [each['index'] for each in answer.data] == [0, 1]
  assert len(answer.data[0]['embedding']) == 24
  assert answer.usage.prompt_tokens == 7


def test_errors_are_its_classes(options):
  with pytest.raises(litellm.NotFoundError):
    litellm.text_completion(
      model='text-completion-openai/other', prompt='a', **options
    )
  with pytest.raises(litellm.BadRequestError, match='temperature'):
    litellm.text_completion(model=_TEXT, prompt='a', temperature=-1, **options)


_CHAT = f'openai/{servers.MODEL}'
_TOOL = {
  'type': 'function',
  'function': {
    'name': 'magic_function',
    'description': 'Magic.',
    'parameters': {
      'type': 'object',
      'properties': {'input': {'type': 'integer'}},
      'required': ['input'],
    },
  },
}
_SAID = [{'role': 'user', 'content': 'What is magic of 3?'}]


@pytest.fixture
def chat(scripted):
  """The arguments of a call that asks the model with scripts."""
  return {
    'model': _CHAT,
    'api_base': f'{scripted.url}/v1',
    'api_key': 'none',
    'messages': _SAID,
    'temperature': 0,
  }


def test_a_chat_whole_and_streamed(chat):
  whole = litellm.completion(**chat)
  assert whole.choices[0].message.content == 'Hello there!'
  assert whole.choices[0].finish_reason == 'stop'
  stream = list(
    litellm.completion(
      stream=True, stream_options={'include_usage': True}, **chat
    )
  )
  built = litellm.stream_chunk_builder(stream, messages=_SAID)
  assert built.choices[0].message.content == 'Hello there!'
  assert built.usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize('is_stream', [False, True])
def test_a_call_of_a_tool_and_its_result(chat, is_stream):
  answer = litellm.completion(tools=[_TOOL], stream=is_stream, **chat)
  if is_stream:
    answer = litellm.stream_chunk_builder(list(answer), messages=_SAID)
  choice = answer.choices[0]
  assert choice.finish_reason == 'tool_calls'
  (call,) = choice.message.tool_calls
  assert call.function.name == 'magic_function'
  assert json.loads(call.function.arguments) == {'input': 3}
  result = {'role': 'tool', 'tool_call_id': call.id, 'content': '5'}
  chat['messages'] = [*_SAID, choice.message.model_dump(), result]
  last = litellm.completion(tools=[_TOOL], **chat)
  assert last.choices[0].message.content == 'It is 5.'


def test_a_coroutine_of_chats(chat):
  async def ask():
    return await asyncio.gather(
      *(litellm.acompletion(**chat) for _ in range(8))
    )

  for each in asyncio.run(ask()):
    assert each.choices[0].message.content == 'Hello there!'


def test_a_response_and_its_continuation(chat):
  asked = {name: chat[name] for name in ('model', 'api_base', 'api_key')}
  first = litellm.responses(input='Hi', **asked)
  assert first.output[0].content[0].text == 'Hello there!'
  events = list(
    litellm.responses(
      input='Go on', previous_response_id=first.id, stream=True, **asked
    )
  )
  assert events[-1].type == 'response.completed'
  assert events[-1].response.output[0].content[0].text == 'Hello there!'
