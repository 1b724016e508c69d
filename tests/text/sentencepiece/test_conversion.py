"""`tokenizer.model` files: ids and text of the library that made them."""

import io
import json
import random

import pytest
import tokenizers

from tests.helpers.open_weights import (
  hf_files as hf_files_lib,
  sentencepiece_files,
)
from text import hf_tokenizer
from text.sentencepiece import conversion

WORDS = [
  *('the', 'quick', 'brown', 'fox', 'jumps', 'over', 'lazy', 'dogs', 'banana'),
  *('bandana', 'aaaa', 'caf\u00e9', 'na\u00efve', '\u00dcbung', 'stra\u00dfe'),
  *('\u65e5\u672c\u8a9e', '\u4e2d\u6587', '\u043f\u0440\u0438', '123', '45'),
]
ODD = [
  *(' ', '  ', '   ', '\n', '\n\n', '\t', '\r\n', '\u3000', '\xa0', '\u2581'),
  *('\U0001f600', '\U0001f469\u200d\U0001f467', '\ufb01', '\u2460', '\x00'),
  *('<s>', '</s>', '<unk>', '<0x41>', '<0x0A>', '<sep>', '<tag>', '\u200b'),
  *('\uff21', '\u00bd', '\u0915\u094d', '\ufeff', 'aaaaa', 'x', '\u65e5'),
]
PLAIN = {'normalization_rule_name': 'identity', 'byte_fallback': True}
PLAIN |= {'remove_extra_whitespaces': False}
BPE, UNIGRAM = {'model_type': 'bpe'}, {'model_type': 'unigram'}
USER = {'user_defined_symbols': ['<sep>', '<tag>', '\n', '\u2581\u2581']}
KINDS = {
  'llama': BPE | PLAIN | {'vocab_size': 420},
  'gemma': BPE | PLAIN | USER | {'vocab_size': 420, 'add_dummy_prefix': False},
  'unigram': UNIGRAM | PLAIN,
  'replaced': BPE | {'vocab_size': 160},
  'replaced lines': BPE
  | {'vocab_size': 420, 'byte_fallback': True}
  | {'remove_extra_whitespaces': False},
  'unigram replaced': UNIGRAM | {'user_defined_symbols': ['<sep>']},
  'controls': BPE
  | {'vocab_size': 200, 'control_symbols': ['<tag>'], 'pad_id': 3}
  | {'user_defined_symbols': ['<sep>']},
}


def _texts(count=400):
  rng = random.Random(0)
  few = ['', ' ', '  ', '\n', 'a', ' a', 'a ', '\u2581', '\u2581a', 'a\u2581']
  parts = [*WORDS, *ODD, ' ', ' ', '. ']
  return few + [
    ''.join(rng.choices(parts, k=rng.randint(1, 14))) for _ in range(count)
  ]


def _trained(**kwargs):
  """Returns a model of the library that is the reference, and its bytes."""
  spm = pytest.importorskip('sentencepiece', reason='requirements-peer.txt')
  rng = random.Random(1)
  corpus = [' '.join(rng.choices(WORDS, k=8)) + '.\n' for _ in range(400)]
  file = io.BytesIO()
  if kwargs['model_type'] == 'unigram':
    kwargs = {'vocab_size': 340, 'hard_vocab_limit': False} | kwargs
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus), model_writer=file, minloglevel=2, **kwargs
  )
  data = file.getvalue()
  return spm.SentencePieceProcessor(model_proto=data), data


@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_text_are_those_of_the_reference(tmp_path, kind):
  theirs, data = _trained(**KINDS[kind])
  is_plain = KINDS[kind].get('normalization_rule_name') == 'identity'
  for is_legacy in (True, False) if is_plain else (True,):
    source = sentencepiece_files.write(tmp_path, data, {'legacy': is_legacy})
    hf_tokenizer.convert(source, tmp_path / 'saved')
    ours = hf_tokenizer.load(tmp_path / 'saved')
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert (ours.adds_bos, ours.adds_eos) == (True, False)
    for text in _texts():
      ids = theirs.encode(text)
      assert ours.encode(text) == ids, text
      if theirs.unk_id() not in ids:
        assert ours.decode(ids) == theirs.decode(ids), text


