"""The server on loopback, asked by the clients that people use."""

import collections
import concurrent.futures
import json
import os
import signal
import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import uvicorn

from jaxlab.models import generate, hub, inference
from jaxlab.models.config import qwen3
from jaxlab.models.text import raw_prompt
from jaxlab.serving.__main__ import _parse, _Server, main
from jaxlab.serving.requests import Request
from tests.common import SHAPE, random_model, start, wait
from tests.serving.conftest import Running, until


def client(running, **options):
  return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120, **options)


def offline(running, prompt: str | list[int], tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
  ids = raw_prompt(running.vocabulary, prompt) if isinstance(prompt, str) else prompt
  how = dict(tokens=tokens, temperature=temperature, key=jax.random.key(seed))
  made = generate(running.network, np.array([ids]), **how)[0].tolist()
  stop = next((i for i, token in enumerate(made) if token in running.vocabulary.eos), len(made))
  return running.vocabulary.tokenizer.decode(made[:stop])


def test_streams_side_by_side_are_what_each_would_be_alone(running):
  def ask(i):
    how = dict(max_tokens=10 + i, temperature=i % 2, seed=i, stream=True)
    parts = client(running).completions.create(model="tiny", prompt=f"import {i * 'x '}", **how)
    choices = [part.choices[0] for part in parts]
    assert choices[-1].finish_reason in ("length", "stop")
    assert all(choice.finish_reason is None for choice in choices[:-1])
    return "".join(choice.text for choice in choices)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(ask, range(8)))
  assert found == [offline(running, f"import {i * 'x '}", 10 + i, i % 2, i) for i in range(8)]
  until(running.idle)


def test_a_chat_is_what_the_template_makes_of_it(running):
  asked = dict(model="tiny", messages=[{"role": "user", "content": "def f"}], temperature=0, max_completion_tokens=12)
  tokenizer = running.vocabulary.tokenizer
  prompt = tokenizer.encode("user: def f\nassistant:", add_special_tokens=False).ids
  expected = offline(running, prompt, 12)
  answer = client(running).chat.completions.create(**asked, logprobs=True)
  (choice,) = answer.choices
  assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
  logp = jax.nn.log_softmax(inference.step(running.network, jnp.array([prompt]))[0][0, -1].astype(jnp.float32))
  np.testing.assert_allclose(choice.logprobs.content[0].logprob, logp.max(), rtol=1e-4, atol=1e-4)
  parts = list(client(running).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
  assert "".join(part.choices[0].delta.content for part in parts[:-1]) == expected
  assert parts[0].choices[0].delta.role == "assistant" and parts[-1].usage == answer.usage
  stop = expected[4:7]
  ended = client(running).chat.completions.create(**asked, stop=[stop, "never"]).choices[0]
  assert (ended.message.content, ended.finish_reason) == (expected[: expected.index(stop)], "stop")
  until(running.idle)
  assert 'jaxlab_requests_total{finish="stop"}' in httpx.get(f"{running.url}/metrics").text
  until(running.idle)


def test_several_prompts_and_answers_come_in_their_order(running):
  prompts = ["import", "return"]
  answer = client(running).completions.create(model="tiny", prompt=prompts, n=2, temperature=1, seed=5, max_tokens=6)
  expected = [offline(running, p, 6, 1.0, 5 + k) for p in prompts for k in range(2)]
  assert [choice.text for choice in answer.choices] == expected
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_answers_differ_where_no_seed_is_given(running):
  ask = lambda **more: client(running).completions.create(
    model="tiny", prompt="import", temperature=1, max_tokens=8, **more
  )
  seeded = {ask(seed=3).choices[0].text for _ in range(2)}
  assert len(seeded) == 1 and len({ask().choices[0].text for _ in range(4)}) > 1


def test_equal_prompts_of_a_body_have_answers_of_their_own(running):
  ask = lambda **more: client(running).completions.create(
    model="tiny", prompt=["import"] * 3, temperature=1, max_tokens=8, **more
  )
  texts = lambda answer: [choice.text for choice in answer.choices]
  assert len({*texts(ask())}) == 3 and len({*texts(ask(seed=3))}) == 1  # a seed that is given is each prompt's


def test_offsets_and_bytes_are_those_of_the_text(running):
  """Of tokens that are parts of characters, too, in a stream as at once; an echo is the text that came."""
  text = "import 日"
  asked = dict(model="tiny", prompt=text, temperature=1, seed=1, max_tokens=9, logprobs=1)
  whole = client(running).completions.create(**asked, echo=True).choices[0]
  assert whole.text.startswith(text)
  ids = raw_prompt(running.vocabulary, text)
  tokenizer = running.vocabulary.tokenizer
  starts = [len(tokenizer.decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids))]
  assert whole.logprobs.text_offset[: len(ids)] == starts and starts[-1] == len(text) - 1
  assert whole.logprobs.text_offset[len(ids)] == len(text)
  alone = client(running).completions.create(**asked).choices[0]
  parts = list(client(running).completions.create(**asked, stream=True))
  streamed = [at for part in parts if part.choices[0].logprobs for at in part.choices[0].logprobs.text_offset]
  assert streamed == alone.logprobs.text_offset == [at - len(text) for at in whole.logprobs.text_offset[len(ids) :]]
  assert streamed[0] == 0 and streamed[-1] > 0
  chat = client(running).chat.completions.create(
    model="tiny", messages=[{"role": "user", "content": "日"}], temperature=1, seed=4, max_tokens=8, logprobs=True
  )
  spelled = b"".join(bytes(t.bytes) for t in chat.choices[0].logprobs.content)
  assert spelled.decode(errors="replace") == chat.choices[0].message.content


