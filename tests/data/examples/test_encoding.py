"""Documents: their ids are those of a server, and their masks are exact."""

import pathlib
import pickle

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from data.examples import audit, encoding
from tests.helpers import chat_families, hf_files
from text import chat, tokenizer

SYSTEM = {'role': 'system', 'content': 'the hat'}
USER = {'role': 'user', 'content': 'What is 2+2?'}
ANSWER = {'role': 'assistant', 'content': 'the cat: 4'}
CALL = {
  'role': 'assistant',
  'content': None,
  'reasoning_content': 'hm',
  'tool_calls': [
    {
      'id': 'abcdefghi',
      'type': 'function',
      'function': {'name': 'add', 'arguments': '{"a": 2}'},
    }
  ],
}
RESULT = {'role': 'tool', 'tool_call_id': 'abcdefghi', 'content': '4'}
TOOLS = [{'type': 'function', 'function': {'name': 'add', 'parameters': {}}}]

# What is trained is in brackets, and the last token is padding.
EXPECTED = {
  'smollm2': (
    '<|im_start|>system\nthe hat<|im_end|>\n<|im_start|>user\nWhat is 2+2?'
    '<|im_end|>\n<|im_start|>assistant\n⟦the cat: 4<|im_end|>⟧\n<|im_start|>'
    'user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n'
    '⟦the cat: 4<|im_end|>⟧<|im_end|>'
  ),
  'qwen': (
    '<|im_start|>system\nthe hat<|im_end|>\n<|im_start|>user\nWhat is 2+2?'
    '<|im_end|>\n<|im_start|>assistant\n⟦the cat: 4<|im_end|>⟧\n<|im_start|>'
    'user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n'
    '⟦the cat: 4<|im_end|>⟧<|endoftext|>'
  ),
  'llama3': (
    '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: DATE'
    '\n\nthe hat<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is'
    ' 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    '⟦the cat: 4<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nWhat is'
    ' 2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    '⟦the cat: 4<|eot_id|>⟧<|eot_id|>'
  ),
  'gemma': (
    '<bos><start_of_turn>user\nthe hat\n\nWhat is 2+2?<end_of_turn>\n'
    '<start_of_turn>model\n⟦the cat: 4<end_of_turn>⟧\n<start_of_turn>user\n'
    'What is 2+2?<end_of_turn>\n<start_of_turn>model\n'
    '⟦the cat: 4<end_of_turn>⟧<pad>'
  ),
  'mistral': (
    '<s>\n[INST] the hat\n\nWhat is 2+2? [/INST]⟦ the cat: 4</s>⟧[INST] What is'
    ' 2+2? [/INST]⟦ the cat: 4</s>⟧</s>'
  ),
  # No string of a special token, but a plain transcript. The stop string of a
  # server ends the first answer, and EOS the last one.
  'byte': (
    '<bos>System: the hat\n\nUser: What is 2+2?\n\nAssistant:⟦ the cat: 4\n\n'
    'User:⟧ What is 2+2?\n\nAssistant:⟦ the cat: 4<eos>⟧<pad>'
  ),
  'bpe': (
    '<|bos|>System: the hat\n\nUser: What is 2+2?\n\nAssistant:⟦ the cat: 4\n\n'
    'User:⟧ What is 2+2?\n\nAssistant:⟦ the cat: 4<|eos|>⟧<|pad|>'
  ),
}
ALL = (*chat_families.NAMES, *chat_families.OURS)


def _encoder(name, kind='chat', template=None) -> encoding.Encoder:
  source = chat_families.template(name) if template is None else template
  return encoding.Encoder(chat_families.load(name), source, kind)


def _document(name, *messages, template=None, **record) -> encoding.Document:
  encoder = _encoder(name, template=template)
  unit = encoder.unit({'messages': list(messages), **record}, 'a:1')
  assert unit.streams == {}
  (document,) = unit.documents
  audit.check(document, encoder.tokenizer)
  return document


