"""One prepared copy of the standard library for all tests of data/."""

import pytest

from data import sources


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A data directory in which `python_stdlib` is prepared."""
  directory = tmp_path_factory.mktemp('data_dir')
  sources.python_stdlib(split='train', data_dir=str(directory))
  return directory
