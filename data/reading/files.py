"""Paths to files: resolves a file, a directory or a glob, for one split."""

import glob
import os
import pathlib
import re

from checks import paths

SPLIT = '{split}'


def resolve(path: str, split: str, suffix: str) -> list[pathlib.Path]:
  """Returns the files of `split`, sorted.

  Args:
    path: a file, a directory (searched recursively, without hidden files) or a
      glob; '{split}' in it stands for the split's name.
    split: name of the split; must be 'all' if `path` has no '{split}'.
    suffix: ending of the files to take from a directory, such as '.jsonl'.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there is no such split, or `path` has no '{split}' for it.
  """
  if not path:
    raise ValueError('path is empty, expected a file, a directory or a glob')
  if SPLIT not in path:
    if split != 'all':
      # Without '{split}', every split would be the same files: evaluation text
      # would be training text.
      raise ValueError(
        f"path {path!r} has no '{SPLIT}', so split {split!r} cannot be told "
        f"from others; put '{SPLIT}' into the path or set the split to 'all'"
      )
    files = _match(paths.expanded('path', path), suffix)
    if not files:
      raise FileNotFoundError(
        f'no files at {path!r}; expected a file, a glob or a directory with '
        f'{suffix or "any"} files'
      )
    return files
  pattern = paths.expanded('path', path)
  files = _match(pattern.replace(SPLIT, glob.escape(split)), suffix)
  if not files:
    raise ValueError(
      f'no split {split!r} at {path!r}; available: '
      f'{", ".join(_available(pattern)) or "none, there are no such files"}'
    )
  return files


def _match(pattern: str, suffix: str) -> list[pathlib.Path]:
  """Returns the files that `pattern` names, sorted."""
  # An existing name is taken as it is, even with '[' or '*' in it.
  names = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
  found = []
  for path in map(pathlib.Path, names):
    if path.is_dir():
      found += [
        file
        for file in path.rglob(f'*{suffix}')
        if file.is_file() and not _is_hidden(file.relative_to(path))
      ]
    else:
      found.append(path)
  return sorted(found)


def _is_hidden(path: pathlib.Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


def _available(pattern: str) -> list[str]:
  """Returns the names that '{split}' in `pattern` could take."""
  expression = re.escape(pattern).replace(r'\*', '[^/]*').replace(r'\?', '.')
  marker = re.escape(SPLIT)
  # The first '{split}' captures the name, and later ones must repeat it. The
  # match is reluctant, so that 'train-00000.parquet' of '{split}-*.parquet'
  # gives 'train'.
  expression = expression.replace(marker, '(?P<split>[^/]+?)', 1)
  expression = expression.replace(marker, '(?P=split)')
  matches = (
    re.fullmatch(expression, name)
    for name in glob.glob(pattern.replace(SPLIT, '*'))
  )
  return sorted({match['split'] for match in matches if match})
