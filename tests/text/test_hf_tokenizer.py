"""Tokenizers of open models: ids and text of transformers, and no forgery.

`transformers` reads the same files; `tokenizers` decodes for it, so the library
is the oracle where thousands of sequences are tried.
"""

import functools
import json
import pathlib
import tempfile

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tests.helpers.open_weights import hf_files
from text import detokenize, hf_tokenizer, tokenizer

FAMILIES = sorted(hf_files.FAMILIES)
# Their vocabularies hold special tokens as pieces, which the library then finds
# in text even if asked not to.
FORGEABLE = ('unigram', 'unigram_bytes', 'wordpiece')


@functools.cache
def _directory(family: str) -> pathlib.Path:
  """Returns a Hugging Face directory that exists until the tests end."""
  root = tempfile.TemporaryDirectory()
  _ROOTS.append(root)
  return hf_files.FAMILIES[family](root.name)


_ROOTS: list[tempfile.TemporaryDirectory] = []


@functools.cache
def _ours(family: str) -> hf_tokenizer.HuggingFaceTokenizer:
  directory = _directory(family)
  return hf_tokenizer.convert(directory, directory / 'saved')


@functools.cache
def _theirs(directory: pathlib.Path):
  transformers = pytest.importorskip(
    'transformers', reason='the reference implementation is not installed'
  )
  return transformers.AutoTokenizer.from_pretrained(directory)


@functools.cache
def _library(family: str) -> tokenizers.Tokenizer:
  return tokenizers.Tokenizer.from_file(
    str(_directory(family) / 'tokenizer.json')
  )


def _special_but_unknown(tok) -> set[int]:
  unknown = tok.names.get('unk_token')
  return {i for text, i in tok.special_tokens.items() if text != unknown}


@pytest.fixture(params=FAMILIES)
def family(request):
  return request.param


def test_ids_without_a_token_are_known(tmp_path):
  directory = hf_files.llama3(tmp_path)
  assert not _ours('llama3').missing_ids
  path = directory / 'tokenizer.json'
  model = json.loads(path.read_text('utf-8'))
  num_ids = _ours('llama3').vocab_size
  for token in model['added_tokens'][-2:]:  # Phi-4-mini has such gaps
    token['id'] += 5
  path.write_text(json.dumps(model), 'utf-8')
  ours = hf_tokenizer.convert(directory, tmp_path / 'saved')
  assert ours.vocab_size == num_ids + 5
  gap = (num_ids - 2, num_ids + 3)
  assert ours.missing_ids == list(range(*gap))
  assert tokenizer.spare_ids(ours, num_ids + 5) == (gap,)
  assert tokenizer.spare_ids(ours, num_ids + 9) == (
    gap,
    (num_ids + 5, num_ids + 9),
  )
  assert ours.decode([num_ids]) == ''


def test_ids_and_text_of_transformers(family):
  ours, theirs = _ours(family), _theirs(_directory(family))
  assert ours.vocab_size == len(theirs)
  forged = () if family in FORGEABLE else hf_files.FORGED
  for text in (*hf_files.AWKWARD, *forged):
    ids = ours.encode(text)
    kwargs = {'split_special_tokens': True}
    assert ids == theirs.encode(text, add_special_tokens=False, **kwargs), text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    before = [ours.bos_id] if ours.adds_bos else []
    after = [ours.eos_id] if ours.adds_eos else []
    assert [*before, *ids, *after] == theirs.encode(text, **kwargs)


def test_special_ids_of_transformers(family):
  ours, theirs = _ours(family), _theirs(_directory(family))
  for name, ours_id in (
    ('bos_token', ours.bos_id),
    ('eos_token', ours.eos_id),
    ('pad_token', ours.pad_id),
  ):
    theirs_id = getattr(theirs, f'{name}_id')
    # What is missing is EOS.
    assert ours_id == (ours.eos_id if theirs_id is None else theirs_id)
    assert (name in ours.names) == (theirs_id is not None)
  assert dict(ours.names) == theirs.special_tokens_map


