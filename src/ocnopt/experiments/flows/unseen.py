"""How much of a flow's gradient the Kronecker factors of its layers do not see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.ode import ContinuousFlow
from ocnopt.ode.listener import Field, Parts

__all__ = ["unseen"]


class _Products:
    """``int z (x) g dt`` of linear layers' weights by sample, as the adjoint shows it.

    Args:
        layers: By name.
        step: Time between two looks.
    """

    def __init__(self, layers: dict[str, nn.Linear], step: float) -> None:
        self.layers = layers
        self.sample_step: float | None = step
        self.sums: dict[str, Tensor] = {}

    def arrived(self, task: int, field: Field, end: Tensor, x: Parts, gradient: Parts) -> None:
        """Nothing is done at a solve's end."""

    def sample(self, field: Field, t: Tensor, x: Parts, a: Parts, duration: float) -> None:
        """Evaluate the field once more and add up."""
        calls: list[tuple[str, Tensor, Tensor]] = []
        handles = [
            layer.register_forward_hook(
                lambda _, args, out, name=name: calls.append((name, args[0].detach(), out))
            )
            for name, layer in self.layers.items()
        ]
        try:
            with torch.enable_grad():
                outputs = field(t, x)
        finally:
            for handle in handles:
                handle.remove()
        grads = torch.autograd.grad(outputs, [out for *_, out in calls], a)
        for (name, z, _), g in zip(calls, grads, strict=True):
            found = duration * g[:, :, None] * z[:, None, :]
            self.sums[name] = self.sums.get(name, 0) + found


def unseen(flow: ContinuousFlow, x: Tensor, step: float = 0.01) -> list[dict[str, Any]]:
    """Compare samples' gradients of linear layers' weights with what their outputs show of them.

    The gradient of a sample's log-density is ``int z (x) g dt``, g being that of a layer's outputs,
    and a rest: the weight's own place in dF/dx, whose trace the divergence is. (A weight whose
    inputs do not depend on the state, such as a gate's, has no place there.)

    Args:
        flow: Its weights and gradients are left as they are.
        x: Points (B, d); each is solved alone.
        step: Time between two looks at the adjoint.

    Returns:
        By layer ``layer``; ``share``, the norm of the rest relative to the whole gradient's; and
        ``cosine``, between what is seen and the whole; of all samples' gradients as one vector.
    """
    layers = {n: m for n, m in flow.named_modules() if isinstance(m, nn.Linear)}
    weights = [layer.weight for layer in layers.values()]
    follower = _Products(layers, step)
    for leg in flow.legs:
        leg.follow(follower)
    try:
        torch.autograd.grad(flow(x).sum(), weights)
    finally:
        for leg in flow.legs:
            leg.unfollow(follower)
    each = [torch.autograd.grad(flow(point[None]).sum(), weights) for point in x]
    found = []
    for name, *parts in zip(layers, *each, strict=True):
        whole = torch.stack(parts)
        seen = -follower.sums[name]  # time runs down, from the data to the normal density
        found.append(
            {
                "layer": name,
                "share": float((whole - seen).norm() / whole.norm()),
                "cosine": float((whole * seen).sum() / (whole.norm() * seen.norm())),
            }
        )
    return found
