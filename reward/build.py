"""`build_reward`: from the `reward:` list to one reward, all problems of the list told together.

    reward:                                      build_reward                 reward(rollout, texts)
      - {kind: model, path: DIR}                ------------->  WeightedSum  ----------------------->  Scores
      - {kind: regex, pattern: ..., weight: 0.2}                                                       total_B, parts, tokens_BR

An entry has `kind`, the fields of that kind (settings.py) and the fields of `Common`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerl.reward import settings
from steerl.reward.kinds import rules
from steerl.reward.settings import check_shape
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.progress import doing
from steerl.rollout.common.settings_reader import Checked, Path, Reader, brief, choices_of, dotted, fields_of, near_name

if TYPE_CHECKING:
    import torch

    from steerl.reward.weighted_sum import RewardTerm, WeightedSum
    from steerl.rollout.model.policy import Policy

# kind -> its settings, and the file in kinds/ whose `build(settings, where, around)` makes the term when a job asks for it.
KINDS: dict[str, tuple[type[Checked], str]] = {
    "function": (settings.FunctionSettings, "function"),
    "model": (settings.RewardModelSettings, "model"),
    "process": (settings.ProcessSettings, "process"),
    "probe": (settings.ProbeSettings, "activations.probe"),
    "novelty": (settings.NoveltySettings, "activations.novelty"),
    "http": (settings.HttpSettings, "http"),
    "environment": (settings.EnvironmentTermSettings, "environment"),
    "exact": (rules.Exact, "rules"),
    "numeric": (rules.Numeric, "rules"),
    "regex": (rules.Regex, "rules"),
    "json": (rules.Json, "rules"),
    "length": (rules.Length, "rules"),
    "repetition": (rules.Repetition, "rules"),
    "keywords": (rules.Keywords, "rules"),
}
TAKEN = ("mean", "std", "total", "prompt_index", "sample_index", "screened")
"""Names that metrics and score tables use themselves."""


@dataclass(frozen=True, kw_only=True)
class Common(Checked):
    """What every entry may say besides its kind's own fields."""

    kind: str
    name: str | None = None
    """What metrics and score tables call it; the kind unless given."""
    weight: float = 1.0
    """total = sum of weight x term."""
    normalise: str | dict[str, object] | None = None
    """`running`; {mean: m, std: s}; or {reference: FILE} of prompts and completions, measured once. See reward/normalize.py."""
    clip: list[float] | None = None
    """[low, high] for the term's values, after normalisation and before the weight."""

    def problems(self) -> list[str]:
        return [*_name_faults(self.name), *check_shape(self.normalise, self.clip)]


@dataclass(frozen=True)
class Surroundings:
    """What a term may want to know of the job."""

    device: torch.device | None
    vocabulary: str | None
    """Of the policy's tokenizer; None where it is not known."""
    policy: Policy | None = None
    """As it starts; None where rows are scored that are there already."""


@dataclass(frozen=True)
class Entry:
    common: Common
    own: Any
    where: str

    @property
    def code(self) -> Any:
        """The kind's file."""
        return importlib.import_module(f"steerl.reward.kinds.{KINDS[self.common.kind][1]}")


@dataclass(frozen=True)
class Entries:
    """A list that was read and is right as far as one can tell without opening anything."""

    entries: tuple[Entry, ...]

    def build(self, policy: Any, device: torch.device | str | None, tokenizer: Any) -> WeightedSum:
        import torch

        from steerl.reward.kinds.model_inputs import vocabulary_of
        from steerl.reward.normalize import Shape
        from steerl.reward.weighted_sum import WeightedSum

        tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)
        device = device if device is not None else getattr(policy, "device", None)
        vocabulary = vocabulary_of(tokenizer) if tokenizer is not None else None
        around = Surroundings(None if device is None else torch.device(device), vocabulary, policy)
        terms: list[RewardTerm] = []
        problems: list[str] = []
        for entry in self.entries:
            try:
                with doing(f"loading {entry.where} ({entry.common.name})"):
                    term: RewardTerm = entry.code.build(entry.own, entry.where, around)
                term = dataclasses.replace(term, name=str(entry.common.name), weight=term.weight * entry.common.weight)
                if entry.common.normalise is not None or entry.common.clip is not None:
                    shape = Shape.of(entry.common.normalise, entry.common.clip, term.score_now, entry.where)
                    term = dataclasses.replace(term, shape=shape)
                terms.append(term)
            except UserError as problem:
                problems += problem.lines
        if problems:
            for term in terms:
                term.close()
            raise ConfigError(*problems)
        return WeightedSum(tuple(terms), vocabulary)


