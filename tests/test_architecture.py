"""The house rules, enforced by reading the source; nothing is imported.

Each rule is a function `(path, source) -> violations`, applied to every file of
the repository and, below, to snippets that break it on purpose.
"""

import ast
from collections.abc import Iterator
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Who may import whom. training and inference never meet: what crosses between
# the two lives is a frozen directory, read and written by frozen/.
LEAVES = {'checks', 'hardware', 'storage'}
MAY_IMPORT = {
  'checks': set(),
  'hardware': {'checks'},
  'storage': {'checks'},
  'models': {'checks'},
  'text': {'checks'},
  'parallel': {'checks'},
  'data': LEAVES | {'text'},
  'evals': LEAVES | {'text'},
  'frozen': LEAVES | {'models', 'parallel', 'text'},
  'training': LEAVES
  | {'data', 'evals', 'frozen', 'models', 'parallel', 'text'},
  'inference': LEAVES | {'evals', 'frozen', 'models', 'parallel', 'text'},
  'experiments': {
    'checks', 'data', 'evals', 'models', 'parallel', 'text', 'training'
  },
  # Compares runs, and what is served with them: it sees both lives.
  'studies': LEAVES | {
    'data', 'evals', 'experiments', 'frozen', 'inference', 'models', 'parallel',
    'text', 'training',
  },
}  # fmt: skip
# Entry points, which see both lives; nothing imports them except tests.
TOP = {'train', 'serve', 'sweep', 'benchmarks', 'tests'}

# Libraries that would put something of the other life, or an undeclared
# dependency, where it does not belong.
PEERS = {'torch', 'transformers'}
MAY_NOT_USE = {
  'models': {'optax', 'orbax', 'grain', 'tensorflow_datasets'},
  'text': {'jax', 'flax', 'optax'},
  'inference': {'optax', 'grain', 'tensorflow_datasets'},
}

# Beside entry points: parses the command line for train.py, in its own words;
# makes the flags of serve.py from dataclasses, and those of grammars; makes
# flags that hold paths; has flags of several benchmarks: absl refuses a name
# that is given twice.
MAY_READ_FLAGS = {
  'inference/constraints/flags.py',
  'training/flags.py', 'inference/flags.py', 'benchmarks/common/entry.py',
  'checks/path_flags.py', 'studies/common/study_flags.py',
}  # fmt: skip

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500

# Names of well-known libraries that a root package must not shadow, whether or
# not they are installed where this runs.
TAKEN_NAMES = {
  'datasets', 'evaluate', 'flax', 'grain', 'jax', 'kernels', 'numpy', 'optax',
  'orbax', 'peft', 'tokenizers', 'torch', 'transformers', 'trl', 'vllm',
}  # fmt: skip

ABSOLUTE_PATH = re.compile(
  r'(?<![\w.:/-])/(?:root|home|Users|work|opt|mnt|scratch)/\w'
)


def _is_ours(directory: pathlib.Path) -> bool:
  return not (
    directory.name.startswith(('.', '__'))
    or directory.name == 'runs'
    or (directory / 'pyvenv.cfg').exists()
  )