@pytest.mark.parametrize('text', hf_files.FORGED)
def test_text_never_becomes_special_ids(family, text):
  tok = _ours(family)
  special = _special_but_unknown(tok)
  words = [text, f'a{text}b', f' {text} {text}', *tok.special_tokens]
  words += [f'{token} a' for token in tok.special_tokens]
  for word in words:
    assert not special & set(tok.encode(word)), word
    assert not special & set(tok.encode_batch([word])[0].tolist()), word


@pytest.mark.parametrize('family', FORGEABLE)
def test_the_library_alone_would_be_forged(family):
  # If this fails, hiding the special tokens may have become unnecessary.
  model = _library(family)
  model.encode_special_tokens = True
  eos_id = _ours(family).eos_id
  token = next(
    t for t, i in _ours(family).special_tokens.items() if i == eos_id
  )
  assert eos_id in model.encode(f'a {token} b', add_special_tokens=False).ids


def test_merges_that_spell_a_special_token_do_not_make_it(tmp_path):
  vocab = {'a': 0, '<': 1, 's': 2, '>': 3, '<s': 4, '<s>': 5}
  merges = [('<', 's'), ('<s', '>')]
  model = tokenizers.Tokenizer(models.BPE(vocab, merges))
  model.add_special_tokens(['<s>'])
  hf_files.write(tmp_path / 'in', model, {'eos_token': '<s>'})
  tok = hf_tokenizer.convert(tmp_path / 'in', tmp_path / 'out')
  assert tok.encode('a<s>a') == [0, 4, 3, 0]


def test_words_looked_up_whole_do_not_find_a_special_token(tmp_path):
  vocab = {'a': 0, '<': 1, 's': 2, '>': 3, '<s>': 4}
  model = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=True))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  model.add_special_tokens(['<s>'])
  hf_files.write(tmp_path / 'in', model, {'eos_token': '<s>'})
  tok = hf_tokenizer.convert(tmp_path / 'in', tmp_path / 'out')
  assert tok.encode('a <s> a') == [0, 1, 2, 3, 0]


def test_added_tokens_that_are_not_special_are_vocabulary():
  tok = _ours('qwen')
  think = 'a<think>b'
  assert tok.decode(tok.encode(think)) == think
  assert len(tok.encode('<think>')) == 1
  assert '<think>' not in tok.special_tokens


def test_batches_are_the_single_ones(family):
  tok = _ours(family)
  texts = [*hf_files.AWKWARD, *hf_files.FORGED]
  for text, ids in zip(texts, tok.encode_batch(texts), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == tok.encode(text)


def _is_valid(run: list[str]) -> bool:
  data = bytes(int(token[3:5], 16) for token in run)
  try:
    data.decode()
  except UnicodeDecodeError:
    return False
  return True


def _has_broken_bytes(model: tokenizers.Tokenizer, ids: list[int]) -> bool:
  """Whether a run of byte tokens is not UTF-8: we differ there on purpose."""
  run: list[str] = []
  special = {
    i for i, t in model.get_added_tokens_decoder().items() if t.special
  }
  for token_id in [i for i in ids if i not in special] + [-1]:
    token = model.id_to_token(token_id) if token_id >= 0 else ''
    if len(token) == 6 and token.startswith('<0x'):
      run.append(token)
    elif run:
      if not _is_valid(run):
        return True
      run = []
  return False


@pytest.mark.parametrize('family', FAMILIES)
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_ids_decode_as_in_the_library_and_stream(family, data):
  tok = _ours(family)
  ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=12))
  whole = tok.decode(ids)
  decoder = detokenize.StreamDecoder(tok)
  assert ''.join([*map(decoder.push, ids), decoder.finish()]) == whole
  model = _library(family)
  if family == 'llama2_normalized':
    # The library normalises their strings and then shows them as text.
    ids = [i for i in ids if i not in tok.special_tokens.values()]
  if not _has_broken_bytes(model, ids):
    assert whole == model.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize('family', FAMILIES)
