"""The README's server with a real model: its command, the clients that people use, and the evaluation harness."""

import json
import re

import httpx
import jax
import openai
import pytest

from jaxlab.models import inference
from jaxlab.tasks import endpoint, handlers
from jaxlab.tasks.decomposed_prompting import solve
from jaxlab.tasks.maker_general import ballots
from tests.common import start, wait
from tests.serving.conftest import Running, until
from tests.test_readme import BLOCKS, SHELL

pytestmark = pytest.mark.smollm2


def test_the_command_of_the_readme_answers_its_example(capsys):
  """As the README has it, at another port and in less memory; then a stream that is left, and the end."""
  (line,) = [line for line in SHELL if "jaxlab.serving" in line]
  options = [*line.split()[3:-1], "--port=0", "--rows=4", "--length=512", "--cache-gb=0.1", "--no-warm-up"]
  process = start("jaxlab.serving", *options)
  said = lambda: (process.folder / "1").read_text() if (process.folder / "1").exists() else ""
  try:
    until(lambda: "\n" in said() or not process.is_alive(), 300)
    url = said().split()[-1]
    (block,) = [block for kind, block in BLOCKS if kind == "python" and "openai" in block]
    exec(re.sub(r"http://[\d.:]+/v1", url, block), {})
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    body = dict(model="smollm2", messages=[{"role": "user", "content": "Count."}], max_tokens=400, stream=True)
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=300) as response:
      assert next(response.iter_lines()).startswith("data: ")
    running = lambda: re.search(r"^jaxlab_running (\S+)", httpx.get(url.replace("/v1", "/metrics")).text, re.M)[1]
    until(lambda: running() == "0.0", 300)  # the engine may be compiling
    process.terminate()
    process.join(60)
  finally:
    done = wait(process, 0)  # a process that is left would be waited for
  assert done.returncode == 0, done.stderr


def test_the_harness_scores_the_server_as_it_scores_the_model(smollm2, tmp_path):
  pytest.importorskip("transformers")
  harness = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager

  model, vocabulary = smollm2
  rows = [
    {"question": "The capital of France is", "choices": [" Paris", " Berlin", " a river"]},
    {"question": "Two and two make", "choices": [" five", " four"]},
  ]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = dict(dataset_path="json", dataset_kwargs=dict(data_files=str(tmp_path / "rows.jsonl")), test_split="train")
  task = dict(task="choice", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target=0)
  (tmp_path / "choice.yaml").write_text(json.dumps(data | task | dict(doc_to_choice="{{choices}}")))
  vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
  end = vocabulary.tokenizer.id_to_token(vocabulary.eos[0])
  names = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=end, bos_token=end)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))

  def evaluate(kind, arguments):
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = harness.simple_evaluate(
      model=kind, model_args=arguments, tasks=["choice"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    return [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in done["samples"]["choice"]]

  server = Running(jax.jit(inference.take_apart)(model), vocabulary, rows=2, length=64)
  try:
    url = dict(model="tiny", base_url=f"{server.url}/v1/completions", tokenizer=str(tmp_path), max_length=64)
    served = evaluate("local-completions", url | dict(num_concurrent=1, max_retries=1))
  finally:
    server.close()
  from jaxlab.evaluation import lm_eval

  lm_eval.register()
  direct = evaluate("jaxlab", dict(model="smollm2", dtype="float32"))
  for a, b in zip(served, direct, strict=True):
    assert a == pytest.approx(b, abs=2e-3)


def test_programs_and_votes_run_on_the_server(smollm2, tmp_path):
  """Decomposed prompting and MAKER's votes with a model of 135 M parameters, which knows capitals and little else."""
  model, vocabulary = smollm2
  server = Running(jax.jit(inference.take_apart)(model), vocabulary, rows=4, length=128)
  try:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
    shots = "Q: the capital of Italy\nA: Rome\n\nQ: the capital of Japan\nA: Tokyo"
    capital = handlers.prompted(endpoint.completions(client, "tiny", max_tokens=6), shots, text_only=True)
    main = handlers.prompted_decomposer(lambda prompts: [[(f" {_next(prompt)}", 0.0)] for prompt in prompts])
    (found,) = solve(["France?"], "main", {"main": main, "capital": capital, "up": handlers.function(_upper)})
    assert found.answer == "PARIS"
    sampled = endpoint.completions(client, "tiny", max_tokens=6, temperature=0.7)
    ask = ballots(lambda prompts: sampled([f"{shots}\n\nQ: {p}\nA:" for p in prompts]), _word, margin=2, most=20)
    votes = ask(["the capital of France", "the capital of Germany"])
    assert [vote.answer for vote in votes] == ["Paris", "Berlin"]
  finally:
    server.close()


def _next(prompt: str) -> str:
  """The program's next line: what a larger model would have written."""
  return "[EOQ]" if "[up]" in prompt else "[up] #1" if "[capital]" in prompt else "[capital] the capital of France"


def _word(text: str) -> str | None:
  found = re.match(r" ?([A-Z][a-z]+)", text)
  return found[1] if found else None


def _upper(question: str) -> str:
  return json.loads(question).upper()  # an answer is quoted in the next question
