import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import bibench as config_file
from experiments import bibench
from experiments.bibench import networks, tasks, training
from experiments.bibench.corruptions import CORRUPTIONS, corrupted
from experiments.bibench.training import Recipe
from jaxlab.core.checks import InputError
from jaxlab.weights.bibench_layers import outline
from tests.common import run_and_continue


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Images of two classes, bright ones and dark ones; this project's documents."""
  root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
  for split, count in (("train", 20), ("test", 6)):
    for label, name in enumerate(("bright", "dark")):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(60 - 60 * label, 256 - 60 * label, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")
  made = config_file.get_config("test")
  made.pictures.path, made.data.path, made.data.split = str(root), "docs/*.md", "train"
  return made


def test_everything_is_measured_once(config, tmp_path, monkeypatch):
  config = config.copy_and_resolve_references()
  config.parts, config.settings.operators = ("pictures", "settings", "sizes", "speed"), ()
  measures = [f"tracks.measure_{name}" for name in ("task", "settings", "sizes", "speed")]
  report = run_and_continue("bibench", tmp_path, monkeypatch, *measures, config=config)
  found = report.metrics["tasks"]["pictures"]
  assert list(found["rows"]) == ["fp32", "bnn", "bireal"] and set(found["rows"]["bnn"]["corrupted"]) == {
    "contrast",
    "jpeg_compression",
  }
  assert found["packed"]["bireal"]["same"] == 1 and set(found["seconds"]) == {"fp32", "bnn", "bireal"}
  assert len(report.metrics["settings"]["fp32"]) == 8 and len(report.claims) == 5
  assert "pictures" in report.finding


def test_a_student_is_taught_by_its_twin(config, tmp_path):
  """Passages of the longest documents, parts that share none; a binary transformer gets nearer to the teacher."""
  task = tasks.passages(config, tmp_path)
  assert task.parts["train"][0].shape == (48, 8) and np.bincount(task.parts["test"][1]).tolist() == [5, 5, 5]
  rows = {part: {tuple(row) for row in np.asarray(x)} for part, (x, _) in task.parts.items()}
  assert not rows["train"] & rows["test"] and not rows["held"] & rows["test"]
  twin = training.Trainer(task, "fp32", epochs=1, batch=8)
  teacher = training.taken(twin.train([Recipe(0, 3e-3)]), 0)
  student = training.Trainer(task, "bireal", epochs=4, batch=8, taught=True)
  begun = student.begin(Recipe(0, 1e-2), teacher)
  np.testing.assert_array_equal(begun.params["0.q"]["kernel"], teacher.params["0.q"]["kernel"])
  trained = training.taken(student.train([Recipe(0, 1e-2)], [teacher]), 0)
  x = task.parts["train"][0]
  state = lambda run, trainer: trainer._apply(run.params, run.stats, x)[0][1][0]
  far = [float(jnp.mean((state(run, student) - state(teacher, twin)) ** 2)) for run in (begun, trained)]
  assert far[1] < 0.9 * far[0]


def test_clouds_are_solids_turned():
  x, y = tasks.solids(np.random.default_rng(0), each=3, points=40, classes=20)
  assert x.shape == (60, 40, 3) and np.bincount(y).tolist() == [3] * 20
  np.testing.assert_allclose(np.linalg.norm(x, axis=2).max(axis=1), 1, rtol=1e-5)
  found = tasks.turned(jax.random.key(0), jnp.asarray(x))
  np.testing.assert_allclose(found[..., 2], x[..., 2], rtol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=2), np.linalg.norm(x, axis=2), rtol=1e-4)
  assert float(jnp.abs(found - x).max()) > 0.5
  with pytest.raises(InputError, match=r"clouds\.classes is 21; there are 20 kinds"):
    tasks.solids(np.random.default_rng(0), each=1, points=4, classes=21)


def test_pictures_are_shifted_and_flipped_and_no_more():
  x = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3) + 1
  for seed in range(4):
    found = np.asarray(tasks.shifted(jax.random.key(seed), x))
    for one, original in zip(found, np.asarray(x), strict=True):
      inside = [p for p in one.reshape(-1, 3).tolist() if p != [0, 0, 0]]
      assert len(inside) >= 49 and all(p in original.reshape(-1, 3).tolist() for p in inside)


