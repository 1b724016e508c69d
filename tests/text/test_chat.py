"""Chat templates: rendering as in transformers, and errors."""

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


def test_names_in_templates_are_what_jinja_offers():
  template = (
    '{% set ns = namespace(self=1, n=2) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}'
    '{{ ns.self }}{{ dict(a=1) }}{{ dict.fromkeys([1]) }}{{ dict.update }}'
  )
  assert _render(template) == "31{'a': 1}{1: None}"


def test_answers_in_macros_and_loops_are_found():
  template = (
    '{% macro turn(m) %}<{{ m.role }}>{% generation %}{{ m.content }}'
    '{% endgeneration %}{% endmacro %}'
    '{% set all %}{% for m in messages %}{% if loop.index > 2 %}{% break %}'
    '{% endif %}{{ turn(m) }}{% endfor %}{% endset %}[{{ all }}]'
  )
  conversation = chat.Conversation(messages=MESSAGES)
  found = chat.prompt(template, conversation, names={}, special_tokens=())
  assert found.text == '[<user>Hi <b> é<assistant>Hello]'
  answers = found.answers or ()
  assert [found.text[slice(*span)] for span in answers] == [
    'Hi <b> é',
    'Hello',
  ]


def test_a_template_without_answers_says_so():
  conversation = chat.Conversation(messages=MESSAGES)
  found = chat.prompt('x', conversation, names={}, special_tokens=())
  assert found.answers is None


def test_special_tokens_are_found_where_the_template_wrote_them():
  found = chat.prompt(
    '{{ bos_token }}{{ messages[0].content }}</s></s>',
    chat.Conversation(messages=[{'role': 'user', 'content': 'a</s><s'}]),
    names={'bos_token': '<s>'},
    special_tokens=('<s>', '</s>'),
  )
  assert found.text == '<s>a</s><s</s></s>'
  assert found.specials == [(0, 3), (10, 14), (14, 18)]


def test_a_message_without_content_and_keys_without_values():
  messages = [
    MESSAGES[0],
    {'role': 'assistant', 'content': None, 'tool_calls': [], 'name': None},
  ]
  template = '{{ messages[1].keys() | list }}'
  assert _render(template, messages) == "['role', 'tool_calls']"


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
    '{% set ns = namespace(__class__=1) %}',
    '{% set ns = namespace() %}{% set ns._x = 1 %}',
    '{{ dict.mro() }}',
  ],
)
def test_template_stays_in_its_sandbox(template):
  with pytest.raises(
    ValueError, match='chat template: .*(unsafe|safely|no attribute)'
  ):
    _render(template)


@pytest.mark.parametrize(
  ('message', 'error'),
  [
    ({'role': 'user'}, 'message 1 has content None, expected a string'),
    ({'role': 3, 'content': 'x'}, 'message 1 has role 3, expected a string'),
    ({'role': 'user', 'content': ['x']}, 'a string or a list of parts'),
    ({'role': 'user', 'content': {}}, 'message 1 has content {}'),
    ('hi', "message 1 is 'hi', expected an object"),
    (
      {'role': 'user', 'content': b'x'},
      'message 1: got a bytes, expected JSON',
    ),
    ({'role': 'user', 'content': 'x', 3: 4}, 'message 1: got a dict, expected'),
  ],
)
def test_malformed_message(message, error):
  with pytest.raises(ValueError, match=error):
    _render(chat.DEFAULT_TEMPLATE, [MESSAGES[0], message])


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'messages': []}, 'got no messages, expected at least one'),
    ({'tools': ['f']}, "tools: got 'f', expected objects"),
    ({'documents': [3]}, 'documents: got 3, expected objects'),
    ({'variables': {'x': {1}}}, 'template variables: got a set'),
    ({'variables': {'tools': 1, 'y': 2}}, 'template variables: got tools, exp'),
    (
      {'add_generation_prompt': True, 'continue_final_message': True},
      'got both add_generation_prompt and continue_final_message',
    ),
    (
      {
        'messages': [{'role': 'assistant', 'content': None}],
        'continue_final_message': True,
      },
      'got a last message with content None, expected some text',
    ),
    (
      {'continue_final_message': True},
      'does not render the last message to its end',
    ),
  ],
)
def test_malformed_conversation(fields, error):
  conversation = chat.Conversation(**({'messages': MESSAGES} | fields))
  with pytest.raises(ValueError, match=error):
    chat.prompt('x', conversation, names={}, special_tokens=())


def test_text_of_every_private_character():
  every = ''.join(map(chr, (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))))
  with pytest.raises(ValueError, match='every private character'):
    _render('x', [{'role': 'user', 'content': every}])
