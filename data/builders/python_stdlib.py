"""TFDS builder `python_stdlib`: Python's standard library, one document a file.

The documents are the source files of the running interpreter's standard library
without its tests: 12 MB of real text that every machine with Python has. The
quickstart trains on them without a download.

Each interpreter version is a builder config of its own ('cpython_3.11.7'), so
the data of two interpreters never mix.
"""

from collections.abc import Iterator
import hashlib
import pathlib
import platform
import sysconfig

from absl import logging
import tensorflow_datasets as tfds

# Directories of tests and of installed packages. Files with these prefixes
# describe the machine that the interpreter was built on.
_SKIPPED_DIRS = frozenset(
  ('test', 'tests', 'idle_test', 'site-packages', 'dist-packages')
)
_SKIPPED_PREFIXES = ('_sysconfigdata', 'config-')

# Character maps: generated files that differ in a few lines. All of them are in
# the training split. With some of them in the validation split, 37 % of its
# 13-grams were in the training split.
_TRAINED_ON = 'encodings/'

# Cumulative share of the documents.
_SPLITS = (('train', 0.90), ('validation', 0.95), ('test', 1.0))


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Source files of the running interpreter's standard library."""

  VERSION = tfds.core.Version('1.1.0')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(
      name=f'{platform.python_implementation().lower()}_'
      f'{platform.python_version()}',
      description='Standard library of this interpreter, without its tests.',
    )
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'id': tfds.features.Text()}
      ),
      homepage='https://docs.python.org/3/library/',
      license='Python Software Foundation License Version 2',
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    documents = dict(documents_under(root))
    if not documents:
      raise FileNotFoundError(
        f'no .py files in {str(root)!r}, the standard library of this '
        'interpreter; use a Python that ships its source'
      )
    return {
      split: self._generate_examples(
        {key: text for key, text in documents.items() if split_of(key) == split}
      )
      for split, _ in _SPLITS
    }

  def _generate_examples(self, documents: dict[str, str]):
    for key, text in documents.items():
      yield key, {'text': text, 'id': key}


def documents_under(root: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (path relative to `root`, text) of every library source file."""
  for path in sorted(root.rglob('*.py')):
    relative = path.relative_to(root)
    if _SKIPPED_DIRS.intersection(relative.parts) or any(
      part.startswith(_SKIPPED_PREFIXES) for part in relative.parts
    ):
      continue
    try:
      # As bytes: text mode would change line ends.
      yield relative.as_posix(), path.read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      logging.warning('python_stdlib: left out %s, it is not UTF-8', path)


def split_of(key: str) -> str:
  """Returns the split of a document; it depends on the path only."""
  if key.startswith(_TRAINED_ON):
    return 'train'
  digest = hashlib.sha256(key.encode('utf-8')).digest()
  position = int.from_bytes(digest[:8]) / 2**64
  return next(split for split, end in _SPLITS if position < end)
