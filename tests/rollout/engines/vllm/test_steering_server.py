"""Steering in a real vLLM server: against a plain transformers pass with hooks of the test's own, and against the Sampler."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.contexts import Contexts
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler, server_of
from steerl.rollout.engines.vllm.steering import ServerSteering
from steerl.rollout.engines.vllm.wire import Ask
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny_policy
from tests.vllm_server import gentle

pytestmark = pytest.mark.vllm

WIDE = 128
SAMPLING = Sampling(max_new_tokens=12, seed=5, n=2, temperature=0.8)


def sampler(policy: Policy, url: str, log: Path, spec: dict[str, Any] | None, check_rows: int = 0) -> ServerSampler:
    steering = None if spec is None else Steering(policy.model, spec, policy.tokenizer, seed=3)
    settings = EngineSettings(kind="vllm", url=url, check_rows=check_rows)
    engine = VllmEngine(policy, settings, log, steering=steering, alone=True)
    return ServerSampler(engine, SAMPLING, steering)


def vector(seed: int, width: int) -> list[float]:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).tolist()


def prompts(count: int, longest: int = 19) -> PromptBatch:
    g = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(3, 64, (int(torch.randint(2, longest + 1, (1,), generator=g)),), generator=g).tolist()
        for _ in range(count)
    ]
    return dataclasses.replace(PromptBatch.of_ids(ids), columns={"c": [[0, -1] if i % 2 else [1] for i in range(count)]})


def unit(seed: int) -> Tensor:
    u = torch.tensor(vector(seed, WIDE))
    return u / u.norm()


# A spec, and by layer what it does to the activation h of a token: a function of (h, position, step, prompt, id, column).
Edit = Callable[[Tensor, int, int, int, int, list[int]], Tensor]
REAL: list[tuple[list[dict[str, Any]], dict[int, Edit]]] = [
    (
        [{"at": {"layers": [0]}, "vector": vector(1, WIDE), "strength": 0.75, "where": {"prompt": "all", "steps": {"window": [2, 8]}}}],
        {0: lambda h, r, s, p, i, c: h + 0.75 * torch.tensor(vector(1, WIDE)) if r < p or 2 <= s < 8 else h},
    ),
    (
        [
            {"at": {"layers": "all"}, "op": {"type": "ablate"}, "vector": vector(2, WIDE), "where": {"prompt": "last"}},
            {"at": {"layers": [1]}, "vector": vector(3, WIDE), "where": {"ramp": {"type": "linear", "over": 8}}},
        ],
        {
            0: lambda h, r, s, p, i, c: h - (h @ unit(2)) * unit(2) if s >= 0 else h,
            1: lambda h, r, s, p, i, c: h - (h @ unit(2)) * unit(2) + max(0, 1 - s / 8) * torch.tensor(vector(3, WIDE))
            if s >= 0
            else h,
        },
    ),
    (
        [
            {"at": {"layers": [1]}, "op": {"type": "clamp", "value": 2.0}, "vector": vector(4, WIDE), "strength": 0.5,
             "where": {"prompt": {"column": "c"}, "steps": "generated_positions", "exclude": {"token_ids": list(range(3, 30))}}},
        ],
        {
            1: lambda h, r, s, p, i, c: h + 0.5 * (2.0 - h @ unit(4)) * unit(4)
            if not 3 <= i < 30 and (s >= 1 or r in [k % p for k in c])
            else h
        },
    ),
    (
        [
            {"at": {"layers": [0]}, "vector": vector(5, WIDE), "strength": {"norm_match": 0.4}, "where": {"steps": {"every": 2}}},
            {"at": {"layers": [0]}, "op": {"type": "scale", "factor": 0.5, "coordinates": [0, 3, 5]}, "where": {"prompt": [0], "steps": "none"}},
        ],
        {
            0: lambda h, r, s, p, i, c: h + 0.4 * h.norm() * unit(5)
            if s >= 0 and s % 2 == 0
            else torch.where(torch.isin(torch.arange(WIDE), torch.tensor([0, 3, 5])) & (r == 0), h / 2, h)
        },
    ),
]  # fmt: skip


def hooked(policy: Any, prompt: list[int], response: list[int], edits: dict[int, Edit], column: list[int]) -> Tensor:
    """The log-probs of a response by a plain transformers pass with this test's own hooks."""
    ids = prompt + response
    handles = []
    for layer, edit in edits.items():

        def put(module: nn.Module, args: object, output: Tensor, edit: Edit = edit) -> Tensor:
            p = len(prompt)
            rows = [edit(h, r, r - (p - 1), p, ids[r], column) for r, h in enumerate(output[0])]
            return torch.stack(rows)[None]

        handles.append(policy.core.model.layers[layer].register_forward_hook(put))
    with torch.no_grad():
        logits = policy.core(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    for handle in handles:
        handle.remove()
    return (logits / SAMPLING.temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def mixed(policy: Policy, url: str, log: Path, batch: PromptBatch) -> list[tuple[Rollout, Rollout]]:
    """Plain rows and those of the four steerings, all under way at once: as the server drew them, and as the Sampler does."""
    specs: list[dict[str, Any] | None] = [None]
    specs += [{"sites": [{"name": f"s{k}", **one} for k, one in enumerate(sites)]} for sites, _ in REAL]
    samplers = [sampler(policy, url, log, spec) for spec in specs]
    for each in samplers:
        each.engine.sync(3)
    begun = [each.begin(batch, step=3, progress=0.0) for each in samplers]
    drawn = [each.finish(one).rollout for each, one in zip(samplers, begun, strict=True)]
    return [
        (rollout, Sampler(policy, SAMPLING, each.steering).sample(batch, step=3).rollout)
        for each, rollout in zip(samplers, drawn, strict=True)
    ]


def assert_same(found: list[tuple[Rollout, Rollout]]) -> None:
    for server, own in found:
        assert server.response_ids == own.response_ids
        for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
            torch.testing.assert_close(getattr(server, name), getattr(own, name), rtol=0, atol=1e-5)
    assert len({str(server.response_ids) for server, _ in found}) == len(found)


def test_four_steerings_and_plain_rows_in_one_batch(vllm_server):
    """The Sampler draws the same tokens; a plain transformers pass with hooks of the test's own holds the same log-probs."""
    policy, batch = vllm_server.policy, prompts(12)
    found = mixed(policy, vllm_server.url, vllm_server.log, batch)
    assert_same(found)
    for (rollout, _), edits in zip(found, [{}, *(edits for _, edits in REAL)], strict=True):
        for b, response in enumerate(rollout.response_ids):
            logprobs = hooked(policy, batch.ids[b // 2], response, edits, batch.columns["c"][b // 2])
            torch.testing.assert_close(rollout.behaviour_logprobs_BR[b, : len(response)], logprobs, rtol=0, atol=1e-5)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": WIDE, "head_dim": 32},
    "qwen3": {"hidden_size": WIDE, "head_dim": 32, "tie_word_embeddings": True},
    "gemma3": {"hidden_size": WIDE, "head_dim": 32, "query_pre_attn_scalar": 32},
    "gpt2": {"n_embd": WIDE},
    "gpt_neox": {"hidden_size": WIDE},
    "cohere": {"hidden_size": WIDE},
    "stablelm": {"hidden_size": WIDE},
}
CHUNKED = ("--max-num-seqs", "32", "--max-num-batched-tokens", "40", "--block-size", "32", "--num-gpu-blocks-override", "10")
"""Prompts are read in pieces, and rows thrown out for want of memory and read again."""


@pytest.mark.proofs
@pytest.mark.parametrize(
    ("family", "model_impl", "flags"),
    [
        ("llama", "vllm", CHUNKED), ("llama", "transformers", ()), ("qwen3", "vllm", ()), ("qwen3", "transformers", CHUNKED),
        ("gemma3", "vllm", ()), ("gemma3", "transformers", ()), ("gpt2", "vllm", ()), ("gpt_neox", "transformers", ()),
        ("cohere", "vllm", ()), ("stablelm", "vllm", ()),
    ],
)  # fmt: skip
def test_families(family, model_impl, flags, vllm_python, tmp_path):
    policy = gentle(tiny_policy(family, **FAMILIES[family]))
    settings = EngineSettings(
        kind="vllm", python=vllm_python, model_impl=model_impl, arguments=["--no-enable-prefix-caching", *flags], check_rows=0
    )
    with server_of(policy, None, settings, tmp_path) as engine:
        engine.ready(0)
        assert_same(mixed(policy, engine.client.url, tmp_path / "engine.log", prompts(24, longest=40)))
        if flags:
            told = urllib.request.urlopen(f"{engine.client.url}/metrics").read().decode()
            counts = [line for line in told.splitlines() if line.startswith("vllm:num_preemptions_total")]
            assert sum(float(line.split()[-1]) for line in counts) > 0


# -- what stops a run ------------------------------------------------------------------------------------------------------


def test_steering_left_out_for_one_row_stops_the_run(vllm_server, monkeypatch):
    steered = sampler(vllm_server.policy, vllm_server.url, vllm_server.log, {"sites": [{"name": "a", **REAL[0][0][0]}]})
    ask = steered.ask

    def forgets(contexts: Contexts, applied: Applied, b: int, step: int) -> Ask:
        return dataclasses.replace(ask(contexts, applied, b, step), **({"steering": "", "strengths": ()} if b == 5 else {}))

    monkeypatch.setattr(steered, "ask", forgets)
    with pytest.raises(UserError, match=r"row 2 sample 1 was drawn without steering, and a#"):
        steered.sample(prompts(4), step=0)


def test_a_steering_that_was_never_sent_stops_the_run(vllm_server, monkeypatch):
    steered = sampler(
        vllm_server.policy, vllm_server.url, vllm_server.log, {"name": "lost", "sites": [{"name": "a", **REAL[0][0][0]}]}
    )
    monkeypatch.setattr(ServerSteering, "send", lambda self, client, folder: None)
    with pytest.raises(UserError, match=r"row 0 sample 0 was drawn by a vLLM server that was never sent the steering lost#"):
        steered.sample(prompts(2), step=0)


def test_another_vector_in_the_server_stops_the_run(vllm_server, monkeypatch):
    """As many edits as the spec selects, of another size: the rows are not what the policy's own logits make of them."""
    steered = sampler(
        vllm_server.policy, vllm_server.url, vllm_server.log, {"sites": [{"name": "a", **REAL[0][0][0]}]}, check_rows=4
    )
    take = ServerSteering.take

    def other(self: ServerSteering, version: int) -> None:
        take(self, version)
        self._tensors = {name: 1.5 * value for name, value in self._tensors.items()}

    monkeypatch.setattr(ServerSteering, "take", other)
    with pytest.raises(UserError, match="draws by another law|other tokens"):
        steered.sample(prompts(4), step=0)
