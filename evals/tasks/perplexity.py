"""Perplexity and bits per byte of any text.

A text longer than the model reads is scored in windows that overlap:

    tokens      p 0 1 2 3 4 5 6 7 8 9        p: the prefix, predicted by nobody
    window 1    p 0 1 2                      predicts 0 1 2 3
    window 2        1 2 3 4                  predicts 4 5        stride 2
    window 3            3 4 5 6              predicts 6 7        max_length 4

Every token is predicted exactly once. The first window predicts `max_length`
tokens, each later one `stride`, all with at least max_length - stride + 1
tokens of context. A small stride gives more context and takes longer; a stride
of max_length is what the LM Evaluation Harness does.

Bits per byte compare models whatever their tokenizers: the bytes are those of
the text itself.
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

# An example is so much text. Neighbouring tokens err together, and blocks of
# text are the same for every tokenizer, which tokens are not.
BLOCK_BYTES = 4096
# Windows scored per call: enough for any batch, few enough to hold.
_WINDOWS_PER_CALL = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `perplexity`: any text, or JSON Lines with a field `text`."""

  READS = ('limit', 'stride')

  documents: tuple[str, ...]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads the documents."""
    return cls(
      options=options,
      files={path: digests.of_file(path)},
      documents=tuple(read_documents(path)),
    )

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns one group: perplexity, nats per token, bits per byte."""
    group = measure(
      self.documents,
      model,
      stride=self.options.stride,
      max_blocks=self.options.limit,
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
  """Where a window lies; tokens are counted from 0, the prefix is -1."""

  first_read: int
  start: int  # predicts [start, end)
  end: int


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
  """Yields windows that together predict each token once.

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
  score = model.scores()
  read = [model.prefix, *ids]
  found = []
  requests = (
    # read[i + 1] is token i.
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
  max_blocks: int = 0,
) -> scores.Group:
  """Returns perplexity, nats per token and bits per byte of the documents.

  Each document is scored from the model's prefix on. Standard errors take
  blocks of BLOCK_BYTES bytes for independent, or documents where there are
  several.

  Args:
    documents: texts; empty ones are left out.
    model: scores them.
    stride: tokens that a window adds; 0 is half of what the model reads.
    max_blocks: stop after so many blocks of text; 0 takes all.

  Raises:
    ValueError: there is no text.
  """
  stride = stride or max(model.max_length // 2, 1)
  documents, blocks_left = [text for text in documents if text], max_blocks
  rows: list[tuple[str, float, int, int]] = []  # document, nats, tokens, bytes
  ids, num_lossy = [], 0
  for index, text in enumerate(documents):
    if max_blocks:
      text = _first_bytes(text, blocks_left * BLOCK_BYTES)
      blocks_left -= -(-len(text.encode()) // BLOCK_BYTES)
    found, is_lossy = _document_rows(model, text, stride)
    num_lossy += is_lossy
    rows += [(str(index), *row) for row in found]
    ids += [f'document {index} block {i}' for i in range(len(found))]
    if max_blocks and blocks_left <= 0:
      break
  if not rows:
    raise ValueError('got no text, expected at least one token to predict')
  notes = []
  if num_lossy:
    notes.append(
      f'the tokenizer does not give back {num_lossy} of the texts as they are:'
      ' bits per byte are of what it keeps'
    )
  return _group(rows, ids, stride, model, tuple(notes))


def _document_rows(model, text, stride):
  """Returns (nats, tokens, bytes) of each block; whether any text is lost."""
  data = text.encode('utf-8')
  tokens = model.tokenizer.encode(text)
  if not tokens:
    raise ValueError(
      f'got a text of {len(data)} bytes that is no tokens, expected some'
    )
  logprobs = token_logprobs(model, tokens, stride)
  # Where each token starts: exact for byte-level vocabularies; where the bytes
  # of tokens do not add up (a space put in front), stretched until they do.
  sizes = np.asarray(model.tokenizer.num_bytes_V())[tokens].astype(np.float64)
  total = np.sum(sizes)
  starts = (np.cumsum(sizes) - sizes) * (len(data) / total if total else 0.0)
  num_blocks = -(-len(data) // BLOCK_BYTES)
  block = np.minimum(starts // BLOCK_BYTES, num_blocks - 1).astype(int)
  nats = np.bincount(block, weights=-logprobs, minlength=num_blocks)
  counts = np.bincount(block, minlength=num_blocks)
  sizes = np.full(num_blocks, BLOCK_BYTES)
  sizes[-1] = len(data) - BLOCK_BYTES * (num_blocks - 1)
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
      'block_bytes': BLOCK_BYTES,
    },
    notes=notes,
  )


def _first_bytes(text: str, num_bytes: int) -> str:
  """Returns as many whole characters as fit."""
  return text.encode('utf-8')[:num_bytes].decode('utf-8', errors='ignore')
