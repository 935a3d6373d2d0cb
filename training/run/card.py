"""RUN/model/README.md: what a run's model is, from what lies in the run's folder, as a card that the hub reads.

What a run was given (names, texts, paths) stands in code spans, and of a path on this machine the last part alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import ConfigError, visible
from steerl.rollout.common.run_folder import write_text
from steerl.rollout.common.yaml_files import load_text
from steerl.rollout.prompts.tables import may_be_of_hub

CARD = "README.md"
YOURS = "OWNER/NAME"
_STAGES = {"ppo": "PPO", "sft": "supervised learning", "reward": "preference pairs (a reward model)"}
_CURVES = ("reward/mean", "kl/ref", "rollout/length_mean", "policy/entropy", "loss", "eval_loss")
_SETTINGS = {
    "ppo": ("steps", "rollouts_per_step", "epochs", "minibatches", "learning_rate", "schedule", "loss", "credit", "kl_coef"),
    "sft": ("epochs", "steps", "batch_size", "learning_rate", "schedule"),
    "reward_model": ("epochs", "steps", "batch_size", "learning_rate", "schedule"),
}


def write_card(folder: Path, summary: Mapping[str, object]) -> None:
    """The card of the model in `folder`/model, before there is a summary.json."""
    write_text(folder / "model" / CARD, card(folder, summary, read_config(folder)))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run's config.yaml; nothing where there is none."""
    path = folder / "config.yaml"
    problems: list[str] = []
    found = load_text(path.read_text(encoding="utf-8", errors="replace"), str(path), problems) if path.is_file() else {}
    if problems:
        raise ConfigError(*problems)
    return dict(found) if isinstance(found, Mapping) else {}


