"""Run by test_sharding.py in two ranks: weights spread over ranks, so that every forward pass is a collective call.

python tests/rollout/model/sharded.py OUT        rank 0 has three prompts, rank 1 one or none
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.prompts.prompts import PromptBatch
from tests.models import tiny, tiny_tokenizer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [20], [11, 12]]
SHARES = {"uneven": [[0, 1, 2], [3]], "none": [[0, 1, 2, 3], []]}
FAMILIES = ("llama", "t5", "recurrent_gemma")


def settings(family: str) -> Sampling:
    return Sampling(max_new_tokens=9, n=2, batch_size=3, stop_ids=list(range(30, 44)))


def sampled(policy: Policy, rows: list[int], family: str) -> dict[str, Any]:
    rollout, _ = Sampler(policy, settings(family)).sample(PromptBatch.of_ids([PROMPTS[i] for i in rows], rows=rows))
    return {"rows": rollout.row_B, "samples": rollout.sample_B, "response": rollout.response_BR, "lengths": rollout.lengths_B}


def main(out: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    assert world_size == 2
    found = {}
    for family in FAMILIES:
        model = tiny(family)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.decoder.block if family == "t5" else model.model.layers:
            fully_shard(layer, mesh=mesh)
        policy = Policy.of(fully_shard(model, mesh=mesh), tiny_tokenizer())
        assert needs_sync(policy.model)
        for name, shares in SHARES.items():
            found[f"{family} {name}"] = sampled(policy, shares[rank], family)
    torch.save(found, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
