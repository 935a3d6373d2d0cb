"""The compiled decode path draws the plain path's tokens with its log-probs, steered or not, or steps aside and says why."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model import hooks
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.steering.fixed import FixedSteering
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout.steering.helpers import DIRECTION, LEARNED, OPERATIONS, SCOPES, SPACE, policy, site, vector

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13]]
SLOW = [pytest.param(family, marks=pytest.mark.proofs) for family in ("gpt2", "qwen2", "gemma3", "mixtral", "gpt_neox")]
"""A graph takes a second or two to make."""
TWO_SITES: dict[str, Any] = {
    "sites": [
        {"at": {"layers": [0]}, "vector": vector(), "strength": {"column": "s"}, "where": {"steps": {"window": [2, 6]}}},
        {
            "at": {"layers": [1], "component": "mlp_output"}, "vector": vector(1), "strength": {"dist": "uniform", "high": 3},
            "where": {"steps": "all", "ramp": {"type": "linear", "over": 5}, "exclude": {"token_ids": [5, 9, 14, 33, 40]}},
        },
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the compiler's minute; its counts from nothing."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    compiled._MODELS.clear()
    compiled._WARNED.clear()


def both(policy: Policy, steering: Any = None, prompts=PROMPTS, step: int = 3, **settings: Any):
    batch = PromptBatch.of_ids(prompts, rows=list(range(len(prompts))))
    batch = dataclasses.replace(batch, columns={**batch.columns, "s": [2.0, 0.0, -1.5, 1.0][: len(prompts)]})
    settings = {"max_new_tokens": 12, **settings}
    plain, _ = Sampler(policy, Sampling(**settings), steering).sample(batch, step=step)
    fixed, _ = Sampler(policy, Sampling(compile=True, **settings), steering).sample(batch, step=step)
    return plain, fixed


def assert_same(plain, fixed):
    assert torch.equal(plain.response_BR, fixed.response_BR) and torch.equal(plain.lengths_B, fixed.lengths_B)
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
        torch.testing.assert_close(getattr(fixed, name), getattr(plain, name), atol=1e-5, rtol=0)
    kept = [None if rollout.kept is None else rollout.kept.lists() for rollout in (plain, fixed)]
    assert kept[0] == kept[1]


def graphs() -> int:
    """Graphs made so far; that steps neither break one nor leave it is looked at too."""
    assert not counters["graph_break"] and not counters["recompile_limit"] and not counters["unimplemented"]
    return counters["stats"]["unique_graphs"]


# -- without steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", *SLOW])
def test_one_graph_gives_the_plain_paths_numbers(family):
    policy = tiny_policy(family)
    plain, fixed = both(policy, n=2, top_p=0.9, stop_ids=list(range(20, 28)))
    assert_same(plain, fixed)
    assert fixed.kept is not None
    assert graphs() == 1  # every step but the first, at one shape although rows end
    assert len(set(fixed.lengths_B.tolist())) > 1
    assert_same(*both(policy, n=2, top_p=0.9, step=4))
    assert graphs() == 1, "another batch of that shape"
    if family == "llama":
        assert_same(*both(policy, prompts=[[7, 8], [9, 10, 11]], n=1))
        assert graphs() == 2, "another number of rows"
        assert_same(*both(policy, n=2, max_new_tokens=70))
        assert graphs() == 3, "more columns"


def test_weights_that_change_are_the_ones_that_are_used():
    policy = tiny_policy("llama")
    both(policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.3)
    assert_same(*both(policy))
    assert graphs() == 1


def test_a_copy_of_the_model_samples_from_its_own_weights():
    policy = tiny_policy("llama")
    before, _ = both(policy)
    other = Policy.of(copy.deepcopy(policy.model), policy.tokenizer)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.3)
    plain, fixed = both(other)
    assert_same(plain, fixed)
    assert not torch.equal(before.response_BR, plain.response_BR)


def test_what_is_kept_of_a_model_goes_with_it():
    ours = tiny_policy("llama")
    steering = Steering(ours.model, {"sites": [{"at": {"layers": [0]}, "vector": vector()}]}, ours.tokenizer)
    both(ours, steering)
    gone = weakref.ref(ours.core)
    assert len(compiled._MODELS) == 1
    del ours, steering
    gc.collect()
    assert gone() is None and not len(compiled._MODELS)


def test_an_earlier_batchs_nan_does_not_linger_in_the_cache():
    policy = tiny_policy("llama")
    both(policy)
    (static,) = compiled._state_of(policy.core).inputs.values()
    for layer in static.cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    assert_same(*both(policy))


@pytest.mark.parametrize("steered", [pytest.param(False, marks=pytest.mark.proofs), True])
def test_rows_that_ended_leave_by_halves(monkeypatch, steered):
    monkeypatch.setattr(compiled, "FEWEST", 4)
    ours = policy("llama")
    steering = Steering(ours.model, TWO_SITES, ours.tokenizer) if steered else None
    seen: list[int] = []
    assert compiled.why_not(ours, steering) is None
    real = compiled.CompiledSteps.__call__
    monkeypatch.setattr(
        compiled.CompiledSteps, "__call__", lambda run, ids, kwargs: seen.append(len(ids)) or real(run, ids, kwargs)
    )
    plain, fixed = both(ours, steering, n=4, stop_ids=list(range(20, 30)), seed=1)
    assert_same(plain, fixed)
    alive = [int((plain.lengths_B > t).sum()) for t in range(1, 12)]
    assert all(rows >= left for rows, left in zip(seen, alive, strict=False)), (seen, alive)
    assert list(dict.fromkeys(seen)) == [16, 8, 4] and graphs() == 3


def test_a_stream_is_told_every_token():
    told: list[tuple[int, list[int], list[int]]] = []
    policy = tiny_policy("gpt2")
    batch = PromptBatch.of_ids(PROMPTS, rows=[0, 1, 2, 3])
    sampler = Sampler(policy, Sampling(max_new_tokens=6, compile=True))
    rollout, _ = sampler.sample(batch, on_token=lambda t, rows, tokens, _: told.append((t, rows.tolist(), tokens.tolist())))
    for row in range(4):
        tokens = [tokens[rows.index(row)] for _, rows, tokens in told if row in rows]
        assert tokens == rollout.response_BR[row, : rollout.lengths_B[row]].tolist()


# -- with steering ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "lora", *SLOW])
def test_two_sites_with_strengths_of_their_own(family):
    ours = policy(family)
    steering = Steering(ours.model, TWO_SITES, ours.tokenizer)
    plain, fixed = both(ours, steering, n=3)
    assert_same(plain, fixed)
    assert len(set(plain.strength_B.tolist())) == 4
    unsteered, without = both(ours, n=3)
    assert_same(unsteered, without)
    assert not torch.equal(unsteered.response_BR, plain.response_BR)
    made = graphs()
    assert made == 2, "one graph with the edits, one without"
    for step in (4, 5):
        assert_same(*both(ours, steering, n=3, step=step))
        assert_same(*both(ours, n=3, step=step))
    assert graphs() == made
    if family == "llama":
        assert_same(*both(ours, steering, prompts=PROMPTS[:3], n=2, batch_size=4))  # 4 rows, then 2
        assert graphs() == made + 2


@pytest.mark.parametrize("group", [("set", "add", "subtract", "zero", "scale", "noise"), DIRECTION, SPACE, LEARNED])
def test_every_operation_and_scope(group, tmp_path):
    """All operations of a group in one graph, each at positions of its own; then the positions change hands."""
    ours, scopes = policy("llama"), list(SCOPES.values())
    for turn in range(0, len(scopes), 3):
        where = scopes[turn:] + scopes[:turn]
        sites = [site(kind, tmp_path, where=where[k % len(where)], strength=0.5 + 0.1 * k) for k, kind in enumerate(group)]
        sites[0]["strength"] = {"column": "s"}
        steering = Steering(ours.model, {"sites": sites}, ours.tokenizer)
        assert_same(*both(ours, steering, max_new_tokens=6))
    assert graphs() == 1, "positions and strengths are no part of the graph"
    assert not compiled._WARNED


@pytest.mark.parametrize(
    "at",
    [
        {"layers": [0], "component": "block_input"},
        pytest.param({"layers": "all", "component": "attn_output"}, marks=pytest.mark.proofs),
        {"layers": [1], "head": [1, 3]},
        pytest.param({"module": "model.layers.0.mlp.down_proj", "io": "input"}, marks=pytest.mark.proofs),
        pytest.param({"module": "model.embed_tokens"}, marks=pytest.mark.proofs),
        pytest.param({"module": "model.norm"}, marks=pytest.mark.proofs),
        {"module": "lm_head"},
    ],
)
def test_every_kind_of_point(at):
    ours = policy("llama")
    width = {"module": 64}.get(
        at.get("io", "") and "module", 64 if at.get("module") == "lm_head" else 16 if "head" in at else 32
    )
    spec = {"sites": [{"at": at, "vector": vector(2, width), "strength": 2.0, "where": {"steps": "generated_positions"}}]}
    plain, fixed = both(ours, Steering(ours.model, spec, ours.tokenizer))
    assert_same(plain, fixed)
    assert graphs() == 1
    assert not torch.equal(both(ours)[0].response_BR, plain.response_BR)


def test_flat_activations_of_opt():
    """OPT's feed-forward part sees (rows x columns, width)."""
    ours = tiny_policy("opt")
    spec = {"sites": [{"at": {"layers": [0], "component": "mlp_output"}, "vector": vector(), "strength": 1.5}]}
    assert_same(*both(ours, Steering(ours.model, spec, ours.tokenizer)))
    assert graphs() == 1


