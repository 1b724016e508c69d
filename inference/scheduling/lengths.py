"""How many tokens of each sequence a dispatch of decodes may compute.

The plan gives one token to each decode. More are possible if the next plan
would decode the same sequences, and if pages for all of them are free.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sized

from inference.scheduling import page_tables, scheduler

# Decode steps of one dispatch while sequences wait: a waiting sequence gets a
# free slot after at most this many more steps.
STEPS_BEFORE_WAITING = 8


def is_steady(
  plan: scheduler.StepPlan, running: Collection[page_tables.Sequence]
) -> bool:
  """Returns whether the next plan would decode the same sequences.

  This holds if no running sequence has prompt tokens left, and no sequence
  enters or gives pages back.

  Args:
    plan: the latest plan.
    running: all sequences that have a slot.
  """
  if plan.prefills or plan.preempted or plan.admitted or not plan.decodes:
    return False
  # More running sequences than decodes: some prompt tokens wait for a later
  # step.
  return sum(each.is_ready for each in running) <= len(plan.decodes)


def decode_steps(
  sequences: Collection[page_tables.Sequence],
  most: int,
  tables: page_tables.PageTables,
) -> int:
  """Returns the number of decode steps that have free pages, 1 to `most`."""
  most = min(most, max(each.num_unsampled for each in sequences))
  while most > 1 and not _has_pages(
    {each: min(most, each.num_unsampled) for each in sequences}, tables
  ):
    most //= 2
  return most


def may_draft(
  plan: scheduler.StepPlan, running: Collection[page_tables.Sequence]
) -> bool:
  """Returns whether a plan may verify drafts.

  A plan that preempts may not: pages are short. Nor may one that decodes a part
  of the sequences without prompt tokens: the others wait for pages.

  Args:
    plan: the latest plan.
    running: all sequences that have a slot.
  """
  has_chunks = bool(plan.prefills and plan.decodes and not plan.preempted)
  return has_chunks or is_steady(plan, running)


def drafts(
  wanted: Mapping[page_tables.Sequence, int],
  prefills: Mapping[page_tables.Sequence, int],
  tables: page_tables.PageTables,
) -> dict[page_tables.Sequence, int]:
  """Returns how many drafted tokens may follow the next token of each sequence.

  A token is sampled after the next token, and after each drafted token. Returns
  {} if a token is in flight, because a draft continues known tokens.

  Args:
    wanted: tokens of the draft of each decode of a plan, 0 or more.
    prefills: tokens of prompts that the plan computes beside them. Their pages
      come first.
    tables: the pages.
  """
  if any(each.num_in_flight for each in wanted):
    return {}
  found = {
    each: max(min(length, each.num_unsampled - 1), 0)
    for each, length in wanted.items()
  }
  while any(found.values()) and not _has_pages(
    {**{each: length + 1 for each, length in found.items()}, **prefills}, tables
  ):
    found = {each: length // 2 for each, length in found.items()}
  return found


def work(
  sequences: Iterable[page_tables.Sequence],
  decode_steps: int,
  drafted: Mapping[Hashable, Sized] | None,
) -> list[tuple[page_tables.Sequence, int]]:
  """Returns the tokens of each decode: its decode steps, or 1 and its draft."""
  if drafted is None:
    return [(each, min(decode_steps, each.num_unsampled)) for each in sequences]
  return [(each, 1 + len(drafted.get(each.id, ()))) for each in sequences]


def _has_pages(
  lengths: Mapping[page_tables.Sequence, int], tables: page_tables.PageTables
) -> bool:
  """Returns whether pages for so many tokens of each sequence are left."""

  def num_pages(sequence: page_tables.Sequence, length: int) -> int:
    if sequence.is_running:
      return tables.num_missing(sequence, length)
    # It enters with this plan: idle pages of its prefix hit are no more idle.
    task = tables.task(sequence)
    num = tables.num_pages(task.num_computed + length) + task.num_copies
    num -= task.num_pages + task.num_hit_pages
    return num + task.num_idle_hit_pages

  allocator = tables.allocator
  return allocator.num_free + allocator.num_idle >= sum(
    num_pages(each, length) for each, length in lengths.items()
  )
