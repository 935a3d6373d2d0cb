"""A steering vector from pairs of texts.

    steerl extract --config steerl:steering --model.path DIR --extract.pairs pairs.jsonl --extract.out cheer.safetensors

Leaves the vector file (safetensors, or a GGUF control vector by its ending), with its metadata, and prints how well it
separates held-out pairs. Of method probe a safetensors file is a monitor, too: it holds a bias and a threshold, rewards read it
(`kind: probe`), and its AUC, accuracy and rates on held-out texts are told. With prompts it also measures the effect: how much
the measure moves per unit of strength and the KL per response that it costs, as a table and as OUT.effect.json.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.spec.spec import Op, Site, Where

if TYPE_CHECKING:
    from torch import Tensor

    from steerl.rollout.model.policy import Policy
    from steerl.rollout.steering.core.structure import Point
    from steerl.rollout.steering.vectors.probes import Probe


@dataclass(frozen=True)
class ExtractSettings:
    """What the vector is made from, where and how."""

    pairs: str = ""
    """JSON lines with positive and negative, and optionally prompt."""
    out: str = ""
    """The file to write: .safetensors or .gguf."""
    layers: list[int] = field(default_factory=list)
    """Block numbers, negative from the end; empty = every block."""
    component: Literal["block_output", "block_input", "attn_output", "mlp_output"] = "block_output"
    stack: Literal["decoder", "encoder"] = "decoder"
    method: Literal["mean_diff", "pca", "probe"] = "mean_diff"
    position: Literal["last", "mean"] = "mean"
    """At each text's last token, or the mean over its tokens."""
    normalise: bool = False
    """Scale every layer's vector to length 1."""
    held_out: float = 0.2
    """Share of the pairs that is kept for the report."""
    false_positives: float = 0.05
    """Of method probe: the share of negative texts (held-out ones, where there are any) above the threshold that it chooses."""


@dataclass(frozen=True)
class EffectSettings:
    """The effect curve; it needs prompts.path."""

    layers: list[int] = field(default_factory=list)
    """Where the vector is added for the curve; empty = the layer that separates the held-out pairs best."""
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    samples: int = 64
    """Prompts that are sampled at each strength."""
    kl_target: float = 1.0
    """Nats per response: the strength that costs this much is printed."""


@dataclass(frozen=True)
class ExtractJob:
    """Make a steering vector, say how well it separates, and measure what it does."""

    model: ModelSettings = field(default_factory=ModelSettings)
    extract: ExtractSettings = field(default_factory=ExtractSettings)
    effect: EffectSettings = field(default_factory=EffectSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=32))
    reward: list[dict[str, object]] = field(default_factory=list)
    """The measure of the effect curve, as in a training run."""


