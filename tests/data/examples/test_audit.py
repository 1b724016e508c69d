"""The audit shows what is trained, and fails where a mask is wrong."""

import sys

import numpy as np
import pytest

from data.examples import audit, encoding
from tests.helpers.open_weights import chat_families
from text import tokenizer

TOK = tokenizer.ByteTokenizer()
BOS, EOS, PAD = TOK.bos_id, TOK.eos_id, TOK.pad_id


def _document(*parts) -> encoding.Document:
  """Returns the document of ids and texts; those in lists are trained."""
  ids, trained = [], []
  for part in parts:
    is_trained = isinstance(part, list)
    for each in part if is_trained else [part]:
      new = TOK.encode(each) if isinstance(each, str) else [each]
      ids += new
      trained += [is_trained] * len(new)
  return encoding.Document(np.array(ids), np.array(trained, bool))


GOOD = _document(BOS, 'Hi', ['yes', EOS], PAD)


def test_brackets_away_from_a_terminal():
  assert audit.render(GOOD, TOK) == '<bos>Hi⟦yes<eos>⟧<pad>'
  audit.check(GOOD, TOK)


def test_colour_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
  assert audit.render(GOOD, TOK) == ('<bos>Hi\033[1;32myes<eos>\033[0m<pad>')


def test_text_of_a_message_does_not_look_trained_or_move_the_cursor():
  document = _document(BOS, 'a\033[1;32mb⟦c⟧\r', ['yes', EOS], PAD)
  shown = audit.render(document, TOK)
  assert '\033' not in shown
  assert '\r' not in shown
  assert shown.count('⟦') == shown.count('⟧') == 1


def test_a_special_token_is_told_from_its_string_in_a_message():
  document = _document(BOS, 'a<eos>b', ['c', EOS], PAD)
  assert audit.render(document, TOK) == '<bos>a\\x3ceos>b⟦c<eos>⟧<pad>'
  user = {'role': 'user', 'content': 'x<|im_end|>'}
  shown = chat_families.shown_of('qwen', user, chat_families.ANSWER)
  assert 'x\\x3c|im_end|><|im_end|>' in shown


def test_a_character_of_which_one_byte_is_trained():
  document = _document(BOS, 0xC3, [0xA9, EOS], PAD)
  assert audit.render(document, TOK) == '<bos>\ufffd⟦\ufffd<eos>⟧<pad>'


@pytest.mark.parametrize(
  ('document', 'error'),
  [
    (_document(BOS, 'Hi', 'yes', EOS, PAD), '0 trained ones'),
    (_document(BOS, 'Hi', ['yes'], EOS, PAD), "ends with 'yes'"),
    (_document(BOS, 'Hi', ['yes'], PAD), "ends with 'yes'"),
    (_document(BOS, ['a'], EOS, 'Hi', ['yes', EOS], PAD), "ends with 'a'"),
    (_document(BOS, BOS, 'Hi', ['yes', EOS], PAD), r'BOS at \[0, 1\]'),
    (_document('Hi', BOS, ['yes', EOS], PAD), r'BOS at \[2\]'),
    (_document(BOS, 'a', BOS, ['yes', EOS], PAD), r'BOS at \[0, 2\]'),
    (_document([BOS, 'Hi', EOS], PAD), 'at its start or end'),
    (_document(BOS, 'Hi', ['yes', EOS]), 'at its start or end'),
  ],
)
def test_a_wrong_mask_fails(document, error):
  with pytest.raises(ValueError, match=error):
    audit.check(document, TOK)


def test_an_end_by_a_stop_string_and_a_turn_in_parts():
  audit.check(_document(BOS, ['yes\n\nUser:'], 'Hi', ['no', EOS], PAD), TOK)
  audit.check(_document(BOS, 'Hi', ['hm'], '-', ['yes', EOS], PAD), TOK)


def test_bos_that_opens_each_turn_is_not_doubled():
  tok = chat_families.load('smollm2')
  encoder = encoding.Encoder(tok, chat_families.CHATML, 'chat')
  messages = [
    {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'yes'}
  ]  # fmt: skip
  (good,) = encoder.unit({'messages': messages * 2}, 'a:1').documents
  assert np.sum(good.ids == tok.bos_id) == 5
  audit.check(good, tok)
  doubled = encoding.Document(
    np.concatenate([[tok.bos_id], good.ids]),
    np.concatenate([[False], good.trained]),
  )
  with pytest.raises(ValueError, match=r'BOS at \[0, 1, '):
    audit.check(doubled, tok)
