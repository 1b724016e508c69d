"""The parts of a run: learner, tokenizer, batches and evaluation tasks.

`assemble` builds each of them once, from an experiment and its workdir.
training/run.py then trains with them.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from data import (
  batches as batches_lib,
  data_config,
  rows as rows_lib,
  sources,
  token_store,
  vocabulary,
)
from data.contamination import overlap
from data.examples import encoding
from evals.tasks import task as task_lib
from models.attention.kernels import cudnn_gpu
from parallel import processes
from storage import atomic, file_names
from text import tokenizer as tokenizer_lib
from training import (
  execution,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.checkpoints import init_from, workdir as workdir_lib
from training.evaluation import tasks as tasks_lib
from training.frozen_inputs import frozen_models, reference
from training.objectives import port
from training.rollouts import (
  batches as rollout_batches,
  devices as rollout_devices,
  held_out as held_out_lib,
  sampler as sampler_lib,
  wiring,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """The objects that a run trains and evaluates with."""

  learner: learner_lib.Learner
  tokenizer: tokenizer_lib.Tokenizer
  batches: batches_lib.TrainBatches | rollout_batches.RolloutBatches
  eval_batches: batches_lib.EvalBatches | held_out_lib.HeldOut
  # Ids that end the answers of a run on conversations, besides EOS.
  stop_ids: tuple[int, ...]
  # Share of evaluation text in each training source; empty if not searched.
  overlaps: tuple[overlap.Overlap, ...]
  tasks: tuple[task_lib.Task, ...]  # measured together with validation loss
  # Values of frozen models for the rows; empty if the objective needs none.
  logprobs: tuple[reference.Computed, ...] = ()

  def describe_data(self) -> dict[str, Any]:
    """Returns the training and evaluation data of the run, as JSON values."""
    return {
      'sources': [
        rows.describe() | {'weight': source.weight}
        for source, rows in zip(
          self.learner.experiment.data.train_sources(),
          self.batches.sources,
          strict=True,
        )
      ],
      'evaluation': self.eval_batches.source.describe(),
      'tasks': {task.name: task.files for task in self.tasks},
      'logprobs': [computed._asdict() for computed in self.logprobs],
      'contamination': [
        dataclasses.asdict(overlap) | {'share': overlap.share}
        for overlap in self.overlaps
      ],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
  """The opened documents and evaluation tasks of a run."""

  train: tuple[sources.Source, ...]
  evaluated: sources.Source
  tasks: tuple[task_lib.Task, ...]


def open_documents(experiment: experiment_lib.Experiment) -> Documents:
  """Opens the documents of a run. Writes nothing to the workdir.

  Raises:
    ValueError, FileNotFoundError: a source cannot be opened, or has no text.
  """
  data = experiment.data
  named = *data.train_sources(), data.eval_source()
  opened = []
  for source in named:
    documents = source.open(data.data_dir, data.examples)
    is_text = data.examples == data_config.TEXT
    if is_text and not any(documents[i]['text'] for i in range(len(documents))):
      raise ValueError(
        f'{source.name}: got {len(documents)} documents without any text,'
        ' expected some; check the path and text_key'
      )
    if not is_text and 'record' not in documents[0]:
      raise ValueError(
        f'{source.name}: got documents of text, expected records for'
        f' data.examples = {data.examples}; open JSON Lines, Parquet or TFDS'
      )
    opened.append(documents)
  return Documents(
    train=tuple(opened[:-1]),
    evaluated=opened[-1],
    tasks=tasks_lib.open_tasks(experiment.evals),
  )


def assemble(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  say: Callable[[str], None] = lambda _: None,
  documents: Documents | None = None,
  make_sampler: sampler_lib.MakeSampler | None = None,
) -> Parts:
  """Builds the parts of a run.

  Args:
    documents: from `open_documents`; opened now if None.
    make_sampler: makes the sampler of a run with rollouts.

  Raises:
    ValueError, FileNotFoundError: the data cannot be opened, the vocabulary
      does not fit the model, or the model does not fit the devices.
  """
  if experiment.rollouts is not None:
    make_sampler = wiring.check(experiment, make_sampler)
  learner = learner_lib.make(experiment, rollout_devices.training(experiment))
  data = experiment.data
  documents = documents or open_documents(experiment)
  tokenizer = open_tokenizer(workdir, experiment, documents)
  frozen_models.check_tokenizers(
    experiment.objective, experiment.init_from, tokenizer
  )
  if make_sampler is not None and experiment.rollouts is not None:
    return _with_rollouts(
      experiment, workdir, learner, tokenizer, documents, make_sampler
    )
  with processes.together('data'):
    template = chat_template(experiment, workdir)
    *train, held_out = open_rows(
      experiment, tokenizer, documents, template, say
    )
  digests = [rows.store.digest for rows in (*train, held_out)]
  # Processes that read different data would train on batches that differ.
  digests += [d for task in documents.tasks for d in task.files.values()]
  processes.check_same('data', json.dumps(digests))
  spare_ids = tokenizer_lib.spare_ids(tokenizer, experiment.model.vocab_size)
  (*train, held_out), logprobs = reference.add_values(
    experiment, [*train, held_out], spare_ids, say
  )
  if execution.attention_path(experiment, learner.placement) == 'cudnn':
    most = _max_documents(experiment, [*train, held_out], say)
    learner = learner_lib.make(experiment, max_documents=most)
  eval_batches = batches_lib.EvalBatches(held_out, data.batch_size)
  _check_arrays(next(iter(eval_batches)), experiment.objective)
  return Parts(
    learner=learner.masking(spare_ids),
    tokenizer=tokenizer,
    batches=batches_lib.TrainBatches(train, data, seed=experiment.seed),
    eval_batches=eval_batches,
    stop_ids=_stop_ids(experiment, tokenizer, template),
    overlaps=tuple(_overlaps(train, held_out, tokenizer, data)),
    tasks=documents.tasks,
    logprobs=logprobs,
  )


def _with_rollouts(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  learner: learner_lib.Learner,
  tokenizer: tokenizer_lib.Tokenizer,
  documents: Documents,
  make_sampler: sampler_lib.MakeSampler,
) -> Parts:
  """Builds the parts of a run that samples its own data."""
  template = chat_template(experiment, workdir)
  stop_ids = _stop_ids(experiment, tokenizer, template)
  spare_ids = tokenizer_lib.spare_ids(tokenizer, experiment.model.vocab_size)
  learner = learner.masking(spare_ids)
  wired = wiring.wire(
    experiment,
    learner,
    tokenizer,
    (documents.train[0], documents.evaluated),
    template=template,
    stop_ids=stop_ids,
    make_sampler=make_sampler,
  )
  return Parts(
    learner=learner,
    tokenizer=tokenizer,
    batches=wired.batches,
    eval_batches=wired.held_out,
    stop_ids=stop_ids,
    overlaps=(),
    tasks=documents.tasks,
  )


def chat_template(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> str:
  """Returns the template of conversations; '': none, or the plain transcript.

  A resumed run does not need the directory of init_from.

  Raises:
    ValueError: it cannot be read.
  """
  data = experiment.data
  if data.examples == data_config.TEXT:
    return ''
  recorded = workdir_lib.recorded_template(workdir)
  if recorded is not None and not data.chat_template:
    return recorded
  return init_from.chat_template(experiment)


def open_rows(
  experiment: experiment_lib.Experiment,
  tokenizer: tokenizer_lib.Tokenizer,
  documents: Documents,
  template: str,
  say: Callable[[str], None] = lambda _: None,
) -> list[rows_lib.Rows]:
  """Returns the rows of each training source, and of the evaluation split.

  Raises:
    ValueError: a document cannot be read, or conversations cannot be trained
      with the chat template.
  """
  data = experiment.data
  if data.examples != data_config.TEXT:
    encoding.check(tokenizer, template)
  spec = experiment.objective.batch_spec()
  open_one = functools.partial(
    rows_lib.open_rows,
    tokenizer=tokenizer,
    config=data,
    template=template,
    arrays=tuple(name for name in spec if name in token_store.STREAM_DTYPES),
    say=say,
  )
  named = *data.train_sources(), data.eval_source()
  opened = *documents.train, documents.evaluated
  return [
    open_one(source, name=config.name)
    for config, source in zip(named, opened, strict=True)
  ]


def _stop_ids(
  experiment: experiment_lib.Experiment,
  tokenizer: tokenizer_lib.Tokenizer,
  template: str,
) -> tuple[int, ...]:
  """Returns the ids besides EOS that answers are trained to end with."""
  if experiment.data.examples == data_config.TEXT:
    return ()
  found = encoding.stop_ids(tokenizer, template)
  return tuple(i for i in found if i != tokenizer.eos_id)


def _max_documents(
  experiment: experiment_lib.Experiment,
  sources_of_rows: Sequence[rows_lib.Rows],
  say: Callable[[str], None],
) -> int:
  """Returns the most documents of a row, or 0 if cuDNN cannot use it."""
  most, model = rows_lib.max_documents(sources_of_rows), experiment.model
  if cudnn_gpu.way(most, 0) != 'packed':
    return most
  shape = experiment.data.row_length, model.num_heads, model.head_width
  refusal = cudnn_gpu.refusal(shape, model.num_kv_heads, most)
  if not processes.agree(bool(refusal)):
    return most
  say(f'attention  cuDNN takes no lengths of documents: {refusal}')
  return 0


def _check_arrays(batch: rows_lib.Batch, objective: port.Objective) -> None:
  """Refuses an objective that needs arrays which the data does not have."""
  expected = {
    name: f'{np.dtype(spec.dtype)} {spec.axes}'
    for name, spec in objective.batch_spec().items()
  }
  got = {
    name: f'{array.dtype} {"BT"[: array.ndim]}' for name, array in batch.items()
  }
  # The data may have more arrays; an objective takes only the arrays it reads.
  if not expected.items() <= got.items():
    raise ValueError(
      f'config.objective: got batches with {_listed(got)}, expected'
      f' {_listed(expected)} for {type(objective).__name__}; use an objective'
      ' for these arrays, or data that has the others'
    )


def _listed(arrays: dict[str, str]) -> str:
  return ', '.join(f'{name} ({kind})' for name, kind in arrays.items())


def _overlaps(
  train: Sequence[rows_lib.Rows],
  held_out: rows_lib.Rows,
  tokenizer: tokenizer_lib.Tokenizer,
  data: data_config.DataConfig,
) -> Iterator[overlap.Overlap]:
  """Yields the share of evaluation text in each training source.

  The first process alone searches.
  """
  ngram = data.contamination_ngram
  if ngram < 0:
    ngram = overlap.default_ngram(tokenizer)
  if ngram and processes.is_first():
    for rows in train:
      yield overlap.between_stores(rows.store, held_out.store, ngram)


def open_tokenizer(
  workdir: pathlib.Path,
  experiment: experiment_lib.Experiment,
  documents: Documents,
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a run: built and saved once, loaded from then on.

  Raises:
    ValueError: the tokenizer is damaged, or has more tokens than the model has
      embeddings.
  """
  data = experiment.data
  mixed = [
    (opened, source.weight)
    for opened, source in zip(
      documents.train, data.train_sources(), strict=True
    )
  ]
  directory = workdir / file_names.TOKENIZER
  with processes.together('tokenizer'):
    if processes.is_first() and not directory.exists():
      built = vocabulary.build_tokenizer(data.tokenizer, *mixed)
      with atomic.new_directory(directory) as partial:
        built.save(partial)
  try:
    loaded = tokenizer_lib.load(directory)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{directory}: got a tokenizer that cannot be read ({error}), expected'
      ' the one that the run was started with; put a copy there, as the one in'
      f' {file_names.FROZEN}/ is, or use another --workdir'
    ) from None
  if loaded.vocab_size > experiment.model.vocab_size:
    raise ValueError(
      f'model.vocab_size: got {experiment.model.vocab_size}, expected at least'
      f" the tokenizer's {loaded.vocab_size}"
    )
  model = experiment.model
  spare = tokenizer_lib.spare_ids(loaded, model.vocab_size)
  if model.spare_ids not in ((), spare):
    raise ValueError(
      f'model.spare_ids: got {model.spare_ids}, expected (), which becomes'
      f' {spare}, the ids that the tokenizer leaves; do not set it'
    )
  return loaded
