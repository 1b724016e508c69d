"""Perplexity and bits per byte of any text. The kind `perplexity`.

The file is one text, or JSON Lines {"text": "..."} with one document per line.
A text longer than the model's context is scored in windows that overlap:

    tokens      p 0 1 2 3 4 5 6 7 8 9        p: the prefix, never predicted
    window 1    p 0 1 2                      predicts 0 1 2 3
    window 2        1 2 3 4                  predicts 4 5        stride 2
    window 3            3 4 5 6              predicts 6 7        max_length 4

Every token is predicted exactly once. The first window predicts `max_length`
tokens, each later one `stride` tokens, all of these with at least max_length -
stride + 1 tokens of context. A small stride gives more context and takes
longer. The LM Evaluation Harness has a stride of max_length.

Bits per byte compare models with different tokenizers, because the text has the
same bytes for all of them.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
import os
import pathlib
from typing import NamedTuple, Self

import numpy as np

from evals import options as options_lib, ports
from evals.results import scores, statistics
from evals.tasks import records, task
from storage import digests

# An example is a piece of this many bytes. Tokens would not do as examples:
# neighbouring tokens err together, and they depend on the tokenizer.
PIECE_BYTES = 4096
# Windows scored per call: enough to fill any batch, few enough for memory.
_WINDOWS_PER_CALL = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `perplexity`: any text, or JSON Lines with a field `text`."""

  READS = ('limit', 'stride')
  ONLY_SCORES = True

  documents: tuple[str, ...]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the documents."""
    documents = tuple(read_documents(path))
    return cls(
      options=options, files={path: digests.of_file(path)}, documents=documents
    )

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: perplexity, nats per token, bits per byte."""
    group = measure(
      self.documents,
      model,
      stride=self.options.stride,
      max_pieces=self.options.limit,
    )
    return (group,)


def read_documents(path: str | os.PathLike) -> list[str]:
  """Returns the texts of a .jsonl, or the whole text of any other file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: it is not UTF-8, has no text, or a line is wrong.
  """
  if pathlib.Path(path).suffix == '.jsonl':
    found = records.read(path, required=('text',), optional=('id',))
    documents = [record.text('text') for record in found]
  else:
    documents = [records.read_text(path)]
  if not any(documents):
    raise ValueError(f'{path}: got no text, expected some')
  return documents


class Window(NamedTuple):
  """The position of a window; tokens count from 0, and the prefix is -1."""

  first_read: int  # first token of the context
  start: int  # the window predicts the tokens [start, end)
  end: int


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
  """Yields windows that together predict each token exactly once.

  Raises:
    ValueError: the stride is not in 1..max_length.
  """
  if not 1 <= stride <= max_length:
    raise ValueError(
      f'stride: got {stride}, expected 1 to max_length = {max_length}'
    )
  start, end = 0, min(max_length, num_tokens)
  while start < num_tokens:
    yield Window(max(end - max_length - 1, -1), start, end)
    start, end = end, min(end + stride, num_tokens)


def token_logprobs(
  model: ports.Model, ids: Sequence[int], stride: int
) -> np.ndarray:
  """Returns the log-probability of every token, in nats."""
  score = model.required_logprob_fn()
  read = [model.prefix, *ids]
  found = []
  requests = (
    # read[i + 1] is token i, since the prefix comes first.
    (read[w.first_read + 1 : w.start + 1], read[w.start + 1 : w.end + 1])
    for w in windows(len(ids), model.max_length, stride)
  )
  while call := list(itertools.islice(requests, _WINDOWS_PER_CALL)):
    for (_, continuation), scored in zip(call, score(call), strict=True):
      if len(scored.token_logprobs) != len(continuation):
        raise ValueError(
          f'logprob_fn: got {len(scored.token_logprobs)} token_logprobs of'
          f' {len(continuation)} tokens, expected one for each'
        )
      found.append(np.asarray(scored.token_logprobs, np.float64))
  return np.concatenate(found)


