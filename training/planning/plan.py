"""Which engine and settings a PPO job needs on given machines: a row per strategy, and what to take of it.

config.json, ppo, sampling ──> Work ──┬─ memory of one GPU (plan_memory) ──┬─> rows: DDP, ZeRO 1-3, FSDP2, each full or LoRA
GPUs, nodes, links ──> Machines ──────┴─ seconds of a step (plan_time) ────┴─> advice: the fastest that fits; or what would
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steerl.training.planning.hardware import Machines
from steerl.training.planning.memory import ENGINES, GB, SPREAD, Engine, Memory, PlannedStep, memory
from steerl.training.planning.settings import Shares
from steerl.training.planning.time import Seconds, seconds

LORA = {"peft_type": "LORA", "r": 16}
"""The adapter of the rows that have one, where the job names none."""
_NEAR = 1.05
"""Within this factor of the fastest, the simpler one is taken."""


@dataclass(frozen=True)
class PlanRow:
    """One strategy on the machines."""

    engine: Engine
    work: PlannedStep
    memory: Memory
    seconds: Seconds
    fits: bool

    @property
    def name(self) -> str:
        return f"{self.engine} {'LoRA' if self.work.adapted else 'full'}"


@dataclass(frozen=True)
class Advice:
    """What to do. `row` is None where nothing fits as asked; `others` are changes that would."""

    row: PlanRow | None
    least: PlanRow
    """Of all settings of the job as asked: the one that needs least."""
    engines: dict[str, PlanRow]
    """The best under each other engine that fits."""
    nodes: dict[int, PlanRow]
    """The best on more nodes, where rollouts go round."""
    others: dict[str, PlanRow]


def row_of(work: PlannedStep, engine: Engine, machines: Machines, shares: Shares, usable: float) -> PlanRow:
    """`usable` are the bytes of a GPU that the plan may fill."""
    needs = memory(work, engine, machines.ranks, device=machines.device)
    return PlanRow(engine, work, needs, seconds(work, engine, machines, shares), needs.total <= usable)


def engines_of(work: PlannedStep) -> tuple[Engine, ...]:
    """8-bit moments and weights in few bits lie on each rank whole."""
    return ENGINES if work.ppo.optimizer == "adamw" and work.policy.quantization == "none" else ("ddp",)


def rows(works: list[PlannedStep], machines: Machines, shares: Shares, usable: float) -> list[PlanRow]:
    """Every engine with each of the works, as they are."""
    return [row_of(work, engine, machines, shares, usable) for work in works for engine in engines_of(work)]


def advise(
    work: PlannedStep, adapted: PlannedStep, machines: Machines, shares: Shares, usable: float, most_nodes: int = 64
) -> Advice:
    """The fastest settings of `work` that fit; `adapted` is the same with an adapter."""
    tried = list(_tried(work, machines, shares, usable))
    best, least = _best(tried), _least(tried)
    others_fit = {name: _best([row for row in tried if row.engine == name]) for name in ENGINES if best and name != best.engine}
    more: dict[int, PlanRow] = {}
    nodes = machines.nodes * 2
    while nodes <= most_nodes and nodes * machines.gpus <= work.ppo.rollouts_per_step:
        if row := _best(list(_tried(work, dataclasses.replace(machines, nodes=nodes), shares, usable))):
            more[nodes] = row
        nodes *= 2
    others: dict[str, PlanRow] = {}
    if best is None:
        for name, changed in _changes(work, adapted):
            if row := _best(list(_tried(changed, machines, shares, usable))):
                others[name] = row
    return Advice(best, least, {name: row for name, row in others_fit.items() if row}, more, others)


def _tried(work: PlannedStep, machines: Machines, shares: Shares, usable: float) -> Iterator[PlanRow]:
    """Engines, recomputation, sizes of batches, ways to gather."""
    for engine in engines_of(work):
        for tried in _settings(work, engine, machines.ranks):
            yield row_of(tried, engine, machines, shares, usable)


def _best(tried: list[PlanRow]) -> PlanRow | None:
    """Of those that fit and are near the fastest, the simplest."""
    fitting = [row for row in tried if row.fits]
    quickest = min((row.seconds.total for row in fitting), default=0.0)
    return min((row for row in fitting if row.seconds.total <= _NEAR * quickest), key=_simplicity, default=None)


def _least(tried: list[PlanRow]) -> PlanRow:
    return min(tried, key=lambda row: row.memory.total)


def _simplicity(row: PlanRow) -> tuple[object, ...]:
    ppo = row.work.ppo
    return (
        ENGINES.index(row.engine), ppo.checkpointing, ppo.gather == "layers", -ppo.micro_batch_size,
        -row.work.sampling.batch_size, row.seconds.total,
    )  # fmt: skip


def _settings(work: PlannedStep, engine: Engine, ranks: int) -> Iterator[PlannedStep]:
    """The job's own settings and leaner ones that give the same gradients and the same rollouts."""
    again = [True] if work.ppo.checkpointing else [False, True]
    gathers: list[Any] = ["phase", "layers"] if engine in SPREAD and work.ppo.gather == "phase" else [work.ppo.gather]
    micro, batch = _halved(work.micro_batch(ranks)), _halved(work.decoded_together(ranks))
    for checkpointing, gather, rows, together in itertools.product(again, gathers, micro, batch):
        tokens = rows * (work.prompt + work.response) if work.ppo.micro_batch_tokens else work.ppo.micro_batch_tokens
        ppo = dataclasses.replace(
            work.ppo, checkpointing=checkpointing, gather=gather, micro_batch_size=rows, micro_batch_tokens=tokens
        )
        yield dataclasses.replace(work, ppo=ppo, sampling=dataclasses.replace(work.sampling, batch_size=together))


