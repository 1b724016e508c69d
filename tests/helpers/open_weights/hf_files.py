"""Small tokenizers in the style of open models, in Hugging Face's files.

Each function fills a directory. The vocabulary is learnt from a few lines: the
steps of the tokenizer are real, and every id is small.
"""

import functools
import json
import pathlib

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

CORPUS = (
  'the cat sat on the mat; the bat sat on the hat, and did not say a word.\n'
  "It's 1234 o'clock: don't  you   think so? user assistant system\n\n",
  'def f(x):\n  return {"a": [1, 2]}  # caf\u00e9 na\u00efve \u65e5\u672c\n',
  '<think> thought </think> [INST] </s> <s> <|im_end|> <0x41> ',
)

# Each broke some tokenizer once.
AWKWARD = (
  '',
  ' ',
  '\n',
  'a',
  ' the cat',
  'the cat sat',
  'x' + ' ' * 300 + 'y',
  '\n\n\n  \t\r\n end ',
  '\x00\x01\x1f\x7f\x80\x9f',
  'caf\u00e9 cafe\u0301 \ufb01 \u212b \u2460 \u0130',
  '\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600',
  '\u65e5\u672c\u8a9e\u3068\ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628',
  '\ufeffmark, \ufffd replacement, \U0010ffff last, \ufdd0 none',
  '\u2581 lower \u2581\u2581block \u0120 \u010a',
  "don't I'll 1234567890 3.14 __init__ !!!???",
  '<0x41> <0xFF> <0x> ##ing [UNK]',
)

# Texts with strings that are special in one of the tokenizers or another.
FORGED = (
  '<s>', '</s>', 'a</s>b', ' </s> ', '<|im_end|>', 'x<|im_end|>\n<|im_start|>',
  '<|eot_id|><|start_header_id|>system<|end_header_id|>', '<pad><unk><eos>',
  '<end_of_turn>\n<start_of_turn>', '[/INST]</s>[INST]', '<|endoftext|>',
  '[SEP][CLS]', '<|begin_of_text|> hi', '<|user|> <|end|> x',
)  # fmt: skip

LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def write(
  directory, model, config, *, generation=None, template=None
) -> pathlib.Path:
  """Writes the files of a tokenizer; returns the directory."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  text = model if isinstance(model, str) else model.to_str()
  (directory / 'tokenizer.json').write_text(text, 'utf-8')
  if template is not None:
    config = config | {'chat_template': template}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast'} | config
  (directory / 'tokenizer_config.json').write_text(json.dumps(config), 'utf-8')
  if generation is not None:
    (directory / 'generation_config.json').write_text(json.dumps(generation))
  return directory


def special(*tokens, **flags):
  """Returns special tokens that match in a given way."""
  return [tokenizers.AddedToken(t, special=True, **flags) for t in tokens]


def bos_first(bos: str, bos_id: int):
  """Returns the post-processor that puts BOS before a text."""
  return processors.TemplateProcessing(
    single=f'{bos} $A',
    pair=f'{bos} $A {bos} $B',
    special_tokens=[(bos, bos_id)],
  )


def _byte_level(split: str | None = None, **kwargs) -> tokenizers.Tokenizer:
  """Learns byte-level BPE, split by GPT-2's expression or another."""
  model = tokenizers.Tokenizer(models.BPE(**kwargs))
  if split is None:
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  else:
    model.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(split), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(CORPUS * 3, trainer)
  return model


def gpt2(directory, **files):
  """Byte-level BPE; one special token is BOS and EOS."""
  model = _byte_level()
  model.post_processor = processors.ByteLevel(trim_offsets=False)
  model.add_special_tokens(['<|endoftext|>'])
  end = '<|endoftext|>'
  config = {'bos_token': end, 'eos_token': end, 'unk_token': end}
  return write(directory, model, config, **files)


def llama3(directory, **files):
  """Byte-level BPE that looks words up, many special tokens, BOS added."""
  model = _byte_level(LLAMA3_SPLIT, ignore_merges=True)
  names = ('begin_of_text', 'end_of_text', 'start_header_id', 'end_header_id')
  tokens = [f'<|{name}|>' for name in (*names, 'eot_id', 'reserved_0')]
  model.add_special_tokens(tokens)
  model.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=False),
      bos_first(tokens[0], model.token_to_id(tokens[0])),
    ]
  )
  config = {'bos_token': tokens[0], 'eos_token': '<|eot_id|>'}
  ids = [model.token_to_id(token) for token in (tokens[1], tokens[4])]
  files = {'generation': {'eos_token_id': ids}} | files
  return write(directory, model, config, **files)


def qwen(directory, **files):
  """Byte-level BPE on NFC, without BOS; some added tokens are not special."""
  model = _byte_level(LLAMA3_SPLIT)
  model.normalizer = normalizers.NFC()
  tokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  model.add_special_tokens(tokens)
  model.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False)
      for token in ('<tool_call>', '</tool_call>', '<think>', '</think>')
    ]
  )
  config = {
    'bos_token': None,
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'additional_special_tokens': tokens[1:],
    'add_bos_token': False,
  }
  return write(directory, model, config, **files)


@functools.cache
def _sentencepiece_bpe(specials: tuple[str, ...]) -> tuple[dict, list]:
  """Learns a vocabulary of sentencepiece's order, and its merges."""
  model = tokenizers.Tokenizer(models.BPE())
  model.normalizer = normalizers.Replace(' ', '\u2581')
  model.pre_tokenizer = pre_tokenizers.Split('\u2581', 'merged_with_next')
  model.train_from_iterator(
    CORPUS * 3, trainers.BpeTrainer(vocab_size=150, show_progress=False)
  )
  inner = json.loads(model.to_str())['model']
  # No emoji, few CJK characters: the rest takes the bytes.
  learnt = sorted(inner['vocab'], key=inner['vocab'].get)
  tokens = (*specials, *(f'<0x{i:02X}>' for i in range(256)), *learnt)
  return {token: i for i, token in enumerate(tokens)}, inner['merges']


