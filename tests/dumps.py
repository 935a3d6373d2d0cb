"""Hand-made rollouts and dumps for the tests of what stores, inspects, scores and selects them. No model is needed.

made_rows(prompts, samples, seed)     ragged rows with empty and full responses, as the sampler would give them
episodes(prompts, samples)            the same with all that a row may record: gaps, two sites, positions, steps, kept ids
made_dump(folder, ...)                a finished dump of such rows
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from steerl.rollout.dumps import manifest, store
from steerl.rollout.ragged import Kept
from steerl.rollout.types import Rollout, Samples, Texts

WIDTH_P, WIDTH_R = 5, 7


def made_rows(prompts: Sequence[int], samples: int = 2, chat: bool = False, **changes: Any) -> Samples:
    """What a row holds depends on its prompt and sample alone."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        for sample in range(samples):
            generator = torch.Generator().manual_seed(1000 * prompt + sample)

            def draw(high: int, count: int, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randint(0, high, (count,), generator=generator)

            length_P, length_R = int(draw(WIDTH_P, 1)) + 1, int(draw(WIDTH_R + 1, 1))
            behaviour, policy = (-torch.rand(WIDTH_R, generator=generator) for _ in range(2))
            rows.append(
                {
                    "prompt": torch.nn.functional.pad(draw(60000, length_P), (WIDTH_P - length_P, 0)),
                    "prompt_mask": torch.arange(WIDTH_P) >= WIDTH_P - length_P,
                    "response": torch.where(torch.arange(WIDTH_R) < length_R, draw(60000, WIDTH_R), 0),
                    "length": length_R,
                    "behaviour": torch.where(torch.arange(WIDTH_R) < length_R, behaviour, 0.0),
                    "policy": torch.where(torch.arange(WIDTH_R) < length_R, policy, 0.0),
                    "stop": int(draw(3, 1)),
                    "key": (prompt, sample),
                }
            )
    rollout = Rollout(
        prompt_BP=torch.stack([row["prompt"] for row in rows]),
        prompt_mask_BP=torch.stack([row["prompt_mask"] for row in rows]),
        response_BR=torch.stack([row["response"] for row in rows]),
        lengths_B=torch.tensor([row["length"] for row in rows]),
        ended_B=torch.tensor([row["stop"] > 0 for row in rows]),
        stop_B=torch.tensor([row["stop"] for row in rows]),
        behaviour_logprobs_BR=torch.stack([row["behaviour"] for row in rows]),
        policy_logprobs_BR=torch.stack([row["policy"] for row in rows]),
        row_B=torch.tensor([row["key"][0] for row in rows]),
        sample_B=torch.tensor([row["key"][1] for row in rows]),
        **{"temperature": 0.7, **changes},
    )
    said = [f"frage {prompt} – 質問" for prompt, _ in (row["key"] for row in rows)]
    texts = Texts(
        prompts=[[{"role": "user", "content": text}] for text in said] if chat else list(said),
        prompt_texts=[f"<s>{text}" for text in said],
        completions=[f"answer {prompt}.{sample} 🙂" for prompt, sample in (row["key"] for row in rows)],
        columns={"answer": [row["key"][0] * 2 for row in rows], "tags": [["a", None] for _ in rows]},
    )
    return Samples(rollout, texts)


def episodes(prompts: Sequence[int], samples: int = 2, **changes: Any) -> Samples:
    """Rows of several turns, steered at two sites of which the second reads its positions from the data, truncated."""
    rollout, texts = made_rows(prompts, samples)
    draws = [
        random.Random(f"{row} {sample}") for row, sample in zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)
    ]
    action_BR = (
        torch.tensor([[draw.random() < 0.6 for _ in range(rollout.response_width)] for draw in draws]) & rollout.extent_BR
    )
    kept = [
        [draw.sample(range(90_000), draw.randrange(4)) if drawn else [] for drawn in action_BR[i]]
        for i, draw in enumerate(draws)
    ]
    listed = [[[], [draw.randrange(5) for _ in range(draw.randrange(3))]] for draw in draws]
    most = max(len(places) for row in listed for places in row)
    fields: dict[str, Any] = {
        "action_mask_BR": action_BR,
        "behaviour_logprobs_BR": torch.where(action_BR, rollout.behaviour_logprobs_BR, 0.0),
        "policy_logprobs_BR": torch.where(action_BR, rollout.policy_logprobs_BR, 0.0),
        "steering": "cheer#1f",
        "steering_seed": 5,
        "strength_BK": torch.tensor([[draw.random(), -draw.random()] for draw in draws]),
        "positions_BKN": torch.tensor([[places + [-1] * (most - len(places)) for places in row] for row in listed]).long(),
        "policy_step_B": torch.tensor([draw.randrange(3) for draw in draws]),
        "kept": Kept.of_lists(kept),
    }
    return Samples(dataclasses.replace(rollout, **{**fields, **changes}), texts)


def made_dump(
    folder: Path,
    prompts: int = 10,
    samples: int = 2,
    shard_rows: int = 8,
    make: Callable[..., Samples] | None = None,
    **rows: Any,
) -> manifest.Plan:
    folder.mkdir(parents=True, exist_ok=True)
    plan = manifest.Plan.of(prompts, samples, batch_size=4, shard_rows=shard_rows)
    begun = manifest.start(folder, plan, {"sampling": {"n": samples}}, {"model.path": "made by hand"})
    for index in range(len(plan)):
        store.make_shard(folder, plan, index, lambda call: (make or made_rows)(call, samples, **rows))
    manifest.finish(folder, begun, world_size=1)
    return plan


def write_scores(folder: Path, scores: dict[tuple[int, int], dict[str, float]]) -> None:
    """(prompt, sample) -> {total, parts}, in the columns of score_rollouts.py."""
    import pyarrow as pa

    columns: dict[str, pa.Array] = {
        "prompt_index": pa.array([prompt for prompt, _ in scores], pa.int64()),
        "sample_index": pa.array([sample for _, sample in scores], pa.int32()),
    }
    for name in next(iter(scores.values())):
        columns[name] = pa.array([row[name] for row in scores.values()], pa.float32())
    store.write_table(folder / "scores-00000.parquet", pa.table(columns))


def flip_bit(path: Path, at: float = 0.5) -> None:
    """One bit of the file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