def test_gates_over_the_prompt_and_norm_matching():
    ours = tiny_policy("llama")
    gate = {"type": "cosine", "vector": vector(5), "layer": 0, "on": "prompt_mean", "open_above": 0.0}
    spec = {"sites": [{"at": {"layers": [1]}, "vector": vector(), "strength": {"norm_match": 0.8}, "gate": gate}]}
    assert_same(*both(ours, Steering(ours.model, spec, ours.tokenizer), n=2))
    assert graphs() == 1


def test_another_steering_is_never_an_older_ones_graph():
    ours = tiny_policy("llama")
    assert_same(*both(ours))
    specs = [
        {"sites": [{"at": {"layers": [0]}, "vector": vector(0), "strength": 2.0}]},
        {"sites": [{"at": {"layers": [0]}, "vector": vector(7), "strength": -2.0, "where": {"steps": {"every": 2}}}]},
        {"sites": [{"at": {"layers": [1]}, "vector": vector(0), "strength": 2.0}]},
        {"sites": [{"at": {"layers": [0]}, "op": {"type": "subtract"}, "vector": vector(0), "strength": 2.0}]},
    ]
    steerings = [Steering(ours.model, spec, ours.tokenizer) for spec in specs]
    seen = []
    for steering in (steerings[0], None, steerings[1], steerings[2], None, steerings[3], *steerings):
        plain, fixed = both(ours, steering)
        assert_same(plain, fixed)
        seen.append(plain.response_BR.tolist())
    assert len({str(tokens) for tokens in seen}) == 5
    assert graphs() == 4, "without steering, and three structures: another vector and window make no graph"