def _shown(name, *messages, **fields) -> str:
  document = _document(name, *messages, **fields)
  return audit.render(document, chat_families.load(name))


def _starts(document: encoding.Document) -> list[int]:
  """Returns the first id of each trained span."""
  before = np.concatenate([[False], document.trained[:-1]])
  return np.nonzero(document.trained & ~before)[0].tolist()


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_the_mask_of_each_family(name):
  template = chat_families.template(name).replace(
    "strftime_now('%Y')", "'DATE'"
  )
  shown = _shown(name, SYSTEM, USER, ANSWER, USER, ANSWER, template=template)
  assert shown == EXPECTED[name]


def test_reasoning_and_calls_are_trained_and_results_are_not():
  shown = _shown('qwen', USER, CALL, RESULT, ANSWER, tools=TOOLS)
  head, *turns = shown.split('<|im_start|>')
  assert '⟦' not in ''.join([head, *turns[:2]])
  assert turns[2:] == [
    'assistant\n⟦<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "add",'
    ' "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧\n',
    'user\n<tool_response>\n4\n</tool_response><|im_end|>\n',
    'assistant\n⟦the cat: 4<|im_end|>⟧<|endoftext|>',
  ]


def test_without_marks_the_turns_with_calls_are_found_as_with_them():
  marked = chat_families.template('qwen')
  plain = marked.replace('{%- generation %}', '').replace(
    '{%- endgeneration %}', ''
  )
  assert plain != marked
  messages = USER, CALL, RESULT, ANSWER
  for fields in ({'tools': TOOLS}, {}):
    expected = _document('qwen', *messages, template=marked, **fields)
    found = _document('qwen', *messages, template=plain, **fields)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()


@pytest.mark.parametrize('name', ALL)
def test_ids_before_an_answer_are_those_of_a_server(name):
  tok, template = chat_families.load(name), chat_families.template(name)
  messages = [SYSTEM, USER, ANSWER, USER, ANSWER, USER, ANSWER]
  document = _document(name, *messages)
  starts = _starts(document)
  assert len(starts) == 3
  for start, i in zip(starts, (2, 4, 6), strict=True):
    served = chat_families.served_ids(tok, template, messages[:i])
    assert document.ids[:start].tolist() == served


@pytest.mark.parametrize('name', ['qwen', 'mistral'])
def test_ids_before_an_answer_with_tools_are_those_of_a_server(name):
  tok, template = chat_families.load(name), chat_families.template(name)
  messages = [USER, CALL, RESULT, ANSWER]
  tools = TOOLS if name != 'mistral' else None
  fields = {'tools': tools} if tools else {}
  document = _document(name, *messages, **fields)
  for start, i in zip(_starts(document), (1, 3), strict=True):
    served = chat_families.served_ids(tok, template, messages[:i], tools)
    assert document.ids[:start].tolist() == served


@pytest.mark.parametrize('name', ['qwen', 'llama3'])
def test_marks_are_those_of_transformers(name):
  transformers = pytest.importorskip(
    'transformers', reason='the reference implementation is not installed'
  )
  theirs = transformers.AutoTokenizer.from_pretrained(
    chat_families.directory(name)
  )
  messages = [SYSTEM, USER, ANSWER, USER, ANSWER]
  expected = theirs.apply_chat_template(
    messages, return_assistant_tokens_mask=True, return_dict=True
  )
  ids, trained = _document(name, *messages)
  length = len(ids) - 1
  assert ids[:-1].tolist() == expected['input_ids'][:length]
  assert trained[:-1].tolist() == expected['assistant_masks'][:length]
  # Behind the last stop token is no trained id.
  assert not any(expected['assistant_masks'][length:])


