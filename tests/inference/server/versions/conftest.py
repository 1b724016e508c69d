"""Frozen directories of several versions, and a server that may load them."""

import contextlib
import dataclasses
import gc

import httpx2
import pytest

from inference.server.versions import loader as loader_lib
from tests.helpers import frozen_dirs
from tests.helpers.serving import servers
from tests.inference import conftest as life_two

MODEL = servers.MODEL


@dataclasses.dataclass
class Versions:
  """A server with one version, and the directories of others."""

  http: httpx2.Client
  first: str  # NAME@DIGEST
  digests: dict[str, str]  # weights digest, by directory
  served: servers.Served

  def load(self, path, name=MODEL, **fields):
    """Loads a directory; returns NAME@DIGEST when it is ready."""
    answer = self.http.post(
      '/admin/models', json={'path': path, 'name': name, **fields}
    )
    assert answer.status_code == 202, answer.text
    version = answer.json()['id']
    servers.until(lambda: self.state(version) != 'loading', 60)
    return version

  def state(self, version):
    """Returns the state of a version, None if there is none."""
    answer = self.http.get(f'/admin/models/{version}')
    return answer.json().get('state')

  def unload(self, version):
    """Unloads a version, and waits until it is gone."""
    answer = self.http.delete(f'/admin/models/{version}')
    assert answer.status_code == 202, answer.text
    servers.until(lambda: self.state(version) is None, 60)

  def send(self, weights, status=200, name=MODEL, **fields):
    """Sets the traffic of a name."""
    answer = self.http.post(
      '/admin/traffic', json={'name': name, 'weights': weights, **fields}
    )
    assert answer.status_code == status, answer.text
    return answer.json()

  @contextlib.contextmanager
  def keeping_the_engine(self):
    """Unloading the first version leaves its engine to other tests."""
    engine = self.served.generator.engine
    with pytest.MonkeyPatch.context() as patched:
      patched.setattr(engine, 'release', lambda: None)
      yield

  def complete(self, prompt='hello', headers=None, **fields):
    """Returns the answer of a completion."""
    body = {**servers.GREEDY, 'prompt': prompt, **fields}
    return self.http.post('/v1/completions', json=body, headers=headers)


@pytest.fixture(scope='package')
def models_root(tmp_path_factory):
  """Directories v2 and v3 of the shape of the first version, and `other`."""
  root = tmp_path_factory.mktemp('models')
  digests = {}
  for seed, name in ((2, 'v2'), (3, 'v3')):
    config = frozen_dirs.config(num_layers=1)
    manifest = frozen_dirs.write(
      root / name, params=frozen_dirs.params(config, seed=seed), config=config
    )
    digests[name] = manifest.weights_digest
  return root, digests


@pytest.fixture
def _own_collector():
  """A loader tells the garbage collector of the process what stays."""
  threshold = gc.get_threshold()
  yield
  gc.set_threshold(*threshold)
  gc.unfreeze()


@pytest.fixture
def versions(generator, models_root, _own_collector):
  root, digests = models_root
  loader = loader_lib.Loader(life_two.ENGINE, models_root=str(root))
  records, key = servers.with_admin()
  with (
    servers.running(
      generator, records=records, app={'loader': loader}
    ) as served,
    httpx2.Client(base_url=served.url, headers=key, timeout=60) as http,
  ):
    digest = generator.frozen.manifest.weights_digest
    yield Versions(http, f'{MODEL}@{digest[:16]}', digests, served)
