"""Errors of a disk, as the user sees them."""

import pathlib

import pytest

from storage import disk

PLACE = pathlib.Path('runs/x')


def _fail(error):
  with disk.writing(PLACE, saved='step 3 is saved'):
    raise error


def test_a_full_disk_may_work_later():
  with pytest.raises(
    disk.SaveError,
    match='runs/x: got .*No space left.*, expected to write there; make room,'
    ' and start again: step 3 is saved',
  ):
    _fail(OSError(28, 'No space left on device'))


@pytest.mark.parametrize(
  'error', [PermissionError(13, 'no'), NotADirectoryError(20, 'no')]
)
def test_a_place_that_cannot_be_written_needs_the_user(error):
  with pytest.raises(
    ValueError, match='make it writable, or choose another place: step 3'
  ):
    _fail(error)


def test_other_errors_pass():
  for error in (FileNotFoundError(2, 'data'), KeyError('x')):
    with pytest.raises(type(error)):
      _fail(error)
