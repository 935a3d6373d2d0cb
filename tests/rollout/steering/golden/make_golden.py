"""How operations.npz and calls.npz were made, once, with pyvene 0.1.8 (torch 2.13, transformers 5.23):

    pip install --target DIR --no-deps pyvene==0.1.8
    PYTHONPATH=DIR python tests/rollout/steering/golden/make_golden.py

operations.npz  inputs, parameters and pyvene's output of each of its interventions
calls.npz       the weights of a GPT-2 of two blocks, and what IntervenableModel's forward and generate gave on it
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyvene as pv
import torch
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
WIDTH, RANK, LATENT, ROWS = 6, 3, 9, 4


def operations() -> None:
    torch.manual_seed(0)
    base, source = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    out = {"base": base, "source": source}
    width = {"embed_dim": WIDTH}

    def run(name, intervention, subspaces=None, unit=True, needs_source=True):
        h = base.clone()[:, None] if unit else base.clone()
        s = (source.clone()[:, None] if unit else source.clone()) if needs_source else None
        with torch.no_grad():
            y = intervention(h, s, subspaces)
        out[name] = y[:, 0] if unit else y

    run("vanilla", pv.VanillaIntervention(**width))
    run("add", pv.AdditionIntervention(**width))
    run("subtract", pv.SubtractionIntervention(**width))
    run("zero", pv.ZeroIntervention(**width))
    run("collect", pv.CollectIntervention(**width), needs_source=False)
    half = pv.VanillaIntervention(**width)
    half.set_interchange_dim(4)
    run("vanilla_4", half)
    out["subspace_rows"] = torch.tensor([[0], [1], [1], [0]])
    partition = {**width, "subspace_partition": [[0, 2], [2, 4]]}
    run("vanilla_rows", pv.VanillaIntervention(**partition), [[0], [1], [1], [0]], unit=False)
    rotated = pv.RotatedSpaceIntervention(**width)
    out["rotation"] = rotated.rotate_layer.weight.detach()
    run("rotated", rotated, unit=False)
    run("rotated_02", rotated, [[0, 2]] * ROWS, unit=False)
    low = pv.LowRankRotatedSpaceIntervention(**width, low_rank_dimension=RANK)
    out["low_rank"] = low.rotate_layer.weight.detach()
    run("low_rank_rotated", low, unit=False)
    run("low_rank_rotated_1", low, [[1]] * ROWS, unit=False)
    boundless = pv.BoundlessRotatedSpaceIntervention(**width)
    boundless.set_intervention_boundaries(0.4)
    boundless.set_temperature(torch.tensor(0.7))
    out["boundless_rotation"] = boundless.rotate_layer.weight.detach()
    run("boundless", boundless, unit=False)
    mask = pv.SigmoidMaskIntervention(**width)
    mask.mask.data = torch.randn(WIDTH)
    mask.set_temperature(torch.tensor(0.5))
    out["mask"] = mask.mask.detach()
    run("sigmoid_mask", mask, unit=False)
    turned = pv.SigmoidMaskRotatedSpaceIntervention(**width)
    turned.masks.data = torch.randn(WIDTH)
    turned.set_temperature(torch.tensor(0.5))
    out["turned_mask"], out["turned_rotation"] = turned.masks.detach(), turned.rotate_layer.weight.detach()
    run("sigmoid_mask_rotated", turned, unit=False)
    components = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:RANK]
    mean, std = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    out["components"], out["mean"], out["std"] = components, mean, std
    fitted = SimpleNamespace(components_=components.numpy())
    run("pca", pv.PCARotatedSpaceIntervention(**width, pca=fitted, pca_mean=mean.numpy(), pca_std=std.numpy()), unit=False)
    coder = pv.AutoencoderIntervention(embed_dim=WIDTH, latent_dim=LATENT)
    coder.set_interchange_dim([0, 3, 5])
    layers = coder.autoencoder
    out["encoder"], out["encoder_bias"] = layers.encoder[0].weight.detach(), layers.encoder[0].bias.detach()
    out["decoder"], out["decoder_bias"] = layers.decoder[0].weight.detach(), layers.decoder[0].bias.detach()
    run("autoencoder_035", coder, unit=False)
    jump = pv.JumpReLUAutoencoderIntervention(embed_dim=WIDTH, low_rank_dimension=LATENT)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(jump, name).data = torch.randn_like(getattr(jump, name))
        out[f"jump_{name}"] = getattr(jump, name).detach()
    jump.threshold.data = torch.rand(LATENT)
    out["jump_threshold"] = jump.threshold.detach()
    jump.set_interchange_dim(LATENT)
    run("jumprelu", jump, unit=False)
    noise = pv.NoiseIntervention(embed_dim=WIDTH)
    out["noise_drawn"], out["noise_level"] = noise.noise[0].float(), noise.noise_level
    with torch.no_grad():
        out["noise"] = noise(base.clone()[None].double(), None)[0].float()
    np.savez_compressed(HERE / "operations.npz", **{k: v.numpy() for k, v in out.items()})


def calls() -> None:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16, bos_token_id=1, eos_token_id=None)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    out = {f"weight:{name}": value for name, value in model.state_dict().items()}
    base = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    one = {"input_ids": torch.tensor([[1, 2, 3, 4], [13, 14, 15, 1]])}
    two = {"input_ids": torch.tensor([[12, 3, 9, 2], [4, 4, 5, 6]])}

    def made(*sites, mode="parallel", types=None):
        return pv.IntervenableModel(pv.IntervenableConfig([dict(s) for s in sites], intervention_types=types, mode=mode), model)

    first, second = {"layer": 0, "component": "block_output"}, {"layer": 1, "component": "mlp_output"}
    both = made(first, second, types=pv.VanillaIntervention)
    where = {"sources->base": ([[[1], [2]], [[0], [3]]], [[[3], [0]], [[2], [1]]])}
    with torch.no_grad():
        original, edited = both(base, [one, two], where, output_original_output=True)
        out["two_sources"], out["original"] = edited.logits, original.logits
        stored = torch.randn(2, 1, 8)
        out["stored"] = stored
        single = made(first, types=pv.AdditionIntervention)
        key = next(iter(single.interventions))
        out["stored_representation"] = single(base, None, {"base": 2}, source_representations={key: stored.clone()})[1].logits
        where_one = {"sources->base": ([[[1], [2]]], [[[3], [0]]])}
        parts = made({**first, "subspace_partition": [[0, 3], [3, 8]]}, types=pv.VanillaIntervention)
        out["subspaces"] = parts(base, [one], where_one, subspaces=[[[1], [1]]])[1].logits
        # Vanilla with other subspaces for other rows gives every row the union of them in pyvene; its low rank does not.
        low = made(
            {**first, "subspace_partition": [[0, 2], [2, 4]], "low_rank_dimension": 4}, types=pv.LowRankRotatedSpaceIntervention
        )
        out["subspace_weight"] = next(iter(low.interventions.values())).rotate_layer.weight
        out["subspaces_by_row"] = low(base, [one], where_one, subspaces=[[[0], [1]]])[1].logits
        serial = made(first, second, mode="serial", types=pv.VanillaIntervention)
        chain = {"source_0->source_1": ([[[1], [1]]], [[[2], [0]]]), "source_1->base": ([[[3], [2]]], [[[3], [3]]])}
        out["serial"] = serial(base, [one, two], chain)[1].logits
        collect = made({**first, "max_number_of_units": 2}, types=pv.CollectIntervention)
        (_, seen), _ = collect(base, unit_locations={"base": ([[[1, 3], [0, 2]]])})
        out["collected"] = torch.stack(list(seen)) if isinstance(seen, (list, tuple)) else seen
        out["loss"] = both(base, [one, two], where, labels=base["input_ids"])[1].loss
        model.generation_config.pad_token_id = 0
        prompt = made({"layer": 1, "component": "block_output"}, types=pv.VanillaIntervention)
        _, steered = prompt.generate(
            base, [one], {"sources->base": ([[[1], [2]]], [[[3], [3]]])}, intervene_on_prompt=True, max_new_tokens=6, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        out["generated"], out["generated_logits"] = steered.sequences, torch.stack(steered.logits, 1)
    np.savez_compressed(HERE / "calls.npz", **{k: v.numpy() for k, v in out.items()})


if __name__ == "__main__":
    operations()
    calls()