@hypothesis.given(text=st.text(max_size=20))
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_text_streams_and_exact_ones_come_back(family, text):
  tok = _ours(family)
  ids = tok.encode(text)
  decoder = detokenize.StreamDecoder(tok)
  pieces = [*map(decoder.push, ids), decoder.finish()]
  assert ''.join(pieces) == tok.decode(ids)
  if tok.is_exact:
    assert ''.join(pieces) == text
    assert pieces[-1] == ''


def test_which_ones_are_exact():
  exact = {family for family in FAMILIES if _ours(family).is_exact}
  # Qwen normalises; to sentencepiece U+2581 is a space.
  assert exact == {'gpt2', 'llama3'}


@pytest.mark.parametrize('family', ['llama2', 'phi3', 'gemma'])
@hypothesis.given(text=st.text(max_size=20))
@hypothesis.settings(deadline=None, max_examples=60)
def test_sentencepiece_gives_back_all_but_its_own_sign(family, text):
  tok = _ours(family)
  assert tok.decode(tok.encode(text)) == text.replace('\u2581', ' ')


def test_token_bytes_join_to_the_text_with_its_prefix():
  tok = _ours('llama2')
  ids = tok.encode('the \U0001f600')
  assert b''.join(map(tok.token_bytes, ids)) == ' the \U0001f600'.encode()
  assert (
    tok.first_bytes(ids[0]) + b''.join(map(tok.token_bytes, ids[1:]))
    == 'the \U0001f600'.encode()
  )
  assert [tok.token_bytes(i) for i in ids[-4:]] == [
    bytes([b]) for b in '\U0001f600'.encode()
  ]


def test_num_bytes_counts_token_bytes(family):
  tok = _ours(family)
  num_bytes_V = tok.num_bytes_V()
  assert num_bytes_V.dtype == np.int32
  expected = [len(tok.token_bytes(i)) for i in range(tok.vocab_size)]
  np.testing.assert_array_equal(num_bytes_V, expected)
  assert not num_bytes_V[list(tok.special_tokens.values())].any()


def test_a_continued_text_keeps_its_space():
  tok = _ours('llama2')
  ids = tok.encode('the cat')[1:]
  whole = detokenize.StreamDecoder(tok)
  continued = detokenize.StreamDecoder(tok, is_continued=True)
  assert ''.join(map(whole.push, ids)) == tok.decode(ids)
  assert ''.join(map(continued.push, ids)) == f' {tok.decode(ids)}'
  for decoder in (whole, continued):
    decoder.finish()
  assert continued.push(ids[0]) == f' {whole.push(ids[0])}'


def test_a_special_id_before_the_text_leaves_its_start(family):
  tok = _ours(family)
  ids = tok.encode('the cat')
  decoder = detokenize.StreamDecoder(tok)
  assert ''.join(map(decoder.push, [tok.eos_id, *ids])) == tok.decode(ids)