@pytest.mark.parametrize(
  ('name', 'file'),
  [
    ('qwen', 'qwen3'), ('llama3', 'llama3'), ('gemma', 'gemma'),
    ('gemma', 'gemma3'), ('qwen', 'qwen3_instruct_2507'),
  ],
)  # fmt: skip
def test_templates_of_models_and_their_marked_twins_of_trl(name, file):
  utils = pytest.importorskip(
    'trl.chat_template_utils', reason='the reference is not installed'
  )
  transformers = pytest.importorskip('transformers')
  folder = pathlib.Path(utils.__file__).parent / 'chat_templates'
  plain, marked = (
    (folder / f'{file}{twin}.jinja').read_text('utf-8')
    for twin in ('', '_training')
  )
  theirs = transformers.AutoTokenizer.from_pretrained(
    chat_families.directory(name)
  )
  # Qwen3 leaves out the reasoning of earlier turns, and its twin does not.
  messages = [USER, ANSWER] if file == 'qwen3' else [USER, ANSWER, USER, ANSWER]
  expected = theirs.apply_chat_template(
    messages, chat_template=marked, return_assistant_tokens_mask=True,
    return_dict=True,
  )  # fmt: skip
  stops = encoding.stop_ids(chat_families.load(name), plain)
  for template in (plain, marked):
    ids, trained = _document(name, *messages, template=template)
    length = len(ids) - 1
    assert ids[:-1].tolist() == expected['input_ids'][:length]
    mask = np.array(expected['assistant_masks'][:length], bool)
    # TRL trains the line end behind a stop token, too, which is never said.
    behind = np.concatenate([[False], np.isin(ids[: length - 1], stops)])
    assert trained[:-1].tolist() == (mask & ~behind).tolist()


def test_reasoning_that_a_template_leaves_out_of_earlier_turns():
  utils = pytest.importorskip(
    'trl.chat_template_utils', reason='the template is not installed'
  )
  thinks = ANSWER | {'reasoning_content': 'hm'}
  shown = _shown(
    'qwen', USER, thinks, USER, thinks, template=utils.qwen3_chat_template
  )
  assert shown.endswith(
    'assistant\n⟦the cat: 4<|im_end|>⟧\n<|im_start|>user\nWhat is 2+2?'
    '<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nthe cat: 4'
    '<|im_end|>⟧<|endoftext|>'
  )


# Stop tokens.

_TURN = '{% for m in messages %}<|im_start|>{{ m.role }}\n'
_ASK = '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'


@pytest.mark.parametrize(
  'marked',
  [
    # The mark ends before the stop token, behind it, and behind its line.
    '{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n',
    '{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\n',
    '{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}\n',
    # A turn in two marks.
    '{% generation %}{{ m.content[:3] }}{% endgeneration %}{% generation %}'
    '{{ m.content[3:] }}{% endgeneration %}<|im_end|>\n',
    # White space between the answer and the stop token.
    '{% generation %}{{ m.content }}{% endgeneration %}\n\n<|im_end|>\n\n',
  ],
)
def test_the_stop_token_is_trained_and_nothing_behind_it(marked):
  template = (
    f"{_TURN}{{% if m.role == 'assistant' %}}{marked}{{% else %}}"
    f'{{{{ m.content }}}}<|im_end|>\n{{% endif %}}{{% endfor %}}{_ASK}'
  )
  encoding.check(chat_families.load('smollm2'), template)
  shown = _shown('smollm2', USER, ANSWER, USER, ANSWER, template=template)
  assert shown.count('<|im_end|>⟧') == shown.count('⟦') == 2
  assert shown.endswith('<|im_end|>⟧<|im_end|>')  # EOS is the padding, too
  assert encoding.stop_ids(chat_families.load('smollm2'), template) == (
    chat_families.load('smollm2').eos_id,
  )


def test_a_second_stop_token_is_not_trained():
  # Phi 3 writes <|end|> behind each turn, and EOS behind the last one.
  shown = _shown('phi3', USER, ANSWER, USER, ANSWER)
  assert shown.count('<|end|>⟧') == shown.count('⟦') == 2
  assert '</s>' not in shown
  tok = chat_families.load('phi3')
  assert encoding.stop_ids(tok, chat_families.template('phi3')) == (
    tok.special_tokens['<|end|>'],
  )


