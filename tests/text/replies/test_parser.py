"""The parser: one meaning per answer, however it is cut, and no text lost."""

import json

import hypothesis
from hypothesis import strategies as st
import pytest

from text.replies import events, formats, parser

TOOLS = {
  'weather': {
    'type': 'object',
    'properties': {
      'city': {'type': 'string'},
      'days': {'type': 'integer'},
      'deep': {'type': 'object'},
    },
  },
  'f': {},
}
THINK = formats.REASONING['think']
# Two calls, weather(city='K\u00f6ln', days=2) and f(), in every format.
TWO = {
  'hermes': (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "K\u00f6ln",'
    ' "days": 2}}\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n'
    '</tool_call>'
  ),
  'hermes, xml': (
    '<tool_call>\n<function=weather>\n<parameter=city>\nK\u00f6ln\n</parameter>\n'
    '<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n'
    '<tool_call>\n<function=f>\n</function>\n</tool_call>'
  ),
  'llama3': (
    '<|python_tag|>{"name": "weather", "parameters": {"city": "K\u00f6ln",'
    ' "days": 2}}; {"name": "f", "parameters": {}}'
  ),
  'llama3, bare': (
    '{"name": "weather", "parameters": {"city": "K\u00f6ln", "days": 2}};\n'
    '{"name": "f", "parameters": {}}'
  ),
  'mistral': (
    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "K\u00f6ln",'
    ' "days": 2}}, {"name": "f", "arguments": {}}]'
  ),
  'mistral, args': (
    '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "K\u00f6ln",'
    ' "days": 2}[TOOL_CALLS]f[ARGS]{}'
  ),
  'gemma': (
    '<start_function_call>call:weather{city:<escape>K\u00f6ln<escape>,days:2}'
    '<end_function_call><start_function_call>call:f{}<end_function_call>'
  ),
  'gemma4': (
    '<|tool_call>call:weather{city:<|"|>K\u00f6ln<|"|>,days:2}<tool_call|>'
    '<|tool_call>call:f{}<tool_call|>'
  ),
  'deepseek': (
    '<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json'
    '\n{"city": "K\u00f6ln", "days": 2}\n```<|tool_call_end|>'
    '<|tool_call_begin|>f<|tool_sep|>{}<|tool_call_end|><|tool_calls_end|>'
  ).replace('_', '\u2581').replace('<|', '<\uff5c').replace('|>', '\uff5c>'),
}  # fmt: skip
WEATHER = ('weather', {'city': 'K\u00f6ln', 'days': 2})


def _style(name, *, reasoning=THINK):
  calls = formats.CALLS.get(name.partition(',')[0])
  return parser.Style(calls=calls, reasoning=reasoning)


def _special(style):
  """Makes every marker a special token."""
  found = [*(style.calls.markers if style.calls else ()), *style.reasoning]
  return {marker: 300 + i for i, marker in enumerate(found)}


def _pieces(style, text, special_tokens):
  """Cuts a text into characters, and its special tokens into symbols."""
  markers = style.markers(special_tokens)
  for marker in sorted(special_tokens, key=len, reverse=True):
    text = text.replace(marker, markers.form(marker))
  return list(text)


def _events(style, pieces, *, special_tokens=(), reason='stop', **options):
  options = {'tools': TOOLS, **options}
  markers = style.markers(dict(special_tokens))
  machine = parser.Parser(style, markers, **options)
  found = [event for piece in pieces for event in machine.push(piece)]
  return found + machine.finish(reason)


def _reply(style, pieces, **options):
  reply = events.Reply()
  for event in _events(style, pieces, **options):
    reply.add(event)
  return reply


def _calls(reply):
  return [(call.name, json.loads(call.arguments)) for call in reply.calls]


@pytest.mark.parametrize('is_special', [False, True])
@pytest.mark.parametrize('name', TWO)
def test_calls_in_every_format(name, is_special):
  style = _style(name)
  special = _special(style) if is_special else {}
  reply = _reply(
    style, _pieces(style, TWO[name], special), special_tokens=special
  )
  assert _calls(reply) == [WEATHER, ('f', {})]
  assert (reply.text, reply.reasoning) == ('', '')
  assert reply.finish_reason == 'tool_calls'


