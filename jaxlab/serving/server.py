"""An OpenAI-compatible server over the engine: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

python -m jaxlab.serving --model=smollm2 --port=8000
"""

import asyncio
import contextlib
import dataclasses
import hmac
import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlab.core.checks import InputError, require
from jaxlab.models.text import Pieces, Until, token_bytes
from jaxlab.models.vocabulary import Vocabulary
from jaxlab.serving import protocol
from jaxlab.serving.protocol import Asked
from jaxlab.serving.requests import Event, Request, Served
from jaxlab.serving.runner import Full, Runner, Stopped

_BODY = 4_000_000  # bytes
_LOOK = 0.2  # seconds between two looks whether the client is there
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
  """What /metrics tells; times are those at which the host read a token."""

  def __init__(self):
    self.registry = CollectorRegistry()
    make = lambda kind, name, what, **more: kind(f"jaxlab_{name}", what, registry=self.registry, **more)
    self.requests = make(Counter, "requests", "requests that ended", labelnames=("finish",))
    self.prompt = make(Counter, "prompt_tokens", "tokens of prompts that were served")
    self.generated = make(Counter, "generated_tokens", "tokens that were made")
    self.first = make(Histogram, "time_to_first_token_seconds", "from arrival", buckets=_SECONDS)
    self.between = make(Histogram, "time_between_tokens_seconds", "of one request", buckets=_SECONDS)
    self.running = make(Gauge, "running", "sequences that run")
    self.waiting = make(Gauge, "waiting", "sequences that wait")
    self.free = make(Gauge, "free_pages", "pages that could be given away")

  def ended(self, served: Served) -> None:
    """Counts a request."""
    self.requests.labels(served.finish).inc()
    self.prompt.inc(len(served.request.prompt))
    self.generated.inc(served.made)
    if served.times:
      self.first.observe(max(0.0, served.times[0] - served.request.arrival))
    for before, after in itertools.pairwise(served.times):
      self.between.observe(after - before)

  def text(self, engine) -> bytes:
    """In Prometheus' format."""
    self.running.set(len(engine.running))
    self.waiting.set(len(engine.waiting))
    self.free.set(engine.pages.free)
    return generate_latest(self.registry)


class _Refused(Exception):
  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class _Answer:
  """The text of one sequence as it comes."""

  def __init__(self, index: int, vocabulary: Vocabulary, asked: Asked, prompt: list[int], text: str | None, limit: int):
    self.index, self.prompt, self.limit = index, prompt, limit
    self._tokenizer, self._pieces = vocabulary.tokenizer, Pieces(vocabulary.tokenizer)
    self._until, self._asked, self._text = Until(asked.stop), asked, text
    self.finish: str | None = None
    self.made = 0
    self._length = 0  # characters so far, those of stop strings among them
    # Not yet told: token, log-probability, the likeliest token and its, where it begins in the text.
    self.tokens: list[tuple[int, float | None, tuple[int, float] | None, int]] = []

  def take(self, event: Event) -> str:
    """The new text, with `finish` set where it ends."""
    text = ""
    if self._asked.echo and not self.made:
      text, starts = self._echoed()
      scores = [(None, None, None), *(event.scores or [(None, None, None)] * (len(self.prompt) - 1))]
      for token, (logprob, best, top), start in zip(self.prompt, scores, starts, strict=True):
        self.tokens.append((token, logprob, None if best is None else (best, top), start))
      self._length = len(text)
    self.made += 1
    if self.made <= self.limit:
      self.tokens.append((event.token, event.logprob, event.best, self._length))
      if event.finish != "stop":  # the stop token is no text
        piece = self._pieces.push(event.token) or ""
        self._length += len(piece)
        text += self._until.push(piece)
    if self._until.found:
      self.finish = "stop"
    elif event.finish:
      self.finish = event.finish
      text += self._until.push(self._pieces.end()) + self._until.end()
    return text

  def _echoed(self) -> tuple[str, list[int]]:
    """(the prompt as it came, where each of its tokens begins); what the tokenizer puts before a text is none of it."""
    of_text = self.prompt if self._text is None else self._tokenizer.encode(self._text, add_special_tokens=False).ids
    pieces, text, starts = Pieces(self._tokenizer, special=True), "", []
    for token in of_text:
      starts.append(len(text))
      text += pieces.push(token) or ""
    before = [0] * (len(self.prompt) - len(starts))
    return text + pieces.end() if self._text is None else self._text, before + starts

  def logprobs(self, chat: bool) -> dict | None:
    """Of the tokens since the last call, in the form of the API."""
    tokens, self.tokens = self.tokens, []
    if not self._asked.logprobs:
      return None
    name = lambda i: self._tokenizer.decode([i], skip_special_tokens=False)
    if chat:
      entry = lambda i, lp: {"token": name(i), "logprob": lp, "bytes": list(token_bytes(self._tokenizer, i))}
      best = lambda top: [] if top is None else [entry(*top)]
      return {"content": [entry(i, lp) | {"top_logprobs": best(top)} for i, lp, top, _ in tokens]}
    return {
      "tokens": [name(i) for i, *_ in tokens],
      "token_logprobs": [lp for _, lp, *_ in tokens],
      "top_logprobs": [None if top is None else {name(top[0]): top[1]} for *_, top, _ in tokens],
      "text_offset": [start for *_, start in tokens],
    }


