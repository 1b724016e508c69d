"""What a draft model has computed, beside pages whose contents are known."""

import random

from inference.speculation import followed


class _Pages:
  """The tokens before each slot that a draft model has written."""

  def __init__(self, size):
    self.size, self.slots = size, {}

  def write(self, pages, text, start, stop):
    for at in range(start, stop):
      key = pages[at // self.size], at % self.size
      self.slots[key] = tuple(text[: at + 1])

  def holds(self, pages, text, stop):
    return all(
      self.slots.get((pages[at // self.size], at % self.size))
      == tuple(text[: at + 1])
      for at in range(stop)
    )


class _Text:
  def __init__(self, tokens, pages):
    self.tokens, self.pages, self.losses = tokens, pages, 0


def test_no_token_counts_as_computed_whose_page_has_other_contents():
  """Sequences that grow, share, lose and get pages, with wrong guesses."""
  rng, size, num_exact = random.Random(0), 4, 0
  for _ in range(60):
    known, pages = followed.Followed(size), _Pages(size)
    free, texts = list(range(40)), {}
    rng.shuffle(free)
    for number in range(80):
      if len(texts) < 4:
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 14))]
        texts[number] = _Text(tokens, [])
      id = rng.choice(list(texts))
      text = texts[id]
      if rng.random() < 0.1:  # it loses its pages, and gets others or the same
        free += text.pages
        text.pages, text.losses = [], text.losses + 1
        rng.shuffle(free)
      if rng.random() < 0.05:
        free += text.pages
        known.forget(id)
        del texts[id]
        continue
      while len(text.pages) * size < len(text.tokens) + 4:
        text.pages.append(free.pop())
      held = tuple(text.pages)
      num = known.num_computed(id, text.tokens, held, text.losses)
      assert num < len(text.tokens)
      assert pages.holds(held, text.tokens, num)
      more = pages.holds(held, text.tokens, num + 1)
      num_exact += not more or num + 1 == len(text.tokens)
      stop = rng.randrange(num, len(text.tokens) + 1)
      pages.write(held, text.tokens, num, stop)
      known.wrote(id, text.tokens, stop)
      if stop == len(text.tokens):
        guess = [rng.randrange(2) for _ in range(3)]
        pages.write(held, text.tokens + guess, stop, stop + 3)
        known.guessed(id, held, guess)
        text.tokens += [rng.randrange(2) for _ in range(rng.randrange(1, 5))]
        while len(text.pages) > -(-(len(text.tokens) - 1) // size):
          free.append(text.pages.pop())
  assert num_exact > 2000


def test_a_page_that_another_sequence_has_filled_is_found():
  known = followed.Followed(4)
  tokens = list(range(11))
  assert known.num_computed('a', tokens, (5, 6, 7), 0) == 0
  known.wrote('a', tokens, 11)
  known.forget('a')
  # The same text holds the full pages, and a new one.
  assert known.num_computed('b', tokens, (5, 6, 8), 0) == 8
  # Another text took a page of them since.
  other = [9] * 11
  assert known.num_computed('c', other, (1, 6, 2), 0) == 0
  known.wrote('c', other, 11)
  assert known.num_computed('d', tokens, (5, 6, 9), 0) == 4


def test_guesses_that_were_right_need_no_second_pass():
  known = followed.Followed(4)
  tokens = [1, 2, 3]
  known.num_computed('a', tokens, (5, 6), 0)
  known.wrote('a', tokens, 3)
  known.guessed('a', (5, 6), (4, 5, 6))
  assert known.num_computed('a', [1, 2, 3, 4, 5, 7], (5, 6), 0) == 5
  # The last token is left, since a draft continues it.
  known.guessed('a', (5, 6), (7, 8))
  assert known.num_computed('a', [1, 2, 3, 4, 5, 7], (5, 6), 0) == 5
