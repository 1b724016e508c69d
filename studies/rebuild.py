"""Makes the weights of a frozen directory again, and compares them.

    python -m studies.rebuild --model=runs/quickstart/frozen \
      --workdir=runs/again
    python -m studies.rebuild --model=DIR --workdir=runs/again \
      --set=data.path=corpus/*.txt --set=init_from=runs/base/frozen

The directory's recipe (frozen/recipe.py) says how its run made it. First come
the differences that are known before any training: the commit of the code,
versions of libraries, devices, fields that --set changes, and the digests of
the data and of other models. If the data differ, the command ends. Otherwise
the run is trained in --workdir, where it resumes like any run, and its weights
are compared. On the same kind of device with the same versions they are equal
bit for bit; elsewhere, the report has the distance of the weights, and the
first step with different losses.

A quantised directory is made again from its floats, --source, and the text that
it was calibrated with, --text; its manifest has the rest
(studies/rebuild_quantised.py).

    python -m studies.rebuild --model=DIR --workdir=runs/again \
      --source=runs/quickstart/frozen --text=FILE

Exit codes: 0 equal, 3 not equal, 1 an error that the user must correct.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
import tempfile
from typing import Any

from absl import app, flags, logging
import jax
import numpy as np

from checks import path_flags
from frozen import format as frozen_format, manifest as manifest_lib, recipe
from storage import code_commit
from studies import rebuild_quantised
from studies.common import quiet_run
from training import (
  assemble,
  experiment as experiment_lib,
  experiment_json,
  flags as flags_lib,
)
from training.checkpoints import init_from

EQUAL, NOT_EQUAL, USER_ERROR = 0, 3, 1
EQUAL_TEXT = 'equal      the weights are the same, bit for bit'
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The comparison of new weights with the first weights."""

  is_equal: bool  # bit for bit
  relative: float  # norm of the difference over the norm of the first weights
  largest: float  # difference of a weight
  name: str  # of the tensor with the largest difference
  # The first step of the recipe whose loss differs; None: all are equal.
  parted_at: int | None


def experiment_of(
  recipe_values: Mapping[str, Any], changes: Sequence[str]
) -> experiment_lib.Experiment:
  """Returns the experiment of a recipe.

  Args:
    recipe_values: the recipe.
    changes: FIELD=VALUE texts, such as data.path=corpus.txt.

  Raises:
    ValueError: a field does not exist, or a value has another type.
  """
  experiment = experiment_json.from_dict(recipe_values['experiment'])
  parent = experiment.init_from
  for text in changes:
    _set(experiment, text)
  if parent and experiment.data.tokenizer == init_from.tokenizer_of(parent):
    experiment.data.tokenizer = init_from.tokenizer_of(experiment.init_from)
  experiment.freeze.enabled = True
  experiment.evals.tasks = ()  # they only measure: no weight depends on them
  experiment.num_steps = recipe_values['step']
  return experiment


def _set(experiment: experiment_lib.Experiment, text: str) -> None:
  """Sets the field of a text FIELD=VALUE."""
  path, equals, value = text.partition('=')
  if not equals:
    raise ValueError(
      f'--set: got {text!r}, expected FIELD=VALUE, as data.path=corpus.txt'
    )
  try:
    old = functools.reduce(getattr, path.split('.'), experiment)
  except AttributeError:
    raise ValueError(
      f'--set: got {text!r}, expected a field of the experiment, as data.path'
    ) from None
  try:
    kind = type(old)
    parsed = kind(value) if kind in (int, float, str) else json.loads(value)
  except ValueError:
    raise ValueError(
      f'--set: got {text!r}, expected a value like {old!r}'
    ) from None
  flags_lib.set_field(experiment, path, parsed)


