"""`build_reward`: from the `reward:` list to one reward, all problems of the list told together.

    reward:                                      build_reward                 reward(rollout, texts)
      - {kind: model, path: DIR}                ------------->  WeightedSum  ----------------------->  Scores
      - {kind: regex, pattern: ..., weight: 0.2}                                                       total_B, parts, tokens_BR

An entry has `kind`, the fields of that kind (the dataclass beside the code that uses them) and the fields of `Common`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from steerl.reward.fields import near, read_fields, unknown_choice
from steerl.reward.kinds.reading import vocabulary_of
from steerl.reward.normalize import Shape, check_shape
from steerl.reward.weighted_sum import RewardTerm, WeightedSum
from steerl.rollout.common.errors import UserError

# kind -> where its settings are; they are imported when a job asks for the kind. Each has `build(where, around) -> RewardTerm`.
KINDS: dict[str, tuple[str, str]] = {
    "function": ("steerl.reward.kinds.function", "FunctionSettings"),
    "model": ("steerl.reward.kinds.model", "RewardModelSettings"),
    "process": ("steerl.reward.kinds.process", "ProcessSettings"),
    "http": ("steerl.reward.kinds.http", "HttpSettings"),
    "exact": ("steerl.reward.kinds.rules", "Exact"),
    "numeric": ("steerl.reward.kinds.rules", "Numeric"),
    "regex": ("steerl.reward.kinds.rules", "Regex"),
    "json": ("steerl.reward.kinds.rules", "Json"),
    "length": ("steerl.reward.kinds.rules", "Length"),
    "repetition": ("steerl.reward.kinds.rules", "Repetition"),
    "keywords": ("steerl.reward.kinds.rules", "Keywords"),
}
TAKEN = ("mean", "std", "total", "prompt_index", "sample_index")
"""Names that metrics and score tables use themselves."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every entry may say besides its kind's own fields."""

    kind: str
    name: str | None = None
    """What metrics and score tables call it; the kind unless given."""
    weight: float = 1.0
    """total = sum of weight x part."""
    normalise: str | dict[str, Any] | None = None
    """`running`; {mean: m, std: s}; or {reference: FILE} of prompts and completions, measured once. See reward/normalize.py."""
    clip: list[float] | None = None
    """[low, high] for the part's values, after normalisation and before the weight."""


@dataclass(frozen=True)
class Surroundings:
    """What a part may want to know of the job."""

    device: torch.device | None
    vocabulary: str | None
    """Of the policy's tokenizer; None where it is not known."""


@dataclass(frozen=True)
class Entry:
    common: Common
    own: Any
    where: str


@dataclass(frozen=True)
class Entries:
    """A list that was read and is right as far as one can tell without opening anything."""

    entries: tuple[Entry, ...]

    def build(self, policy: Any, device: torch.device | str | None, tokenizer: Any) -> WeightedSum:
        tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)
        device = device if device is not None else getattr(policy, "device", None)
        vocabulary = vocabulary_of(tokenizer) if tokenizer is not None else None
        around = Surroundings(None if device is None else torch.device(device), vocabulary)
        parts: list[RewardTerm] = []
        problems: list[str] = []
        for entry in self.entries:
            try:
                part: RewardTerm = entry.own.build(entry.where, around)
                part = dataclasses.replace(part, name=str(entry.common.name), weight=entry.common.weight)
                if entry.common.normalise is not None or entry.common.clip is not None:
                    shape = Shape.of(entry.common.normalise, entry.common.clip, part.score_now, entry.where)
                    part = dataclasses.replace(part, shape=shape)
                parts.append(part)
            except UserError as problem:
                problems += problem.lines
        if problems:
            for part in parts:
                part.close()
            raise UserError(*problems)
        return WeightedSum(tuple(parts), vocabulary)


