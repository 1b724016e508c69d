"""A GGUF file brings its own tokenizer; a package brings a GGUF file."""

import json
import sys

import pytest
import tokenizers

from frozen import format as frozen_format
from frozen.huggingface import packaged
from frozen.huggingface.gguf import (
  header as header_lib,
  pre_tokenizers,
  reading,
  writing,
)
from inference import generate
from inference.engine import engine_config
from tests.frozen.huggingface.gguf import test_reading
from tests.helpers.open_weights import hf_files, sentencepiece_files
from text import chat, hf_tokenizer

gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')

_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
_SPECIAL = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
_SPLITS = {
  'gpt-2': tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
  'smollm': tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  ),
}


def _trained(split='smollm'):
  """Returns a tokenizer as Hugging Face has it, and which merges digits."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(_SPECIAL),
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator([*hf_files.CORPUS, '1999 2024 1234 ' * 50], trainer)
  model.pre_tokenizer = _SPLITS[split]
  return model


def _fields(writer, trained, *, pre='smollm', template=_TEMPLATE):
  vocabulary = trained.get_vocab()
  tokens = sorted(vocabulary, key=vocabulary.get)
  merges = json.loads(trained.to_str())['model']['merges']
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  control = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
  writer.add_token_types([control[token not in _SPECIAL] for token in tokens])
  writer.add_token_merges([' '.join(pair) for pair in merges])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_pad_token_id(2)
  writer.add_add_bos_token(False)
  writer.add_add_space_prefix(False)
  writer.add_chat_template(template)


def _write(
  path, monkeypatch, more=lambda writer: None, kind='Q4_1',
  config=test_reading.CONFIG, **fields,
):  # fmt: skip
  """Writes the tiny model with a tokenizer of its own."""
  start = gguf.GGUFWriter.write_header_to_file

  def with_tokenizer(writer):
    trained = fields.pop('trained', None) or _trained()
    _fields(writer, trained, **fields)
    more(writer)
    start(writer)

  with monkeypatch.context() as patched:
    patched.setattr(gguf.GGUFWriter, 'write_header_to_file', with_tokenizer)
    test_reading._write(path, config, kind=kind)
  return path


@pytest.mark.parametrize('split', ['gpt-2', 'smollm'])
def test_ids_are_those_of_the_tokenizer_that_was_written(
  tmp_path, monkeypatch, split
):
  theirs = _trained(split)
  path = tmp_path / 'a.gguf'
  _write(path, monkeypatch, trained=theirs, pre=split)
  reading.import_file(path, tmp_path / 'ours')
  ours = hf_tokenizer.load(tmp_path / 'ours' / 'tokenizer')
  assert ours.is_exact
  for text in (*hf_files.AWKWARD, 'In 1999, 2024; \u0662\u0663 \u00bd'):
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
  # Digits stay alone although the vocabulary has a token of several.
  num = len(ours.encode('1999'))
  assert num == (4 if split == 'smollm' else 1)


def test_special_tokens_template_and_ends_are_those_of_the_file(
  tmp_path, monkeypatch
):
  _write(tmp_path / 'a.gguf', monkeypatch)
  reading.import_file(tmp_path / 'a.gguf', tmp_path / 'ours')
  frozen = frozen_format.read(tmp_path / 'ours')
  assert frozen.chat_template == _TEMPLATE
  ours = hf_tokenizer.load(tmp_path / 'ours' / 'tokenizer')
  assert dict(ours.special_tokens) == {t: i for i, t in enumerate(_SPECIAL)}
  assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (1, (2,), False)
  encoded = chat.encode(
    ours,
    frozen.chat_template,
    chat.Conversation(
      messages=[{'role': 'user', 'content': 'a<|im_end|>b'}],
      add_generation_prompt=True,
    ),
  )
  # Two turns begin and one ends; the user's text is no end.
  assert encoded.ids.count(1) == 2
  assert encoded.ids.count(2) == 1


def test_a_file_may_want_tokens_around_a_text_and_another_end(
  tmp_path, monkeypatch
):
  def more(writer):
    writer.add_add_eos_token(True)
    writer.add_eot_token_id(0)

  added = gguf.GGUFWriter.add_add_bos_token
  monkeypatch.setattr(
    gguf.GGUFWriter, 'add_add_bos_token', lambda self, _: added(self, True)
  )
  _write(tmp_path / 'a.gguf', monkeypatch, more)
  reading.import_file(tmp_path / 'a.gguf', tmp_path / 'ours')
  ours = hf_tokenizer.load(tmp_path / 'ours' / 'tokenizer')
  assert (ours.adds_bos, ours.adds_eos) == (True, True)
  assert ours.eos_ids == (2, 0)


def test_the_sampling_that_a_file_recommends_is_kept(tmp_path, monkeypatch):
  def more(writer):
    writer.add_float32('general.sampling.temp', 0.6)
    writer.add_float32('general.sampling.top_p', 0.95)
    writer.add_int32('general.sampling.top_k', 20)

  _write(tmp_path / 'a.gguf', monkeypatch, more)
  result = reading.import_file(tmp_path / 'a.gguf', tmp_path / 'ours')
  assert result.notes == []
  generation = frozen_format.read(tmp_path / 'ours').generation
  assert generation.items() >= {
    'temperature': 0.6, 'top_p': 0.95, 'top_k': 20, 'stop_ids': [2],
  }.items()  # fmt: skip


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre': 'kimi'}, "got tokenizer.ggml.pre = 'kimi', expected one of gpt-2"),
    (
      {'more': lambda w: w.add_eot_token_id(9999)},
      'eot_token_id = 9999, expected an id below',
    ),
  ],
)
def test_a_tokenizer_that_is_not_known_is_refused(
  tmp_path, monkeypatch, change, message
):
  path = _write(tmp_path / 'a.gguf', monkeypatch, **change)
  with pytest.raises(ValueError, match=message):
    reading.import_file(path, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package with a GGUF file, which may not be imported."""
  directory = tmp_path / 'site' / 'some_model'
  directory.mkdir(parents=True)
  (directory / '__init__.py').write_text('raise RuntimeError("code ran")')
  _write(directory / 'Tiny-Instruct.Q4_1.gguf', monkeypatch)
  monkeypatch.syspath_prepend(str(tmp_path / 'site'))
  yield directory
  sys.modules.pop('some_model', None)


