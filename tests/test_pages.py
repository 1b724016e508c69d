"""The pages and the comments name files that exist, and say the truth.

Nothing is imported: the pages and the source are read as text.
"""

import ast
from collections.abc import Iterator
import io
import pathlib
import re
import tokenize

import pytest

from tests import test_architecture

ROOT = test_architecture.ROOT
SOURCES = test_architecture.SOURCES
PRODUCT = {p: s for p, s in SOURCES.items() if not p.startswith('tests/')}

# Files of other projects, named where a fact comes from.
ELSEWHERE = {
  'config/train_gpt2.py',  # nanoGPT
  'config/train_shakespeare_char.py',  # nanoGPT
  'lm_eval/models/huggingface.py',  # LM Evaluation Harness
}
# Names in examples of commands.
PLACEHOLDERS = {'x.py', 'file.py'}
NOTEBOOK = 'experiments/LOG.md'  # dated: it names files as they were called

_FILE = re.compile(r'(?<![\w./<-])((?:[\w-]+/)*[\w-]+\.py)\b')
_PACKAGES = '|'.join(sorted(test_architecture.MAY_IMPORT))
_FOLDER = re.compile(
  rf'(?<![\w./<-])((?:{_PACKAGES}|tests)/(?:[a-z_]+/)*)(?!\w)'
)
_MODULE = re.compile(
  r'`((?:benchmarks|checks|frozen|hardware|inference|models|storage|training)'
  r'\.[a-z_]\w*)'
)


def _prose(path: str, source: str) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of every comment and docstring, or of a whole page."""
  if not path.endswith('.py'):
    yield from enumerate(source.splitlines(), 1)
    return
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      yield token.start[0], token.string
  for node in ast.walk(ast.parse(source)):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, kinds) and ast.get_docstring(node):
      first = node.body[0]
      assert isinstance(first, ast.Expr)
      text = ast.get_docstring(node, clean=False) or ''
      for offset, line in enumerate(text.splitlines()):
        yield first.lineno + offset, line


def _exists(path: str, where: str) -> bool:
  """Whether a path leads somewhere, from the root or from its own folder."""
  if (ROOT / path).exists() or (ROOT / where).parent.joinpath(path).exists():
    return True
  named = {pathlib.PurePosixPath(p).name for p in SOURCES}
  return '/' not in path and path in named


def reference_violations(path: str, source: str) -> list[str]:
  """Names of files, folders and modules in the prose that do not exist."""
  violations = []
  for line, text in _prose(path, source):
    named = _FILE.findall(text) + _FOLDER.findall(text)
    named += [m.replace('.', '/') for m in _MODULE.findall(text)]
    violations += [
      f'{path}:{line}: names {each}, which does not exist'
      for each in named
      if each not in ELSEWHERE | PLACEHOLDERS
      and not _exists(each, path)
      and not _exists(f'{each}.py', path)
    ]
  return violations


def test_every_file_that_the_prose_names_exists():
  pages = {p: t for p, t in test_architecture.TEXTS.items() if p != NOTEBOOK}
  violations = [
    v for item in pages.items() for v in reference_violations(*item)
  ]
  assert not violations, '\n'.join(violations)


@pytest.mark.parametrize(
  'source',
  [
    '# See training/lost.py.\n',
    '"""Reads what `models.lost` writes."""\n',
    'def f():\n  """In models/lost/ there is more."""\n',
    '# The rest is in lost.py.\n',
  ],
)
def test_a_name_without_a_file_is_found(source):
  assert reference_violations('models/a.py', source)


def test_names_of_files_that_exist_pass():
  source = '# models/axes.py, axes.py, models/attention/ and `models.axes`\n'
  assert not reference_violations('models/a.py', source)


# ------------------------------------------------------------------------------
# DESIGN.md


def _section(page: str, title: str) -> str:
  """Returns the text below a heading, up to the next one of its level."""
  text = (ROOT / page).read_text(encoding='utf-8')
  start = text.index(f'## {title}\n')
  end = text.find('\n## ', start + 1)
  return text[start : None if end < 0 else end]


def test_the_import_table_is_the_one_that_is_enforced():
  rows = re.findall(
    r'^\| `(\w+)/` \| (.*?) \|',
    _section('DESIGN.md', 'Who may import whom'),
    re.M,
  )
  written = {
    package: set(re.findall(r'`(\w+)/`', seen)) for package, seen in rows
  }
  assert written == test_architecture.MAY_IMPORT


# Interfaces that a new release of jax or orbax may change without notice.
_UNSTABLE = re.compile(
  r'jax\._src|jax\.extend|jax\.experimental|legacy_backend_config'
  r'|Standard\w*Handler|as_text\(\)'
)


def test_the_list_of_unstable_interfaces_is_complete():
  listed = set(
    re.findall(r'`([\w/]+\.py)`', _section('DESIGN.md', 'What breaks first'))
  )
  leaning = {
    path
    for path, source in PRODUCT.items()
    if _UNSTABLE.search(source) and not path.startswith('benchmarks/')
  }
  assert listed == leaning


def test_the_reading_order_has_ten_files():
  order = re.findall(
    r'^\d+\. `([\w/]+\.py)`', _section('DESIGN.md', 'Ten files to read'), re.M
  )
  assert len(order) == 10
  assert all(path in PRODUCT for path in order)


# ------------------------------------------------------------------------------
# ADDING.md: every recipe names an example that the code has. The files of the
# recipe are the files in which the example occurs, no more and no fewer.

_RECIPE = re.compile(r'^## (.+)\n', re.M)
_EXAMPLES = re.compile(r'^Example: ((?:`\w+`(?:, )?)+)', re.M)
_LISTED = re.compile(r'^- `([\w/]+\.py)`', re.M)


def _recipes() -> list[tuple[str, str]]:
  text = (ROOT / 'ADDING.md').read_text(encoding='utf-8')
  titles = list(_RECIPE.finditer(text))
  ends = [match.start() for match in titles[1:]] + [len(text)]
  return [
    (match.group(1), text[match.end() : end])
    for match, end in zip(titles, ends, strict=True)
  ]


def _without_prose(source: str) -> str:
  """Returns the code of a file: its comments and docstrings left out."""
  tree = ast.parse(source)
  for node in ast.walk(tree):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, kinds) and ast.get_docstring(node):
      node.body = node.body[1:] or [ast.Pass()]
  return ast.unparse(tree)


@pytest.mark.slow
@pytest.mark.parametrize(('title', 'text'), _recipes(), ids=lambda x: x[:30])
def test_a_recipe_lists_the_files_of_its_example(title, text):
  (examples,) = _EXAMPLES.findall(text)
  words = re.findall(r'\w+', examples)
  occurs = re.compile(rf'(?<![A-Za-z])(?:{"|".join(words)})(?![A-Za-z0-9])')
  found = {
    path
    for path, source in PRODUCT.items()
    if pathlib.PurePosixPath(path).stem in words
    or not path.startswith('benchmarks/')
    and occurs.search(_without_prose(source))
  }
  assert set(_LISTED.findall(text)) == found


def test_every_recipe_is_there():
  assert [title for title, _ in _recipes()] == [
    'An experiment',
    'A sweep',
    'A claim of a paper',
    'An objective',
    'An optimizer',
    'An attention variant',
    'A layer with its own cache',
    'A sampler setting',
    'A format of tool calls',
    'A family of open weights',
    'An evaluation',
    'A verifier',
    'A data source',
    'A shape of records',
    'A route',
    'A benchmark',
  ]
