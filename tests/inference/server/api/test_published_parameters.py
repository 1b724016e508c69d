"""Every parameter that OpenAI publishes is implemented, or refused by its name.

The published list is that of OpenAI's client, which is generated from OpenAI's
own OpenAPI document: the types of the parameters of each route, and of answers.
"""

import collections.abc
import typing
from typing import Any

import openai
from openai import types
from openai.types import (
  chat,
  completion_create_params,
  embedding_create_params,
  responses,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
import pydantic
import pytest
import typing_extensions

from inference.server.api import openapi
from tests.helpers.serving import servers

_MODEL = servers.MODEL
_SAID = [{'role': 'user', 'content': 'a'}]
_TOOL = {'name': 'add', 'parameters': {'type': 'object', 'properties': {}}}


class _Route(typing.NamedTuple):
  params: list[type]  # TypedDicts of the client
  least: dict[str, Any]  # a body
  answer: type[pydantic.BaseModel]
  chunk: Any = None
  # For each field that is supported: values, and what has to be with them.
  values: dict[str, list[Any]] = {}  # noqa: RUF012
  others: dict[str, dict[str, Any]] = {}  # noqa: RUF012


_COMMON = {
  'model': [_MODEL],
  'temperature': [0, 0.5],
  'top_p': [0.5],
  'stream': [False, True],
  'user': ['somebody'],
}
_SAMPLED = {
  **_COMMON,
  'frequency_penalty': [-2, 0.5],
  'presence_penalty': [2],
  'logit_bias': [{'97': -100}, {}],
  'max_tokens': [3],
  'n': [2],
  'seed': [3],
  'stop': ['x', ['x', 'y']],
  'stream_options': [{'include_usage': True}],
}
_ROUTES = {
  '/v1/completions': _Route(
    params=[
      completion_create_params.CompletionCreateParamsNonStreaming,
      completion_create_params.CompletionCreateParamsStreaming,
    ],
    least={'model': _MODEL, 'prompt': 'a'},
    answer=types.Completion,
    chunk=types.Completion,
    values={
      **_SAMPLED,
      'prompt': ['a', ['a', 'b'], [97], [[97], [98]]],
      'echo': [True],
      'logprobs': [0, 2],
    },
    others={'stream_options': {'stream': True}},
  ),
  '/v1/chat/completions': _Route(
    params=[
      chat_create_params.CompletionCreateParamsNonStreaming,
      chat_create_params.CompletionCreateParamsStreaming,
    ],
    least={'model': _MODEL, 'messages': _SAID, 'max_tokens': 4},
    answer=chat.ChatCompletion,
    chunk=chat.ChatCompletionChunk,
    values={
      **_SAMPLED,
      'messages': [
        _SAID,
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}],
      ],
      'logprobs': [True],
      'top_logprobs': [2],
      'max_completion_tokens': [3],
      'parallel_tool_calls': [True, False],
      'reasoning_effort': ['none'],
      'response_format': [
        {'type': 'text'},
        {'type': 'json_object'},
        {
          'type': 'json_schema',
          'json_schema': {'name': 'a', 'schema': {'type': 'null'}},
        },
      ],
      'safety_identifier': ['somebody'],
      'tool_choice': ['none', 'auto'],
      'tools': [[]],
    },
    others={
      'stream_options': {'stream': True},
      'top_logprobs': {'logprobs': True},
      'max_completion_tokens': {'max_tokens': None},
    },
  ),
  '/v1/embeddings': _Route(
    params=[embedding_create_params.EmbeddingCreateParams],
    least={'model': _MODEL, 'input': 'a'},
    answer=types.CreateEmbeddingResponse,
    values={
      'model': [_MODEL],
      'input': ['a', ['a', 'b'], [97], [[97], [98]]],
      'dimensions': [3],
      'encoding_format': ['float'],
      'user': ['somebody'],
    },
  ),
  '/v1/responses': _Route(
    params=[
      response_create_params.ResponseCreateParamsNonStreaming,
      response_create_params.ResponseCreateParamsStreaming,
    ],
    least={'model': _MODEL, 'input': 'a', 'max_output_tokens': 4},
    answer=responses.Response,
    chunk=responses.ResponseStreamEvent,
    values={
      **_COMMON,
      'input': ['a', _SAID],
      'include': [['message.output_text.logprobs'], []],
      'instructions': ['Be short.'],
      'max_output_tokens': [3],
      'metadata': [{'k': 'v'}],
      'parallel_tool_calls': [True, False],
      'previous_response_id': [None],  # its tests are in test_responses
      'reasoning': [{'effort': None}, {'effort': 'none'}],
      'safety_identifier': ['somebody'],
      'store': [True, False],
      'stream_options': [{}],
      'text': [
        {'format': {'type': 'text'}},
        {
          'format': {
            'type': 'json_schema',
            'name': 'a',
            'schema': {'type': 'null'},
            'strict': True,
          }
        },
      ],
      'tool_choice': ['none', 'auto'],
      'tools': [[{'type': 'function', 'strict': False, **_TOOL}]],
      'top_logprobs': [2],
    },
    others={
      'stream_options': {'stream': True},
      'top_logprobs': {'include': ['message.output_text.logprobs']},
      'tools': {'tool_choice': 'none'},
    },
  ),
}


