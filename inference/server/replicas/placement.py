"""Which replica answers a request: prefix affinity within a margin of load.

A replica that has computed the beginning of a prompt finds it in its prefix
cache. So the replica with the longest known prefix answers, unless it is busier
than the least busy one by more than a margin: then the request goes there, and
that replica knows the prefix from now on. Without a known prefix the least busy
replica answers. The idea, and the need of the margin, are those of Preble
(Srivatsa et al., arXiv:2407.00023, section 3) and of SGLang's router
(lmsys.org/blog/2024-12-04-sglang-v0-4, cache-aware load balancer); both keep a
radix tree, here are hashes of blocks, which need less memory and no eviction
rules but the oldest first.

The server never asks a replica for the contents of its cache. It remembers what
it has sent, and forgets when a replica starts anew.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import itertools

# Tokens of a block. Shorter prefixes are not worth a busier replica.
BLOCK = 32
# Blocks of a prompt that are hashed, 16,384 tokens: 3 ms of the event loop.
_MOST_BLOCKS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A replica that could answer."""

  index: int
  num_open: int  # sequences that it answers now
  num_known: int  # blocks of the prompt that it has been sent before
  num_served: int  # sequences so far


def margin_of(max_sequences: int) -> int:
  """Returns the margin of `choose` for replicas that run so many sequences.

  With a sixteenth of them, simulated fleets carried 1.6, 2.8 and over 5 times
  the load that they did with a quarter, at 16, 32 and 64 replicas, and no less
  at 4 and 8 (experiments/LOG.md, 2026-11-30): a replica that knows a popular
  prefix has so many prompts more to compute than the others.
  """
  return max(1, max_sequences // 16)


def choose(candidates: Sequence[Candidate], *, margin: int) -> Candidate:
  """Returns the replica that answers.

  Args:
    candidates: at least one.
    margin: sequences by which the replica with the longest known prefix may be
      busier than the least busy one.
  """
  least = min(each.num_open for each in candidates)
  near = [each for each in candidates if each.num_open <= least + margin]
  best = max(near, key=lambda each: (each.num_known, -each.num_open))
  if best.num_known:
    return best
  return min(
    candidates, key=lambda each: (each.num_open, each.num_served, each.index)
  )


def blocks(scope: tuple, prompt_ids: Sequence[int]) -> list[int]:
  """Returns a hash for each beginning of a prompt, of whole blocks.

  The last token is never part of one: a cache hit leaves a token to compute.

  Args:
    scope: prefixes are shared within one, as of a principal and an adapter.
    prompt_ids: the prompt.
  """
  num = min((len(prompt_ids) - 1) // BLOCK, _MOST_BLOCKS)
  return list(itertools.islice(_chained(hash(scope), prompt_ids), max(num, 0)))


def _chained(before: int, prompt_ids: Sequence[int]) -> Iterator[int]:
  for start in itertools.count(0, BLOCK):
    before = hash((before, tuple(prompt_ids[start : start + BLOCK])))
    yield before


class Known:
  """The blocks that a replica was sent, as many as its cache may hold."""

  def __init__(self, most_tokens: int):
    """Starts empty.

    Args:
      most_tokens: that the cache of the replica holds.
    """
    self._most = max(most_tokens // BLOCK, 1)
    self._blocks: collections.OrderedDict[int, None] = collections.OrderedDict()

  def num_known(self, found: Sequence[int]) -> int:
    """Returns how many blocks of a prompt are known, from its beginning."""
    for num, each in enumerate(found):
      if each not in self._blocks:
        return num
    return len(found)

  def add(self, found: Sequence[int]) -> None:
    """Notes that the replica is sent a prompt; forgets the oldest blocks."""
    # The end first: the beginnings, which others share, stay longest.
    for each in reversed(found):
      self._blocks[each] = None
      self._blocks.move_to_end(each)
    while len(self._blocks) > self._most:
      self._blocks.popitem(last=False)
