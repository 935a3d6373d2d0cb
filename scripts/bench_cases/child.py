"""One measurement in a process of its own:  python -m steerl.scripts.bench_cases.child CASE_AS_JSON IMPLEMENTATION TIMES FOLDER

    ours      whole PPO updates by training.ppo.train, or rollouts by Sampler
    compiled  the same with ppo.compile or sampling.compile
    trl       whole PPO updates by TRL 1.12's PPOTrainer, which must be first on PYTHONPATH
    grpo      whole updates by the GRPOTrainer of the installed TRL
    rloo      whole updates by its RLOOTrainer
    plain     rollouts by model.generate, which keeps no log-probs

With limit:DEVICE:DTYPE in the place of the first two it measures the machine instead (limit.py).

One update or rollout first to warm up, then TIMES that count. Prints one JSON line: seconds of each phase (CPU seconds of
this process on the CPU: another job on the machine is not in them; the clock's on a GPU), wall seconds, tokens, peak memory.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from steerl.scripts.bench_cases import limit
from steerl.scripts.bench_cases.cases import (
    DISTRIBUTIONS,
    PAD,
    STOP,
    Case,
    causal,
    classifier,
    policy_of,
    prompt_batch,
    prompt_ids,
    tokenizer_of,
)
from steerl.scripts.bench_cases.trl_112 import Enough, Ids

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

Kind = TypeVar("Kind")

TINY_STEP = 1e-6
"""Learning rate: the work is whole, and the lengths stay what the case says."""
KL = 0.04
"""Its weight in cases of groups that have one."""
PEER_SETTINGS = {
    "gradient_checkpointing": False,
    "stop": "stop_token eos where lengths are geometric: its generate then ends with the last row",
    "local_rollout_forward_batch_size": "all rows at once",
    "num_sample_generations": 0,
    "collection": "gc.freeze() after setup, so that its two gc.collect() calls per update look through nothing old",
}
"""What the peer is given beyond the work itself."""


class Meter:
    """Seconds by name, and how much memory this process has had at most."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.laps: list[dict[str, float]] = [{}]
        self.tokens: list[int] = []
        self.alive: list[int] = []
        self.began = self.now()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before_mb = self.peak = self.peak_mb()

    def now(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter(), time.perf_counter()
        return time.process_time(), time.perf_counter()

    def peak_mb(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def lap(self, name: str) -> None:
        now = self.now()
        for key, at in ((name, 0), ("wall", 1)):
            self.laps[-1][key] = self.laps[-1].get(key, 0.0) + now[at] - self.began[at]
        self.began = now

    def done(self, lengths: list[int]) -> None:
        """An update or rollout is over; what comes after the last one (saving the run) is not counted."""
        self.peak = self.peak_mb()
        self.tokens.append(sum(lengths))
        self.alive = [sum(length > t for length in lengths) for t in range(max(lengths))]
        self.laps.append({})
        self.began = self.now()

    def to_json(self, case: Case, implementation: str) -> dict[str, object]:
        """Without the first one, which warms up. `alive`: rows at each step of the last one."""
        found: dict[str, object] = {"case": case.name, "implementation": implementation, "tokens": self.tokens[1:]}
        laps = [lap for lap in self.laps[1:] if lap]
        found["seconds"] = {name: [lap[name] for lap in laps] for name in laps[0] if name != "wall"}
        found["wall"] = [lap["wall"] for lap in laps]
        return found | {"peak_mb": self.peak, "before_mb": self.before_mb, "alive": self.alive}


# -- rollouts alone ---------------------------------------------------------------------------------------------------


def sample_ours(case: Case, times: int, folder: Path) -> Meter:
    from steerl.rollout.decoding.settings import Sampling
    from steerl.rollout.engines.sampler import Sampler

    meter = Meter(case.device)
    batch = prompt_batch(case)
    sampler = Sampler(policy_of(case), sampling_of(case, Sampling))
    for step in range(times + 1):
        rollout, _ = sampler.sample(batch, step=step)
        meter.lap("sample")
        meter.done(rollout.lengths_B.tolist())
    return meter


def sampling_of(case: Case, kind: Callable[..., Kind]) -> Kind:
    extra = {"compile": True} if case.compile and case.work == "sampling" else {}
    return kind(max_new_tokens=case.response, batch_size=case.rows, n=case.n, **DISTRIBUTIONS[case.distribution], **extra)


def sample_plain(case: Case, times: int, folder: Path) -> Meter:
    """The same distribution from model.generate. Its repetition penalty and n-gram ban see padding too; here there is none."""
    meter = Meter(case.device)
    model = causal(case)
    model.generation_config.eos_token_id = STOP if case.mean else None
    ids = torch.tensor(prompt_ids(case), device=case.device)
    distribution = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **DISTRIBUTIONS[case.distribution]}
    for step in range(times + 1):
        torch.manual_seed(step)
        with torch.no_grad():
            sequences = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=case.response,
                num_return_sequences=case.n, pad_token_id=PAD, **distribution,
            )  # fmt: skip
        meter.lap("sample")
        meter.done(lengths_of(sequences[:, case.prompt :], case))
    return meter