def test_the_prompt_is_scored_where_it_is_echoed(running):
  """As the evaluation harness asks for log-likelihoods."""
  ids = raw_prompt(running.vocabulary, "def add(a, b): return")
  asked = dict(model="tiny", prompt=ids, echo=True, logprobs=1)
  answer = client(running).completions.create(**asked, max_tokens=1, temperature=0)
  found = answer.choices[0].logprobs
  logp = jax.nn.log_softmax(inference.step(running.network, jnp.array([ids]))[0][0].astype(jnp.float32))
  np.testing.assert_allclose(found.token_logprobs[1:-1], logp[np.arange(len(ids) - 1), ids[1:]], rtol=1e-4, atol=1e-4)
  best = [max(top.values()) for top in found.top_logprobs[1:]]
  np.testing.assert_allclose(best, logp.max(axis=1), rtol=1e-4, atol=1e-4)
  assert len(found.tokens) == len(ids) + 1 and found.token_logprobs[0] is None
  assert answer.choices[0].text.startswith(running.vocabulary.tokenizer.decode(ids, skip_special_tokens=False))
  none = client(running).completions.create(**asked, max_tokens=0)
  assert len(none.choices[0].logprobs.tokens) == len(ids) and none.usage.completion_tokens == 0


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(network, vocabulary, stream, path):
  """In the middle of answers that would take for ever: a step waits until the client has gone. A chat's stream begins
  before there is a token."""
  server = Running(network, vocabulary)
  step, gone, steps = server.runner.engine.step, threading.Event(), []

  def slow():
    steps.append(0)
    if len(steps) > 3:
      gone.wait(60)
      time.sleep(0.3)
    return step()

  server.runner.engine.step = slow
  try:
    asked = dict(prompt="import") if path == "completions" else dict(messages=[dict(role="user", content="import")])
    body = dict(model="tiny", max_tokens=100, n=4, temperature=1, stream=stream) | asked
    if stream:
      with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
    else:
      with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/{path}", json=body, timeout=httpx.Timeout(60, read=1))
    gone.set()
    until(server.idle)
    assert len(steps) < 20, "they were made to their end"
  finally:
    gone.set()
    server.close()


def test_what_it_serves_and_how_it_is(running):
  assert [model.id for model in client(running).models.list()] == ["tiny"]
  assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
  client(running).completions.create(model="tiny", prompt="import", max_tokens=3)
  told = httpx.get(f"{running.url}/metrics").text
  assert 'jaxlab_requests_total{finish="length"}' in told and "jaxlab_time_to_first_token_seconds_bucket" in told
  assert "jaxlab_running 0.0" in told


