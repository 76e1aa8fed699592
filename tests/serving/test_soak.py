"""Ten thousand requests of every kind at overload: nobody crashes the server, and nothing is left behind."""

import asyncio
import collections
import functools
import json
import resource
import sys

import httpx
import numpy as np
import pytest

from tests.serving.conftest import Running, until
from tests.serving.test_server import BAD, offline

COUNT, AT_ONCE, QUEUE = 10_000, 48, 24
PROMPTS = ["import", "def f(x):", "return", "class A:", "for i in", "x = [1, 2,", "# the", '"""']
GROWTH = 48  # MiB that memory may grow by over the second half: what allocators keep


def memory() -> float:
  """Largest resident memory of this process so far, MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.slow
def test_ten_thousand_requests_of_every_kind(network, vocabulary):
  server = Running(network, vocabulary, queue_length=QUEUE)
  try:
    expected = {(i, n): offline(server, PROMPTS[i], n, i % 2, i) for i in range(len(PROMPTS)) for n in (3, 9, 17)}
    bad = [content if isinstance(content, bytes) else json.dumps(content) for content, message in BAD if message]
    rng, seen, peaks = np.random.default_rng(0), collections.Counter(), []
    limits = httpx.Limits(max_connections=AT_ONCE)

    async def good(client, stream: bool):
      i, n = int(rng.integers(len(PROMPTS))), int(rng.choice([3, 9, 17]))
      body = dict(prompt=PROMPTS[i], max_tokens=n, temperature=i % 2, seed=i, stream=stream)
      response = await client.post("/v1/completions", json=body)
      if response.status_code == 429:
        return "full"
      assert response.status_code == 200, response.text
      if stream:
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
      else:
        text = response.json()["choices"][0]["text"]
      assert text == expected[i, n], "tokens of another request"
      return "answered"

    async def leaves(client):
      body = dict(prompt="import", max_tokens=60, n=2, temperature=1, stream=True)
      async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
          return "full"
        async for _ in response.aiter_lines():
          return "left"

    async def wrong(client):
      response = await client.post("/v1/completions", content=bad[rng.integers(len(bad))])
      assert response.status_code == 400, response.text
      return "refused"

    async def elsewhere(client):
      path, status = [("/v1/nothing", 404), ("/v1/completions", 405), ("/health", 200), ("/metrics", 200)][
        rng.integers(4)
      ]
      assert (await client.get(path)).status_code == status
      return "others"

    async def one(client, gate):
      async with gate:
        kind = rng.choice(5, p=[0.3, 0.2, 0.15, 0.25, 0.1])
        whole, streamed = functools.partial(good, stream=False), functools.partial(good, stream=True)
        seen[await (whole, streamed, leaves, wrong, elsewhere)[kind](client)] += 1

    async def all_of_them():
      gate = asyncio.Semaphore(AT_ONCE)
      async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        for _ in range(2):
          await asyncio.gather(*(one(client, gate) for _ in range(COUNT // 2)))
          peaks.append(memory())

    asyncio.run(all_of_them())
    until(server.idle)
    pages = server.runner.engine.pages
    assert seen.total() == COUNT and min(seen[k] for k in ("answered", "left", "refused", "full", "others")) > 100, seen
    assert pages.free == len(pages.holders) - 1, "pages leaked"
    assert peaks[1] - peaks[0] < GROWTH, f"memory grows: {peaks}"
    assert httpx.get(f"{server.url}/health").status_code == 200
  finally:
    server.close()
