"""Run by test_devices.py: PPO on a pretended card, whose tensors say another device, are computed on the CPU, and refuse what a
GPU's refuse: to be mixed with the CPU's, to be drawn by its generators, to become arrays of numpy.

    python tests/training/pretended.py FOLDER        a line for each case of CASES

What the card cannot pretend is left out: exporting (storages without memory) and how the logits are observed (subclasses).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.scoring import chunked_head, logit_postprocessing
from steerl.rollout.steering import load_spec
from steerl.training import ppo
from steerl.training.algorithm.importance import Correction
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, share_of_threes


class Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Nothing here draws."""

    def _is_in_bad_fork(self) -> bool:
        return False


backend_registration._setup_privateuseone_for_python_backend("card", Module())
torch._C._set_only_lift_cpu_tensors(True)
CARD = torch.device("card", 0)
MIXES = ("aten.copy_", "aten._to_copy", "aten.index.Tensor", "aten.index_put", "aten._index_put")
"""What takes a tensor of the CPU beside a GPU's: copies, and indices."""


class OnCard(Tensor):
    """A tensor of the card."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: OnCard = Tensor._make_wrapper_subclass(cls, inner.size(), device=CARD, **shape)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Inside, tensors can be made on the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    cards = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    mixed = cards and any(not isinstance(tensor, OnCard) and tensor.dim() for tensor in tensors)
    if mixed and not str(func).startswith(MIXES) or mixed and "index" in str(func) and not isinstance(args[0], OnCard):
        raise RuntimeError(f"{func}: tensors of two devices: {[(type(t).__name__, tuple(t.shape)) for t in tensors]}")
    asked = kwargs.get("device")
    there = bool(cards) if asked is None else torch.device(asked).type == CARD.type
    if there and getattr(kwargs.get("generator"), "device", CARD).type != CARD.type:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor of the card")
    kwargs = {name: "cpu" if name == "device" and there else value for name, value in kwargs.items() if name != "pin_memory"}
    out = func(*tree_map_only(OnCard, lambda t: t.inner, args), **tree_map_only(OnCard, lambda t: t.inner, kwargs))
    if str(func).startswith("aten.copy_"):
        return args[0]
    if not there or "_local_scalar_dense" in str(func):
        return out
    same = {id(tensor.inner): tensor for tensor in cards}  # what is written to stays the same tensor
    return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else t if isinstance(t, OnCard) else OnCard(t), out)


def begin() -> None:
    """From here on the card is the device of this process."""
    listed, array = Tensor.tolist, Tensor.numpy

    def numpy(tensor: Tensor, *how: Any, **more: Any) -> Any:
        if isinstance(tensor, OnCard):
            raise TypeError("a tensor of the card is no array: call cpu() first")
        return array(tensor, *how, **more)

    Tensor.tolist = lambda tensor: listed(tensor.inner.detach() if isinstance(tensor, OnCard) else tensor)  # type: ignore
    Tensor.numpy = numpy  # type: ignore[method-assign]
    from accelerate import PartialState

    PartialState(cpu=True).device = CARD
    processes.start = processes.join = lambda: processes.Processes(0, 1, CARD)
    chunked_head.CHUNK[CARD.type] = chunked_head.CHUNK["cuda"]
    ppo.save_model = lambda folder, *_: (folder / "model").mkdir()  # type: ignore[assignment]


VECTOR = [0.5 - i % 3 for i in range(32)]
PUSHED = {
    "fraction": 0.5, "kl_budget": {"nats_per_sequence": 0.5},
    "sites": [{"at": {"layers": [1]}, "vector": VECTOR, "schedule": {"until": 0.9}}],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "half": {"family": "gpt2", "dtype": torch.bfloat16, "ppo": {"bootstrap_cut": True, "eval_prompts": 3}},
    "steered": {
        "family": "llama", "steering": PUSHED, "sampling": {"n": 2, "top_p": 0.9, "repetition_penalty": 1.1},
        "ppo": {"value": "shared", "correction": Correction("token_truncate"), "checkpointing": True},
    },
    "group": {"family": "llama", "sampling": {"n": 4, "min_p": 0.02}, "ppo": {"credit": "group", "kl_as": "loss", "packing": True}},
}  # fmt: skip


def run(case: dict[str, Any], folder: Path) -> None:
    policy = tiny_policy(case["family"])
    seen = logit_postprocessing.logit_postprocessing(policy)
    logit_postprocessing._observe = lambda *_: seen  # type: ignore[assignment]
    with Card():
        policy = policy.with_model(policy.model.to(CARD, case.get("dtype")))
        small = {"steps": 1, "rollouts_per_step": 8, "minibatches": 2, "epochs": 1, "micro_batch_size": 2, "eval_prompts": 0}
        sampling = Sampling(**{"max_new_tokens": 6, "stop_ids": [11, 17, 23], **case.get("sampling", {})})
        steering = load_spec(case["steering"]) if "steering" in case else None
        settings = ppo.PPOSettings(**{**small, **case["ppo"]})
        ppo.train(
            policy, prompts_of(policy), share_of_threes, sampling, settings, RunSettings(dir=str(folder)), steering=steering
        )
        assert all(isinstance(parameter.data, OnCard) for parameter in policy.model.parameters())


if __name__ == "__main__":
    begin()
    for name, case in CASES.items():
        run(case, Path(sys.argv[1]) / name)
        print(name)
