"""Chat templates render as the ecosystem's do, and their failures are told."""

import datetime

import pytest

from text import chat

MESSAGES = [
  {'role': 'user', 'content': 'Hi <b> é'},
  {'role': 'assistant', 'content': 'Hello'},
  {'role': 'user', 'content': 'Bye'},
]


def _render(template, messages=MESSAGES, *, add_generation_prompt=False):
  return chat.render(
    template,
    messages,
    add_generation_prompt=add_generation_prompt,
    bos_token='<s>',
    eos_token='</s>',
  )


def test_default_template_is_a_transcript():
  assert _render(chat.DEFAULT_TEMPLATE, add_generation_prompt=True) == (
    'User: Hi <b> é\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:'
  )
  assert _render(chat.DEFAULT_TEMPLATE) == (
    'User: Hi <b> é\n\nAssistant: Hello\n\nUser: Bye\n\n'
  )


def test_default_stop_is_where_the_next_turn_starts():
  text = _render(chat.DEFAULT_TEMPLATE)
  turns = text.count('User:') + text.count('Assistant:')
  assert sum(text.count(stop) for stop in chat.DEFAULT_STOP) == turns - 1


def test_chatml_with_special_tokens_and_trimmed_blocks():
  template = (
    '{{ bos_token }}\n'
    '{% for message in messages %}\n'
    '  {% if loop.index > 1 %}{% break %}{% endif %}\n'
    '<|im_start|>{{ message["role"] }}\n'
    '{{ message["content"] }}{{ eos_token }}\n'
    '{% endfor %}\n'
  )
  expected = '<s>\n<|im_start|>user\nHi <b> é</s>\n'
  assert _render(template) == expected


def test_generation_block_renders_its_contents():
  template = (
    '{% for m in messages %}{% if m.role == "assistant" %}'
    '{% generation %}[{{ m.content }}]{% endgeneration %}'
    '{% endif %}{% endfor %}'
  )
  assert _render(template) == '[Hello]'


def test_to_json_keeps_characters():
  assert _render('{{ messages[0] | tojson }}') == (
    '{"role": "user", "content": "Hi <b> é"}'
  )
  assert _render('{{ [1] | tojson(indent=2) }}') == '[\n  1\n]'


def test_strftime_now():
  before = datetime.date.today().year
  year = int(_render('{{ strftime_now("%Y") }}'))
  assert before <= year <= datetime.date.today().year


def test_tools_are_none_rather_than_undefined():
  assert _render('{% if tools is none %}none{% endif %}') == 'none'


def test_content_is_not_a_template():
  messages = [{'role': 'user', 'content': '{{ bos_token }}{% raw %}'}]
  assert _render('{{ messages[0].content }}', messages) == (
    '{{ bos_token }}{% raw %}'
  )


def test_template_may_refuse():
  with pytest.raises(ValueError, match='chat template: roles must alternate'):
    _render('{{ raise_exception("roles must alternate") }}')


def test_syntax_error_names_the_line():
  with pytest.raises(ValueError, match='chat template line 2: '):
    _render('ok\n{% for %}')


def test_error_inside_a_template():
  with pytest.raises(ValueError, match='chat template: .*division'):
    _render('{{ 1 // 0 }}')


@pytest.mark.parametrize(
  'template',
  [
    '{{ messages.__class__.__mro__ }}{{ messages.__class__.mro() }}',
    '{{ messages.append(1) }}',
  ],
)
def test_template_stays_in_its_sandbox(template):
  with pytest.raises(ValueError, match='chat template: .*(unsafe|safely)'):
    _render(template)


@pytest.mark.parametrize(
  ('message', 'error'),
  [
    ({'role': 'user'}, 'message 1 has content None, expected a string'),
    ({'role': 3, 'content': 'x'}, 'message 1 has role 3, expected a string'),
  ],
)
def test_malformed_message(message, error):
  with pytest.raises(ValueError, match=error):
    _render(chat.DEFAULT_TEMPLATE, [MESSAGES[0], message])
