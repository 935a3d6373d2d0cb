"""Losses, credits, optimizers and schedules as a user would write them; those of the papers are written anew."""

from __future__ import annotations

import torch


def gspo(new_BR, old_BR, advantages_BR, mask_BR, weights_BR, *, clip_low, clip_high, importance_BR=None):
    log_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
    row_B1 = log_BR.detach().sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)
    ratio_BR = (row_B1 + (log_BR - log_BR.detach())).exp()
    free_BR, held_BR = ratio_BR * advantages_BR, ratio_BR.clamp(1 - clip_low, 1 + clip_high) * advantages_BR
    objective_BR = torch.minimum(free_BR, held_BR)
    if importance_BR is not None:
        objective_BR = importance_BR * objective_BR
    loss = -(torch.where(mask_BR, objective_BR, 0.0) * weights_BR).sum()
    return loss, {
        "row_ratio": (torch.where(mask_BR, ratio_BR.detach(), 0.0) * weights_BR).sum(),
        "clip_fraction": ((held_BR < free_BR) & mask_BR).to(new_BR).mul(weights_BR).sum(),
    }


def told_by_rows(new_BR, old_BR, advantages_BR, mask_BR, weights_BR):
    """What it tells hangs on the rows that it sees: another metric for rows of 3, 6, 9 tokens."""
    loss = -(torch.where(mask_BR, (new_BR - old_BR).exp() * advantages_BR, 0.0) * weights_BR).sum()
    lengths = mask_BR.sum(1)[:, None].expand_as(mask_BR)
    told = {"all": weights_BR.sum()}
    if bool((lengths % 3 == 0).any() & mask_BR.any()):
        told["thirds"] = (weights_BR * (lengths % 3 == 0)).sum()
    return loss, told


def mean(new_BR, old_BR, advantages_BR, mask_BR, weights_BR):
    return -((new_BR - old_BR).exp() * advantages_BR)[mask_BR].mean(), {}


def unweighted(new_BR, old_BR, advantages_BR, mask_BR):
    return -((new_BR - old_BR).exp() * advantages_BR)[mask_BR].sum(), {}


def mean_metric(new_BR, old_BR, advantages_BR, mask_BR, weights_BR):
    loss = -(torch.where(mask_BR, (new_BR - old_BR).exp() * advantages_BR, 0.0) * weights_BR).sum()
    return loss, {"mean": torch.where(mask_BR, new_BR, 0.0).mean()}


def strange(new_logps, old_BR):
    raise AssertionError


def lone(new_BR, weights_BR):
    return (new_BR * weights_BR).sum()


def cut_off(new_BR, weights_BR):
    return (new_BR.detach() * weights_BR).sum(), {}


def product(new_BR, mask_BR, weights_BR):
    """inf x 0 in its gradient."""
    return ((new_BR - 1.0 / mask_BR) * mask_BR * weights_BR).sum() * new_BR.log().sum(), {}


def rude(new_BR, **_):
    raise ValueError("no\x1b[2J\nsuch thing")


def gae(rewards_BR, values_BR, mask_BR, *, gamma, lam, bootstrap_B=None):
    advantages_BR = torch.zeros_like(values_BR)
    for row in range(len(mask_BR)):
        places = mask_BR[row].nonzero()[:, 0].tolist()
        carry, after = torch.tensor(0.0), torch.tensor(0.0) if bootstrap_B is None else bootstrap_B[row]
        for place in reversed(places):
            carry = rewards_BR[row, place] + gamma * after - values_BR[row, place] + gamma * lam * carry
            after = values_BR[row, place]
            advantages_BR[row, place] = carry
    return advantages_BR, torch.where(mask_BR, advantages_BR + values_BR, 0.0)


def centred(rewards_BR, mask_BR, group_B):
    total_B, advantages_BR = rewards_BR.sum(1), torch.zeros_like(rewards_BR)
    for group in set(group_B.tolist()):
        rows_B = (group_B == group) & mask_BR.any(1)
        advantages_BR[rows_B] = (total_B[rows_B] - total_B[rows_B].mean())[:, None]
    return torch.where(mask_BR, advantages_BR, 0.0)


def wide(rewards_BR, mask_BR):
    return torch.zeros(1, 1)


def nan_there(rewards_BR, mask_BR):
    return rewards_BR / 0.0


def alone(rewards_BR, values_BR):
    return rewards_BR


def steps_down(step, steps, floor=0.1):
    return max(floor, 0.5 ** (step // 2))


def below_zero(step, steps):
    return 1.0 - step


class Signs(torch.optim.Optimizer):
    """Every weight against the sign of its gradient, by the group's rate."""

    def __init__(self, params, lr, damp=1.0):
        super().__init__(params, {"lr": lr, "damp": damp})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.state[weight]["seen"] = self.state[weight].get("seen", 0) + 1
                    weight -= group["lr"] * group["damp"] * weight.grad.sign()


def no_optimizer(params, lr):
    return list(params)
