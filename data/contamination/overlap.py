"""Evaluation text that is in the training text, too: n-grams they share.

A run looks for the evaluation split's n-grams of tokens in each of its training
sources before it starts, once for each pair of token stores, and warns. Files
are compared from the command line by their words, whatever the tokenizer:

    python -m data.contamination --train='corpus/train-*.parquet' \
      --eval=corpus/validation.jsonl

which are lower-cased and freed of punctuation, 13 at a time, as GPT-3's authors
did (Brown et al. 2020, arXiv:2005.14165, appendix C). Runs take 13 tokens, a
little less text, or 50 single bytes, as GPT-4's (OpenAI 2023, arXiv:2303.08774,
appendix C). A document of which at least 80 % is found counts as copied, as in
Llama 2 (Touvron et al. 2023, arXiv:2307.09288, appendix A.6). Natural text
shares some n-grams with any other: names, quotations, licences.
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
# Tokens, words or documents that are looked at together.
_PIECE = 2**20
_PUNCTUATION = re.compile(r'[^\w\s]+')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
  """What a training source has of an evaluation text."""

  source: str  # its name
  ngram: int
  unit: str  # an n-gram is so many of: tokens | words
  num_documents: int  # of the evaluation text; empty ones left out
  num_touched: int  # with an n-gram that is found
  num_copied: int  # with nearly all of them found
  num_ngrams: int
  num_found: int
  most_copied: list[int]  # indices of some that are

  @property
  def share(self) -> float:
    """Returns the share of n-grams that are found."""
    return self.num_found / max(self.num_ngrams, 1)

  def __str__(self) -> str:
    return (
      f'has {self.share:.2%} of the {self.ngram}-grams of'
      f' {self.unit} of the evaluation text; {self.num_copied:,} of its'
      f' {self.num_documents:,} documents are copied (at least {_COPIED:.0%}'
      f' found), {self.num_touched:,} share one'
    )


def default_ngram(tokenizer: tokenizer_lib.Tokenizer) -> int:
  """Returns how many tokens count as copied."""
  return BYTES if tokenizer.kind == 'byte' else TOKENS


def between_stores(
  train: token_store.TokenStore,
  evaluated: token_store.TokenStore,
  ngram: int,
) -> Overlap:
  """Returns what two stores of one tokenizer share, from a file if known."""
  path = train.directory / f'overlap-{evaluated.digest[:32]}-{ngram}.json'
  if path.is_file():
    return Overlap(**(json.loads(path.read_text()) | {'source': train.name}))
  documents = ngrams.Documents(*_text_of(evaluated), ngram)
  for first in range(0, train.num_ids, _PIECE):
    piece_N = train.ids_N[first : first + _PIECE + ngram - 1]
    documents.mark(row_order.splitmix64(piece_N))
  for first in range(0, train.num_documents, _PIECE):
    documents.mark_documents(*_text_of(train, first, first + _PIECE))
  overlap = _overlap(documents, train.name, 'tokens')
  _write(path, overlap)
  return overlap


def between_texts(
  train: Iterable[str], evaluated: Iterable[str], ngram: int, name: str
) -> Overlap:
  """Returns what two texts share, by their words."""
  words, edges = _words(evaluated)
  documents = ngrams.Documents(words, edges, ngram)
  texts = iter(train)
  while piece := list(_some(texts)):
    words_N, edges_D = _words(piece)
    documents.mark_documents(words_N, edges_D)
    # No word has this number but by chance: no n-gram spans two documents.
    documents.mark(np.insert(words_N, edges_D[1:-1], np.uint64(0)))
  return _overlap(documents, name, 'words')


def _text_of(
  store: token_store.TokenStore, first: int = 0, end: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes of some documents, bos and eos left out, and their edges."""
  starts_D = store.starts_D[first : None if end is None else end + 1]
  edges_D = starts_D + np.arange(first, first + len(starts_D))
  codes_N = row_order.splitmix64(store.ids_N[edges_D[0] : edges_D[-1]])
  edges_D = edges_D - edges_D[0]
  if store.joined:
    return codes_N, edges_D
  is_text_N = np.ones(len(codes_N), bool)
  is_text_N[edges_D[:-1]] = False
  is_text_N[edges_D[1:] - 1] = False
  return codes_N[is_text_N], edges_D - 2 * np.arange(len(edges_D))


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


def _write(path: pathlib.Path, overlap: Overlap) -> None:
  # A store that may only be read: the overlap is looked for again next time.
  with contextlib.suppress(OSError):
    atomic.write_text(path, json.dumps(dataclasses.asdict(overlap)))


def _some(texts: Iterator[str]) -> Iterator[str]:
  """Yields texts until there is enough for one pass."""
  num_chars = 0
  for text in texts:
    yield text
    num_chars += len(text)
    if num_chars > _PIECE * 4:
      return


def _words(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns uint64 codes of all words, and int64 edges of the texts."""
  codes, edges = [], [0]
  for text in texts:
    words = _PUNCTUATION.sub('', text.lower()).split()
    # Python's hash is drawn anew by every process, which no one needs to know.
    codes.append(np.fromiter(map(hash, words), np.int64, len(words)))
    edges.append(edges[-1] + len(words))
  joined_N = np.concatenate([*codes, np.zeros(0, np.int64)])
  return row_order.splitmix64(joined_N.view(np.uint64)), np.array(
    edges, np.int64
  )
