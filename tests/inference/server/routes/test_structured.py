"""Answers held to a grammar, over HTTP: schemas, regexes, choices, Lark."""

from concurrent import futures
import enum
import json
import re
import threading

import httpx2
import jsonschema
import openai
import pydantic
import pytest

from inference import generate
from inference.constraints import grammars
from tests.helpers import frozen_dirs
from tests.helpers.serving import scripted_models, servers

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_SAMPLED = {'model': servers.MODEL, 'temperature': 1.5, 'max_tokens': 200}
_MESSAGES = [{'role': 'user', 'content': 'a'}]


class Colour(enum.StrEnum):
  RED = 'red'
  BLUE = 'blue'


class Dot(pydantic.BaseModel):
  """A place whose text is short, however it is sampled."""

  x: int = pydantic.Field(ge=-9, le=9)
  colour: Colour | None


class Point(pydantic.BaseModel):
  """A place."""

  x: int = pydantic.Field(ge=-9, le=9)
  colour: Colour | None
  near: list['Point'] = pydantic.Field(max_length=1)


_SCHEMA = {
  'type': 'object',
  'properties': {
    'a': {'type': 'integer', 'minimum': 1, 'maximum': 22},
    'b': {'enum': ['x', None, 1.5]},
  },
  'required': ['a', 'b'],
  'additionalProperties': False,
}
_FORMAT = {
  'type': 'json_schema',
  'json_schema': {'name': 'pair', 'schema': _SCHEMA, 'strict': True},
}


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  directory = tmp_path_factory.mktemp('structured') / 'tiny'
  config = frozen_dirs.config(num_layers=1, max_length=512)
  frozen_dirs.write(directory, config=config)
  generator = generate.load(directory, scripted_models.ENGINE)
  with servers.running(generator) as served:
    yield served


def _post(http, path='/v1/chat/completions', **fields):
  given = {'messages': _MESSAGES} if 'chat' in path else {'prompt': 'a'}
  return http.post(path, json={**_SAMPLED, **given, **fields})


def test_the_openai_client_parses_a_model_of_pydantic(client):
  for seed in range(4):
    answer = client.chat.completions.parse(
      **_SAMPLED, messages=_MESSAGES, response_format=Point, seed=seed
    )
    found = answer.choices[0].message.parsed
    assert isinstance(found, Point)
    assert -9 <= found.x <= 9
  with client.chat.completions.stream(
    **_SAMPLED, messages=_MESSAGES, response_format=Point, seed=3
  ) as stream:
    final = stream.get_final_completion()
  assert final.choices[0].message.parsed == found
  response = client.responses.parse(
    model=servers.MODEL,
    input='a',
    temperature=1.5,
    max_output_tokens=200,
    text_format=Dot,  # this API takes no seed, and half of all points are long
  )
  assert isinstance(response.output_parsed, Dot)
  assert response.text.format.name == 'Dot'


def test_a_chat_with_several_choices_and_logprobs(http):
  asked = {'response_format': _FORMAT, 'n': 3, 'seed': 5}
  whole = _post(http, **asked, logprobs=True, top_logprobs=2).json()
  texts = [each['message']['content'] for each in whole['choices']]
  assert len({*texts}) > 1
  for text, choice in zip(texts, whole['choices'], strict=True):
    jsonschema.validate(json.loads(text), _SCHEMA)
    assert choice['finish_reason'] == 'stop'
    content = choice['logprobs']['content']
    assert ''.join(each['token'] for each in content) == text
  streamed = [''] * 3
  for event in servers.events(_post(http, **asked, stream=True).content):
    for choice in event['choices']:
      streamed[choice['index']] += choice['delta'].get('content') or ''
  assert streamed == texts
  (found,) = _post(http, response_format={'type': 'json_object'}).json()[
    'choices'
  ]
  if found['finish_reason'] == 'stop':  # it may be long
    assert isinstance(json.loads(found['message']['content']), dict)


@pytest.mark.parametrize(
  ('language', 'pattern'),
  [
    ({'regex': '[ab]{3}c?'}, '[ab]{3}c?'),
    ({'choice': ['left', 'right']}, 'left|right'),
    ({'grammar': 'start: "x" rest\nrest: "y" | "z"'}, 'xy|xz'),
    ({'json': {'const': [1]}}, r'\[\s*1\s*\]'),
    ({'json': '{"type": "boolean"}'}, 'true|false'),
    ({'json_object': True}, r'\{.*'),
  ],
)
def test_the_languages_of_vllm(http, language, pattern):
  for path in ('/v1/completions', '/v1/chat/completions'):
    answer = _post(http, path, structured_outputs=language, max_tokens=40)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()['choices']
    text = choice['text'] if 'text' in choice else choice['message']['content']
    assert re.fullmatch(pattern, text, re.DOTALL), text


def test_a_stop_string_cuts_a_constrained_text(http):
  answer = _post(
    http,
    '/v1/completions',
    structured_outputs={'regex': 'aab[cd]{4}'},
    stop=['b'],
    n=2,
    echo=True,
  ).json()
  assert [each['text'] for each in answer['choices']] == ['aaa', 'aaa']
  assert {each['stop_reason'] for each in answer['choices']} == {'b'}