def _files(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  for path in sorted(directory.iterdir()):
    if path.is_file():
      yield path
    elif path.is_dir() and _is_ours(path):
      yield from _files(path)


def _relative(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


SOURCES = {
  _relative(path): path.read_text(encoding='utf-8')
  for path in _files(ROOT)
  if path.suffix == '.py'
}
TEXTS = SOURCES | {
  _relative(path): path.read_text(encoding='utf-8')
  for path in _files(ROOT)
  if path.suffix in {'.md', '.toml', '.txt', '.yaml'} or path.name == 'Makefile'
}


def _package(path: str) -> str:
  return path.split('/')[0].removesuffix('.py')


def _dotted(node: ast.AST) -> str:
  """'jax.config.update' for that expression, '' for anything not a name."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute) and (prefix := _dotted(node.value)):
    return f'{prefix}.{node.attr}'
  return ''


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
  """Yields (line, module) of every import, '' where it cannot be read."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.lineno, '' if node.level else f'{node.module}'
    elif isinstance(node, ast.Call) and (
      _dotted(node.func).split('.')[-1] in {'import_module', '__import__'}
    ):
      name = node.args[0] if node.args else None
      is_literal = isinstance(name, ast.Constant)
      yield node.lineno, str(name.value) if is_literal else ''


def _objection(package: str, module: str) -> str:
  """Why `package` may not import `module`; empty if it may."""
  target = module.split('.')[0]
  banned_libraries = MAY_NOT_USE.get(package, set()) | {'tensorflow'}
  if package not in {'benchmarks', 'tests'}:
    banned_libraries = banned_libraries | PEERS
  if package == 'tests':  # tests see everything, and name modules in parameters
    return f'uses the library {target}' if target == 'tensorflow' else ''
  if not module:
    return 'imports relatively or by a computed name'
  if target in banned_libraries:
    return f'uses the library {target}'
  is_ours = target in MAY_IMPORT.keys() | TOP
  if not is_ours or target == package:
    return ''
  is_allowed = target in MAY_IMPORT.get(package, MAY_IMPORT.keys())
  return '' if is_allowed else f'may not import {module}'


def import_violations(path: str, source: str) -> list[str]:
  """Imports that the graph, or the list of libraries, does not allow."""
  package = _package(path)
  if package not in MAY_IMPORT.keys() | TOP:
    return [f'{path}: {package} is not in the import graph; place it there']
  return [
    f'{path}:{line}: {package} {objection}'
    for line, module in _imports(ast.parse(source))
    if (objection := _objection(package, module))
  ]


# Folders that import no JAX: plain counts, and the books about them.
WITHOUT_JAX = {'inference/scheduling/': {'checks', 'inference.scheduling'}}


def jax_violations(path: str, source: str) -> list[str]:
  """JAX, or a module of ours that may import it, in a folder without JAX."""
  return [
    f'{path}:{line}: {folder} may not import {module}'
    for folder, allowed in WITHOUT_JAX.items()
    if path.startswith(folder)
    for line, module in _imports(ast.parse(source))
    if module.split('.')[0] not in sys.stdlib_module_names
    and module not in allowed
  ]


def size_violations(path: str, source: str) -> list[str]:
  """Files and functions over the size guide."""
  violations = []
  num_lines = source.count('\n')
  if num_lines > MAX_FILE_LINES:
    violations.append(f'{path}: {num_lines} lines, over {MAX_FILE_LINES}')
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = (node.end_lineno or node.lineno) - node.lineno + 1
      if length > MAX_FUNCTION_LINES:
        violations.append(
          f'{path}:{node.lineno}: {node.name} has {length} lines, over'
          f' {MAX_FUNCTION_LINES}'
        )
  return violations


def _is_main_guard(node: ast.AST) -> bool:
  return isinstance(node, ast.If) and '__name__' in ast.unparse(node.test)


def flag_violations(path: str, source: str) -> list[str]:
  """Absl flags where importing a module would define or read them.

  A package's module may be run too (`python -m frozen.freeze`); it defines its
  flags below `if __name__ == '__main__'`, or they would collide with those of
  the entry point that imports it.
  """
  package = _package(path)
  if package == 'tests':
    return []
  tree = ast.parse(source)
  is_run = path in MAY_READ_FLAGS or any(map(_is_main_guard, tree.body))
  if is_run and package in TOP | {'studies'}:
    return []
  # A mention of the registry is harmless where the file reads it when run.
  return [
    f'{path}:{node.lineno}: defines or reads a flag when imported; flags belong'
    ' to entry points'
    for node in (_run_at_import(tree) if is_run else ast.walk(tree))
    if isinstance(node, ast.Attribute)
    and (
      node.attr.startswith('DEFINE_')
      or (_dotted(node) == 'flags.FLAGS' and not is_run)
    )
  ]


# Calls that query devices, allocate arrays, or change the process.
_AT_IMPORT = re.compile(
  r'(jax\.(config\.update|devices|local_devices|device_count'
  r'|local_device_count|default_backend|device_put|make_mesh|random\.\w+)'
  r'|jnp\.(array|asarray|zeros|ones|full|arange|linspace|eye|tri[lu]?)'
  r'|logging\.(basicConfig|set_verbosity)|os\.(putenv|makedirs|chdir)|print)$'
)


def _run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
  """Every node that importing the module evaluates: no function bodies."""
  for node in ast.iter_child_nodes(tree):
    if _is_main_guard(node):
      continue
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      evaluated = [*node.decorator_list, node.args]
    elif isinstance(node, ast.Lambda):
      evaluated = [node.args]
    else:
      evaluated = [node]
    for part in evaluated:
      yield from _run_at_import(part)


def import_time_violations(path: str, source: str) -> list[str]:
  """Work done by merely importing a module."""
  if path == 'tests/conftest.py':
    return []  # it sets the tests' environment before jax is imported
  violations = []
  for node in _run_at_import(ast.parse(source)):
    if isinstance(node, ast.Call) and _AT_IMPORT.match(_dotted(node.func)):
      violations.append(f'{path}:{node.lineno}: {_dotted(node.func)} at import')
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
      name = _dotted(node.value)
      violations.append(f'{path}:{node.lineno}: changes {name} at import')
  return violations


def experiment_violations(path: str, source: str) -> list[str]:
  """Logic in experiments/, which holds values."""
  if not path.startswith('experiments/'):
    return []
  logic = (ast.For, ast.While, ast.Try, ast.With, ast.ClassDef, ast.Lambda)
  return [
    f'{path}:{node.lineno}: {type(node).__name__} in an experiment; experiments'
    ' hold values, logic lives below'
    for node in ast.walk(ast.parse(source))
    if isinstance(node, logic)
  ]


def path_violations(path: str, source: str) -> list[str]:
  """Absolute paths of somebody's machine."""
  return [
    f'{path}:{i}: names a path of one machine: {match.group()}...'
    for i, line in enumerate(source.splitlines(), 1)
    if (match := ABSOLUTE_PATH.search(line))
  ]


def name_violations(names: set[str]) -> list[str]:
  """Root modules that hide a library or a module of Python's."""
  installed = importlib.metadata.packages_distributions().keys()
  taken = TAKEN_NAMES | installed | sys.stdlib_module_names
  return [f'{name} shadows a library of that name' for name in names & taken]


RULES = (
  import_violations,
  jax_violations,
  size_violations,
  flag_violations,
  import_time_violations,
  experiment_violations,
)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_every_source_file_keeps_the_rule(rule):
  violations = [v for item in SOURCES.items() for v in rule(*item)]
  assert not violations, '\n'.join(violations)


def test_no_text_names_a_path_of_one_machine():
  violations = [v for item in TEXTS.items() for v in path_violations(*item)]
  assert not violations, '\n'.join(violations)


def test_root_names_shadow_no_library():
  assert not name_violations({_package(path) for path in SOURCES})


def test_init_files_are_empty_and_complete():
  packages = {
    str(parent)
    for path in SOURCES
    for parent in list(pathlib.PurePosixPath(path).parents)[:-1]
    if _package(path) != 'tests'
  }
  for package in packages:
    assert SOURCES.get(f'{package}/__init__.py') == '', (
      f'{package}/__init__.py must exist and be empty'
    )
  # pytest's importlib mode gives each test file a name of its own.
  assert not [path for path in SOURCES if re.match('tests/.*__init__', path)]


def test_no_file_is_named_after_nothing():
  vague = {'utils.py', 'util.py', 'common.py', 'misc.py', 'helpers.py'}
  assert not [path for path in SOURCES if path.split('/')[-1] in vague]


def test_the_files_were_found():
  # Without this an empty walk would pass every rule above.
  assert {'train', 'serve', *MAY_IMPORT} <= {_package(path) for path in SOURCES}
  assert 'Makefile' in TEXTS


# ------------------------------------------------------------------------------
# Each rule finds what it is for.


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('training/loop.py', 'import inference.engine.engine'),
    ('training/loop.py', 'from inference import engine'),
    ('inference/decode.py', 'def f():\n  from training import state'),
    ('inference/decode.py', 'def f():\n  import optax'),
    (
      'training/loop.py',
      'import importlib\nimportlib.import_module("inference.decode")',
    ),
    (
      'training/loop.py',
      'from importlib import import_module as m, import_module\n'
      'import_module("inference.decode")',
    ),
    ('training/loop.py', '__import__("inference")'),
    ('training/loop.py', 'import importlib\nimportlib.import_module(name)'),
    ('models/moe/layer.py', 'from parallel import mesh'),
    ('text/chat.py', 'import models.model_config'),
    ('parallel/mesh.py', 'if True:\n  from models import axes'),
    ('data/batches.py', 'from models import config'),
    ('frozen/freeze.py', 'from training import checkpoint'),
    ('experiments/a.py', 'from inference import decode'),
    ('models/moe/layer.py', 'from . import axes'),
    ('training/loop.py', 'import train'),
    ('train.py', 'from benchmarks import timing'),
    ('data/sources.py', 'import tensorflow as tf'),
    ('models/moe/layer.py', 'import torch'),
    ('helpers/a.py', ''),
  ],
)
def test_a_forbidden_import_is_found(path, source):
  assert import_violations(path, source)


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('training/loop.py', 'from frozen import freeze\nimport optax'),
    ('inference/decode.py', 'from models import transformer'),
    ('inference/server/app.py', 'from inference import generate'),
    ('benchmarks/a.py', 'import torch\nimport training.step, inference.decode'),
    ('train.py', 'import training.loop\nimport inference.generate'),
    ('models/a.py', 'import jax.experimental.pallas'),
  ],
)
def test_an_allowed_import_passes(path, source):
  assert not import_violations(path, source)


