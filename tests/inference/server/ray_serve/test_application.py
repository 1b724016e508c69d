"""The arguments of a deployment, its server, and Ray itself if it is there."""

import os

import pytest

from inference.server.ray_serve import arguments, child
from tests.helpers import frozen_dirs


def _arguments(**fields):
  return arguments.Arguments(model='m', **fields)


def test_further_arguments_are_flags_of_the_server():
  given = {'api_keys': 'k', 'engine.max_sequences': '8', 'replicas': 'auto'}
  found = _arguments(**given)
  found.check()
  assert found.flags() == [
    '--model=m', '--drain_seconds=30', '--replicas=0', '--api_keys=k',
    '--engine.max_sequences=8',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    ({}, 'api_keys: got none, expected keys, since the proxies of Ray'),
    ({'insecure': 'true', 'port': '1'}, 'port: got a flag of one server'),
    ({'insecure': 'true', 'replicas': 'many'}, "replicas: got 'many'"),
    ({'insecure': 'true', 'replicas': 0}, 'replicas: got 0, expected at least'),
  ],
)
def test_wrong_arguments_are_refused(fields, text):
  with pytest.raises(ValueError, match=text):
    _arguments(**fields).check()


@pytest.mark.slow
def test_a_server_is_ready_healthy_and_ended(tmp_path):
  frozen_dirs.write(tmp_path / 'frozen')
  flags = [
    f'--model={tmp_path}/frozen',
    '--replicas=0',
    '--engine.max_sequences=2',
  ]
  with pytest.raises(child.Ended, match='insecure=true'):
    child.Child(flags, os.environ).wait(120, may_be_open=False)
  with pytest.raises(child.Ended, match='got no readiness in 0 s'):
    child.Child(flags, os.environ).wait(0, may_be_open=True)
  running = child.Child(flags, os.environ)
  running.wait(120, may_be_open=True)
  running.check()
  assert running.status('/v1/models') == 200
  assert running.status('/nope') == 404
  assert running.stop(60) == 0
  with pytest.raises(child.Ended, match='not healthy'):
    running.check()


@pytest.mark.slow
def test_a_server_that_ends_is_an_error_with_its_last_lines(tmp_path):
  wrong = child.Child([f'--model={tmp_path}/none'], os.environ)
  with pytest.raises(child.Ended, match=r'has ended:(.|\n)*none'):
    wrong.wait(120, may_be_open=True)


@pytest.mark.filterwarnings('ignore')  # of Ray's own libraries
def test_an_application_has_the_replicas_that_are_asked_for():
  pytest.importorskip('ray', reason='pip install -r requirements-ray.txt')
  from inference.server.ray_serve import application

  found = application.build(_arguments(insecure=True, replicas=2, num_gpus=1))
  assert type(found).__name__ == 'Application'
  with pytest.raises(ValueError, match='api_keys: got none'):
    application.build(_arguments())
