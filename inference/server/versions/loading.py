"""From a frozen directory to the generator of a version, in its process."""

import gc
import logging
import os

from inference import generate
from inference.engine import engine_config
from inference.engine.processes import leader as leader_lib
from inference.server.versions import memory

_LOG = logging.getLogger('uvicorn.error')


def read(
  directory: str | os.PathLike,
  config: engine_config.EngineConfig,
  *,
  version: str,
  plan: memory.Plan,
  is_for_rewards: bool = False,
  leader: leader_lib.Leader | None = None,
) -> generate.Generator:
  """Returns the generator of a frozen directory, without all programs.

  Args:
    directory: the frozen directory.
    config: the layout of the engine.
    version: NAME@DIGEST, for the log.
    plan: of its memory, for the log.
    is_for_rewards: whether it is a reward model.
    leader: of an engine over several processes, see `Engine`.
  """
  _LOG.info('%s: memory %s', version, plan)
  _LOG.info('%s: shapes %s', version, _shapes(config))
  generator = generate.load(
    directory,
    config,
    compile_all=False,
    is_for_rewards=is_for_rewards,
    leader=leader,
  )
  gc.freeze()  # it stays: see `keep_objects`
  gc.enable()  # serve.py has disabled it
  return generator


def keep_objects() -> None:
  """Tells the garbage collector that programs and weights stay.

  Otherwise it walks them now and then, for 60 to 150 ms, and all clients wait.
  """
  gc.collect()
  gc.freeze()
  gc.enable()  # serve.py has disabled it
  # It also walks requests in progress, 80 ms for 256: once a minute is enough.
  gc.set_threshold(700, 10, 100)


def _shapes(config: engine_config.EngineConfig) -> str:
  """Returns the shapes that steps are compiled for, as text."""
  shapes = config.step_shapes()
  alone = [decodes for decodes, chunks in shapes if not chunks]
  most_chunks = max(chunks for _, chunks in shapes)
  return (
    f'{len(shapes)}: steps of {", ".join(map(str, alone))} decodes; up to'
    f' {most_chunks} chunks of {config.chunk_tokens} prompt tokens, alone and'
    ' beside decodes'
  )
