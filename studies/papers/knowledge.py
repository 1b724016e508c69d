"""Measurements of claims about facts in the weights: how many, and of what use.

The facts are the attributes of invented people, so their bits are known. The
bits that a model knows of an attribute with V values are log2 V less its loss
on them, in bits (Allen-Zhu and Li 2024, arXiv:2404.05405, section 2; names,
which they count too, are left out here).
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.synthetic import biographies
from evals import claims as claims_lib
from models import adapter_config, axes
from models.linear.stored import round as rounding, tree as stored_tree
from studies.papers import port, small_models

_BATCH = 128  # texts of a step
_MEASURED = 8192  # the most people whose bits are measured
_SCHEMES = 'int8', 'int4'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
  """The size of a measurement."""

  vocabulary: biographies.Vocabulary
  num_people: int
  num_layers: int
  width: int
  num_heads: int
  exposures: tuple[int, ...]  # texts of each person, one model for each


_SMALL = Scale(
  vocabulary=biographies.Vocabulary(
    names=(20, 100), values=(12, 28, 40, 40, 30, 30, 40)
  ),
  num_people=1536,
  num_layers=2,
  width=24,
  num_heads=2,
  exposures=(1000, 100),
)
# The attributes of the paper: month, day and year of birth, city of birth,
# university, field, employer, and a pronoun.
_LARGE = Scale(
  vocabulary=biographies.Vocabulary(
    names=(400, 400, 1000), values=(12, 28, 200, 200, 300, 100, 263, 2)
  ),
  num_people=20_480,
  num_layers=3,
  width=64,
  num_heads=2,
  exposures=(1000, 100),
)


def knowledge_capacity(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the bits per parameter, and the bits that rounding leaves."""
  return _capacity(claim, setting, _SMALL)


