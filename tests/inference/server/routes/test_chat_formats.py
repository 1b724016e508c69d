"""Calls between special tokens, and the flag that names a format."""

import httpx2
import pytest

from inference import generate
from tests.helpers.serving import scripted_models, servers

_URL = '/v1/chat/completions'
_SPECIAL = '[TOOL_CALLS]', '[ARGS]'
_ARGUMENTS = '{"city": "Bonn"}'
_SCRIPTS = {
  'call': ['See: ', '[TOOL_CALLS]', 'weather', '[ARGS]', _ARGUMENTS],
  # The same strings in ordinary tokens.
  'plain': ['[TOOL', '_CALLS]', 'weather[', 'ARGS]{}'],
}
_CALL = (
  '[TOOL_CALLS]{{ call.function.name }}[ARGS]'
  '{{ call.function.arguments | tojson }}'
)


@pytest.fixture(scope='module')
def mistral(tmp_path_factory):
  directory = scripted_models.write(
    tmp_path_factory.mktemp('mistral'),
    _SCRIPTS,
    call=_CALL,
    special=_SPECIAL,
  )
  return generate.load(directory, scripted_models.ENGINE)


def _asked(generator, script, *, reply_format='auto', **fields):
  body = {
    'model': servers.MODEL,
    'messages': [{'role': 'user', 'content': 'How is it?'}],
    'tools': scripted_models.TOOLS,
    'chat_template_kwargs': {'script': script},
    **fields,
  }
  with servers.running(generator, reply_format=reply_format) as served:
    answer = httpx2.post(served.url + _URL, json=body, timeout=60)
  assert answer.status_code == 200, answer.text
  return answer.json()['choices'][0]


@pytest.mark.slow
def test_special_tokens_are_markers_and_their_strings_are_text(mistral):
  choice = _asked(mistral, 'call')
  (call,) = choice['message']['tool_calls']
  assert call['function'] == {'name': 'weather', 'arguments': _ARGUMENTS}
  # Templates of this family refuse other ids.
  assert len(call['id']) == 9
  assert call['id'].isalnum()
  assert choice['message']['content'] == 'See: '
  choice = _asked(mistral, 'plain', logprobs=True)
  assert choice['message']['content'] == ''.join(_SCRIPTS['plain'])
  assert 'tool_calls' not in choice['message']
  assert len(choice['logprobs']['content']) == 4


@pytest.mark.slow
def test_calls_that_nobody_asked_for_are_text_with_their_markers(mistral):
  choice = _asked(mistral, 'call', tools=None, logprobs=True)
  assert choice['message']['content'] == ''.join(_SCRIPTS['call'])
  entries = choice['logprobs']['content']
  assert [entry['token'] for entry in entries] == _SCRIPTS['call']
  assert entries[1]['bytes'] == []  # the decoded text has no special token


def test_a_flag_chooses_another_format(mistral):
  choice = _asked(mistral, 'call', reply_format='hermes')
  # Without markers of the format, special tokens are left out as ever.
  assert choice['message']['content'] == f'See: weather{_ARGUMENTS}'
