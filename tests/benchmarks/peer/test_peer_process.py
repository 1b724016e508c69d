"""Errors of a benchmark whose peer is missing or fails."""

import importlib.util

import pytest

from benchmarks.peer import peer_process


def test_missing_peer_is_refused_with_the_way_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='torch and transformers not installed'):
    peer_process.check_available()
  with pytest.raises(ValueError, match='fix: make bench-peer'):
    peer_process.PeerProcess({})


def test_an_accelerator_has_no_peer(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(peer_process.jax, 'default_backend', lambda: 'tpu')
  with pytest.raises(ValueError, match='got the tpu backend, expected cpu'):
    peer_process.check_available()


@pytest.mark.parametrize(
  ('backend', 'device'), [('gpu', 'cpu'), ('cpu', 'cuda')]
)
def test_a_peer_on_another_device_is_refused(monkeypatch, backend, device):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(peer_process.jax, 'default_backend', lambda: backend)
  with pytest.raises(ValueError, match=f'got the {backend} .* {device} for'):
    peer_process.PeerProcess({'device': device})


def test_different_sizes_are_refused():
  peer_process.check_same_size({'num_params': 7}, 7)
  with pytest.raises(ValueError, match='got 7 parameters, expected our 8'):
    peer_process.check_same_size({'num_params': 7}, 8)


def test_a_peer_that_dies_is_reported(monkeypatch, tmp_path):
  monkeypatch.setattr(peer_process, 'check_available', lambda: None)
  # `-m benchmarks.peer.peer_worker` finds this one: it leaves without an
  # answer.
  peer = tmp_path / 'benchmarks' / 'peer'
  peer.mkdir(parents=True)
  (peer / 'peer_worker.py').write_text('raise SystemExit(3)')
  monkeypatch.setattr(peer_process, '_ROOT', tmp_path)
  with pytest.raises(RuntimeError, match='exited with status 3'):
    peer_process.PeerProcess({'workload': 'any'})


def test_turns_go_over_the_pipe(monkeypatch, tmp_path):
  monkeypatch.setattr(peer_process, 'check_available', lambda: None)
  peer = tmp_path / 'benchmarks' / 'peer'
  peer.mkdir(parents=True)
  (peer / 'peer_worker.py').write_text(
    'import json, sys\n'
    'spec = json.loads(sys.stdin.readline())\n'
    'print(json.dumps({"echo": spec}), flush=True)\n'
    'for i, _ in enumerate(sys.stdin):\n'
    '  print(json.dumps({"seconds": i + 0.5}), flush=True)\n'
  )
  monkeypatch.setattr(peer_process, '_ROOT', tmp_path)
  with peer_process.PeerProcess({'a': 1}) as peer:
    assert peer.info == {'echo': {'a': 1}}
    assert [peer.turn(), peer.turn()] == [0.5, 1.5]
    process = peer._process
  assert process.returncode == 0
