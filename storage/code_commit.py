"""The commit of the running code, for files that record their origin."""

import pathlib
import subprocess

# Pages are no code. Tools rewrite some of them to note the commit.
_PAGES = ':(top,exclude,glob)**/*.md'


def find() -> str:
  """Returns the commit, with '-dirty' if code was edited; else 'unknown'."""
  try:
    commit = _git('rev-parse', 'HEAD')
    edited = _git('diff', '--name-only', 'HEAD', '--', ':(top)', _PAGES)
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return f'{commit}-dirty' if edited else commit


def _git(*arguments: str) -> str:
  done = subprocess.run(
    ['git', *arguments],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip()
