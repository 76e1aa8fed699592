"""An OpenAI-compatible endpoint as the model of a handler, against a server of this test's own."""

import http.server
import json
import threading

import openai
import pytest

from jaxlab.core.checks import InputError
from jaxlab.tasks import endpoint, handlers
from jaxlab.tasks.decomposed_prompting import Answer, Question, solve


@pytest.fixture
def server():
  """(client, requests that came, replies to give): the replies are (status, object), the last one for ever."""
  asked, replies = [], []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
      status, reply = replies.pop(0) if len(replies) > 1 else replies[0]
      body = json.dumps(reply(asked[-1]) if callable(reply) else reply).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *arguments):
      pass

  listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
  url = f"http://127.0.0.1:{listening.server_port}/v1"
  yield openai.OpenAI(base_url=url, api_key="none", max_retries=0), asked, replies
  listening.shutdown()
  listening.server_close()


def choices(*rows):
  """A completion response of (text, log-probabilities) in order."""
  return {
    "id": "1", "object": "text_completion", "created": 0, "model": "m",
    "choices": [
      {"index": i, "text": text, "finish_reason": "stop",
       "logprobs": None if given is None else {"token_logprobs": given}}
      for i, (text, given) in enumerate(rows)
    ],
  }  # fmt: skip


def test_prompts_go_in_batches_and_costs_are_mean_log_probabilities(server):
  client, asked, replies = server
  replies.append((200, lambda request: choices(*((f" {len(p)}", [None, -1.0, -0.5]) for p in request["prompt"]))))
  generate = endpoint.completions(client, "m", batch=2, max_tokens=7)
  assert generate(["a", "bb", "ccc"]) == [[(" 1", 0.75)], [(" 2", 0.75)], [(" 3", 0.75)]]
  assert [request["prompt"] for request in asked] == [["a", "bb"], ["ccc"]]
  assert all((r["stop"], r["max_tokens"], r["n"], r["temperature"]) == ("\n", 7, 1, 0) for r in asked)
  assert handlers.prompted(generate)([Question("x")]) == [Answer(7, 0.75)]  # 'Q: x\nA:' has 7 letters


def test_samples_come_by_prompt_the_likeliest_first(server):
  client, _, replies = server
  replies.append((200, choices(("a", [-2.0]), ("b", [-1.0]), ("c", None), ("d", [-1.0]))))
  generate = endpoint.completions(client, "m", samples=2, temperature=0.5)
  assert generate(["p", "q"]) == [[("b", 1.0), ("a", 2.0)], [("c", 0.0), ("d", 1.0)]]


def test_a_program_runs_on_an_endpoint(server):
  client, _, replies = server
  line = lambda prompt: " [EOQ]" if "\nA: " in prompt else " [up] word"
  replies.append((200, lambda request: choices(*((line(prompt), [-0.25]) for prompt in request["prompt"]))))
  main = handlers.prompted_decomposer(endpoint.completions(client, "m"))
  first, second = solve(["q", "r"], "main", {"main": main, "up": handlers.function(str.upper)})
  assert first.answer == second.answer == "WORD" and first.cost == 0.5


@pytest.mark.parametrize(
  "reply",
  [
    {},
    {"choices": []},
    choices(("a", None), ("b", None)),
    choices((None, None)),
    choices(("a", [float("nan")])),
    [1],
    "no",
  ],
)
def test_nonsense_is_asked_for_again_then_told_in_one_line(server, reply):
  client, asked, replies = server
  replies += [(200, reply), (200, choices(("a", None)))]
  assert endpoint.completions(client, "m")(["p"]) == [[("a", 0.0)]] and len(asked) == 2
  replies[:] = [(200, reply)]
  with pytest.raises(InputError, match="did not answer 1 prompts as asked in 3 attempts"):
    endpoint.completions(client, "m")(["p"])
  assert len(asked) == 5


def test_what_fails_on_the_way_is_asked_for_again_by_the_client(server, monkeypatch):
  client, asked, replies = server
  client = client.with_options(max_retries=2)
  monkeypatch.setattr("time.sleep", lambda _: None)
  busy = {"error": {"message": "too many requests"}}
  replies += [(429, busy), (503, busy), (200, choices(("a", None)))]
  assert endpoint.completions(client, "m")(["p"]) == [[("a", 0.0)]] and len(asked) == 3
  replies[:] = [(503, busy)]
  with pytest.raises(InputError, match=r"too many requests.*see that the endpoint runs"):
    endpoint.completions(client, "m")(["p"])
  assert len(asked) == 6


def test_an_endpoint_that_refuses_or_is_not_there_is_named(server):
  client, asked, replies = server
  replies.append((404, {"error": {"message": "no model m"}}))
  with pytest.raises(InputError, match=r"127\.0\.0\.1.*no model m.*see that the endpoint runs and serves m"):
    endpoint.completions(client, "m")(["p"])
  gone = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
  with pytest.raises(InputError, match="see that the endpoint runs"):
    endpoint.completions(gone, "m")(["p"])
  assert len(asked) == 1 and endpoint.completions(client, "m")([]) == []


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"max_tokens": 0}, {"attempts": 0}, {"temperature": -1.0}])
def test_impossible_settings_are_named(server, wrong):
  with pytest.raises(InputError, match=next(iter(wrong))):
    endpoint.completions(server[0], "m", **wrong)