def test_jax_in_a_folder_without_it_is_found():
  path = 'inference/scheduling/pages.py'
  for source in ('import jax', 'import numpy', 'from models import kv_cache'):
    assert jax_violations(path, source)
    assert not jax_violations('inference/engine/engine.py', source)
  allowed = 'import heapq\nfrom inference.scheduling import pages'
  assert not jax_violations(path, allowed)


def test_an_oversized_function_or_file_is_found():
  body = '  x = 1\n' * MAX_FUNCTION_LINES
  assert size_violations('models/a.py', f'def f():\n{body}')
  assert not size_violations('models/a.py', f'def f():\n{body[8:]}')
  assert size_violations('models/a.py', 'x = 1\n' * (MAX_FILE_LINES + 1))


def test_a_flag_in_a_module_is_found():
  define = "from absl import flags\n_A = flags.DEFINE_string('a', '', '')\n"
  assert flag_violations('models/a.py', define)
  assert flag_violations('models/a.py', 'def f():\n  return flags.FLAGS.a')
  guard = "if __name__ == '__main__':\n  app.run(main)\n"
  assert flag_violations('frozen/freeze.py', define + guard)
  assert not flag_violations('train.py', define + guard)
  inside = guard.replace('app', "flags.DEFINE_string('a', '', '')\n  app")
  assert not flag_violations('frozen/freeze.py', inside)