@pytest.mark.parametrize('name', TWO)
def test_text_and_reasoning_around_calls(name):
  style = _style(name)
  text = f'<think>\nI need it.\n</think>\n\n{TWO[name]}'
  if 'bare' not in name:
    text = text.replace('\n\n', '\n\nLet me  see.\n')
  reply = _reply(style, text)
  assert reply.reasoning == 'I need it.'
  assert reply.text == ('' if 'bare' in name else 'Let me  see.')
  assert _calls(reply) == [WEATHER, ('f', {})]


@pytest.mark.parametrize('name', [n for n in TWO if 'llama3' not in n])
def test_text_after_calls(name):
  reply = _reply(_style(name), f'{TWO[name]}\nDone.')
  assert reply.text.strip() == 'Done.'
  assert len(reply.calls) == 2


@pytest.mark.parametrize('name', TWO)
def test_without_tools_nothing_is_a_call(name):
  for tools in ({}, None, {'other': {}}):
    reply = _reply(_style(name), TWO[name], tools=tools)
    assert not reply.calls
    assert reply.text.strip('\n') == TWO[name].strip('\n')
    assert reply.finish_reason == 'stop'


@pytest.mark.parametrize('name', TWO)
def test_with_special_tokens_the_same_string_is_text(name):
  style = _style(name)
  special = _special(style)
  if 'bare' in name:
    return
  reply = _reply(style, TWO[name], special_tokens=special)
  assert not reply.calls
  assert reply.text == TWO[name]
  # Reasoning, too.
  reply = _reply(style, '<think>a</think>b', special_tokens=special)
  assert reply.text == '<think>a</think>b'


@pytest.mark.parametrize('name', TWO)
def test_an_end_at_any_place(name):
  """Each call is whole, or it is text: with its markers, and once."""
  style = _style(name)
  whole = TWO[name]
  for size in range(len(whole)):
    for special in ({}, _special(style)):
      pieces = _pieces(style, whole, special)[:size]
      markers = style.markers(special)
      reply = _reply(style, pieces, special_tokens=special, reason='length')
      assert reply.finish_reason == 'length'
      assert _calls(reply) == [WEATHER, ('f', {})][: len(reply.calls)]
      cut = ''.join(map(markers.spelled, pieces))
      assert cut.endswith(reply.text)
      if not reply.calls:
        assert reply.text == cut


def test_a_call_that_lacks_only_its_closing_marker_is_a_call():
  style = _style('hermes')
  text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}'
  for end in ('', '\n', '\n</tool', '</tool_call'):
    assert _calls(_reply(style, text + end)) == [('f', {'x': 1})]
  cut = _reply(style, text[:-1])
  assert (cut.text, cut.calls) == (text[:-1], [])


@pytest.mark.parametrize(
  'body',
  [
    '',
    '{"name": "f", "arguments": {"x": }}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": 5}',
    '{"name": "g", "arguments": {}}',
    '{"name": ["f"], "arguments": {}}',
    '{"name": "f", "arguments": {"x": NaN}}',
    '{"name": "f", "arguments": {"x": 1e999}}',
    '{"name": "f", "arguments": {"x": "\\ud800"}}',
    '{"arguments": {}}',
    '[' * 100_000,
    'f(x=1)',
    '<function=f><parameter=x>1</parameter>rest</function>',
    '<function=f>',
    '<function=g></function>',
  ],
)
def test_a_broken_call_is_text_and_the_next_one_counts(body):
  broken = f'<tool_call>{body}</tool_call>'
  good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
  reply = _reply(_style('hermes'), ['a ', broken, '\nb', good])
  assert reply.text == f'a {broken}\nb'
  assert _calls(reply) == [('f', {})]


def test_a_marker_that_is_never_closed_hides_no_later_call():
  good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
  reply = _reply(_style('hermes'), f'Write <tool_call> and then:{good}')
  assert reply.text == 'Write <tool_call> and then:'
  assert _calls(reply) == [('f', {})]


def test_arguments_may_be_json_in_json_or_have_line_ends():
  style = _style('hermes')
  text = r'<tool_call>{"name": "f", "arguments": "{\"x\": [1]}"}</tool_call>'
  assert _calls(_reply(style, text)) == [('f', {'x': [1]})]
  text = '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>'
  assert _calls(_reply(style, text)) == [('f', {'x': 'a\nb'})]


