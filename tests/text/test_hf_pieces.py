"""Decoders: token by token, the text equals that of the library."""

import json

import hypothesis
from hypothesis import strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models

from text import hf_pieces, utf8

TOKENS = (
  'a', '\u2581', '\u2581a', '\u2581\u2581', 'a\u2581b', '\u00e9', '\u0120',
  '\u0120a', '\u010a', '##', '##ing', ' .', " n't", " '", '\u65e5', '<0x41>',
  '<0xZZ>', 'x\u00e9 y', '</w>',
)  # fmt: skip
DECODERS = {
  'none': None,
  'byte_level': decoders.ByteLevel(),
  'metaspace': decoders.Metaspace(),
  'metaspace_first': decoders.Metaspace(prepend_scheme='first'),
  'metaspace_never': decoders.Metaspace(prepend_scheme='never'),
  'word_piece': decoders.WordPiece(),
  'word_piece_dirty': decoders.WordPiece(prefix='##', cleanup=False),
  'llama': decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  ),
  'strip_each': decoders.Sequence(
    [decoders.Replace('\u2581', ' '), decoders.Strip(' ', 1, 0)]
  ),
  'late_replace': decoders.Sequence(
    [decoders.Fuse(), decoders.Replace('\u2581', ' ')]
  ),
  'nested': decoders.Sequence(
    [decoders.Sequence([decoders.ByteFallback()]), decoders.Metaspace()]
  ),
}


def _entry(decoder):
  """Returns the decoder's entry in `tokenizer.json`, and its function."""
  model = tokenizers.Tokenizer(
    models.WordLevel({t: i for i, t in enumerate(TOKENS)}, 'a')
  )
  if decoder is None:
    return None, model.decode
  model.decoder = decoder
  return json.loads(model.to_str())['decoder'], model.decode


@pytest.mark.parametrize('name', sorted(DECODERS))
@hypothesis.given(
  ids=st.lists(st.integers(0, len(TOKENS) - 1), min_size=1, max_size=6)
)
@hypothesis.settings(deadline=None)
def test_a_sequence_as_the_library_decodes_it(name, ids):
  entry, decode = _entry(DECODERS[name])
  pieces = hf_pieces.tabulate(entry, dict(enumerate(TOKENS)), len(TOKENS))
  parts = []
  for token_id in ids:
    inside = pieces.inside[token_id]
    first = pieces.at_start.get(token_id, inside)
    part = inside if parts else first
    if inside or first:
      parts.append(part)
  assert utf8.decode(b''.join(parts)) == decode(ids)


def test_ids_without_a_token_have_no_bytes():
  pieces = hf_pieces.tabulate({'type': 'Fuse'}, {1: 'a'}, 3)
  assert pieces.inside == [b'', b'a', b'']


def test_old_metaspace():
  entry = {'type': 'Metaspace', 'replacement': '_', 'add_prefix_space': False}
  pieces = hf_pieces.tabulate(entry, {0: '_a'}, 1)
  assert pieces == ([b' a'], {})
  entry['add_prefix_space'] = True
  pieces = hf_pieces.tabulate(entry, {0: '_a'}, 1)
  assert pieces == ([b' a'], {0: b'a'})


@pytest.mark.parametrize(
  'entry',
  [
    {'type': 'BPEDecoder', 'suffix': '</w>'},
    {'type': 'CTC', 'pad_token': '<pad>'},
    {'type': 'Replace', 'pattern': {'Regex': 'a+'}, 'content': 'b'},
  ],
)
def test_what_looks_at_several_tokens_is_refused(entry):
  with pytest.raises(ValueError, match='got the decoder step .*cannot be app'):
    hf_pieces.tabulate(entry, {0: 'a'}, 1)


@pytest.mark.parametrize(
  'late',
  [
    {'type': 'Replace', 'pattern': {'String': 'ab'}, 'content': 'b'},
    {'type': 'Strip', 'content': ' ', 'start': 2, 'stop': 0},
    {'type': 'Strip', 'content': ' ', 'start': 0, 'stop': 1},
    {'type': 'ByteLevel'},
  ],
)
def test_what_needs_the_whole_text_is_refused(late):
  entry = {'type': 'Sequence', 'decoders': [{'type': 'Fuse'}, late]}
  with pytest.raises(ValueError, match='after Fuse, expected'):
    hf_pieces.tabulate(entry, {0: 'a'}, 1)