_DEEP = json.loads('{"items":' * 60 + '{}' + '}' * 60)


@pytest.mark.parametrize(
  ('fields', 'param', 'code', 'words'),
  [
    (
      {'schema': {'properties': {'a/b': {'not': {}}}}},
      'response_format',
      None,
      'response_format: #/properties/a~1b/not: got a keyword that is not',
    ),
    ({'schema': _DEEP}, 'response_format', None, 'got more nesting'),
    (
      {'schema': {'enum': list(range(1001))}},
      'response_format',
      None,
      '#/enum: got 1001 values, expected at most 1000',
    ),
    ({'regex': '(a'}, 'structured_outputs', None, 'regex: got one that cannot'),
    ({'regex': ''}, 'structured_outputs', None, '0 characters'),
    ({'regex': 'a', 'choice': ['b']}, 'structured_outputs', None, 'regex and'),
    ({}, 'structured_outputs', None, 'got no language'),
    ({'choice': []}, 'structured_outputs', None, 'got 0 texts'),
    ({'grammar': 'start: nope'}, 'structured_outputs', None, 'unknown name'),
    ({'json': '{'}, 'structured_outputs', None, 'expected JSON'),
    (
      {'regex': 'a', 'structural_tag': 'x'},
      'structured_outputs.structural_tag',
      'unsupported_parameter',
      'send tools',
    ),
    ({'regex': 'a', 'lark': 'x'}, 'structured_outputs', None, 'lark'),
  ],
)
def test_a_language_that_cannot_be_kept_is_400(
  http, fields, param, code, words
):
  if 'schema' in fields:
    made = {'type': 'json_schema', 'json_schema': {'name': 'n', **fields}}
    asked = {'response_format': made}
  else:
    asked = {'structured_outputs': fields}
  for path in ('/v1/completions', '/v1/chat/completions'):
    answer = _post(http, path, **asked)
    error = answer.json()['error']
    assert answer.status_code == 400, answer.text
    assert error['param'] == param
    assert words in error['message'], error
    if code:
      assert error['code'] == code


def test_other_refusals_name_their_field(http):
  language = {'regex': 'a'}
  for fields, param, words in (
    ({'response_format': _FORMAT}, 'structured_outputs', 'got both'),
    ({'min_tokens': 2}, 'min_tokens', 'none beside a constraint'),
    ({'max_tokens': 0, 'echo': True}, 'structured_outputs', 'no text'),
    ({'guided_regex': 'a'}, 'guided_regex', 'send structured_outputs'),
  ):
    answer = _post(
      http, '/v1/completions', structured_outputs=language, **fields
    )
    error = answer.json()['error']
    assert (answer.status_code, error['param']) == (400, param), error
    assert words in error['message']
  made = {'type': 'json_schema', 'name': 'n', 'schema': {'not': {}}}
  answer = http.post(
    '/v1/responses',
    json={'model': servers.MODEL, 'input': 'a', 'text': {'format': made}},
  )
  assert answer.json()['error']['param'] == 'text'
  assert '#/not: got a keyword' in answer.json()['error']['message']


def test_a_grammar_that_no_token_can_go_on_with_says_so(http):
  """A byte that is no text of its own has no token after it."""
  asked = {'grammar': 'start: "a" never\nnever: "b" never'}
  answer = _post(http, '/v1/completions', structured_outputs=asked)
  if answer.status_code == 200:
    (choice,) = answer.json()['choices']
    assert choice['finish_reason'] in ('error', 'length')
    if choice['finish_reason'] == 'error':
      assert 'the grammar has no next token' in choice['error']


def test_without_the_library_it_is_one_clear_400(http, monkeypatch):
  def missing(*_):
    raise ModuleNotFoundError('llguidance: got no such library')

  monkeypatch.setattr(
    'inference.constraints.grammars.Grammars.compile', missing
  )
  answer = _post(http, structured_outputs={'regex': 'a'})
  error = answer.json()['error']
  assert (answer.status_code, error['code']) == (400, 'unsupported_parameter')
  assert 'structured_outputs: llguidance: got no such' in error['message']


@pytest.fixture(scope='module')
def talk(talker):
  """Returns a client of a model whose answers are known."""
  with servers.running(talker) as served:
    url = f'{served.url}/v1'
    with openai.OpenAI(base_url=url, api_key='none', timeout=300) as client:
      yield client


@pytest.mark.slow
def test_reasoning_comes_first_and_the_grammar_after_it(talk):
  answer = talk.chat.completions.create(
    model=servers.MODEL,
    messages=_MESSAGES,
    extra_body={
      'chat_template_kwargs': {'script': 'call'},
      'structured_outputs': {'regex': '[0-9]{2}'},
    },
  )
  message = answer.choices[0].message
  assert message.reasoning_content == 'I need it.'
  assert re.fullmatch('[0-9]{2}', message.content)


