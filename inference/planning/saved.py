"""The bytes that kernels in fewer bits save, for the plan of serving."""

from collections.abc import Mapping
import math
from typing import NamedTuple

import jax.numpy as jnp

from frozen import stored_kernels
from inference.planning import subject as subject_lib
from models import model_config
from models.linear.stored import tree as stored_tree


class Saved(NamedTuple):
  """The bytes that kernels in fewer bits save."""

  memory: int = 0
  step: int = 0  # of its reads, experts left out
  experts: int = 0  # of the reads of a step that reads all experts


def of_subject(subject: subject_lib.Subject) -> Saved:
  """Returns the bytes that a model saves as a whole."""
  if subject.quantization == stored_kernels.NONE:
    return Saved()  # the shapes of a model take a moment
  itemsize = jnp.dtype(subject.dtype).itemsize
  saved = {
    path: itemsize * math.prod(leaf.shape) - leaf.nbytes
    for path, leaf in stored_kernels.by_path(subject.shapes()).items()
    if stored_tree.is_stored(leaf)
  }
  return with_reads(saved, subject.config)


def with_reads(
  saved: Mapping[str, int], config: model_config.ModelConfig
) -> Saved:
  """Returns the saved bytes in memory and in the reads of a step.

  Args:
    saved: bytes of each kernel, by path.
    config: of the model.
  """
  total = sum(saved.values())
  # A step looks up rows of an embedding that is not the head, too.
  tied = config.tie_embeddings
  unread = 0 if tied else saved.get('params/embed/embedding', 0)
  experts = sum(n for path, n in saved.items() if '/expert_' in path)
  return Saved(total, total - unread - experts, experts)
