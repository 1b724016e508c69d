"""Compilations, counted on the thread that does them."""

import threading

import jax
import numpy as np

from inference.engine.compiled import compilations


def _compile(number):
  return jax.jit(lambda x: x + number)(np.ones(3, np.float32))


def test_each_new_program_counts_once():
  before = compilations.on_this_thread()
  function = jax.jit(lambda x: x * 17)
  function(np.ones(3, np.float32))
  assert compilations.on_this_thread() == before + 1
  function(np.zeros(3, np.float32))
  assert compilations.on_this_thread() == before + 1
  function(np.zeros(4, np.float32))  # another shape
  assert compilations.on_this_thread() == before + 2


def test_a_program_from_the_persistent_cache_counts_too():
  before = compilations.on_this_thread()
  for _ in range(2):
    _compile(23)  # a function of its own each time, but the same program
  assert compilations.on_this_thread() == before + 2


def test_other_threads_have_counts_of_their_own():
  counts = {}

  def work():
    counts['before'] = compilations.on_this_thread()
    _compile(5)
    counts['after'] = compilations.on_this_thread()

  before = compilations.on_this_thread()
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert counts == {'before': 0, 'after': 1}
  assert compilations.on_this_thread() == before
