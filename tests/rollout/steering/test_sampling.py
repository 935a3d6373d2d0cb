"""Steered sampling: every operation, scope and family; the sampler's numbers against passes that know nothing of it."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines import sampler
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from tests.rollout.steering.helpers import FAMILIES, OPERATIONS, SCOPES, policy, prompts, site, vector


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


SETTINGS = Sampling(n=2, max_new_tokens=4, batch_size=4, seed=3)


def sampled(
    family: str, spec: dict[str, Any], settings: Sampling = SETTINGS, ids: list[list[int]] | None = None, **columns: list[Any]
):
    steering = Steering(policy(family).model, spec, policy(family).tokenizer)
    batch = PromptBatch.of_ids(ids or prompts())
    batch = dataclasses.replace(batch, columns={**batch.columns, **columns})
    rollout, texts = Sampler(policy(family), settings, steering).sample(batch)
    return steering, rollout, texts


# Where an operation works does not depend on which it is: every one on two families, one of each sort on all.
EVERYWHERE = ("add", "ablate", "low_rank_rotated", "loreft", "function")
CASES = [
    (kind, family) if family in ("llama", "t5") or kind in EVERYWHERE else pytest.param(kind, family, marks=pytest.mark.proofs)
    for kind in OPERATIONS
    for family in FAMILIES
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_behaviour_is_the_teacher_forced_steered_pass(kind: str, family: str, tmp_path: Path) -> None:
    """Operation x scope x family; and the row alone, unpadded, gives the same numbers."""
    for scope, where in SCOPES.items():
        steering, rollout, _ = sampled(family, {"sites": [site(kind, tmp_path, where=where)]})
        forced = teacher_forced(policy(family), rollout, steering=steering)
        gap = (forced.logprobs_BR - rollout.behaviour_logprobs_BR).abs().max()
        assert float(gap) < 1e-5, (scope, float(gap))
        assert torch.equal(rollout.policy_logprobs_BR, rollout.behaviour_logprobs_BR)
        for row in (0, 3):
            alone = teacher_forced(policy(family), rollout.select([row]).trim(), steering=steering)
            assert float((alone.logprobs_BR - rollout.select([row]).trim().behaviour_logprobs_BR).abs().max()) < 1e-5, (
                scope,
                row,
            )


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("scope", SCOPES)
def test_positions_by_hand(family: str, scope: str) -> None:
    """One unpadded row through the plain model, with block 0 moved by the vector at positions worked out here by hand."""
    where, strength = SCOPES[scope], 1.5
    spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": strength, "where": where}]}
    model, core = policy(family), policy(family).core
    _, rollout, _ = sampled(family, spec)
    block = {"gpt2": lambda: core.transformer.h[0], "llama": lambda: core.model.layers[0], "t5": lambda: core.decoder.block[0]}[
        family
    ]()
    for row in range(len(rollout)):
        prompt = rollout.prompt_BP[row][rollout.prompt_mask_BP[row]].tolist()
        response = rollout.response_BR[row][: rollout.lengths_B[row]].tolist()
        decoder = [0] if model.is_seq2seq else prompt
        tokens = [*decoder, *response[:-1]]
        moved = torch.zeros(1, len(tokens), 32)
        for r, token in enumerate(tokens):
            moved[0, r] = torch.tensor(vector()) * by_hand(scope, r, len(decoder), token, strength)
        hook = block.register_forward_hook(
            lambda _, __, out, m=moved: (out[0] + m, *out[1:]) if isinstance(out, tuple) else out + m
        )
        try:
            with torch.no_grad():
                if model.is_seq2seq:
                    logits = core(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([tokens])).logits
                else:
                    logits = core(torch.tensor([tokens])).logits
        finally:
            hook.remove()
        law = logits[0, len(decoder) - 1 :].log_softmax(-1)
        expected = law[torch.arange(len(response)), torch.tensor(response)]
        found = rollout.behaviour_logprobs_BR[row, : len(response)]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0, msg=lambda m, r=row: f"{scope} row {r}: {m}")


def by_hand(scope: str, r: int, length: int, token: int, strength: float) -> float:
    """The strength at real position r of a row with `length` prompt tokens."""
    step = r - (length - 1)
    in_prompt = r < length
    if scope == "ramp":
        import math

        return strength * 0.5 * (1 + math.cos(math.pi * min(step, 4) / 4)) if step >= 0 else 0.0
    selected = {
        "all": step >= 0,
        "generated": step >= 1,
        "window": step in (1, 2),
        "listed": step in (0, 2),
        "every": step >= 0 and step % 2 == 0,
        "prompt": in_prompt,
        "prompt_window": in_prompt and max(length - 3, 0) <= r < length - 1,
        "prompt_listed": (in_prompt and r in (0, length - 2)) or step == 1,
        "last_and_excluded": step >= 0 and token not in (5, 9, 14, 33, 40) and r != 1,
    }[scope]
    return strength if selected else 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_is_bitwise_plain(family: str, tmp_path: Path) -> None:
    plain, _ = Sampler(policy(family), SETTINGS).sample(PromptBatch.of_ids(prompts()))
    everywhere = {"prompt": "all", "steps": "all"}
    for kind in OPERATIONS:
        steering, rollout, _ = sampled(family, {"sites": [site(kind, tmp_path, strength=0.0, where=everywhere)]})
        assert torch.equal(rollout.response_BR, plain.response_BR), kind
        forced = teacher_forced(policy(family), plain)
        steered = teacher_forced(policy(family), rollout, steering=steering)
        assert torch.equal(steered.logprobs_BR, forced.logprobs_BR), kind


def test_some_rows_at_zero_are_bitwise_plain() -> None:
    spec = {"sites": [{"at": {"layers": "all"}, "vector": vector(), "strength": {"column": "s"}}]}
    steering, rollout, _ = sampled("llama", spec, s=[0.0, 2.0, -1.0])
    assert rollout.strength_B.tolist() == [0.0, 0.0, 2.0, 2.0, -1.0, -1.0]
    forced = teacher_forced(policy("llama"), rollout, steering=steering)
    plain = teacher_forced(policy("llama"), rollout)
    assert torch.equal(forced.logprobs_BR[:2], plain.logprobs_BR[:2])
    assert bool(((forced.logprobs_BR - plain.logprobs_BR).abs().amax(1)[2:] > 1e-3).all())


def test_what_an_edit_gives_where_it_does_not_apply_never_shows(tmp_path: Path) -> None:
    """An edit that is NaN at strength 0, on rows and at positions that are not selected: masking by multiplication shows it."""
    (tmp_path / "own.py").write_text("def divide(base, source, strength):\n    return base / (strength > 0)\n")
    op = {"type": "function", "function": f"{tmp_path}/own.py:divide"}
    spec = {"sites": [{"at": {"layers": [0]}, "op": op, "strength": {"column": "s"}, "where": {"steps": [1], "prompt": [0]}}]}
    steering, rollout, _ = sampled("llama", spec, s=[0.0, 1.0, 0.0])
    plain = teacher_forced(policy("llama"), rollout)
    forced = teacher_forced(policy("llama"), rollout, steering=steering)
    assert torch.equal(forced.logprobs_BR, plain.logprobs_BR) and bool(torch.isfinite(rollout.behaviour_logprobs_BR).all())


@pytest.mark.parametrize("body", ["def f(*_): sys.exit(0)", "def f(*_): raise KeyError('no such')", "sys.exit(0)", "1 / 0"])
def test_a_function_that_raises_or_leaves_python_is_one_line(body: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"import sys\n{body}\n")
    op = {"type": "function", "function": f"{tmp_path}/own.py:f"}
    with pytest.raises(UserError, match=r"own.py.* raised \w+: .* \(line 2 of own.py\)$"):
        sampled("llama", {"sites": [{"at": {"layers": [0]}, "op": op}]})


def test_samples_keep_their_own_strengths() -> None:
    """n samples of a prompt at n strengths: each row's numbers are those of its own strength, alone."""
    spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": {"dist": "uniform", "low": -3, "high": 3}}]}
    settings = dataclasses.replace(SETTINGS, n=4, batch_size=3)
    steering, rollout, _ = sampled("gpt2", spec, settings)
    assert len(set(rollout.strength_B.tolist())) == 12
    for row in range(12):
        own = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": float(rollout.strength_B[row])}]}
        alone = rollout.select([row]).trim()
        forced = teacher_forced(policy("gpt2"), alone, steering=Steering(policy("gpt2").model, own))
        assert float((forced.logprobs_BR - alone.behaviour_logprobs_BR).abs().max()) < 1e-5
    again = sampled("gpt2", spec, dataclasses.replace(settings, batch_size=12))[1]
    assert torch.equal(again.strength_B, rollout.strength_B) and torch.equal(again.response_BR, rollout.response_BR)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("more", [{}, {"fraction": 0.5}], ids=["all", "half"])