def app(
  runner: Runner,
  vocabulary: Vocabulary,
  name: str,
  *,
  metrics: Metrics | None = None,
  token: str | None = None,
  timeout: float = 600.0,
) -> Starlette:
  """The application.

  Args:
    name: of the model; token: what clients must send as a bearer; timeout: seconds that a request may take.
  """
  metrics, created = metrics or Metrics(), int(time.time())

  async def models(request: HTTPRequest) -> Response:
    _permit(request)
    entry = {"id": name, "object": "model", "created": created, "owned_by": "jaxlab"}
    return JSONResponse({"object": "list", "data": [entry]})

  async def health(request: HTTPRequest) -> Response:
    return JSONResponse({"status": runner.failed or "ok"}, 503 if runner.failed else 200)

  async def tell_metrics(request: HTTPRequest) -> Response:
    _permit(request)
    return Response(metrics.text(runner.engine), media_type="text/plain; version=0.0.4")

  def _permit(request: HTTPRequest) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
      raise _Refused(401, "a bearer token is needed, or another one")

  async def complete(request: HTTPRequest) -> Response:
    return await _answer(request, chat=False)

  async def answer_chat(request: HTTPRequest) -> Response:
    return await _answer(request, chat=True)

  async def _answer(request: HTTPRequest, chat: bool) -> Response:
    _permit(request)
    asked = (protocol.chat if chat else protocol.completion)(await _body(request), vocabulary, name)
    served = _Served(runner, vocabulary, asked, chat, name, timeout)
    served.begin()
    if asked.stream:
      return _Stream(served, request)
    try:
      return JSONResponse(await served.whole(request))
    finally:
      served.close()

  async def refused(request: HTTPRequest, error: Exception) -> Response:
    status = error.status if isinstance(error, _Refused) else {Full: 429, Stopped: 503}.get(type(error), 400)
    kind = {401: "authentication_error", 413: "request_too_large", 429: "rate_limit_error", 503: "server_error"}
    message = "too many requests wait; try again later" if isinstance(error, Full) else str(error)
    body = {"message": message, "type": kind.get(status, "invalid_request_error"), "param": None, "code": None}
    return JSONResponse({"error": body}, status, {"retry-after": "1"} if status == 429 else None)

  routes = [
    Route("/v1/completions", complete, methods=["POST"]),
    Route("/v1/chat/completions", answer_chat, methods=["POST"]),
    Route("/v1/models", models),
    Route("/health", health),
    Route("/metrics", tell_metrics),
  ]

  async def gone(request: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it

  handlers = dict.fromkeys((InputError, _Refused, Full, Stopped), refused) | {ClientDisconnect: gone}
  return Starlette(routes=routes, exception_handlers=handlers)


async def _body(request: HTTPRequest) -> object:
  data = bytearray()
  async for part in request.stream():
    data += part
    if len(data) > _BODY:
      raise _Refused(413, f"the body has more than {_BODY} bytes")
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise InputError(f"the body is not JSON: {error}") from None


class _Stream(StreamingResponse):
  """The stream of a body that is being answered; however it is left, before its first line too, nothing stays open."""

  def __init__(self, served: "_Served", request: HTTPRequest):
    super().__init__(served.stream(request), media_type="text/event-stream", headers={"cache-control": "no-cache"})
    self._served = served

  async def __call__(self, *where) -> None:
    try:
      await super().__call__(*where)
    finally:
      self._served.close()


class _Served:
  """A body that is being answered: its sequences, and the queue through which the engine's thread tells of them."""

  def __init__(self, runner: Runner, vocabulary: Vocabulary, asked: Asked, chat: bool, name: str, timeout: float):
    self._runner, self._asked, self._chat, self._name = runner, asked, chat, name
    self._end = asyncio.get_running_loop().time() + timeout
    self._events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: the client has left
    self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    self._created, self._answers, self._requests = int(time.time()), {}, []
    room, sequences = runner.engine.length, len(asked.prompts) * asked.n
    require(
      sequences <= runner.capacity,
      f"{len(asked.prompts)} prompts and n={asked.n} are {sequences} sequences; the server holds {runner.capacity}",
    )
    first = secrets.randbits(32) if asked.seed is None else asked.seed
    for i, (prompt, text) in enumerate(zip(asked.prompts, asked.texts, strict=True)):
      limit = room - len(prompt) if asked.tokens is None else asked.tokens
      require(
        limit >= 0 and len(prompt) < room, f"the prompt has {len(prompt)} tokens; there is room for {room} in all"
      )
      for k in range(asked.n):
        answer = _Answer(i * asked.n + k, vocabulary, asked, prompt, text, limit)
        # A seed that is given is every prompt's.
        seed = first + (answer.index if asked.seed is None else k)
        sampling = dataclasses.replace(asked.sampling, seed=seed % 2**32)
        id = f"{self._id}-{answer.index}"
        score = asked.echo and asked.logprobs
        made = Request(id, prompt, max(1, limit), sampling, frozenset(vocabulary.eos), score, runner.engine.clock())
        self._requests.append(made)
        self._answers[id] = answer
    self._open = set(self._answers)  # those that have not ended

  def begin(self) -> None:
    """Hands all sequences in, or none.

    Raises:
      Full, Stopped, InputError: as `Runner.submit`, or the first sequence that the engine refuses at once.
    """
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
      with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would read
        loop.call_soon_threadsafe(self._events.put_nowait, event)

    for i, request in enumerate(self._requests):
      try:
        self._runner.engine.check(request)
        self._runner.submit(request, tell)
      except (Full, Stopped, InputError):
        for before in self._requests[:i]:
          self._runner.abort(before.id)
        raise

  async def _texts(self, request: HTTPRequest) -> AsyncIterator[tuple[_Answer, str]]:
    """(a sequence, its new text).

    Raises:
      ClientDisconnect: the client has left. _Refused: the time is over, or the engine says so.
    """
    clock = asyncio.get_running_loop().time

    async def watch():
      while not await request.is_disconnected():
        await asyncio.sleep(_LOOK)
      self._events.put_nowait(None)

    watching = asyncio.ensure_future(watch())
    try:
      while self._open:
        try:
          event = await asyncio.wait_for(self._events.get(), max(self._end - clock(), 0))
        except TimeoutError:
          raise _Refused(503, "the request took too long; ask for fewer tokens") from None
        if event is None:
          raise ClientDisconnect
        if event.finish and event.finish.startswith("error: "):
          self._open.discard(event.id)
          raise _Refused(503, event.finish.removeprefix("error: "))
        if event.id not in self._open:
          continue
        answer = self._answers[event.id]
        text = answer.take(event)
        if answer.finish:
          self._open.discard(event.id)
          if not event.finish:
            self._runner.abort(event.id, answer.finish)
        yield answer, text
    finally:
      watching.cancel()

  def close(self) -> None:
    """Ends what has not ended: nobody waits for it any more."""
    for id in self._open:
      self._runner.abort(id)
    self._open.clear()

  async def whole(self, request: HTTPRequest) -> dict:
    """The answer as one object."""
    texts = {answer.index: [] for answer in self._answers.values()}
    async with contextlib.aclosing(self._texts(request)) as made:
      async for answer, text in made:
        texts[answer.index].append(text)
    choices = [self._choice(a, "".join(texts[a.index]), "message") for a in self._answers.values()]
    return self._object(choices, stream=False) | {"usage": self._usage()}

  async def stream(self, request: HTTPRequest) -> AsyncIterator[str]:
    """The answer as server-sent events; a fault after the beginning is one, too."""
    line = lambda data: f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    try:
      if self._chat:
        for answer in self._answers.values():
          first = {"index": answer.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
          yield line(self._object([first], stream=True))
      async with contextlib.aclosing(self._texts(request)) as made:
        async for answer, text in made:
          if text or answer.finish or (answer.tokens and self._asked.logprobs):
            yield line(self._object([self._choice(answer, text, "delta")], stream=True))
      if self._asked.usage:
        yield line(self._object([], stream=True) | {"usage": self._usage()})
      yield "data: [DONE]\n\n"
    except ClientDisconnect:
      pass  # nobody reads what would be said
    except _Refused as error:
      yield line({"error": {"message": str(error), "type": "server_error"}})

  def _object(self, choices: list, *, stream: bool) -> dict:
    kind = ("chat.completion" + ".chunk" * stream) if self._chat else "text_completion"
    return {"id": self._id, "object": kind, "created": self._created, "model": self._name, "choices": choices}

  def _choice(self, answer: _Answer, text: str, field: str) -> dict:
    finish = answer.finish or None
    made = {"index": answer.index, "finish_reason": finish, "logprobs": answer.logprobs(self._chat)}
    if not self._chat:
      return made | {"text": text}
    return made | {field: {"content": text} | ({"role": "assistant"} if field == "message" else {})}

  def _usage(self) -> dict:
    prompt = sum(map(len, self._asked.prompts))
    made = sum(min(answer.made, answer.limit) for answer in self._answers.values())
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