def test_several_stop_tokens_in_a_turn():
  template = (
    f"{_TURN}{{% if m.role == 'assistant' %}}{{{{ m.reasoning_content }}}}"
    '<|im_end|>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}' + _ASK
  )
  thinks = ANSWER | {'reasoning_content': 'hm'}
  shown = _shown('qwen', USER, thinks, USER, thinks, template=template)
  assert shown.count('⟦hm<|im_end|>the cat: 4<|im_end|>⟧') == 2


def test_messages_behind_the_last_answer_are_cut():
  shown = _shown('smollm2', USER, ANSWER, USER)
  assert shown == _shown('smollm2', USER, ANSWER)


# What is trained.


@pytest.mark.parametrize('name', ALL)
def test_answers_of_weight_0_are_not_trained(name):
  messages = [USER, ANSWER, USER, ANSWER]
  both = _document(name, *messages)
  last = _document(name, USER, ANSWER | {'weight': 0}, USER, ANSWER)
  assert last.ids.tolist() == both.ids.tolist()
  start = _starts(both)[1]
  assert not last.trained[:start].any()
  assert last.trained[start:].tolist() == both.trained[start:].tolist()


@pytest.mark.parametrize('name', ALL)
def test_answers_of_a_prompt_are_not_trained(name):
  record = {'prompt': [USER, ANSWER, USER], 'completion': [ANSWER]}
  (document,) = _encoder(name).unit(record, 'a:1').documents
  expected = _document(name, USER, ANSWER | {'weight': 0}, USER, ANSWER)
  assert document.ids.tolist() == expected.ids.tolist()
  assert document.trained.tolist() == expected.trained.tolist()


def test_answers_of_a_prompt_where_a_turn_has_two_marks():
  template = (
    f"{_TURN}{{% if m.role == 'assistant' %}}{{% generation %}}a{{%"
    ' endgeneration %}-{% generation %}{{ m.content }}{% endgeneration %}'
    f'<|im_end|>{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}\n'
    f'{{% endfor %}}{_ASK}'
  )
  record = {'prompt': [USER, ANSWER, USER], 'completion': [ANSWER]}
  encoder = _encoder('qwen', template=template)
  (document,) = encoder.unit(record, 'a:1').documents
  shown = audit.render(document, encoder.tokenizer)
  assert shown.count('⟦') == 2
  assert shown.endswith('assistant\n⟦a⟧-⟦the cat: 4<|im_end|>⟧<|endoftext|>')
  audit.check(document, encoder.tokenizer)


@pytest.mark.parametrize('attack', hf_files.FORGED)
@pytest.mark.parametrize('name', chat_families.NAMES)
def test_messages_do_not_forge_turns(name, attack):
  tok = chat_families.load(name)
  special = set(tok.special_tokens.values()) - {
    tok.special_tokens.get(tok.names.get('unk_token', ''), -1)
  }

  def specials(text):
    said = {'role': 'assistant', 'content': f'a{text}b'}
    asked = {'role': 'user', 'content': f'{text} {text}'}
    document = _document(name, asked, said, asked, said)
    return [
      (i, is_trained)
      for i, is_trained in zip(*map(np.ndarray.tolist, document), strict=True)
      if i in special
    ]

  assert specials(attack) == specials('the cat')


