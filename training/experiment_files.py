"""The files that --config may name: experiments, found by reading them.

No file is imported. An experiment is a Python file with a function
`get_config`; the first line of its docstring describes it.
"""

import ast
import pathlib

from checks import expect

DIRECTORY = pathlib.Path(__file__).resolve().parents[1] / 'experiments'


def describe(directory: pathlib.Path) -> dict[str, str]:
  """Returns the first line of each experiment of a directory, by file name.

  In `DIRECTORY`, the experiments of its folders follow.
  """
  found = {}
  paths = sorted(directory.glob('*.py'))
  if directory.resolve() == DIRECTORY:
    paths += sorted(directory.glob('*/*.py'))
  for path in paths:
    module, get_config = _parsed(path)
    if get_config is not None:
      text = ast.get_docstring(module) or ''
      found[path.relative_to(directory).as_posix()] = text.partition('\n')[0]
  return found


def _parsed(path: pathlib.Path) -> tuple[ast.Module, ast.FunctionDef | None]:
  """Returns a file, parsed, and its function `get_config`."""
  try:
    module = ast.parse(path.read_bytes())
  except (OSError, ValueError, SyntaxError):
    module = ast.Module([], [])
  for node in module.body:
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config':
      return module, node
  return module, None


def listing() -> str:
  """Returns the experiments of the repository, one line each."""
  lines = {
    _written(DIRECTORY / name): line
    for name, line in describe(DIRECTORY).items()
  }
  width = max(map(len, lines))
  return '\n'.join(
    f'--config={path:{width}}  {line}'.rstrip() for path, line in lines.items()
  )


def check(path: str, variant: str) -> None:
  """Refuses a path that is no experiment, and names the files that are.

  Args:
    path: value of --config, without its variant.
    variant: the text after the colon, or ''.

  Raises:
    ValueError: there is no such file, or it has no `get_config` or variants.
  """
  if pathlib.Path(path).is_file():
    # An experiment may import the function: the name need not be defined there.
    if b'get_config' not in pathlib.Path(path).read_bytes():
      raise ValueError(
        f'--config: got {path!r}, expected a file with a function get_config;'
        ' --config=list shows the experiments'
      )
    _, get_config = _parsed(pathlib.Path(path))
    if variant and get_config is not None and not get_config.args.args:
      raise ValueError(
        f'--config: got the variant {variant!r} of {path}, expected none: it'
        f' has no variants; leave out :{variant}'
      )
    return
  directory = pathlib.Path(path).parent
  names = describe(directory)
  if not names:  # the directory is wrong, too, or no path was given at all
    directory, names = DIRECTORY, describe(DIRECTORY)
  wanted = f'{pathlib.Path(path).name.removesuffix(".py")}.py'
  raise ValueError(
    f'--config: got {path!r}, expected a file of {_written(directory)}, one of'
    f' {", ".join(names)}; --config=list describes them'
    f'{expect.meant(wanted, names)}'
  )


def _written(path: pathlib.Path) -> str:
  """Returns a path in its shortest form, relative to here if possible."""
  try:
    return str(path.resolve().relative_to(pathlib.Path.cwd()))
  except ValueError:
    return str(path)
