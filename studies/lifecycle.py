"""The whole life of a small model in one command, and one table of it.

    make lifecycle
    python -m studies.lifecycle --workdir=runs/lifecycle

Trains the stages of `experiments/lifecycle.py` one after the other:
pretraining, fine-tuning, a reward model, preferences, reinforcement,
distillation. Each is an ordinary run in a workdir of its own below --workdir,
so the same command resumes where it was stopped. Every frozen directory is then
loaded into the engine that serves, and measured on the same held-out questions:

    loss      nats per token of the right answers
    accuracy  share of greedy answers with the right number; of the reward
              model, share of held-out pairs whose right answer scores higher
    KL        from `base`, nats per answer: the mean over answers that the stage
              samples of log p(answer) - log p_base(answer)

Errors are standard errors over questions. The cost of a stage has the tokens,
FLOPs and seconds of its run, its start and its evaluations included.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from absl import app, flags

from data.problems import generator as problems_lib
from experiments import lifecycle
from frozen import format as frozen_format
from storage import atomic
from studies import answers
from studies.common import answered, quiet_run, study_flags
from training import experiment as experiment_lib
from training.reporting import goodput, metrics

_QUESTIONS = flags.DEFINE_integer(
  'questions', 300, 'Held-out questions that every stage answers.', 2
)
_RESULTS = 'lifecycle.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The scores of a stage, and its cost."""

  accuracy: answered.Score
  loss: answered.Score | None  # None: a reward model
  kl: answered.Score | None
  tokens: int  # that training has read
  flops: float  # of training
  seconds: float  # of the run


def train(
  workdir: pathlib.Path, stage: str, steps: int = 0
) -> experiment_lib.Experiment:
  """Trains or resumes a stage; returns its experiment.

  Args:
    workdir: directory of all stages; the run of the parent is finished.
    steps: steps of the run; 0: as the experiment says.

  Raises:
    SystemExit: a signal stopped the run.
  """
  parent = lifecycle.PARENTS[stage]
  if stage == 'distil':
    teacher = workdir / parent / 'frozen'
    answers.write_greedy(
      teacher,
      lifecycle.TAUGHT,
      lifecycle.answers_file(teacher),
      max_tokens=lifecycle.MAX_TOKENS,
    )
  variant = f'{stage}:{workdir / parent / "frozen"}' if parent else stage
  experiment = lifecycle.get_config(variant)
  experiment = quiet_run.shortened(experiment, steps)
  if quiet_run.run(experiment, workdir / stage).exit_code:
    raise SystemExit('stopped by a signal; the same command resumes')
  return experiment


def measure(
  workdir: pathlib.Path,
  num_questions: int,
  stages: Sequence[str] = tuple(lifecycle.PARENTS),
) -> dict[str, Measured]:
  """Measures trained stages, in their order."""
  questions = answered.questions_of(
    workdir / 'sft' / 'frozen',
    problems_lib.Settings.parse(f'{lifecycle.QUESTIONS}&count={num_questions}'),
  )
  base = answered.open_model(workdir / 'base' / 'frozen')
  found = {}
  for stage in stages:
    place = workdir / stage
    manifest = frozen_format.open_directory(place / 'frozen').manifest
    loss = kl = None
    if manifest.heads:
      accuracy = _accuracy_of_pairs(place)
    else:
      is_base = stage == 'base'
      model = base if is_base else answered.open_model(place / 'frozen')
      accuracy, loss, kl = answered.score(
        model, base, questions, lifecycle.MAX_TOKENS
      )
    found[stage] = Measured(
      accuracy=accuracy,
      loss=loss,
      kl=kl,
      tokens=manifest.tokens_seen,
      flops=manifest.training_flops,
      seconds=goodput.life(goodput.read(place)).running,
    )
  return found


def _accuracy_of_pairs(workdir: pathlib.Path) -> answered.Score:
  """Returns the accuracy of a reward model at its last evaluation."""
  evaluated = [x for x in metrics.read(workdir) if x['kind'] == 'eval']
  return answered.Score(
    evaluated[-1]['accuracy'], evaluated[-1]['accuracy_error']
  )


def table(found: dict[str, Measured]) -> str:
  """Returns the table of all stages, as Markdown."""
  lines = [
    '| stage | from | held-out loss, nats/token | accuracy, % | KL from base,'
    ' nats/answer | tokens | training FLOPs | seconds |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for stage, each in found.items():
    percent = answered.Score(
      100 * each.accuracy.mean, 100 * each.accuracy.error
    )
    of_what = ' of pairs' if each.loss is None else ''
    lines.append(
      f'| {stage} | {lifecycle.PARENTS[stage] or "random"} |'
      f' {each.loss.text(".3f") if each.loss else "-"} |'
      f' {percent.text(".1f")}{of_what} |'
      f' {each.kl.text(".2f") if each.kl else "-"} |'
      f' {each.tokens:,} | {each.flops:.2g} | {each.seconds:.0f} |'
    )
  total = sum(each.seconds for each in found.values())
  flops = sum(each.flops for each in found.values())
  tokens = sum(each.tokens for each in found.values())
  lines.append(f'| all | | | | | {tokens:,} | {flops:.2g} | {total:.0f} |')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Trains missing stages, measures all stages, and prints the table."""
  workdir = study_flags.begin(argv)
  for stage in lifecycle.PARENTS:
    train(workdir, stage, study_flags.STEPS.value)
    print(f'{stage}: {workdir / stage / "frozen"}', flush=True)
  found = measure(workdir, _QUESTIONS.value)
  atomic.write_text(
    workdir / _RESULTS,
    json.dumps({k: dataclasses.asdict(v) for k, v in found.items()}, indent=2)
    + '\n',
  )
  print(table(found))


if __name__ == '__main__':
  app.run(main)