@hypothesis.given(
  texts=st.lists(
    st.text(st.sampled_from('ab \n\u00e91<|im_end|>Ux:'), min_size=1).filter(
      str.strip
    ),
    min_size=4,
    max_size=4,
  ),
  name=st.sampled_from(ALL),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_is_asked_for_as_a_server_does(texts, name):
  tok, template = chat_families.load(name), chat_families.template(name)
  messages = [
    {'role': role, 'content': text}
    for role, text in zip(('user', 'assistant') * 2, texts, strict=True)
  ]
  document = _document(name, *messages)
  start = _starts(document)[0]
  served = chat_families.served_ids(tok, template, messages[:1])
  if name not in ('mistral', 'llama2'):
    assert document.ids[:start].tolist() == served
  # The whole says the answer, up to what the template trims.
  said = tok.decode(document.ids[document.trained].tolist())
  if name == 'smollm2':
    assert said == ''.join(texts[1::2])


def test_an_id_that_joins_prompt_and_answer_is_cut():
  # '\n' of the template and '\n' of the answer would be one id.
  tok = chat_families.load('smollm2')
  assert len(tok.encode('\n\n')) == 1
  answer = {'role': 'assistant', 'content': '\n\nthe cat'}
  document = _document('smollm2', USER, answer)
  (start,) = _starts(document)
  served = chat_families.served_ids(tok, chat_families.CHATML, [USER])
  assert document.ids[:start].tolist() == served
  said = document.ids[document.trained].tolist()
  assert tok.decode(said) == '\n\nthe cat'


# BOS.


@pytest.mark.parametrize('has_bos', [True, False])
def test_bos_of_a_transcript_is_that_of_the_model(has_bos):
  tok = chat_families.load('llama2')
  encoder = encoding.Encoder(tok, '', 'chat', has_bos=has_bos)
  (document,) = encoder.unit({'messages': [USER, ANSWER]}, 'a:1').documents
  (start,) = _starts(document)
  served = chat_families.served_ids(tok, '', [USER], has_bos=has_bos)
  assert document.ids[:start].tolist() == served
  assert bool(document.ids[0] == tok.bos_id) is has_bos
  audit.check(document, tok)


def test_bos_of_a_transcript_is_that_of_the_tokenizer_by_default():
  for name, expected in (('llama2', True), ('smollm2', False)):
    tok = chat_families.load(name)
    encoder = encoding.Encoder(tok, '', 'chat')
    (document,) = encoder.unit({'messages': [USER, ANSWER]}, 'a:1').documents
    assert bool(document.ids[0] == tok.bos_id) is expected


# Pairs and labels.


@pytest.mark.parametrize('name', ALL)
def test_a_pair_is_the_prompt_with_either_answer(name):
  other = {'role': 'assistant', 'content': 'a hat'}
  record = {'prompt': [USER], 'chosen': [ANSWER], 'rejected': [other]}
  unit = _encoder(name, 'pairs').unit(record, 'a:1')
  for document, said in zip(unit.documents, (ANSWER, other), strict=True):
    expected = _document(name, USER, said)
    assert document.ids.tolist() == expected.ids.tolist()
    assert document.trained.tolist() == expected.trained.tolist()
  assert unit.streams == {}
  unit = _encoder(name, 'pairs').unit(record | {'margin': 0.5}, 'a:1')
  assert unit.streams == {'margins': (0.5, 0.5)}


def test_only_the_answers_of_a_pair_are_trained():
  start = [USER, ANSWER, USER]
  record = {
    'chosen': [*start, CALL, RESULT, ANSWER],
    'rejected': [*start, ANSWER],
    'tools': TOOLS,
  }
  unit = _encoder('qwen', 'pairs').unit(record, 'a:1')
  spans = [len(_starts(document)) for document in unit.documents]
  assert spans == [2, 1]


def test_a_labelled_example_and_its_mismatched_twin():
  record = {'prompt': 'the mat', 'completion': 'the bat', 'label': False}
  other = {'messages': [USER, ANSWER], 'label': True}
  encoder = _encoder('smollm2', 'labelled')
  unit = encoder.unit(record, 'a:1', other)
  assert unit.streams == {'labels': (-1.0, 0.0)}
  asked = {'role': 'user', 'content': 'the mat'}
  for document, said in zip(
    unit.documents,
    ({'role': 'assistant', 'content': 'the bat'}, ANSWER),
    strict=True,
  ):
    expected = _document('smollm2', asked, said)
    assert document.ids.tolist() == expected.ids.tolist()
    assert document.trained.tolist() == expected.trained.tolist()
  assert encoder.unit(other, 'a:2', record).streams == {'labels': (1.0, 0.0)}
  with pytest.raises(ValueError, match='^a:1, next record: got a record with'):
    encoder.unit(record, 'a:1', {'x': 1})


# What is left out, and what is refused.


@pytest.mark.parametrize(
  ('messages', 'reason'),
  [
    ([USER], encoding.NO_ANSWER),
    ([SYSTEM, USER], encoding.NO_ANSWER),
    ([USER, ANSWER | {'weight': 0}], encoding.NO_ANSWER),
    ([USER, ANSWER | {'content': ' \n'}], encoding.EMPTY_ANSWER),
    ([USER, ANSWER | {'content': None}], encoding.EMPTY_ANSWER),
    ([USER, ANSWER | {'content': ''}, USER, ANSWER], encoding.EMPTY_ANSWER),
  ],
)
def test_a_record_that_teaches_nothing_is_left_out(messages, reason):
  with pytest.raises(encoding.Empty) as error:
    _encoder('smollm2').unit({'messages': messages}, 'a:1')
  assert str(error.value) == reason


def test_a_pair_that_teaches_nothing_is_left_out():
  encoder = _encoder('smollm2', 'pairs')
  for answers, reason in (
    (('x', 'x'), encoding.SAME_ANSWERS),
    (('x', ''), encoding.EMPTY_ANSWER),
    (('', 'x'), encoding.EMPTY_ANSWER),
  ):
    record = {'prompt': 'p', 'chosen': answers[0], 'rejected': answers[1]}
    with pytest.raises(encoding.Empty) as error:
      encoder.unit(record, 'a:1')
    assert str(error.value) == reason


def test_what_a_template_refuses_names_the_record():
  template = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    f'{{% endif %}}{chat_families.CHATML}'
  )
  encoder = _encoder('smollm2', template=template)
  with pytest.raises(
    ValueError, match=r'^b\.jsonl:7: chat template: no system'
  ):
    encoder.unit({'messages': [SYSTEM, USER, ANSWER]}, 'b.jsonl:7')


