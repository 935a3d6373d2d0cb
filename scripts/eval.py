"""Evaluation by the tasks of lm-evaluation-harness, steered too.

    steerl eval --model.path DIR --eval.tasks arc_easy,gsm8k --run.dir OUT
    steerl eval RUN --eval.tasks arc_easy               a run's model; leaves RUN-eval

Leaves OUT/results.json, as the harness writes it, and with --eval.log_samples true OUT/samples_TASK.jsonl. Needs the package
lm-eval: pip install 'steerl[eval]'. The harness's own command line takes the model, too (docs/evaluation.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError, visible
from steerl.rollout.common.run_folder import RunSettings, begin, opened
from steerl.rollout.common.settings_reader import within
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.evaluation.settings import AnswerSettings, evaluated_spec, steering_of
from steerl.rollout.model.settings import ModelSettings

if TYPE_CHECKING:
    from steerl.rollout.engines.sampler import Sampler
    from steerl.rollout.engines.vllm.sampler import ServerSampler
    from steerl.rollout.model.policy import Policy
    from steerl.rollout.steering import Steering


@dataclass(frozen=True)
class EvalSettings(AnswerSettings):
    """What is asked, and how it is answered. Names that the harness has mean what they mean there."""

    tasks: str | list[str] = ""
    """Names of tasks, groups and tags, patterns, YAML files; a list, or with commas."""
    include_path: str | list[str] = ""
    """Folders with tasks of one's own."""
    limit: float | None = within(None, above=0)
    """Documents of each task; below 1 a share of them. For trials: such results are not comparable."""
    num_fewshot: int | None = within(None, low=0)
    """Examples before each question; null = as the task says."""
    apply_chat_template: bool = False
    """Ask in conversations, through the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """Through the chat template examples are turns of the conversation; false: one text."""
    system_instruction: str = ""
    """A system message, or a text before all others."""
    gen_kwargs: dict[str, object] = field(default_factory=dict)
    """Over what tasks say of their generations: {max_gen_toks: 64, do_sample: true, temperature: 0.7}."""
    log_samples: bool = False
    """Also every document with what the model said, in samples_TASK.jsonl."""
    confirm_run_unsafe_code: bool = False
    """For tasks that run code which the model writes."""

    def problems(self) -> list[str]:
        wrong = [] if listed(self.tasks) else ["eval.tasks: missing; name what is asked, --eval.tasks arc_easy,gsm8k"]
        if not self.apply_chat_template and not self.fewshot_as_multiturn:
            wrong.append("eval.fewshot_as_multiturn: has no effect without eval.apply_chat_template; leave it out")
        if not self.apply_chat_template and self.enable_thinking is not None:
            wrong.append("eval.enable_thinking: has no effect without eval.apply_chat_template; leave it out")
        return wrong


@dataclass(frozen=True)
class OutSettings:
    """Where the results go."""

    dir: str = ""
    """A folder of their own; RUN-eval where a run is evaluated."""
    overwrite: bool = False
    """Empty it first, if a job wrote it."""


@dataclass(frozen=True)
class EvalJob:
    """Evaluate a model by tasks of lm-evaluation-harness."""

    of: str = field(default="", metadata={"positional": True})
    """A run's folder, whose model is evaluated, instead of model.path."""
    model: ModelSettings = field(default_factory=ModelSettings)
    steering: dict[str, object] | str | None = field(default=None, metadata={"check": evaluated_spec})
    """An intervention, at work on log-likelihoods and generations; continuations are responses."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What draws generations; log-likelihoods are always this process's own."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    run: OutSettings = field(default_factory=OutSettings)


def listed(names: str | list[str]) -> list[str]:
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]


def main(job: EvalJob) -> None:
    from steerl.rollout.model.policy import load_policy

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("eval: the package lm-eval is missing; pip install 'steerl[eval]'")
    job = of_run(job)
    if job.model.peft is not None:
        raise ConfigError("model.peft: says what training adds, so it has no effect here; an adapter is model.adapter")
    run = RunSettings(dir=job.run.dir, overwrite=job.run.overwrite)
    path, adapter, _ = job.model.base()
    with opened(run, asdict(job)) as folder, contextlib.ExitStack() as ending:
        from steerl.rollout.evaluation.tasks import Tasks

        tasks = Tasks(listed(job.eval.tasks), listed(job.eval.include_path))
        tasks.check(unsafe=job.eval.confirm_run_unsafe_code, generation=job.eval.gen_kwargs)
        me = processes.start()
        policy = load_policy(job.model, me.device)
        beside = [Path(name) / "steering.yaml" for name in (adapter, path) if name]
        if job.steering is None and me.is_main and (kept := [file for file in beside if file.is_file()]):
            print(f"{kept[0]} lies beside the model and is not applied; --steering {kept[0]} does", file=sys.stderr)
        results = evaluate(job, policy, tasks, ending)
        if me.is_main:
            begin(folder, run)
            show(folder, write(folder, results, job.eval.log_samples))
    processes.barrier()


def of_run(job: EvalJob) -> EvalJob:
    """With the model and the place of the results that a run's folder stands for."""
    if not job.of:
        return job
    if job.model.path:
        raise ConfigError(f"of: {job.of}, and model.path too; choose one")
    found = next((path for name in ("model", "adapter") if (path := Path(job.of) / name).is_dir()), None)
    if found is None:
        raise ConfigError(f"of: {job.of} holds no model or adapter; name a run that is finished, or a model by --model.path")
    # Beside the run, not in it: a folder of another job in a run's keeps run.overwrite from emptying it.
    out = (
        job.run
        if job.run.dir
        else replace(job.run, dir=f"{Path(job.of).resolve() if job.of in ('.', '..') else Path(job.of)}-eval")
    )
    return replace(job, model=replace(job.model, path=str(found)), run=out)