def knowledge_capacity_large(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the same of the paper's attributes."""
  return _capacity(claim, setting, _LARGE)


def _capacity(
  claim: claims_lib.Claim, setting: port.Setting, scale: Scale
) -> port.Measured:
  runs = [
    {
      exposures: _known(scale, exposures, seed, setting)
      for exposures in scale.exposures
    }
    for seed in setting.seeds
  ]
  most, few = scale.exposures
  found = (
    [run[most]['float'] for run in runs],
    [run[few]['float'] for run in runs],
    [run[most]['float'] - run[most]['int8'] for run in runs],
    [run[most]['int4'] for run in runs],
  )
  return {
    quantity.name: values
    for quantity, values in zip(claim.quantities, found, strict=True)
  }


def _known(
  scale: Scale, exposures: int, seed: int, setting: port.Setting
) -> Mapping[str, float]:
  """Returns the bits per parameter that a model knows, by form of weights."""
  vocabulary = scale.vocabulary
  num_steps = scale.num_people * exposures // _BATCH
  recipe = small_models.Recipe(
    model=small_models.gpt(
      scale.width,
      vocabulary.num_ids,
      vocabulary.text_length,
      num_layers=scale.num_layers,
      num_heads=scale.num_heads,
      tie_embeddings=True,
    ),
    optimizer=dataclasses.replace(
      small_models.adam(5e-3, decay=0.01), schedule='linear', end_lr=0.0
    ),
    num_steps=num_steps,
    look_every=math.gcd(num_steps, scale.num_people * 20 // _BATCH),
  )
  people = biographies.draw(
    np.random.default_rng([seed, 2]), vocabulary, scale.num_people
  )

  def draw(rng):
    return people.texts(rng.integers(len(people), size=_BATCH), rng)

  def measure():
    trainer = small_models.Trainer(recipe)
    params = trainer.last(seed, draw)
    forms = {'float': params}
    forms |= {scheme: rounded(params, scheme) for scheme in _SCHEMES}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
      form: bits_known(trainer, weights, people) / count
      for form, weights in forms.items()
    }

  return small_models.kept(
    setting, recipe, f'exposures_{exposures}', seed, measure
  )


def rounded(params: Any, scheme: str) -> Any:
  """Returns the variables with each kernel and table rounded by a scheme."""

  def of_leaf(path, leaf):
    *_, kind = axes.names(path)
    if kind == 'embedding':  # a table has a row for each id
      return of_leaf((*path[:-1], jax.tree_util.DictKey('kernel')), leaf.T).T
    if kind != 'kernel':
      return leaf
    stored = {'kernel': rounding.by_scheme(leaf, scheme)}
    return jnp.asarray(stored_tree.whole_kernels(stored)['kernel'])

  return jax.tree_util.tree_map_with_path(of_leaf, params)


def bits_known(
  trainer: small_models.Trainer, params: Any, people: biographies.People
) -> float:
  """Returns the bits of the people's attributes that a model knows.

  With many people, those of the first are measured, and scaled to all.
  """
  chosen = np.arange(min(len(people), _MEASURED))
  ids_BT, is_value_BT = people.texts(chosen, np.random.default_rng(0))
  nll_BT, _ = trainer.seen(params, ids_BT)
  lost = float(nll_BT[is_value_BT[:, 1:]].sum()) / math.log(2) / len(chosen)
  return len(people) * max(people.vocabulary.bits_per_person - lost, 0.0)


# ------------------------------------------------------------------------------
# Use


_PHRASES, _ASKED_PEOPLE = 5, 1024
_TEXT_EPOCHS, _QUESTION_STEPS = 300, 1000


def knowledge_extraction(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the right answers about people whose questions were not trained."""
  plain, varied = claim.quantities
  return {
    quantity.name: [
      _extracted(seed, setting, is_varied=is_varied) for seed in setting.seeds
    ]
    for quantity, is_varied in ((plain, False), (varied, True))
  }


def _extracted(seed: int, setting: port.Setting, *, is_varied: bool) -> float:
  """Returns the share of right answers about people without questions.

  A model learns texts of all people. Then adapters learn questions about half
  of them, and the other half is asked.
  """
  vocabulary = biographies.Vocabulary(
    names=(40, 100),
    values=(40, 40, 30, 30, 40),
    phrases=_PHRASES if is_varied else 1,
  )
  recipe = small_models.Recipe(
    model=small_models.gpt(
      96, vocabulary.num_ids, vocabulary.text_length, num_layers=3, num_heads=4
    ),
    optimizer=dataclasses.replace(
      small_models.adam(2e-3, decay=0.05), schedule='linear', end_lr=0.0
    ),
    num_steps=_ASKED_PEOPLE * _TEXT_EPOCHS // _BATCH,
    look_every=_ASKED_PEOPLE * 20 // _BATCH,
  )
  people = biographies.draw(
    np.random.default_rng([seed, 2]), vocabulary, _ASKED_PEOPLE
  )
  asked, others = np.split(np.arange(_ASKED_PEOPLE), 2)

  def draw_texts(rng):
    chosen = rng.integers(_ASKED_PEOPLE, size=_BATCH)
    return people.texts(chosen, rng, is_permuted=is_varied)

  def draw_questions(rng):
    chosen = rng.choice(asked, size=_BATCH)
    return people.questions(
      chosen, rng.integers(len(vocabulary.values), size=_BATCH)
    )

  def measure():
    texts = small_models.Trainer(recipe).last(seed, draw_texts)
    tuner = small_models.Trainer(
      dataclasses.replace(
        recipe,
        optimizer=small_models.adam(1e-3),
        num_steps=_QUESTION_STEPS,
        look_every=_QUESTION_STEPS // 10,
        adapter=adapter_config.AdapterConfig(rank=8, alpha=16.0),
      )
    )
    tuned = tuner.last(seed, draw_questions, texts)
    return {
      name: _right_answers(tuner, tuned, people, who)
      for name, who in (('asked', asked), ('others', others))
    }

  name = 'varied' if is_varied else 'plain'
  return small_models.kept(setting, recipe, name, seed, measure)['others']


def _right_answers(
  trainer: small_models.Trainer,
  params: Any,
  people: biographies.People,
  chosen: np.ndarray,
) -> float:
  """Returns the share of right answers to all questions about some people."""
  count = len(people.vocabulary.values)
  ids_BT, is_answer_BT = people.questions(
    np.repeat(chosen, count), np.tile(np.arange(count), len(chosen))
  )
  _, is_right_BT = trainer.seen(params, ids_BT)
  return float(is_right_BT[is_answer_BT[:, 1:]].mean())