def test_what_is_trained_is_read_anew_in_every_batch(tmp_path):
    ours = tiny_policy("llama")
    spec = {"role": "trainable", "sites": [site("loreft", tmp_path), {"at": {"layers": [1]}, "vector": vector(3)}]}
    steering = Steering(ours.model, spec, ours.tokenizer)
    first, fixed = both(ours, steering)
    assert_same(first, fixed)
    with torch.no_grad():
        for parameter in steering.parameters_module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    second, fixed = both(ours, steering)
    assert_same(second, fixed)
    assert graphs() == 1 and not torch.equal(first.response_BR, second.response_BR)


def test_roles_that_record_the_plain_policy():
    ours = tiny_policy("llama")
    spec = {"role": "behaviour", "sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 2.0}]}
    plain, fixed = both(ours, Steering(ours.model, spec, ours.tokenizer))
    assert_same(plain, fixed)
    assert not torch.equal(fixed.policy_logprobs_BR, fixed.behaviour_logprobs_BR)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.proofs)])
def test_a_graph_holds_no_tensor_of_another_device(family, tmp_path, monkeypatch):
    """One on the CPU among those of a GPU, and no CUDA graph is made. The meta device stands for the GPU."""
    elsewhere: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in module.graph.nodes:
            found = node.meta.get("example_value")
            tensors = [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, torch.Tensor)]
            elsewhere.extend(f"{node.target}: {t.device}" for t in tensors if t.device.type != "meta")
        return module.forward

    monkeypatch.setattr(compiled, "BACKEND", look)
    core, meta = tiny(family).requires_grad_(False), torch.device("meta")
    sites = [site(kind, tmp_path) for kind in OPERATIONS if kind != "function"]
    heads = {"at": {"layers": [1], "head": [0]}, "vector": vector(0, 8)}
    steering = Steering(core, {"sites": [*sites, heads]}, tiny_tokenizer())
    given = {"attention_mask": torch.ones(2, 4, dtype=torch.int64), "position_ids": torch.arange(4).expand(2, 4)}
    with torch.no_grad():
        cache = core(input_ids=torch.full((2, 4), 5), use_cache=True, **given).past_key_values
        core.to(meta)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(meta), layer.values.to(meta)
        ids = torch.full((2, 5), 5, device=meta)
        kwargs = {"attention_mask": ids, "position_ids": ids, "past_key_values": cache, "use_cache": True}
        inputs = core.prepare_inputs_for_generation(ids, next_sequence_length=1, is_first_iteration=False, **kwargs)
        inputs = compiled._StaticInputs(2, 64).begin(ids, kwargs, inputs)
        with hooks.fixed(hooks.hooked(core), FixedSteering(steering, 2, meta).edits):
            compiled._graph(meta)(core, inputs)
    assert graphs() == 1 and not elsewhere


