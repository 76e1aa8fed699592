import os

# Before jax is imported: the CPU, as eight devices, and a compilation cache that outlives the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis

hypothesis.settings.register_profile("jaxlab", deadline=None, max_examples=8, derandomize=True)
hypothesis.settings.load_profile("jaxlab")
