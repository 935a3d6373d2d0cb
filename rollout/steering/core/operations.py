"""What can be done to an activation: one pure function per operation, base first, source second, no state.

    write       set (vanilla) · add · subtract · zero · scale · noise · collect      whole, or on chosen coordinates
    direction   ablate · project · clamp · rotate · renormalise                      along u = source
    space       go in, mix, come back: rotated · low_rank_rotated · pca · boundless · sigmoid_mask ·
                sigmoid_mask_rotated · autoencoder · jumprelu
    learned     loreft · noreft · consreft · lobireft · direft · nodireft · adapter

Row vectors: `base` is (..., D) and `source` broadcasts to it. Nothing is changed in place. Rotations, projections and
norms are worked out in float32 (or wider, where the base is wider) and cast back. `coordinates` chooses entries of the
last dimension: None (all), indices, a bool mask, or one list of indices per row of a (B, ..., D) base.

A steering spec is read by what this file says of its operations, before torch is there: it is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Coordinates = Tensor | Sequence[int] | Sequence[Sequence[int]] | None
    Activation = Callable[[Tensor], Tensor]


def chosen(coordinates: Coordinates, like: Tensor) -> Tensor | None:
    """`coordinates` as a bool mask that broadcasts against `like` (B, ..., D); None = all of them."""
    if coordinates is None:
        return None
    import torch

    width = like.shape[-1]
    if isinstance(coordinates, torch.Tensor):
        if coordinates.dtype == torch.bool:
            return coordinates.to(like.device)
        coordinates = coordinates.tolist()
    if coordinates and isinstance(coordinates[0], Sequence):
        mask = torch.zeros((len(coordinates), *(1,) * (like.dim() - 2), width), dtype=torch.bool)
        for row, indices in enumerate(coordinates):
            mask[row, ..., list(indices)] = True  # type: ignore[arg-type]
    else:
        mask = torch.zeros(width, dtype=torch.bool)
        mask[list(coordinates)] = True  # type: ignore[arg-type]
    return mask.to(like.device)


def wide(base: Tensor) -> Tensor:
    """float32 where the base is narrower: rotations and norms in bfloat16 would lose the direction."""
    import torch

    return base.to(torch.promote_types(base.dtype, torch.float32))


def _swap(base: Tensor, source: Tensor, coordinates: Coordinates) -> Tensor:
    mask = chosen(coordinates, base)
    return source.expand_as(base) if mask is None else source.where(mask, base)


# -- write -----------------------------------------------------------------------------------------------------------


def vanilla(base: Tensor, source: Tensor, coordinates: Coordinates = None) -> Tensor:
    """h[I] = s[I]: an interchange."""
    return _swap(base, source.to(base.dtype), coordinates)


def add(base: Tensor, source: Tensor, strength: float | Tensor = 1.0, coordinates: Coordinates = None) -> Tensor:
    """h + a s."""
    return _swap(base, base + (strength * source).to(base.dtype), coordinates)


def subtract(base: Tensor, source: Tensor, strength: float | Tensor = 1.0, coordinates: Coordinates = None) -> Tensor:
    """h - a s."""
    return _swap(base, base - (strength * source).to(base.dtype), coordinates)


def zero(base: Tensor, source: Tensor | None = None, coordinates: Coordinates = None) -> Tensor:
    """h[I] = 0."""
    return _swap(base, base.new_zeros(base.shape), coordinates)


def scale(base: Tensor, source: Tensor | None = None, factor: float | Tensor = 1.0, coordinates: Coordinates = None) -> Tensor:
    """h[I] = factor h[I]."""
    return _swap(base, (base * factor).to(base.dtype), coordinates)


def noise(base: Tensor, source: Tensor, level: float | Tensor = 1.0, coordinates: Coordinates = None) -> Tensor:
    """h + level * s, where the source is the noise that was drawn: a function of numbers, so that it can be repeated."""
    return add(base, source, level, coordinates)


def collect(base: Tensor, source: Tensor | None = None, coordinates: Coordinates = None) -> Tensor:
    """h[I], read and not changed; one list of coordinates per row needs lists of one length."""
    mask = chosen(coordinates, base)
    if mask is None:
        return base
    if mask.dim() == 1:
        return base[..., mask]
    import torch

    return torch.stack([row[..., keep.reshape(-1)] for row, keep in zip(base, mask, strict=True)])


# -- direction -------------------------------------------------------------------------------------------------------


def along_unit(base: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h, u, h.u) in float32, u of length 1."""
    h, u = wide(base), wide(source)
    u = u / u.norm(dim=-1, keepdim=True).clamp_min(_tiny(u))
    return h, u, (h * u).sum(-1, keepdim=True)


def _tiny(h: Tensor) -> float:
    import torch

    return torch.finfo(h.dtype).tiny


