"""Bits of facts: what is known of uniform values, and rounded weights."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from data.synthetic import biographies
from models import param_shapes
from studies.papers import knowledge, port, registry, small_models

WORDS = biographies.Vocabulary(names=(10, 10), values=(8, 4, 16))
NUM_PEOPLE = 50


class Seer:
  """Stands for a trainer whose model gives each value a probability."""

  def __init__(self, probability):
    self.nll = -math.log(probability)

  def seen(self, params, ids_BT):
    del params
    shape = len(ids_BT), ids_BT.shape[1] - 1
    return np.full(shape, self.nll), np.ones(shape, bool)


def test_bits_are_those_of_the_values_less_the_loss():
  people = biographies.draw(np.random.default_rng(0), WORDS, NUM_PEOPLE)
  assert WORDS.bits_per_person == 3 + 2 + 4
  known = {
    probability: knowledge.bits_known(Seer(probability), None, people)
    for probability in (1.0, 0.5, 1e-3)
  }
  assert known[1.0] == pytest.approx(NUM_PEOPLE * 9)
  assert known[0.5] == pytest.approx(NUM_PEOPLE * (9 - 3))
  assert known[1e-3] == 0  # worse than chance is no knowledge


def test_many_people_are_measured_by_the_first(monkeypatch):
  people = biographies.draw(np.random.default_rng(0), WORDS, NUM_PEOPLE)
  whole = knowledge.bits_known(Seer(0.25), None, people)
  monkeypatch.setattr(knowledge, '_MEASURED', 10)
  assert knowledge.bits_known(Seer(0.25), None, people) == pytest.approx(whole)


@pytest.mark.parametrize(('scheme', 'steps'), [('int8', 127), ('int4', 7.5)])
def test_weights_are_rounded_column_by_column(scheme, steps):
  rng = np.random.default_rng(0)
  kernel_IO = rng.normal(size=(16, 6)).astype(np.float32)
  table_VD = rng.normal(size=(12, 16)).astype(np.float32)
  scale_D = rng.normal(size=16).astype(np.float32)
  params = {
    'params': {
      'embed': {'embedding': table_VD},
      'layer_0': {'mlp': {'up': {'kernel': kernel_IO}}},
      'final_norm': {'scale': scale_D},
    }
  }
  found = knowledge.rounded(params, scheme)['params']
  np.testing.assert_array_equal(found['final_norm']['scale'], scale_D)
  for given, made, axis in (
    (kernel_IO, found['layer_0']['mlp']['up']['kernel'], 0),
    (table_VD, found['embed']['embedding'], 1),
  ):
    step = np.abs(given).max(axis=axis, keepdims=True) / steps
    error = np.abs(np.asarray(made) - given)
    assert (error <= step * 0.501).all()
    assert error.max() > step.min() * 0.25


@pytest.mark.slow
def test_a_small_model_knows_what_it_was_shown(tmp_path):
  words = dataclasses.replace(WORDS, names=(20, 20))
  scale = knowledge.Scale(
    vocabulary=words, num_people=128, num_layers=1, width=32, num_heads=2,
    exposures=(1000, 60),
  )  # fmt: skip
  setting = port.Setting(seeds=(0,), workdir=tmp_path, inputs={})
  known = {
    exposures: knowledge._known(scale, exposures, 0, setting)
    for exposures in scale.exposures
  }
  config = small_models.gpt(
    32, words.num_ids, words.text_length, num_layers=1, tie_embeddings=True
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes.of(config)))
  bits = {form: each * count for form, each in known[1000].items()}
  # Few facts for so many weights: nearly all of them are known.
  assert bits['float'] == pytest.approx(128 * 9, rel=0.05)
  assert bits['float'] >= bits['int8'] > bits['int4']
  assert known[60]['float'] * count < bits['float'] * 0.9


@pytest.mark.slow
def test_questions_are_asked_of_people_whose_questions_were_not_trained(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(knowledge, '_ASKED_PEOPLE', 128)
  monkeypatch.setattr(knowledge, '_TEXT_EPOCHS', 100)
  monkeypatch.setattr(knowledge, '_QUESTION_STEPS', 60)
  (claim,) = [
    each
    for each in registry.all_claims()
    if each.name == 'knowledge_extraction'
  ]
  setting = port.Setting(seeds=(0,), workdir=tmp_path, inputs={})
  found = knowledge.knowledge_extraction(claim, setting)
  assert found.keys() == {each.name for each in claim.quantities}
  for path in tmp_path.iterdir():
    run = json.loads(path.read_text('utf-8'))
    # So short a training generalises to nobody, but its questions are learnt.
    assert 0 <= run['others'] <= 1
    assert run['asked'] > run['others']
  assert {path.name.split('_')[0] for path in tmp_path.iterdir()} == {
    'plain', 'varied',
  }  # fmt: skip
