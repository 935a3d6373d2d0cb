"""Run by test_loading.py under an engine: models are loaded unread, placed by the engine, and every weight put together again
is compared with transformers' own load of the same folder.

accelerate launch --config_file ENGINE.yaml tests/training/engine/loading.py FOLDER OUT.json CASE,CASE,... [fully_shard]
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.model.unread import Unread
from steerl.training.settings import PPOSettings
from steerl.training.setup import prepare, with_peft
from tests.models import tiny, tiny_tokenizer
from tests.ppo_runs import share_of_threes
from tests.training.engine.engines import by_fully_shard, share_of

LORA = {"peft_type": "LORA", "r": 2}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "gpt2": {"family": "gpt2"},  # tied, and stored the other way round
    "gemma2": {"family": "gemma2", "stored": torch.bfloat16},  # tied
    "gpt_neox": {"family": "gpt_neox", "shards": "20KB"},
    "mixtral": {"family": "mixtral"},  # experts that lie apart in the file
    "t5": {"family": "t5"},
    "opt": {"family": "opt", "value": "shared", "stored": torch.bfloat16},
    "lora": {"family": "llama", "peft": LORA, "stored": torch.bfloat16, "reference": "copy"},
    "half": {"family": "llama", "peft": LORA, "stored": torch.bfloat16, "reference": "copy", "dtype": "auto"},
    "dora": {"family": "llama", "peft": {**LORA, "use_dora": True}},  # begins with the norms of the base
    "kept": {"family": "gpt2", "peft": {**LORA, "modules_to_save": ["lm_head"]}, "reference": "copy"},
    "classifier": {"family": "llama", "value": "classifier"},
}


def save(folder: Path, name: str) -> None:
    case = CASES[name]
    model = tiny(case["family"], seed=3)
    model.to(case.get("stored", torch.float32)).save_pretrained(folder / name, max_shard_size=case.get("shards", "1GB"))
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder / name)
    if case.get("value") == "classifier":
        torch.manual_seed(4)
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "trained")


def whole_load(folder: Path, name: str) -> nn.Module:
    """By transformers and peft alone."""
    path, given = folder / name, CASES[name].get("peft")
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype="auto" if "dtype" in CASES[name] else torch.float32)
    torch.manual_seed(0)
    if given is None:
        return model
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{k: v for k, v in given.items() if k != "peft_type"})
    return peft.get_peft_model(model, config)


def together(weight: Any) -> Tensor:
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def differences(placed: nn.Module, whole: nn.Module, what: str, leave: tuple[str, ...] = ()) -> list[str]:
    """Tensors that are not bit for bit what they are in `whole`, in names, dtypes, ties and buffers."""
    found = []
    expected = {name: p for name, p in whole.named_parameters() if name not in leave}
    given = dict(placed.named_parameters())
    if given.keys() != expected.keys():
        found.append(f"{what}: names {sorted(given.keys() ^ expected.keys())[:3]}")
    if not leave and ties(placed) != ties(whole):
        found.append(f"{what}: ties {ties(placed)} {ties(whole)}")
    for name in sorted(given.keys() & expected.keys()):
        value = together(given[name])
        if value.dtype != expected[name].dtype or not torch.equal(value, expected[name].detach()):
            found.append(f"{what}: {name} {value.dtype} {(value.float() - expected[name].float()).abs().max()}")
        if given[name].requires_grad != expected[name].requires_grad and what != "reference":
            found.append(f"{what}: {name} learns {given[name].requires_grad}")
    buffers = dict(placed.named_buffers())
    for name, buffer in whole.named_buffers():
        if buffers[name].dtype != buffer.dtype or not torch.equal(buffers[name], buffer):
            found.append(f"{what}: buffer {name}")
    return found


def run(folder: Path, name: str) -> dict[str, Any]:
    case = CASES[name]
    torch.manual_seed(0)
    settings = ModelSettings(path=str(folder / name), dtype=case.get("dtype", "float32"))
    policy = with_peft(load_policy(settings, processes.start().device, read=False), case.get("peft"))
    unread = sum(p.numel() for p in policy.model.parameters() if isinstance(p, Unread))
    value = case.get("value", "separate")
    ppo = PPOSettings(
        rollouts_per_step=4, minibatches=1, value=str(folder / "trained") if value == "classifier" else value,
        reference=case.get("reference", "auto"),
    )  # fmt: skip
    parts = prepare(policy, share_of_threes, Sampling(max_new_tokens=4), ppo, RunSettings())
    model, whole = parts.actor_critic, whole_load(folder, name)
    shares = [share_of(p) for p in model.parameters()]
    found = differences(model.actor, whole, "policy")
    if value == "classifier":
        trained = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "trained", dtype=torch.float32)
        assert model.critic is not None and model.head is not None
        found += differences(model.critic.base_model, trained.base_model, "value")
        if not torch.equal(together(model.head.weight), trained.score.weight):
            found.append("value: head")
    elif value == "separate":
        assert model.critic is not None
        tied = {name for group in ties(whole) for name in group}
        head = [n for n, p in whole.named_parameters() if "lm_head" in n and n not in tied]
        found += differences(model.critic, whole, "value", tuple(head) or ("none",))
    held = parts.reference is not None and parts.reference.held
    if held:
        found += differences(held.model, whole, "reference")
        shares += [share_of(p) for p in held.parameters()]
    left = [n for n, p in nn.ModuleList([model, *([held] if held else [])]).named_parameters() if isinstance(p, Unread)]
    return {"unread": unread, "found": found, "shares": sorted(shares), "left": left, "held": bool(held)}


def main(folder: Path, out: Path, names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    processes.start()
    told = {}
    for name in names:
        processes.on_main(lambda name=name: save(folder, name))
        told[name] = run(folder, name)
    processes.on_main(lambda: out.write_text(json.dumps(told)))
    if processes.close():
        processes.end()


if __name__ == "__main__":
    if sys.argv[4:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
