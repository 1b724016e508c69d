"""Messages are fitted to the template, or refused if it would drop them."""

import copy
import dataclasses
import json

import pytest

from inference.requests import requests
from inference.server.answers import conversations
from inference.server.api import errors
from tests.helpers.serving import scripted_models
from text.replies import events

_USER = {'role': 'user', 'content': 'Hi'}
_TOOLS = scripted_models.TOOLS


def _call(arguments='{"city": "x"}'):
  function = {'name': 'weather', 'arguments': arguments}
  call = {'id': 'c1', 'type': 'function', 'function': function, 'index': 0}
  return {'role': 'assistant', 'content': None, 'tool_calls': [call]}


def _with(generator, template):
  """Returns a generator with another template."""
  other = copy.copy(generator)
  other.frozen = dataclasses.replace(generator.frozen, chat_template=template)
  return other


def _text(generator, *messages, **fields):
  asked = conversations.ask(generator, messages, **fields)
  return generator.tokenizer.decode(asked.ids)


_SHOWS = (
  '{% for m in messages %}{{ m.role }}={{ m.content }}/{{ m.name }};'
  '{% for c in m.tool_calls or [] %}<tool_call>{{ ARGUMENTS }}'
  '{{ c.function.name }}{% endfor %}{% endfor %}{{ tools | tojson }}'
)


@pytest.mark.slow
def test_arguments_are_what_the_template_wants(talker):
  objects = _with(
    talker, _SHOWS.replace('ARGUMENTS', 'c.function.arguments | tojson')
  )
  assert '<tool_call>{"city": "x"}weather' in _text(objects, _USER, _call())
  assert '<tool_call>{}weather' in _text(objects, _USER, _call(''))
  # What is no object is shown, so that the model sees its error.
  for broken in ('{"city": ', '[1]', '[' * 5000):
    assert json.dumps(broken) in _text(objects, _USER, _call(broken))
  texts = _with(
    talker, _SHOWS.replace('ARGUMENTS', "'' + c.function.arguments")
  )
  assert '<tool_call>{"city": "x"}weather' in _text(texts, _USER, _call())


def test_a_result_gets_the_name_of_its_function(generator):
  shows = _with(generator, _SHOWS.replace('ARGUMENTS', 'c.id'))
  result = {'role': 'tool', 'tool_call_id': 'c1', 'content': 'ok'}
  assert 'tool=ok/weather;' in _text(shows, _call(), result)
  named = {**result, 'name': 'other'}
  assert 'tool=ok/other;' in _text(shows, _call(), named)


def test_a_developer_is_a_system_message_unless_the_template_knows_it(
  generator,
):
  message = {'role': 'developer', 'content': 'x'}
  template = '{% for m in messages %}{{ m.role }};{% endfor %}'
  content = template.replace('{{ m.role }}', '{{ m.role }}{{ m.content }}')
  assert 'systemx;' in _text(_with(generator, content), message)
  knows = f'{{# developer #}}{content}'
  assert 'developerx;' in _text(_with(generator, knows), message)


@pytest.mark.parametrize(
  ('messages', 'tools', 'where'),
  [
    ([{'role': 'system', 'content': 'x'}, _USER], [], 'messages[0]'),
    ([_USER, {'role': 'developer', 'content': 'x'}], [], 'messages[1]'),
    ([_USER, _call()], [], 'messages[1]'),
    (
      [_USER, {'role': 'tool', 'tool_call_id': 'c1', 'content': 'x'}],
      [],
      'messages[1]',
    ),
    ([_USER], _TOOLS, 'tools'),
  ],
)
def test_what_a_template_leaves_out_is_refused(
  generator, messages, tools, where
):
  drops = _with(
    generator,
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
    '{% endif %}{% endfor %}',
  )
  with pytest.raises(errors.ApiError) as refused:
    conversations.ask(drops, messages, tools=tools)
  assert refused.value.code == 'unsupported_parameter'
  assert str(refused.value).startswith(f'{where}: got')


def test_a_system_message_behind_others_is_refused_if_it_is_dropped(generator):
  drops = _with(
    generator,
    '{% for m in messages %}{% if loop.first or m.role != "system" %}'
    '{{ m.content }}{% endif %}{% endfor %}',
  )
  system = {'role': 'system', 'content': 'x'}
  assert 'xHi' in _text(drops, system, _USER)
  with pytest.raises(errors.ApiError, match=r'messages\[1\]: got'):
    conversations.ask(drops, [_USER, system])


@pytest.mark.slow
def test_tools_of_an_unknown_format_are_refused(talker):
  unknown = _with(talker, '{{ messages[0].content }}{{ tools | tojson }}')
  with pytest.raises(errors.ApiError, match='reply_format') as refused:
    conversations.ask(unknown, [_USER], tools=_TOOLS)
  assert refused.value.param == 'tools'
  found = conversations.ask(
    unknown, [_USER], tools=_TOOLS, reply_format='mistral'
  )
  assert found.has_short_ids


def test_an_error_of_the_template_is_told(generator):
  raises = _with(generator, "{{ raise_exception('No system message.') }}")
  with pytest.raises(errors.ApiError, match='No system message') as refused:
    conversations.ask(raises, [_USER], param='input')
  assert (refused.value.status, refused.value.param) == (400, 'input')


def test_a_prompt_that_cannot_fit_is_refused_before_a_template_reads_it(
  generator,
):
  never = _with(generator, "{{ raise_exception('rendered') }}")
  long = 'x' * (generator.most_characters + 1)
  for message in ({**_USER, 'content': long}, _call(long)):
    with pytest.raises(errors.ApiError, match='characters'):
      conversations.ask(never, [message])


def _updates(ids, text, cuts, num_text_ids):
  """Yields updates with the given numbers of tokens; the last one ends."""
  fields = dict.fromkeys(
    f.name for f in dataclasses.fields(requests.Completion)
  )
  fields |= {'num_text_ids': num_text_ids, 'finish_reason': 'stop'}
  ended = requests.Completion(**fields)
  start = 0
  for index, end in enumerate(cuts):
    is_last = index == len(cuts) - 1
    piece = ids[start:end]
    yield requests.Update(
      0, 0, text(piece), piece, (), ended if is_last else None
    )
    start = end


def test_updates_of_any_size_become_the_same_events(talker):
  asked = conversations.ask(talker, [_USER], tools=_TOOLS)
  tokenizer = talker.tokenizer
  call = scripted_models.SCRIPTS['call']
  ids = [i for word in call for i in tokenizer.encode(word)]
  ids.append(tokenizer.eos_id)
  folds = []
  for cuts in ([len(ids)], [*range(1, len(ids) + 1)], [3, 4, len(ids)]):
    reader, reply = asked.reader(), events.Reply()
    for update in _updates(ids, tokenizer.decode, cuts, len(ids) - 1):
      for event in reader.read(update):
        reply.add(event)
    folds.append(reply)
  assert folds[0] == folds[1] == folds[2]
  assert folds[0].reasoning == 'I need it.'
  assert [call.name for call in folds[0].calls] == ['weather']