def measure(
  documents: Sequence[str],
  model: ports.Model,
  *,
  stride: int = 0,
  max_pieces: int = 0,
) -> scores.Group:
  """Returns perplexity, nats per token and bits per byte of the documents.

  Each document is scored on its own, after the model's prefix. Standard errors
  assume that documents are independent or, if there is only one, its pieces of
  PIECE_BYTES bytes.

  Args:
    stride: tokens that a window adds; 0 is half of the model's context.
    max_pieces: number of first pieces to score; 0 scores all.

  Raises:
    ValueError: there is no text.
  """
  stride = stride or max(model.max_length // 2, 1)
  documents, pieces_left = [text for text in documents if text], max_pieces
  rows: list[tuple[str, float, int, int]] = []  # document, nats, tokens, bytes
  ids, num_lossy = [], 0
  for index, text in enumerate(documents):
    if max_pieces:
      text = _first_bytes(text, pieces_left * PIECE_BYTES)
      pieces_left -= -(-len(text.encode()) // PIECE_BYTES)
    found, is_lossy = _document_rows(model, text, stride)
    num_lossy += is_lossy
    rows += [(str(index), *row) for row in found]
    # Saved results have 'block' for a piece.
    ids += [f'document {index} block {i}' for i in range(len(found))]
    if max_pieces and pieces_left <= 0:
      break
  if not rows:
    raise ValueError('documents: got no text, expected at least one token')
  notes = []
  if num_lossy:
    notes.append(
      f'the tokenizer does not give back {num_lossy} of the texts exactly:'
      ' bits per byte count the bits of its tokens and the bytes of the text'
    )
  return _group(rows, ids, stride, model, tuple(notes))


def _document_rows(model, text, stride):
  """Returns (nats, tokens, bytes) of each piece; whether any text is lost."""
  data = text.encode('utf-8')
  tokens = model.tokenizer.encode(text)
  if not tokens:
    raise ValueError(
      f'document: got {len(data)} bytes without a token, expected at least one'
      ' token'
    )
  logprobs = token_logprobs(model, tokens, stride)
  # The byte at which each token starts, exact for byte-level vocabularies.
  # Others may add bytes, such as a space in front. Then starts are scaled, so
  # that they fit the bytes of the text.
  sizes = np.asarray(model.tokenizer.num_bytes_V())[tokens].astype(np.float64)
  total = np.sum(sizes)
  starts = (np.cumsum(sizes) - sizes) * (len(data) / total if total else 0.0)
  num_pieces = -(-len(data) // PIECE_BYTES)
  piece = np.minimum(starts // PIECE_BYTES, num_pieces - 1).astype(int)
  nats = np.bincount(piece, weights=-logprobs, minlength=num_pieces)
  counts = np.bincount(piece, minlength=num_pieces)
  sizes = np.full(num_pieces, PIECE_BYTES)
  sizes[-1] = len(data) - PIECE_BYTES * (num_pieces - 1)
  rows = list(zip(nats.tolist(), counts.tolist(), sizes.tolist(), strict=True))
  return rows, model.tokenizer.decode(tokens) != text


def _group(rows, ids, stride, model, notes) -> scores.Group:
  names, nats, num_tokens, num_bytes = zip(*rows, strict=True)
  clusters = names if len(set(names)) > 1 else None
  per_token = statistics.ratio_values(nats, num_tokens)
  per_byte = statistics.ratio_values(nats, num_bytes)
  measured = (
    ('perplexity', per_token, 'token', True),
    ('nats_per_token', per_token, 'token', False),
    ('bits_per_byte', per_byte / math.log(2), 'byte', False),
  )
  return scores.Group(
    name='perplexity',
    scores=tuple(
      scores.of_values(
        name,
        values.tolist(),
        higher_is_better=False,
        clusters=clusters,
        per=per,
        is_exponential=is_exponential,
      )
      for name, values, per, is_exponential in measured
    ),
    num_examples=len(rows),
    example_ids=tuple(ids),
    clusters=clusters,
    details={
      'num_documents': len(set(names)),
      'num_tokens': sum(num_tokens),
      'num_bytes': sum(num_bytes),
      'nats': math.fsum(nats),
      'max_length': model.max_length,
      'stride': stride,
      'block_bytes': PIECE_BYTES,
    },
    notes=notes,
  )


def _first_bytes(text: str, num_bytes: int) -> str:
  """Returns the first characters of a text that fit into `num_bytes`."""
  return text.encode('utf-8')[:num_bytes].decode('utf-8', errors='ignore')