def card(
    folder: Path, summary: Mapping[str, object], config: Mapping[str, Any], repo: str = YOURS, base: str | None = None
) -> str:
    """`repo`: where the model will lie; `base`: the hub's name of the base, where the run knows it by a folder."""
    from huggingface_hub import ModelCardData

    model = folder / "model"
    adapter, own = _json(model / "adapter_config.json"), _json(model / "config.json")
    stage = next((name for name in ("ppo", "sft") if name in config), "reward" if "reward_model" in config else "")
    base = base or base_of(adapter, config)
    tags = ["steerl", *([stage] if stage else []), *([str(adapter["peft_type"]).lower()] if adapter else [])]
    tags += ["steering"] if config.get("steering") else []
    data = [path for path in _paths(config.get("prompts") or config.get("data")) if may_be_of_hub(path)]
    task = "text-classification" if stage == "reward" else "text-generation"
    head = ModelCardData(
        base_model=base if base is not None and may_be_of_hub(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=None if own.get("is_encoder_decoder") else task,
        datasets=data or None,
        tags=tags,
    )
    parts = [f"---\n{head.to_yaml()}\n---\n\n# {_title(repo)}\n", _told(base, stage, adapter)]
    parts += [_data(config), _reward(config), _steering(model, config), _numbers(folder, summary, bool(config.get("steering")))]
    parts += [_settings(config), _loading(repo, base, adapter, own, model)]
    return "\n".join(part for part in parts if part)


def addressed(text: str, repo: str, base: str) -> str:
    """A card as it lies there, which its owner may have written on, for `repo` and a base of that name on the hub."""
    text = text.replace(f'"{YOURS}"', json.dumps(repo))
    if base:
        from huggingface_hub import ModelCard

        found: Any = ModelCard(text, ignore_metadata_errors=True)
        before, found.data.base_model = found.data.base_model, base
        text = str(found.content)
        for old in ("THE BASE MODEL", before):
            text = text.replace(f"from_pretrained({json.dumps(old)})", f"from_pretrained({json.dumps(base)})")
    return text


def hub_name(path: str) -> str:
    """OWNER/NAME of a folder in the hub's cache; any other path as it is."""
    within = next((part for part in Path(path).parts if part.startswith("models--")), "")
    return "/".join(within.split("--")[1:]) if within and "snapshots" in Path(path).parts else path


def base_of(adapter: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """What was trained, as the run knows it; of a folder of an earlier run, what its card says."""
    given = (adapter.get("base_model_name_or_path") if adapter else None) or (config.get("model") or {}).get("path")
    if not given:
        return None
    given = hub_name(str(given))
    before = Path(given) / CARD
    if before.is_file():
        from huggingface_hub import ModelCard

        try:
            found = ModelCard.load(before, ignore_metadata_errors=True).data.base_model
        except (OSError, ValueError):
            found = None
        if isinstance(found, str):
            return found
    return str(given)


# -- the parts --------------------------------------------------------------------------------------------------------


def _told(base: str | None, stage: str, adapter: Mapping[str, Any]) -> str:
    what = f"A {code(adapter['peft_type'])} adapter" if adapter else "A model"
    how = f", trained with {_STAGES[stage]}" if stage else ""
    came = "" if base is None else f", from {code(base)}" if may_be_of_hub(base) else f", from a local model, {code(base)}"
    return f"{what}{came}{how} by steerl.\n"


def _data(config: Mapping[str, Any]) -> str:
    paths = _paths(config.get("prompts") or config.get("data"))
    return f"**Data**: {', '.join(code(path) for path in paths)}\n" if paths else ""


def _reward(config: Mapping[str, Any]) -> str:
    terms = config.get("reward")
    if not isinstance(terms, list) or not terms:
        return ""
    lines = ["## Reward\n", "| part | kind | weight | of |", "|---|---|---|---|"]
    for term in terms:
        source = term.get("path") or term.get("function") or ""  # no url: whose server it is is nobody's business
        name, kind = term.get("name") or term.get("kind") or "", term.get("kind") or ""
        lines.append(f"| {code(name)} | {code(kind)} | {term.get('weight', 1)} | {code(source) if source else ''} |")
    return "\n".join(lines) + "\n"


def _steering(model: Path, config: Mapping[str, Any]) -> str:
    given = config.get("steering")
    if not given:
        return ""
    from steerl.rollout.steering import load_spec
    from steerl.rollout.steering.spec.spec import ROLES

    kept = (model / "steering.yaml").is_file()
    if isinstance(given, str) and not Path(given).is_file():
        about = f"{code(given)}"
        left = "kept" if kept else ""
    else:
        spec = load_spec(given)
        sites = ", ".join(code(site.name) for site in spec.sites)
        about, stays = f"role {code(spec.role)}, at {sites}", ROLES[spec.role].stays
        left = "kept" if kept else "folded" if stays and spec.on_deploy == "fold" else "stripped"
    ends = {
        "kept": "It belongs to the model: `steering.yaml` and its vectors lie beside the weights, and steerl applies them.",
        "folded": "It is folded into the biases of these weights.",
        "stripped": "It took part in training alone; these weights are plain.",
        "": "",
    }
    return f"## Steering\n\nActivations were steered while sampling: {about}. {ends[left]}\n"


def _numbers(folder: Path, summary: Mapping[str, object], steered: bool) -> str:
    """Before and after on held-out prompts, and the first and the last step."""
    lines = []
    if isinstance(summary.get("reward_after"), float):
        before, after = summary.get("reward_before"), summary["reward_after"]
        lines = ["| held-out prompts | before | after |", "|---|---|---|", f"| reward | {_number(before)} | {_number(after)} |"]
        lines += [f"| KL to the start, nats a response | {'-' if steered else 0} | {_number(summary.get('kl_after'))} |", ""]
    rows = list(_ends(folder / "metrics.jsonl"))
    if names := [name for name in _CURVES if rows and any(isinstance(row.get(name), int | float) for row in rows)]:
        first, last = ({name: row.get(name) for name in names} for row in rows)
        lines += [f"| training | step {rows[0].get('step')} | step {rows[1].get('step')} |", "|---|---|---|"]
        lines += [f"| `{name}` | {_number(first[name])} | {_number(last[name])} |" for name in names]
    others = {name: value for name, value in summary.items() if name.startswith(("heldout_", "accuracy")) and value is not None}
    lines += ["", *(f"- {name.replace('_', ' ')}: {_number(value)}" for name, value in others.items())] if others else []
    return "## Numbers\n\n" + "\n".join(lines) + "\n" if lines else ""


def _settings(config: Mapping[str, Any]) -> str:
    lines = [
        f"- `{section}.{name}`: {code(config[section][name])}"
        for section, names in _SETTINGS.items()
        for name in names
        if isinstance(config.get(section), Mapping) and name in config[section]
    ]
    return "## Settings\n\n" + "\n".join(lines) + "\n" if lines else ""


def _loading(repo: str, base: str | None, adapter: Mapping[str, Any], own: Mapping[str, Any], model: Path) -> str:
    """The lines that load it."""
    architecture = next(iter(own.get("architectures") or ()), "")
    task = str(adapter.get("task_type") or "") if adapter else ""
    kind = "CausalLM"
    if own.get("is_encoder_decoder") or task == "SEQ_2_SEQ_LM":
        kind = "Seq2SeqLM"
    if architecture.endswith("ForSequenceClassification") or task == "SEQ_CLS":
        kind = "SequenceClassification"
    code_of_its_own = ", trust_remote_code=True" if own.get("auto_map") else ""
    lines = [f"from transformers import AutoModelFor{kind}, AutoTokenizer", ""]
    where = json.dumps(repo, ensure_ascii=True)
    if adapter:
        known = base if base is not None and may_be_of_hub(base) else "THE BASE MODEL"
        lines = ["from peft import PeftModel", *lines]
        lines += [f"base = AutoModelFor{kind}.from_pretrained({json.dumps(known)})"]
        lines += [f"model = PeftModel.from_pretrained(base, {where})"]
    else:
        lines += [f"model = AutoModelFor{kind}.from_pretrained({where}{code_of_its_own})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({where}{code_of_its_own})"]
    text = "## Load it\n\n```python\n" + "\n".join(lines) + "\n```\n"
    if (model / "steering.yaml").is_file():
        text += f"\nWith its steering: `steerl complete --model.path {repo} PROMPT` (a folder, once downloaded).\n"
    return text


# -- small things -----------------------------------------------------------------------------------------------------


def code(value: object) -> str:
    """As a code span of one line, in which Markdown and HTML mean nothing; of a path here its last part."""
    text = str(value)
    path, _, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    if ("/" in path or "\\" in path) and not may_be_of_hub(path) and "://" not in path:
        text = Path(path).name + (f":{name}" if name else "")
    text = visible(" ".join(text.split()))[:200].replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text.strip() else "``"


def _title(repo: str) -> str:
    return visible(repo.split("/")[-1]) if repo != YOURS else "A model trained with steerl"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _paths(section: object) -> list[str]:
    """Of the data: one path or several."""
    path = section.get("path") if isinstance(section, Mapping) else None
    entries: Sequence[object] = path if isinstance(path, list) else [path]
    found = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [str(entry) for entry in found if entry]


def _ends(path: Path) -> Iterator[dict[str, Any]]:
    """The first and the last line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in (lines[0], lines[-1]) if lines else ():
        yield dict(json.loads(line))