def _halved(size: int) -> list[int]:
    halves = [size]
    while halves[-1] > 1:
        halves.append(halves[-1] // 2)
    return halves


def _changes(work: PlannedStep, adapted: PlannedStep) -> Iterator[tuple[str, PlannedStep]]:
    """What else might fit, from the smallest change on."""
    shared = {"value": "shared"}
    if not work.ppo.offload_activations:
        yield "ppo.offload_activations true (its time is not in the figures)", _with(work, offload_activations=True)
    if work.ppo.optimizer == "adamw":
        yield "ppo.optimizer adamw8bit", _with(work, optimizer="adamw8bit")
    if work.value is not None:
        yield "ppo.value shared", _with(work, **shared)
    if work.copies_reference and not work.adapted:
        yield "ppo.reference none", _with(work, reference="none")
        if work.value is not None:
            yield "ppo.value shared and ppo.reference none", _with(work, reference="none", **shared)
    if not work.adapted:
        yield "LoRA (model.peft)", adapted
        if adapted.value is not None:
            yield "LoRA (model.peft) and ppo.value shared", _with(adapted, **shared)


def _with(work: PlannedStep, **settings: Any) -> PlannedStep:
    changed = dataclasses.replace(work, ppo=dataclasses.replace(work.ppo, **settings))
    return dataclasses.replace(changed, value=None) if settings.get("value") == "shared" else changed


# -- in words --------------------------------------------------------------------------------------------------------------

_HEADS = {
    "weights": "weight", "gradients": "grads", "optimizer": "optim", "reference": "ref", "value": "value", "cache": "cache",
    "activations": "activ", "logits": "logits", "engine": "engine",
}  # fmt: skip


def table(rows: list[PlanRow]) -> list[str]:
    """GB of one GPU, and seconds of a step."""
    heads = " ".join(f"{head:>6}" for head in _HEADS.values())
    lines = [f"GB of a GPU {heads}  total   most fits  sample score learn  send   step"]
    for row in rows:
        numbers = " ".join(f"{_gb(row.memory.parts[name]):>6}" for name in _HEADS)
        times, fits = row.seconds, "yes" if row.fits else "no"
        said = " ".join(f"{part:>5.1f}" for part in (times.sample, times.score, times.learn, times.communication))
        lines.append(
            f"{row.name:11} {numbers} {_gb(row.memory.total):>6} {row.memory.highest:>6} {fits:>4}   {said} {times.total:>6.1f}"
        )
    return lines


def _gb(size: float) -> str:
    """Three digits or so."""
    return f"{size / GB:.1f}" if size >= 10 * GB else f"{size / GB:.2f}"


def flags(row: PlanRow, machines: Machines) -> list[str]:
    """The command that takes a row's settings, a piece a line."""
    work, ppo = row.work, row.work.ppo
    several = f" --num_machines {machines.nodes} --machine_rank RANK --main_process_ip FIRST --main_process_port 29500"
    launch = (
        f"accelerate launch --config_file configs/accelerate/{row.engine}.yaml --num_processes {machines.ranks} "
        f"--mixed_precision {work.precision}" + (several if machines.nodes > 1 else "")
    )
    settings: dict[str, object] = {
        "ppo.micro_batch_size": ppo.micro_batch_size,
        "ppo.checkpointing": str(ppo.checkpointing).lower(),
        "sampling.batch_size": work.sampling.batch_size,
        "ppo.value": ppo.value,
        "ppo.reference": ppo.reference,
    }
    for name, value in (("offload_activations", ppo.offload_activations), ("packing", ppo.packing)):
        if value:
            settings[f"ppo.{name}"] = "true"
    if ppo.optimizer != "adamw":
        settings["ppo.optimizer"] = ppo.optimizer
    if ppo.micro_batch_tokens:
        settings["ppo.micro_batch_tokens"] = ppo.micro_batch_tokens
    if row.engine in SPREAD:
        settings["ppo.gather"] = ppo.gather
    said = " ".join(f"--{name} {value}" for name, value in settings.items())
    adapter = [f"--model.peft '{_inline(dict(work.policy.peft))}'"] if work.adapted else []
    return [launch, "scripts/train_ppo.py --config YOURS.yaml", said, *adapter]


def _inline(mapping: dict[str, object]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in mapping.items()) + "}"


def words(advice: Advice, machines: Machines, usable: float) -> list[str]:
    """The advice, for people."""
    lines = []
    if advice.row is not None:
        row = advice.row
        left = (usable - row.memory.total) / GB
        lines += [
            f"take {row.name}: {row.memory.total / GB:.1f} GB at most (in {row.memory.highest}), {left:.1f} GB to spare, "
            f"{row.seconds.total:.1f} s a step",
            "(of those that fit and are within 5 % of the fastest, the simplest)",
            *(f"    {line} \\" for line in flags(row, machines)[:-1]),
            f"    {flags(row, machines)[-1]}",
        ]
    else:
        least = advice.least
        lines.append(
            f"nothing fits as asked: the least is {least.name} with {least.memory.total / GB:.1f} GB of {usable / GB:.1f} GB, "
            f"highest in {least.memory.highest}"
        )
        for name, row in advice.others.items():
            lines.append(f"would fit: {name}: {row.name}, {row.memory.total / GB:.1f} GB, {row.seconds.total:.1f} s a step")
    lines += [f"it fits with {_short(row)}" for row in advice.engines.values()]
    lines += [f"on {nodes} nodes, {nodes * machines.gpus} GPUs: {_short(row)}" for nodes, row in advice.nodes.items()]
    if advice.row is None and not advice.others and not advice.nodes:
        lines.append("neither more nodes, LoRA, a shared value nor leaving out the reference is enough: a smaller model is")
    return lines


def _short(row: PlanRow) -> str:
    """In a line, with what may differ from the job as asked."""
    ppo = row.work.ppo
    said = [row.name, f"{row.memory.total / GB:.1f} GB", f"micro_batch_size {ppo.micro_batch_size}"]
    said += ["checkpointing"] * ppo.checkpointing + ["gather layers"] * (row.engine in SPREAD and ppo.gather == "layers")
    return ", ".join([*said, f"sampling.batch_size {row.work.sampling.batch_size}", f"{row.seconds.total:.1f} s a step"])


def as_mapping(row: PlanRow) -> dict[str, object]:
    """A row as JSON values, in bytes and seconds."""
    return {
        "engine": row.engine,
        "adapter": dict(row.work.policy.peft) or None,
        "fits": row.fits,
        "total": row.memory.total,
        "highest": row.memory.highest,
        "parts": row.memory.parts,
        "phases": row.memory.phases,
        "seconds": dataclasses.asdict(row.seconds) | {"step": row.seconds.total},
        "settings": {
            "ppo.micro_batch_size": row.work.ppo.micro_batch_size,
            "ppo.checkpointing": row.work.ppo.checkpointing,
            "ppo.gather": row.work.ppo.gather,
            "ppo.value": row.work.ppo.value,
            "ppo.reference": row.work.ppo.reference,
            "sampling.batch_size": row.work.sampling.batch_size,
        },
    }