def build_reward(
    parts: Sequence[Any],
    policy: Any = None,
    device: torch.device | str | None = None,
    *,
    tokenizer: Any = None,
    field: str = "reward",
) -> WeightedSum:
    """The reward that the `reward:` list asks for; all that is wrong with the list is told together, a line each.

    An entry is a mapping, or a Python function or reward as it stands. `policy` (or its `tokenizer` alone) says whose ids
    the rollouts hold: reward models of the same vocabulary read them as sampled.
    """
    return read_terms(parts, field).build(policy, device, tokenizer)


def read_terms(parts: Sequence[Any], field: str = "reward") -> Entries:
    """The checked list, before anything of it is opened."""
    if callable(parts) or isinstance(parts, Mapping):
        parts = [parts]
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise UserError(f"{field}: expected a list of parts, found {type(parts).__name__}; write it as [{{kind: ...}}]")
    if not parts:
        raise UserError(f"{field}: empty; name at least one part, such as {{kind: function, function: file.py:name}}")
    problems: list[str] = []
    read = [_read_entry(part, f"{field}[{index}]", problems) for index, part in enumerate(parts)]
    entries = [entry for entry in read if entry is not None]
    names: dict[str, str] = {}
    for entry in entries:
        name = entry.common.name
        if name in names:
            problems.append(f"{entry.where.split(' ')[0]}.name: {name!r} is the name of {names[name]} already; choose another")
        elif name is not None:
            names[name] = entry.where.split(" ")[0]
    if problems:
        raise UserError(*problems)
    return Entries(tuple(_named(entries, set(names))))


def _named(entries: Sequence[Entry], taken: set[str]) -> list[Entry]:
    """Entries without a name get their kind's, numbered from the second on."""
    named = []
    for entry in entries:
        name, number = entry.common.name, 1
        while name is None:
            guess = entry.common.kind if number == 1 else f"{entry.common.kind}_{number}"
            name, number = (None if guess in taken else guess), number + 1
        taken.add(name)
        where = f"{entry.where} ({name})"
        named.append(Entry(dataclasses.replace(entry.common, name=name), entry.own, where))
    return named


def _read_entry(part: Any, where: str, problems: list[str]) -> Entry | None:
    if callable(part):
        part = {"kind": "function", "function": part, **_name_of(part)}
    if not isinstance(part, Mapping):
        problems.append(f"{where}: expected a mapping, found {part!r:.60}; write it as {{kind: model, path: DIR}}")
        return None
    kind = part.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"{where}.kind: {unknown_choice(kind, KINDS)}")
        return None
    module, name = KINDS[kind]
    settings = getattr(importlib.import_module(module), name)
    before = len(problems)
    own = {spot.name for spot in dataclasses.fields(settings)}
    shared = {spot.name for spot in dataclasses.fields(Common)}
    for key, value in part.items():
        if key not in own | shared:
            hint = near(str(key), [*own, *shared])
            problems.append(
                f"{where}.{key}: unknown (value {value!r:.60}); "
                + (f"did you mean {hint}?" if hint else f"a {kind} part takes {', '.join(sorted(own | shared))}")
            )
    common = read_fields(Common, {k: v for k, v in part.items() if k in shared}, where, problems)
    values = read_fields(settings, {k: v for k, v in part.items() if k in own}, where, problems)
    if common is not None:
        _check_common(common, where, problems)
    return Entry(common, values, where) if len(problems) == before else None


def _check_common(common: Common, where: str, problems: list[str]) -> None:
    name = common.name
    if name is not None and (not name.strip() or "/" in name or name in TAKEN or not name.isprintable()):
        rules = f"not empty, no slash, no control character, none of {', '.join(TAKEN)}"
        problems.append(f"{where}.name: {name!r} cannot be a part's name; {rules}")
    problems += [f"{where}.{line}" for line in check_shape(common.normalise, common.clip)]


def _name_of(function: Any) -> dict[str, str]:
    name = getattr(function, "__name__", type(function).__name__)
    return {"name": name} if name.isidentifier() and name not in TAKEN else {}