def evaluate(job: EvalJob, policy: Policy, tasks: Any, ending: contextlib.ExitStack) -> tuple[dict[str, Any], Any]:
    """(the harness's results, its tracker); none on other processes than the main one."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from steerl.rollout.engines.sampler import Sampler
    from steerl.rollout.engines.vllm.sampler import ServerSampler, server_of
    from steerl.rollout.evaluation.harness import SteerlLM

    asked = job.eval
    if asked.apply_chat_template and not getattr(policy.tokenizer, "chat_template", None):
        raise ConfigError("eval.apply_chat_template: the tokenizer has no chat template; leave it out, or save one with it")
    steering = steering_of(policy, job.steering, asked.seed)
    server = None
    if job.engine.kind == "vllm":
        server = ending.enter_context(server_of(policy, steering, job.engine))

    def draws(sampling: Sampling, steering: Steering | None) -> Sampler | ServerSampler:
        if server is not None:
            return ServerSampler(server, sampling, steering)
        return Sampler(policy, sampling, steering, job.engine)

    tracker = EvaluationTracker()
    results = simple_evaluate(
        model=SteerlLM(policy, answers=asked, steering=steering, draws=draws),
        model_args={name: value for name, value in asdict(job.model).items() if value},
        tasks=tasks.names,
        task_manager=tasks,
        evaluation_tracker=tracker,
        batch_size=asked.batch_size,
        device=str(policy.device),
        limit=int(asked.limit) if asked.limit is not None and asked.limit >= 1 else asked.limit,
        num_fewshot=asked.num_fewshot,
        apply_chat_template=asked.apply_chat_template,
        fewshot_as_multiturn=asked.fewshot_as_multiturn,
        system_instruction=asked.system_instruction or None,
        gen_kwargs=dict(asked.gen_kwargs) or None,
        log_samples=asked.log_samples,
        confirm_run_unsafe_code=asked.confirm_run_unsafe_code,
    )
    return results, tracker


def write(folder: Path, evaluated: tuple[dict[str, Any], Any], log_samples: bool) -> dict[str, Any]:
    """The harness's own files, written aside under its names and moved to ours."""
    results, tracker = evaluated
    aside = folder / ".eval.tmp"
    samples: dict[str, Any] | None = results.pop("samples") if log_samples else None
    tracker.output_path = str(aside / "results.json")
    try:
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, rows in (samples or {}).items():
            tracker.save_results_samples(task_name=name, samples=rows)
        date = getattr(tracker, "date_id", "")
        wanted = ["results.json", *(f"samples_{name}.jsonl" for name in samples or {})]
        written = [aside / f"{Path(name).stem}_{date}{Path(name).suffix}" for name in wanted]
        if not all(file.is_file() for file in written):  # the harness logs what went wrong, and goes on
            raise UserError(f"run.dir: {folder}: the results could not be written; is there room?")
        for file, name in zip(written, wanted, strict=True):
            os.replace(file, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return results


def show(folder: Path, results: dict[str, Any]) -> None:
    rows = []
    for task, numbers in results["results"].items():
        asked = f"{results['n-samples'][task]['effective']} documents, " if task in results["n-samples"] else ""
        for key, value in numbers.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            spread = f" ± {error:.4g}" if isinstance(error, int | float) else ""
            by = "" if chosen == "none" else f", {chosen}"
            shots = results["n-shot"].get(task, "?")
            rows.append((task, metric, f"{value:.4g}{spread}", f"({asked}{shots}-shot{by})"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    print(f"{folder}/results.json")
    for row in rows:
        print(visible("  ".join(["", *(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])))


def cli() -> None:
    run_command(main, EvalJob)


if __name__ == "__main__":
    cli()
