"""One PPO job by both engines, and rows of plain vLLM beside the two laws: what one processed log-prob a token is worth.

    steerl bench --plain_vllm [--out runs/bench]

The model is a small one of film reviews, taught here. Plain vLLM is the same server, asked without this project's arguments:
its own sampler and seeds, and the log-prob that it gives (`processed_logprobs`). Each of its rows is scored by an unpadded pass
of transformers, in float64 from the logits on. `raw` is what vLLM gives by default, taken from the same logits.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from steerl.reward.build import build_reward
from steerl.rollout.common.run_folder import RunSettings, versions, write_json
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import LOG, VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy, load_policy
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.scripts.bench_cases.engines import one_thread
from steerl.scripts.make_tiny import make
from steerl.scripts.toy_tasks import making
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings

STEPS, ROWS, TOKENS = 10, 64, 32
PHASES = ("sample", "reward", "score", "learn")
CLIP = 0.2
"""PPO's usual: a token whose ratio is further from 1 is clipped."""
SETTINGS: dict[str, dict[str, float]] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top-p 0.9, min-p 0.1": {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1},
    "temperature 1, top-p 0.7": {"temperature": 1.0, "top_p": 0.7},
}


def measure(out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    one_thread()
    world = out / "reviews"
    if not (world / "wide").exists():
        make("reviews", out, 0)
        teach(world)
    jobs = {kind: job(kind, world, out / "job") for kind in ("stream", "vllm")}
    found: dict[str, Any] = {"versions": versions(), "job": beside(jobs), "plain": of_plain(world, out.absolute() / LOG)}
    write_json(out / "plain_vllm.json", found)
    for line in (*job_lines(found["job"]), "", *plain_lines(found["plain"])):
        print(line)
    return found


def teach(world: Path) -> None:
    """The toy task's own policy has heads of 16, which vLLM does not take on a CPU; one with heads of 32 learns the answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    answers = [json.loads(line) for line in (world / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [tokenizer.encode(row["prompt"]) for row in answers]
    rows = [
        [*ids, *tokenizer.encode(row["completion"]), tokenizer.eos_token_id] for ids, row in zip(asked, answers, strict=True)
    ]
    model = making.new_causal(tokenizer, 0, head_dim=32)
    making.fit(model, rows, [len(ids) for ids in asked], pad=tokenizer.pad_token_id, steps=300, seed=0, batch=24)
    making.save(world / "wide", tokenizer, model)


# -- the same job ------------------------------------------------------------------------------------------------------


def job(kind: str, world: Path, out: Path) -> Path:
    folder = out / kind
    policy = load_policy(ModelSettings(path=str(world / "wide"), dtype="float32"))
    reward = [{"name": "kindness", "kind": "model", "path": str(world / "reward_model"), "output": "probability"}]
    train(
        policy,
        load_prompts(PromptSettings(path=str(world / "prompts.jsonl")), policy, TOKENS),
        build_reward(reward, policy=policy, device=policy.device),
        Sampling(max_new_tokens=TOKENS, batch_size=ROWS),
        PPOSettings(steps=STEPS, rollouts_per_step=ROWS, learning_rate=5e-4, micro_batch_size=32, samples=ROWS, eval_prompts=0),
        RunSettings(dir=str(folder), overwrite=folder.exists()),
        engine=EngineSettings(kind=kind),  # type: ignore[arg-type]
    )
    return folder


def beside(folders: dict[str, Path]) -> dict[str, Any]:
    """Tokens, log-probs, weights and seconds of the two."""
    rows = {kind: rows_of(folder) for kind, folder in folders.items()}
    both = [(row, rows["vllm"][key]) for key, row in rows["stream"].items()]
    same = [(a, b) for a, b in both if a["response_ids"] == b["response_ids"]]
    apart = [
        abs(x - y)
        for a, b in same
        for name in ("behaviour_logprobs", "policy_logprobs")
        for x, y in zip(a[name], b[name], strict=True)
    ]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders.values()]
    seconds = {}
    for kind, folder in folders.items():
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        told = [step for step in steps if "time/sample_s" in step][1:]  # the first starts the server
        seconds[kind] = {name: statistics.median(step[f"time/{name}_s"] for step in told) for name in PHASES}
        if kind == "vllm":
            seconds[kind]["sync"] = statistics.median(step["engine/sync_s"] for step in told)
    return {
        "rows": len(both),
        "same_rows": len(same),
        "logprobs_apart": max(apart),
        "weights_apart": max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]),
        "seconds": seconds,
    }


def rows_of(folder: Path) -> dict[tuple[int, int, int], dict[str, Any]]:
    """By step, row and sample: all rows of all steps are among the samples."""
    read = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(row["step"], row["row"], row["sample"]): row for row in read}


# -- plain vLLM --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What plain vLLM says of a row."""

    prompt: list[int]
    ids: list[int]
    said: list[float]


def of_plain(world: Path, log: Path) -> list[dict[str, Any]]:
    policy = load_policy(ModelSettings(path=str(world / "wide"), dtype="float32"))
    prompts = load_prompts(PromptSettings(path=str(world / "prompts.jsonl"), limit=4 * ROWS), policy, TOKENS)
    batch = prompts.batch(list(range(len(prompts))))
    engine = VllmEngine(
        policy, EngineSettings(kind="vllm", arguments=["--logprobs-mode", "processed_logprobs"]), log, alone=True
    )
    try:
        engine.ready(0)
        found = []
        for name, how in SETTINGS.items():
            own = ServerSampler(engine, Sampling(max_new_tokens=TOKENS, **how)).sample(batch).rollout  # type: ignore[arg-type]
            rows = list(scored(policy, drawn(engine, [list(ids) for ids in batch.ids], how)))
            with torch.no_grad():
                ratio_BR = (teacher_forced(policy, own).logprobs_BR - own.behaviour_logprobs_BR).exp()
            ours = float((ratio_BR - 1).abs().max())
            found.append({"sampling": name, "raw": False, "ours": ours, **worth(rows, how)})
            if how["temperature"] != 1:
                raw = [(row._replace(said=_of(logits.log_softmax(-1), row.ids).tolist()), logits) for row, logits in rows]
                found.append({"sampling": f"{name}, raw", "raw": True, "ours": ours, **worth(raw, how)})
        return found
    finally:
        engine.close()


def drawn(engine: VllmEngine, prompts: list[list[int]], how: dict[str, float]) -> list[Row]:
    stops = list(engine.policy.eos_ids)

    def one(at: int) -> Row:
        params = {"max_tokens": TOKENS, "logprobs": 0, "seed": at, "detokenize": False, "stop_token_ids": stops, **how}
        body = {"model": "policy", "token_ids": prompts[at], "sampling_params": params}
        (choice,) = engine.client.post("/inference/v1/generate", body, timeout=None)["choices"]
        said = [token["logprob"] for token in choice["logprobs"]["content"]]
        return Row(prompts[at], choice["token_ids"], said)

    with ThreadPoolExecutor(ROWS) as pool:
        return list(pool.map(one, range(len(prompts))))


def worth(rows: Sequence[tuple[Row, Tensor]], how: dict[str, float]) -> dict[str, Any]:
    """How far what is said is from what drew the tokens, and from the policy that is to learn from them."""
    law, gap, sums, order = [], [], [], 0
    for row, logits_TV in rows:
        theirs_TV, ours_TV = (law_of(logits_TV, how, first) for first in (True, False))
        said_T = torch.tensor(row.said, dtype=torch.float64)
        law.append((_of(theirs_TV, row.ids) - said_T).abs())
        gap.append(_of((logits_TV / how["temperature"]).log_softmax(-1), row.ids) - said_T)
        sums.append(float(gap[-1].sum()))
        order += int((theirs_TV.isinf() != ours_TV.isinf()).any(-1).sum())
    law_N, gap_N, weight_B = torch.cat(law), torch.cat(gap), torch.tensor(sums).exp()
    return {
        "tokens": len(law_N),
        "law_max": float(law_N.max()),
        "policy_mean": float(gap_N.abs().mean()),
        "policy_max": float(gap_N.abs().max()),
        "clipped_at_step_1": float(((gap_N.exp() - 1).abs() > CLIP).double().mean()),
        "token_weight_mean": float(gap_N.exp().mean()),
        "effective_rows": float(weight_B.sum() ** 2 / (weight_B**2).sum()) / len(rows),
        "other_order": order / len(law_N),
    }


def _of(value_TV: Tensor, ids: list[int]) -> Tensor:
    return value_TV.gather(1, torch.tensor(ids)[:, None])[:, 0]


def scored(policy: Policy, rows: Sequence[Row]) -> Iterator[tuple[Row, Tensor]]:
    """Each row with the raw logits of its tokens, in float64, from a pass of its own."""
    with no_dropout(policy.core), torch.no_grad():
        for row in rows:
            logits = policy.core(input_ids=torch.tensor([row.prompt + row.ids]), use_cache=False).logits
            yield row, logits[0, len(row.prompt) - 1 : -1].double()


def law_of(logits_TV: Tensor, how: dict[str, float], min_p_first: bool) -> Tensor:
    """Log-probs of what is drawn from: vLLM applies min-p before top-p, this project after."""
    scores_TV = logits_TV / how["temperature"]
    for name in ("min_p", "top_p") if min_p_first else ("top_p", "min_p"):
        if name not in how:
            continue
        chance_TV = scores_TV.softmax(-1)
        if name == "min_p":
            drop_TV = chance_TV < how[name] * chance_TV.amax(-1, keepdim=True)
        else:
            sorted_TV, at_TV = chance_TV.sort(-1, descending=True)
            drop_TV = torch.zeros_like(chance_TV, dtype=torch.bool).scatter(
                1, at_TV, sorted_TV.cumsum(-1) - sorted_TV >= how[name]
            )
        scores_TV = scores_TV.masked_fill(drop_TV, -math.inf)
    return scores_TV.log_softmax(-1)


# -- what it says ------------------------------------------------------------------------------------------------------


def job_lines(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = [
        f"{found['same_rows']} of {found['rows']} rows with the same tokens; log-probs at most {found['logprobs_apart']:.1e} "
        f"apart, weights after {STEPS} steps at most {found['weights_apart']:.1e}.",
        "",
        "| seconds of a step | " + " | ".join((*PHASES, "sync")) + " |",
        "|" + "---|" * 6,
    ]
    return lines + [
        f"| {kind} | " + " | ".join(f"{seconds[name]:.2f}" if name in seconds else "" for name in (*PHASES, "sync")) + " |"
        for kind, seconds in found["seconds"].items()
    ]


def plain_lines(found: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| plain vLLM | off from what drew, at most | off from the policy, mean (max) | clipped at step 1 | mean token weight "
        "| effective rows | min-p's place matters | this project: ratio off from 1 |",
        "|" + "---|" * 8,
    ]
    return lines + [
        f"| {row['sampling']} | {row['law_max']:.1e} | {row['policy_mean']:.3f} ({row['policy_max']:.2f}) | "
        f"{row['clipped_at_step_1']:.1%} | {row['token_weight_mean']:.3f} | {row['effective_rows']:.0%} | "
        f"{row['other_order']:.1%} | " + (f"{row['ours']:.0e} |" if not row["raw"] else "|")
        for row in found
    ]