def lengths_of(response_BR: Tensor, case: Case) -> list[int]:
    """Tokens of each row up to and with its stop token."""
    if not case.mean:
        return [response_BR.shape[1]] * len(response_BR)
    before_BR = (response_BR == STOP).long().cumsum(1) - (response_BR == STOP).long()
    found: list[int] = (before_BR == 0).sum(1).tolist()
    return found


# -- whole updates ----------------------------------------------------------------------------------------------------


def credit_of(case: Case) -> dict[str, Any]:
    """Of `ppo`: groups have no value, and a reference where they have a KL, each where the peer has it."""
    if case.credit == "gae":
        return {}
    if not case.kl:
        return {"credit": case.credit, "reference": "none", "kl_coef": 0.0}
    how = {"kl_as": "loss", "kl_estimator": "k3"} if case.credit == "group" else {"kl_as": "reward", "kl_estimator": "k1"}
    return {"credit": case.credit, "kl_coef": KL, **how}


def update_ours(case: Case, times: int, folder: Path) -> Meter:
    from steerl.reward.types import Scores
    from steerl.rollout.common.run_folder import RunSettings
    from steerl.rollout.decoding.settings import Sampling
    from steerl.rollout.prompts.prompts import Prompts, PromptSettings
    from steerl.rollout.types import Rollout, Texts
    from steerl.training import ppo, setup

    meter, made, ending = Meter(case.device), [], contextlib.ExitStack()

    def prepare(*given: Any) -> setup.Components:
        made.append(setup.prepare(*given))
        if case.compile and case.mean:  # a row alone in a pass has a graph of its own, and a later update may be the first
            alone = made[0].actor_critic(Rollout.of_ids([[2, 3]], [[4, 5]], pad_id=PAD, device=case.device))
            (alone.logprobs_BR.sum() + alone.values_BR.sum()).backward()
            made[0].state.optimizer.zero_grad()
        return made[0]

    class Timer(ppo.Timer):
        """The loop's own clock, which tells the meter as well."""

        def lap(self, name: str) -> None:
            super().lap(name)
            meter.lap(name)

        def metrics(self, tokens: float) -> dict[str, float]:
            meter.done(lengths)
            if len(meter.tokens) > times:
                raise Enough  # no checkpoint of it
            if case.compile and len(meter.tokens) == 1:  # the compiler's time is not an update's
                ending.enter_context(torch.compiler.set_stance("fail_on_recompile"))
            return super().metrics(tokens)

    lengths: list[int] = []

    def reward(rollout: Rollout, texts: Texts) -> Scores:
        lengths[:] = rollout.lengths_B.tolist()
        return Scores(total_B=(rollout.response_BR[:, 0] % 2).float())

    policy = policy_of(case)
    table = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in prompt_ids(case)]
    settings = ppo.PPOSettings(
        steps=times + 1, rollouts_per_step=case.rows, epochs=case.epochs, minibatches=case.minibatches,
        micro_batch_size=case.micro, learning_rate=TINY_STEP, eval_prompts=0, samples=0,
        compile="on" if case.compile else "off", **credit_of(case),
    )  # fmt: skip
    run = RunSettings(dir=str(folder), overwrite=True, save_every=10**6)
    prompts = Prompts(table, "prompt", policy, PromptSettings())
    with patch.multiple(ppo, Timer=Timer, prepare=prepare), contextlib.suppress(Enough), ending:
        ppo.train(policy, prompts, reward, sampling_of(case, Sampling), settings, run)
    if case.compile and (why := getattr(made[0].actor_critic.compiled, "failed", "")):
        raise RuntimeError(f"{case.name}: learning went on uncompiled: {why}")
    return meter