def test_the_saved_files_mean_the_same_to_transformers(tmp_path):
  transformers = pytest.importorskip('transformers')
  _, data = _trained(**KINDS['llama'])
  for is_legacy in (True, False):
    added = {str(420 + i): {'content': f'<x{i}>'} for i in range(2)}
    added['421']['special'] = True
    config = {'legacy': is_legacy, 'added_tokens_decoder': added}
    sentencepiece_files.write(tmp_path, data, config)
    ours = hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
    # As it reads the model file itself, by its own way.
    slow = transformers.TokenizersBackend.from_pretrained(tmp_path)
    for text in ('the fox <x1>fox<x0> a', '<x1> the\n\n  fox', ' <s>the</s>'):
      spans = hf_files_lib.spans_of(ours, text)
      ids = ours.encode_marked(text, spans).ids
      assert ids == theirs.encode(text, add_special_tokens=False)
      assert theirs.encode(text)[0] == ours.bos_id
      if text[0] != ' ':  # it would lose that space with legacy false
        assert ids == slow.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize('is_prefixed', [True, False])
def test_pieces_are_joined_by_their_scores(tmp_path, is_prefixed):
  data = sentencepiece_files.small(is_prefixed=is_prefixed)
  sentencepiece_files.write(tmp_path, data)
  ours = hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
  model = json.loads((tmp_path / 'saved' / 'tokenizer.json').read_text('utf-8'))
  vocab = model['model']['vocab']
  scores = sentencepiece_files.SCORES
  rng = random.Random(0)
  for _ in range(200):
    text = ''.join(rng.choices('abcdehlor ', k=rng.randint(1, 12)))
    spaced = ('\u2581' if is_prefixed else '') + text.replace(' ', '\u2581')
    pieces = sentencepiece_files.joined(spaced, scores)
    expected = [vocab[token] for token in pieces]
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text
  assert ours.encode('\u00e9')[-2:] == [vocab['<0xC3>'], vocab['<0xA9>']]


def test_names_and_added_tokens_of_older_files(tmp_path):
  data = sentencepiece_files.small(more=[('<old>', 0.0, 3)])
  last = hf_tokenizer.convert(
    sentencepiece_files.write(tmp_path, data), tmp_path / 'saved'
  ).vocab_size
  sentencepiece_files.write(
    tmp_path,
    data,
    {'add_bos_token': False, 'add_eos_token': True},
    added_tokens={'<|end|>': last, '<tool>': last + 1},
    special_tokens_map={'eos_token': '<|end|>', 'pad_token': '<pad>'},
  )
  ours = hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
  ours = hf_tokenizer.load(tmp_path / 'saved')
  assert (ours.eos_id, ours.pad_id) == (last, last + 2)
  assert (ours.adds_bos, ours.adds_eos) == (False, True)
  assert '<tool>' not in ours.special_tokens
  assert ours.encode('a<tool>') == [*ours.encode('a'), last + 1]
  # Text never becomes a special token.
  assert last not in ours.encode('<|end|>')


def test_a_piece_takes_the_name_that_the_config_has_given_it(tmp_path):
  data = sentencepiece_files.small(more=[('<unused0>', 0.0, 3)])
  sentencepiece_files.write(tmp_path, data)
  last = hf_tokenizer.convert(tmp_path, tmp_path / 'saved').vocab_size - 1
  config = {'added_tokens_decoder': {str(last): {'content': '<image>'}}}
  config['added_tokens_decoder'][str(last)]['special'] = True
  sentencepiece_files.write(tmp_path, data, config)
  ours = hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
  assert ours.special_tokens['<image>'] == last
  assert ours.vocab_size == last + 1


UNK, REST = sentencepiece_files.SPECIALS[0], sentencepiece_files.SPECIALS[1:]
small, field = sentencepiece_files.small, sentencepiece_files.field


