"""The train step of a small GPT-2, compiled for an H100 that is not here.

    texts = gpu_programs.compile([{'layers': 'scanned'}, {'max_documents': 5}])

The compiler runs in a process of its own: once it ended the test worker that it
ran in, and the worker's other tests were lost. Programs that are equal before
XLA are compiled once.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from data import data_config
from experiments import presets
from hardware import targets
from tests.helpers import tiny_models
from training import experiment as experiment_lib
from training.optimizer import chain

ROWS, TIME, LAYERS, HEADS = 4, 512, 3, 4


def compile(variants: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the optimised program of each variant, as text.

  Args:
    variants: fields of the ExecutionConfig, and 'max_documents' of a row.

  Raises:
    RuntimeError: the compiler failed; says how.
  """
  with tempfile.TemporaryDirectory() as directory:
    done = subprocess.run(
      [
        sys.executable,
        *('-m', 'tests.helpers.gpu_programs', directory),
        json.dumps(list(variants)),
      ],
      cwd=pathlib.Path(__file__).parents[2],
      env=tiny_models.subprocess_env(),
      capture_output=True,
      text=True,
    )
    if done.returncode:
      raise RuntimeError(
        f'the compiler ended with {done.returncode}: {done.stderr[-4000:]}'
      )
    return [
      (pathlib.Path(directory) / f'{i}.txt').read_text()
      for i in range(len(variants))
    ]


def _main(directory: str, variants: str) -> None:
  targets.prepare_environment()
  from training import learner as learner_lib  # imports jax
  from training.planning import choices

  devices = targets.devices(targets.parse('h100:1'))
  compiled: dict[str, str] = {}
  for index, variant in enumerate(json.loads(variants)):
    max_documents = variant.pop('max_documents', 1)
    chosen = choices.make(_experiment(variant), devices).experiment
    learner = learner_lib.make(chosen, devices, max_documents)
    lowered = learner.placement.lower_train(
      learner.build_train_step, learner.batch_shapes()
    )
    text = lowered.as_text()
    if text not in compiled:
      compiled[text] = lowered.compile().as_text()
    path = pathlib.Path(directory) / f'{index}.txt'
    path.write_text(compiled[text])


def _experiment(execution: Mapping[str, Any]) -> experiment_lib.Experiment:
  return experiment_lib.Experiment(
    name='gpu_program',
    model=presets.gpt2(
      vocab_size=512, num_layers=LAYERS, num_heads=HEADS, width=256, length=TIME
    ),
    data=data_config.DataConfig(
      path='-', batch_size=ROWS, row_length=TIME, packing='best_fit'
    ),
    optimizer=chain.OptimizerConfig(),
    execution=experiment_lib.ExecutionConfig(**execution),
    compute_dtype='bfloat16',
  )


if __name__ == '__main__':
  _main(*sys.argv[1:])