def known_differences(
  recipe_values: Mapping[str, Any], experiment: experiment_lib.Experiment
) -> list[str]:
  """Returns the differences known before any training, one line each."""
  found = []
  commit, now = recipe_values['code_commit'], code_commit.find()
  if commit != now:
    found.append(f'code: commit {commit or "unknown"} made it, this is {now}')
  for name, value in recipe.made_with().items():
    old = recipe_values['made_with'].get(name)
    if old != value:
      found.append(f'{name}: {old} made it, this is {value}')
  old, new = recipe_values['experiment'], experiment.to_dict()
  for path, value in _flat(new).items():
    before = _flat(old).get(path)
    # The frozen steps and the places of files change no weight.
    is_place = isinstance(value, str) and path.endswith(('path', 'dir', 'from'))
    if value != before and path not in _SAME and not is_place:
      found.append(f'{path}: {before!r} made it, this is {value!r}')
  return found


_SAME = 'num_steps', 'freeze.enabled', 'evals.tasks'


def _flat(values: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(values, Mapping):
    return {prefix: values}
  return {
    path: value
    for name, inner in values.items()
    for path, value in _flat(inner, f'{prefix}.{name}'.lstrip('.')).items()
  }


def check_data(
  recipe_values: Mapping[str, Any], described: Mapping[str, Any]
) -> None:
  """Raises ValueError if the data differ from the recipe.

  Args:
    recipe_values: the recipe.
    described: description of the run's data, as in data.json.
  """
  expected, got = recipe_values['data'], recipe.data_digests(described)
  for name, digest in expected.items():
    if got.get(name) != digest:
      raise ValueError(
        f'data {name}: got tokens with SHA-256 {got.get(name, "none")[:16]},'
        f' expected {digest[:16]}: another text, or another tokenizer; give the'
        ' data of the first run, by --set=data.path=...'
      )


def check_parents(
  recipe_values: Mapping[str, Any], experiment: experiment_lib.Experiment
) -> None:
  """Raises ValueError if init_from is not the model of the recipe."""
  expected = recipe_values['lineage'].get('init_from')
  if not expected:
    return
  directory = pathlib.Path(experiment.init_from)
  try:
    got = manifest_lib.read(directory).weights_digest
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(
      f'init_from: {error}; give the directory with the weights'
      f' {expected[:16]}, by --set=init_from=DIR'
    ) from None
  if got != expected:
    raise ValueError(
      f'init_from: got {directory} with the weights {got[:16]}, expected'
      f' {expected[:16]}; give the directory of these, by --set=init_from=DIR'
    )


def compare(
  model: pathlib.Path, again: pathlib.Path, workdir: pathlib.Path
) -> Comparison:
  """Returns the comparison of two frozen directories.

  Args:
    model: the first directory.
    again: the directory that was made now.
    workdir: workdir of the run that made it.
  """
  step = manifest_lib.read(again).step
  parted_at = _parted_at(
    recipe.read(model)['trace'], recipe.trace(workdir, step)
  )
  return distance(model, again, parted_at)


def distance(
  model: pathlib.Path, again: pathlib.Path, parted_at: int | None = None
) -> Comparison:
  """Returns the distance between the weights of two frozen directories.

  Args:
    model: the first directory.
    again: the directory that was made now.
    parted_at: see `Comparison`.
  """
  first, second = manifest_lib.read(model), manifest_lib.read(again)
  if first.weights_digest == second.weights_digest:
    return Comparison(
      is_equal=True, relative=0.0, largest=0.0, name='', parted_at=parted_at
    )
  sides = [_weights(directory) for directory in (model, again)]
  if sides[0].keys() != sides[1].keys():
    raise ValueError(
      f'weights: got tensors {sorted(sides[0].keys() ^ sides[1].keys())[:4]} in'
      ' one of the directories only, expected the same model'
    )
  squares, norm, largest, name = 0.0, 0.0, 0.0, ''
  for key, value in sides[0].items():
    gap = np.abs(sides[1][key] - value)
    squares += float(np.sum(gap**2))
    norm += float(np.sum(value**2))
    if gap.size and float(gap.max()) > largest:
      largest, name = float(gap.max()), key
  return Comparison(
    is_equal=False,
    relative=math.sqrt(squares / norm) if norm else math.inf,
    largest=largest,
    name=name,
    parted_at=parted_at,
  )


def _weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
  params = frozen_format.read_whole(directory).params
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
    for path, leaf in leaves
  }