def test_a_list_of_strengths_goes_round_the_samples(family: str, more: dict[str, Any]) -> None:
    """Sample i has entry i modulo the list's length, whatever the batch: in rows that leave early and go on alone, in prompts
    that come twice, in both engines, and each row is what it is when it is steered alone with that number."""
    listed, here = [0.0, 1.5, -2.5], {"at": {"layers": [0]}, "vector": vector()}
    spec = {"sites": [{**here, "strength": {"samples": listed}, "schedule": {"from": 1.0, "to": 0.5}}], **more}
    settings = dataclasses.replace(SETTINGS, n=6, max_new_tokens=7, stop_ids=(3, 8, 11, 40), temperature=2.0)
    steering = Steering(policy(family).model, spec)
    ids = prompts()
    batch = dataclasses.replace(PromptBatch.of_ids([*ids, ids[1]], [0, 1, 2, 1]), occurrences=[0, 0, 0, 1])

    def drawn(size: int, kind: str = "stream"):
        how = dataclasses.replace(settings, batch_size=size)
        return Sampler(policy(family), how, steering, EngineSettings(kind=kind)).sample(batch, progress=1.0).rollout

    rollout = drawn(24)
    assert len(set(rollout.lengths_B.tolist())) > 2
    assert rollout.sample_B.tolist() == [*range(6)] * 3 + [*range(6, 12)]
    expected = [0.5 * listed[sample % 3] for sample in rollout.sample_B.tolist()]
    steered_B = rollout.strength_B != 0
    assert [s or e * bool(more) for s, e in zip(rollout.strength_B.tolist(), expected, strict=True)] == expected
    assert not more or 0 < int(steered_B.sum()) < 16
    for other in (drawn(1), drawn(5), drawn(24, "generate")):
        assert torch.equal(other.strength_BK, rollout.strength_BK) and other.prompt_ids == rollout.prompt_ids
        assert other.response_ids == rollout.response_ids
    for row in range(24):
        own = {"sites": [{**here, "strength": float(rollout.strength_B[row])}]}
        alone = rollout.select([row]).trim()
        forced = teacher_forced(policy(family), alone, steering=Steering(policy(family).model, own))
        assert float((forced.logprobs_BR - alone.behaviour_logprobs_BR).abs().max()) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_fraction_of_each_prompts_samples(share: float) -> None:
    spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 2.0}], "fraction": share}
    settings = dataclasses.replace(SETTINGS, n=4, max_new_tokens=1)
    _, rollout, _ = sampled("llama", spec, settings)
    assert (rollout.strength_B.reshape(3, 4) != 0).sum(1).tolist() == [round(4 * share)] * 3


