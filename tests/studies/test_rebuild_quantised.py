"""Quantised weights that are made again from their manifest."""

import numpy as np
import pytest

from frozen import manifest as manifest_lib
from frozen.quantize import calibration, quantizing
from studies import rebuild, rebuild_quantised
from tests.helpers import frozen_dirs

_TEXT = ''.join(f'{n} is a number, {n * n} its square. ' for n in range(400))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Returns a directory with floats, a text, and both quantised."""
  place = tmp_path_factory.mktemp('quantised')
  config = frozen_dirs.config(model_width=32, mlp_width=48)
  frozen_dirs.write(place / 'float', config=config)
  (place / 'text').write_text(_TEXT, 'utf-8')
  quantizing.quantise_directory(
    place / 'float',
    place / 'int4',
    scheme='int4',
    method='gptq',
    text=calibration.Config(
      path=str(place / 'text'), seed=3, rows=16, length=48, held_out=4
    ),
  )
  return place


def make(place, workdir, **changes):
  given = {'source': str(place / 'float'), 'text': str(place / 'text')}
  return rebuild_quantised.make(place / 'int4', workdir, **(given | changes))


@pytest.mark.slow
def test_the_same_weights_are_made_again_and_others_are_told(place, tmp_path):
  assert rebuild_quantised.is_quantised(place / 'int4')
  assert not rebuild_quantised.is_quantised(place / 'float')
  found = rebuild.distance(place / 'int4', make(place, tmp_path))
  assert rebuild.told(found, has_losses=False) == [rebuild.EQUAL_TEXT]
  # The floats have other weights: at most half a step of four bits away.
  found = rebuild.distance(place / 'int4', place / 'float')
  (line,) = rebuild.told(found, has_losses=False)
  assert line.startswith('not equal  relative distance 0.')
  assert 'first loss' not in line
  assert 0 < found.relative < 0.3
  assert np.isfinite(found.largest)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'source': ''}, '--source: got none with a quantised --model'),
    ({'source': 'int4'}, r'--source: got .* expected .* that was quantised'),
    (
      {'text': ''},
      r'--text: got pydoc_data.topics with SHA-256 .* digest of te',
    ),
    ({'text': 'other'}, '--text: got .* give the text of the calibration'),
  ],
)
def test_other_sources_and_texts_are_refused(place, tmp_path, changes, words):
  (place / 'other').write_text(_TEXT + '!', 'utf-8')
  changes = {k: v and str(place / v) for k, v in changes.items()}
  with pytest.raises(ValueError, match=words):
    make(place, tmp_path, **changes)
  assert not (tmp_path / 'frozen').exists()


@pytest.mark.slow
def test_a_turned_directory_is_made_again(place, tmp_path):
  turned = tmp_path / 'turned'
  made, _ = quantizing.quantise_directory(
    place / 'float',
    turned,
    scheme='int8',
    method='rtn',
    text=calibration.Config(
      path=str(place / 'text'), seed=5, rows=4, length=32, held_out=4
    ),
    rotate=True,
  )
  again = rebuild_quantised.make(
    turned,
    tmp_path / 'workdir',
    source=str(place / 'float'),
    text=str(place / 'text'),
  )
  found = manifest_lib.read(again)
  assert found.weights_digest == made.weights_digest
