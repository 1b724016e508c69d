"""One corpus for all runs of tests/training: its files are only read."""

import pytest

from tests.helpers.training import tiny_run


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """Returns the path of a corpus, for `tiny_run.experiment`."""
  return tiny_run.write_corpus(tmp_path_factory.mktemp('corpus'))
