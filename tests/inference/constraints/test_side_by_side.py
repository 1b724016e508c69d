"""Masks of a batch: all of them, on several threads, and their errors."""

import threading

import numpy as np
import pytest

from inference.constraints import constraint, grammars, side_by_side
from text import tokenizer as tokenizer_lib


@pytest.mark.parametrize('num_tasks', [0, 1, 3, 4, 5, 16])
@pytest.mark.parametrize('num_threads', [1, 2, 3, None])
def test_each_task_runs_once(num_tasks, num_threads):
  done = []
  tasks = [lambda i=i: done.append(i) for i in range(num_tasks)]
  side_by_side.run(tasks, num_threads)
  assert sorted(done) == list(range(num_tasks))


def test_shares_run_at_the_same_time():
  # Each task waits for a task of the other share.
  barrier = threading.Barrier(2)
  threads = set()

  def task():
    threads.add(threading.get_ident())
    barrier.wait(timeout=20)

  side_by_side.run([task] * 4, 2)
  assert len(threads) == 2
  assert threading.get_ident() in threads


@pytest.mark.parametrize('place', range(4))
def test_an_error_comes_after_all_shares(place):
  done = []

  def task(i):
    if i == place:
      raise ValueError(f'task {i}')
    done.append(i)

  with pytest.raises(ValueError, match=f'task {place}'):
    side_by_side.run([lambda i=i: task(i) for i in range(4)], 4)
  assert sorted(done + [place]) == list(range(4))


def test_masks_are_those_of_one_thread():
  pytest.importorskip('llguidance')
  tokenizer = tokenizer_lib.ByteTokenizer()
  grammar = grammars.Grammars(tokenizer).compile(
    constraint.Constraint(kind='regex', text='[a-f]{3}[0-9]+')
  )
  matchers = [grammar.matcher() for _ in range(8)]
  for i, matcher in enumerate(matchers):
    for byte in b'abc12'[:i]:
      matcher.push(byte)
  words = -(-tokenizer.vocab_size // 32)

  def masks(num_threads):
    bits_RW = np.full((8, words), 2**32 - 1, np.uint32)
    side_by_side.run(
      [
        lambda i=i, each=each: each.ahead().fill(bits_RW[i])
        for i, each in enumerate(matchers)
      ],
      num_threads,
    )
    return bits_RW

  alone_RW = masks(1)
  assert (alone_RW[0] != alone_RW[3]).any()
  np.testing.assert_array_equal(masks(4), alone_RW)
