"""The commit of the code that runs, for everything that says who made it."""

import pathlib
import subprocess


def find() -> str:
  """Returns the commit, with '-dirty' if files were edited; else 'unknown'."""
  try:
    done = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=40'],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return done.stdout.strip()
