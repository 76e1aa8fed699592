"""What is measured: operators on a task, corrupted pictures, settings of the optimiser, sizes, times."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.bibench import networks
from experiments.bibench.corruptions import corrupted
from experiments.bibench.tasks import TASKS, Task
from experiments.bibench.training import Recipe, Run, Trainer, recipes, stacked, taken
from experiments.overlap import overlapped
from jaxlab.weights.bibench import ALGORITHMS
from jaxlab.weights.bibench_layers import apply, init, savings
from jaxlab.weights.bibench_packed import pack, run

TWIN = "fp32"


def measure_task(config, name: str, cache: Path, console) -> dict:
  """{"checkpoint", "rows": {operator: {rate, held, accuracy, corrupted}}, "packed", "seconds"}.

  A full-precision network is trained first; every operator, `fp32` too, goes on from it with as many steps, at each of
  the rates, and is judged at the one that is best on what is held.
  """
  own = config[name]
  task = TASKS[name](config, cache)
  plan = recipes(config.seeds, own.rates)
  how = dict(epochs=own.epochs, batch=own.batch, warmup=own.warmup)
  first = Trainer(task, TWIN, **how)
  twins, checkpoint = _best(first, first.train(plan), own.rates)
  console.say(f"  checkpoint: {100 * np.mean(checkpoint['accuracy']):.3g} % right")
  twins = [taken(twins, i) for i in range(len(config.seeds))]
  views = _corrupted_views(config, task) if name == "pictures" else {}

  def trained(operator: str):
    alike = operator == TWIN and not task.teach
    trainer = first if alike else Trainer(task, operator, **how, taught=task.teach)
    best, row = _best(trainer, trainer.train(plan, twins * len(own.rates)), own.rates)
    labels = task.parts["test"][1]
    judge = lambda x: float(trainer.judge(best, x, labels).mean())
    row["corrupted"] = {kind: float(np.mean([judge(x) for x in some])) for kind, some in views.items()}
    console.say(f"  {operator}: {100 * np.mean(row['accuracy']):.3g} % right")
    return trainer, best, row

  operators = (TWIN, *config.operators, *(config.references if name == "pictures" else ()))
  made = dict(zip(operators, overlapped(trained, operators), strict=True))
  packed = {}
  for operator in config.packed if name == "pictures" else ():
    packed[operator] = _packed(task, operator, made[operator][1])
  seconds = _step_times({operator: one[:2] for operator, one in made.items()}, config.repetitions) if own.timed else {}
  rows = {operator: row for operator, (_, _, row) in made.items()}
  return dict(checkpoint=checkpoint, rows=rows, packed=packed, seconds=seconds)


def _best(trainer: Trainer, run: Run, rates) -> tuple[Run, dict]:
  """(the runs of the best rate, what is said of them)."""
  by_rate = lambda part: trainer.judge(run, *trainer.task.parts[part]).reshape(len(rates), -1)
  held, test = by_rate("held"), by_rate("test")
  best = int(held.mean(axis=1).argmax())
  seeds = held.shape[1]
  chosen = taken(run, slice(best * seeds, (best + 1) * seeds))
  said = dict(rate=rates[best], held=held.mean(axis=1).tolist(), accuracy=test[best].tolist())
  return chosen, said


def _corrupted_views(config, task: Task) -> dict[str, list]:
  x, _ = task.parts["test"]
  key = jax.random.key(config.seed)
  return {
    name: [corrupted(name, jax.random.fold_in(key, 10 * i + severity), x, severity) for severity in config.severities]
    for i, name in enumerate(config.corruptions)
  }


def _packed(task: Task, operator: str, runs: Run) -> dict:
  """The share of images on which packed bits and the network as trained say the same, and how far logits are apart."""
  one = taken(runs, 0)
  x = task.parts["test"][0][:200]
  wanted = jax.jit(lambda p, s, x: apply(task.network, p, s, x, operator)[0][0])(one.params, one.stats, x)
  small = pack(task.network, one.params, one.stats, x, operator)
  found = jax.jit(lambda packed, x: run(task.network, packed, x, operator)[0])(small, x)
  same = float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean())
  return dict(same=same, apart=float(jnp.abs(found - wanted).max()))


def _step_times(made: dict[str, tuple[Trainer, Run]], repetitions: int) -> dict[str, float]:
  """Milliseconds of a step of one run, by the programs that trained."""

  def stepping(trainer: Trainer, runs: Run):
    task = trainer.task
    state = [jax.device_put(taken(runs, slice(1)))]
    recipe, x, y = stacked([Recipe(0, 1e-3)]), *task.parts["train"]
    teacher = (state[0].params, state[0].stats) if trainer.taught else None
    chosen, when = np.arange(trainer.batch)[None], np.zeros(2, np.int32)

    def step():
      state[0] = trainer._step(state[0], recipe, teacher, chosen, when, x, y)
      return state[0].moments

    return step

  contestants = {operator: stepping(*one) for operator, one in made.items()}
  found = timing.compare(contestants, repetitions=repetitions, inner=10)
  return {operator: 1e3 * found.median(operator) for operator in made}


def measure_settings(config, cache: Path) -> dict:
  """{operator: accuracy, 0..1, of every setting}, from scratch: Adam and SGD, two rates each, two schedules."""
  s = config.settings
  task = TASKS["clouds"](config, cache)
  plan = [
    Recipe(config.seeds[0], rate, adam, stepped)
    for adam, rates in ((True, s.adam), (False, s.sgd))
    for rate in rates
    for stepped in (False, True)
  ]

  def trained(operator: str):
    trainer = Trainer(task, operator, epochs=s.epochs, batch=config.clouds.batch)
    return trainer.judge(trainer.train(plan), *task.parts["test"]).tolist()

  operators = (TWIN, *s.operators)
  return dict(zip(operators, overlapped(trained, operators), strict=True))


def full_sizes() -> dict:
  """{network: (function, an input's shape and type)} at the sizes that are published; nothing of it is computed."""
  pictures = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  points = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)
  words = jax.ShapeDtypeStruct((1, 128), jnp.int32)
  return {
    "ResNet20": (networks.of_pictures("resnet", width=16, blocks=3, classes=10), pictures),
    "VGG-small": (networks.of_pictures("vgg", width=128, blocks=3, classes=10), pictures),
    "PointNet": (networks.of_clouds("pointnet", width=64, classes=40), points),
    "BERT, 4 layers": (
      networks.of_text(vocabulary=30522, width=312, depth=4, heads=12, classes=2),
      words,
    ),
  }


def measure_sizes(config) -> dict:
  """{network: {operator: [r_c, r_s, bytes in 32 bits over bytes packed]}}."""
  found = {}
  for name, (network, x) in full_sizes().items():
    if name not in config.sizes:
      continue
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    make = functools.partial(init, network)
    key = jax.random.key(0)
    twin = bytes_of(jax.eval_shape(lambda key, x, make=make: make(key, x, TWIN), key, x))
    found[name] = {}
    for operator in ALGORITHMS:

      def packed(key, x, make=make, network=network, operator=operator):
        return pack(network, *make(key, x, operator), x, operator)

      small = bytes_of(jax.eval_shape(packed, key, x))
      found[name][operator] = [*savings(network, x, operator), twin / small]
  return found


def measure_speed(config) -> dict:
  """{batch: milliseconds of the pictures' network: in 32 and in 16 bits, and packed}, evaluation alone, untrained."""
  p, operator = config.pictures, config.speed.operator
  network = networks.of_pictures(p.network, width=p.width, blocks=p.blocks, classes=10)
  found = {}
  for rows in config.speed.batches:
    images = jax.random.normal(jax.random.key(0), (rows, config.speed.side, config.speed.side, 3))
    signs, twin = (init(network, jax.random.key(1), images, name) for name in (operator, TWIN))
    small = jax.jit(lambda given, images=images: pack(network, *given, images, operator))(signs)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    plain = lambda given, x: apply(network, *given, x, TWIN)[0][0]
    contestants = {
      "float32": timing.Steady(plain, twin, images),
      "bfloat16": timing.Steady(plain, half(twin), half(images)),
      "packed": timing.Steady(lambda given, x: run(network, given, x, operator)[0], small, images),
    }
    times = timing.compare(contestants, repetitions=config.repetitions, inner=5)
    found[f"{rows}"] = {name: 1e3 * times.median(name) for name in contestants}
  return found