def test_fraction_of_single_samples_is_right_on_average() -> None:
    steering = Steering(policy("llama").model, {"sites": [{"at": {"layers": [0]}, "vector": vector()}], "fraction": 0.3})
    strength_B = steering.strengths(torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    assert abs(float(strength_B.mean()) - 0.3) < 0.025


def test_changing_one_row_changes_no_other() -> None:
    spec = {
        "sites": [
            {
                "at": {"layers": [0]},
                "vector": vector(),
                "where": {"prompt": {"column": "at"}, "steps": "all"},
                "strength": {"column": "s"},
            }
        ]
    }
    first = sampled("llama", spec, s=[1.0, 2.0, 3.0], at=[[0], [1], [2, 3]])[1]
    other = sampled("llama", spec, s=[1.0, -9.0, 3.0], at=[[0], [0, 2], [2, 3]])[1]
    for row in (0, 1, 4, 5):
        assert torch.equal(first.response_BR[row], other.response_BR[row])
        torch.testing.assert_close(first.behaviour_logprobs_BR[row], other.behaviour_logprobs_BR[row], atol=1e-6, rtol=0.0)
    assert float((first.behaviour_logprobs_BR[2:4] - other.behaviour_logprobs_BR[2:4]).abs().max()) > 1e-3


def test_step_zero_is_steered_under_all() -> None:
    """The very first sampled token's law moves; under generated_positions it does not."""
    for steps, moves in (("all", True), ("generated_positions", False)):
        spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 4.0, "where": {"steps": steps}}]}
        _, rollout, _ = sampled("llama", spec)
        plain = teacher_forced(policy("llama"), rollout)
        assert bool(((plain.logprobs_BR - rollout.behaviour_logprobs_BR)[:, 0].abs() > 1e-3).all()) is moves


