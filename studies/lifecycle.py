"""The whole life of a small model in one command, and one table of it.

    make lifecycle
    python -m studies.lifecycle --workdir=runs/lifecycle

Trains the stages of `experiments/lifecycle.py` one after the other:
pretraining, fine-tuning, a reward model, preferences, reinforcement,
distillation. Each is an ordinary run in a workdir of its own below --workdir,
so the same command goes on where it was stopped. Every frozen directory is then
loaded into the engine that serves, and measured on the same held-out questions:

    loss      nats per token of the right answers
    accuracy  share of greedy answers with the right number; of the reward
              model, share of held-out pairs whose right answer scores higher
    KL        from `base`, nats per answer: the mean over answers that the stage
              samples of log p(answer) - log p_base(answer)

Errors are standard errors over questions. The cost of a stage is what its run
has read, computed and taken, its start and its evaluations included.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import NamedTuple

from absl import app, flags, logging
import numpy as np

from data.problems import generator as problems_lib, records
from evals import ports
from evals.results import statistics
from evals.verifiers import texts
from experiments import lifecycle
from frozen import format as frozen_format
from hardware import compilation_cache
from inference import generate, model_port
from inference.engine import engine_config
from storage import atomic
from studies.common import quiet_run, study_flags
from training import experiment as experiment_lib
from training.reporting import goodput, metrics

_QUESTIONS = flags.DEFINE_integer(
  'questions', 300, 'Held-out questions that every stage answers.', 2
)
_ENGINE = engine_config.EngineConfig(
  max_sequences=32, decode_shapes=(32,), max_chunks=4, max_mixed_chunks=4
)
_RESULTS = 'lifecycle.json'


class Score(NamedTuple):
  """A mean over questions, and its standard error."""

  mean: float
  error: float

  def text(self, form: str) -> str:
    """Returns both numbers in a format, as in '.3f'."""
    return f'{self.mean:{form}} +- {self.error:{form}}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """What a stage can, and what it has cost."""

  accuracy: Score
  loss: Score | None  # None: a reward model
  kl: Score | None
  tokens: int  # that training has read
  flops: float  # of training
  seconds: float  # of the run


class Question(NamedTuple):
  """A held-out question as every stage sees it."""

  prompt_ids: tuple[int, ...]
  answer_ids: tuple[int, ...]  # the right answer, with its stop token
  record: records.Record  # with `answer`, for the verifier


def questions_of(directory: pathlib.Path, num: int) -> list[Question]:
  """Returns held-out questions in the chat template of a frozen directory."""
  chatting = generate.load(directory, _ENGINE, compile_all=False)
  settings = problems_lib.Settings.parse(f'{lifecycle.QUESTIONS}&count={num}')
  encode_chat = model_port.evaluated(chatting).encode_chat
  assert encode_chat is not None
  found = []
  for record in records.make(settings, 'validation'):
    asked = [{'role': 'user', 'content': record['question']}]
    prompt = tuple(encode_chat(asked))
    whole = model_port.encode_answer(chatting, asked, record['answer'])
    if whole[: len(prompt)] != prompt:
      raise ValueError(
        f'{directory}: got a chat template that changes the prompt when the'
        ' answer is there, expected one that goes on from it'
      )
    found.append(Question(prompt, whole[len(prompt) :], record))
  return found


def score(
  model: ports.Model, base: ports.Model, questions: Sequence[Question]
) -> tuple[Score, Score, Score]:
  """Returns accuracy, loss per token, and the KL from a base per answer."""
  prompts = [each.prompt_ids for each in questions]
  sample, logprobs = model.required_sample_fn(), model.required_logprob_fn()
  greedy = ports.SampleSettings(max_tokens=lifecycle.MAX_TOKENS)
  is_right = texts.Number(is_strict=True)
  right = [
    is_right(completion.text, question.record).value
    for question, (completion,) in zip(
      questions, sample(prompts, greedy, 1), strict=True
    )
  ]
  losses = [
    -found.logprob / len(found.token_logprobs)
    for found in logprobs([(x.prompt_ids, x.answer_ids) for x in questions])
  ]
  drawn = [
    (prompt, completion.all_ids)
    for prompt, (completion,) in zip(
      prompts,
      sample(prompts, dataclasses.replace(greedy, temperature=1.0), 1),
      strict=True,
    )
  ]
  gaps = [
    own.logprob - other.logprob
    for own, other in zip(
      logprobs(drawn), base.required_logprob_fn()(drawn), strict=True
    )
  ]
  accuracy, loss, kl = (_mean(x) for x in (right, losses, gaps))
  return accuracy, loss, kl


def _mean(values: Sequence[float]) -> Score:
  return Score(float(np.mean(values)), statistics.standard_error(values))


def train(
  workdir: pathlib.Path, stage: str, steps: int = 0
) -> experiment_lib.Experiment:
  """Trains or resumes a stage; returns its experiment.

  Args:
    workdir: of all stages; that of the parent is finished.
    steps: of the run; 0: those of the experiment.

  Raises:
    SystemExit: a signal stopped the run.
  """
  parent = lifecycle.PARENTS[stage]
  variant = f'{stage}:{workdir / parent / "frozen"}' if parent else stage
  experiment = lifecycle.get_config(variant)
  if steps:
    warmup = min(experiment.optimizer.warmup_steps, steps)
    experiment = dataclasses.replace(
      experiment,
      num_steps=steps,
      optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=warmup),
    )
  if quiet_run.run(experiment, workdir / stage).exit_code:
    raise SystemExit('stopped by a signal; the same command goes on')
  return experiment


def measure(
  workdir: pathlib.Path,
  num_questions: int,
  stages: Sequence[str] = tuple(lifecycle.PARENTS),
) -> dict[str, Measured]:
  """Measures stages, which are trained, in their order."""
  questions = questions_of(workdir / 'sft' / 'frozen', num_questions)
  base = _model(workdir / 'base')
  found = {}
  for stage in stages:
    place = workdir / stage
    manifest = frozen_format.open_directory(place / 'frozen').manifest
    loss = kl = None
    if manifest.heads:
      accuracy = _accuracy_of_pairs(place)
    else:
      model = base if stage == 'base' else _model(place)
      accuracy, loss, kl = score(model, base, questions)
    found[stage] = Measured(
      accuracy=accuracy,
      loss=loss,
      kl=kl,
      tokens=manifest.tokens_seen,
      flops=manifest.training_flops,
      seconds=goodput.life(goodput.read(place)).running,
    )
  return found


def _model(workdir: pathlib.Path) -> ports.Model:
  return model_port.evaluated(generate.load(workdir / 'frozen', _ENGINE))


def _accuracy_of_pairs(workdir: pathlib.Path) -> Score:
  """Returns that of the last evaluation of a reward model's run."""
  evaluated = [x for x in metrics.read(workdir) if x['kind'] == 'eval']
  return Score(evaluated[-1]['accuracy'], evaluated[-1]['accuracy_error'])


def table(found: dict[str, Measured]) -> str:
  """Returns the table of all stages, as Markdown."""
  lines = [
    '| stage | from | held-out loss, nats/token | accuracy, % | KL from base,'
    ' nats/answer | tokens | training FLOPs | seconds |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for stage, each in found.items():
    percent = Score(100 * each.accuracy.mean, 100 * each.accuracy.error)
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
  """Trains what is missing, measures all stages, and prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  workdir = pathlib.Path(study_flags.required_workdir())
  # Orbax logs many lines about saves that went well.
  logging.set_verbosity(logging.ERROR)
  # Several stages have the same programs.
  if directory := compilation_cache.directory_of(None):
    compilation_cache.use(directory)
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