def main(job: ExtractJob) -> None:
    from steerl.rollout.model.policy import load_policy
    from steerl.rollout.steering.core.structure import locate, unwrap
    from steerl.rollout.steering.vectors.extract import along_means, contrast, direction, read_pairs, separation
    from steerl.rollout.steering.vectors.files import save_vector
    from steerl.rollout.steering.vectors.probes import fit, notes_of

    me = processes.start()
    if not me.is_main:
        return
    check(job)
    policy = load_policy(job.model, me.device)
    pairs = read_pairs(Path(job.extract.pairs), "extract.pairs")
    kept = round(len(pairs) * job.extract.held_out)
    if len(pairs) - kept < 1:
        raise UserError(
            f"extract.held_out: {job.extract.held_out:g} leaves none of {len(pairs)} pairs to make the vector from; set less"
        )
    used, held = pairs[: len(pairs) - kept], pairs[len(pairs) - kept :]
    model = unwrap(policy.model)
    at = At(layers=tuple(job.extract.layers) or "all", component=job.extract.component, stack=job.extract.stack)
    try:
        points = locate(model, at)
    except UserError as problem:
        raise UserError(*(line.replace("at.", "extract.", 1) for line in problem.lines)) from problem
    positive, negative = contrast(model, policy.tokenizer, used, points, job.extract.position)
    each = [(positive[:, i], negative[:, i]) for i in range(len(points))]
    fits = [fit(*texts) for texts in each] if job.extract.method == "probe" else []
    if fits:
        vectors = [along_means(weight_D, *texts) for (weight_D, _), texts in zip(fits, each, strict=True)]
    else:
        vectors = [direction(*texts, job.extract.method) for texts in each]
    for point, vector in zip(points, vectors, strict=True):
        if not bool(vector.any()):
            raise UserError(
                f"extract.pairs: positive and negative texts give the same activations at layer {point.layer}; use other pairs"
            )
    if job.extract.normalise:
        vectors = [vector / vector.norm() for vector in vectors]
    apart = contrast(model, policy.tokenizer, held, points, job.extract.position) if held else None
    shares = [] if apart is None else [separation(v, apart[0][:, i], apart[1][:, i]) for i, v in enumerate(vectors)]
    layers = [point.layer for point in points]
    out = Path(job.extract.out)
    notes = {**asdict(job.extract), "made_from_pairs": len(used), "held_out_separation": shares, "versions": versions()}
    if probes := made_probes(job.extract, points, vectors, fits, (positive, negative), apart):
        notes["probe"] = notes_of(probes)
    save_vector(out, {int(layer or 0): vector for layer, vector in zip(layers, vectors, strict=True)}, notes, model)
    print(f"{out}: {job.extract.method} of {len(used)} pairs at {job.extract.component}")
    print(f"{'layer':>6}{'norm':>10}" + (f"{'held-out separation':>22}" if held else ""))
    for number, (layer, vector) in enumerate(zip(layers, vectors, strict=True)):
        print(f"{layer:>6}{float(vector.norm()):>10.3f}" + (f"{shares[number]:>22.3f}" if shares else ""))
    for line in probe_table(probes):
        print(line)
    best = layers[max(range(len(layers)), key=lambda i: shares[i])] if shares else layers[len(layers) // 2]
    spec = {"sites": [{"at": {"layers": [int(best or 0)]}, "vector": {"file": str(out)}, "strength": 1.0}]}
    if job.extract.component == "block_output" and not job.extract.stack and not probes:
        shown = shlex.join(["--model.path", job.model.path, "--steering", json.dumps(spec)])
        print(f"next: steerl complete {shown} PROMPT")
    if job.prompts.path:
        best = layers[max(range(len(layers)), key=lambda i: shares[i])] if shares else layers[len(layers) // 2]
        chosen = tuple(job.effect.layers) or (int(best or 0),)
        measure_effect(job, policy, out, chosen)


def check(job: ExtractJob) -> None:
    problems = []
    if not job.extract.pairs:
        problems.append("extract.pairs: missing; name a file of JSON lines with positive and negative")
    if not job.extract.out:
        problems.append("extract.out: missing; name the file to write, .safetensors or .gguf")
    elif Path(job.extract.out).suffix not in (".safetensors", ".gguf"):
        problems.append(f"extract.out: expected a name ending in .safetensors or .gguf, found {job.extract.out!r}")
    if not 0 <= job.extract.held_out < 1:
        problems.append(f"extract.held_out: expected 0 to under 1, found {job.extract.held_out:g}")
    if not 0 <= job.extract.false_positives < 1:
        problems.append(f"extract.false_positives: expected 0 to under 1, found {job.extract.false_positives:g}")
    elif job.extract.method != "probe" and job.extract.false_positives != ExtractSettings.false_positives:
        problems.append(f"extract.false_positives: without effect with extract.method {job.extract.method}; leave it out")
    if job.prompts.path and not job.reward:
        problems.append("reward: missing; the effect curve measures it (remove prompts.path to make the vector alone)")
    if job.reward and not job.prompts.path:
        problems.append("prompts.path: missing; the effect curve samples from prompts (remove reward to make the vector alone)")
    if problems:
        raise UserError(*problems)


def made_probes(
    settings: ExtractSettings,
    points: Sequence[Point],
    vectors: Sequence[Tensor],
    fits: Sequence[tuple[Tensor, float]],
    used: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor] | None,
) -> list[Probe]:
    """Each vector that has a regression as a probe, with its threshold: of the held-out pairs where there are any."""
    from steerl.rollout.steering.vectors.probes import Probe, judge, reading_of

    probes = []
    positive, negative = used if held is None else held
    for i, fitted in enumerate(fits):
        at = At(layers=(int(points[i].layer or 0),), component=settings.component, stack=settings.stack)
        probe = Probe(vectors[i], reading_of(vectors[i], *fitted), at, settings.position)
        probes.append(judge(probe, positive[:, i], negative[:, i], settings.false_positives, held is not None))
    return probes


def probe_table(probes: Sequence[Probe]) -> list[str]:
    """How each layer's probe does on held-out texts."""
    if not probes:
        return []
    names = ("auc", "accuracy", "threshold", "false_positives", "true_positives")
    lines = [f"{'layer':>6}" + "".join(f"{name:>17}" for name in names)]
    for probe in probes:
        told = [getattr(probe.reading, name) for name in names]
        lines.append(f"{probe.at.layers[0]:>6}" + "".join(f"{'-' if n is None else f'{n:.3f}':>17}" for n in told))
    return lines


def measure_effect(job: ExtractJob, policy: Policy, out: Path, layers: tuple[int, ...]) -> None:
    """The table, OUT.effect.json, and the strength that costs the KL asked for."""
    from steerl.reward.build import build_reward
    from steerl.rollout.analysis.steering_effect import effect_curve, strength_for, table

    prompts = load_prompts(job.prompts, policy, job.sampling.max_new_tokens)
    batch = prompts.batch(prompts.first(job.effect.samples))
    reward = build_reward(job.reward, policy, policy.device)
    site = Site(
        name=out.stem,
        at=At(layers=layers, component=job.extract.component, stack=job.extract.stack),
        op=Op(),
        vector={"file": str(out.resolve())},
        where=Where(prompt="all", steps="none") if job.extract.stack == "encoder" else Where(),
    )
    curve = effect_curve(
        policy, site, batch, job.sampling, job.effect.strengths, lambda rollout, texts: reward(rollout, texts).total_B
    )
    print(f"\nadded at layers {list(layers)}, {len(batch)} prompts, {job.sampling.n} samples each")
    print(table(curve, "reward"))
    strength = strength_for(curve, job.effect.kl_target)
    if strength is None:
        print(f"no measured strength costs {job.effect.kl_target:g} nats per response; widen effect.strengths")
    else:
        print(f"strength for {job.effect.kl_target:g} nats per response: {strength:.3f}")
    write_json(
        out.with_name(out.name + ".effect.json"),
        {
            "layers": list(layers),
            "curve": [asdict(point) for point in curve],
            "kl_target": job.effect.kl_target,
            "strength_for_target": strength,
        },
    )


def cli() -> None:
    run_command(main, ExtractJob)


if __name__ == "__main__":
    cli()
