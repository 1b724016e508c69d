"""Documents: their ids are those of a server, and their masks are exact."""

import pickle

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from data.examples import audit, encoding
from tests.helpers.open_weights import chat_families, hf_files
from text import chat

ANSWER = chat_families.ANSWER
CALL = chat_families.CALL
RESULT = chat_families.RESULT
SYSTEM = chat_families.SYSTEM
TOOLS = chat_families.TOOLS
USER = chat_families.USER


@pytest.mark.parametrize('name', chat_families.ALL)
def test_ids_before_an_answer_are_those_of_a_server(name):
  tok, template = chat_families.load(name), chat_families.template_of(name)
  messages = [SYSTEM, USER, ANSWER, USER, ANSWER, USER, ANSWER]
  document = chat_families.document_of(name, *messages)
  starts = chat_families.starts_of(document)
  assert len(starts) == 3
  for start, i in zip(starts, (2, 4, 6), strict=True):
    served = chat_families.served_ids(tok, template, messages[:i])
    assert document.ids[:start].tolist() == served


@pytest.mark.parametrize('name', ['qwen', 'mistral'])
def test_ids_before_an_answer_with_tools_are_those_of_a_server(name):
  tok, template = chat_families.load(name), chat_families.template_of(name)
  messages = [USER, CALL, RESULT, ANSWER]
  tools = TOOLS if name != 'mistral' else None
  fields = {'tools': tools} if tools else {}
  document = chat_families.document_of(name, *messages, **fields)
  for start, i in zip(chat_families.starts_of(document), (1, 3), strict=True):
    served = chat_families.served_ids(tok, template, messages[:i], tools)
    assert document.ids[:start].tolist() == served


# What is trained.


@pytest.mark.parametrize('name', chat_families.ALL)
def test_answers_of_weight_0_are_not_trained(name):
  messages = [USER, ANSWER, USER, ANSWER]
  both = chat_families.document_of(name, *messages)
  last = chat_families.document_of(
    name, USER, ANSWER | {'weight': 0}, USER, ANSWER
  )
  assert last.ids.tolist() == both.ids.tolist()
  start = chat_families.starts_of(both)[1]
  assert not last.trained[:start].any()
  assert last.trained[start:].tolist() == both.trained[start:].tolist()


@pytest.mark.parametrize('name', chat_families.ALL)
def test_answers_of_a_prompt_are_not_trained(name):
  record = {'prompt': [USER, ANSWER, USER], 'completion': [ANSWER]}
  (document,) = chat_families.encoder_of(name).unit(record, 'a:1').documents
  expected = chat_families.document_of(
    name, USER, ANSWER | {'weight': 0}, USER, ANSWER
  )
  assert document.ids.tolist() == expected.ids.tolist()
  assert document.trained.tolist() == expected.trained.tolist()


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
    document = chat_families.document_of(name, asked, said, asked, said)
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
  name=st.sampled_from(chat_families.ALL),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_is_asked_for_as_a_server_does(texts, name):
  tok, template = chat_families.load(name), chat_families.template_of(name)
  messages = [
    {'role': role, 'content': text}
    for role, text in zip(('user', 'assistant') * 2, texts, strict=True)
  ]
  document = chat_families.document_of(name, *messages)
  start = chat_families.starts_of(document)[0]
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
  document = chat_families.document_of('smollm2', USER, answer)
  (start,) = chat_families.starts_of(document)
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
  (start,) = chat_families.starts_of(document)
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


@pytest.mark.parametrize('name', chat_families.ALL)
def test_a_pair_is_the_prompt_with_either_answer(name):
  other = {'role': 'assistant', 'content': 'a hat'}
  record = {'prompt': [USER], 'chosen': [ANSWER], 'rejected': [other]}
  unit = chat_families.encoder_of(name, 'pairs').unit(record, 'a:1')
  for document, said in zip(unit.documents, (ANSWER, other), strict=True):
    expected = chat_families.document_of(name, USER, said)
    assert document.ids.tolist() == expected.ids.tolist()
    assert document.trained.tolist() == expected.trained.tolist()
  assert unit.streams == {}
  unit = chat_families.encoder_of(name, 'pairs').unit(
    record | {'margin': 0.5}, 'a:1'
  )
  assert unit.streams == {'margins': (0.5, 0.5)}


def test_only_the_answers_of_a_pair_are_trained():
  start = [USER, ANSWER, USER]
  record = {
    'chosen': [*start, CALL, RESULT, ANSWER],
    'rejected': [*start, ANSWER],
    'tools': TOOLS,
  }
  unit = chat_families.encoder_of('qwen', 'pairs').unit(record, 'a:1')
  spans = [
    len(chat_families.starts_of(document)) for document in unit.documents
  ]
  assert spans == [2, 1]


def test_a_labelled_example_and_its_mismatched_twin():
  record = {'prompt': 'the mat', 'completion': 'the bat', 'label': False}
  other = {'messages': [USER, ANSWER], 'label': True}
  encoder = chat_families.encoder_of('smollm2', 'labelled')
  unit = encoder.unit(record, 'a:1', other)
  assert unit.streams == {'labels': (-1.0, 0.0)}
  asked = {'role': 'user', 'content': 'the mat'}
  for document, said in zip(
    unit.documents,
    ({'role': 'assistant', 'content': 'the bat'}, ANSWER),
    strict=True,
  ):
    expected = chat_families.document_of('smollm2', asked, said)
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
    chat_families.encoder_of('smollm2').unit({'messages': messages}, 'a:1')
  assert str(error.value) == reason


def test_a_pair_that_teaches_nothing_is_left_out():
  encoder = chat_families.encoder_of('smollm2', 'pairs')
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
  encoder = chat_families.encoder_of('smollm2', template=template)
  with pytest.raises(
    ValueError, match=r'^b\.jsonl:7: chat template: no system'
  ):
    encoder.unit({'messages': [SYSTEM, USER, ANSWER]}, 'b.jsonl:7')


def test_what_a_template_would_leave_out_is_refused():
  record = {'messages': [USER, ANSWER], 'tools': TOOLS}
  with pytest.raises(ValueError, match='a:1: got tools, expected none'):
    chat_families.encoder_of('smollm2').unit(record, 'a:1')
  record = {'messages': [USER, CALL, RESULT, ANSWER]}
  with pytest.raises(ValueError, match='a:1: got message 1 of role assistant'):
    chat_families.encoder_of('gemma').unit(record, 'a:1')


# The encoder as a value.


@pytest.mark.parametrize('name', chat_families.ALL)
def test_an_encoder_can_be_pickled(name):
  encoder = chat_families.encoder_of(name)
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
  ids, trained = chat_families.document_of('smollm2', USER, ANSWER)
  assert (ids.dtype, trained.dtype) == (np.int64, np.bool_)
  assert ids.shape == trained.shape


def test_an_unknown_kind_of_examples():
  with pytest.raises(ValueError, match=r"data\.examples: got 'chats'"):
    chat_families.encoder_of('smollm2', 'chats')
