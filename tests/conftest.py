"""Eight virtual CPU devices for every test, so that each mesh can be tested on any machine."""

import os

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Subprocess tests start the command line as a user would; keep their thread pools from fighting for four cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