@pytest.mark.slow
def test_a_packaged_model_is_imported_once_and_answers(package, tmp_path):
  path = packaged.find('some_model')
  assert path == package / 'Tiny-Instruct.Q4_1.gguf'
  out = tmp_path / 'ours'
  assert packaged.ensure(path, out)
  made = {each: each.stat().st_mtime_ns for each in out.rglob('*')}
  assert not packaged.ensure(path, out)
  assert {each: each.stat().st_mtime_ns for each in out.rglob('*')} == made
  manifest = frozen_format.read(out).manifest
  assert manifest.origin['source'] == 'Tiny-Instruct.Q4_1'
  config = engine_config.EngineConfig(max_sequences=1, chunk_tokens=32)
  generator = generate.load(out, config)
  assert generator.defaults.temperature == 0.2
  ids = generator.tokenizer.encode('What is 1999?')
  settings = generator.settings_for(ids, max_tokens=4, ignore_eos=True)
  (completion,) = generator.generate([ids], settings)
  assert completion.num_completion_tokens == 4


def test_another_file_is_imported_again(package, tmp_path, monkeypatch):
  out = tmp_path / 'ours'
  assert packaged.ensure(packaged.find('some_model'), out)
  before = frozen_format.read(out).manifest.origin['file_sha256']
  _write(
    package / 'Tiny-Instruct.Q4_1.gguf', monkeypatch, template=_TEMPLATE + ' '
  )
  assert packaged.ensure(packaged.find('some_model'), out)
  manifest = frozen_format.read(out).manifest
  assert manifest.origin['file_sha256'] != before
  # The same file with other weights, too.
  assert packaged.ensure(packaged.find('some_model'), out, 'float')
  assert frozen_format.read(out).manifest.quantization == {'kind': 'none'}
  assert not packaged.ensure(packaged.find('some_model'), out, 'float')


def test_a_package_that_is_missing_is_told_with_what_to_do(package):
  for path in package.glob('*.gguf'):
    path.unlink()
  for name in ('some_model', 'no_such_package'):
    with pytest.raises(FileNotFoundError, match='--no-deps -r requirements-ch'):
      packaged.find(name)


def _sentencepiece(writer, *, prefix):
  """Writes pieces with scores; joining them is asked for in every order."""
  letters = 'abcdelor\u2581'
  pieces = ['he', 'll', 'hell', 'lo', 'ab', 'abc', 'bc', '\u2581a', '\u2581ab']
  tokens = ['<unk>', '<s>', '</s>', '<end_of_turn>', '  ', 'h', *letters]
  tokens += [*pieces, *(f'<0x{i:02X}>' for i in range(256))]
  scores = {'bc': -1.0, 'ab': -2.0, 'abc': -3.0, 'll': -4.0, 'he': -5.0}
  scores |= {'lo': -3.5, 'hell': -6.0, '\u2581a': -0.5, '\u2581ab': -7.0}
  kinds = [2, 3, 3, 3, 4, *[1] * (len(tokens) - 5 - 256), *[6] * 256]
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_token_list(tokens)
  writer.add_token_scores([scores.get(token, -1000.0) for token in tokens])
  writer.add_token_types(kinds)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  if not prefix:
    writer.add_add_space_prefix(False)
  return tokens


