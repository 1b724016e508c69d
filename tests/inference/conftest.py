"""One tiny generator for all tests of life two: its programs compile once."""

import pytest

from inference import generate
from tests import frozen_fixtures


@pytest.fixture(scope='session')
def frozen_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('frozen') / 'tiny'
  # One layer: what it computes is the business of test_decode.
  config = frozen_fixtures.config(num_layers=1)
  frozen_fixtures.write(directory, config=config)
  return directory


@pytest.fixture(scope='session')
def generator(frozen_dir):
  return generate.load(frozen_dir)
