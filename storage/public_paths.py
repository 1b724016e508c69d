"""Paths in files that are given away: without the directories of a machine."""

import pathlib


def public(path: str) -> str:
  """Returns a path without the directories of this machine.

  They are private to the owner of the machine. The last plain name and the
  patterns after it remain: '/data/corpus/{split}/*.txt' becomes
  'corpus/{split}/*.txt'. A relative path is kept.
  """
  if not path.startswith(('/', '~')):
    return path
  parts = pathlib.PurePath(path).parts
  patterns = [i for i, part in enumerate(parts) if set(part) & set('*?[{')]
  first = max((patterns or [len(parts)])[0] - 1, 1)
  return '/'.join(parts[first:])