def _parted_at(
  first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> int | None:
  losses = {int(step): loss for step, loss in second}
  for step, loss in first:
    if losses.get(int(step), loss) != loss:
      return int(step)
  return None


def rebuild(
  model: pathlib.Path,
  workdir: pathlib.Path,
  changes: Sequence[str],
  say: Say = print,
) -> int:
  """Makes the weights of a directory again; returns an exit code.

  Raises:
    ValueError, FileNotFoundError: the recipe cannot be followed.
  """
  manifest_lib.check_files(model, manifest_lib.read(model))
  values = recipe.read(model)
  experiment = experiment_of(values, changes)
  experiment.validate()
  for line in known_differences(values, experiment):
    say(f'differs    {line}')
  check_parents(values, experiment)
  with tempfile.TemporaryDirectory() as place:
    # The data are checked before hours of training.
    parts = assemble.assemble(experiment, pathlib.Path(place))
    check_data(values, parts.describe_data())
    parts.batches.close()
  result = quiet_run.run(experiment, workdir)
  if result.exit_code:
    say('stopped by a signal; the same command resumes')
    return result.exit_code
  found = compare(model, workdir / 'frozen', workdir)
  for line in told(found):
    say(line)
  return EQUAL if found.is_equal else NOT_EQUAL


def told(found: Comparison, *, has_losses: bool = True) -> list[str]:
  """Returns the lines about a comparison.

  Args:
    found: the comparison.
    has_losses: whether both sides were trained, and have losses to compare.
  """
  if found.is_equal:
    return [EQUAL_TEXT]
  parted = (
    'all losses of the recipe are equal'
    if found.parted_at is None
    else f'the first loss that differs is at step {found.parted_at}'
  )
  line = (
    f'not equal  relative distance {found.relative:.3g}, largest difference'
    f' {found.largest:.3g} in {found.name}'
  )
  return [f'{line}; {parted}' if has_losses else line]


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'model', None, 'The frozen directory to make again.', required=True
  )
  path_flags.DEFINE_path(
    'workdir', None, 'Directory of the new run; resumed.', required=True
  )
  path_flags.DEFINE_path(
    'source',
    '',
    'For a quantised --model: the frozen directory in floats that it was made'
    ' from.',
  )
  path_flags.DEFINE_path(
    'text',
    '',
    'For a quantised --model: file with the text of its calibration. Empty'
    ' (default): the text that is part of Python.',
  )
  flags.DEFINE_multi_string(
    'set',
    [],
    'FIELD=VALUE of the experiment, as data.path=corpus.txt; may be given'
    ' several times. Give the paths of files that have moved. A change of'
    ' another field is reported, and changes the weights.',
  )


def main(argv: list[str]) -> int:
  """Makes the weights again and says whether they are equal."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  logging.set_verbosity(logging.ERROR)
  values = flags.FLAGS
  model, workdir = pathlib.Path(values.model), pathlib.Path(values.workdir)
  try:
    if rebuild_quantised.is_quantised(model):
      return _quantised(model, workdir, values)
    if given := [n for n in ('source', 'text') if getattr(values, n)]:
      raise ValueError(
        f'--{given[0]}: got {getattr(values, given[0])} with a --model of'
        ' floats, expected none; paths of a run are given by --set'
      )
    return rebuild(model, workdir, values.set)
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}')
    return USER_ERROR


def _quantised(model: pathlib.Path, workdir: pathlib.Path, values) -> int:
  if values.set:
    raise ValueError(
      f'--set: got {values.set} with a quantised --model, expected none; it is'
      ' made from --source and --text alone'
    )
  again = rebuild_quantised.make(
    model, workdir, source=values.source, text=values.text
  )
  found = distance(model, again)
  print('\n'.join(told(found, has_losses=False)))
  return EQUAL if found.is_equal else NOT_EQUAL


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
