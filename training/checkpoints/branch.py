"""Branches a run: a new workdir that begins with a checkpoint of another run.

    python -m training.checkpoints.branch --workdir=runs/trunk --step=800 \
      --out=runs/trunk-1000
    python train.py --workdir=runs/trunk-1000 --config=... \
      --config.num_steps=1000 --config.optimizer.schedule=wsd \
      --config.optimizer.decay_steps=200

One run with a constant learning rate, the trunk, then serves many lengths: each
branch decays the rate over its own last steps (Haegele et al.,
arXiv:2405.18392). The branch has the weights, the optimizer's state, the PRNG
key and the position in the data of the trunk. So it ends with the bits of an
uninterrupted run of its own schedule, as far as that schedule agrees with the
trunk's up to `step`. The identity of the run (name, seed, model, tokenizer)
stays, and a start with other values is refused.
"""

import pathlib
import shutil
import sys

from absl import app, flags

from checks import path_flags
from frozen import run_record, seals
from storage import atomic, file_names


def branch(workdir: pathlib.Path, step: int, out: pathlib.Path) -> pathlib.Path:
  """Makes a workdir with one verified checkpoint of another workdir.

  The workdir is made whole or not at all. Its metrics begin after `step`.

  Args:
    workdir: workdir of the trunk; nothing in it is changed.
    step: the step of a checkpoint in `workdir`.
    out: the new workdir; nothing may be there.

  Raises:
    FileNotFoundError: there is no run in `workdir`.
    ValueError: it has no such checkpoint, the checkpoint is damaged, or
      something is at `out`.
    OSError: the new workdir cannot be written.
  """
  run = run_record.read(workdir)
  if out.exists():
    raise ValueError(
      f'--out={out}: got a path that exists, expected a new directory; use'
      ' another --out'
    )
  root = workdir / file_names.CHECKPOINTS
  if step not in seals.steps(root):
    found = ', '.join(map(str, seals.steps(root))) or 'none'
    raise ValueError(
      f'--step: got {step}, expected a checkpoint of {root}: {found}; the'
      ' fields of config.checkpoint decide which ones are kept'
    )
  seals.check(root / str(step), run)
  with atomic.new_directory(out) as partial:
    shutil.copytree(
      root / str(step), partial / file_names.CHECKPOINTS / str(step)
    )
    tokenizer = workdir / file_names.TOKENIZER
    if tokenizer.exists():
      shutil.copytree(tokenizer, partial / file_names.TOKENIZER)
    for name in (file_names.RUN, file_names.DATA):
      if (workdir / name).exists():
        shutil.copy2(workdir / name, partial / name)
  return out


def _define_flags() -> None:
  path_flags.DEFINE_path('workdir', None, 'Directory of the run to branch.')
  flags.DEFINE_integer('step', None, 'Step of its checkpoint to begin with.')
  path_flags.DEFINE_path('out', None, 'Directory of the new run.')
  flags.mark_flags_as_required(['workdir', 'step', 'out'])


def main(argv: list[str]) -> None:
  """Makes the new workdir."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  values = flags.FLAGS
  try:
    branch(pathlib.Path(values.workdir), values.step, pathlib.Path(values.out))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)
  print(
    f'{values.out} begins at step {values.step}; train.py'
    f' --workdir={values.out} resumes it'
  )


if __name__ == '__main__':
  # Not at import: train.py has a --workdir of its own.
  _define_flags()
  app.run(main)
