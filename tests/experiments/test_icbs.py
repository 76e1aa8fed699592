import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import icbs as config_file
from experiments import compressing, results
from experiments.icbs import ancestor, language, pictures
from jaxlab.core.checks import InputError
from jaxlab.models import hub, maps
from jaxlab.models.packed_maps import Sparse
from tests.common import run_and_continue


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Images of two classes, bright ones and dark ones."""
  root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
  for split, count in (("train", 16), ("test", 8)):
    for label, name in enumerate(("bright", "dark")):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(60 - 60 * label, 256 - 60 * label, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")
  return root


@pytest.fixture
def config(tiny_checkpoint, folder):
  made = config_file.get_config("test")
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  made.subjects = (f"hf:{tiny_checkpoint}",)
  made.pictures.path = str(folder)
  return made


def test_everything_is_measured_once(config, tiny_checkpoint, tmp_path, monkeypatch):
  report = run_and_continue("icbs", tmp_path, monkeypatch, "language.frontier", "pictures.measure", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 12
  found = report.metrics["frontier"][tiny_checkpoint.name]
  assert [row["method"] for row in found["rows"]] == [
    "dense",
    "wanda",
    "wanda_more",
    "sparsegpt",
    "icbs",
    "icbs_diagonal",
  ]
  # A bit a weight and two bytes for each that stays.
  dense, *others = found["rows"]
  assert dense["share"] == 1 and all(abs(row["share"] - 0.4 - 1 / 16) < 0.03 for row in others)
  assert [one["epoch"] for one in found["curves"]["0.4"]] == [0, 1, 2] and len(found["steps"]["0.4"]) == 4
  wanda = next(row["perplexity"] for row in others if row["method"] == "wanda")
  np.testing.assert_allclose(found["curves"]["0.4"][0]["perplexity"], wanda, rtol=2e-2)  # not yet in 16 bits
  found = report.metrics["pictures"]["images"]
  assert len(found["rows"]) == len(config.pictures.methods) and len(found["curves"]["0.5"]) == 3
  start = next(row for row in found["rows"] if row["method"] == "magnitude")
  np.testing.assert_allclose(found["curves"]["0.5"][0]["loss"], start["loss"], rtol=1e-4)


def test_ones_own_model_becomes_a_folder(config, tiny_checkpoint, tmp_path, monkeypatch):
  config.model, config.budget = f"hf:{tiny_checkpoint}", 0.5
  report = run_and_continue("icbs", tmp_path, monkeypatch, "language.chosen", config=config)
  (found,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  assert maps.bytes_of(small) == found["bytes"]["compressed"] < found["bytes"]["original"]
  for one in maps.named(small.blocks).values():
    weight = np.asarray(jax.jit(Sparse.weight)(one), np.float32)
    assert isinstance(one, Sparse) and abs((weight != 0).mean() - 0.5) < 0.01
  assert [claim.name.split()[0] for claim in report.claims] == ["Perplexity", "Bytes"]


def test_a_batch_has_every_row_once_before_any_comes_again():
  drawn = language.batches(np.arange(8)[:, None], 4, seed=0)
  for _ in range(2):
    assert sorted(np.concatenate([next(drawn), next(drawn)]).ravel()) == list(range(8))
  with pytest.raises(InputError, match="3 rows of text do not fill a batch of 4"):
    next(language.batches(np.zeros((3, 2)), 4, seed=0))


def test_ranks_agree_or_not():
  assert language.rank_correlation([[1, 10], [2, 30], [5, 31]]) == pytest.approx(1)
  assert language.rank_correlation([[1, 3], [2, 2], [5, 1]]) == pytest.approx(-1)
  assert language.rank_correlation([[0, 3]]) == 0


def test_the_ancestor_gains_by_swaps_and_by_its_update(config, folder, tmp_path):
  """Each swap lowers the energy by what is said, and the update has the least energy of all with those zeros."""
  train, _ = pictures.load(config, tmp_path)
  params = pictures.trained(config, train)
  rows = jax.tree.map(lambda a: jnp.asarray(a[::2]), train)
  fields = config.pictures.ancestor
  energies = {}
  for swaps in (0, 8):
    fields.swaps = swaps
    pruned, masks, *given = ancestor.select(pictures.NETWORK, params, rows, 0.3, fields, 0)
    energies[swaps] = float(energy(pruned, *given))
    assert all(abs(mask.mean() - 0.3) < 0.02 for mask in masks.values())
  assert energies[8] < energies[0]
  better = ancestor.update(pruned, masks, *given)
  for name, mask in masks.items():
    assert not np.asarray(better[name])[~mask].any()
  slope = jax.grad(energy)(better, *given)
  assert float(energy(better, *given)) < energies[8]
  assert max(float(jnp.abs(jnp.where(masks[name], slope[name], 0)).max()) for name in slope) < 1e-4


def energy(changed, params, factors, lam):
  change = {name: (changed[name] - w).ravel() for name, w in params.items()}
  r = sum(change[name] @ factors[name] for name in change)
  return (r @ r + lam * sum(c @ c for c in change.values())) / 2


def test_one_program_judges_sparse_maps(config, tmp_path):
  (read,) = compressing.subjects(config, tmp_path).values()
  subject = read()
  model = language.pruning.stored_sparse(language.one_shot(config, subject, "wanda", 0.4).model)
  tokens = subject.calibration[:1]
  np.testing.assert_allclose(compressing.restored(model)(tokens), jax.jit(model)(tokens), rtol=1e-3, atol=1e-3)
