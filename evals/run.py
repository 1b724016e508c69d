"""Runs a named task on a model: the one function that others call.

    perplexity:FILE          perplexity and bits per byte of a text
    choice:FILE.jsonl        multiple choice
    generate:FILE.jsonl      completions that must match
    gsm8k:FILE.jsonl         word problems in the format of GSM8K
    lm_eval:TASK[,TASK]      any task of the LM Evaluation Harness, or its YAML

evals/tasks/local_tasks.py says what the files hold.
"""

from collections.abc import Callable
import dataclasses
import math

from evals import ports
from evals.results import scores
from evals.tasks import generation, local_tasks, multiple_choice, perplexity
from storage import digests

KINDS = ('perplexity', 'choice', 'generate', 'gsm8k', 'lm_eval')
_GENERATING = ('generate', 'gsm8k')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a task leaves open; checked when made.

  Raises:
    ValueError: a value is out of range.
  """

  limit: int = 0  # first examples, or blocks of text, to take; 0 takes all
  stride: int = 0  # of perplexity, in tokens; 0: half of what the model reads
  num_fewshot: int | None = (
    None  # None: none, and of lm_eval what the task says
  )
  fewshot_path: str = ''  # gsm8k: a file of solved examples
  max_tokens: int = 512  # of a completion; tasks of lm_eval have their own
  temperature: float = 0.0  # 0 is greedy; tasks of lm_eval have their own
  num_samples: int = 1  # per prompt, for pass@k
  seed: int = 0  # of samples, and of what lm_eval draws
  chat: bool = False  # prompts go through the model's chat template

  def __post_init__(self):
    least = {
      'limit': 0,
      'stride': 0,
      'max_tokens': 1,
      'num_samples': 1,
      'seed': 0,
    }
    for name, low in least.items():
      if getattr(self, name) < low:
        raise ValueError(
          f'{name}: got {getattr(self, name)}, expected at least {low}'
        )
    if self.num_fewshot is not None and self.num_fewshot < 0:
      raise ValueError(
        f'num_fewshot: got {self.num_fewshot}, expected 0 or more'
      )
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f'temperature: got {self.temperature}, expected a number >= 0'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task whose files were read, ready for any number of models."""

  name: str
  options: Options
  files: dict[str, str]  # SHA-256 of each
  measure: Callable[[ports.Model], tuple[scores.Group, ...]]

  def run(self, model: ports.Model) -> scores.Result:
    """Returns what the model scores.

    Raises:
      ValueError: the model lacks what the task needs.
    """
    return scores.Result(
      task=self.name,
      groups=self.measure(model),
      options=dataclasses.asdict(self.options),
      model=dict(model.description),
      files=self.files,
    )


def run(
  task: str, model: ports.Model, options: Options | None = None
) -> scores.Result:
  """Returns what a model scores in a task.

  Args:
    task: one of the names above.
    model: functions that score or sample, with their tokenizer.
    options: what the task leaves open.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the task, a file or an option is wrong, or the model lacks what
      the task needs.
    ModuleNotFoundError: lm_eval is not installed.
  """
  return open_task(task, options).run(model)


def open_task(task: str, options: Options | None = None) -> Task:
  """Reads what a task needs; raises as `run` does, before any model is asked.

  Args:
    task: one of the names above.
    options: what the task leaves open.
  """
  options = options or Options()
  kind, _, what = task.partition(':')
  if kind not in KINDS or not what:
    raise ValueError(
      f'task: got {task!r}, expected KIND:FILE, where KIND is one of'
      f' {", ".join(KINDS)}, as in perplexity:book.txt'
    )
  _check_used(kind, options)
  paths = [path for path in (what, options.fewshot_path) if path]
  match kind:
    case 'perplexity':
      measure = _open_perplexity(what, options)
    case 'choice':
      measure = _open_choice(what, options)
    case 'generate':
      measure = _generating(local_tasks.read_prompts(what), options)
    case 'gsm8k':
      measure = _open_gsm8k(what, options)
    case _:
      measure, paths = _open_lm_eval(what.split(','), options), []
  return Task(
    name=task,
    options=options,
    files={path: digests.of_file(path) for path in paths},
    measure=measure,
  )


def _check_used(kind: str, options: Options) -> None:
  """Refuses an option that the task would ignore."""
  users = {
    'stride': ('perplexity',),
    'num_fewshot': ('gsm8k', 'lm_eval'),
    'fewshot_path': ('gsm8k',),
    'max_tokens': _GENERATING,
    'temperature': _GENERATING,
    'num_samples': _GENERATING,
    'chat': (*_GENERATING, 'lm_eval'),
  }
  default = Options()
  for name, kinds in users.items():
    got = getattr(options, name)
    if kind not in kinds and got != getattr(default, name):
      raise ValueError(
        f'{name}: got {got!r} with a task of kind {kind}, expected it only with'
        f' {", ".join(kinds)}; leave it out'
      )


def _open_perplexity(path: str, options: Options):
  documents = local_tasks.read_documents(path)
  return lambda model: (
    perplexity.measure(
      documents, model, stride=options.stride, max_blocks=options.limit
    ),
  )


def _open_choice(path: str, options: Options):
  questions = local_tasks.read_choices(path)[: options.limit or None]
  return lambda model: (multiple_choice.measure(questions, model),)


def _open_gsm8k(path: str, options: Options):
  prompts = local_tasks.read_gsm8k(
    path, options.fewshot_path, options.num_fewshot or 0
  )
  return _generating(prompts, options)


def _generating(prompts, options: Options):
  prompts = prompts[: options.limit or None]
  settings = ports.SampleSettings(
    max_tokens=options.max_tokens,
    temperature=options.temperature,
    seed=options.seed,
  )
  return lambda model: (
    generation.measure(
      prompts,
      model,
      settings,
      num_samples=options.num_samples,
      is_chat=options.chat,
    ),
  )


def _open_lm_eval(tasks: list[str], options: Options):
  try:
    from evals.harness import lm_eval_tasks
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f'{error}; for tasks of lm_eval: pip install -r requirements-eval.txt'
    ) from None
  return lm_eval_tasks.open_tasks(
    tasks,
    limit=options.limit or None,
    num_fewshot=options.num_fewshot,
    seed=options.seed,
    is_chat=options.chat,
  )