def test_what_a_template_would_leave_out_is_refused():
  record = {'messages': [USER, ANSWER], 'tools': TOOLS}
  with pytest.raises(ValueError, match='a:1: got tools, expected none'):
    _encoder('smollm2').unit(record, 'a:1')
  record = {'messages': [USER, CALL, RESULT, ANSWER]}
  with pytest.raises(ValueError, match='a:1: got message 1 of role assistant'):
    _encoder('gemma').unit(record, 'a:1')


def test_a_template_that_moves_tools_is_refused_for_earlier_answers():
  # In the style of Mistral v3: tools are in front of the last question.
  template = (
    "{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)"
    ' | length %}{{ bos_token }}{% set ns = namespace(n=0) %}'
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
    '{% if ns.n == last and tools %}{{ tools | tojson }}{% endif %}'
    '[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}'
    '{% endif %}{% endfor %}'
  )
  encoding.check(chat_families.load('mistral'), template)
  fields = {'template': template, 'tools': TOOLS}
  assert '⟦the cat: 4</s>⟧' in _shown('mistral', USER, ANSWER, **fields)
  with pytest.raises(
    ValueError, match='message 1 is not the start .* weight 0'
  ):
    _document('mistral', USER, ANSWER, USER, ANSWER, **fields)
  unsaid = ANSWER | {'weight': 0}
  shown = _shown('mistral', USER, unsaid, USER, ANSWER, **fields)
  assert shown.count('⟦') == 1


