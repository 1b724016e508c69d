"""One tiny engine for the tests of life two: its programs compile once.

An engine belongs to one thread at a time. A test that uses `generator` itself
may do so beside a server of it, whose thread sleeps while nothing is asked.
"""

import pytest

from inference import generate
from inference.engine import engine_config
from tests.helpers import frozen_dirs
from tests.helpers.serving import reference_engine

# Several sequences and pages in three shapes, since compiling takes the time.
ENGINE = engine_config.EngineConfig(
  max_sequences=4,
  decode_shapes=(4,),
  chunk_tokens=16,
  max_chunks=1,
  max_mixed_chunks=1,
  page_size=8,
  decode_steps=1,  # tests look between two tokens
)


@pytest.fixture(autouse=True)
def _engines_are_left_idle():
  yield
  reference_engine.check_engines()


@pytest.fixture(scope='session')
def frozen_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('frozen') / 'tiny'
  # One layer: the tests of the engine check its numbers.
  config = frozen_dirs.config(num_layers=1)
  frozen_dirs.write(directory, config=config)
  return directory


@pytest.fixture(scope='session')
def generator(frozen_dir):
  return generate.load(frozen_dir, ENGINE)