class Weather(pydantic.BaseModel):
  """The weather of a city."""

  model_config = pydantic.ConfigDict(extra='forbid')
  city: Colour
  days: list[bool] = pydantic.Field(max_length=2)


_ASKED = {
  'model': servers.MODEL,
  'messages': _MESSAGES,
  'temperature': 2.0,
  'max_tokens': 300,
}
_TOOL = openai.pydantic_function_tool(Weather, name='weather')


@pytest.fixture(scope='module')
def plain_talk(tmp_path_factory):
  """Returns a client of such a model, without reasoning."""
  directory = scripted_models.write(
    tmp_path_factory.mktemp('calls'), scripted_models.SCRIPTS, max_length=1024
  )
  generator = generate.load(directory, scripted_models.ENGINE)
  with servers.running(generator, reply_format='hermes') as served:
    url = f'{served.url}/v1'
    with openai.OpenAI(base_url=url, api_key='none', timeout=300) as client:
      yield client


@pytest.mark.slow
def test_strict_tools_of_the_openai_client(plain_talk):
  """The model wants another argument, and its grammar has none."""
  answer = plain_talk.chat.completions.create(
    **{**_ASKED, 'max_tokens': 60}, tools=[_TOOL]
  )
  for call in answer.choices[0].message.tool_calls or ():
    Weather.model_validate_json(call.function.arguments)
  for choice in ('required', {'type': 'function', 'function': _NAMED}):
    answer = plain_talk.chat.completions.parse(
      **_ASKED, tools=[_TOOL], tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert answer.choices[0].finish_reason == 'tool_calls'
  parameters = Weather.model_json_schema()
  tool = {'type': 'function', **_NAMED, 'parameters': parameters}
  response = plain_talk.responses.create(
    model=servers.MODEL,
    input='a',
    temperature=2.0,
    max_output_tokens=300,
    tools=[{**tool, 'strict': True}],
    tool_choice={'type': 'function', 'name': 'weather'},
  )
  (call,) = [each for each in response.output if each.type == 'function_call']
  Weather.model_validate_json(call.arguments)


_NAMED = {'name': 'weather'}


def test_tools_that_are_not_strict_are_free_unless_a_call_is_forced(talk):
  free = talk.chat.completions.create(
    **{**_ASKED, 'temperature': 0.0}, tools=scripted_models.TOOLS
  )
  (call,) = free.choices[0].message.tool_calls
  assert json.loads(call.function.arguments) == {'city': 'K\u00f6ln'}
  schema = {'type': 'object', 'properties': {'a': {'not': {}}}}
  function = {'name': 'weather', 'parameters': schema, 'strict': True}
  for fields, param, words in (
    ({}, 'tools', 'tools[0].function.parameters: #/properties/a/not: got a'),
    ({'tool_choice': {'type': 'function', 'function': {'name': 'x'}}},
     'tool_choice', "got 'x' with the tools weather"),
  ):  # fmt: skip
    with pytest.raises(openai.BadRequestError) as refused:
      talk.chat.completions.create(
        **_ASKED, tools=[{'type': 'function', 'function': function}], **fields
      )
    assert refused.value.param == param
    assert words in refused.value.message


def test_capabilities_and_the_document_say_what_is_supported(http):
  routes = http.get('/v1/capabilities').json()['routes']
  for path in ('/v1/completions', '/v1/chat/completions'):
    (route,) = (each for each in routes if each['path'] == path)
    found = {each['name']: each for each in route['parameters']}
    assert found['structured_outputs']['supported']
    assert not found['guided_json']['supported']
    assert 'json_schema' in json.dumps(found['response_format']['values'])
  document = http.get('/openapi.json').json()['components']['schemas']
  assert {'schema', 'name'} <= document['NamedSchema']['properties'].keys()


def test_a_slow_grammar_holds_up_no_other_request(http, served, monkeypatch):
  """Grammars compile in threads of their own, a few at once."""
  compile_, begun = grammars.Grammars.compile, threading.Semaphore(0)
  may_go_on = threading.Event()

  def slow(self, constraint):
    begun.release()
    assert may_go_on.wait(60)
    return compile_(self, constraint)

  monkeypatch.setattr(grammars.Grammars, 'compile', slow)

  def ask(number):
    language = {'regex': f'[a-c]{{{number}}}'}
    url = f'{served.url}/v1/completions'
    body = {**_SAMPLED, 'prompt': 'a', 'structured_outputs': language}
    return httpx2.post(url, json=body, timeout=120)

  with futures.ThreadPoolExecutor() as pool:
    try:
      asked = [pool.submit(ask, number) for number in range(3, 8)]
      assert begun.acquire(timeout=60)
      assert http.get('/health').status_code == 200
      free = _post(http, '/v1/completions', stream=True, max_tokens=4)
      assert servers.events(free.content)
      assert not any(each.done() for each in asked)
    finally:
      may_go_on.set()
    for number, each in enumerate(asked, 3):
      (choice,) = each.result().json()['choices']
      assert re.fullmatch('[a-c]*', choice['text'])
      assert len(choice['text']) == number
