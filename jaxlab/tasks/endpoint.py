"""`generate` for the handlers of decomposed prompting from any OpenAI-compatible endpoint, through its own client.

  client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
  generate = endpoint.completions(client, "smollm2", stop="\\n", max_tokens=100)
  handlers = {"qa": prompted(generate, examples)}

The client retries what fails on the way (`max_retries`); what is answered and is no completion is asked for again here.
"""

import math
from collections.abc import Sequence

import openai

from jaxlab.core.checks import InputError, require, require_counts
from jaxlab.tasks.handlers import Generate


def completions(
  client: openai.OpenAI,
  model: str,
  *,
  stop: str | None = "\n",
  max_tokens: int = 100,
  samples: int = 1,
  temperature: float = 0.0,
  attempts: int = 3,
  batch: int = 64,
) -> Generate:
  """For each prompt `samples` (text, mean negative log-probability of its tokens), the likeliest first.

  The cost is 0 where the endpoint gives no log-probabilities.

  Args:
    temperature: 0 is greedy; more samples than one need it above 0 to differ.
    attempts: requests for one batch until it is answered as asked.
    batch: prompts a request.

  Raises:
    InputError: counts below 1, a temperature that is negative or no number; and when called: an endpoint that cannot
      be reached, refuses, or does not answer as asked after `attempts` requests.
  """
  require_counts(max_tokens=max_tokens, samples=samples, attempts=attempts, batch=batch)
  require(temperature >= 0 and math.isfinite(temperature), f"temperature is {temperature}; it must be 0 or more")
  options = dict(model=model, stop=stop, max_tokens=max_tokens, n=samples, temperature=temperature, logprobs=1)

  def generate(prompts: Sequence[str]):
    parts = [list(prompts[at : at + batch]) for at in range(0, len(prompts), batch)]
    return [row for part in parts for row in ask(part)]

  def ask(prompts):
    for _ in range(attempts):
      try:
        return _rows(client.completions.create(prompt=prompts, **options), len(prompts), samples)
      except (openai.APIConnectionError, openai.APIStatusError) as error:  # the client has retried these itself
        raise InputError(f"{client.base_url}: {error!s:.200}; see that the endpoint runs and serves {model}") from None
      except (openai.OpenAIError, InputError, AttributeError, TypeError, ValueError, LookupError) as error:
        why = f"{type(error).__name__}: {error!s:.120}"
    raise InputError(f"{client.base_url} did not answer {len(prompts)} prompts as asked in {attempts} attempts ({why})")

  return generate


def _rows(response, prompts: int, samples: int):
  """The choices by prompt, checked: the index counts samples within prompts."""
  by_index = {choice.index: choice for choice in response.choices}
  require(set(by_index) == set(range(prompts * samples)), f"{len(by_index)} choices for {prompts} x {samples}")
  rows = [[_read(by_index[i * samples + j]) for j in range(samples)] for i in range(prompts)]
  return [sorted(row, key=lambda pair: pair[1]) for row in rows]


def _read(choice):
  require(isinstance(choice.text, str), f"a choice has the text {choice.text!r:.40}")
  given = getattr(choice.logprobs, "token_logprobs", None) or []
  known = [value for value in given if value is not None]
  cost = -sum(known) / len(known) if known else 0.0
  require(math.isfinite(cost), f"a choice has log-probabilities {known!r:.60}")
  return choice.text, max(cost, 0.0)
