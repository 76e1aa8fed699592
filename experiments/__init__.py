"""Experiments: `python -m experiments.run --config=configs/<paper>.py:<scale> --workdir=DIR`."""
