"""The overlap of training and evaluation text: the n-grams that both have.

Before a run starts, it looks for the n-grams of tokens of the evaluation split
in each training source, and warns. The result is kept for each pair of token
stores. The command line compares files by their words, for any tokenizer:

    python -m data.contamination --train='corpus/train-*.parquet' \
      --eval=corpus/validation.jsonl

Words are lower-cased and without punctuation. An n-gram has 13 words, as for
GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C). A run takes n-grams of
13 tokens, which are a little less text, or of 50 bytes with a byte tokenizer,
as for GPT-4 (OpenAI 2023, arXiv:2303.08774, appendix C). A document counts as
copied if at least 80 % of its n-grams are found, as for Llama 2 (Touvron et al.
2023, arXiv:2307.09288, appendix A.6). Any two natural texts share some n-grams:
names, quotations, licences.
"""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import json
import pathlib
import re

import numpy as np

from data import row_order, token_store
from data.contamination import ngrams
from storage import atomic
from text import tokenizer as tokenizer_lib

TOKENS, BYTES, WORDS = 13, 50, 13
_COPIED = 0.8
# Tokens or documents in one pass; a pass over words has about as many.
_PIECE = 2**20
_PUNCTUATION = re.compile(r'[^\w\s]+')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
  """The part of an evaluation text that is also in a training source."""

  source: str  # name of the training source
  ngram: int  # length of an n-gram, in units
  unit: str  # tokens | words
  num_documents: int  # non-empty documents of the evaluation text
  num_touched: int  # documents with at least one n-gram found
  num_copied: int  # documents with at least 80 % of their n-grams found
  num_ngrams: int  # n-grams of the evaluation text
  num_found: int  # n-grams that are in the training text
  most_copied: list[int]  # indices of the first copied documents, at most 5

  @property
  def share(self) -> float:
    """Returns the share of n-grams that were found."""
    return self.num_found / max(self.num_ngrams, 1)

  def __str__(self) -> str:
    return (
      f'has {self.share:.2%} of the {self.ngram}-grams of'
      f' {self.unit} of the evaluation text; {self.num_copied:,} of its'
      f' {self.num_documents:,} documents are copied (at least {_COPIED:.0%}'
      f' found), {self.num_touched:,} share one'
    )


def default_ngram(tokenizer: tokenizer_lib.Tokenizer) -> int:
  """Returns the length of n-grams, in tokens of `tokenizer`."""
  return BYTES if tokenizer.kind == 'byte' else TOKENS


def between_stores(
  train: token_store.TokenStore, evaluated: token_store.TokenStore, ngram: int
) -> Overlap:
  """Returns the overlap of two stores of one tokenizer.

  The result is kept in a file beside the training tokens.
  """
  path = train.directory / f'overlap-{evaluated.digest[:32]}-{ngram}.json'
  if (kept := _read(path)) is not None:
    return dataclasses.replace(kept, source=train.name)
  header = _header(train, evaluated)
  documents = ngrams.Documents(*_text_of(evaluated, header), ngram)
  for first in range(0, train.num_ids, _PIECE):
    # Pieces overlap, so that no n-gram is missed at a border.
    piece_N = train.ids_N[first : first + _PIECE + ngram - 1]
    documents.mark(row_order.splitmix64(piece_N))
  for first in range(0, train.num_documents, _PIECE):
    documents.mark_documents(*_text_of(train, header, first, first + _PIECE))
  overlap = _overlap(documents, train.name, 'tokens')
  # In a read-only store, the next run looks for the overlap again.
  with contextlib.suppress(OSError):
    atomic.write_text(path, json.dumps(dataclasses.asdict(overlap)))
  return overlap


def between_texts(
  train: Iterable[str], evaluated: Iterable[str], ngram: int, name: str
) -> Overlap:
  """Returns the overlap of two texts, by their words."""
  words, edges = _words(evaluated)
  documents = ngrams.Documents(words, edges, ngram)
  texts = iter(train)
  while piece := list(_some(texts)):
    words_N, edges_D = _words(piece)
    documents.mark_documents(words_N, edges_D)
    # 0 is the code of no word, except by chance. Between two documents, it
    # keeps n-grams from spanning both.
    documents.mark(np.insert(words_N, edges_D[1:-1], np.uint64(0)))
  return _overlap(documents, name, 'words')


def _header(*stores: token_store.TokenStore) -> int:
  """Returns the number of ids after the first that all conversations share.

  These ids come from the chat template, such as its system prompt. They are no
  sign that one conversation was copied from another. 0 for text.
  """
  if not all(store.streams for store in stores):
    return 0
  begin = [s.starts_D[:-1] + np.arange(s.num_documents) for s in stores]
  # An answer never counts as a header, even if all answers are the same.
  longest = min(int(s.stream_N('trained').argmax()) for s in stores)
  shortest = min(int(np.diff(s.starts_D).min()) for s in stores)
  for length in range(1, min(longest, shortest)):
    heads = [s.ids_N[b + length] for s, b in zip(stores, begin, strict=True)]
    if any((head != heads[0][0]).any() for head in heads):
      return length - 1
  return max(0, min(longest, shortest) - 1)


def _text_of(
  store: token_store.TokenStore,
  header: int = 0,
  first: int = 0,
  end: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the codes of documents `first` to `end`, and their edges.

  Codes are without bos, header and eos; both results have the form that
  `ngrams.Documents` takes.
  """
  starts_D = store.starts_D[first : None if end is None else end + 1]
  edges_D = starts_D + np.arange(first, first + len(starts_D))
  codes_N = row_order.splitmix64(store.ids_N[edges_D[0] : edges_D[-1]])
  edges_D = edges_D - edges_D[0]
  if store.joined:
    return codes_N, edges_D
  is_text_N = np.ones(len(codes_N), bool)
  for place in range(1 + header):
    is_text_N[edges_D[:-1] + place] = False
  is_text_N[edges_D[1:] - 1] = False
  return codes_N[is_text_N], edges_D - (2 + header) * np.arange(len(edges_D))


def _overlap(documents: ngrams.Documents, name: str, unit: str) -> Overlap:
  total_D, found_D = documents.found_D()
  is_copied_D = (total_D > 0) & (found_D >= _COPIED * total_D)
  return Overlap(
    source=name,
    ngram=documents.ngram,
    unit=unit,
    num_documents=int((total_D > 0).sum()),
    num_touched=int((found_D > 0).sum()),
    num_copied=int(is_copied_D.sum()),
    num_ngrams=int(total_D.sum()),
    num_found=int(found_D.sum()),
    most_copied=np.flatnonzero(is_copied_D)[:5].tolist(),
  )


def _read(path: pathlib.Path) -> Overlap | None:
  """Returns the kept overlap; None if there is none, or it is damaged."""
  try:
    return Overlap(**json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):
    return None


def _some(texts: Iterator[str]) -> Iterator[str]:
  """Yields texts up to the size of one pass."""
  num_chars = 0
  for text in texts:
    yield text
    num_chars += len(text)
    if num_chars > _PIECE * 4:  # about _PIECE short words
      return


def _words(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes of all words, uint64, and edges of the texts, int64."""
  codes, edges = [], [0]
  for text in texts:
    words = _PUNCTUATION.sub('', text.lower()).split()
    # Hashes of str differ between processes; these are never stored.
    codes.append(np.fromiter(map(hash, words), np.int64, len(words)))
    edges.append(edges[-1] + len(words))
  joined_N = np.concatenate([*codes, np.zeros(0, np.int64)])
  return row_order.splitmix64(joined_N.view(np.uint64)), np.array(
    edges, np.int64
  )
