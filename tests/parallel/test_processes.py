"""Detection of the processes of a run from the environments of launchers.

tests/training/runs/test_several_processes.py starts real processes.
"""

import socket

import jax
from jax._src.clusters import cloud_tpu_cluster, cluster
import numpy as np
import pytest

from parallel import processes

Cluster = processes.Cluster

KUBERNETES = {
  'KUBERNETES_SERVICE_HOST': '10.96.0.1',
  'JAX_COORDINATOR_ADDRESS': 'train-0.train',
  'NUM_PROCESSES': '4',
  'JOB_COMPLETION_INDEX': '3',
}
TORCHRUN = {
  'MASTER_ADDR': 'node7',
  'MASTER_PORT': '29500',
  'WORLD_SIZE': '16',
  'RANK': '11',
}
SLURM = {
  'SLURM_JOB_ID': '4711',
  'SLURM_STEP_NODELIST': 'node[001-004]',
  'SLURM_NTASKS': '4',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
}
OPEN_MPI_4 = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}
TPU_POD = {'TPU_WORKER_HOSTNAMES': '10.0.0.1,10.0.0.2', 'TPU_WORKER_ID': '1'}
OPEN_MPI_5 = {
  'JAX_COORDINATOR_ADDRESS': '[fe80::1]:1234',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
}


