"""Pools of samples that keep the texts, for verifiers that are models.

`studies/think/pool.py` keeps numbers of each answer alone, which are enough
for a strategy. The same seed draws the same answers.
"""

from collections.abc import Sequence
import dataclasses
import io
import json
import os
import pathlib
from typing import Any, Self
import zipfile

import numpy as np

from inference import generate
from storage import atomic
from studies.think import pool as pool_lib

_TEXTS = 'texts'  # JSON in the file of the pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """A pool, its questions, and the texts of its answers."""

  pool: pool_lib.Pool
  questions: list[str]  # Q
  texts: list[list[str]]  # Q, N

  def save(self, path: str | os.PathLike) -> None:
    """Writes all into one file."""
    file = io.BytesIO()
    said = json.dumps([self.questions, self.texts])
    arrays: dict[str, Any] = vars(self.pool) | {_TEXTS: np.array(said)}
    np.savez_compressed(file, **arrays)
    atomic.write_bytes(pathlib.Path(path), file.getvalue())

  @classmethod
  def load(cls, path: str | os.PathLike) -> Self:
    """Returns the answers of a file.

    Raises:
      ValueError: the file has no answers.
    """
    try:
      file = io.BytesIO(pathlib.Path(path).read_bytes())
      with np.load(file, allow_pickle=False) as found:
        arrays = dict(found)
      questions, texts = json.loads(str(arrays.pop(_TEXTS)))
      pool = pool_lib.Pool(**arrays)
    except (TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
      raise ValueError(
        f'{os.fspath(path)}: got no answers with their texts ({e}), expected'
        ' them; remove the file, and the study draws them again'
      ) from None
    return cls(pool=pool, questions=questions, texts=texts)


def draw(
  path: pathlib.Path,
  generator: generate.Generator,
  problems: Sequence[pool_lib.Asked],
  **how: Any,
) -> Answers:
  """Returns the answers of a model; reads the file, or writes it.

  Args:
    path: of the answers.
    generator: of the model.
    problems: that it answers.
    **how: see `pool.draw_with_texts`.

  Raises:
    ValueError: the file is damaged.
  """
  if path.exists():
    return Answers.load(path)
  pool, texts = pool_lib.draw_with_texts(generator, problems, **how)
  questions = [each.question for each in problems]
  found = Answers(pool=pool, questions=questions, texts=texts)
  found.save(path)
  return found