def ablate(base: Tensor, source: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """h - a (h.u) u: the direction taken out."""
    h, u, along = along_unit(base, source)
    return (h - strength * along * u).to(base.dtype)


def project(base: Tensor, source: Tensor) -> Tensor:
    """(h.u) u: nothing but the direction kept."""
    _, u, along = along_unit(base, source)
    return (along * u).to(base.dtype)


def clamp(base: Tensor, source: Tensor, value: float | Tensor = 0.0) -> Tensor:
    """h + (c - h.u) u: the component along u set to c."""
    h, u, along = along_unit(base, source)
    return (h + (value - along) * u).to(base.dtype)


def rotate(base: Tensor, source: Tensor, angle: float | Tensor = 0.0) -> Tensor:
    """h turned by `angle` (radians) towards u in the plane of both; its length stays. Parallel to u: unchanged."""
    import torch

    h, u, along = along_unit(base, source)
    length = h.norm(dim=-1, keepdim=True)
    unit = h / length.clamp_min(_tiny(h))
    across = u - (unit * u).sum(-1, keepdim=True) * unit
    size = across.norm(dim=-1, keepdim=True)
    across = across / size.clamp_min(_tiny(h))
    angle = torch.as_tensor(angle, dtype=h.dtype, device=h.device)
    turned = length * (torch.cos(angle) * unit + torch.sin(angle) * across)
    return torch.where(size > 1e-6, turned, h).to(base.dtype)


def renormalise(base: Tensor, source: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """(h + a s), brought back to the length of h: an addition that moves the direction and keeps the norm."""
    h = wide(base)
    moved = h + strength * wide(source)
    length = moved.norm(dim=-1, keepdim=True).clamp_min(_tiny(h))
    return (moved * (h.norm(dim=-1, keepdim=True) / length)).to(base.dtype)


# -- mix in a space ----------------------------------------------------------------------------------------------------


def rotated(base: Tensor, source: Tensor, rotation_DD: Tensor, coordinates: Coordinates = None) -> Tensor:
    """hQ with the source's coordinates put in, and back by Q^T."""
    rotation = wide(rotation_DD)
    mixed = _swap(wide(base) @ rotation, wide(source) @ rotation, coordinates)
    return (mixed @ rotation.T).to(base.dtype)


def low_rank_rotated(base: Tensor, source: Tensor, weight_DK: Tensor, coordinates: Coordinates = None) -> Tensor:
    """h + (s - h) W W^T, on chosen columns of W: outside its column space nothing moves."""
    weight = wide(weight_DK)
    move = (wide(source) - wide(base)) @ weight
    mask = chosen(coordinates, move)
    if mask is not None:
        move = move.where(mask, 0.0)
    return (wide(base) + move @ weight.T).to(base.dtype)


def _mix(base: Tensor, source: Tensor, share: Tensor) -> Tensor:
    return (1.0 - share) * base + share * source


def boundless(
    base: Tensor, source: Tensor, rotation_DD: Tensor, boundary: float | Tensor, temperature: float | Tensor
) -> Tensor:
    """Rotated, mixed by sig(j/t) sig((y - j)/t) with y = clip(b, 1e-3, 1) d, and back."""
    import torch

    rotation = wide(rotation_DD)
    width = base.shape[-1]
    index = torch.arange(width, device=base.device, dtype=rotation.dtype)
    edge = torch.as_tensor(boundary, dtype=rotation.dtype, device=base.device).reshape(()).clamp(1e-3, 1.0) * width
    share = torch.sigmoid(index / temperature) * torch.sigmoid((edge - index) / temperature)
    return (_mix(wide(base) @ rotation, wide(source) @ rotation, share) @ rotation.T).to(base.dtype)


def sigmoid_mask(base: Tensor, source: Tensor, mask_D: Tensor, temperature: float | Tensor) -> Tensor:
    """(1 - sig(m/t)) h + sig(m/t) s."""
    return _mix(wide(base), wide(source), (wide(mask_D) / temperature).sigmoid()).to(base.dtype)


def sigmoid_mask_rotated(
    base: Tensor, source: Tensor, rotation_DD: Tensor, mask_D: Tensor, temperature: float | Tensor
) -> Tensor:
    """The same in the space hQ."""
    rotation = wide(rotation_DD)
    share = (wide(mask_D) / temperature).sigmoid()
    return (_mix(wide(base) @ rotation, wide(source) @ rotation, share) @ rotation.T).to(base.dtype)


def pca(
    base: Tensor, source: Tensor, components_KD: Tensor, mean_D: Tensor, std_D: Tensor, coordinates: Coordinates = None
) -> Tensor:
    """((x - mean) / std) C^T, coordinates swapped, and back; what the components do not span is lost."""
    components, mean, std = wide(components_KD), wide(mean_D), wide(std_D)
    mixed = _swap(((wide(base) - mean) / std) @ components.T, ((wide(source) - mean) / std) @ components.T, coordinates)
    return (mixed @ components * std + mean).to(base.dtype)


def _through(
    base: Tensor,
    source: Tensor,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    coordinates: Coordinates,
    residual: bool,
) -> Tensor:
    h = wide(base)
    latent = encode(h)
    back = decode(_swap(latent, encode(wide(source)), coordinates))
    return (h + (back - decode(latent)) if residual else back).to(base.dtype)


def autoencoder(
    base: Tensor,
    source: Tensor,
    encoder_LD: Tensor,
    encoder_bias_L: Tensor,
    decoder_DL: Tensor,
    decoder_bias_D: Tensor,
    coordinates: Coordinates = None,
    residual: bool = False,
) -> Tensor:
    """relu((x - b_dec) E^T + b_enc), latents swapped, back by D^T + b_dec; `residual` keeps what it cannot rebuild."""
    into, into_bias, back, back_bias = (wide(x) for x in (encoder_LD, encoder_bias_L, decoder_DL, decoder_bias_D))

    def encode(x: Tensor) -> Tensor:
        return relu((x - back_bias) @ into.T + into_bias)

    return _through(base, source, encode, lambda latent: latent @ back.T + back_bias, coordinates, residual)


def jumprelu(
    base: Tensor,
    source: Tensor,
    encoder_DL: Tensor,
    encoder_bias_L: Tensor,
    threshold_L: Tensor,
    decoder_LD: Tensor,
    decoder_bias_D: Tensor,
    coordinates: Coordinates = None,
    residual: bool = False,
) -> Tensor:
    """A JumpReLU sparse autoencoder: latents at or under their threshold are 0, the others are kept by relu."""
    into, into_bias, threshold = wide(encoder_DL), wide(encoder_bias_L), wide(threshold_L)
    back, back_bias = wide(decoder_LD), wide(decoder_bias_D)

    def encode(x: Tensor) -> Tensor:
        before = x @ into + into_bias
        return relu(before).where(before > threshold, 0.0)

    return _through(base, source, encode, lambda latent: latent @ back + back_bias, coordinates, residual)


# -- learned -----------------------------------------------------------------------------------------------------------


def _same(x: Tensor) -> Tensor:
    return x


def relu(x: Tensor) -> Tensor:
    return x.relu()


def loreft(
    base: Tensor, source: Tensor | None, weight_KD: Tensor, bias_K: Tensor, rotation_DK: Tensor, act: Activation = _same
) -> Tensor:
    """h + (act(h W^T + b) - h R) R^T, R with orthonormal columns."""
    h, rotation = wide(base), wide(rotation_DK)
    return (h + (act(h @ wide(weight_KD).T + wide(bias_K)) - h @ rotation) @ rotation.T).to(base.dtype)


def noreft(
    base: Tensor,
    source: Tensor | None,
    weight_KD: Tensor,
    bias_K: Tensor,
    projection_KD: Tensor,
    projection_bias_K: Tensor | float = 0.0,
    act: Activation = _same,
) -> Tensor:
    """h + (act(h W^T + b) - (h P^T + p)) P: LoReFT without the constraint on the space."""
    h, projection = wide(base), wide(projection_KD)
    return (h + (act(h @ wide(weight_KD).T + wide(bias_K)) - (h @ projection.T + projection_bias_K)) @ projection).to(
        base.dtype
    )


def consreft(base: Tensor, source: Tensor | None, value_K: Tensor, rotation_DK: Tensor) -> Tensor:
    """h + (c - h R) R^T: the subspace set to a learned constant."""
    h, rotation = wide(base), wide(rotation_DK)
    return (h + (wide(value_K) - h @ rotation) @ rotation.T).to(base.dtype)


def lobireft(base: Tensor, source: Tensor | None, value_K: Tensor, rotation_DK: Tensor) -> Tensor:
    """h + c R^T: a bias that lives in a low-rank space."""
    return (wide(base) + wide(value_K) @ wide(rotation_DK).T).to(base.dtype)


def direft(
    base: Tensor, source: Tensor | None, weight_KD: Tensor, bias_K: Tensor, rotation_DK: Tensor, act: Activation = _same
) -> Tensor:
    """h + act(h W^T + b) R^T."""
    h = wide(base)
    return (h + act(h @ wide(weight_KD).T + wide(bias_K)) @ wide(rotation_DK).T).to(base.dtype)


def nodireft(
    base: Tensor, source: Tensor | None, weight_KD: Tensor, bias_K: Tensor, projection_KD: Tensor, act: Activation = _same
) -> Tensor:
    """h + act(h W^T + b) P: DiReFT without the constraint on the space."""
    h = wide(base)
    return (h + act(h @ wide(weight_KD).T + wide(bias_K)) @ wide(projection_KD)).to(base.dtype)


def adapter(
    base: Tensor,
    source: Tensor | None,
    down_KD: Tensor,
    down_bias_K: Tensor,
    up_DK: Tensor,
    up_bias_D: Tensor,
    act: Activation = relu,
) -> Tensor:
    """h + up(act(down h)): a bottleneck adapter."""
    h = wide(base)
    return (h + act(h @ wide(down_KD).T + wide(down_bias_K)) @ wide(up_DK).T + wide(up_bias_D)).to(base.dtype)
