"""What a GPU would refuse, seen on a CPU (pretended.py): tensors of two devices in one operation, the CPU's generators, numpy."""

from __future__ import annotations

import sys

import pytest
from torch.utils import backend_registration

from tests import warm

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no device that can be pretended", allow_module_level=True)


def test_ppo_keeps_devices_apart(tmp_path):
    done = warm.run([sys.executable, "tests/training/pretended.py", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["half", "steered", "group"]
