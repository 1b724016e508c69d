"""The results of a step before its tokens are sampled."""

from typing import Any, NamedTuple

import jax
import numpy as np

from inference.engine.compiled import keys as keys_lib


class Pending(NamedTuple):
  """The results of a step of decodes and chunks."""

  logits_RV: jax.Array
  prompt: Any
  hidden_MD: Any
  where: Any  # slots, positions and forced tokens of the tokens to sample
  size: int  # R


class Beside(NamedTuple):
  """The results of a step that has drafts beside chunks."""

  key: keys_lib.Beside
  step: Pending
  spans_2XW: np.ndarray  # see `verification.accept_beside`


class Drafted(NamedTuple):
  """The results of a step that verifies drafts alone."""

  shape: keys_lib.Verified
  logits_XRV: jax.Array
  flat_I: np.ndarray  # the inputs of the step