BAD = [
  (b"{", "the body is not JSON"),
  (b"[" * 100_000, "the body is not JSON"),
  (b"[]", "the body must be a JSON object"),
  (b"{}", "prompt must be a text"),
  (dict(prompt=""), None),
  (dict(prompt=[]), "prompt must be a text"),
  (dict(prompt=[[1], []]), "prompt must be a text"),
  (dict(prompt=[True]), "prompt must be a text"),
  (dict(prompt=[8192]), r"the prompt has ids 8192..8192, the model 0..8191"),
  (dict(prompt=[-1]), "the prompt has ids -1"),
  (dict(prompt=[1] * 500), "the prompt has 500 tokens; there is room for 128"),
  (dict(prompt="a", max_tokens=500), "500 new ones are wanted; there is room for 128"),
  (dict(prompt="a", max_tokens=-1), "max_tokens is -1"),
  (dict(prompt="a", max_tokens=1.5), "max_tokens is 1.5"),
  (dict(prompt="a", max_tokens="9"), "max_tokens is '9'"),
  (dict(prompt="a", temperature=-1), "temperature is -1"),
  (dict(prompt="a", temperature=float("nan")), "temperature is nan"),
  (dict(prompt="a", top_p=0), "top_p is 0"),
  (dict(prompt="a", min_p=2), "min_p"),
  (dict(prompt="a", n=0), "n is 0"),
  (dict(prompt="a", stop=[""]), "a stop string is empty"),
  (dict(prompt="a", stop=[1]), "stop must be a text"),
  (dict(prompt="a", stream="yes"), "stream is 'yes'"),
  (dict(prompt="a", logprobs=5), "logprobs is 5"),
  (dict(prompt="a", seed="x"), "seed is 'x'"),
  (dict(prompt="a", frequency_penalty=1), "frequency_penalty is not supported"),
  (dict(prompt="a", temprature=1), "there is no field 'temprature'"),
  (dict(prompt="a", model="gpt-4"), "there is no model 'gpt-4'; this server has tiny"),
  (dict(prompt="a", stream_options=3), "stream_options must be an object"),
  (dict(prompt="a", stream_options=dict(include_usage="yes")), "include_usage is 'yes'"),
  (dict(prompt="a\ud800"), "prompt has half of a UTF-16 pair at character 1"),
  (dict(prompt=["a"] * 64, n=64), "64 prompts and n=64 are 4096 sequences; the server holds"),
]


@pytest.mark.parametrize("body, message", BAD, ids=range(len(BAD)))
def test_bodies_that_cannot_be_answered_are_named(running, body, message):
  content = body if isinstance(body, bytes) else json.dumps(body)
  response = httpx.post(f"{running.url}/v1/completions", content=content, timeout=60)
  if message is None:  # this vocabulary begins texts with a token of its own
    assert response.status_code == 200
    return
  assert response.status_code == 400 and message in response.json()["error"]["message"]
  assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
  "messages, message",
  [
    (None, "messages must be a list"),
    ([], "messages must be a list"),
    (["hi"], "must be an object"),
    ([{"role": "user"}], "must have a role and a content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "is not text alone"),
    ([{"role": "user", "content": "\udc00"}], "messages[0] has half of a UTF-16 pair"),
    ([{"role": "user", "content": "a", "name": 3}], "messages[0] has 'name', which is not supported"),
  ],
)
def test_chats_that_cannot_be_answered_are_named(running, messages, message):
  content = json.dumps(dict(messages=messages))
  response = httpx.post(f"{running.url}/v1/chat/completions", content=content, timeout=60)
  assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_limits_and_the_token(network, vocabulary):
  server = Running(network, vocabulary, queue_length=0, token="secret", rows=1, timeout=60)
  try:
    ask = lambda token="secret", **more: httpx.post(
      f"{server.url}/v1/completions",
      headers={"authorization": f"Bearer {token}"},
      timeout=60,
      **more or dict(json=dict(prompt="a", max_tokens=4)),
    )
    assert ask().status_code == 200
    assert ask("other").status_code == 401 and httpx.get(f"{server.url}/v1/models").status_code == 401
    assert ask(content=b" " * 4_000_001).status_code == 413
    assert ask(json=dict(prompt="a", n=2)).status_code == 400  # it never could
    step, go_on = server.runner.engine.step, threading.Event()
    server.runner.engine.step = lambda: (go_on.wait(60), step())[1]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      first = pool.submit(ask)
      until(lambda: server.runner.open)
      full = ask()
      go_on.set()
      assert full.status_code == 429 and full.headers["retry-after"] == "1"
      assert first.result().status_code == 200
    until(server.idle)
    assert ask().status_code == 200
  finally:
    server.close()


def test_nobody_else_is_let_in_unless_asked_for():
  assert _parse([]).host == "127.0.0.1" and _parse(["--host=0.0.0.0"]).host == "0.0.0.0"


def test_a_request_that_takes_too_long_is_ended(network, vocabulary):
  server = Running(network, vocabulary, timeout=0.0)
  try:
    response = httpx.post(f"{server.url}/v1/completions", json=dict(prompt="a", max_tokens=100), timeout=60)
    assert response.status_code == 503 and "took too long" in response.json()["error"]["message"]
    until(server.idle)
  finally:
    server.close()


