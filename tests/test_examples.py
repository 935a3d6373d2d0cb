"""Every example runs, as a program and as a reader would, on the toy tasks; and the notebook's cells one after the other."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steerl.rollout.steering.core import table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "sample": "largest gap between sampling and a forward pass: ",
    "my_reward": "short 1.00",
    "ppo_from_objects": "held-out reward ",
    "steer_and_dump": "64 rows: KL per response ",
    "toy_engine": "6 updates of its weights, closed: True",
    "openenv": "it is 7 -> right 1.0 True",
    "new_operation": "strength 2.0: report on the chapel : ",
}
"""What each prints, among other things."""


@pytest.fixture
def folder(tiny_world, tmp_path, monkeypatch) -> Iterator[Path]:
    """Where a reader stands who has made the toy tasks."""
    for there, world in (("runs/tiny", "reviews"), ("tiny", "suppressed")):
        (tmp_path / there).mkdir(parents=True)
        (tmp_path / there / world).symlink_to(tiny_world(world))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    operations = dict(table.TABLE)  # an example adds one
    yield tmp_path
    table.TABLE.clear()
    table.TABLE.update(operations)


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)
    for path in EXAMPLES.glob("*.py"):
        assert 30 <= len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name, folder, capfd):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capfd.readouterr().out


def test_the_notebook_runs(folder, capfd):
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        assert not cell.get("outputs"), "outputs are left out of the repository"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    rows = [line.split(" ", 1) for line in capfd.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] in (["0.0", "0.30000001192092896"], ["0.30000001192092896", "0.0"])