def test_values_of_xml_parameters_are_of_the_type_in_the_schema():
  def parameters(**values):
    inside = ''.join(
      f'<parameter={name}>\n{value}\n</parameter>\n'
      for name, value in values.items()
    )
    text = f'<tool_call><function=weather>\n{inside}</function></tool_call>'
    ((_, arguments),) = _calls(_reply(_style('hermes'), text))
    return arguments

  assert parameters(city='5', days='7', deep='{"a": [1]}', other='1') == {
    'city': '5', 'days': 7, 'deep': {'a': [1]}, 'other': '1'
  }  # fmt: skip
  assert parameters(city='  a\n\nb ') == {'city': '  a\n\nb '}
  assert parameters(days='soon', deep='None') == {
    'days': 'soon',
    'deep': 'None',
  }


def test_values_of_gemma():
  text = (
    '<start_function_call>call:f{a:<escape>x, {y}: [z]<escape>,b:[1, -2.5,'
    'true,null,[]],c:{d:{},<escape>e f<escape>:false}}<end_function_call>'
  )
  assert _calls(_reply(_style('gemma'), text)) == [
    ('f', {
      'a': 'x, {y}: [z]', 'b': [1, -2.5, True, None, []],
      'c': {'d': {}, 'e f': False},
    })
  ]  # fmt: skip
  for broken in ('{a:}', '{a:b}', '{a:1', '{a:1,}', '{a 1}', '{:1}', '{a:[1}',
                 '{a:<escape>x}', '{a:1}}', '{' * 500, ''):  # fmt: skip
    text = f'<start_function_call>call:f{broken}<end_function_call>'
    assert _reply(_style('gemma'), text).text == text


def test_a_bare_call_counts_only_if_the_whole_answer_is_calls():
  style = _style('llama3')
  call = '{"name": "f", "parameters": {"x": 1}}'
  for text in (
    f'{call} is how you call it.',
    f'Use {call}',
    '{"name": "Ada", "parameters": {}}',
    '{"name": "f"',
    '{"names": ["f"]}',
    '{}',
    f'{call}, {call}',
  ):
    reply = _reply(style, text)
    assert (reply.text, reply.calls) == (text, [])
  assert _calls(_reply(style, f' \n{call}\n')) == [('f', {'x': 1})]


def test_json_that_is_no_call_is_streamed_at_once():
  machine = parser.Parser(
    style := _style('llama3'), style.markers({}), tools=TOOLS
  )
  assert machine.push('{"name": "') == []
  (event,) = machine.push('Ada')
  assert event == events.Text('{"name": "Ada', (0, 1))


def test_reasoning_begins_in_the_prompt_or_where_the_answer_begins():
  style = _style('')
  inside = _reply(style, 'hm\n\nso\n</think>\n\nYes.', is_reasoning=True)
  assert (inside.reasoning, inside.text) == ('hm\n\nso', 'Yes.')
  opened = _reply(style, '\n <think>\n\nhm</think> Yes.\n')
  assert (opened.reasoning, opened.text) == ('hm', ' Yes.\n')
  for text in ('Yes </think> no', 'A <think>tag</think>', '<thinking>', '<thi'):
    reply = _reply(style, text)
    assert (reply.reasoning, reply.text) == ('', text)
  special = _special(style)
  pieces = _pieces(style, 'A<think>tag</think>B', special)
  reply = _reply(style, pieces, special_tokens=special)
  assert (reply.reasoning, reply.text) == ('tag', 'AB')


def test_an_end_inside_of_reasoning():
  reply = _reply(_style(''), 'I wonder\n</thi', is_reasoning=True)
  assert (reply.reasoning, reply.text) == ('I wonder\n</thi', '')


def test_a_call_inside_reasoning_counts_only_if_the_answer_ends_with_it():
  style = _style('hermes')
  call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
  considered = f'maybe\n{call}\nor not'
  reply = _reply(style, f'{considered}\n</think>\nNo.', is_reasoning=True)
  assert (reply.reasoning, reply.text) == (considered, 'No.')
  assert not reply.calls
  closed = _reply(style, f'maybe {call}</think>No.', is_reasoning=True)
  assert (closed.reasoning, closed.calls) == (f'maybe {call}', [])
  forgot = _reply(style, f'I must.\n{call}\n{call}\n', is_reasoning=True)
  assert forgot.reasoning == 'I must.'
  assert _calls(forgot) == [('f', {})] * 2
  assert forgot.finish_reason == 'tool_calls'
  broken = _reply(style, f'I must.\n{call}<tool_call>{{', is_reasoning=True)
  assert broken.reasoning == f'I must.\n{call}<tool_call>{{'
  after = f'{call}</think>{call}'
  reply = _reply(style, after, is_reasoning=True)
  assert (reply.reasoning, len(reply.calls)) == (call, 1)


