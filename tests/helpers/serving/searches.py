"""Questions for searches over a scripted engine, and how they are run."""

from inference.requests import prices as prices_lib, requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  drive,
  samples as samples_lib,
  search as search_lib,
  strategy as strategy_lib,
)
from tests.helpers.serving import scripted_engine

PRICES = prices_lib.Prices(prompt=1.0, cached=0.25, completion=4.0)


def question(prompt: str = '2+2=', **settings) -> samples_lib.Question:
  """Returns a question whose samples have the seed 7 and 60 tokens."""
  settings = {'seed': 7, 'max_tokens': 60, **settings}
  return samples_lib.Question(
    request=requests_lib.Request(
      prompt_ids=tuple(prompt.encode()),
      settings=settings_lib.Settings(**settings),
    ),
    prompt=prompt,
  )


def run(
  strategy: strategy_lib.Strategy,
  engine: scripted_engine.ScriptedEngine,
  questions: list[samples_lib.Question] | None = None,
  **fields,
) -> list[search_lib.Outcome]:
  """Searches on an engine, which is idle afterwards."""
  found = drive.run(
    engine,
    strategy,
    questions or [question()],
    costs=budget_lib.Costs(engine.model_config, prices=PRICES),
    clock=engine.clock,
    **fields,
  )
  assert not engine.has_work
  return found


def saying(*texts: str, **fields) -> scripted_engine.ScriptedEngine:
  """Returns an engine whose sample i says text i."""
  return scripted_engine.ScriptedEngine(
    lambda _, number, rng: texts[number % len(texts)], **fields
  )
