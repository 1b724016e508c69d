"""The manifests name flags, routes, ports and metrics that serve.py has."""

import pathlib
import re

from absl import flags
import pytest
import yaml

from inference.engine import metrics
from inference.server import server_config
from inference.server.routes import probes
import serve
from tests.helpers import commands

_ROOT = pathlib.Path(__file__).parents[4]
_FOLDER = _ROOT / 'inference/server/kubernetes'
_FLUSH_SECONDS = 2  # of the listener, after the drain


def _documents(name):
  text = (_FOLDER / name).read_text(encoding='utf-8')
  return {each['kind']: each for each in yaml.safe_load_all(text)}


@pytest.fixture(scope='module')
def serving():
  return _documents('serving.yaml')


@pytest.fixture(scope='module')
def container(serving):
  (found,) = serving['StatefulSet']['spec']['template']['spec']['containers']
  return found


def _arguments(container):
  return dict(
    each.removeprefix('--').partition('=')[::2] for each in container['args']
  )


def test_the_flags_are_those_of_serve(container):
  with commands.own_flags():
    serve._define_flags()
    flags.FLAGS(['serve.py', *container['args']])
    assert flags.FLAGS.port == 8000
    assert flags.FLAGS['server.public_metrics'].value is True
    assert flags.FLAGS.replicas == 1
    for name in _arguments(container):
      if name != 'model':
        assert 'port' in serve._heeded_by(name), name
  assert (_ROOT / container['command'][1]).is_file()


def test_probes_ask_routes_that_need_no_key(container):
  asked = {
    name: container[name]['httpGet']
    for name in ('startupProbe', 'readinessProbe', 'livenessProbe')
  }
  source = pathlib.Path(probes.__file__).read_text(encoding='utf-8')
  routes = set(re.findall(r"app\.get\('([^']+)'\)", source))
  (port,) = container['ports']
  for probe in asked.values():
    assert probe['path'] in routes & {'/health', '/ready'}
    assert probe['port'] == port['name']
  assert asked['readinessProbe']['path'] == '/ready'
  assert asked['livenessProbe']['path'] == '/health'
  assert str(port['containerPort']) == _arguments(container)['port']


def test_a_pod_has_time_to_drain(serving, container):
  pod = serving['StatefulSet']['spec']['template']['spec']
  drain = int(_arguments(container)['drain_seconds'])
  (_, wait) = container['lifecycle']['preStop']['exec']['command']
  needed = int(wait) + drain + _FLUSH_SECONDS
  assert pod['terminationGracePeriodSeconds'] > 1.2 * needed


def test_what_is_named_exists(serving, container):
  (service, pods) = serving['Service'], serving['StatefulSet']['spec']
  labels = pods['template']['metadata']['labels']
  assert (
    service['spec']['selector'] == pods['selector']['matchLabels'] == labels
  )
  assert service['spec']['ports'][0]['targetPort'] == 'http'
  assert pods['serviceName'] == service['metadata']['name']
  volumes = {each['name'] for each in pods['template']['spec']['volumes']}
  claims = {each['metadata']['name'] for each in pods['volumeClaimTemplates']}
  mounts = {
    each['name']: each['mountPath'] for each in container['volumeMounts']
  }
  assert set(mounts) == volumes | claims
  for name in ('model', 'api_keys', 'records', 'compilation_cache'):
    path = _arguments(container)[name]
    assert any(path.startswith(f'{each}/') for each in mounts.values()), path
  # What a pod writes outlives it.
  for name in ('records', 'compilation_cache'):
    assert _arguments(container)[name].startswith(f'{mounts["records"]}/')


def test_the_metrics_that_scale_exist(serving):
  documents = _documents('scaling.yaml')
  exported = {
    sample.name
    for family in metrics.Metrics().registry.collect()
    for sample in family.samples
  }
  scaled = documents['ScaledObject']['spec']
  queries = [each['metadata']['query'] for each in scaled['triggers']]
  named = {
    name for query in queries for name in re.findall(r'\b([a-z_]+)\{', query)
  }
  assert named == {'waiting', 'kv_pages_used', 'kv_pages_idle', 'kv_pages_free'}
  assert named <= exported
  target = serving['StatefulSet']
  assert scaled['scaleTargetRef'] == {
    'kind': target['kind'],
    'name': target['metadata']['name'],
  }
  (endpoint,) = documents['PodMonitor']['spec']['podMetricsEndpoints']
  assert (endpoint['path'], endpoint['port']) == ('/metrics', 'http')
  # Prometheus has no key of the API.
  assert not server_config.ServerConfig().public_metrics
  labels = documents['PodMonitor']['spec']['selector']['matchLabels']
  assert labels == target['spec']['template']['metadata']['labels']
