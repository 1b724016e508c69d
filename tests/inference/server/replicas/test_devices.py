"""The devices of each replica, by variables of its environment."""

import pytest

from inference.server.replicas import devices


def _environment(index, num_replicas=2, num_devices=1, num_gpus=0, **inherited):
  return devices.environment(
    index,
    num_replicas=num_replicas,
    num_devices=num_devices,
    inherited=inherited,
    num_gpus=num_gpus,
  )


def test_one_replica_sees_what_the_server_sees():
  assert _environment(0, num_replicas=1, num_devices=8) == {}


def test_each_replica_sees_its_own_devices():
  first, second = (_environment(i, num_devices=2) for i in range(2))
  for name in ('CUDA_VISIBLE_DEVICES', 'TPU_VISIBLE_CHIPS'):
    assert (first[name], second[name]) == ('0,1', '2,3')
  assert first['TPU_CHIPS_PER_PROCESS_BOUNDS'] == '1,2,1'
  assert first['TPU_PROCESS_BOUNDS'] == '1,1,1'
  chosen = _environment(1, CUDA_VISIBLE_DEVICES='4,6,GPU-8f')
  assert chosen['CUDA_VISIBLE_DEVICES'] == '6'
  # A server without GPUs has replicas without.
  assert _environment(1, CUDA_VISIBLE_DEVICES='')['CUDA_VISIBLE_DEVICES'] == ''


def test_too_few_devices_and_slices_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match='2 replicas of 2 devices .* the 3 dev'):
    _environment(0, num_devices=2, CUDA_VISIBLE_DEVICES='0,1,2')
  with pytest.raises(ValueError, match='3 chips each, expected one of 1, 2, 4'):
    _environment(0, num_devices=3, TPU_VISIBLE_CHIPS='0,1,2,3,4,5')
  assert 'TPU_VISIBLE_CHIPS' not in _environment(0, num_devices=3)


def test_more_replicas_than_gpus_are_refused():
  with pytest.raises(
    ValueError,
    match='2 replicas of 2 devices each, expected at most the 3 GPUs of this',
  ):
    _environment(0, num_devices=2, num_gpus=3)
  # Enough, or none that the replicas would use.
  assert _environment(0, num_gpus=2)['CUDA_VISIBLE_DEVICES'] == '0'
  _environment(0, num_devices=2, num_gpus=3, JAX_PLATFORMS='cpu')
