"""The harness' scores of our model beside those of its own `hf` model (extras `eval` and `parity`)."""

import json
import shutil
import string
from pathlib import Path

import numpy as np
import pytest

from jaxlab.core.checks import InputError

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
import lm_eval as harness
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxlab.evaluation import lm_eval
from tests.common import start, wait

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama"
SPECIALS = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
DOCUMENTS = [
  {"text": "the cat sat on the mat and the dog on the cat", "question": "the cat ", "choices": [" sat", "on the mat"]},
  {"text": "a", "question": "where is the dog that was here a while ago", "choices": ["on", "here", "the mat is on"]},
  {"text": "here " * 40, "question": "a " * 60, "choices": ["b", "a a"]},  # longer than the context
]
TASKS = {
  "choice": dict(
    output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target=0
  ),
  "rolling": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"),
  "written": dict(
    output_type="generate_until",
    doc_to_text="{{question}}",
    doc_to_target="{{text}}",
    generation_kwargs=dict(until=["q", "zz"], max_gen_toks=12),
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The tiny Llama with a vocabulary that puts <s> before a text, a context of 64, and a task of every kind."""
  folder = tmp_path_factory.mktemp("llama")
  for name in ("config.json", "model.safetensors"):
    shutil.copy(FIXTURE / name, folder)
  config = json.loads((folder / "config.json").read_text())
  config |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
  (folder / "config.json").write_text(json.dumps(config))
  characters = ["Ġ", *string.ascii_letters, *string.digits, ".", ",", "?", ":"]
  merges = [("t", "h"), ("th", "e"), ("a", "t"), ("Ġ", "the"), ("Ġ", "a"), ("o", "n")]
  tokens = [*SPECIALS, *characters, *map("".join, merges)]
  tokens += [f"<{i}>" for i in range(config["vocab_size"] - len(tokens))]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(SPECIALS))
  tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  tokenizer.save(str(folder / "tokenizer.json"))
  names = dict(bos_token="<s>", eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATE)
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
  source = dict(data_files=str(folder / "documents.jsonl"), cache_dir=str(folder / "cache"))
  data = dict(dataset_path="json", dataset_kwargs=source, test_split="train")
  for name, task in TASKS.items():
    (folder / f"{name}.yaml").write_text(json.dumps(data | task | dict(task=name)))  # JSON is YAML
  return folder


def evaluate(kind: str, folder: Path, **arguments):
  done = harness.simple_evaluate(
    model=kind,
    model_args=arguments,
    tasks=list(TASKS),
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    batch_size=2,
    log_samples=True,
    bootstrap_iters=0,
    verbosity="ERROR",
  )
  answers = lambda name: [row["resps"] for row in sorted(done["samples"][name], key=lambda row: row["doc_id"])]
  return {name: answers(name) for name in TASKS}, done["results"]


@pytest.fixture(scope="module")
def theirs(folder):
  return evaluate("hf", folder, pretrained=str(folder), dtype="float32", device="cpu")


EXACT = [{}, dict(method="snlp", layers=2, iterations=2), dict(method="streaming_llm", keep=1.0, slide=False, page=16)]


@pytest.mark.parametrize("method", EXACT)
def test_scores_are_those_of_the_hf_model(folder, theirs, method):
  """Of ragged batches and texts longer than the context; SNLP with as many steps as layers and a cache that keeps
  everything are the model itself."""
  lm_eval.register()
  ours, scores = evaluate("jaxlab", folder, model=str(folder), dtype="float32", **method)
  answers, expected = theirs
  assert ours["written"] == answers["written"]
  assert len({text for ((text,),) in ours["written"]}) > 1 and all("q" not in text for ((text,),) in ours["written"])
  for name in ("choice", "rolling"):
    for mine, others in zip(ours[name], answers[name], strict=True):
      for a, b in zip(np.ravel(mine), np.ravel(others), strict=True):
        np.testing.assert_allclose(float(a), float(b), atol=2e-4)
  for task, found in scores.items():
    for name, value in found.items():
      if isinstance(value, float):
        np.testing.assert_allclose(value, expected[task][name], rtol=1e-4)


def test_a_method_takes_part_in_scores(folder, theirs):
  """One step over three layers is another network."""
  lm_eval.register()
  ours, _ = evaluate("jaxlab", folder, model=str(folder), method="snlp", layers=3, iterations=1)
  assert abs(np.ravel(ours["rolling"][0])[0] - np.ravel(theirs[0]["rolling"][0])[0]) > 0.1
  assert ours["written"] != theirs[0]["written"]
  ours, _ = evaluate("jaxlab", folder, model=str(folder), method="streaming_llm", keep=0.1, page=16)
  assert abs(np.ravel(ours["rolling"][2])[0] - np.ravel(theirs[0]["rolling"][2])[0]) > 0.1


def test_tokens_are_those_of_the_hf_model(folder):
  """BOS: as the tokenizer puts it, never twice, and as the option says; the chat template."""
  from lm_eval.models.huggingface import HFLM

  chat = [{"role": "user", "content": " the cat "}, {"role": "assistant", "content": "sat"}]
  for option in (None, True, False):
    ours = lm_eval.JaxLM(str(folder), add_bos_token=option)
    theirs = HFLM(str(folder), dtype="float32", device="cpu", add_bos_token=option)
    assert ours.max_length == theirs.max_length == 64
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    for text in ("the cat", "<s>the cat", "", "the</s>"):
      for special in (None, True, False):
        assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(layers=2), "options of a method need method="),
    (dict(batch_size="auto"), "give a number of rows"),
  ],
)
def test_impossible_arguments_are_named(folder, arguments, message):
  with pytest.raises(InputError, match=message):
    lm_eval.JaxLM(str(folder), **arguments)


def test_a_generation_option_that_would_be_ignored_is_refused(folder):
  request = Instance("generate_until", {}, ("the", dict(max_gen_toks=2, num_beams=4)), 0)
  with pytest.raises(InputError, match="generation option num_beams is none of temperature, top_k, top_p"):
    lm_eval.JaxLM(str(folder)).generate_until([request])


def test_the_command_hands_over_to_the_harness(folder):
  """As its own: the table of scores with status 0, a mistake in one line with status 2."""
  command = lambda arguments: start(
    "jaxlab.evaluation.lm_eval",
    *("--model", "jaxlab", "--model_args", f"model={folder},{arguments}", "--tasks", "choice"),
    *("--include_path", str(folder)),
    HF_HUB_OFFLINE="1",
  )
  good, bad = command("max_length=60"), command("method=snlp")
  good, bad = wait(good), wait(bad)
  assert good.returncode == 0 and "|choice|" in good.stdout, good.stderr
  assert bad.returncode == 2 and bad.stderr.splitlines()[-1] == "error: method snlp needs layers=..."
  assert "Traceback" not in bad.stderr
