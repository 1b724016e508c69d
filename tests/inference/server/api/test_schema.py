"""Fields of a request: each is used, checked or refused, and none ignored."""

import dataclasses

import pydantic
import pytest

from inference.sampling import settings as settings_lib
from inference.server.api import completion_schema, errors, schema

_Request = completion_schema.CompletionRequest
_BODY = {'model': 'tiny', 'prompt': 'a'}


def _parsed(**fields):
  return _Request(**_BODY, **fields)


def _checked(is_shared=False, **fields):
  body = _parsed(**fields)
  body.check(is_shared=is_shared)
  return settings_lib.Settings(
    **{k: v for k, v in body.chosen().items() if v is not None}
  )


# A value of each field, and the settings that it leads to.
_SETTINGS = {
  'max_tokens': (5, {'max_tokens': 5}),
  'temperature': (0.5, {'temperature': 0.5}),
  'top_p': (0.5, {'top_p': 0.5}),
  'presence_penalty': (-1, {'presence_penalty': -1.0}),
  'frequency_penalty': (0.1, {'frequency_penalty': 0.1}),
  'logit_bias': ({'5': -100, '7': 0.5}, {'logit_bias': ((5, -100), (7, 0.5))}),
  'logprobs': (0, {'logprobs': 0}),
  'seed': (3, {'seed': 3}),
  'stop': (['a', 'b'], {'stop': ('a', 'b')}),
  'n': (2, {'n': 2}),
  'top_k': (4, {'top_k': 4}),
  'min_p': (0.2, {'min_p': 0.2}),
  'repetition_penalty': (1.1, {'repetition_penalty': 1.1}),
  'min_tokens': (3, {'min_tokens': 3}),
  'ignore_eos': (True, {'ignore_eos': True}),
  'stop_token_ids': ([5, 6], {'stop_ids': (5, 6)}),
}
# Fields that are no settings; tests over HTTP cover them.
_OTHERS = {
  'model',
  'prompt',
  'echo',
  'stream',
  'stream_options',
  'user',
  'priority',
  'return_tokens_as_token_ids',
  'response_format',
  'structured_outputs',
}


@pytest.mark.parametrize('name', _SETTINGS)
def test_a_field_chooses_a_setting(name):
  value, expected = _SETTINGS[name]
  settings = _checked(**{name: value})
  assert settings == dataclasses.replace(settings_lib.Settings(), **expected)
  assert settings != settings_lib.Settings()
  assert _checked(**{name: None}) == settings_lib.Settings()


def test_no_field_is_without_a_test_and_no_setting_out_of_reach():
  assert _Request.model_fields.keys() == (
    _SETTINGS.keys() | _OTHERS | _Request.unsupported().keys()
  )
  reached = {name for _, chosen in _SETTINGS.values() for name in chosen}
  names = {field.name for field in dataclasses.fields(settings_lib.Settings)}
  # The API asks for the log-probabilities of a prompt with `echo`, and for a
  # constraint with response_format or structured_outputs.
  assert names - reached == {'prompt_logprobs', 'constraint'}


def test_a_new_setting_becomes_a_field_of_the_body():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class More(settings_lib.Settings):
    typical_p: float = dataclasses.field(default=1.0, metadata={'help': 'New.'})
    bad_ids: tuple[int, ...] = dataclasses.field(
      default=(), metadata={'help': 'New too.', 'api_name': 'bad_token_ids'}
    )

  body = schema.with_settings(
    completion_schema._OpenAiRequest, dataclasses.fields(More)
  )
  assert body.model_fields['typical_p'].description == 'New.'
  parsed = body.model_validate(_BODY | {'typical_p': 0.5, 'bad_token_ids': [3]})
  assert parsed.model_dump()['typical_p'] == 0.5
  with pytest.raises(pydantic.ValidationError, match='valid integer'):
    body.model_validate(_BODY | {'bad_token_ids': ['3']})
  assert not {'bad_ids', 'prompt_logprobs'} & body.model_fields.keys()


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'best_of': 2}, 'best_of', 'best_of: got 2, expected None or 1'),
    ({'suffix': ')'}, 'suffix', "suffix: got ')', expected None; this server"),
  ],
)
def test_what_is_not_supported_is_refused(fields, param, message):
  with pytest.raises(errors.ApiError, match='leave it out') as caught:
    _checked(**fields)
  assert caught.value.body()['error'] == {
    'message': str(caught.value),
    'type': 'invalid_request_error',
    'param': param,
    'code': 'unsupported_parameter',
  }
  assert message in str(caught.value)


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'n': 0}, 'n', 'n: got 0, expected at least 1'),
    ({'max_tokens': 0}, 'max_tokens', 'got 0, expected at least 1, or 0 with'),
    ({'max_tokens': 0, 'echo': True, 'min_tokens': 1}, 'max_tokens', 'got 0,'),
    ({'stream_options': {}}, 'stream_options', 'got options without stream'),
    (
      {'return_tokens_as_token_ids': True},
      'return_tokens_as_token_ids',
      'got true without logprobs',
    ),
    (
      {'stream': True, 'echo': True, 'logprobs': 0},
      'stream',
      'got a stream with both echo and logprobs',
    ),
    ({'priority': 2**31}, 'priority', 'got 2147483648, expected -2147483647'),
    ({'priority': -1, 'is_shared': True}, 'priority', 'got -1, expected 0 to'),
  ],
)
def test_what_makes_no_sense_is_refused(fields, param, message):
  with pytest.raises(errors.ApiError) as caught:
    _checked(**fields)
  assert (caught.value.status, caught.value.param) == (400, param)
  assert message in str(caught.value)