def build_reward(
    terms: Sequence[object],
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
    return read_terms(terms, field).build(policy, device, tokenizer)


def read_terms(terms: Sequence[object], field: str = "reward") -> Entries:
    """The checked list, before anything of it is opened."""
    if callable(terms) or isinstance(terms, Mapping):
        terms = [terms]
    if not isinstance(terms, Sequence) or isinstance(terms, str):
        raise ConfigError(f"{field}: expected a list of parts, found {type(terms).__name__}; write it as [{{kind: ...}}]")
    if not terms:
        raise ConfigError(f"{field}: empty; name at least one part, such as {{kind: function, function: file.py:name}}")
    problems: list[str] = []
    read = [_read_entry(term, f"{field}[{index}]", problems) for index, term in enumerate(terms)]
    entries = [entry for entry in read if entry is not None]
    names: dict[str, str] = {}
    for place, entry in enumerate(entries):
        name = entry.common.name
        if name in names and callable(terms[int(entry.where[len(field) + 1 : -1])]):  # two partials of one function
            entries[place] = Entry(dataclasses.replace(entry.common, name=None), entry.own, entry.where)
        elif name in names:
            problems.append(f"{entry.where.split(' ')[0]}.name: {name!r} is the name of {names[name]} already; choose another")
        elif name is not None:
            names[name] = entry.where.split(" ")[0]
    if problems:
        raise ConfigError(*problems)
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


class TermReader(Reader):
    """Reads the fields of one entry: those of its kind and those of `Common`."""

    def __init__(self, problems: list[str], kind: str, known: Sequence[str]):
        super().__init__(problems)
        self.kind, self.known = kind, known

    def unknown_key(self, section: type, path: Path, key: str, value: object) -> str:
        near = near_name(key, self.known)
        hint = f"did you mean {near}?" if near else f"a {self.kind} part takes {', '.join(sorted(self.known))}"
        return f"{dotted(path)}.{key}: unknown (value {brief(value)}); {hint}"

    def misfit(self, wanted: object, path: Path, value: object) -> None:
        if choices := choices_of(wanted):
            self.problems.append(f"{dotted(path)}: {_unknown_choice(value, choices)}")
        else:
            super().misfit(wanted, path, value)


def _read_entry(term: object, where: str, problems: list[str]) -> Entry | None:
    if callable(term):
        term = {"kind": "function", "function": term, **_name_of(term)}
    if not isinstance(term, Mapping):
        problems.append(f"{where}: expected a mapping, found {brief(term)}; write it as {{kind: model, path: DIR}}")
        return None
    kind = term.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"{where}.kind: {_unknown_choice(kind, list(KINDS))}")
        return None
    section, shared = KINDS[kind][0], fields_of(Common)
    reader = TermReader(problems, kind, [*fields_of(section), *shared])
    common = reader.read(Common, {key: value for key, value in term.items() if key in shared}, (where,))
    own = reader.read(section, {key: value for key, value in term.items() if key not in shared}, (where,))
    if common is None or own is None:
        return None
    if getattr(own, "screen", False):
        shaped = [name for name in ("weight", "normalise", "clip") if getattr(common, name) != getattr(Common, name)]
        problems += [f"{where}.{name}: without effect with screen: true, which adds nothing; leave it out" for name in shaped]
    return Entry(common, own, where)


def _unknown_choice(value: object, choices: Sequence[str]) -> str:
    near = near_name(value, choices) if isinstance(value, str) else None
    found = "missing" if value is None else f"unknown value {brief(value)}"
    return f"{found}; did you mean {near}?" if near else f"{found}; choose one of {', '.join(choices)}"


def _name_faults(name: str | None) -> list[str]:
    if name is None or (name.strip() and "/" not in name and name not in TAKEN and name.isprintable()):
        return []
    rules = f"not empty, no slash, no control character, none of {', '.join(TAKEN)}"
    return [f"name: {name!r} cannot be a part's name; {rules}"]


def _name_of(function: object) -> dict[str, str]:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return {"name": name} if name.isidentifier() and name not in TAKEN else {}
