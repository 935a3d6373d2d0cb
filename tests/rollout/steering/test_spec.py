"""The spec: read, written back, and every bad input one clear line, before any sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerl.rollout.common.errors import UserError
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.spec.spec import Site, SteeringSpec, Strength, Where
from tests.models import tiny, tiny_tokenizer
from tests.rollout.steering.helpers import vector

FULL = """
steering:
  role: behaviour
  sites:
    - name: cheer
      at: {layers: [8, 9], component: block_output}
      op: {type: add}
      vector: {file: cheer.safetensors}
      strength: 4.0
      where: {prompt: none, steps: {window: [0, 64]}, ramp: {type: cosine, over: 64}, exclude: {token_ids: [eos]}}
      schedule: {over: train_steps, type: linear, from: 1.0, to: 0.0, until: 0.5}
      gate: {type: cosine, vector: {file: cond.safetensors}, layer: 5, on: prompt_mean, open_above: 0.12}
    - name: heads
      at: {layers: all, head: [3, 7]}
      op: {type: ablate}
      vector: {mean_diff: pairs.jsonl}
      strength: {dist: uniform, low: 0, high: 6, per: sample}
      where: {prompt: {column: spots}, steps: {every: 3}}
    - name: path
      at: {module: model.layers.8.mlp, io: output}
      op: {type: set, coordinates: [1, 2]}
      vector: [0.5, 1e-3, 2]
      strength: {norm_match: 0.1}
      where: {prompt: [0, -1], steps: generated_positions}
    - name: front
      at: {layers: [0], stack: encoder, component: mlp_output}
      op: {type: clamp, value: 2.0}
      vector: {init: normal, std: 0.1}
      strength: {column: much}
      where: {prompt: {window: [1, -1]}}
    - name: ladder
      at: {layers: [2]}
      vector: [1.0]
      strength: {samples: [0, 0.5, -1.5]}
  fraction: 0.5
  correction: {type: token_truncate, high: 2.0}
  kl_budget: {nats_per_sequence: 0.5, action: rescale}
  reference: unsteered
  on_deploy: strip
