"""Bodies of OpenAI's API, read strictly: what is not known or not done is refused by name."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxlab.core.checks import InputError, require
from jaxlab.models.text import raw_prompt, render_chat, require_stops
from jaxlab.models.vocabulary import Vocabulary
from jaxlab.serving.requests import Sampling

_MOST = 64  # prompts of a body, or n
_STOPS = 16
# Fields that change nothing here, and fields that change nothing at these values.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_NEUTRAL = {
  "best_of": (None, 1), "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
  "suffix": (None, ""), "tools": (None, []), "tool_choice": (None, "none"), "response_format": (None, {"type": "text"}),
  "parallel_tool_calls": (None, True), "modalities": (None, ["text"]),
}  # fmt: skip
_COMMON = (
  "model",
  "temperature",
  "top_p",
  "min_p",
  "n",
  "stream",
  "stream_options",
  "stop",
  "seed",
  "max_tokens",
  "logprobs",
)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a body asks for.

  Attributes:
    prompts: token ids of each; texts: what they were made of, None where ids came; n: answers to each.
    tokens: new ones at most, None: as many as there is room for; seed: None: every answer is another one.
    stop: texts that end an answer; logprobs: they are wanted; echo: the prompt is part of the answer.
    usage: a stream ends with the counts of tokens.
  """

  prompts: list[list[int]]
  texts: list[str | None]
  n: int
  tokens: int | None
  sampling: Sampling
  seed: int | None
  stop: tuple[str, ...]
  stream: bool
  usage: bool
  logprobs: bool
  echo: bool


def completion(body: Mapping, vocabulary: Vocabulary, name: str) -> Asked:
  """A body of /v1/completions.

  Raises:
    InputError: a field that is missing, unknown, not done here, or of another type.
  """
  _known(body, (*_COMMON, "prompt", "echo"), name)
  logprobs = _whole(body, "logprobs", None, 0, 1)
  prompts = _prompts(body.get("prompt"))
  return Asked(
    prompts=[raw_prompt(vocabulary, p) if isinstance(p, str) else p for p in prompts],
    texts=[p if isinstance(p, str) else None for p in prompts],
    tokens=_whole(body, "max_tokens", 16, 0),
    logprobs=logprobs is not None,
    echo=_flag(body, "echo"),
    **_shared(body),
  )


def chat(body: Mapping, vocabulary: Vocabulary, name: str) -> Asked:
  """A body of /v1/chat/completions; as `completion`."""
  _known(body, (*_COMMON, "messages", "max_completion_tokens", "top_logprobs"), name)
  _whole(body, "top_logprobs", None, 0, 1)
  tokens = _whole(body, "max_completion_tokens", _whole(body, "max_tokens", None, 1), 1)
  rendered = render_chat(vocabulary, _messages(body.get("messages")))
  prompt = vocabulary.tokenizer.encode(rendered, add_special_tokens=False).ids
  flags = dict(logprobs=_flag(body, "logprobs"), echo=False)
  return Asked(prompts=[prompt], texts=[None], tokens=tokens, **flags, **_shared(body))


def _shared(body: Mapping) -> dict:
  options = body.get("stream_options") or {}
  known = isinstance(options, Mapping) and set(options) <= {"include_usage", "include_obfuscation"}
  require(known, "stream_options must be an object with include_usage")
  sampling = Sampling(
    temperature=_number(body, "temperature", 1.0, 0, 2),
    **{p: None if body.get(p) is None else _number(body, p, 1.0, 0, 1) for p in ("top_p", "min_p")},
  )
  return dict(
    n=_whole(body, "n", 1, 1, _MOST),
    sampling=sampling,
    seed=_whole(body, "seed", None, -(2**63), 2**64),
    stop=_stops(body.get("stop")),
    stream=_flag(body, "stream"),
    usage=_flag(options, "include_usage"),
  )


def _known(body: Mapping, fields: Sequence[str], name: str) -> None:
  require(isinstance(body, Mapping), "the body must be a JSON object")
  for field, value in body.items():
    if field in fields or field in _IGNORED:
      continue
    require(field in _NEUTRAL, f"there is no field {field!r:.60}; fields are {', '.join(fields)}")
    require(value in _NEUTRAL[field], f"{field} is not supported; leave it out")
  asked = body.get("model", name)
  require(asked == name, f"there is no model {asked!r:.80}; this server has {name}")


def _whole(body: Mapping, field: str, default: int | None, least: int, most: int | None = None) -> int | None:
  value = body.get(field)
  if value is None:
    return default
  require(
    type(value) is int and value >= least and (most is None or value <= most),
    f"{field} is {value!r:.60}; it must be a whole number from {least}" + ("" if most is None else f" to {most}"),
  )
  return value


def _number(body: Mapping, field: str, default: float, least: float, most: float) -> float:
  value = body.get(field)
  if value is None:
    return default
  right = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
  require(right, f"{field} is {value!r:.60}; it must be a number from {least} to {most}")
  return float(value)


def _flag(body: Mapping, field: str) -> bool:
  value = body.get(field)
  require(value is None or isinstance(value, bool), f"{field} is {value!r:.60}; it must be true or false")
  return bool(value)


def _stops(stop) -> tuple[str, ...]:
  stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
  right = isinstance(stop, list) and len(stop) <= _STOPS and all(isinstance(text, str) for text in stop)
  require(right, f"stop must be a text or a list of at most {_STOPS} of them")
  require_stops(stop)
  return tuple(stop)


def _prompts(prompt) -> list[str | list[int]]:
  whole = lambda ids: isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
  if isinstance(prompt, str) or whole(prompt):
    prompt = [prompt]
  require(
    isinstance(prompt, list) and 0 < len(prompt) <= _MOST and all(isinstance(p, str) or whole(p) for p in prompt),
    f"prompt must be a text, a list of token ids, or a list of at most {_MOST} of either, none of them empty",
  )
  for text in prompt:
    if isinstance(text, str):
      _require_text("prompt", text)
  return prompt


def _messages(messages) -> list[dict[str, str]]:
  require(isinstance(messages, list) and bool(messages), "messages must be a list of at least one message")
  made = []
  for i, message in enumerate(messages):
    require(isinstance(message, Mapping), f"messages[{i}] must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):  # parts; only text is read
      parts = [p.get("text") for p in content if isinstance(p, Mapping) and p.get("type") == "text"]
      require(len(parts) == len(content) and all(isinstance(p, str) for p in parts), f"messages[{i}] is not text alone")
      content = "".join(parts)
    if not isinstance(role, str) or not isinstance(content, str):
      raise InputError(f"messages[{i}] must have a role and a content that are texts")
    more = next((key for key, value in message.items() if key not in ("role", "content") and value is not None), None)
    require(more is None, f"messages[{i}] has {more!r:.60}, which is not supported; leave it out")
    _require_text(f"messages[{i}]", role + content)
    made.append({"role": role, "content": content})
  return made


def _require_text(name: str, text: str) -> None:
  """JSON can spell halves of characters, which no tokenizer takes."""
  half = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
  require(half is None, f"{name} has half of a UTF-16 pair at character {half}; send whole characters")