@pytest.mark.parametrize(
  ('environ', 'expected'),
  [
    pytest.param({}, None, id='nothing'),
    pytest.param(
      KUBERNETES,
      Cluster(
        coordinator=f'train-0.train:{processes.DEFAULT_PORT}',
        num_processes=4,
        process_id=3,
      ),
      id='indexed_job',
    ),
    pytest.param(
      {**KUBERNETES, 'PROCESS_ID': '0', 'JAX_COORDINATOR_ADDRESS': 'a:1'},
      Cluster(coordinator='a:1', num_processes=4, process_id=0),
      id='process_id_before_job_index',
    ),
    pytest.param(
      # An Indexed Job of one program per pod, which is not one run.
      {'JOB_COMPLETION_INDEX': '3', 'KUBERNETES_SERVICE_HOST': '10.96.0.1'},
      None,
      id='job_of_single_processes',
    ),
    pytest.param({'NUM_PROCESSES': '1'}, None, id='pod_of_one'),
    pytest.param(
      TORCHRUN,
      Cluster(coordinator='node7:29500', num_processes=16, process_id=11),
      id='torch_style',
    ),
    pytest.param(
      {
        **TORCHRUN,
        'LOCAL_RANK': '3',
        'LOCAL_WORLD_SIZE': '8',
        'TORCHELASTIC_USE_AGENT_STORE': 'True',
      },
      Cluster(
        coordinator='node7:29501',  # torchrun itself has 29500
        num_processes=16,
        process_id=11,
        local_device_ids=(3,),
      ),
      id='torchrun_one_process_per_gpu',
    ),
    pytest.param(
      {'WORLD_SIZE': '1', 'RANK': '0'}, None, id='torch_style_of_one'
    ),
    pytest.param(SLURM, Cluster(method=None), id='srun'),
    pytest.param(
      {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, None, id='shell_in_allocation'
    ),
    pytest.param(
      {k: v for k, v in SLURM.items() if k != 'SLURM_STEP_NODELIST'},
      None,
      id='batch_script_outside_srun',
    ),
    pytest.param(OPEN_MPI_4, Cluster(method=None), id='mpirun_4'),
    pytest.param(
      OPEN_MPI_5,
      Cluster(coordinator='[fe80::1]:1234', num_processes=2, process_id=1),
      id='mpirun_5',
    ),
    pytest.param({'OMPI_COMM_WORLD_SIZE': '1'}, None, id='mpirun_of_one'),
    pytest.param(
      {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
      None,
      id='tpu_host',
    ),
    pytest.param(
      TPU_POD,
      Cluster(method=None),
      id='tpu_pod',
    ),
    pytest.param(
      {
        'TPU_WORKER_HOSTNAMES': '10.0.0.1',
        'MEGASCALE_COORDINATOR_ADDRESS': '10.0.0.1',
      },
      Cluster(method=None),
      id='tpu_slices_of_one_host',
    ),
  ],
)
def test_what_launchers_leave_is_understood(environ, expected):
  assert processes.detect(environ) == expected


@pytest.mark.parametrize(
  ('environ', 'host', 'count', 'index', 'devices'),
  [
    pytest.param(SLURM, 'node001', 4, 2, [0], id='srun'),
    pytest.param(OPEN_MPI_4, '10.96.0.1', 2, 1, [0], id='mpirun_4'),
    pytest.param(TPU_POD, '10.0.0.1', 2, 1, None, id='tpu_pod'),
  ],
)
def test_jax_finds_the_rest_by_the_method_that_is_named(
  monkeypatch, environ, host, count, index, devices
):
  """The values that `start` leaves to jax, without starting a cluster."""
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(
    cloud_tpu_cluster, 'running_in_cloud_tpu_vm', environ is TPU_POD
  )
  monkeypatch.setattr(cluster, 'running_in_cloud_tpu_vm', environ is TPU_POD)
  # jax would ask a metadata server for variables that are not set.
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  for name in ('COORDINATOR_ADDRESS', 'NUM_SLICES', 'SLICE_ID'):
    monkeypatch.setenv(f'MEGASCALE_{name}', '')
  found = processes.detect(environ)
  assert found is not None
  address, *rest = cluster.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, found.method, 1
  )
  assert address is not None
  assert address.rpartition(':')[0] == host
  assert rest == [count, index, devices]


def test_flags_come_first():
  assert processes.detect(
    SLURM | TORCHRUN, coordinator='host:12', num_processes=2, process_id=1
  ) == Cluster(coordinator='host:12', num_processes=2, process_id=1)
  assert processes.detect(TORCHRUN, coordinator='auto') == Cluster(method=None)


@pytest.mark.parametrize(
  ('environ', 'given', 'message'),
  [
    (
      {},
      {'num_processes': 2, 'process_id': 0},
      'got --num_processes=2, --process_id=0, expected --coordinator as well;'
      ' give all three or none',
    ),
    (
      {},
      {'coordinator': 'host:1'},
      'got --coordinator=host:1, expected --num_processes, --process_id',
    ),
    (
      {},
      {'coordinator': 'host:1', 'num_processes': 2, 'process_id': 2},
      '--process_id: got 2 with --num_processes=2, expected 0 to'
      ' --num_processes - 1; processes are counted from 0',
    ),
    (
      {},
      {'coordinator': 'host', 'num_processes': 2, 'process_id': 0},
      "--coordinator: got 'host', expected host:port of process 0",
    ),
    (
      {},
      {'coordinator': 'host:70000', 'num_processes': 2, 'process_id': 0},
      "--coordinator: got 'host:70000', expected host:port",
    ),
    (
      {},
      {'coordinator': 'auto', 'num_processes': 2},
      '--coordinator=auto: got --num_processes or --process_id as well,'
      ' expected neither',
    ),
    (
      {'NUM_PROCESSES': '4', 'JOB_COMPLETION_INDEX': '1'},
      {},
      'got NUM_PROCESSES=4, JOB_COMPLETION_INDEX=1, expected'
      ' JAX_COORDINATOR_ADDRESS as well',
    ),
    (
      {**KUBERNETES, 'NUM_PROCESSES': 'four'},
      {},
      "NUM_PROCESSES: got 'four', expected an integer",
    ),
    (
      {**TORCHRUN, 'RANK': '16'},
      {},
      'RANK: got 16 with WORLD_SIZE=16, expected 0 to WORLD_SIZE - 1',
    ),
    (
      {'RANK': '0', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'},
      {},
      'got MASTER_ADDR and MASTER_PORT=a:1, RANK=0, expected WORLD_SIZE',
    ),
    (
      {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'a'},
      {},
      'MASTER_PORT: got no value with WORLD_SIZE or RANK set, expected the',
    ),
    (
      {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1'},
      {},
      'got OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_RANK=1, expected'
      ' JAX_COORDINATOR_ADDRESS as well',
    ),
  ],
)
def test_half_a_cluster_is_refused(environ, given, message):
  with pytest.raises(ValueError) as caught:
    processes.detect(environ, **given)
  assert message in str(caught.value)


def test_a_timeout_of_nothing_is_refused():
  with pytest.raises(ValueError, match='heartbeat_timeout_s: got 0, expected'):
    processes.start(None, heartbeat_timeout_s=0)


def test_a_process_alone_waits_for_nobody():
  processes.start(None)
  assert not jax.distributed.is_initialized()
  assert processes.is_first()
  np.testing.assert_array_equal(processes.gather(3, 4), [[3, 4]])
  assert processes.agree(True)
  assert not processes.agree(False)
  with pytest.raises(ZeroDivisionError), processes.together('dividing'):
    _ = 1 / 0


def test_a_port_that_is_taken_is_refused():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(
      ValueError,
      match=f'--coordinator: got port {port}, which process 0 cannot',
    ):
      processes.start(
        processes.Cluster(
          coordinator=f'127.0.0.1:{port}', num_processes=2, process_id=0
        )
      )


def test_one_process_is_the_same_as_itself():
  processes.check_same('--config', 'anything')