"""


def test_yaml_and_objects_are_one_to_one(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(FULL)
    spec = load_spec(file)
    assert load_spec(spec) == spec and load_spec(spec.mapping()) == spec and load_spec(str(file)) == spec
    cheer, heads, path, front, ladder = spec.sites
    assert cheer.at.layers == (8, 9) and cheer.strength == Strength(4.0) and cheer.where.steps == {"window": (0, 64)}
    assert cheer.where.exclude_tokens == ("eos",) and cheer.gate.on == "prompt_mean" and cheer.schedule.until == 0.5
    assert heads.at.layers == "all" and heads.strength.high == 6.0 and heads.where.prompt == {"column": "spots"}
    assert path.vector == {"values": [0.5, 1e-3, 2]} and path.where == Where((0, -1), "generated_positions")
    assert front.where == Where({"window": (1, -1)}, "none") and ladder.strength == Strength(samples=(0.0, 0.5, -1.5))
    assert (spec.fraction, spec.role, spec.kl_budget.nats_per_sequence) == (0.5, "behaviour", 0.5)
    by_hand = SteeringSpec(sites=(Site(name="a", at=At(layers=(1,)), vector={"values": [1.0]}, strength=Strength(2.0)),))
    assert load_spec({"sites": [{"name": "a", "at": {"layers": [1]}, "vector": [1.0], "strength": 2}]}) == by_hand


def wrong(change: dict[str, Any], **top: Any) -> tuple[str, ...]:
    site = {"at": {"layers": [0]}, "vector": vector(), **change}
    with pytest.raises(UserError) as caught:
        Steering(MODEL, {"sites": [{k: v for k, v in site.items() if v is not None}], **top}, tiny_tokenizer())
    return caught.value.lines


MODEL = tiny("llama")

BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"at": {"layers": [2]}}, {}, "sites[0].at.layers: 2 is out of range; the decoder has 2 blocks, 0 to 1"),
    ({"at": {"layers": [-3]}}, {}, "sites[0].at.layers: -3 is out of range"),
    ({"at": {"layers": [0], "component": "mlp_outptu"}}, {}, "sites[0].at.component: expected one of block_output, block_input, attn_output, mlp_output"),
    ({"at": {"layers": [0], "stack": "encoder"}}, {}, "sites[0].at.stack: LlamaForCausalLM has no encoder; it has decoder"),
    ({"at": {"layers": [0], "head": [4]}, "vector": vector(0, 8)}, {}, "sites[0].at.head: 4 is out of range; block 0 has 4 heads"),
    ({"at": {"module": "model.layers.0.mpl"}}, {}, "sites[0].at.module: LlamaForCausalLM has no module 'model.layers.0.mpl'"),
    ({"at": {"module": "model.layers.0.mlp", "layers": [0]}}, {}, "sites[0].at.layers: has no effect beside module"),
    ({"at": {"layers": "some"}}, {}, "sites[0].at.layers: expected a list of whole numbers"),
    ({"at": None}, {}, "sites[0].at: missing"),
    ({"vector": vector(0, 31)}, {}, "sites[0].vector: values is 31 wide, and the model's activation at layer 0 is 32 wide"),
    ({"vector": None}, {}, "sites[0].vector: missing; op add needs one"),
    ({"vector": {"file": "nowhere.safetensors"}}, {}, "sites[0].vector: nowhere.safetensors does not exist"),
    ({"vector": [0.0] * 32}, {}, "sites[0].vector: all zeros"),
    ({"vector": {"fil": "x"}}, {}, "sites[0].vector.fil: unknown key; did you mean 'file'?"),
    ({"strenght": 2.0}, {}, "sites[0].strenght: unknown key; did you mean 'strength'?"),
    ({"strength": "much"}, {}, "sites[0].strength: expected a number, found 'much'"),
    ({"strength": {"dist": "uniform", "low": 2, "high": 1}}, {}, "sites[0].strength.high: must be above low"),
    ({"strength": {"samples": 2.0}}, {}, "sites[0].strength.samples: expected a list (each a number), found 2.0"),
    ({"strength": {"samples": []}}, {}, "sites[0].strength.samples: expected numbers of which one is not 0, found []"),
    ({"strength": {"samples": [1.0, "x"]}}, {}, "sites[0].strength.samples[1]: expected a number, found 'x'"),
    ({"strength": {"samples": [1.0], "column": "c"}}, {}, "sites[0].strength: expected a number, {column: c}, {samples: "),
    ({"strength": float("nan")}, {}, "sites[0].strength: expected a number"),
    ({"op": {"type": "ad"}}, {}, "sites[0].op.type: expected one of set, vanilla, add"),
    ({"op": {"type": "add", "value": 2}}, {}, "sites[0].op.value: has no effect with op add"),
    ({"op": {"type": "set", "coordinates": [40]}}, {}, "sites[0].op.coordinates: 40 is out of range"),
    ({"op": {"type": "loreft"}, "vector": None}, {}, "sites[0].vector: op loreft needs its parameters from a file"),
    ({"op": {"type": "rotated"}}, {}, "sites[0].op.params: missing"),
    ({"op": {"type": "function", "function": "none.py:f"}, "vector": None}, {}, "sites[0].op.function: none.py does not exist"),
    ({"op": {"type": "zero"}}, {}, "sites[0].vector: has no effect with op zero"),
    ({"op": {"type": "scale"}, "vector": None}, {}, "sites[0].op.factor: missing; op scale needs one"),
    ({"where": {"steps": "none"}}, {}, "sites[0].where: selects nothing"),
    ({"where": {"steps": {"window": [4, 4]}}}, {}, "sites[0].where.steps.window: selects nothing: the window [4, 4) is empty"),
    ({"where": {"steps": []}}, {}, "sites[0].where.steps: selects nothing (an empty list)"),
    ({"where": {"steps": [-1]}}, {}, "sites[0].where.steps: steps count from 0 on, found -1"),
    ({"where": {"prompt": "first"}}, {}, "sites[0].where.prompt: expected one of none, all, last"),
    ({"where": {"stepz": "all"}}, {}, "sites[0].where.stepz: unknown key; did you mean 'steps'?"),
    ({"where": {"exclude": {"token_ids": ["<nope>"]}}}, {}, "sites[0].where.exclude.token_ids: '<nope>' is not a token here"),
    ({"where": {"ramp": {"over": 0}}}, {}, "sites[0].where.ramp.over: expected at least 1"),
    ({"gate": {"vector": vector(), "layer": 1, "open_above": 0.0}}, {}, "sites[0].gate.layer: the gate reads block 1's output, which comes after the site's layer 0"),
    ({"gate": {"vector": vector(), "layer": 0}}, {}, "sites[0].gate.open_above: give one of open_above and open_below"),
    ({"gate": {"vector": vector(0, 7), "layer": 0, "open_above": 0.0}}, {}, "sites[0].gate.vector: values is 7 wide"),
    ({}, {"role": "teacher"}, "role: expected one of policy, trainable, behaviour, data, found 'teacher'"),
    ({}, {"fraction": 1.5}, "fraction: expected 0 to 1, found 1.5"),
    ({}, {"correction": {"type": "none"}}, "correction: only role behaviour has one"),
    ({}, {"sties": []}, "sties: unknown key; did you mean 'sites'?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "top", "line"), BAD, ids=[line.split(":")[0] + str(i) for i, (_, _, line) in enumerate(BAD)]
)
def test_bad_input_is_one_clear_line(change: dict[str, Any], top: dict[str, Any], line: str) -> None:
    lines = wrong(change, **top)
    assert len(lines) == 1 and lines[0].startswith(line), lines


def test_all_problems_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        load_spec(
            {
                "sites": [{"at": {"layers": [0]}, "vector": [1.0], "strength": "x"}, {"at": {"layers": []}, "vector": [1.0]}],
                "rol": 1,
            }
        )
    assert [line.split(":")[0] for line in caught.value.lines] == ["sites[0].strength", "sites[1].at.layers", "rol"]
    with pytest.raises(UserError) as caught:
        Steering(
            MODEL,
            {
                "sites": [
                    {"name": "a", "at": {"layers": [5]}, "vector": vector()},
                    {"name": "b", "at": {"layers": [0]}, "vector": [1.0]},
                ]
            },
        )
    assert [line.split(":")[0] for line in caught.value.lines] == ["sites[0].at.layers", "sites[1].vector"]


def test_two_sites_of_one_name() -> None:
    with pytest.raises(UserError, match="the name 'a' is used 2 times"):
        load_spec({"sites": [{"name": "a", "at": {"layers": [0]}, "vector": [1.0]}] * 2})


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "steering: {sites: 3}"])
def test_files_that_are_no_specs(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError):
        load_spec(tmp_path / "s.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")


def test_columns_are_checked_when_the_rows_come() -> None:
    steering = Steering(
        MODEL, {"sites": [{"name": "x", "at": {"layers": [0]}, "vector": vector(), "strength": {"column": "much"}}]}
    )
    rows = torch.arange(2)
    with pytest.raises(UserError, match="site 'x': strength: the data has no column 'much'; its columns: label"):
        steering.strengths(rows, rows, {"label": [1, 2]})
    with pytest.raises(UserError, match="expected a number per row"):
        steering.strengths(rows, rows, {"much": [1, "two"]})


def test_the_hash_tells_vectors_apart(tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    spec = {"name": "n", "sites": [{"at": {"layers": [0]}, "vector": {"file": str(file)}}]}
    labels = []
    for seed in (0, 0, 1):
        save_file({"0": torch.tensor(vector(seed))}, file)
        labels.append(Steering(MODEL, spec).label)
    assert labels[0] == labels[1] != labels[2] and labels[0].startswith("n#")


def test_paths_are_relative_to_the_specs_file(tmp_path: Path) -> None:
    save_file({"0": torch.tensor(vector())}, tmp_path / "v.safetensors")
    (tmp_path / "s.yaml").write_text("sites: [{at: {layers: [0]}, vector: {file: v.safetensors}}]")
    assert Steering(MODEL, tmp_path / "s.yaml").sites[0].held[0]["vector"].tolist() == pytest.approx(vector())
