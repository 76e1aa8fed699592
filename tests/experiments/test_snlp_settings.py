"""Settings as text, and how they are carried over to a given model."""

import pytest

from configs import snlp as config_file
from experiments.snlp.settings import parse, refit, refit_config
from jaxlab.core.checks import InputError


def test_settings_are_read_and_refitted():
  expected = dict(layers=24, iterations=2, chunk=3, groups=1, tail=0, surrogate="jacobi", initial="batch_fwd")
  assert parse("n24 K2 F3 jacobi batch_fwd") == expected
  plain = dict(surrogate="identity", initial="h0")
  assert parse("n8 K1 G4 T2") == dict(layers=8, iterations=1, chunk=0, groups=4, tail=2, **plain)
  assert refit("n9 K4 diagonal", 12, 6) == "n4 K4 diagonal"
  assert refit("n3 K8", 12, 6) == "n2 K2" and refit("n8 K2 T2", 12, 6) == "n4 K2 T1"
  assert refit("n8 K1 F2", 12, 6) == "n4 K1 F2" and refit("n8 K1 G4", 12, 4) is None
  for text, message in (("n8 Q3", "'Q3' is neither"), ("K2", "must name n and K")):
    with pytest.raises(InputError, match=message):
      parse(text)


@pytest.mark.parametrize("scale", ["test", "cpu", "gpu", "paper"])
def test_every_scale_names_settings_that_fit_its_depth_and_any_other(scale):
  config = config_file.get_config(scale)
  for depth in (1, 6, config.shape.depth):
    fitted = refit_config(config, depth)
    texts = [*fitted.snlp.settings, *fitted.snlp.cached, *fitted.speculation.settings]
    texts += [text for case in fitted.bench.cases for text in case["settings"]]
    assert texts and all(1 <= parse(text)["layers"] <= depth for text in texts if not fitted.bench.shapes)
    cases = {case["shape"] for case in fitted.bench.cases}
    assert cases <= {"model", *fitted.bench.shapes}
  same = refit_config(config, config.shape.depth)
  assert set(same.snlp.settings) == set(config.snlp.settings)
