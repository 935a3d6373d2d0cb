"""Weights in a real server: all of them, each time; and what is left out, cut short or does not fit stops with its name."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.weights import broadcast
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy
from steerl.rollout.weights.blocks import Block
from steerl.rollout.weights.files import Announced
from tests.models import tiny_policy
from tests.rollout.engines.vllm import shards

PROMPTS = [[3, 9, 27, 17, 51], [60], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
FORCED = [[44, 4, 12, 36], [7, 7, 7, 7, 7, 7], [33]]


def answers(client: Client, policy: Policy, model: str, prompts: list[list[int]] = PROMPTS) -> list[Answer]:
    """Of rows that are forced through the server."""
    law = Law(Sampling(max_new_tokens=8), policy.vocab_size, tuple(policy.eos_ids))
    asks = [Ask(uuid.uuid4().hex, 0, b, 0, forced=tuple(FORCED[b])) for b in range(len(prompts))]
    for prompt, ask in zip(prompts, asks, strict=True):
        client.generate(prompt, law, ask, model)
    (taken,) = client.rpc("steerl_take", json.dumps([ask.id for ask in asks]))
    return [Answer.of_packed(taken[ask.id]) for ask in asks]


def gap(client: Client, policy: Policy, model: str = "policy", prompts: list[list[int]] = PROMPTS) -> float:
    """The largest difference between the server's log-probs and those of a plain pass over each row by itself."""
    worst = 0.0
    for prompt, forced, answer in zip(prompts, FORCED, answers(client, policy, model, prompts), strict=False):
        assert answer.ids == forced
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1]
        own = logits.double().log_softmax(-1).gather(1, torch.tensor(forced)[:, None])[:, 0]
        worst = max(worst, float((own - torch.tensor(answer.policy).double()).abs().max()))
    return worst


