"""Calls under a grammar: whatever is sampled, a parser reads valid calls."""

import json

import jsonschema
import numpy as np
import pytest

from inference.constraints import calls, constraint as constraint_lib, grammars
from text import tokenizer as tokenizer_lib
from text.replies import events, formats, parser

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')

_SCHEMA = {
  'type': 'object',
  'properties': {
    'city': {'enum': ['K\u00f6ln', 'a "b"']},
    'days': {'type': 'array', 'items': {'type': 'boolean'}, 'maxItems': 2},
  },
  'required': ['city'],
  'additionalProperties': False,
}
_TOOLS = [
  calls.Tool(name='weather', parameters=_SCHEMA),
  calls.Tool(name='now', parameters=None),
]


class _Marked(tokenizer_lib.ByteTokenizer):
  """Bytes, and the markers of all formats as special tokens."""

  def __init__(self):
    super().__init__()
    found = [m for each in formats.CALLS.values() for m in each.markers]
    first = super().vocab_size
    self._marked = {m: first + i for i, m in enumerate(dict.fromkeys(found))}

  @property
  def vocab_size(self):
    return super().vocab_size + len(self._marked)

  @property
  def special_tokens(self):
    return {**super().special_tokens, **self._marked}

  def token_bytes(self, token_id):
    if token_id >= super().vocab_size:
      return b''
    return super().token_bytes(token_id)


_TOKENIZERS = {
  'strings': tokenizer_lib.ByteTokenizer(),
  'special': _Marked(),
}


def _sampled(tokenizer, constraint, seed, most=400):
  """Returns ids drawn from the masks alone; None: too long."""
  matcher = grammars.Grammars(tokenizer).compile(constraint).matcher()
  rng, ids = np.random.default_rng(seed), []
  marked = set(getattr(tokenizer, '_marked', {}).values())
  for _ in range(most):
    bits_W = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    matcher.fill(bits_W)
    assert not matcher.failure
    allowed = [
      i for i in range(tokenizer.vocab_size) if bits_W[i >> 5] >> (i & 31) & 1
    ]
    # Ends and markers come soon; text and white space are not endless.
    wanted = [i for i in allowed if i in marked or i == tokenizer.eos_id]
    wanted += [i for i in allowed if i < 256 and chr(i) in '"}]<[;,'] * 2
    token = int(
      rng.choice(wanted if wanted and rng.random() < 0.7 else allowed)
    )
    if token == tokenizer.eos_id:
      return ids
    ids.append(token)
    matcher.push(token)
  return None


def _reply(tokenizer, call_format, ids, is_single=False):
  style = parser.Style(calls=formats.CALLS[call_format], reasoning=None)
  found = style.markers(tokenizer.special_tokens)
  read = parser.Parser(
    style, found, tools={'weather': {}, 'now': {}}, is_single=is_single
  )
  reply = events.Reply()
  text = bytearray()
  pieces = []
  for token in ids:
    if token in found.by_id:
      pieces += [text.decode(errors='replace'), found.by_id[token]]
      text = bytearray()
    else:
      text += tokenizer.token_bytes(token)
  pieces.append(text.decode(errors='replace'))
  for piece in pieces:
    for event in read.push(piece):
      reply.add(event)
  for event in read.finish('stop'):
    reply.add(event)
  return reply


def _check(reply):
  for call in reply.calls:
    arguments = json.loads(call.arguments)
    assert isinstance(arguments, dict)
    if call.name == 'weather':
      jsonschema.validate(arguments, _SCHEMA)


@pytest.mark.parametrize('which', _TOKENIZERS)
@pytest.mark.parametrize('call_format', calls.FORMATS)
def test_a_forced_answer_is_calls_and_nothing_else(call_format, which):
  tokenizer, num = _TOKENIZERS[which], 0
  for is_single in (False, True):
    constraint = calls.calls(
      call_format, _TOOLS, is_forced=True, is_single=is_single
    )
    for seed in range(6):
      ids = _sampled(tokenizer, constraint, seed)
      if ids is None:
        continue
      reply = _reply(tokenizer, call_format, ids)
      assert len(reply.calls) == 1 if is_single else reply.calls
      assert not reply.text.strip()
      assert reply.finish_reason == 'tool_calls'
      _check(reply)
      num += 1
  assert num >= 6


@pytest.mark.parametrize('which', _TOKENIZERS)
@pytest.mark.parametrize('call_format', calls.FORMATS)
def test_free_text_may_hold_calls_and_these_are_valid(call_format, which):
  """A marker opens a call that is whole, so no broken call becomes text."""
  tokenizer = _TOKENIZERS[which]
  constraint = calls.calls(
    call_format, _TOOLS, is_forced=False, is_single=False
  )
  begin = formats.CALLS[call_format].begin
  special = tokenizer.special_tokens.get(begin)
  num_texts = num_calls = 0
  for seed in range(6):
    ids = _sampled(tokenizer, constraint, seed)
    if ids is None:
      continue
    reply = _reply(tokenizer, call_format, ids)
    _check(reply)
    num_calls += len(reply.calls)
    num_texts += not reply.calls
    if special in ids:
      assert reply.calls
  assert num_texts + num_calls


def _accepts(constraint, text, tokenizer=_TOKENIZERS['strings']):
  matcher = grammars.Grammars(tokenizer).compile(constraint).matcher()
  for token in tokenizer.encode(text):
    matcher.push(token)
  if matcher.failure:
    return False
  bits_W = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
  matcher.fill(bits_W)
  eos = tokenizer.eos_id
  return bool(bits_W[eos >> 5] >> (eos & 31) & 1)


def test_the_texts_of_an_answer_that_may_call():
  call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
  free = calls.calls('hermes', _TOOLS, is_forced=False, is_single=False)
  for text in ('', 'hi', 'hi ' + call, f'{call}\n{call} bye', '<tool', '{"a'):
    assert _accepts(free, text), text
  bad = call.replace('now', 'other')
  for text in (bad, call[:-1], '<tool_call>', call.replace('{}', '[]')):
    assert not _accepts(free, text), text
  single = calls.calls('hermes', _TOOLS, is_forced=False, is_single=True)
  assert _accepts(single, 'hi ' + call)
  assert not _accepts(single, call + call)
  answer = constraint_lib.json_schema({'type': 'null'})
  either = calls.calls(
    'hermes', _TOOLS, is_forced=False, is_single=False, answer=answer
  )
  assert _accepts(either, 'null')
  assert _accepts(either, call)
  assert not _accepts(either, 'hi')
  bare = calls.calls('llama3', _TOOLS, is_forced=False, is_single=False)
  assert _accepts(bare, 'hi {"a')
  assert _accepts(bare, '{"name": "now", "parameters": {}}')
  assert not _accepts(bare, '{"name": "x"')


def test_calls_that_are_not_json_are_refused():
  for call_format in ('gemma', 'gemma4', 'xml'):
    with pytest.raises(constraint_lib.ConstraintError, match=call_format):
      calls.calls(call_format, _TOOLS, is_forced=True, is_single=True)


def test_a_name_with_any_characters_is_one_string():
  tool = calls.Tool(name='a"b\\\u65e5\U0001f600', parameters=None)
  for call_format in ('hermes', 'mistral', 'llama3'):
    constraint = calls.calls(
      call_format, [tool], is_forced=True, is_single=True
    )
    grammars.Grammars(_TOKENIZERS['strings']).compile(constraint)
