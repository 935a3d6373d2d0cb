"""A steering operation of one's own, under a name of its own: one pure function and one entry in the table.

steerl tiny --out tiny --worlds suppressed
python examples/new_operation.py
"""

import torch
from torch import Tensor

from steerl import ModelSettings, PromptSettings, Sampler, Sampling, Steering, load_policy, load_prompts
from steerl.rollout.steering.core.table import TABLE, Operation


def towards(base: Tensor, source: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """Turn the activation towards a direction and keep its norm: ||h|| (h/||h|| + a u) / ||h/||h|| + a u||."""
    norm = base.norm(dim=-1, keepdim=True)
    turned = base / norm + strength * source / source.norm(dim=-1, keepdim=True)
    return norm * turned / turned.norm(dim=-1, keepdim=True)


# `strength` names the argument that takes it; without one the result would be mixed in: h + a (op(h) - h).
TABLE["towards"] = Operation(towards, "direction", strength="strength")


def spec(strength: float) -> dict:
    site = {
        "name": "towards-glad",
        "at": {"layers": [1]},
        "op": {"type": "towards"},
        "vector": {"file": "tiny/suppressed/cheer.safetensors"},
        "strength": strength,
    }
    return {"sites": [site]}


def main() -> None:
    base, direction = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(towards(base, direction, 0.7).norm(dim=-1), base.norm(dim=-1))

    policy = load_policy(ModelSettings(path="tiny/suppressed/base"))
    prompts = load_prompts(PromptSettings(path="tiny/suppressed/prompts.jsonl"), policy)
    for strength in (0.0, 0.5, 2.0):
        sampler = Sampler(policy, Sampling(max_new_tokens=12), Steering(policy.model, spec(strength), policy.tokenizer))
        _, texts = sampler.sample(prompts.batch([0]))
        print(f"strength {strength}: {texts.prompt_texts[0]}{texts.completions[0]}")


if __name__ == "__main__":
    main()
