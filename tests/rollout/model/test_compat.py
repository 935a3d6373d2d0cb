"""Each private name of a library is there and does what compat says; and no other file of ours touches one."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from steerl.rollout.model import compat
from tests.models import tiny

ROOT = Path(__file__).resolve().parents[3]


# -- torch -----------------------------------------------------------------------------------------------------------


def test_forward_hooks_are_those_that_run() -> None:
    module, calls = nn.Linear(2, 2), []
    after = module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    for hook in compat.forward_hooks(module):
        hook(module, (), None)
    assert sorted(calls) == ["after", "before"]
    after.remove()
    assert len(compat.forward_hooks(module)) == 1 and compat.forward_hooks(nn.Linear(2, 2)) == []


def test_modules_are_those_of_torch() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Dropout()), "b": shared})
    model.register_module("none", None)
    assert set(compat.modules(model)) == set(model.modules()) and len(set(model.modules())) == 4


def test_a_compiled_module_is_seen_and_opened() -> None:
    module = nn.Linear(2, 2)
    wrapped = torch.compile(module, backend="eager")
    assert compat.is_wrapped(wrapped) and not compat.is_wrapped(module)
    assert compat.uncompiled(wrapped) is module and compat.uncompiled(module) is module


def test_fsdps_first_form_keeps_its_module_under_the_known_name() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = inner = nn.Linear(2, 2)
    assert wrapper.module is inner and compat.is_wrapped(wrapper)


def test_without_torch_function_a_subclass_is_a_plain_tensor() -> None:
    calls: list[str] = []

    class Noting(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    value = torch.ones(2).as_subclass(Noting)
    with compat.without_torch_function():
        assert type(value + 1) is Tensor and calls == []
    assert type(value + 1) is Noting and calls == ["add"]


def test_static_tensors_are_marked_for_the_compiler() -> None:
    tensor = torch.zeros(2)
    before = set(vars(tensor))
    assert compat.mark_static(tensor) is tensor
    assert [name for name in set(vars(tensor)) - before if "static" in name]


def test_what_cannot_be_compiled_raises_one_of_the_known_errors() -> None:
    def function(x: Tensor) -> Tensor:
        print(end="")
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(compat.compile_errors()):
        torch.compile(function, fullgraph=True, backend="eager")(torch.ones(1))

    @torch.compile(backend="eager", fullgraph=True, dynamic=False)
    def shaped(x: Tensor) -> Tensor:
        return x + 1

    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(compat.compile_errors()):
        for size in range(2, 5):
            shaped(torch.ones(size))


def test_a_storage_key_is_one_for_all_views_and_fake_tensors_have_one() -> None:
    tensor = torch.zeros(4, 2)
    other = torch.zeros(4, 2)
    assert compat.storage_key(tensor) == compat.storage_key(tensor[1:].T) != compat.storage_key(other)
    assert compat.viewed(tensor[1:].T) is tensor and compat.viewed(tensor) is None
    with compat.fake_tensors():
        one, two = torch.empty(8, device="cpu"), torch.empty(8, device="cpu")
        assert compat.storage_key(one) == compat.storage_key(one[2:]) != compat.storage_key(two)
        assert (torch.empty(10**6, 10**6) @ torch.empty(10**6, 3)).shape == (10**6, 3)
        with pytest.raises(compat.fake_tensor_errors()):
            bool(one.sum() > 0)


def test_a_dispatch_mode_sees_operations_and_the_attention_kernel_of_the_cpu_has_its_name() -> None:
    seen: list[Any] = []

    class Noting(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with Noting():
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert all(operation in seen for operation in compat.cpu_attention_operations())


# -- transformers ------------------------------------------------------------------------------------------------------


def test_keyword_arguments_of_generate_grow_by_a_column() -> None:
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7]])
    kwargs = {"attention_mask": torch.ones_like(ids), "use_cache": True}
    outputs = model(input_ids=ids, **kwargs)
    updated = compat.update_generation_kwargs(model, outputs, dict(kwargs))
    assert updated["past_key_values"] is outputs.past_key_values and updated["past_key_values"].get_seq_length() == 3
    assert updated["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_the_processors_of_a_generation_config_are_those_of_generate() -> None:
    model, ids = tiny("gpt2"), torch.tensor([[5, 6, 7, 5]])
    config = GenerationConfig(do_sample=True, repetition_penalty=2.0, temperature=0.5, top_k=3, eos_token_id=2, max_length=9)
    processors = compat.logits_processors(model, copy.deepcopy(config), ids.shape[1], ids)
    outputs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, pad_token_id=0, **outputs)
    assert torch.equal(processors(ids, output.logits[0].clone()), output.scores[0])
    assert not torch.equal(output.logits[0], output.scores[0])


def test_auto_classes_know_their_classes_by_the_type_of_model() -> None:
    for model_type in ("llama", "gpt2", "bart", "mistral"):
        made = AutoModelForCausalLM.from_config(_small(model_type))
        assert compat.class_name(AutoModelForCausalLM, model_type) == type(made).__name__
    assert compat.class_name(AutoModelForCausalLM, "t5") is None


def _small(model_type: str) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}
    old = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 8}
    bart = {"d_model": 8, "decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 8}
    fields = {"gpt2": old, "bart": bart}.get(model_type, sizes)
    return AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, **fields)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_checkpointed_layers_run_through_what_is_put_in_their_functions_place(family: str) -> None:
    model, calls = tiny(family).train(), []

    def wrap(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(function)
            return function(*args, **kwargs)

        return wrapped

    compat.wrap_checkpointing(model, wrap)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == []  # nothing is checkpointed yet
    model.gradient_checkpointing_enable()
    compat.wrap_checkpointing(model, wrap)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(calls) == {"bart": 4}.get(family, 2)


def test_classes_say_whether_they_compile_and_which_layers_stay_whole() -> None:
    assert compat.can_compile_fullgraph(tiny("llama")) and not compat.can_compile_fullgraph(tiny("rwkv"))
    assert not compat.can_compile_fullgraph(nn.Linear(2, 2))
    model = tiny("llama")
    assert compat.unsplit_layers([model, nn.Linear(2, 2)]) == [type(model.model.layers[0]).__name__]


def test_transformers_keeps_the_deepspeed_config_that_cuts_what_it_loads() -> None:
    from transformers.integrations import deepspeed

    assert compat.active_deepspeed_config() is None
    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        assert compat.active_deepspeed_config() is config
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert compat.active_deepspeed_config() is None


def test_a_message_of_transformers_is_left_out_and_no_other() -> None:
    logger, said, handler = logging.getLogger("transformers.modeling_utils"), [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with compat.without_message("LOAD REPORT"):
            logger.warning("LOAD REPORT of something")
            logger.warning("something else")
        logger.warning("LOAD REPORT afterwards")
    finally:
        logger.removeHandler(handler)
    assert said == ["something else", "LOAD REPORT afterwards"]


# -- peft and deepspeed --------------------------------------------------------------------------------------------------


def test_peft_says_that_its_adapters_are_off() -> None:
    import peft

    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert not compat.adapters_are_off(model) and not compat.adapters_are_off(nn.Linear(2, 2))
    with model.disable_adapter():
        assert compat.adapters_are_off(model)
    assert not compat.adapters_are_off(model)


def test_deepspeed_links_optimizer_states_anew() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    flat = torch.zeros(4)
    moments = {"exp_avg": torch.ones(4)}
    asked: list[Any] = []
    part = SimpleNamespace(_hp_mapping=SimpleNamespace(set_optim_state_fragment=lambda *given: asked.append(given)))
    zero = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    zero.optimizer = SimpleNamespace(param_groups=[{}], state={flat: moments})
    zero.bit16_groups, zero.single_partition_of_fp32_groups, zero._hp_optimizer_states_linked = [[part]], [flat], True
    compat.link_optimizer_states(zero)
    assert len(asked) == 1 and zero._hp_optimizer_states_linked
    compat.link_optimizer_states(SimpleNamespace())  # ZeRO-3 has none


def test_zero3_marks_parameters_with_their_optimizer_and_keeps_its_hooks() -> None:
    """By its source: a run of its own is in tests/training/engine."""
    from deepspeed.runtime.zero import parameter_offload, stage3

    assert "p._z3_optimizer = self" in inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    source = inspect.getsource(parameter_offload.DeepSpeedZeRoOffload)
    assert all(f"self.{name}" in source for name in ("forward_hooks", "backward_hooks", "fwd_pre_hook"))
    offload = SimpleNamespace(forward_hooks=[1], backward_hooks=[2], fwd_pre_hook=3)
    parameter = nn.Parameter(torch.zeros(1))
    parameter._z3_optimizer = SimpleNamespace(parameter_offload=offload)
    assert compat.zero3_hooks(parameter) == [1, 2, 3]


# -- the house -------------------------------------------------------------------------------------------------------------

ROOMS = ("rollout", "reward", "training", "configs", "scripts", "steerl")
STANDARD = {"_asdict", "_exit", "_replace", "_run_exitfuncs"}
"""Of the standard library: documented, or its own module's only way."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> set[str]:
    """Functions, classes, variables and attributes of self that a file makes."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    return own


def private_names(tree: ast.Module, own: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every private name that is imported, or looked up on something else than self and is none of `own`."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            names = [node.attr] if node.attr not in own | STANDARD else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            names = [str(ast.literal_eval(node.args[1]))] if isinstance(node.args[1], ast.Constant) else []
            names = [name for name in names if name not in own]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            whole = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = [part for name in whole for part in name.split(".")]
        found += [(node.lineno, name) for name in names if is_private(name)]
    return found


def test_private_names_are_found() -> None:
    program = """
import torch._dynamo
from torch.utils._pytree import tree_map
class Ours:
    def __init__(self):
        self._mine = 1
    def other(self, theirs):
        return self._mine, theirs._mine, theirs._buffers, getattr(theirs, "_hooks"), theirs.__dict__
"""
    tree = ast.parse(program)
    assert private_names(tree, defined(tree)) == [(2, "_dynamo"), (3, "_pytree"), (8, "_buffers"), (8, "_hooks")]


def test_no_private_name_of_a_library_outside_compat() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    own = set().union(*map(defined, trees.values()))
    found = {path: private_names(tree, own) for path, tree in trees.items()}
    said = {str(path.relative_to(ROOT)): names for path, names in found.items() if names}
    assert set(said) == {"rollout/model/compat.py"}, said


def test_experts_get_the_names_of_a_checkpoint():
    model = tiny("mixtral")
    layer = {name: value for name, value in model.state_dict().items() if name.startswith("model.layers.1.")}
    saved = compat.as_saved(model, layer)
    assert saved["model.layers.1.block_sparse_moe.experts.2.w2.weight"].shape == (32, 64)
    assert len(saved) == len(layer) - 2 + 3 * 4  # two stacks of weights are three of each of four experts
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in layer.values())