def moved(policy: Policy, seed: int) -> None:
    """Far enough to change log-probs by much more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def policy(vllm_server: Any) -> Policy:
    given = vllm_server.policy
    copied: Policy = Policy.of(copy.deepcopy(given.model), given.tokenizer)
    copied.model.requires_grad_(True)
    return copied


@pytest.fixture
def sync(vllm_server: Any, policy: Policy, tmp_path: Path) -> Iterator[Sync]:
    vllm_server.client.rpc("steerl_hello")
    made = Sync(vllm_server.client, policy, EngineSettings(kind="vllm"), tmp_path)
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def sync_of(server: Any, policy: Policy, folder: Path, kind: Any) -> Sync:
    server.client.rpc("steerl_hello")
    return Sync(server.client, policy, EngineSettings(kind="vllm", sync=kind), folder)


# -- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["file", "gloo"])
def test_four_syncs_and_the_server_computes_what_the_policy_does(
    kind: str, vllm_server: Any, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "BUCKET", 40_000)
    sync = sync_of(vllm_server, policy, tmp_path, kind)
    for version in range(4):
        moved(policy, version)
        if version:
            assert gap(vllm_server.client, policy) > 0.1
        sync.send(version)
        assert gap(vllm_server.client, policy) < 1e-5
        assert {answer.versions for answer in answers(vllm_server.client, policy, "policy")} == {(version, version)}


@pytest.mark.vllm
def test_again_brings_back_what_was_sent_not_what_is(vllm_server: Any, sync: Sync, policy: Policy) -> None:
    moved(policy, 5)
    sent = copy.deepcopy(policy)
    sync.send(7)
    moved(policy, 6)
    other = sync_of(vllm_server, policy, sync.folder / "other", "file")
    other.send(8)
    assert gap(vllm_server.client, policy) < 1e-5
    sync.again()
    assert gap(vllm_server.client, sent) < 1e-5
    assert answers(vllm_server.client, policy, "policy")[0].versions == (7, 7)
    other.close()
    shutil.rmtree(other.folder)


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": "all-linear", "init_lora_weights": False}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (LORA, "adapter"),
    "rank-stabilised": ({**LORA, "use_rslora": True, "lora_alpha": 1}, "adapter"),
    "other ranks": ({**LORA, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"up_proj": 4}}, "adapter"),
    "dora": ({**LORA, "use_dora": True}, "file"),
    "head": ({**LORA, "modules_to_save": ["lm_head"]}, "file"),
}


def adapted(policy: Policy, config: dict[str, Any]) -> Policy:
    torch.manual_seed(1)
    return Policy.of(adapters.add(policy.model, config), policy.tokenizer)


@pytest.mark.vllm
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_goes_alone_or_merged(name: str, vllm_server: Any, policy: Policy, tmp_path: Path) -> None:
    config, kind = KINDS[name]
    learner = adapted(policy, config)
    sync = sync_of(vllm_server, learner, tmp_path, "auto")
    assert sync.kind == kind
    for version in range(2):
        moved(learner, version)
        if version:
            assert gap(vllm_server.client, learner, sync.model) > 0.02
        sync.send(version)
        assert gap(vllm_server.client, learner, sync.model) < 2e-5
        assert answers(vllm_server.client, learner, sync.model)[0].versions == (version, version)
    vllm_server.client.rpc("steerl_ready", "-1")
    sync.again()
    assert gap(vllm_server.client, learner, sync.model) < 2e-5
    sync.close()
    assert list(tmp_path.iterdir()) == []


# -- what is not whole -----------------------------------------------------------------------------------------------


def refused(server: Any, sync: Sync, policy: Policy) -> str:
    """What a sync says that fails; after it nothing is drawn, and after another one all is well."""
    with pytest.raises(UserError) as caught:
        sync.send(3)
    for answer in answers(server.client, policy, "policy"):
        assert answer.ids == [] and answer.versions == (-1, -1)
    return str(caught.value)


def without(name: str) -> Any:
    """An export that leaves a tensor out."""
    announced, saved = Block.announced, Block.saved

    def less_announced(self: Block) -> list[Announced]:
        return [entry for entry in announced(self) if entry.name != name]

    def less_saved(self: Block, values: Any) -> dict[str, Tensor]:
        return {key: value for key, value in saved(self, values).items() if key != name}

    return patch.multiple(Block, announced=less_announced, saved=less_saved)


LEFT_OUT = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.vllm
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_tensor_that_is_left_out_is_named(name: str, vllm_server: Any, sync: Sync, policy: Policy) -> None:
    with without(name):
        assert refused(vllm_server, sync, policy) == f"engine: the server did not get {name}"
    sync.send(4)
    assert gap(vllm_server.client, policy) < 1e-5


def spoilt(sync: Sync, **changed: Any) -> Any:
    """A sync that spoils what it has written."""
    write = sync._write

    def spoils(weights: Any) -> None:
        write(weights)
        data = sync._file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        if "cut" in changed:
            body = body[: changed["cut"]]
        if "drop" in changed:
            header["model.other.weight"] = header.pop(changed["drop"])
        if "shape" in changed:
            header["model.norm.weight"]["shape"] = changed["shape"]
        head = json.dumps(header).encode()
        sync._file.write_bytes(struct.pack("<Q", len(head)) + head + body)

    return patch.object(sync, "_write", spoils)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"cut": -100}, "engine: the server cannot read {file}: "),
        ({"cut": 0}, "engine: the server cannot read {file}: "),
        ({"drop": "lm_head.weight"}, "engine: the server did not get lm_head.weight: it is not in {file}"),
        ({"shape": [16, 8]}, "engine: model.norm.weight is (16, 8) in {file}, announced was (128,)"),
    ],
    ids=["cut short", "empty", "renamed", "shape"],
)
def test_a_file_that_is_not_what_was_announced(
    changed: dict[str, Any], told: str, vllm_server: Any, sync: Sync, policy: Policy
) -> None:
    with spoilt(sync, **changed):
        assert refused(vllm_server, sync, policy).startswith(told.format(file=sync._file))
    sync.send(4)
    assert gap(vllm_server.client, policy) < 1e-5


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["file", "gloo"])
def test_what_the_server_has_no_place_for(kind: str, vllm_server: Any, policy: Policy, tmp_path: Path) -> None:
    sync = sync_of(vllm_server, policy, tmp_path, kind)
    policy.core.model.layers[1].register_buffer("other", torch.ones(3))
    assert refused(vllm_server, sync, policy).startswith("engine: the server cannot take model.layers.1.other (3,): ")
    del policy.core.model.layers[1].other
    policy.core.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(60, 128))
    told = refused(vllm_server, sync, policy)
    assert told.startswith("engine: the server cannot take model.layers.1.mlp.up_proj.weight (60, 128)"), told
    policy.core.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(64, 128) / 50)
    sync.send(4)
    assert gap(vllm_server.client, policy) < 1e-5
    sync.close()


@pytest.mark.vllm
def test_a_broadcast_that_breaks_off_leaves_nobody_waiting(vllm_server: Any, policy: Policy, tmp_path: Path) -> None:
    sync = sync_of(vllm_server, policy, tmp_path, "gloo")
    sync.send(2)
    saved = Block.saved

    def fails(self: Block, values: Any) -> dict[str, Tensor]:
        if "model.norm.weight" in values:
            raise UserError("no more")
        return saved(self, values)

    with patch.object(Block, "saved", fails), patch.object(broadcast, "BUCKET", 1000):
        assert refused(vllm_server, sync, policy) == "no more"
    sync.send(4)
    assert gap(vllm_server.client, policy) < 1e-5


@pytest.mark.vllm
def test_rows_under_way_stop_a_sync(vllm_server: Any, sync: Sync, policy: Policy) -> None:
    """What they have computed would stay in the prefix cache."""
    post = sync.client.post

    def busy(path: str, *given: Any, **more: Any) -> Any:
        return {"success": False} if path == "/reset_prefix_cache" else post(path, *given, **more)

    with patch.object(sync.client, "post", busy):
        assert "rows are under way; sync between two draws" in refused(vllm_server, sync, policy)


# -- without a server ------------------------------------------------------------------------------------------------


def made(policy: Policy, kind: Any, folder: Path = Path("unused")) -> Sync:
    return Sync(shards.Nobody(), policy, EngineSettings(kind="vllm", sync=kind), folder)


def test_what_auto_becomes_and_the_flags_it_needs() -> None:
    plain = made(tiny_policy("llama"), "auto")
    assert (plain.kind, plain.flags(), plain.model, plain.keeps) == ("file", [], "policy", True)
    lora = made(adapted(tiny_policy("llama"), {**LORA, "r": 9, "rank_pattern": {"q_proj": 17}}), "auto")
    assert lora.flags() == ["--enable-lora", "--max-loras", "1", "--max-lora-rank", "32"]
    assert (lora.kind, lora.model) == ("adapter", "policy-lora")
    assert made(adapted(tiny_policy("llama"), LORA), "file").model == "policy"
    assert made(adapted(tiny_policy("gpt2"), {"peft_type": "LORA", "r": 2}), "auto").kind == "file"  # Conv1D


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "the policy has no adapter"),
        ({**LORA, "use_dora": True}, "its use_dora is True"),
        ({**LORA, "bias": "all"}, "its bias is 'all'"),
        ({**LORA, "modules_to_save": ["lm_head"]}, r"its modules_to_save is \['lm_head'\]"),
        ({**LORA, "target_modules": ["embed_tokens"]}, "it sits in model.embed_tokens, which is no linear layer of a block"),
        ({**LORA, "target_modules": ["lm_head"]}, "it sits in lm_head, which is no linear layer of a block"),
        ({**LORA, "r": 600}, "its rank is 600, above 512"),
        ({"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}, "it is IA3, not LoRA"),
    ],
)
def test_what_cannot_go_alone_is_refused(config: dict[str, Any] | None, told: str) -> None:
    policy = tiny_policy("llama")
    with pytest.raises(UserError, match=rf"engine\.sync: adapter, but {told}; use auto or file"):
        made(policy if config is None else adapted(policy, config), "adapter")


def test_virtual_tokens_and_nccl_without_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="vllm has no virtual tokens"):
        made(adapted(tiny_policy("llama"), {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}), "auto")
    with pytest.raises(UserError, match="nccl is between GPUs"):
        made(tiny_policy("llama"), "nccl")


def test_again_before_or_without_anything_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was sent"):
        made(tiny_policy("llama"), "file").again()
    kept = made(tiny_policy("llama"), "gloo")
    assert not kept.keeps
    kept._version = 3
    with pytest.raises(UserError, match="gloo keeps no copy of what was sent"):
        kept.again()


def test_a_folder_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"engine\.sync: .*file/weights\.safetensors cannot be written"):
        made(tiny_policy("llama"), "file", tmp_path / "file").send(0)


def test_buckets_hold_every_byte_once() -> None:
    entries = [Announced("a", "float32", (3,)), Announced("b", "bfloat16", (5, 2)), Announced("c", "uint8", (100,))]
    assert [[entry.name for entry in bucket] for bucket in broadcast.buckets(entries, 50)] == [["a", "b"], ["c"]]
    tensors = {"a": torch.rand(3), "b": torch.rand(5, 2).bfloat16(), "c": torch.arange(100, dtype=torch.uint8)}
    sent: list[Tensor] = []

    class Recorded:
        device = torch.device("cpu")

        def broadcast(self, flat: Tensor) -> None:
            sent.append(flat.clone())

    sender = broadcast.Sender(Recorded(), entries, 50)  # type: ignore[arg-type]
    for name, value in tensors.items():
        sender.take(name, value)

    class Replayed(Recorded):
        def broadcast(self, flat: Tensor) -> None:
            flat.copy_(sent.pop(0))

    found = dict(broadcast.received(Replayed(), entries, 50))  # type: ignore[arg-type]
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