def test_only_the_first_call_of_a_single_one():
  for name, text in TWO.items():
    reply = _reply(_style(name), text, is_single=True)
    assert _calls(reply) == [WEATHER]
    assert reply.text == ''


def test_tokens_go_with_their_text():
  style = _style('hermes')
  pieces = ['<th', 'ink>', 'a', '', 'b</', 'think>\n', '\nc', 'd\n', '<tool',
            '_call>{}', '</tool_call>', 'e', '']  # fmt: skip
  reply = _reply(style, pieces)
  assert reply.reasoning == 'ab'
  assert reply.reasoning_tokens == [2, 3, 4]
  assert reply.text == 'cd\n<tool_call>{}</tool_call>e'
  assert reply.text_tokens == [6, 7, 8, 9, 10, 11]


# ------------------------------------------------------------------------------
# Properties

_BITS = st.sampled_from(
  [
    '<think>', '</think>', '<thi', 'nk>', '\n', ' ', 'x', '{', '}', 'Hello',
    '<tool_call>', '</tool_call>', '<tool', '_call>', '[TOOL_CALLS]', '[ARGS]',
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"a": "b"}}',
    '<|python_tag|>', '; ', '[{"name": "f", "arguments": {}}]', 'f', '</',
    '<start_function_call>', 'call:f{a:1}', '<end_function_call>', '<escape>',
    '<function=f>', '<parameter=a>1</parameter>', '</function>', '\u00e9',
  ]
)  # fmt: skip
_ANSWERS = st.lists(_BITS, max_size=14).map(''.join)
_NAMES = st.sampled_from(['', *formats.CALLS])


@st.composite
def _cuts(draw, text):
  places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
  edges = [0, *places, len(text)]
  return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(
  st.data(), _ANSWERS, _NAMES, st.booleans(), st.booleans(), st.booleans()
)
def test_every_cut_has_the_same_fold(
  data, text, name, is_special, is_reasoning, is_single
):
  style = _style(name)
  special = _special(style) if is_special else {}
  stream = ''.join(_pieces(style, text, special))
  options = {
    'special_tokens': special,
    'is_reasoning': is_reasoning,
    'is_single': is_single,
    'reason': data.draw(st.sampled_from(['stop', 'length'])),
  }
  whole = _reply(style, [stream], **options)
  for pieces in (list(stream), data.draw(_cuts(stream))):
    reply = _reply(style, pieces, **options)
    assert (reply.text, reply.reasoning, reply.calls, reply.finish_reason) == (
      whole.text, whole.reasoning, whole.calls, whole.finish_reason
    )  # fmt: skip
  for call in whole.calls:
    assert isinstance(json.loads(call.arguments), dict)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(_ANSWERS, _NAMES, st.booleans(), st.booleans())
def test_no_text_is_lost(text, name, is_special, is_reasoning):
  """Without calls, all is there but markers of reasoning and line ends."""
  style = _style(name)
  special = _special(style) if is_special else {}
  pieces = _pieces(style, text, special)
  reply = _reply(
    style,
    pieces,
    special_tokens=special,
    is_reasoning=is_reasoning,
    tools={},
  )
  assert not reply.calls

  def bare(shown):
    for marker in (*THINK, '\n', ' '):
      shown = shown.replace(marker, '')
    return sorted(shown)

  assert bare(reply.text + reply.reasoning) == bare(text)
  for event in _events(style, pieces, special_tokens=special):
    assert isinstance(event, events.End) or getattr(event, 'text', 'x')


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.text(), _NAMES)
def test_text_without_markers_is_all_text(text, name):
  style = _style(name)
  hypothesis.assume(not any(m in text for m in (*THINK, '{', '[', '<')))
  reply = _reply(style, list(text))
  assert reply == events.Reply(
    text=text,
    finish_reason='stop',
    text_tokens=list(range(len(text))),
  )