@pytest.mark.parametrize('prefix', [True, False])
def test_pieces_are_joined_by_their_scores(tmp_path, monkeypatch, prefix):
  path = tmp_path / 'a.gguf'
  start = gguf.GGUFWriter.write_header_to_file

  def with_tokenizer(writer):
    _sentencepiece(writer, prefix=prefix)
    start(writer)

  with monkeypatch.context() as patched:
    patched.setattr(gguf.GGUFWriter, 'write_header_to_file', with_tokenizer)
    test_reading._write(path, kind='Q4_1')
  reading.import_file(path, tmp_path / 'ours')
  ours = hf_tokenizer.load(tmp_path / 'ours' / 'tokenizer')
  fields = header_lib.read(path).fields
  tokens = fields['tokenizer.ggml.tokens']
  scores = {
    token: score
    for token, score, kind in zip(
      tokens,
      fields['tokenizer.ggml.scores'],
      fields['tokenizer.ggml.token_type'],
      strict=True,
    )
    if kind == 1 and len(token) > 1
  }
  # BOS is put in front unless a file says otherwise; <end_of_turn> ends, too.
  assert (ours.adds_bos, ours.eos_ids) == (True, (2, 3))
  for text in ('hello', 'abcabc', 'a ab abc bcd', 'ababc', 'h\u00e9llo\n', 'z'):
    wanted = []
    spaced = ('\u2581' if prefix else '') + text.replace(' ', '\u2581')
    for part in sentencepiece_files.joined(spaced, scores):
      wanted += (
        [tokens.index(part)]
        if part in tokens
        else [tokens.index(f'<0x{byte:02X}>') for byte in part.encode()]
      )
    assert ours.encode(text) == wanted, text
    assert ours.decode(ours.encode(text)) == text
  writing.export_file(tmp_path / 'ours', tmp_path / 'b.gguf')
  reading.import_file(tmp_path / 'b.gguf', tmp_path / 'again')
  again = hf_tokenizer.load(tmp_path / 'again' / 'tokenizer')
  for text in ('hello', 'abcabc', 'a ab  abc', 'ababc'):
    assert again.encode(text) == ours.encode(text)


# Pieces by llama.cpp's rules, worked out by hand from its expressions.
@pytest.mark.parametrize(
  ('name', 'pieces'),
  [
    ('gpt-2', ["I", "'ll", ' see', ' 12345', '!!', '\n\n', ' x']),
    ('smollm', [
      "I", "'ll", ' see', ' ', '1', '2', '3', '4', '5', '!!', '\n\n', ' x',
    ]),
    ('llama-bpe', ["I", "'ll", ' see', ' ', '123', '45', '!!\n\n', ' x']),
    ('qwen2', [
      "I", "'ll", ' see', ' ', '1', '2', '3', '4', '5', '!!\n\n', ' x',
    ]),
    ('default', [
      "I", "'", 'll', ' see', ' ', '123', '45', '!!', '\n\n', ' x',
    ]),
    ('falcon', ["I", "'", 'll', ' see', ' ', '123', '45', '!!', '\n\n', ' x']),
    ('tekken', [
      "I", "'ll", ' see', ' ', '1', '2', '3', '4', '5', '!!\n\n', ' x',
    ]),
    ('gpt-4o', ["I'll", ' see', ' ', '123', '45', '!!\n\n', ' x']),
    ('deepseek-v3', [
      "I", "'ll", ' see', ' ', '123', '45', '!!\n\n', ' x',
    ]),
  ],
)  # fmt: skip
def test_a_named_rule_splits_text_as_llama_cpp_does(name, pieces):
  rule = pre_tokenizers.rule(name)
  entry = pre_tokenizers.pre_tokenizer(rule)
  assert pre_tokenizers.name_of(entry, rule.ignores_merges) is not None
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  whole = json.loads(model.to_str()) | {'pre_tokenizer': entry}
  model = tokenizers.Tokenizer.from_str(json.dumps(whole))
  text = "I'll see 12345!!\n\n x"
  found = model.pre_tokenizer.pre_tokenize_str(text)
  assert [text[start:end] for _, (start, end) in found] == pieces