def test_corruptions_grow_and_stay_in_range():
  x = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3))
  x = jax.image.resize(x[:, ::4, ::4], x.shape, "linear")
  for name in CORRUPTIONS:
    weak, strong = (corrupted(name, jax.random.key(1), x, severity) for severity in (1, 5))
    assert weak.shape == x.shape and float(weak.min()) >= 0 and float(weak.max()) <= 1
    far = [float(jnp.sqrt(jnp.mean((one - x) ** 2))) for one in (weak, strong)]
    assert 0.001 < far[0] < far[1] < 0.5, name
  with pytest.raises(InputError, match="severity is 6"):
    corrupted("fog", jax.random.key(0), x, 6)


def test_networks_have_the_papers_layers():
  images, points = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 16, 3))
  binary = lambda network, x: sum(outline(network, x, "bnn").binary.values())
  of = functools.partial(networks.of_pictures, width=16, blocks=3, classes=10)
  parameters = sum(cost.parameters for cost in outline(of("resnet"), images, "fp32").costs.values())
  assert abs(parameters - 272_000) < 3_000  # ResNet20 has 0.27 million
  assert [binary(of(name), images) for name in ("resnet", "bireal", "vgg", "reactnet")] == [20, 20, 5, 31]
  assert [binary(networks.of_clouds(name, width=8, classes=4), points) for name in ("pointnet", "aligned")] == [4, 5]
  with pytest.raises(InputError, match=r"config\.pictures\.network is 'lenet'"):
    of("lenet")


def test_runs_fall_by_their_own_recipes():
  """Adam and SGD, a cosine and steps, in one program."""
  params = {"layer": {"kernel": jnp.ones((2, 2))}}
  slopes = jax.tree.map(jnp.full_like, params, jax.tree.map(lambda _: 3.0, params))
  run = training.Run(params, {}, (training._ADAM.init(params), training._SGD.init(params)))
  moved = lambda recipe, done: 1 - training.update(recipe, slopes, run, done)[0]["layer"]["kernel"][0, 0]
  np.testing.assert_allclose(moved(Recipe(0, 0.1), 0.0), 0.1, rtol=1e-4)
  np.testing.assert_allclose(moved(Recipe(0, 0.1), 0.5), 0.05, rtol=1e-4)
  np.testing.assert_allclose(moved(Recipe(0, 0.1, False), 0.0), 0.1 * 3.0001, rtol=1e-4)
  warm = training.update(Recipe(0, 0.1), slopes, run, 0.05, 0.1)[0]["layer"]["kernel"][0, 0]
  np.testing.assert_allclose(1 - warm, 0.1 / 2 * (1 + np.cos(0.05 * np.pi)) / 2, rtol=1e-3)
  steps = [float(moved(Recipe(0, 0.1, False, True), done)) for done in (0.4, 0.6, 0.8)]
  np.testing.assert_allclose(steps, np.array([1, 0.1, 0.01]) * 0.30001, rtol=2e-3)


def test_wrong_input_is_one_line(config, tmp_path):
  def run(**changes):
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    bibench.measure(changed, tmp_path, tmp_path, None)

  for changes, message in (
    (dict(parts=("images",)), "config.parts is 'images'"),
    (dict(parts=("sizes",)), "config.parts must have one of pictures, text, clouds"),
    (dict(operators=("bnn", "signs")), "an operator is 'signs'"),
    (dict(operators=("bireal",)), "one of bireal, reactnet, fda and one of bnn"),
    (dict(corruptions=("rain",)), "config.corruptions is 'rain'"),
  ):
    with pytest.raises(InputError, match=message):
      run(**changes)


def test_a_claim_fails_where_numbers_say_so():
  """Claims are of what was measured: other accuracies, other verdicts."""
  row = lambda value: dict(rate=0.1, held=[value], accuracy=[value], corrupted={"fog": value - 0.1})
  rows = dict(fp32=row(0.8), bnn=row(0.4), dorefa=row(0.5), bireal=row(0.6), recu=row(0.7), fda=row(0.6))
  of = lambda rows: {"tasks": {"pictures": dict(rows=rows, packed={}, seconds={}, checkpoint={})}}
  held = {claim.name: claim for claim in bibench.claims(None, of(rows))}
  headline = next(iter(held.values()))
  assert headline.ours == pytest.approx(25) and headline.holds and "Bi-Real 75" in headline.note
  assert all(claim.holds for claim in held.values())
  worse = of(rows | dict(bireal=row(0.41), fda=row(0.41), recu=row(0.3)))
  names = [claim.name for claim in bibench.claims(None, worse) if not claim.holds]
  assert names == [
    headline.name,
    "Points of OM that a soft gradient gives: Bi-Real over DoReFa",
    "Rank of ReCU among the operators on pictures",
  ]
  assert dataclasses.asdict(headline)["paper"] == 9.78
