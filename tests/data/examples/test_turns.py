"""Masks: for each family of templates, exactly the assistant is trained."""

import pathlib

import numpy as np
import pytest

from data.examples import audit, encoding
from tests.helpers.open_weights import chat_families
from text import tokenizer

ANSWER = chat_families.ANSWER
CALL = chat_families.CALL
RESULT = chat_families.RESULT
SYSTEM = chat_families.SYSTEM
TOOLS = chat_families.TOOLS
USER = chat_families.USER

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


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_the_mask_of_each_family(name):
  template = chat_families.template_of(name).replace(
    "strftime_now('%Y')", "'DATE'"
  )
  shown = chat_families.shown_of(
    name, SYSTEM, USER, ANSWER, USER, ANSWER, template=template
  )
  assert shown == EXPECTED[name]


def test_reasoning_and_calls_are_trained_and_results_are_not():
  shown = chat_families.shown_of(
    'qwen', USER, CALL, RESULT, ANSWER, tools=TOOLS
  )
  head, *turns = shown.split('<|im_start|>')
  assert '⟦' not in ''.join([head, *turns[:2]])
  assert turns[2:] == [
    'assistant\n⟦<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "add",'
    ' "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧\n',
    'user\n<tool_response>\n4\n</tool_response><|im_end|>\n',
    'assistant\n⟦the cat: 4<|im_end|>⟧<|endoftext|>',
  ]


def test_without_marks_the_turns_with_calls_are_found_as_with_them():
  marked = chat_families.template_of('qwen')
  plain = marked.replace('{%- generation %}', '').replace(
    '{%- endgeneration %}', ''
  )
  assert plain != marked
  messages = USER, CALL, RESULT, ANSWER
  for fields in ({'tools': TOOLS}, {}):
    expected = chat_families.document_of(
      'qwen', *messages, template=marked, **fields
    )
    found = chat_families.document_of(
      'qwen', *messages, template=plain, **fields
    )
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()


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
  ids, trained = chat_families.document_of(name, *messages)
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
    ids, trained = chat_families.document_of(name, *messages, template=template)
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
  shown = chat_families.shown_of(
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
    # The stop token has a mark of its own.
    '{% generation %}{{ m.content }}{% endgeneration %}{% generation %}'
    '<|im_end|>\n{% endgeneration %}',
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
  shown = chat_families.shown_of(
    'smollm2', USER, ANSWER, USER, ANSWER, template=template
  )
  assert shown.count('<|im_end|>⟧') == shown.count('⟦') == 2
  assert shown.endswith('<|im_end|>⟧<|im_end|>')  # EOS is the padding, too
  assert encoding.stop_ids(chat_families.load('smollm2'), template) == (
    chat_families.load('smollm2').eos_id,
  )


def test_a_second_stop_token_is_not_trained():
  # Phi 3 writes <|end|> behind each turn, and EOS behind the last one.
  shown = chat_families.shown_of('phi3', USER, ANSWER, USER, ANSWER)
  assert shown.count('<|end|>⟧') == shown.count('⟦') == 2
  assert '</s>' not in shown
  tok = chat_families.load('phi3')
  assert encoding.stop_ids(tok, chat_families.template_of('phi3')) == (
    tok.special_tokens['<|end|>'],
  )


def test_several_stop_tokens_in_a_turn():
  template = (
    f"{_TURN}{{% if m.role == 'assistant' %}}{{{{ m.reasoning_content }}}}"
    '<|im_end|>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}' + _ASK
  )
  thinks = ANSWER | {'reasoning_content': 'hm'}
  shown = chat_families.shown_of(
    'qwen', USER, thinks, USER, thinks, template=template
  )
  assert shown.count('⟦hm<|im_end|>the cat: 4<|im_end|>⟧') == 2


def test_an_end_that_differs_when_messages_follow_is_refused():
  # In the style of gpt-oss: <|endoftext|> ends the last turn only. The stop
  # token that follows the first answer is then the end of another turn.
  template = (
    f"{_TURN}{{{{ m.content }}}}{{% if m.role == 'assistant' and loop.last %}}"
    '<|endoftext|>{% else %}-{% endif %}{% endfor %}' + _ASK
  )
  shown = chat_families.shown_of('qwen', USER, ANSWER, template=template)
  assert shown.endswith('⟦the cat: 4<|endoftext|>⟧<|endoftext|>')
  with pytest.raises(
    ValueError, match='a:1: .* end of the answer in message 1'
  ):
    chat_families.document_of(
      'qwen', USER, ANSWER, USER, ANSWER, template=template
    )


def test_messages_behind_the_last_answer_are_cut():
  shown = chat_families.shown_of('smollm2', USER, ANSWER, USER)
  assert shown == chat_families.shown_of('smollm2', USER, ANSWER)


def test_answers_of_a_prompt_where_a_turn_has_two_marks():
  template = (
    f"{_TURN}{{% if m.role == 'assistant' %}}{{% generation %}}a{{%"
    ' endgeneration %}-{% generation %}{{ m.content }}{% endgeneration %}'
    f'<|im_end|>{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}\n'
    f'{{% endfor %}}{_ASK}'
  )
  record = {'prompt': [USER, ANSWER, USER], 'completion': [ANSWER]}
  encoder = chat_families.encoder_of('qwen', template=template)
  (document,) = encoder.unit(record, 'a:1').documents
  shown = audit.render(document, encoder.tokenizer)
  assert shown.count('⟦') == 2
  assert shown.endswith('assistant\n⟦a⟧-⟦the cat: 4<|im_end|>⟧<|endoftext|>')
  audit.check(document, encoder.tokenizer)


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
  assert '⟦the cat: 4</s>⟧' in chat_families.shown_of(
    'mistral', USER, ANSWER, **fields
  )
  with pytest.raises(
    ValueError, match='message 1 is not the start .* weight 0'
  ):
    chat_families.document_of('mistral', USER, ANSWER, USER, ANSWER, **fields)
  unsaid = ANSWER | {'weight': 0}
  shown = chat_families.shown_of(
    'mistral', USER, unsaid, USER, ANSWER, **fields
  )
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


@pytest.mark.parametrize('name', chat_families.ALL)
def test_templates_that_are_not_refused(name):
  encoding.check(chat_families.load(name), chat_families.template_of(name))


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
