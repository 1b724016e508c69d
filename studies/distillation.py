"""Ways to distil a large model into a small one, in one table.

    python -m studies.distillation --workdir=runs/distil
    python -m studies.distillation --workdir=runs/distil --seeds=3

Trains the variants of experiments/distil.py one after the other, in workdirs
below --workdir/seedN. Then measures all of them on the same held-out questions:

    loss      nats per token of the right answers
    accuracy  share of greedy answers with the right number
    gap       share of the way from the student alone to its teacher, in
              accuracy: 0 % learned nothing from it, 100 % is as good

Errors are standard errors: over the questions for one seed, over the seeds for
several. The same command resumes where it was stopped.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from absl import app, flags
import numpy as np

from data.problems import generator as problems_lib
from experiments import distil
from frozen import format as frozen_format
from storage import atomic
from studies import answers
from studies.common import answered, quiet_run, study_flags
from training.reporting import goodput

_HELD_OUT = flags.DEFINE_integer(
  'held_out', 500, 'Held-out questions that every model answers.', 2
)
_RESULTS = 'distillation.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The scores of one model, and the cost of its run."""

  accuracy: answered.Score
  loss: answered.Score
  tokens: int  # that training has read
  flops: float  # of training
  seconds: float  # of the run


def train(
  workdir: pathlib.Path, seed: int, variant: str, steps: int = 0
) -> None:
  """Trains or resumes a variant in workdir/VARIANT.

  Args:
    workdir: workdir of one seed.
    seed: seed of the run.
    variant: one of `distil.VARIANTS`; variants that it continues from are
      trained already.
    steps: steps of the run; 0: as the experiment says.

  Raises:
    SystemExit: a signal stopped the run.
  """
  experiment = distil.get_config(f'{variant}:{workdir}')
  experiment = quiet_run.shortened(experiment, steps)
  experiment = dataclasses.replace(experiment, seed=seed)
  if quiet_run.run(experiment, workdir / variant).exit_code:
    raise SystemExit('stopped by a signal; the same command resumes')


def measure(
  workdir: pathlib.Path,
  num_questions: int,
  variants: Sequence[str] = distil.VARIANTS,
) -> dict[str, Measured]:
  """Measures variants of one seed, which are trained."""
  teacher_place = workdir / distil.TEACHER / 'frozen'
  questions = answered.questions_of(
    teacher_place,
    problems_lib.Settings.parse(f'{distil.HELD_OUT}&count={num_questions}'),
  )
  teacher = answered.open_model(teacher_place)
  found = {}
  for variant in variants:
    place = workdir / variant
    manifest = frozen_format.open_directory(place / 'frozen').manifest
    is_teacher = variant == distil.TEACHER
    model = teacher if is_teacher else answered.open_model(place / 'frozen')
    accuracy, loss, _ = answered.score(
      model, teacher, questions, distil.MAX_TOKENS
    )
    found[variant] = Measured(
      accuracy=accuracy,
      loss=loss,
      tokens=manifest.tokens_seen,
      flops=manifest.training_flops,
      seconds=goodput.life(goodput.read(place)).running,
    )
  return found


def gaps(found: dict[str, Measured]) -> dict[str, float]:
  """Returns the share of the gap in accuracy that each variant closes."""
  alone = found[distil.ALONE].accuracy.mean
  whole = found[distil.TEACHER].accuracy.mean - alone
  return {
    variant: (each.accuracy.mean - alone) / whole if whole else float('nan')
    for variant, each in found.items()
  }


def table(seeds: Sequence[dict[str, Measured]]) -> str:
  """Returns the table of all variants, as Markdown."""
  lines = [
    '| variant | accuracy, % | gap closed, % | held-out loss, nats/token |'
    ' tokens | training FLOPs | seconds |',
    '|---|---|---|---|---|---|---|',
  ]
  gaps_of_seeds = [gaps(found) for found in seeds]
  for variant in seeds[0]:
    runs = [found[variant] for found in seeds]
    accuracy = _over_seeds([run.accuracy for run in runs])
    percent = answered.Score(100 * accuracy.mean, 100 * accuracy.error)
    closed = 100 * float(np.mean([each[variant] for each in gaps_of_seeds]))
    loss = _over_seeds([run.loss for run in runs])
    seconds = float(np.mean([run.seconds for run in runs]))
    lines.append(
      f'| {variant} | {percent.text(".1f")} | {closed:.0f} |'
      f' {loss.text(".3f")} | {runs[0].tokens:,} | {runs[0].flops:.2g} |'
      f' {seconds:.0f} |'
    )
  return '\n'.join(lines)


def _over_seeds(scores: Sequence[answered.Score]) -> answered.Score:
  """Returns the mean over seeds; of one seed, its own error."""
  if len(scores) == 1:
    return scores[0]
  return answered.mean_of([score.mean for score in scores])


def main(argv: list[str]) -> None:
  """Trains missing variants, measures all variants, and prints the table."""
  workdir = study_flags.begin(argv)
  seeds = []
  for seed in range(study_flags.SEEDS.value or 1):
    place = workdir / f'seed{seed}'
    for variant in distil.VARIANTS:
      if variant == distil.ANSWERS:
        answers.write_greedy(
          place / distil.TEACHER / 'frozen',
          distil.QUESTIONS,
          place / distil.ANSWERS_FILE,
          max_tokens=distil.MAX_TOKENS,
        )
      train(place, seed, variant, study_flags.STEPS.value)
      print(f'{variant}: {place / variant / "frozen"}', flush=True)
    seeds.append(measure(place, _HELD_OUT.value))
  atomic.write_text(
    workdir / _RESULTS,
    json.dumps(
      [{k: dataclasses.asdict(v) for k, v in found.items()} for found in seeds],
      indent=2,
    )
    + '\n',
  )
  print(table(seeds))


if __name__ == '__main__':
  app.run(main)