def _published(path) -> dict[str, Any]:
  """Returns the types of the published parameters of a route."""
  found: dict[str, Any] = {}
  for params in _ROUTES[path].params:
    for name, kind in typing_extensions.get_type_hints(params).items():
      found[name] = kind if name not in found else found[name] | kind
  return found


def _refused(path):
  return _schema(path).unsupported()


def _schema(path):
  return openapi._ROUTES[path].body


def _samples(kind, depth=0) -> list[Any]:
  """Returns values of a published type: of unions and literals, all."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is typing.Literal:
    return list(arguments)
  if typing.is_typeddict(kind) or typing_extensions.is_typeddict(kind):
    if depth > 3:
      return [{}]
    hints = typing_extensions.get_type_hints(kind)
    required = {
      name: _samples(hint, depth + 1)[0]
      for name, hint in hints.items()
      if name in kind.__required_keys__
    }
    return [required]
  if kind is type(None):
    return []
  if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
    return [{'k': 'v'}]
  if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
    return [[each] for each in _samples(arguments[0], depth + 1)[:1]]
  if arguments:  # unions, Required
    return [each for one in arguments for each in _samples(one, depth)]
  plain = {str: 'text', int: 7, float: 0.5, bool: True}
  return [False, True] if kind is bool else [plain.get(kind, 'text')]


_FIELDS = [
  (path, name) for path in _ROUTES for name in sorted(_published(path))
]


_OURS = [
  (path, name)
  for path in _ROUTES
  for name in _schema(path).model_fields
  # Any object of JSON is a value of it.
  if name != 'chat_template_kwargs'
]


def test_every_route_that_openai_has_is_walked():
  named = {path for path in openapi._ROUTES if _schema(path)}
  ours = {path for path in named if path.startswith('/v1/')}
  assert ours - {'/v1/feedback'} == _ROUTES.keys()


@pytest.mark.parametrize(('path', 'name'), _FIELDS)
def test_a_published_parameter_is_implemented_or_refused(http, path, name):
  route = _ROUTES[path]
  fields = _schema(path).model_fields
  assert name in fields, f'{path} does not know {name}'
  refused = _refused(path)
  if name not in refused:
    assert name in route.values, f'{path}: a value for {name}?'
    for value in route.values[name]:
      body = {**route.least, **route.others.get(name, {}), name: value}
      _check_answer(route, http.post(path, json=body), body)
    return
  assert name not in route.values
  for value in _samples(_published(path)[name]):
    answer = http.post(path, json={**route.least, name: value})
    if refused[name].accepts(value):
      assert answer.status_code == 200, (value, answer.text)
      continue
    assert answer.status_code == 400, (value, answer.text)
    error = answer.json()['error']
    assert (error['code'], error['param']) == ('unsupported_parameter', name)
  for value in refused[name].neutral:
    answer = http.post(path, json={**route.least, name: value})
    assert answer.status_code == 200, (value, answer.text)


def _check_answer(route, answer, body):
  """Asserts that the client's own types are strict about an answer."""
  assert answer.status_code == 200, (body, answer.text)
  if not body.get('stream'):
    _validate(route.answer, answer.json())
    return
  adapter = pydantic.TypeAdapter(route.chunk)
  lines = [
    line.removeprefix('data: ')
    for line in answer.text.split('\n')
    if line.startswith('data: ') and line != 'data: [DONE]'
  ]
  assert len(lines) > 1
  for line in lines:
    event = servers.json.loads(line)
    for choice in event.get('choices', ()):
      if route.chunk is types.Completion and choice['finish_reason'] is None:
        # OpenAI sends null before the end too; its type has no null here.
        choice['finish_reason'] = 'stop'
    adapter.validate_python(event, strict=True)


def _validate(kind, value):
  parsed = kind.model_validate(value, strict=True)
  # A field that the client does not know is ours: its name is no misspelling.
  assert parsed.model_dump(exclude_unset=True)


@pytest.mark.parametrize(('path', 'name'), _OURS)
def test_every_field_of_every_body_is_read(http, path, name):
  """A value that no field has is refused, and the error names the field."""
  body = {**_ROUTES[path].least, name: {'wrong': [['type']]}}
  answer = http.post(path, json=body)
  assert answer.status_code == 400
  param = answer.json()['error']['param']
  assert param.partition('.')[0] == name


@pytest.mark.parametrize('path', _ROUTES)
def test_an_unpublished_parameter_is_refused_too(http, path):
  answer = http.post(path, json={**_ROUTES[path].least, 'tempreature': 1})
  assert answer.status_code == 400
  error = answer.json()['error']
  assert (error['code'], error['param']) == (
    'unsupported_parameter',
    'tempreature',
  )


def test_models_are_of_the_client_s_type(client, http):
  for each in http.get('/v1/models').json()['data']:
    types.Model.model_validate(each, strict=True)
  assert [each.id for each in client.models.list()] == [_MODEL]
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('other')
