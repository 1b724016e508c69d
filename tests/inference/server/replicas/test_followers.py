"""A follower that has ended is started again, unless a signal has come."""

import os
import signal
import threading

import pytest

from inference.server.replicas import followers
from parallel import processes

_SETUP = followers.Setup(
  directory='',
  given={},
  cluster=processes.Cluster(num_processes=2, process_id=1),
  heartbeat_timeout_s=1.0,
  compilation_cache=None,
)


@pytest.fixture(name='handlers')
def _handlers():
  before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def test_a_signal_in_the_pause_starts_no_other_follower(monkeypatch, handlers):
  del handlers
  codes = []

  def follow(*_):
    codes.append(1)
    assert len(codes) == 1
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return 1

  monkeypatch.setattr(followers, '_follow_once', follow)
  assert followers.keep(_SETUP, environment={}, drain_seconds=1.0) == 1


def test_a_follower_that_crashes_is_started_again(monkeypatch, handlers):
  del handlers
  codes = [70, 0]
  monkeypatch.setattr(followers, '_follow_once', lambda *_: codes.pop(0))
  assert followers.keep(_SETUP, environment={}, drain_seconds=1.0) == 0
  assert not codes