def test_an_engine_that_fails_lets_nobody_wait(network, vocabulary):
  server = Running(network, vocabulary)
  try:

    def fail():
      raise RuntimeError("out of memory")

    server.runner.engine.step = fail
    ask = lambda: httpx.post(f"{server.url}/v1/completions", json=dict(prompt="a"), timeout=60)
    assert ask().status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert ask().status_code == 503 and "the engine stopped" in ask().text
    told = []  # one that was handed in while the step failed
    server.runner._commands.put(lambda: server.runner._add(Request("late", [1], 1), told.append))
    until(lambda: told)
    assert told[0].finish == "error: the engine stopped: RuntimeError"
  finally:
    server.close()


def test_the_command_serves_a_folder_and_ends_its_streams_when_told_to(tmp_path, vocabulary):
  """SIGTERM while two answers are streamed: one ends by itself, the other in an error event; the status is 0."""
  hub.save(random_model(qwen3(**SHAPE | dict(depth=1, vocab_size=8192), context=100_000)), tmp_path)
  (tmp_path / "tokenizer.json").write_text(vocabulary.tokenizer.to_str())
  options = ("--port=0", "--rows=4", "--cache-gb=0.05", "--no-warm-up", "--drain=5", "--budget=16")
  process = start("jaxlab.serving", f"--model={tmp_path}", *options)
  said = lambda: (process.folder / "1").read_text() if (process.folder / "1").exists() else ""
  seen = collections.Counter()

  def stream(url, tokens):
    lines, body = [], dict(prompt="import", max_tokens=tokens, stream=True, temperature=1)
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=120) as response:
      for line in response.iter_lines():
        lines.append(line)
        seen[tokens] += bool(line)
    return [line for line in lines if line]

  try:
    until(lambda: "\n" in said() or not process.is_alive(), 120)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      found = [pool.submit(stream, said().split()[-1], tokens) for tokens in (40, 50_000)]
      until(lambda: seen[40] > 9 and seen[50_000], 120)  # nothing is left to compile, and 30 tokens at most
      os.kill(process.pid, signal.SIGTERM)
      short, long = (future.result() for future in found)
    process.join(60)
  finally:
    done = wait(process, 0)  # a process that is left would be waited for
  assert short[-1] == "data: [DONE]" and '"finish_reason": "length"' in short[-2]
  assert "the server is shutting down" in long[-1]
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(monkeypatch, number):
  """The first lets what runs come to an end."""
  done = []
  monkeypatch.setattr(os, "_exit", done.append)
  server = _Server(uvicorn.Config(None), lambda: done.append("drain"))
  with server.capture_signals():
    signal.raise_signal(number)
    assert done == ["drain"] and server.should_exit and not server.force_exit
    signal.raise_signal(number)
  assert done[:2] == ["drain", 1]  # and there would be no more


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--model=nowhere", "--port=0"], "no checkpoint 'nowhere'"),
    (["--model=base", "--port=70000"], "--port is 70000"),
    (["--model=base", "--port=0", "--tensor=99"], "--tensor is 99; there are"),
    (["--model=base", "--policy=fair"], "--policy is 'fair'"),
    (["--model=base", "--port=0", "--cache-gb=0"], "--cache-gb has no room for two pages"),
    (["--model=base", "--rows=many"], "argument --rows: invalid int value"),
    (["--model=base", "--timeout=0"], "--timeout must be positive"),
    (["--model=base", "--page=0"], "--page is 0"),
    (["--model=base", "--queue=-1"], "--queue is -1"),
    (["--model=base", "--rows=8", "--budget=8"], "--budget is 8; it must be above --rows, 8"),
    (["--model=base", "--port=0", "--cache-gb=nan"], "--cache-gb is nan"),
    (["--model=base", "--method=snlp"], "method is 'snlp'; it must be one of chelsea"),
    (["--model=base", "--method=chelsea,kep=1"], "an option of method chelsea is 'kep'"),
    (["--model=base", "--method=chelsea,keep=x"], "method chelsea has keep='x'; it must be a value like 0.25"),
    (["--model=base", "--method=chelsea,keep"], "--method has 'keep'; its options are NAME=VALUE"),
    (["--model=base", "--port=0", "--method=snapkv"], "keeps what pages of one table cannot hold"),
    (["--model=nowhere", "--host=192.0.2.1"], "cannot listen at 192.0.2.1:8000"),
  ],
)
def test_commands_that_cannot_serve_end_in_one_line(arguments, message, capsys):
  assert main(arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line