class Parity(nn.Module):
    """The reward model that the trainer asks for, at no cost: whether the id at a position is odd."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Ids()

    def score(self, ids_BS1: Tensor) -> Tensor:
        return (ids_BS1 % 2).float()


def update_trl(case: Case, times: int, folder: Path) -> Meter:
    import gc

    meter = Meter(case.device)
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__.startswith("1.12."), trl.__file__
    tokenizer = tokenizer_of(case)
    policy, reference, value = causal(case), causal(case), classifier(case)
    micro = min(case.micro, case.rows // case.minibatches)
    config = PPOConfig(
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", temperature=1.0,
        use_cpu=case.device == "cpu", bf16=case.dtype == "bfloat16", learning_rate=TINY_STEP, response_length=case.response,
        per_device_train_batch_size=micro, gradient_accumulation_steps=case.rows // micro,
        total_episodes=case.rows * (times + 1), num_ppo_epochs=case.epochs,
        num_mini_batches=case.minibatches, num_sample_generations=0, gradient_checkpointing=False,
        local_rollout_forward_batch_size=case.rows, stop_token="eos" if case.mean else None,
    )  # fmt: skip
    generate = ppo_trainer.batch_generation
    lengths: list[int] = []

    def generate_timed(*given: object) -> object:
        meter.lap("rest")  # since the last update ended: garbage collection, loading of prompts
        sequences, logits = generate(*given)
        meter.lap("sample")
        lengths[:] = lengths_of(sequences[:, case.prompt :], case)
        return sequences, logits

    class Update(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            meter.lap("learn")
            meter.done(lengths)

    ppo_trainer.batch_generation = generate_timed
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, value_model=value, reward_model=Parity(),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompt_ids(case)] * (2 * case.n)),
        callbacks=[Update()],
    )  # fmt: skip
    accumulate = trainer.accelerator.accumulate

    def accumulate_timed(*models: object) -> object:
        if "score" not in meter.laps[-1]:
            meter.lap("score")
        return accumulate(*models)

    trainer.accelerator.accumulate = accumulate_timed
    gc.collect()
    gc.freeze()
    trainer.train()
    return meter


def update_groups(kind: str, case: Case, times: int, folder: Path) -> Meter:
    """Updates of TRL's GRPOTrainer or RLOOTrainer: what it samples by, and the rest of an update, which has no public seam."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    meter, lengths = Meter(case.device), [0]
    micro = min(case.micro, case.rows // case.minibatches)
    steps = case.minibatches * case.epochs

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        # A micro-batch's rows come apart or all at once, as the version has it.
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(ids[0] % 2) for ids in completion_ids]

    class Update(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            if state.global_step % steps == 0:
                meter.lap("learn")
                meter.done(lengths[1:])
                lengths[:] = [0]

    config = getattr(trl, f"{kind.upper()}Config")(
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", bf16=False,
        use_cpu=case.device == "cpu", learning_rate=TINY_STEP, max_steps=steps * (times + 1), num_generations=case.n,
        beta=KL if case.kl else 0.0, per_device_train_batch_size=micro, steps_per_generation=case.rows // micro,
        gradient_accumulation_steps=case.rows // case.minibatches // micro, num_iterations=case.epochs,
        max_completion_length=case.response, temperature=1.0, gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": case.response},
    )  # fmt: skip
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in prompt_ids(case)]
    model = causal(case)
    if case.kl:  # it reads the reference from where the model came from
        model.save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
    generate = model.generate

    def generate_timed(*given: Any, **named: Any) -> object:
        meter.lap("rest")
        drawn = generate(*given, **named)
        meter.lap("sample")
        return drawn

    model.generate = generate_timed
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer_of(case),
        train_dataset=Dataset.from_list(rows * (times + 1)), callbacks=[Update()],
    )  # fmt: skip
    trainer.train()
    return meter


def compiled(case: Case, times: int, folder: Path) -> Meter:
    return RUNNERS[case.work, "ours"](replace(case, compile=True), times, folder)


RUNNERS: dict[tuple[str, str], Callable[[Case, int, Path], Meter]] = {
    ("sampling", "ours"): sample_ours,
    ("sampling", "compiled"): compiled,
    ("sampling", "plain"): sample_plain,
    ("update", "ours"): update_ours,
    ("update", "compiled"): compiled,
    ("update", "trl"): update_trl,
    ("update", "grpo"): partial(update_groups, "grpo"),
    ("update", "rloo"): partial(update_groups, "rloo"),
}


def main(case: Case, implementation: str, times: int, folder: Path) -> None:
    meter = RUNNERS[case.work, implementation](case, times, folder)
    print(json.dumps(meter.to_json(case, implementation)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1].startswith("limit:"):
        _, device, dtype = sys.argv[1].split(":")
        print(json.dumps(limit.measured(device, dtype)))
    else:
        main(Case(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
