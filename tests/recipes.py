"""The recipes of configs/recipes, planned: their models as folders with a config alone, and the line that each recipe says of it.

python -m tests.recipes        writes the plan's memory into the recipes and the table of docs/recipes.md
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from steerl.configs.reader import read

import yaml

from steerl.scripts.plan import PlanJob, machines_of, work_of
from steerl.training.planning.memory import Memory, PlannedStep, memory
from tests.models import tiny_tokenizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
# What their makers publish, as far as it makes a size.
_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "rope_theta": 1000000.0}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": {
        **_QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **_LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **_LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "dtype": "bfloat16", "vocab_size": 32768,
        "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
    },
    "google/gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16", "hidden_size": 1152,
        "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
}  # fmt: skip
WEIGHTS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "google/gemma-3-1b-it": 999_885_952,
}
"""Numbers in their checkpoints."""


def folder_of(model: str, under: Path) -> Path:
    """A folder with the model's config and some tokenizer."""
    folder = under / model.replace("/", "--")
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(MODELS[model]))
        tiny_tokenizer().save_pretrained(folder)
    return folder


def model_of(recipe: Path) -> str:
    return str(yaml.safe_load(recipe.read_text())["model"]["path"])


class Launch(NamedTuple):
    """What the comment at a recipe's top says."""

    accelerate: list[str]
    plan: list[str]
    planned: str

    @staticmethod
    def of(recipe: Path) -> Launch:
        comment = "\n".join(line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")).replace("\\\n", " ")
        commands = [line.strip() for line in comment.splitlines()]
        launch = next(line[line.index("accelerate launch") :] for line in commands if "accelerate launch" in line)
        plan = next(line for line in commands if line.startswith("steerl plan "))
        planned = next(line for line in commands if line.startswith("planned:"))
        return Launch(shlex.split(launch)[2:], shlex.split(plan)[2:], planned.removeprefix("planned:").strip())

    def flag(self, name: str, default: str = "1") -> str:
        return self.accelerate[self.accelerate.index(name) + 1] if name in self.accelerate else default


class Planned(NamedTuple):
    """A recipe as it is, under the engine and on the machines that its comment names."""

    engine: str
    work: PlannedStep
    memory: Memory
    fits: bool

    @property
    def said(self) -> str:
        learns = "LoRA" if self.work.adapted else "full"
        return f"{self.engine} {learns}, {self.memory.total / 1e9:.1f} GB of a GPU at most, in {self.memory.highest}"


def planned(recipe: Path, under: Path) -> Planned:
    launch = Launch.of(recipe)
    job = read(PlanJob, [*launch.plan, "--model.path", str(folder_of(model_of(recipe), under))])
    machines = machines_of(job)
    engine: Any = Path(launch.flag("--config_file")).stem
    work = work_of(job, job.model.peft)
    needs = memory(work, engine, machines.ranks)
    return Planned(engine, work, needs, needs.total <= machines.memory * (1 - job.headroom))


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as under:
        for recipe in RECIPES:
            row, text = planned(recipe, Path(under)), recipe.read_text()
            recipe.write_text(re.sub(r"^# planned:.*$", f"# planned: {row.said}", text, flags=re.MULTILINE))
            lines.append(table_line(recipe, row))
    page = ROOT / "docs" / "recipes.md"
    text = page.read_text()
    first, last = text.index("| `"), text.rindex("|\n") + 2
    page.write_text(text[:first] + "\n".join(lines) + "\n" + text[last:])


def table_line(recipe: Path, row: Planned) -> str:
    launch = Launch.of(recipe)
    flags = dict(zip(launch.plan[::2], launch.plan[1::2], strict=True))
    nodes = f"{flags['--nodes']} x " if "--nodes" in flags else ""
    where = f"{nodes}{flags['--gpus']} {flags['--gpu']}"
    given = yaml.safe_load(recipe.read_text())
    few_bits = "Q" if "quantization" in given["model"] else ""
    learns, credit = (f"{few_bits}LoRA" if row.work.adapted else "full"), row.work.ppo.credit
    critic = f"critic, {row.work.ppo.value}" if credit == "gae" else credit
    draws = "vLLM" if given.get("engine", {}).get("kind") == "vllm" else "in process"
    return f"| `{recipe.stem}` | {learns} | {critic} | {draws} | {where} | {row.engine} | {row.memory.total / 1e9:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
