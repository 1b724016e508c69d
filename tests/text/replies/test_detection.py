"""The style of answers is that of the calls which the template writes."""

import pathlib

import pytest

from text import chat
from text.replies import detection, formats

_DIRECTORY = pathlib.Path(__file__).parents[1] / 'chat_templates'


def _read(name):
  return (_DIRECTORY / f'{name}.jinja').read_text('utf-8')


def _style(template, reply_format='auto'):
  return detection.style_of(
    template,
    names=(('bos_token', '<s>'), ('eos_token', '</s>')),
    special_tokens=frozenset({'<s>', '</s>', '<|im_end|>', '[TOOL_CALLS]'}),
    reply_format=reply_format,
  )


def _template(call, *, tools='{{ tools | tojson }}'):
  """Returns a template that writes a call in a given way."""
  return (
    f'{{% if tools %}}{tools}{{% endif %}}'
    '{% for message in messages %}{{ message.role }}: {{ message.content }}'
    '{% for call in message.tool_calls or [] %}{% set f = call.function %}'
    f'{call}{{% endfor %}}\n{{% endfor %}}'
  )


# The name of the format, and how a template of it writes a call.
_CALLS = {
  'hermes': '<tool_call>{{ f | tojson }}</tool_call>',
  'mistral': '[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}',
  'gemma': (
    '<start_function_call>call:{{ f.name }}{ {{- f.arguments -}} }'
    '<end_function_call>'
  ),
  'gemma4': '<|tool_call>call:{{ f.name }}{}<tool_call|>',
  'deepseek': (
    "{{ '<|tool_calls_begin|>'.replace('_', '\u2581').replace('|', '\uff5c') }}"
    '{{ f.name }}'
  ),
  'llama3': '{{ {"name": f.name, "parameters": f.arguments} | tojson }}',
}


@pytest.mark.parametrize('name', _CALLS)
def test_the_format_of_calls_is_that_of_the_template(name):
  style = _style(_template(_CALLS[name]))
  assert style.replies.calls == formats.CALLS[name]
  assert style.replies.reasoning is None
  assert style.has_tools


@pytest.mark.parametrize(
  ('template', 'calls', 'reasoning'),
  [
    ('chatml', 'hermes', 'think'),
    ('headers', 'llama3', ''),
    ('instruct', 'mistral', ''),
    ('turns', '', ''),
    ('roles', '', ''),
  ],
)
def test_templates_in_the_style_of_open_models(template, calls, reasoning):
  replies = _style(_read(template)).replies
  assert replies.calls == formats.CALLS.get(calls)
  assert replies.reasoning == formats.REASONING.get(reasoning)


def test_what_a_template_leaves_out():
  assert _style(_read('turns')).left_out == {'calls', 'tool'}
  chatml = _style(_read('chatml'))
  assert chatml.left_out == {'late_system'}
  assert (chatml.has_tools, chatml.has_developer) == (True, False)
  plain = _style(chat.DEFAULT_TEMPLATE)
  assert plain.left_out == {'calls'}
  assert not plain.has_tools
  refusing = (
    "{{ raise_exception('no') if messages | length > 1 }}{{ messages }}"
  )
  assert not _style(refusing).left_out  # its own error says more


def test_arguments_are_objects_unless_the_template_joins_text():
  assert _style(_template('{{ f.arguments | tojson }}')).takes_objects
  assert not _style(_template("{{ '<c>' + f.arguments }}")).takes_objects
  assert not _style(_template('<c>{{ f.arguments }}')).takes_objects


def test_a_flag_overrides_the_template():
  template = _read('chatml')
  assert _style(template, 'none').replies == detection.parser.Style()
  mixed = _style(template, 'llama3+mistral_think').replies
  assert mixed.calls == formats.CALLS['llama3']
  assert mixed.reasoning == ('[THINK]', '[/THINK]')
  only = _style(template, 'think').replies
  assert (only.calls, only.reasoning) == (None, ('<think>', '</think>'))
  for wrong in ('', 'other', 'auto+think', 'hermes+none'):
    with pytest.raises(ValueError, match=r'reply_format: got .* hermes\+think'):
      detection.check_name(wrong)


@pytest.mark.parametrize(
  ('ending', 'said', 'is_opened'),
  [
    ('<a><think>\n', 'x', True),
    ('<a>', 'x', False),
    ('<a><think>\n\n</think>\n\n', 'x', False),
    ('', 'what is <think>', False),
    ('<a><think>', 'what is <think>', True),
  ],
)
def test_whether_the_prompt_opens_reasoning(ending, said, is_opened):
  template = (
    '{% for m in messages %}{{ m.content }}{% endfor %}'
    f'{{% if add_generation_prompt %}}{ending}{{% endif %}}'
  )
  assert _is_opened(template, add_generation_prompt=True, said=said) == (
    is_opened
  )


def _is_opened(template, *, said='x', role='user', **fields):
  conversation = chat.Conversation(
    messages=[{'role': role, 'content': said}], **fields
  )

  def rendered(**other):
    return chat.prompt(
      template,
      chat.Conversation(**{**vars(conversation), **other}),
      names={},
      special_tokens=(),
    ).text

  return detection.is_opened(
    rendered(),
    conversation,
    formats.REASONING['think'],
    without_prompt=lambda: rendered(add_generation_prompt=False),
  )


def test_a_message_that_is_continued_may_be_inside_reasoning():
  template = '{% for m in messages %}{{ m.content }}{% endfor %}'
  for said, is_opened in (
    ('<think>hm', True), ('<think>hm</think>so', False), ('so', False)
  ):  # fmt: skip
    fields = {'role': 'assistant', 'continue_final_message': True}
    assert _is_opened(template, said=said, **fields) == is_opened
