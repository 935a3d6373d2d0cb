"""Peak memory of sampling with both log-probs: streaming beside plain generation and beside stacked scores.

    python tests/rollout/scoring/test_memory.py stream 16 192 50257        one mode in a process of its own -> peak growth in MB

Run by hand, or by `make proofs`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.prompts.prompts import PromptBatch
from tests.models import tiny_policy, tiny_tokenizer

ROOT = Path(__file__).parents[3]


def peak_growth(mode: str, rows: int, tokens: int, vocabulary: int) -> float:
    """MB that one way of sampling adds to a process which has the model and has sampled two tokens."""
    policy = tiny_policy("gpt2", tokenizer=tiny_tokenizer(), vocab_size=vocabulary, n_positions=tokens + 16, eos_token_id=None)
    batch = PromptBatch.of_ids([[5 + row, 6, 7, 8] for row in range(rows)])

    def run(count: int) -> None:
        settings = Sampling(max_new_tokens=count, batch_size=rows)
        if mode == "stream":
            Sampler(policy, settings).sample(batch)
        elif mode == "stack":
            Sampler(policy, settings, engine=EngineSettings("generate")).sample(batch)
        else:
            ids = torch.tensor(batch.ids)
            with torch.no_grad():
                policy.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    do_sample=True,
                    top_k=0,
                    pad_token_id=0,
                )

    run(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(tokens)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measured(*arguments: object) -> float:
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return float(
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


@pytest.mark.proofs
def test_streaming_stays_within_100_mb_of_plain_generation_where_stacking_takes_over_a_gigabyte() -> None:
    plain, stream, stack = (measured(mode, 16, 192, 50257) for mode in ("plain", "stream", "stack"))
    assert stream - plain < 100 and stack - plain > 1000, (plain, stream, stack)


if __name__ == "__main__":
    print(peak_growth(sys.argv[1], *map(int, sys.argv[2:])))
