"""Paths of users: ~ and variables are replaced, or refused by name."""

import os

from absl import flags
import pytest

from checks import path_flags, paths


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', '/h')
  monkeypatch.setenv('DATA', '/d')
  monkeypatch.setenv('EMPTY', '')
  monkeypatch.delenv('NONE', raising=False)
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('', ''),
    ('runs/a', 'runs/a'),
    ('~', '/h'),
    ('~/run', '/h/run'),
    ('$DATA/run', '/d/run'),
    ('a/${DATA}b/$DATA', 'a//db//d'),
    ('~/$DATA', '/h//d'),
    ('./~/run', './~/run'),
    ('a~', 'a~'),
    ('corpus/{split}.txt', 'corpus/{split}.txt'),
    ('a$', 'a$'),
  ],
)
def test_home_and_variables_are_replaced(path, expected):
  assert paths.expanded('--out', path) == expected


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    (
      '$NONE/run',
      r"--out: got '\$NONE/run', expected \$NONE to be set; set it",
    ),
    ('a/${NONE}', r'expected \$\{NONE\} to be set'),
    ('$EMPTY/run', r'expected \$EMPTY to be set'),
    ('~nobody-here/run', r"--out: got '~nobody-here/run', expected a home dir"),
  ],
)
def test_what_is_not_known_is_refused(path, message):
  with pytest.raises(ValueError, match=message):
    paths.expanded('--out', path)


def test_a_name_with_a_dollar_that_exists_is_taken(tmp_path):
  (tmp_path / 'a$NONE').touch()
  assert paths.expanded('--out', 'a$NONE') == 'a$NONE'
  # The folder that such a path once made is not its home.
  os.mkdir('~')
  assert paths.expanded('--out', '~') == '/h'


def test_a_named_path_is_replaced():
  assert paths.named('--adapters', ' sql = ~/a') == ('sql', '/h/a')
  for text in ('sql', '=a', 'sql=', 's\nql=a'):
    with pytest.raises(ValueError, match='expected NAME=PATH with a printable'):
      paths.named('--adapters', text)
  with pytest.raises(ValueError, match=r'--adapters: got .* \$NONE to be set'):
    paths.named('--adapters', 'sql=$NONE/a')


def test_a_flag_holds_the_path():
  values = flags.FlagValues()
  path_flags.DEFINE_path('out', None, 'A file.', flag_values=values)
  path_flags.DEFINE_path('data', '~/data', 'Data.', flag_values=values)
  values(['program', '--out=~/run'])
  assert (values.out, values.data) == ('/h/run', '/h/data')
  with pytest.raises(flags.IllegalFlagValueError, match=r'\$NONE to be set'):
    values(['program', '--out=$NONE/run'])
