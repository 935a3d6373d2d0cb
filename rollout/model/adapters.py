"""PEFT adapters from YAML mappings: add (named), load, switch, turn off, merge, save.

    {peft_type: LORA, r: 8} ── adapter_config ── add ──┐
    an adapter's folder ─────────────────────── load ──┴─ PeftModel ── switch · off ── save ── an adapter's folder
                                                              └─ merge ── a plain model

Weight adapters (LoRA and its kin) change what the layers compute. Virtual tokens (prompt, prefix and p-tuning) change
what the model reads; peft puts them before left padding, where rows of different length get wrong positions, so here
they are placed by `rollout.virtual_tokens` and padded rows equal lone ones. Both are saved in peft's own format.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from steerl.rollout.common.errors import CheckpointError, one_line, reading
from steerl.rollout.model import unread, virtual_tokens
from steerl.rollout.model.auto_classes import head_of
from steerl.rollout.model.settings import VIRTUAL_KINDS, WEIGHT_KINDS, adapter_config, read_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}


def add(
    model: PreTrainedModel | PeftModel, mapping: Mapping[str, object], name: str = "", field: str = "model.peft"
) -> PeftModel:
    """A new, trainable, active adapter on `model`. Its name: `name`, or the mapping's `name`, or `default`.

    The base is frozen and wrapped in place; a model that has adapters already gets another one beside them.
    """
    name = name or str(mapping.get("name", "default"))
    config = adapter_config(mapping, _task(model), field)
    adapted = _wrap(model, config, name, field)
    switch(adapted, name, trainable=True)
    return adapted.eval()


def load(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    field: str = "model.adapter",
) -> PeftModel:
    """The adapter of `folder` on `model`, active. The folder must have been made on a base of this shape."""
    import peft
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    read_adapter(folder, field)
    with reading(f"{field}: {folder} cannot be read as an adapter: "):
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    kind = config.peft_type.value
    if kind not in (*WEIGHT_KINDS, *VIRTUAL_KINDS):
        raise CheckpointError(
            f"{field}: {folder} holds a {kind} adapter; these can be used: {', '.join((*WEIGHT_KINDS, *VIRTUAL_KINDS))}"
        )
    config.inference_mode = not trainable
    if config.is_prompt_learning:
        # Saved is what the encoder of virtual tokens puts out, so that is what is loaded and, if asked, trained further.
        config.inference_mode = True
        # Measured on this base again: with the saved sizes an adapter of another width would load, and fail in the first pass.
        config.token_dim = config.num_layers = config.num_attention_heads = None
    adapted = _wrap(model, config, name, field)
    with reading(f"{field}: {folder} does not fit this base: "):
        result = set_peft_model_state_dict(adapted, weights, adapter_name=name)
    # Of virtual tokens peft saves what their encoder puts out, under a name that is no parameter's.
    missing = [key for key in result.missing_keys if f".{name}" in key and "prompt_encoder" not in key]
    unexpected = [key for key in result.unexpected_keys if key != "prompt_embeddings"]
    if missing or unexpected:
        what = f"it has no weights for {missing[0]}" if missing else f"the base has no place for {unexpected[0]}"
        raise CheckpointError(f"{field}: {folder} does not fit this base: {what}; load it on the base it was trained on")
    switch(adapted, name, trainable=trainable)
    generation = getattr(adapted.get_base_model(), "generation_config", None)
    if generation is not None and (Path(folder) / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(str(folder)).eos_token_id
        generation.eos_token_id = generation.eos_token_id if ends is None else ends
    return adapted.eval()


def switch(model: PeftModel, name: str, *, trainable: bool = False) -> None:
    """Make the adapter `name` the active one. Only with `trainable` does it take gradients."""
    if name not in model.peft_config:
        raise CheckpointError(f"adapter {name!r}: unknown; the model has: {', '.join(model.peft_config)}")
    model.set_adapter(name, inference_mode=not trainable)
    if model.peft_config[name].is_prompt_learning:
        for other, encoder in model.prompt_encoder.items():
            encoder.requires_grad_(trainable and other == name)


@contextlib.contextmanager
def off(model: PeftModel) -> Iterator[None]:
    """The base as it was, for the time of the block: the reference that needs no second copy."""
    # peft switches gradients on for every active adapter when it comes back, frozen ones too.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with model.disable_adapter():
        yield
    for parameter in frozen:
        parameter.requires_grad_(False)


def changes_nothing(model: PeftModel) -> bool:
    """Whether the active adapter leaves the base as it is, by the weights: every adapted layer, merged by itself, is its base
    bit for bit, and so is every module that is kept whole. What cannot be merged counts as a change."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if model.active_peft_config.is_prompt_learning:
        return False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copies = [module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save]
            same = all(_equal(module.original_module, each) for each in copies)
        elif isinstance(module, BaseTunerLayer):
            merged = copy.deepcopy(module)
            unread.read_in(merged)
            try:
                merged.merge()
            except (NotImplementedError, ValueError, RuntimeError):
                return False
            same = not module.merged and _equal(module.get_base_layer(), merged.get_base_layer())
        else:
            continue
        if not same:
            return False
    return True


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def learns_in_base(model: PeftModel) -> str:
    """A weight of the base that learns beside the adapter (bias: all), which `off` does not put back; "" where none does."""
    own = set(model.peft_config)
    return next((name for name, p in model.named_parameters() if p.requires_grad and not own & set(name.split("."))), "")


def merge(model: PeftModel) -> PreTrainedModel:
    """A plain model that computes what the active adapter does. The PeftModel is used up."""
    check_merge(model)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=[model.active_adapter])
    return merged.requires_grad_(True)