# -- aside ------------------------------------------------------------------------------------------------------------------


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "sampling.compile" in record.getMessage()]


def test_what_cannot_be_compiled_goes_the_plain_way_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert_same(*both(tiny_policy("t5")))
        assert_same(*both(tiny_policy("t5"), greedy=True))
    assert told(caplog) == ["sampling.compile: an encoder-decoder has two caches; sampling falls back to the eager path"]
    for family in ("mamba", "mamba2", "jamba", "lfm2"):
        assert_same(*both(tiny_policy(family), max_new_tokens=4))
    assert "static cache does not give the numbers of Lfm2" in str(compiled.why_not(tiny_policy("lfm2")))
    assert graphs() == 0 and len(compiled._WARNED) == 5


def test_hooks_of_others_and_edits_from_outside_go_the_plain_way():
    ours = tiny_policy("llama")
    steering = Steering(ours.model, {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 3.0}]}, ours.tokenizer)
    batch = PromptBatch.of_ids([[5, 6, 7]])
    assert compiled.why_not(ours) is None
    with steering.active():
        outside, _ = Sampler(ours, Sampling(max_new_tokens=5, compile=True)).sample(batch)
    inside, _ = Sampler(ours, Sampling(max_new_tokens=5), steering).sample(batch)
    assert torch.equal(outside.response_BR, inside.response_BR) and "something else acts" in str(compiled._WARNED)
    ours.core.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks of another library" in str(compiled.why_not(ours))
    assert graphs() == 0


def test_edits_that_are_more_than_tensors_go_the_plain_way(tmp_path):
    ours = tiny_policy("llama")
    token_gate = {"type": "cosine", "vector": vector(5), "layer": 0, "on": "token", "open_above": 0.0}
    cases = {
        "op collect": {"at": {"layers": [0]}, "op": {"type": "collect"}},
        "op function": site("function", tmp_path),
        "its gate reads": {"at": {"layers": [1]}, "vector": vector(), "gate": token_gate},
    }
    for reason, one in cases.items():
        steering = Steering(ours.model, {"sites": [one]}, ours.tokenizer)
        assert reason in str(compiled.why_not(ours, steering))
        assert_same(*both(ours, steering))
    assert graphs() == 0


def test_sampling_inside_of_sampling_does_not_share_the_cache():
    ours = tiny_policy("llama")
    sampler, batch = Sampler(ours, Sampling(max_new_tokens=6, compile=True)), PromptBatch.of_ids(PROMPTS)
    alone, _ = sampler.sample(batch)
    inner = []
    outer, _ = sampler.sample(batch, on_token=lambda *_: inner.append(sampler.sample(batch)[0]))
    for rollout in (outer, *inner):
        assert_same(alone, rollout)
    assert "further up" in str(compiled._WARNED)


def test_a_compiler_that_fails_leaves_the_numbers_alone(monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", fail)
    for spec in (None, TWO_SITES):
        ours = tiny_policy("llama")
        steering = spec and Steering(ours.model, spec, ours.tokenizer)
        assert_same(*both(ours, steering, n=8, stop_ids=list(range(20, 30))))
        assert "could not be compiled before" in str(compiled.why_not(ours, steering))
        assert_same(*both(ours, steering, step=4))
    assert "no C++ compiler" in str(compiled._WARNED)


def test_more_shapes_than_are_kept_go_the_plain_way(monkeypatch):
    monkeypatch.setattr(compiled, "MOST", 1)
    ours = tiny_policy("llama")
    assert_same(*both(ours))
    assert_same(*both(ours, n=2))
    assert graphs() == 1 and "1 graphs were made" in str(compiled._WARNED)


@pytest.mark.proofs
def test_the_compiler_itself_gives_the_plain_paths_numbers(monkeypatch):
    """A minute or two of compiling; needs a C++ compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    ours = tiny_policy("llama")
    assert_same(*both(ours, n=2))
    steering = Steering(ours.model, TWO_SITES, ours.tokenizer)
    for step in (3, 4):
        assert_same(*both(ours, steering, n=2, step=step))
        assert_same(*both(ours, n=2, step=step))
    assert graphs() == 2 and not compiled._WARNED