@pytest.mark.parametrize(
  ('data', 'error'),
  [
    (b'', 'it has no pieces'),
    (b'IQ== 0\nIg== 1\n', 'no SentencePiece model'),  # of tiktoken
    (small()[:-1], 'a field is longer than its message'),
    (b'\x0a\xff', 'it ends inside a field'),
    (b'\x0a' + b'\xff' * 11, 'a number has more than 10 bytes'),
    (b'\x0f', 'the wire type 7'),
    (b'\x08\x05', 'a message is a number'),
    (small(more=[(b'\xff', 0.0, 1)]), 'bytes that are not UTF-8'),
    (small(more=[('', 0.0, 1)]), 'without text'),
    (small(more=[('q', float('nan'), 1)]), 'the score nan'),
    (small(more=[('q', 0.0, 7)]), 'of kind 7, expected 1 to 6'),
    (small(more=[('he', 0.0, 1)]), "'he' twice"),
    (small(more=[('q', 0.0, 2)]), 'got 2 pieces for unknown characters'),
    (small(more=[('q', 0.0, 5)]), "'q' of kind UNUSED"),
    (sentencepiece_files.model([UNK, *REST]), 'got 0 byte pieces'),
    (small(model_type=3), 'got model_type WORD'),
    (small(trainer={24: 1}), 'got treat_whitespace_as_suffix = 1'),
    (small(normalizer={5: 0}), 'got escape_whitespaces = 0'),
    (small(normalizer={2: b'abcde'}), 'a precompiled_charsmap of 5 bytes'),
    (small() + field(5, field(2, b'x')), 'denormalizer_spec'),
  ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, data, error):
  sentencepiece_files.write(tmp_path, data)
  with pytest.raises(ValueError, match=error) as caught:
    hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
  assert conversion.FILE in str(caught.value)
  assert not (tmp_path / 'saved').exists()


@pytest.mark.parametrize(
  ('config', 'more', 'error'),
  [
    ({'legacy': 'yes'}, {}, "got legacy = 'yes'"),
    ({'sp_model_kwargs': {'nbest_size': 8}}, {}, 'got sp_model_kwargs'),
    ({'add_bos_token': 1}, {}, 'got add_bos_token = 1'),
    ({'add_sep_token': True}, {}, ''),
    ({}, {'added_tokens': {'<x>': 3000}}, "got '<x>' with id 3000, expected"),
    ({}, {'added_tokens': {'he': 3}}, "got 'he' with id 3, expected"),
    ({}, {'added_tokens': {'<x>': 'a'}}, 'expected tokens by id'),
    ({'added_tokens_decoder': [1]}, {}, 'expected tokens by id'),
  ],
)
def test_files_beside_it_that_lie(tmp_path, config, more, error):
  sentencepiece_files.write(tmp_path, small(), config, **more)
  if not error:  # a field that is not known changes nothing
    hf_tokenizer.convert(tmp_path, tmp_path / 'saved')
    return
  with pytest.raises(ValueError, match=error):
    hf_tokenizer.convert(tmp_path, tmp_path / 'saved')


def test_legacy_false_is_refused_where_the_start_of_a_text_is_lost(tmp_path):
  data = small(is_stripped=True)
  sentencepiece_files.write(tmp_path, data, {'legacy': False})
  with pytest.raises(ValueError, match='got legacy = false'):
    hf_tokenizer.convert(tmp_path, tmp_path / 'saved')


def test_a_fast_tokenizer_beside_it_is_taken(tmp_path):
  sentencepiece_files.write(tmp_path, b'not read')
  hf_files_lib.llama2(tmp_path)
  assert hf_tokenizer.convert(tmp_path, tmp_path / 'saved').bos_id == 1


def test_cut_and_changed_bytes_never_crash(tmp_path):
  data, rng, refusals = small(), random.Random(0), []
  for _ in range(150):
    damaged = bytearray(data[: rng.randint(1, len(data))])
    for _ in range(rng.randint(0, 4)):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    try:
      written, _ = conversion.convert(bytes(damaged), {}, {}, {})
    except ValueError as error:
      refusals.append(str(error))
    else:
      tokenizers.Tokenizer.from_str(json.dumps(written))
  assert len(refusals) > 75
  assert all(conversion.FILE in refusal for refusal in refusals)
