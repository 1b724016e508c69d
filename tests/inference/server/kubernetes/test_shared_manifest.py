"""The manifest of an engine over two pods: who is first, and how they meet."""

import pathlib

from absl import flags
import pytest
import yaml

from inference.server.replicas import followers
from parallel import processes
import serve
from tests.helpers import commands

_PATH = pathlib.Path(__file__).parents[4] / (
  'inference/server/kubernetes/shared.yaml'
)


@pytest.fixture(scope='module')
def documents():
  found = yaml.safe_load_all(_PATH.read_text(encoding='utf-8'))
  return {each['metadata']['name'] + each['kind']: each for each in found}


@pytest.fixture(scope='module')
def pods(documents):
  return documents['two-lives-sharedStatefulSet']


@pytest.fixture(scope='module')
def container(pods):
  (found,) = pods['spec']['template']['spec']['containers']
  return found


def _environment(container, index):
  """Returns the variables of a pod."""
  found = {each['name']: each.get('value') for each in container['env']}
  (field,) = (
    each['valueFrom'] for each in container['env'] if 'value' not in each
  )
  # The label that the controller of stateful sets gives each pod.
  assert field['fieldRef']['fieldPath'] == (
    "metadata.labels['apps.kubernetes.io/pod-index']"
  )
  return {name: value or str(index) for name, value in found.items()}


def test_each_pod_knows_its_index_and_the_first_one(documents, pods, container):
  num, name = pods['spec']['replicas'], pods['metadata']['name']
  for index in range(num):
    cluster = processes.detect(_environment(container, index))
    assert (cluster.num_processes, cluster.process_id) == (num, index)
    host, _, _ = cluster.coordinator.partition(':')
    service = pods['spec']['serviceName']
    assert host == f'{name}-0.{service}'
  headless = documents[f'{service}Service']['spec']
  assert headless['clusterIP'] == 'None'
  assert headless['publishNotReadyAddresses'] is True
  labels = pods['spec']['template']['metadata']['labels']
  assert headless['selector'] == labels
  assert pods['spec']['selector']['matchLabels'] == labels
  # Clients reach the pod that answers.
  first = documents['two-lives-firstService']['spec']
  assert list(first['selector'].values()) == [f'{name}-0']


def test_the_flags_are_those_of_serve(container):
  with commands.own_flags():
    serve._define_flags()
    flags.FLAGS(['serve.py', *container['args']])
    tensor = flags.FLAGS['engine.tensor'].value
  gpus = container['resources']['limits']['nvidia.com/gpu']
  assert tensor == 2 * gpus


def test_only_the_first_pod_is_probed(container):
  for name, route in (
    ('startupProbe', 'ready'),
    ('readinessProbe', 'ready'),
    ('livenessProbe', 'health'),
  ):
    text = container[name]['exec']['command'][-1]
    assert text.startswith('test "$PROCESS_ID" != 0 || python -c ')
    assert f"urlopen('http://localhost:8000/{route}')" in text
  assert '--port=8000' in container['args']


def test_the_second_pod_has_time_for_the_drain_of_the_first(pods, container):
  (drain,) = (
    int(each.partition('=')[2])
    for each in container['args']
    if each.startswith('--drain_seconds')
  )
  (_, wait) = container['lifecycle']['preStop']['exec']['command']
  needed = int(wait) + drain + followers._MARGIN_SECONDS
  grace = pods['spec']['template']['spec']['terminationGracePeriodSeconds']
  assert grace > 1.2 * needed