@pytest.mark.parametrize(
  ('template', 'error'),
  [
    ('{{ messages[0].content }}', 'leaves out the text of an answer'),
    (
      '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}',
      r'got .* behind an answer, expected a special token.*eos_token',
    ),
    (
      '{% for m in messages %}{{ m.content }}<|im_end|>{% generation %}'
      '{% endgeneration %}{% endfor %}',
      'no mark of the answer in message 1',
    ),
    (
      '{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}'
      '{{ m.content }}<|im_end|>{% endfor %}',
      'expected a stop token',
    ),
    (
      '{% if add_generation_prompt %}{{ 1 }}{% endif %}{% for m in messages %}'
      '{{ m.content }}<|im_end|>{% endfor %}',
      'is not the start of the whole',
    ),
    ('{% for m in', 'chat template line 1'),
    ("{{ raise_exception('never') }}", 'chat template: never'),
  ],
)
def test_templates_that_are_refused_at_start(template, error):
  with pytest.raises(ValueError, match=error):
    encoding.check(chat_families.load('smollm2'), template)


@pytest.mark.parametrize('name', ALL)
def test_templates_that_are_not_refused(name):
  encoding.check(chat_families.load(name), chat_families.template(name))


def test_a_template_of_text_has_one_answer():
  template = '{% for m in messages %}<{{ m.content }}>\n{% endfor %}'
  tok = tokenizer.ByteTokenizer()
  encoding.check(tok, template)
  encoder = encoding.Encoder(tok, template, 'chat')
  (document,) = encoder.unit({'messages': [USER, ANSWER]}, 'a:1').documents
  assert audit.render(document, tok) == (
    '<bos><What is 2+2?>\n⟦<the cat: 4<eos>⟧<pad>'
  )
  audit.check(document, tok)
  messages = [USER, ANSWER, USER, ANSWER]
  with pytest.raises(ValueError, match='expected one answer, at the end'):
    encoder.unit({'messages': messages}, 'a:1')
  messages[1] = ANSWER | {'weight': 0}
  (document,) = encoder.unit({'messages': messages}, 'a:1').documents
  assert audit.render(document, tok).count('⟦') == 1


def test_marks_of_a_template_of_text():
  template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}"
    '{{ m.content }}{% endgeneration %}{% else %}Q:{{ m.content }}\n{% endif %}'
    '{% endfor %}'
  )
  tok = tokenizer.ByteTokenizer()
  encoding.check(tok, template)
  (document,) = (
    encoding.Encoder(tok, template, 'chat')
    .unit({'messages': [USER, ANSWER]}, 'a:1')
    .documents
  )
  assert audit.render(document, tok) == (
    '<bos>Q:What is 2+2?\nA:⟦the cat: 4<eos>⟧<pad>'
  )


# The encoder as a value.


@pytest.mark.parametrize('name', ALL)
def test_an_encoder_can_be_pickled(name):
  encoder = _encoder(name)
  record = {'messages': [USER, ANSWER]}
  before = encoder.unit(record, 'a:1').documents[0]
  copy = pickle.loads(pickle.dumps(encoder))
  after = copy.unit(record, 'a:1').documents[0]
  assert after.ids.tolist() == before.ids.tolist()
  assert copy.digest() == encoder.digest()


def test_the_digest_is_of_all_that_documents_depend_on():
  tok = chat_families.load('byte')
  digests = {
    encoding.Encoder(tok, *fields).digest()
    for fields in (
      ('', 'chat'),
      ('', 'pairs'),
      (chat.DEFAULT_TEMPLATE + ' ', 'chat'),
      ('', 'chat', False),
    )
  }
  assert len(digests) == 4
  other = encoding.Encoder(chat_families.load('bpe'), '', 'chat')
  assert other.digest() in digests  # the tokenizer has a digest of its own


def test_documents_have_the_types_of_a_store():
  ids, trained = _document('smollm2', USER, ANSWER)
  assert (ids.dtype, trained.dtype) == (np.int64, np.bool_)
  assert ids.shape == trained.shape


def test_an_unknown_kind_of_examples():
  with pytest.raises(ValueError, match=r"data\.examples: got 'chats'"):
    _encoder('smollm2', 'chats')
