"""The commit of the code: edited pages do not count, edited code does."""

import subprocess

from storage import code_commit


def test_edited_code_is_told(tmp_path, monkeypatch):
  folder = tmp_path / 'storage'
  folder.mkdir()
  # No repository that the temporary directory may be in.
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  monkeypatch.setattr(code_commit, '__file__', str(folder / 'code_commit.py'))
  assert code_commit.find() == 'unknown'

  def git(*arguments):
    identity = ('-c', 'user.name=n', '-c', 'user.email=e@example.org')
    subprocess.run(
      ['git', *identity, *arguments], cwd=tmp_path, check=True, text=True
    )

  git('init', '-q')
  assert code_commit.find() == 'unknown'  # no commit yet
  (folder / 'code.py').write_text('a = 1\n')
  (tmp_path / 'page.md').write_text('one\n')
  git('add', '.')
  git('commit', '-qm', 'first')
  commit = code_commit.find()
  assert len(commit) == 40
  (tmp_path / 'page.md').write_text('two\n')
  assert code_commit.find() == commit
  (folder / 'code.py').write_text('a = 2\n')
  assert code_commit.find() == f'{commit}-dirty'
