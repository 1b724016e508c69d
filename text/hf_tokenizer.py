"""Tokenizers in a `tokenizer.json`, of open models and of this project.

    python -c "from text import hf_tokenizer; hf_tokenizer.convert(DIR, OUT)"

Ids and decoded text equal the results of `transformers` on the same file
for all kinds: byte-level BPE (GPT-2, Llama 3, Qwen), sentencepiece's BPE with
byte fallback (Llama 2, Mistral, Gemma), Unigram and WordPiece. Some tokenizers
change text: they normalise it, lack rare characters, read '\u2581' as a space,
or drop a space at the start. For these, `decode` does not always return the
text, and `is_exact` is False. A few classes of `transformers` 5, such as
`LlamaTokenizer`, ignore the pipeline in the file and build their own. The files
that they save agree with their own pipeline. `TokenizersBackend` of
`transformers` reads older files in the same way as this module.

No text becomes a special token. The option of the library for that,
`encode_special_tokens`, is not enough: a Unigram or WordPiece model still finds
'</s>' in its vocabulary like any other piece. So the special tokens of the
model that encodes have other strings: random ones, drawn at load, which no text
can have. `encode_marked` puts these strings where a template wrote a special
token. Added tokens that are not special ('<think>' in some models) are ordinary
vocabulary and are found in any text.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
import pathlib
import re
import secrets
from typing import Any

import numpy as np
import tokenizers

from text import hf_files, hf_pieces, spans as spans_lib, utf8

_BYTE_TOKEN = re.compile('<0x[0-9A-Fa-f]{2}>')
# Text that changes under any normalizer, prefix space, missing character, or
# sentencepiece's sign for a space.
_PROBE = (
  ' caf\u00e9 cafe\u0301  \t\r\n\x00x \ufb01 \U0001f600\ufffd \u2581\u65e5 '
)


class HuggingFaceTokenizer:
  """A tokenizer in a `tokenizer.json`.

  A vocabulary may lack special tokens. Without BOS, `bos_id` is EOS, which
  separated the documents of such models in training. Without padding, `pad_id`
  is EOS; its value has no effect. `names` has the tokens that exist.
  """

  def __init__(self, files: hf_files.Files):
    """Makes a tokenizer of the files that `hf_files` has read.

    Raises:
      ValueError: the files are damaged, contradict each other, or describe a
        tokenizer that is not supported.
    """
    self._files = dict(files)
    found = hf_files.specification(self._files)
    if found.is_cleaned and 'merges' not in found.model['model']:
      raise ValueError(
        f'{hf_files.CONFIG}: got clean_up_tokenization_spaces true, expected'
        ' false: it would change text that was already streamed; set it to'
        ' false'
      )
    self.kind = found.kind
    self.names: Mapping[str, str] = found.names
    self.special_tokens: Mapping[str, int] = found.specials
    self._hidden = _hidden_names(found)
    self._model = _hide(found.model, self._hidden)
    self._special_ids = frozenset(found.specials.values())
    tokens = _tokens(found.model)
    self.vocab_size = 1 + max(tokens)
    self.missing_ids: Sequence[int] = sorted(
      set(range(self.vocab_size)) - tokens.keys()
    )
    self._pieces = hf_pieces.tabulate(
      found.model.get('decoder'),
      {i: text for i, text in tokens.items() if i not in self._special_ids},
      self.vocab_size,
    )
    self.eos_ids = self._all_eos_ids(found.eos_ids)
    self.eos_id = self.eos_ids[0]
    self.bos_id = self._named_id('bos_token', self.eos_id)
    self.pad_id = self._named_id('pad_token', self.eos_id)
    self.adds_bos, self.adds_eos = self._added_around_text()
    self.is_exact = all(
      self.decode(self.encode(text)) == text for text in (_PROBE, _PROBE[1:])
    )
    if self.kind == hf_files.TRAINED and not self.is_exact:
      raise ValueError(
        f'{hf_files.MODEL}: got a tokenizer of kind {self.kind} that changes'
        ' text, expected a byte-level BPE without normalizer or prefix space'
      )

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without special ids; UNK may be among them.

    Raises:
      ValueError: `text` holds a lone surrogate.
    """
    return self._encode(text).ids

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, int32; on all cores.

    Raises:
      ValueError: a text holds a lone surrogate.
    """
    try:
      encodings = self._model.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except (TypeError, UnicodeEncodeError):
      for text in texts:
        utf8.encode(text)  # its error has the place of the surrogate
      raise
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_marked(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> spans_lib.Encoded:
    """Returns the ids of a rendered template; special tokens are at `spans`.

    They equal the ids of `transformers` for a text with no other special
    tokens.
    """
    spans = list(spans)
    while True:
      replaced, moved = self._with_hidden(text, spans)
      encoding = self._encode(replaced)
      # The library does not match some special tokens everywhere (single_word,
      # normalized). There, `transformers` reads them as text, and so do we.
      lost = _lost(encoding, moved, [self._id_at(text, span) for span in spans])
      if not lost:
        return _moved_back(encoding, spans, moved)
      spans = [span for i, span in enumerate(spans) if i not in lost]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, with U+FFFD for bytes that are not UTF-8.

    Special ids are left out. If `encode` adds a space in front of every text,
    that space is removed, even from ids that continue a text.
    """
    parts: list[bytes] = []
    for token_id in ids:
      inside = self.token_bytes(token_id)
      # Special ids do not count as the start of the text.
      is_start = not parts
      part = self.first_bytes(token_id) if is_start else inside
      if inside or part:
        parts.append(part)
    return utf8.decode(b''.join(parts))

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of `token_id` inside a text, b'' for a special id.

    Raises:
      ValueError: `token_id` is not in the vocabulary.
    """
    if not 0 <= token_id < self.vocab_size:
      raise ValueError(
        f'got token id {token_id}, expected 0 <= id < {self.vocab_size}; is '
        'this the tokenizer that the model was trained with?'
      )
    return self._pieces.inside[token_id]

  def first_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of `token_id` at the start of a text."""
    inside = self.token_bytes(token_id)
    return self._pieces.at_start.get(token_id, inside)

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V], bytes per id inside a text, 0 for special ids."""
    return np.array([len(b) for b in self._pieces.inside], np.int32)

  def chat_templates(self) -> dict[str, str]:
    """Returns the chat templates by name; a single one is 'default'."""
    return hf_files.chat_templates(self._files)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files into `directory`, unchanged."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in self._files.items():
      (directory / name).write_bytes(data)

  def _encode(self, text: str) -> tokenizers.Encoding:
    try:
      return self._model.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
      utf8.encode(text)  # its error has the place of the surrogate
      raise

  def _named_id(self, name: str, default: int) -> int:
    token = self.names.get(name)
    return default if token is None else self.special_tokens[token]

  def _all_eos_ids(self, recommended: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the ids that end a text; the tokenizer's own id is first.

    If generation_config.json lists only other ids, only these ids end a text.
    """
    own = self._named_id('eos_token', -1)
    if own >= 0 and (own in recommended or not recommended):
      return (own, *(i for i in recommended if i != own))
    if not recommended:
      raise ValueError(
        f'got a tokenizer without an end of text, expected eos_token in'
        f' {hf_files.CONFIG} or eos_token_id in {hf_files.GENERATION}; add one'
      )
    return recommended

  def _added_around_text(self) -> tuple[bool, bool]:
    """Returns whether training put BOS before, and EOS after, each text.

    Raises:
      ValueError: the post-processor adds other ids.
    """
    bos, eos = ([self._named_id(n, -1)] for n in ('bos_token', 'eos_token'))
    encoding = self._model.encode('a', add_special_tokens=True)
    ids, mask = encoding.ids, encoding.special_tokens_mask
    # A vocabulary without the letter 'a' gives no text ids: BOS is counted as
    # being before the text.
    first = mask.index(0) if 0 in mask else len(bos) * (ids[:1] == bos)
    before, after = ids[:first], ids[first + mask.count(0) :]
    if before not in ([], bos) or after not in ([], eos):
      raise ValueError(
        f'{hf_files.MODEL}: its post_processor puts the ids {before} before and'
        f' {after} after a text, expected BOS {bos} and EOS {eos} at most; name'
        f' them bos_token and eos_token in {hf_files.CONFIG}'
      )
    return bool(before), bool(after)

  def _id_at(self, text: str, span: spans_lib.Span) -> int:
    token = text[slice(*span)]
    if token not in self.special_tokens:
      raise ValueError(
        f'got {token!r} at {span}, expected one of the special tokens'
        f' {", ".join(self.special_tokens)}'
      )
    return self.special_tokens[token]

  def _with_hidden(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> tuple[str, list[spans_lib.Span]]:
    """Returns `text` with hidden strings at `spans`, and their new spans."""
    parts: list[str] = []
    moved = []
    position = length = 0
    for start, end in spans:
      token = text[start:end]
      parts += [text[position:start], self._hidden.get(token, token)]
      length += start - position
      moved.append((length, length + len(parts[-1])))
      length, position = moved[-1][1], end
    return ''.join((*parts, text[position:])), moved


def convert(
  source: str | os.PathLike, out: str | os.PathLike
) -> HuggingFaceTokenizer:
  """Reads the tokenizer of a Hugging Face directory and saves it in `out`.

  The saved files load here and in `transformers`.

  Raises:
    FileNotFoundError: there is no `tokenizer.json`; tells how to make one.
    ValueError: the tokenizer is damaged or cannot be used here.
  """
  try:
    tokenizer = HuggingFaceTokenizer(hf_files.read_source(source))
  except ValueError as error:
    raise ValueError(f'{os.fspath(source)}: {error}') from None
  tokenizer.save(out)
  return tokenizer


def load(directory: str | os.PathLike) -> HuggingFaceTokenizer:
  """Returns the tokenizer that `convert` or `save` has written.

  Raises:
    FileNotFoundError: there is no `tokenizer.json`.
    ValueError: the files are damaged.
  """
  try:
    return HuggingFaceTokenizer(hf_files.read_saved(directory))
  except ValueError as error:
    raise ValueError(f'{os.fspath(directory)}: {error}') from None


def _tokens(model: Mapping[str, Any]) -> dict[int, str]:
  """Returns the string of every id."""
  vocab = model['model']['vocab']
  if isinstance(vocab, dict):
    tokens = {i: token for token, i in vocab.items()}
  else:  # Unigram: pieces and their scores
    tokens = {i: piece for i, (piece, _) in enumerate(vocab)}
  return tokens | {t['id']: t['content'] for t in model['added_tokens']}


def _hidden_names(found: hf_files.Specification) -> dict[str, str]:
  """Returns a random string for every special token."""
  secret = secrets.token_hex(16)  # characters that no normalizer changes
  has_bytes = bool(found.model['model'].get('byte_fallback'))
  return {
    token: f'{secret}{i:06d}'
    for i, token in enumerate(found.specials)
    # The library finds byte tokens by their strings, so they stay.
    if not (has_bytes and _BYTE_TOKEN.fullmatch(token))
  }


def _hide(
  model: Mapping[str, Any], hidden: Mapping[str, str]
) -> tokenizers.Tokenizer:
  """Loads `tokenizer.json` with other strings for the special tokens."""
  inner = dict(model['model'])
  if isinstance(inner['vocab'], dict):
    inner['vocab'] = {hidden.get(t, t): i for t, i in inner['vocab'].items()}
  else:
    inner['vocab'] = [[hidden.get(t, t), score] for t, score in inner['vocab']]
  if inner.get('unk_token') is not None:
    inner['unk_token'] = hidden.get(inner['unk_token'], inner['unk_token'])
  if inner.get('merges'):
    pairs = (_pair(merge) for merge in inner['merges'])
    # A merge that spells a special token would name a string that is not in the
    # vocabulary any more, which the library refuses.
    inner['merges'] = [
      [left, right]
      for left, right in pairs
      if not {left, right, left + right} & hidden.keys()
    ]
  added = [
    token | {'content': hidden.get(token['content'], token['content'])}
    for token in model['added_tokens']
  ]
  loaded = hf_files.load_model({**model, 'model': inner, 'added_tokens': added})
  loaded.no_truncation()
  loaded.no_padding()
  return loaded


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
  """Returns both sides of a merge; files of before 2024 have one string."""
  return merge.split(' ', 1) if isinstance(merge, str) else merge


def _lost(
  encoding: tokenizers.Encoding,
  spans: Sequence[spans_lib.Span],
  ids: Sequence[int],
) -> set[int]:
  """Returns the indices of the spans that did not become their id."""
  wanted = set(ids)
  found = {
    (token_id, offset)
    for token_id, (start, end) in zip(
      encoding.ids, encoding.offsets, strict=True
    )
    if token_id in wanted
    for offset in range(start, end)
  }
  return {
    i
    for i, (token_id, (start, _)) in enumerate(zip(ids, spans, strict=True))
    if (token_id, start) not in found
  }


def _moved_back(
  encoding: tokenizers.Encoding,
  spans: Sequence[spans_lib.Span],
  moved: Sequence[spans_lib.Span],
) -> spans_lib.Encoded:
  """Returns the encoding with offsets into the original text.

  Args:
    encoding: encoding of the text with hidden strings.
    spans: spans of special tokens in the original text.
    moved: spans of the same tokens in the text with hidden strings.
  """
  # Pairs (position with hidden strings, original position) at which the
  # difference of both changes.
  corners = [(0, 0)]
  for (start, end), (moved_start, moved_end) in zip(spans, moved, strict=True):
    corners += [(moved_start, start), (moved_end, end)]
  offsets = []
  current = 0
  for start, end in encoding.offsets:
    while current + 1 < len(corners) and corners[current + 1][0] <= start:
      current += 1
    offsets.append((_at(corners, current, start), _at(corners, current, end)))
  return spans_lib.Encoded(encoding.ids, offsets)


def _at(corners: Sequence[tuple[int, int]], current: int, position: int) -> int:
  while current + 1 < len(corners) and corners[current + 1][0] <= position:
    current += 1
  moved, original = corners[current]
  return original + position - moved
