"""Compares files of training and evaluation text from the command line.

    python -m data.contamination --train='corpus/train-*.parquet' \
      --eval=corpus/validation.jsonl

Counts the n-grams of words of the evaluation text that are in the training
text, too; `data/contamination/overlap.py` defines a word.
"""

from collections.abc import Iterator
import pathlib
import sys

from absl import app, flags

from data import sources
from data.contamination import overlap as overlap_lib

# Readers by a file's ending; all other files are read as plain text.
_OPENERS = {'.jsonl': sources.jsonl, '.parquet': sources.parquet}


def _texts(path: str, text_key: str) -> Iterator[str]:
  """Yields the text of every document of a file or a glob."""
  open_source = _OPENERS.get(pathlib.PurePath(path).suffix, sources.text_files)
  source = open_source(path, 'all', '', text_key)
  for i in range(len(source)):
    yield source[i]['text']


def main(argv: list[str]) -> None:
  """Prints the overlap of the files that the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  try:
    overlap = overlap_lib.between_texts(
      _texts(values.train, values.text_key),
      _texts(values.eval, values.text_key),
      values.ngram,
      values.train,
    )
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  print(overlap.source, overlap)
  if overlap.most_copied:
    indices = ', '.join(map(str, overlap.most_copied))
    print(f'copied documents, counted from 0: {indices}')


if __name__ == '__main__':
  flags.DEFINE_string(
    'train',
    None,
    'Training text: a file, a directory or a glob of .jsonl, .parquet or plain'
    ' text files.',
    required=True,
  )
  flags.DEFINE_string(
    'eval', None, 'Evaluation text, in the same forms.', required=True
  )
  flags.DEFINE_string(
    'text_key',
    'text',
    'Field (.jsonl) or column (.parquet) that holds the text of a document.',
  )
  flags.DEFINE_integer(
    'ngram', overlap_lib.WORDS, 'Words per n-gram, 1 or more.', 1
  )
  app.run(main)