@pytest.mark.parametrize("role", ["policy", "behaviour", "data"])
def test_roles_record_the_right_law(role: str) -> None:
    spec = {"role": role, "sites": [{"name": "cheer", "at": {"layers": [0]}, "vector": vector(), "strength": 2.0}]}
    steering, rollout, _ = sampled("llama", spec)
    plain = teacher_forced(policy("llama"), rollout).logprobs_BR
    steered = teacher_forced(policy("llama"), rollout, steering=steering).logprobs_BR
    torch.testing.assert_close(rollout.behaviour_logprobs_BR, steered, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(rollout.policy_logprobs_BR, steered if role == "policy" else plain, atol=1e-5, rtol=0.0)
    assert rollout.steering == steering.label == f"cheer#{steering.hash}"


def test_several_sites_gates_and_schedules_agree_between_passes() -> None:
    """All at once, with a progress that only the sampler is told: the later pass finds the same strengths by itself."""
    spec = {
        "sites": [
            {"name": "a", "at": {"layers": [0], "component": "attn_output"}, "vector": vector(1), "strength": {"dist": "normal", "mean": 1, "std": 1},
             "schedule": {"type": "cosine", "from": 1.0, "to": 0.0, "until": 0.5}},
            {"name": "b", "at": {"layers": [1], "component": "mlp_output"}, "op": {"type": "ablate"}, "vector": vector(2),
             "schedule": {"from": 0.2, "to": 1.0}, "gate": {"vector": vector(3), "layer": 0, "open_above": 0.0}},
            {"name": "c", "at": {"layers": [1], "head": [0, 2]}, "vector": vector(4, 16), "strength": {"norm_match": 0.5}},
        ],
        "fraction": 0.5,
    }  # fmt: skip
    steering = Steering(policy("llama").model, spec)
    sampler = Sampler(policy("llama"), SETTINGS, steering)
    rollout, _ = sampler.sample(PromptBatch.of_ids(prompts()), step=5, progress=0.2)
    forced = teacher_forced(policy("llama"), rollout, steering=steering)
    assert float((forced.logprobs_BR - rollout.behaviour_logprobs_BR).abs().max()) < 1e-5
    assert (rollout.strength_B == 0).sum() == 3


@pytest.mark.parametrize("batches", [0, 1])
def test_a_rank_that_keeps_others_in_step_asks_for_no_column(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that are spread, with fewer rows than the others: its idle row comes from no data, and has no columns."""
    spec = {
        "sites": [
            {"at": {"layers": [0]}, "vector": vector(), "where": {"prompt": {"column": "at"}}, "strength": {"column": "s"}}
        ]
    }
    steering = Steering(policy("llama").model, spec)
    passes = []
    monkeypatch.setattr(sampler, "needs_sync", lambda _: True)
    monkeypatch.setattr(sampler, "processes", types.SimpleNamespace(most=lambda _: 3))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    with steering.watched(lambda active, call, stack: passes.append(call.rows.applied)):
        batch = dataclasses.replace(PromptBatch.of_ids(prompts()), columns={"s": [1.0, 2.0, 3.0], "at": [[0]] * 3}).select(
            range(batches)
        )
        rollout, _ = Sampler(policy("llama"), SETTINGS, steering).sample(batch)
    assert len(rollout) == 2 * batches and rollout.positions_BKN.shape[:2] == (2 * batches, 1)
    assert sum(bool((applied.strength_BK == 0).all()) for applied in passes) >= 3 - batches


def test_decoding_goes_on_when_rows_leave() -> None:
    """Rows end at different lengths and are dropped; what is left keeps its own strengths."""
    spec = {
        "sites": [
            {
                "at": {"layers": [0]},
                "vector": vector(),
                "strength": {"dist": "uniform", "low": -4, "high": 4},
                "where": {"ramp": {"over": 20}},
            }
        ]
    }
    settings = dataclasses.replace(SETTINGS, n=6, batch_size=18, max_new_tokens=24, stop_ids=list(range(20, 40)))
    steering, rollout, _ = sampled("llama", spec, settings)
    assert len(set(rollout.lengths_B.tolist())) > 4
    forced = teacher_forced(policy("llama"), rollout, steering=steering)
    assert float((forced.logprobs_BR - rollout.behaviour_logprobs_BR).abs().max()) < 1e-5


def test_tokens_follow_the_steered_law() -> None:
    """Counts of the first token over many draws against the law written down (chi-square, 8 most likely tokens)."""
    spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 2.0}]}
    settings = Sampling(n=2000, max_new_tokens=1, batch_size=2000, seed=0)
    _, rollout, _ = sampled("llama", spec, settings, ids=[[5, 6, 7]])
    core = policy("llama").core
    with torch.no_grad():
        moved = torch.zeros(1, 3, 32)
        moved[0, 2] = 2.0 * torch.tensor(vector())
        hook = core.model.layers[0].register_forward_hook(lambda _, __, out: out + moved)
        law = core(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
        hook.remove()
    top = law.topk(8)
    counts = torch.stack([(rollout.response_BR[:, 0] == t).sum() for t in top.indices]).double()
    expected = top.values.double() * 2000
    chi = float((((counts - expected) ** 2) / expected).sum())
    assert chi < 30.0, chi
