"""An audit of the data of a run: the tokens that are trained, and checks.

    python train.py --config=experiments/sft.py --audit=2

It makes the token stores and row plans that the run will read. It prints a few
rows of each source, with the trained tokens marked. It checks all documents of
all rows: BOS is at most once, at the start; each trained span ends with a stop
token; no target belongs to another document than its input. Answers that were
cut at the end of a row have no stop token, and are counted.
"""

from collections.abc import Iterator
import pathlib
import tempfile

import numpy as np

from data import data_config, rows as rows_lib
from data.examples import audit, encoding
from text import tokenizer as tokenizer_lib
from training import assemble, experiment as experiment_lib

_NAMES = {
  'pairs': ('chosen', 'rejected'),
  'labelled': ('example', 'mismatched'),
}


def report(
  experiment: experiment_lib.Experiment, num_rows: int
) -> Iterator[str]:
  """Yields lines about the data of a run, evaluation split included.

  Args:
    experiment: the experiment of the run.
    num_rows: number of rows to print for each source.

  Raises:
    ValueError, FileNotFoundError: the experiment or its data cannot be used, or
      a check has failed.
  """
  experiment.validate()
  if experiment.rollouts:
    raise ValueError(
      '--audit: got an experiment with rollouts, expected fixed data: its'
      ' policy samples the rows; read samples.jsonl in the workdir of a run'
    )
  documents = assemble.open_documents(experiment)
  with tempfile.TemporaryDirectory() as directory:
    workdir = pathlib.Path(directory)
    tokenizer = assemble.open_tokenizer(workdir, experiment, documents)
    template = assemble.chat_template(experiment, workdir)
  opened = assemble.open_rows(experiment, tokenizer, documents, template)
  for rows in opened:
    yield (
      f'{rows.name}: {rows.store.num_documents:,} documents in'
      f' {rows.num_rows:,} rows of {rows.row_length}, {rows.fill_rate:.2%}'
      f' filled, {rows.trained_share:.2%} of the targets trained'
    )
    for why, count in sorted(rows.store.counts.items()):
      yield f'WARNING: {count:,} records {why}'
    for row in range(min(num_rows, rows.num_rows)):
      yield from _shown(experiment, rows, row, tokenizer)
    yield _checked(experiment, rows, tokenizer)


def _shown(
  experiment: experiment_lib.Experiment,
  rows: rows_lib.Rows,
  row: int,
  tokenizer: tokenizer_lib.Tokenizer,
) -> Iterator[str]:
  """Yields the documents of a row as text, trained tokens marked."""
  documents = list(_documents(rows, row))
  targets = sum(len(document.ids) - 1 for document in documents)
  trained = sum(int(document.trained[1:].sum()) for document in documents)
  yield f'row {row}: {trained} of {targets} targets are trained'
  names = _NAMES.get(experiment.data.examples, ('',))
  for i, document in enumerate(documents):
    name = f'{i + 1} {names[i % len(names)]}'.strip()
    yield f'  [{name}] {audit.render(document, tokenizer)}'


def _documents(rows: rows_lib.Rows, row: int) -> Iterator[encoding.Document]:
  """Yields the documents of a row: their inputs and the last target."""
  store = rows.store
  for start, length in zip(*rows.plan.pieces(row), strict=True):
    piece = slice(int(start), int(start + length) + 1)
    ids = np.asarray(store.ids_N[piece], np.int64)
    trained = np.ones(len(ids), bool)
    if 'trained' in store.streams:
      trained = store.stream_N('trained')[piece] > 0
    yield encoding.Document(ids, trained)


def _checked(
  experiment: experiment_lib.Experiment,
  rows: rows_lib.Rows,
  tokenizer: tokenizer_lib.Tokenizer,
) -> str:
  """Checks all rows; returns a line with the findings."""
  is_text = experiment.data.examples == data_config.TEXT
  num_pieces = num_cut = 0
  for row in range(rows.num_rows):
    _check_borders(rows, row)
    for document in _documents(rows, row):
      num_pieces += 1
      if is_text:
        continue
      if document.trained[-1]:
        num_cut += 1
        document = _before_last_span(document)
      if document.trained.any():
        try:
          audit.check(document, tokenizer)
        except ValueError as error:
          raise ValueError(f'{rows.name}: row {row}: {error}') from None
  line = (
    f'checked {num_pieces:,} pieces of {rows.name}: no target is of another'
  )
  if is_text:
    return f'{line} document'
  cut = f'; {num_cut:,} answers were cut, without one' if num_cut else ''
  return f'{line} document, one BOS at most, all answers end to stop{cut}'


def _check_borders(rows: rows_lib.Rows, row: int) -> None:
  """Raises ValueError if a piece reaches into another document."""
  store = rows.store
  starts, lengths = rows.plan.pieces(row)
  # Document d has the ids from starts_D[d] + d to starts_D[d + 1] + d.
  first_D = store.starts_D[:-1] + np.arange(store.num_documents)
  which = np.searchsorted(first_D, starts, side='right') - 1
  ends = store.starts_D[which + 1] + which
  if (starts + lengths > ends).any() and not store.joined:
    raise ValueError(
      f'{rows.name}: got a target of another document than its input in row'
      f' {row}, expected none: the row plan is wrong'
    )


def _before_last_span(document: encoding.Document) -> encoding.Document:
  """Returns a document without the trained mark of a cut answer."""
  trained = document.trained.copy()
  last = np.flatnonzero(~trained)
  trained[last[-1] + 1 if len(last) else 0 :] = False
  return encoding.Document(document.ids, trained)
