"""Settings: YAML of the shipped jobs, and the reader. Imported by scripts alone, by them first (pyproject.toml sorts it so).

What has to be in the environment before torch is imported is set here, for the commands only.
"""

import os
import sys

# A waiting OpenMP thread must not keep a core from the other ones: on busy machines it costs a factor of 20.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Bars of a terminal have no place in a log.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
