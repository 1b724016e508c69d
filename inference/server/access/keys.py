"""Keys: who sends a request, and what the sender may have of the server."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
  """What is known of a key; the key itself is kept nowhere.

  A limit that is None does not exist.
  """

  id: str  # names the key in lists and in the ledger; no secret
  name: str  # the principal: fairness and cached prompts go by it
  is_admin: bool = False  # may use the routes below /admin
  allows_feedback: bool = False  # what it says of answers may be stored
  requests_per_minute: int | None = None
  tokens_per_minute: int | None = None  # of prompts and completions
  max_concurrent: int | None = None  # requests that are open at once
  budget: float | None = None  # money, in the currency of the prices
  weight: float = 1.0  # share of the engine, beside those of other principals