def _with_byte_fallback(specials, unk) -> tokenizers.Tokenizer:
  vocab, merges = _sentencepiece_bpe(tuple(specials))
  return tokenizers.Tokenizer(
    models.BPE(
      dict(vocab),
      [tuple(merge) for merge in merges],
      unk_token=unk,
      fuse_unk=True,
      byte_fallback=True,
    )
  )


def _sentencepiece_decoder(is_stripped: bool):
  steps = [
    decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()
  ]  # fmt: skip
  return decoders.Sequence(
    steps + [decoders.Strip(' ', 1, 0)] if is_stripped else steps
  )


def llama2(directory, *, normalized=False, **files):
  """Sentencepiece BPE with byte fallback; a space before every text."""
  tokens = ['<unk>', '<s>', '</s>']
  model = _with_byte_fallback(tokens, '<unk>')
  model.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  model.decoder = _sentencepiece_decoder(is_stripped=True)
  model.add_special_tokens(special(*tokens, normalized=normalized))
  model.post_processor = bos_first('<s>', 1)
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return write(directory, model, config, **files)


def mistral(directory, **files):
  """As `llama2`, with the space as part of splitting; [INST] is special."""
  tokens = ['<unk>', '<s>', '</s>', '[INST]', '[/INST]', '[TOOL_CALLS]']
  model = _with_byte_fallback(tokens, '<unk>')
  model.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme='first', split=False
  )
  model.decoder = _sentencepiece_decoder(is_stripped=True)
  model.add_special_tokens(tokens)
  model.post_processor = bos_first('<s>', 1)
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return write(directory, model, config, **files)


def phi3(directory, **files):
  """As `llama2`, with special tokens that take the white space after them."""
  tokens = ['<unk>', '<s>', '</s>']
  model = _with_byte_fallback(tokens, '<unk>')
  model.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  model.decoder = _sentencepiece_decoder(is_stripped=True)
  model.add_special_tokens(special(*tokens, normalized=False))
  model.add_special_tokens(
    special('<|user|>', '<|assistant|>', '<|end|>', '<|system|>', rstrip=True)
  )
  config = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<unk>'}
  return write(directory, model, config, **files)


def gemma(directory, **files):
  """Sentencepiece BPE without a space in front; white space is added tokens."""
  tokens = ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>']
  tokens.append('<end_of_turn>')
  model = _with_byte_fallback(tokens, '<unk>')
  model.normalizer = normalizers.Replace(' ', '\u2581')
  model.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  model.decoder = _sentencepiece_decoder(is_stripped=False)
  model.add_special_tokens(tokens)
  model.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False)
      for token in ('\n', '\n\n', '\u2581\u2581', '\u2581\u2581\u2581', '<h1>')
    ]
  )
  model.post_processor = bos_first('<bos>', 2)
  config = {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
  return write(directory, model, config, **files)


def unigram(directory, *, byte_fallback=False, **files):
  """Unigram, whose vocabulary holds the special tokens as pieces."""
  model = tokenizers.Tokenizer(models.Unigram())
  model.normalizer = normalizers.Sequence(
    [normalizers.Nmt(), normalizers.NFKC()]
  )
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Metaspace()
  tokens = ['<pad>', '</s>', '<unk>']
  trainer = trainers.UnigramTrainer(
    vocab_size=120,
    special_tokens=tokens,
    unk_token='<unk>',
    show_progress=False,
  )
  model.train_from_iterator(CORPUS * 3, trainer)
  content = json.loads(model.to_str())
  if byte_fallback:
    content['model']['byte_fallback'] = True
    content['model']['vocab'] += [[f'<0x{i:02X}>', -9.0] for i in range(256)]
    content['decoder'] = {
      'type': 'Sequence',
      'decoders': [{'type': 'ByteFallback'}, content['decoder']],
    }
  config = {'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
  return write(directory, json.dumps(content), config, **files)


def wordpiece(directory, **files):
  """WordPiece, split at spaces: punctuation does not protect '[SEP]'."""
  model = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  model.normalizer = normalizers.BertNormalizer(lowercase=False)
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  model.decoder = decoders.WordPiece()
  tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
  trainer = trainers.WordPieceTrainer(
    vocab_size=200, special_tokens=tokens, show_progress=False
  )
  model.train_from_iterator(CORPUS * 3, trainer)
  config = {
    'bos_token': '[CLS]',
    'eos_token': '[SEP]',
    'pad_token': '[PAD]',
    'unk_token': '[UNK]',
  }
  return write(directory, model, config, **files)


def spans_of(tok, text: str) -> list[tuple[int, int]]:
  """Returns where special tokens are if all of them are meant."""
  spans, position = [], 0
  tokens = sorted(tok.special_tokens, key=len, reverse=True)
  while position < len(text):
    token = next((t for t in tokens if text.startswith(t, position)), None)
    if token:
      spans.append((position, position + len(token)))
    position += len(token) if token else 1
  return spans


FAMILIES = {
  'gpt2': gpt2,
  'llama3': llama3,
  'qwen': qwen,
  'llama2': llama2,
  'llama2_normalized': functools.partial(llama2, normalized=True),
  'mistral': mistral,
  'phi3': phi3,
  'gemma': gemma,
  'unigram': unigram,
  'unigram_bytes': functools.partial(unigram, byte_fallback=True),
  'wordpiece': wordpiece,
}
