"""Chat over HTTP: fields that are refused, by their names."""

import httpx2
from openai.types.chat import completion_create_params
import pytest

from inference.server.api import chat_schema
from tests.helpers.serving import scripted_models, servers

_URL = '/v1/chat/completions'
_USER = {'role': 'user', 'content': 'How is it?'}


@pytest.fixture(scope='module')
def served(talker):
  with servers.running(talker) as served:
    yield served


@pytest.mark.parametrize(
  ('fields', 'param', 'code', 'message'),
  [
    ({'messages': []}, 'messages', None, 'got none'),
    (
      {'messages': [{'role': 'user'}]},
      'messages',
      None,
      'messages.0.user.cont',
    ),
    ({'messages': [{'content': 'x'}]}, 'messages', None, 'role'),
    (
      {'messages': [{'role': 'function', 'content': 'x'}]},
      'messages',
      'unsupported_parameter',
      "got 'function'",
    ),
    (
      {
        'messages': [
          {
            'role': 'user',
            'content': [
              {'type': 'image_url', 'image_url': {'url': 'http://x'}}
            ],
          }
        ]
      },
      'messages',
      'unsupported_parameter',
      "got 'image_url', expected 'text'",
    ),
    (
      {
        'messages': [
          {
            'role': 'user',
            'content': [{'type': 'input_audio', 'input_audio': {}}],
          }
        ]
      },
      'messages',
      'unsupported_parameter',
      "got 'input_audio'",
    ),
    ({'messages': [{'role': 'assistant'}]}, 'messages[0]', None, 'neither'),
    (
      {'messages': [{'role': 'user', 'content': []}]},
      'messages[0]',
      None,
      'no p',
    ),
    (
      {'messages': [{'role': 'tool', 'content': 'x'}]},
      'messages',
      None,
      'tool_call_id',
    ),
    (
      {'messages': [{'role': 'user', 'content': '=-' * 300_000}]},
      'messages',
      'context_length_exceeded',
      'characters',
    ),
    (
      {'messages': [{'role': 'user', 'content': '=-' * 500}]},
      'messages',
      'context_length_exceeded',
      'expected at most 512 together',
    ),
    (
      {'tool_choice': 'required'},
      'tool_choice',
      None,
      'no tools, expected a tool of the request',
    ),
    (
      {'tool_choice': {'type': 'function', 'function': {'name': 'weather'}}},
      'tool_choice',
      None,
      "got 'weather' with no tools",
    ),
    (
      {'tool_choice': {'type': 'allowed_tools', 'allowed_tools': {}}},
      'tool_choice',
      'unsupported_parameter',
      "got 'allowed_tools'",
    ),
    (
      {'tools': [{'type': 'custom', 'custom': {'name': 'x'}}]},
      'tools',
      'unsupported_parameter',
      "got 'custom'",
    ),
    ({'tools': scripted_models.TOOLS * 2}, 'tools', None, 'twice'),
    (
      {'response_format': {'type': 'grammar'}},
      'response_format',
      'unsupported_parameter',
      "got 'grammar'",
    ),
    ({'top_logprobs': 2}, 'top_logprobs', None, 'without logprobs'),
    ({'top_logprobs': 21, 'logprobs': True}, 'top_logprobs', None, '0 to 20'),
    ({'logprobs': 2}, 'logprobs', None, 'boolean'),
    ({'n': 129}, 'n', None, 'at most 128'),
    ({'n': 0}, 'n', None, 'at least 1'),
    ({'max_tokens': 0}, 'max_tokens', None, 'from 1'),
    ({'max_completion_tokens': 0}, 'max_completion_tokens', None, 'from 1'),
    (
      {'max_completion_tokens': 3, 'max_tokens': 4},
      'max_completion_tokens',
      None,
      'the same',
    ),
    ({'stream_options': {}}, 'stream_options', None, 'without stream'),
    (
      {'stream': True, 'stream_options': {'include_obfuscation': True}},
      'stream_options.include_obfuscation',
      'unsupported_parameter',
      '',
    ),
    (
      {'add_generation_prompt': True, 'continue_final_message': True},
      'continue_final_message',
      None,
      'one of them',
    ),
    (
      {'chat_template_kwargs': {'messages': 1}},
      'messages',
      None,
      'other names',
    ),
    ({'best_of': 1}, 'best_of', 'unsupported_parameter', ''),
    ({'temperature': -1}, 'temperature', None, ''),
  ],
)
def test_what_is_refused(http, fields, param, code, message):
  body = {'model': servers.MODEL, 'messages': [_USER], **fields}
  answer = http.post(_URL, json=body)
  assert answer.status_code == 400, answer.text
  error = answer.json()['error']
  assert (error['param'], error['code']) == (param, code), error
  assert message in error['message'], error


def test_every_field_of_openai_is_known():
  fields = completion_create_params.CompletionCreateParamsBase.__annotations__
  known = chat_schema.ChatRequest.model_fields.keys()
  assert fields.keys() | {'stream'} <= known


def test_a_template_without_tools_refuses_them(generator):
  with servers.running(generator) as served:
    body = {**servers.CHAT, 'tools': scripted_models.TOOLS}
    answer = httpx2.post(served.url + _URL, json=body, timeout=60)
    error = answer.json()['error']
    assert (answer.status_code, error['param']) == (400, 'tools')
    assert error['code'] == 'unsupported_parameter'
    assert 'does not show them' in error['message']
    call = {'id': 'x', 'type': 'function'}
    call['function'] = {'name': 'f', 'arguments': '{}'}
    said = {'role': 'assistant', 'content': None, 'tool_calls': [call]}
    body['messages'] = [_USER, said]
    answer = httpx2.post(
      served.url + _URL, json={**body, 'tools': None}, timeout=60
    )
    assert 'messages[1]: got a part' in answer.json()['error']['message']
