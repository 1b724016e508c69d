"""Files that a server may open: one for each connection, or a refusal."""

import resource

import pytest

from inference.server.http import listener


@pytest.fixture
def limits():
  """Restores the limits of this process."""
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  yield before
  resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_low_limit_of_files_is_raised_for_the_connections(limits):
  _, hard = limits
  resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
  listener.allow_files(400)
  soft, after = resource.getrlimit(resource.RLIMIT_NOFILE)
  assert soft > 400
  assert after == hard
  listener.allow_files(10)  # a limit that is high enough stays
  assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


def test_more_connections_than_the_system_allows_are_refused(monkeypatch):
  monkeypatch.setattr(resource, 'getrlimit', lambda _: (256, 400))
  with pytest.raises(ValueError, match='max_connections: got 400, expected at'):
    listener.allow_files(400)