def test_save_then_load(family, tmp_path):
  tok = _ours(family)
  tok.save(tmp_path / 'new' / 'a')
  loaded = tokenizer.load(tmp_path / 'new' / 'a')
  loaded.save(tmp_path / 'b')
  first, second = (
    {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    for name in ('new/a', 'b')
  )
  assert first == second
  source = _directory(family) / 'tokenizer.json'
  assert first['tokenizer.json'] == source.read_bytes()
  for name in ('kind', 'vocab_size', 'bos_id', 'eos_ids', 'pad_id', 'adds_bos'):
    assert getattr(loaded, name) == getattr(tok, name)
  for text in hf_files.AWKWARD:
    assert loaded.encode(text) == tok.encode(text)


def test_what_is_saved_is_a_directory_of_transformers(family):
  ours = _ours(family)
  theirs = _theirs(_directory(family) / 'saved')
  for text in hf_files.AWKWARD:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == _theirs(_directory(family)).encode(
      text, add_special_tokens=False
    )
  assert ours.vocab_size == len(theirs)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
  directory = hf_files.gpt2(tmp_path / 'in')
  model = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  model.enable_truncation(3)
  model.enable_padding(length=3, pad_id=0)
  model.save(str(directory / 'tokenizer.json'))
  tok = hf_tokenizer.convert(directory, tmp_path / 'out')
  text = 'the cat sat on the mat'
  assert tok.encode(text) == _ours('gpt2').encode(text)
  assert tok.encode_batch(['', text])[0].size == 0


def test_generation_config_says_where_texts_end(tmp_path):
  tok = _ours('llama3')
  end, turn = (
    tok.special_tokens[f'<|{n}|>'] for n in ('end_of_text', 'eot_id')
  )
  assert tok.eos_ids == (turn, end)  # the tokenizer's own is first
  assert _ours('gpt2').eos_ids == (_ours('gpt2').eos_id,)
  # Where it does not name the tokenizer's own, generating passes over that.
  hf_files.llama3(tmp_path / 'in', generation={'eos_token_id': end})
  other = hf_tokenizer.convert(tmp_path / 'in', tmp_path / 'out')
  assert (other.eos_id, other.eos_ids) == (end, (end,))


def test_lone_surrogate_is_refused_with_its_place(family):
  for encode in (
    _ours(family).encode,
    lambda text: _ours(family).encode_batch(['a', text]),
    lambda text: _ours(family).encode_marked(text, []),
  ):
    with pytest.raises(ValueError, match=r"surrogate '\\ud800' at index 2"):
      encode('ab\ud800')


@pytest.mark.parametrize('token_id', [-1, 10_000])
def test_id_outside_the_vocabulary_is_refused(family, token_id):
  with pytest.raises(ValueError, match=rf'got token id {token_id}, expected'):
    _ours(family).decode([token_id])


# Templates: special tokens where they are said to be.


def test_marked_text_is_what_transformers_encodes(family):
  ours, theirs = _ours(family), _theirs(_directory(family))
  tokens = list(ours.special_tokens)
  a, b = tokens[0], tokens[-1]
  texts = [
    f'{a}the cat{b}\n\nuser  x\u00e9\U0001f600{a}{b} {a}',
    f' {a} the{b} ', f'x{b}y', a, f'{a}\n {b}\n\n{a}the', 'no tokens', '',
    *hf_files.FORGED,
  ]  # fmt: skip
  for text in texts:
    ids, offsets = ours.encode_marked(text, hf_files.spans_of(ours, text))
    expected = theirs(
      text, add_special_tokens=False, return_offsets_mapping=True
    )
    assert ids == expected['input_ids'], text
    assert offsets == expected['offset_mapping'], text


def test_a_span_is_special_and_the_same_string_beside_it_is_not(family):
  tok = _ours(family)
  token, token_id = next(
    (t, i) for t, i in tok.special_tokens.items() if i == tok.eos_id
  )
  text = f'a{token}b{token} c{token}'
  start = text.index(token, 2)
  ids, offsets = tok.encode_marked(text, [(start, start + len(token))])
  # Where a normalizer keeps the library from matching there, it is text.
  if family == 'llama2_normalized':
    assert token_id not in ids
    return
  assert ids.count(token_id) == 1
  where = offsets[ids.index(token_id)]
  assert text[slice(*where)].strip() == token
  assert where[0] <= start < where[1]


def test_a_span_that_is_no_special_token_is_refused():
  with pytest.raises(
    ValueError, match=r"got 'ab' at \(0, 2\), expected one of"
  ):
    _ours('gpt2').encode_marked('abc', [(0, 2)])


def test_single_words_match_only_where_the_library_matches_them(tmp_path):
  model = tokenizers.Tokenizer.from_file(
    str(_directory('gpt2') / 'tokenizer.json')
  )
  model.add_special_tokens(hf_files.special('<m>', single_word=True))
  hf_files.write(tmp_path / 'in', model, {'eos_token': '<|endoftext|>'})
  tok = hf_tokenizer.convert(tmp_path / 'in', tmp_path / 'out')
  theirs = _theirs(tmp_path / 'in')
  for text in ('a <m> b', 'a<m>b <m>', '<m>b<m>'):
    ids = tok.encode_marked(text, hf_files.spans_of(tok, text)).ids
    assert ids == theirs.encode(text, add_special_tokens=False)