@pytest.mark.parametrize(
  'source',
  [
    "jax.config.update('jax_enable_x64', True)",
    'MASK_TT = jnp.ones((4, 4))',
    'def f(x, y=jnp.zeros(3)):\n  return x + y',
    'class A:\n  devices = jax.devices()',
    "os.environ['XLA_FLAGS'] = ''",
    'KEY = [jax.random.key(0)]',
  ],
)
def test_work_at_import_is_found(source):
  assert import_time_violations('models/a.py', source)


def test_work_inside_functions_and_main_is_no_work_at_import():
  source = (
    'step = jax.jit(f)\n'
    'def f(x):\n  return x + jnp.ones(3)\n'
    "if __name__ == '__main__':\n  print(jax.devices())\n"
  )
  assert not import_time_violations('models/a.py', source)


def test_logic_in_an_experiment_is_found():
  assert experiment_violations('experiments/a.py', 'for i in x:\n  pass')
  assert not experiment_violations('training/a.py', 'for i in x:\n  pass')


def test_a_machine_path_is_found():
  somewhere = '/'.join(['', 'home', 'me', 'data'])
  assert path_violations('README.md', f"data_dir='{somewhere}'")
  assert not path_violations('README.md', 'https://example.com/home/data')


def test_a_shadowing_name_is_found():
  assert name_violations({'tokenizers'})
  assert name_violations({'pytest'})
  assert name_violations({'json'})
  assert not name_violations({'text'})
