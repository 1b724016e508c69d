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
    ({'replicas': 2, 'max_replicas': 4}, 'max_replicas: got 4 with replicas ='),
    (
      {'replicas': 'auto', 'min_replicas': 3, 'max_replicas': 2},
      'max_replicas: got 2, expected at least 3',
    ),
    ({'replicas': 'auto', 'min_replicas': 0}, 'min_replicas: got 0'),
    ({'replicas': 'auto', 'target_requests': 0}, 'target_requests: got 0'),
    (
      {'replicas': 'auto', 'engine.max_sequences': '512'},
      r'max_ongoing_requests: got 256, expected at least the 409\.6 open',
    ),
  ],
)
def test_wrong_arguments_are_refused(fields, text):
  with pytest.raises(ValueError, match=text):
    _arguments(**fields).check()


@pytest.mark.parametrize(
  ('fields', 'target'),
  [
    ({}, 25.6),  # of 32 slots
    ({'engine.max_sequences': '64'}, 51.2),
    ({'engine.decode_shapes': '4,10'}, 8),
    ({'target_requests': '6'}, 6),
    ({'engine.max_sequences': '1'}, 1),
  ],
)
def test_replicas_follow_the_open_requests_of_their_slots(fields, target):
  found = _arguments(
    insecure=True, replicas='auto', min_replicas=2, max_replicas='5', **fields
  )
  found.check()
  options = found.options()
  assert options['num_replicas'] == 'auto'
  scaling = options['autoscaling_config']
  assert scaling['target_ongoing_requests'] == pytest.approx(target)
  assert (scaling['min_replicas'], scaling['max_replicas']) == (2, 5)
  # A replica that has started is kept for longer than it takes to want one.
  assert 0 < scaling['upscale_delay_s'] < scaling['downscale_delay_s']
  assert not {'min_replicas', 'target_requests'} & {
    flag.partition('=')[0].strip('-') for flag in found.flags()
  }
  assert 'autoscaling_config' not in _arguments(replicas=2).options()


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
  # Ray checks the names and the values of the configuration.
  application.build(_arguments(insecure=True, replicas='auto', max_replicas=4))
  with pytest.raises(ValueError, match='api_keys: got none'):
    application.build(_arguments())
