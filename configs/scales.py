"""What a scale is, the same for every paper.

test: seconds; what the tests run. cpu: minutes on two cores, the default. gpu: one Hopper GPU, parts of under ten
minutes. paper: the paper's own setting, for those who have the hardware.
"""

from jaxlab.core.checks import require, require_choice

SCALES = ("test", "cpu", "gpu", "paper")
_FALLS_BACK_ON = {"test": "cpu", "paper": "gpu", "gpu": "cpu"}


def picker(scale: str):
  """`pick(test=..., cpu=..., gpu=..., paper=...)` gives this scale's value.

  A scale without one takes that of the scale it falls back on: paper gpu's, gpu cpu's, test cpu's.

  Raises:
    InputError: an unknown scale, or none of the values is for this scale.
  """
  require_choice("config.scale", scale, SCALES)

  def pick(**by_scale):
    for name in by_scale:
      require_choice("a scale", name, SCALES)
    at = scale
    while at not in by_scale:
      require(at in _FALLS_BACK_ON, f"no value for scale {scale}: there are {', '.join(by_scale)}; give one for cpu")
      at = _FALLS_BACK_ON[at]
    return by_scale[at]

  return pick
