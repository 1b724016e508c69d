"""The manifest alone: versions, fields, and its digest of itself."""

import json

import pytest

from frozen import manifest as manifest_lib
from tests.helpers import frozen_dirs


@pytest.fixture
def directory(tmp_path):
  manifest_lib.write(
    tmp_path,
    manifest_lib.sign(
      **vars(frozen_dirs.provenance()),
      model={'rope_base': 10_000.0},
      dtype='float32',
      quantization={'kind': 'none'},
      num_params=3,
      weights_digest='0' * 64,
      files={},
    ),
  )
  return tmp_path


def _edit(directory, change):
  path = directory / 'manifest.json'
  fields = json.loads(path.read_text())
  change(fields)
  path.write_text(json.dumps(fields))


def test_round_trip(directory):
  manifest = manifest_lib.read(directory)
  assert manifest.experiment == frozen_dirs.EXPERIMENT
  assert manifest.format_version == manifest_lib.FORMAT_VERSION
  _edit(directory, lambda fields: None)  # other white space, the same contents
  assert manifest_lib.read(directory) == manifest


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda fields: fields.update(format_version=2),
      'got format version 2, expected 1; use the code that wrote it',
    ),
    (
      # A newer format may well have other fields: the version is the news.
      lambda fields: fields.update(format_version=2, tensors=[]),
      'got format version 2, expected 1',
    ),
    (
      lambda fields: fields.pop('format_version'),
      'got format version None, expected 1',
    ),
    (
      lambda fields: fields.update(mood='good'),
      r"got unknown fields \['mood'\] and missing fields \[\]",
    ),
    (
      lambda fields: fields.pop('step'),
      r"got unknown fields \[\] and missing fields \['step'\]",
    ),
    (
      lambda fields: fields['model'].update(rope_base=500_000.0),
      'got contents with digest .* it was altered',
    ),
    (
      lambda fields: fields.update(knowledge_cutoff='2030-01-01'),
      'got contents with digest .* it was altered',
    ),
  ],
)
def test_a_manifest_that_is_not_as_written_is_refused(
  directory, change, message
):
  _edit(directory, change)
  with pytest.raises(ValueError, match=message):
    manifest_lib.read(directory)


@pytest.mark.parametrize('text', ['', '{"format_version": 1', 'null', '[1]'])
def test_what_is_no_manifest_is_refused(directory, text):
  (directory / 'manifest.json').write_text(text)
  with pytest.raises(ValueError, match='not JSON|got format version None'):
    manifest_lib.read(directory)


def test_no_manifest_says_how_to_make_one(tmp_path):
  with pytest.raises(
    FileNotFoundError, match='python -m frozen.freeze --workdir'
  ):
    manifest_lib.read(tmp_path)
