r"""BiBench: which way of training weights and activations to signs keeps most, in which networks, and what is saved?

Paper (arXiv 2301.11233): eight operators on eight data sets; Bi-Real, ReActNet and FDA keep 82 % of the twin's accuracy
(quadratic mean), BNN and XNOR++ 72 %; transformers lose most; r = 12.7 fewer bits and operations. Measured here on
CIFAR-10, on passages of books (which book is it from) and on generated clouds of points, with short schedules.

  python -m experiments.run --config=configs/bibench.py:gpu --workdir=runs/bibench --config.data.path='books/*.xz' \
      --config.pictures.path=cifar10

Scale cpu printed (2026-11-28), 12 minutes of processor time for pictures and text alone; % right, two seeds:

  twin 42 / 55 / 99 (pictures, text, clouds)   ReActNet 38 / 53 / 70   Bi-Real 38 / 54 / 67   FDA 37 / 51 / 73
  DoReFa 38 / 53 / 67   XNOR 38 / 53 / 65   ReCU 38 / 38 / 60   BNN 38 / 20 / 66   XNOR++ 38 / 18 / 63

Overall ReActNet keeps 87 % of the twin's accuracy, BNN 68, XNOR++ 67. A minute-long schedule hardly tells operators
apart on pictures; on the transformer those without a scale for every output fail.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="BiBench",
  family="weights",
  link="https://arxiv.org/abs/2301.11233",
  does="trains weights and activations of any network to signs by one of eight operators, and compares them",
)
CORRUPTIONS = (
  *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "motion_blur", "zoom_blur", "fog", "brightness"),
  *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EIGHT = ("bnn", "xnor", "dorefa", "bireal", "xnor++", "reactnet", "recu", "fda")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (the paper's schedules and networks)."""
  pick = scales.picker(scale)

  return ml_collections.ConfigDict(
    dict(
      paper="bibench",
      experiment="bibench",
      scale=scale,
      seed=0,
      seeds=pick(test=(0,), cpu=(0, 1), paper=(0, 1, 2)),
      parts=pick(
        test=("pictures", "text", "clouds", "settings", "sizes", "speed"),
        cpu=("pictures", "text", "clouds", "settings", "sizes"),
        gpu=("pictures", "text", "clouds", "settings", "sizes", "speed"),
      ),
      operators=pick(test=("bnn", "bireal"), cpu=EIGHT),
      references=pick(test=(), cpu=("bwn", "int8")),  # of pictures alone
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      corruptions=pick(test=("contrast", "jpeg_compression"), cpu=CORRUPTIONS),
      severities=pick(test=(3,), cpu=(3,), gpu=(1, 3, 5), paper=(1, 2, 3, 4, 5)),
      packed=pick(test=("bireal",), cpu=("bireal", "xnor++"), paper=EIGHT),  # also run on packed bits
      pictures=dict(
        name="cifar10",  # a tfds set; or `path`, a folder with train/<class>/*.jpg and test/<class>/*.jpg
        path="",
        most=pick(test=0, cpu=400, gpu=0),  # images of a class; 0 takes all
        held=0.2,  # share of the training images that rates are chosen by
        judged=pick(test=5, cpu=200, paper=1000),  # test images of a class
        shrink=pick(test=1, cpu=2, gpu=1),  # pixels a side that become one
        network=pick(test="vgg", cpu="resnet"),  # or bireal, vgg, reactnet
        width=pick(test=4, cpu=8, gpu=16),
        blocks=pick(test=1, cpu=1, gpu=3),
        epochs=pick(test=1, cpu=6, gpu=3, paper=400),
        batch=pick(test=8, cpu=50, gpu=200),
        rates=pick(test=(1e-2,), cpu=(3e-3, 1e-2)),
        warmup=0.0,
        timed=pick(test=True, cpu=False, gpu=True),
      ),
      text=dict(
        classes=pick(test=3, cpu=6),  # the longest documents
        vocabulary=pick(test=300, cpu=1024, gpu=4096, paper=30522),
        time=pick(test=8, cpu=32, gpu=64, paper=128),
        rows=pick(test=16, cpu=1000, gpu=1300),  # passages of a document
        judged=pick(test=5, cpu=60, gpu=100),
        width=pick(test=8, cpu=32, gpu=128, paper=768),
        depth=pick(test=1, cpu=2, gpu=4, paper=12),
        heads=pick(test=2, cpu=2, gpu=4, paper=12),
        epochs=pick(test=1, cpu=2, gpu=4, paper=20),
        batch=pick(test=8, cpu=50, gpu=64),
        rates=pick(test=(3e-3,), cpu=(3e-3, 1e-2), gpu=(1e-3, 3e-3), paper=(2e-4, 1e-3, 3e-3)),
        warmup=pick(test=0.1, cpu=0.0, gpu=0.1),  # share of the steps in which rates rise
        timed=False,
      ),
      clouds=dict(
        network="pointnet",  # or aligned, with a T-net
        classes=pick(test=4, cpu=10, gpu=20),
        points=pick(test=16, cpu=64, gpu=256, paper=1024),
        rows=pick(test=8, cpu=100, gpu=400),  # clouds of a class
        judged=pick(test=5, cpu=50, gpu=100),
        width=pick(test=4, cpu=16, gpu=64),
        epochs=pick(test=1, cpu=8, paper=200),
        batch=pick(test=8, cpu=50, gpu=100, paper=256),
        rates=pick(test=(1e-2,), cpu=(3e-3, 1e-2)),
        warmup=0.0,
        timed=False,
      ),
      settings=dict(  # clouds from scratch, by Adam and by SGD at two rates each, a cosine and steps
        operators=pick(test=("bnn", "bireal"), cpu=EIGHT),
        adam=(1e-3, 1e-4),
        sgd=(1e-1, 1e-2),
        epochs=pick(test=1, cpu=6, paper=200),
      ),
      sizes=pick(test=("ResNet20",), cpu=("ResNet20", "VGG-small", "PointNet", "BERT, 4 layers")),
      speed=dict(operator="bireal", side=pick(test=8, cpu=32), batches=pick(test=(2,), cpu=(1, 256))),
      repetitions=pick(test=1, cpu=5, gpu=15),
    )
  )  # fmt: skip
