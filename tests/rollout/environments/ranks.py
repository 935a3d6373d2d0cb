"""Run by test_exact.py in two ranks: episodes of weights that are spread over ranks, steered or not.

python tests/rollout/environments/ranks.py OUT        rank 0 has three prompts and rank 1 one, or all and none
"""

from __future__ import annotations

import sys

import torch
from torch.distributed.fsdp import fully_shard

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.types import Answer
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny, tiny_tokenizer
from tests.rollout.environments.scripted import scripted

FAMILIES = ("llama", "gpt2")
SHARES = {"uneven": [[0, 1, 2], [3]], "none": [[0, 1, 2, 3], []]}
SPEC = {
    "sites": [
        {"at": {"layers": [0]}, "vector": [0.3 * (i % 3 - 1) for i in range(32)], "where": {"prompt": "all", "steps": [1, 4]}}
    ]
}


def played(policy: Policy, rows: list[int], steered: bool) -> Rollout:
    """gpt2's first row begins close to the end of its context, which has no position beyond it."""
    near = policy.core.config.model_type == "gpt2"
    steering = Steering(policy.model, SPEC, policy.tokenizer) if steered else None
    sampling = Sampling(max_new_tokens=6, n=2, batch_size=3, stop_ids=list(range(30, 40)), top_k=20)
    ids = [[11 + 7 * row + k % 20 for k in range(120 if near and not row else 1 + 2 * row)] for row in rows]
    batch = PromptBatch(ids, rows, [" ".join(map(str, one)) for one in ids], [""] * len(rows))

    def reply(row: dict[str, object], said: list[object]) -> Answer:
        total = sum(int(word) for word in said[-1].text.split())  # type: ignore[attr-defined]
        return Answer(done=True) if total % 4 == 0 else Answer(content=" ".join(["17"] * (total % 4)))

    environment = scripted(reply, max_turns=4, max_tokens=0 if near else 26)
    return EpisodeSampler(Sampler(policy, sampling, steering), environment).sample(batch, step=1).rollout


def main(out: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for family in FAMILIES:
        model = tiny(family)
        for layer in model.model.layers if family == "llama" else model.transformer.h:
            fully_shard(layer, mesh=mesh)
        policy = Policy.of(fully_shard(model, mesh=mesh), tiny_tokenizer())
        assert needs_sync(policy.model)
        for name, shares in SHARES.items():
            for steered in (False, True):
                found[family, name, steered] = played(policy, shares[rank], steered)
    torch.save(
        {key: (rollout.tensors(), rollout.kept and rollout.kept.lists()) for key, rollout in found.items()}, f"{out}.{rank}"
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