def check_merge(model: PeftModel) -> None:
    kind = model.peft_config[model.active_adapter].peft_type.value
    if kind in VIRTUAL_KINDS:
        raise CheckpointError(f"a {kind} adapter cannot be merged: it adds virtual tokens, not weights; keep it as an adapter")


def adapted_layers(core: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers in which adapters sit, by name, none inside another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, torch.nn.Module] = {}
    for name, module in core.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) and not inside:
            found[name] = module
    return found


def not_plain_lora(model: PeftModel, most: int) -> str:
    """Why the active adapter is more than two small matrices beside linear layers, `most` wide; "" where it is just that."""
    config: Any = model.active_peft_config
    if config.peft_type.value != "LORA":
        return f"it is {config.peft_type.value}, not LoRA"
    odd = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "layer_replication": config.layer_replication,
        "use_qalora": config.use_qalora,
    }
    if field := next((name for name, there in odd.items() if there), ""):
        return f"its {field} is {getattr(config, field)!r}"
    if other := learns_in_base(model):
        return f"{other} of the base learns too"
    for name, layer in adapted_layers(model.get_base_model()).items():
        base = layer.get_base_layer()  # type: ignore[operator]
        if not isinstance(base, torch.nn.Linear) or layer is model.get_base_model().get_output_embeddings():
            return f"it sits in {name}, which is no linear layer of a block"
    rank = largest_rank(model)
    return f"its rank is {rank}, above {most}" if rank > most else ""


def largest_rank(model: PeftModel) -> int:
    """Of the active LoRA's layers."""
    config: Any = model.active_peft_config
    return max([config.r, *(config.rank_pattern or {}).values()])


def is_own(model: PeftModel, name: str) -> bool:
    """Whether a weight is the active adapter's, by its name in the PeftModel's state dict."""
    return f".{model.active_adapter}." in name


def merged_layer(layer: torch.nn.Module, values: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the plain layer that computes what an adapted one does, which stays as it is. `values` stand in for
    parameters, by their id: whole ones for those that are sharded."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
        return {name: values[id(parameter)] for name, parameter in layer.state_dict(keep_vars=True).items()}
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(values[id(p)], requires_grad=False) for p in layer.parameters()}
    for module in layer.modules():  # engines hang hooks on layers that hold all of their own
        memo |= {id(value): type(value)() for name, value in vars(module).items() if name.endswith("_hooks")}
    copied: Any = copy.deepcopy(layer, memo)
    try:
        copied.merge(safe_merge=True)  # which leaves the tensors that it is given as they are
    except ValueError as error:
        raise CheckpointError(f"model.peft: the adapter cannot be merged into the base: {one_line(error)}") from error
    state: dict[str, torch.Tensor] = copied.get_base_layer().state_dict()
    return state


def save(model: PeftModel, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """The active adapter in peft's format, files directly in `folder`. `state` stands in for a sharded model's own."""
    name = model.active_adapter
    model.save_pretrained(str(folder), selected_adapters=[name], **({"state_dict": dict(state)} if state else {}))
    nested = Path(folder) / name
    if name != "default":
        for entry in nested.iterdir():
            shutil.move(str(entry), str(Path(folder) / entry.name))
        nested.rmdir()
    (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's empty card, which names folders of this machine
    # What ends a response: a stage may have taught another token than the base's.
    if (generation := getattr(model.get_base_model(), "generation_config", None)) is not None:
        GenerationConfig(eos_token_id=generation.eos_token_id).save_pretrained(str(folder))


def _wrap(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str, field: str) -> PeftModel:
    """`model` with an adapter of `config` beside those it has, its weights not loaded yet."""
    import peft

    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or ""
    if not name or "." in name or name in prefix:
        raise CheckpointError(f"{field}.name: {name!r} cannot be an adapter's name: no dots, not a part of {prefix!r}")
    adapted = isinstance(model, peft.PeftModel)
    if adapted and name in model.peft_config:
        raise CheckpointError(f"{field}.name: the model has an adapter {name!r} already; choose another name")
    base = model.get_base_model() if adapted else model
    if config.is_prompt_learning and config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), "classifier", "score"]
    path = getattr(base, "name_or_path", "") or None
    config.base_model_name_or_path = path = str(Path(path).resolve()) if path and Path(path).is_dir() else path
    try:
        with warnings.catch_warnings():
            # GPT-2 keeps its weights transposed: peft sees it, sets the flag that says so, and warns that it did.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            if adapted:
                model.add_adapter(name, config)
                return model
            if config.is_prompt_learning:
                return virtual_tokens.install(peft.PeftModel(model, config, adapter_name=name), field)
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
            wrapped.peft_config[name].base_model_name_or_path = path  # peft has put the path back as it was given
            return wrapped
    except (ValueError, TypeError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        if "arget modules" in str(error) or "target_modules" in str(error):
            linear = {key.rpartition(".")[2] for key, module in base.named_modules() if _is_projection(module)}
            wanted = getattr(config, "target_modules", None)
            raise CheckpointError(
                f"{field}.target_modules: {sorted(wanted) if isinstance(wanted, set) else wanted!r} matches nothing in "
                f"{type(base).__name__}; its projections are: {', '.join(sorted(linear))}"
            ) from error
        raise CheckpointError(
            f"{field}: {config.peft_type.value} does not fit {type(base).__name__}: {one_line(error)}"
        ) from error


def _task(model: PreTrainedModel | PeftModel) -> str | None:
    config = model.config
    architecture = type(getattr(model, "get_base_model", lambda: model)()).__name__
    head = head_of(type(config)(architectures=[architecture]))
    return _TASKS.get(head or "")


def _is_projection(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)