@pytest.mark.parametrize('num', [0, 129])
def test_prompts_are_counted(num):
  body = _Request(model='tiny', prompt=['a'] * num)
  with pytest.raises(
    errors.ApiError, match=f'got {num} prompts, expected 1 to'
  ):
    body.check(is_shared=False)


@pytest.mark.parametrize(
  ('prompt', 'prompts'),
  [
    ('ab', ['ab']),
    ('', ['']),
    (['ab', 'c'], ['ab', 'c']),
    ([1, 2], [[1, 2]]),
    ([[1], [2]], [[1], [2]]),
  ],
)
def test_every_form_of_prompt(prompt, prompts):
  body = _Request(model='tiny', prompt=prompt)
  assert body.prompts() == prompts


def test_minus_one_is_all_tokens_as_clients_of_vllm_send_it():
  assert _checked(top_k=-1) == settings_lib.Settings()
  with pytest.raises(settings_lib.SettingError, match='top_k: got -2'):
    _checked(top_k=-2)


@pytest.mark.parametrize('seed', [-(2**63), 2**32, 2**63, 2**64 - 1])
def test_a_seed_of_64_bits_passes(seed):
  body = schema.parsed(
    _Request,
    b'{"model":"tiny","prompt":"a","seed":%d}' % seed,
    context=64,
  )
  assert body.chosen()['seed'] == seed


def test_what_makes_no_difference_is_accepted():
  assert (
    _checked(
      best_of=1,
      echo=False,
      logit_bias={},
      priority=0,
      return_tokens_as_token_ids=False,
      stop=[],
      stop_token_ids=[],
      suffix=None,
      user='somebody',
    )
    == settings_lib.Settings()
  )


@pytest.mark.parametrize(
  ('fields', 'param', 'message', 'code'),
  [
    ({'temperature': '1'}, 'temperature', 'should be a valid number', None),
    ({'temperature': True}, 'temperature', 'should be a valid number', None),
    ({'logprobs': True}, 'logprobs', 'should be a valid integer', None),
    ({'stop': 3}, 'stop', 'should be a valid string; or: ', None),
    ({'prompt': {'a': 1}}, 'prompt', 'should be a valid string; or: ', None),
    ({'logit_bias': {'5': 'x'}}, 'logit_bias', 'valid number', None),
    ({'tempreature': 1}, 'tempreature', 'know', 'unsupported_parameter'),
    (
      {'stream': True, 'stream_options': {'every': 2}},
      'stream_options',
      'stream_options.every: got a parameter that this server does not know',
      'unsupported_parameter',
    ),
  ],
)
def test_types_are_checked_and_the_field_is_named(fields, param, message, code):
  with pytest.raises(pydantic.ValidationError) as caught:
    _Request(**{**_BODY, **fields})
  error = schema.from_validation(caught.value.errors())
  assert (error.param, error.code) == (param, code)
  assert message in str(error)
  assert '\n' not in str(error)


def test_a_setting_is_named_as_the_api_names_it():
  with pytest.raises(settings_lib.SettingError) as caught:
    _checked(stop_token_ids=[-1])
  error = schema.from_setting(caught.value)
  assert error.param == 'stop_token_ids'
  assert str(error).startswith('stop_token_ids: got (-1,), expected token ids')


def test_an_answer_says_when_to_try_again():
  busy = errors.ApiError(429, 'full', param=None, code='overloaded')
  assert int(busy.response().headers['retry-after']) > 0
  wrong = errors.invalid('n', 'got 0')
  assert 'retry-after' not in wrong.response().headers
  assert wrong.body()['error']['type'] == 'invalid_request_error'
  fault = errors.ApiError(500, 'ours', param=None, code=None)
  assert fault.body()['error']['type'] == 'server_error'
