"""Terminal costs and the factors of their Hessians (methods: Prop. 3 and its refinements).

Per sample, the criterion gives a gradient ``phi_x`` and a Hessian ``phi_xx`` with respect to the
network's output. Five forms of the terminal value Hessian are supported here:

* ``outer-product``: ``phi_x phi_x^T`` (Prop. 3 with z = phi_x);
* ``bounded``: ``kappa phi_x phi_x^T`` with the larger of the next kappa and ``1 / (2 phi)``. The
  latter is the Gauss-Newton Hessian of ``phi = r^2 / 2`` with the residual ``r = sqrt(2 phi)``: the
  quadratic model then promises no loss below zero. Where a sample is badly fitted, cross-entropy is
  nearly linear, hence ``matched`` nearly flat;
* ``matched``: ``kappa phi_x phi_x^T`` with ``kappa = phi_x^T phi_xx phi_x / |phi_x|^4``, the outer
  product whose curvature along the gradient is the true one (kappa = 0 where that is negative);
* ``gauss-newton``: ``phi_xx = Z Z^T`` exactly (its positive part where it is indefinite);
* ``full``: the same as a matrix per sample, for chains (:mod:`ocnopt.control.dense`).

The criterion must be a sum or a mean over samples. All values here belong to the loss as the
criterion returns it; batch size and loss scaling are applied where samples are known.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ocnopt.control.symmetric import eigenvalues, positive_part
from ocnopt.curvature.metric import to_float
from ocnopt.errors import GraphError, OptionError

if TYPE_CHECKING:
    from ocnopt.control.passes import TerminalCall

__all__ = ["FORMS", "Criterion", "TerminalCost"]

FORMS = ("bounded", "matched", "outer-product", "gauss-newton", "full")

#: What autograd says of functions with a first derivative alone.
_ONCE = re.compile("not implemented|once_differentiable")

#: Largest rank of an exact terminal factor; each column costs one back-propagation.
MAX_RANK = 1024


class Criterion(nn.Module):
    """A plain loss function as the module that the training loop calls.

    Args:
        function: Called as ``function(output, *args, **kwargs)``; returns the loss. It must be
            twice differentiable in ``output`` where its curvature is asked for.

    Example:
        >>> import torch.nn.functional as F
        >>> criterion = Criterion(F.cross_entropy)
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The function's value; the output comes first, or is called ``input`` as in torch."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", repr(self.function))


class TerminalCost:
    """The criterion's derivatives along a recorded call.

    Args:
        criterion: The module, or None: then only ``outer-product`` is possible.
        form: One of :data:`FORMS`.

    Raises:
        OptionError: Unknown form, or one that needs a criterion.
    """

    def __init__(self, criterion: nn.Module | None, form: str) -> None:
        if form not in FORMS:
            raise OptionError(f"terminal={form!r} is not known; choose one of {', '.join(FORMS)}")
        if criterion is None and form != "outer-product":
            raise OptionError(
                f"terminal={form!r} needs the criterion; pass it as the second argument "
                "(wrap a plain function as ocnopt.Criterion(function))"
            )
        # A compiled criterion is differentiated twice as what it was compiled from.
        self.criterion: nn.Module | None = getattr(criterion, "_orig_mod", criterion)
        self.form = form

    @property
    def rank_r(self) -> bool:
        """Whether columns of a factor have to be back-propagated."""
        return self.form == "gauss-newton"

    def along_gradient(self, call: TerminalCall, samples: int) -> tuple[Tensor, Tensor]:
        """``phi_x^T phi_xx phi_x`` and ``|phi_x|^2`` of the loss, per sample.

        Args:
            call: A recorded call of the criterion.
            samples: Number of samples; its rows are grouped evenly.

        Returns:
            Two tensors (samples,).
        """
        if _is_cross_entropy(self.criterion):
            p, g, mass = _cross_entropy(self.criterion, call)
            pg = p * g
            quad = torch.linalg.vecdot(pg, g).sub_(pg.sum(-1).square_()).mul_(mass)
            square = torch.linalg.vecdot(g, g)
        else:
            gradient, product = self._curvature(call, None)
            quad, square = gradient * product, gradient.square()
        if quad.shape == (samples,):
            return quad, square
        return quad.reshape(samples, -1).sum(-1), square.reshape(samples, -1).sum(-1)

    def losses(self, call: TerminalCall, samples: int) -> Tensor | None:
        """Every sample's part of the loss, (samples,); None where the criterion does not tell.

        Args:
            call: A recorded call of the criterion.
            samples: Number of samples; its rows are grouped evenly.
        """
        values = call.loss
        if not values.dim():
            apart = self._unreduced(call)
            if not isinstance(apart, Tensor) or not apart.dim() or apart.numel() % samples:
                return None
            values = apart * (call.loss / apart.sum())
        return values.reshape(samples, -1).sum(-1)

    def _unreduced(self, call: TerminalCall) -> object:
        """The loss before its reduction, where the criterion has an option that says so."""
        criterion: Any = copy.copy(self.criterion)
        options = dict(call.kwargs)
        if isinstance(criterion, Criterion):
            if "reduction" not in _parameters(criterion.function):
                return None
            options["reduction"] = "none"
        elif getattr(criterion, "reduction", None) in ("mean", "sum", "batchmean"):
            criterion.reduction = "none"
        else:
            return None
        output = call.output.to(to_float(call.output.dtype))
        off = torch.autocast(output.device.type, enabled=False)
        with torch.no_grad(), off, _buffers_kept(criterion):
            return criterion.forward(output, *call.args, **options)

    def columns(self, call: TerminalCall, samples: int) -> Iterator[Tensor]:
        """Columns of Z with ``Z Z^T`` the loss's Hessian per sample, each shaped as the output.

        Args:
            call: A recorded call of the criterion.
            samples: Number of samples among its rows.

        Raises:
            GraphError: The factor's rank is beyond what can be back-propagated.
        """
        output = call.output
        size = output.numel() // samples
        if size > MAX_RANK:
            raise GraphError(
                f"terminal='gauss-newton' would back-propagate {size} columns per sample (the "
                f"criterion sees {size} outputs per sample, at most {MAX_RANK} are supported); "
                "use terminal='matched'"
            )
        if _is_cross_entropy(self.criterion):
            p, _, mass = _cross_entropy(self.criterion, call)
            classes = p.shape[-1]
            root = (mass.unsqueeze(-1) * p).sqrt()
            p3, root3 = (t.reshape(samples, -1, classes) for t in (p, root))
            for location in range(p3.shape[1]):
                for c in range(classes):
                    z = torch.zeros_like(p3)
                    z[:, location] = -p3[:, location] * root3[:, location, c : c + 1]
                    z[:, location, c] += root3[:, location, c]
                    yield _classes_back(z, output).to(output.dtype)
            return
        constant = _constant_hessian(self.criterion, output)
        if constant is not None:
            for i in range(size):
                unit = output.new_zeros(samples, size)
                unit[:, i] = math.sqrt(constant)
                yield unit.view_as(output)
            return
        _, hessian = self._second_derivatives(call, samples)
        values, vectors = eigenvalues(hessian, "the Hessian of the loss in the network's output")
        z = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        for i in range(size):
            yield z[:, :, i].reshape(output.shape).to(output.dtype)

    def expansion(
        self, call: TerminalCall, samples: int, positive: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of the loss as matrices, per sample.

        Args:
            call: A recorded call of the criterion.
            samples: Number of samples among its rows.
            positive: Whether to keep the positive part of the Hessian alone.

        Returns:
            (samples, n) and (samples, n, n), n being the outputs per sample.
        """
        output = call.output
        if _is_cross_entropy(self.criterion) and output.dim() == 2 and len(output) == samples:
            p, g, mass = _cross_entropy(self.criterion, call)
            weighted = p * mass.unsqueeze(-1) if mass.dim() else p * mass
            hessian = torch.diag_embed(weighted) - weighted.unsqueeze(2) * p.unsqueeze(1)
            return g, hessian
        constant = _constant_hessian(self.criterion, output)
        if constant is not None:
            gradient = self._curvature(call, torch.zeros_like(output))[0].reshape(samples, -1)
            eye = torch.eye(gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
            return gradient, (eye * constant).expand(samples, *eye.shape)
        gradient, hessian = self._second_derivatives(call, samples)
        if positive:
            where = "the Hessian of the loss in the network's output"
            hessian = positive_part(hessian, where)
        return gradient, hessian

    def _second_derivatives(self, call: TerminalCall, samples: int) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of the loss by automatic differentiation."""
        output = call.output
        size = output.numel() // samples
        flat = output.new_zeros(samples, size)
        rows = []
        for i in range(size):
            flat.zero_()
            flat[:, i] = 1
            gradient, product = self._curvature(call, flat.view_as(output))
            rows.append(product.reshape(samples, size))
        hessian = torch.stack(rows, 1)
        return gradient.reshape(samples, size), (hessian + hessian.transpose(1, 2)) / 2

    def _curvature(self, call: TerminalCall, vector: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss's gradient and its Hessian times ``vector`` (times the gradient if None)."""
        assert self.criterion is not None
        with torch.enable_grad(), torch.autocast(call.output.device.type, enabled=False):
            output = call.output.to(to_float(call.output.dtype)).detach().requires_grad_()
            # forward() rather than a call: hooks of the criterion see the loop's calls alone.
            with _buffers_kept(self.criterion):
                loss = self.criterion.forward(output, *call.args, **call.kwargs).sum()
            (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
            direction = gradient.detach() if vector is None else vector.to(gradient.dtype)
            product: Tensor | None = None
            if gradient.requires_grad:
                try:
                    (product,) = torch.autograd.grad(
                        gradient, output, direction, allow_unused=True, materialize_grads=True
                    )
                except RuntimeError as error:
                    if not _ONCE.search(str(error)):
                        raise
                    raise OptionError(
                        f"criterion: PyTorch cannot differentiate {_named(self.criterion)} twice, "
                        f"which terminal={self.form!r} asks for; use terminal='outer-product', "
                        "which needs the gradient alone"
                    ) from error
        gradient = gradient.detach()
        return gradient, torch.zeros_like(gradient) if product is None else product.detach()


def _named(criterion: nn.Module) -> str:
    if isinstance(criterion, Criterion):
        return criterion.extra_repr()
    return type(criterion).__name__


def _parameters(function: Callable[..., Tensor]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _is_cross_entropy(criterion: nn.Module | None) -> TypeGuard[nn.CrossEntropyLoss]:
    """Whether the criterion computes what ``nn.CrossEntropyLoss`` does."""
    return isinstance(criterion, nn.CrossEntropyLoss) and _unchanged(criterion, nn.CrossEntropyLoss)


def _constant_hessian(criterion: nn.Module | None, output: Tensor) -> float | None:
    """The loss's Hessian as a multiple of the identity, where that is known beforehand."""
    if isinstance(criterion, nn.MSELoss) and _unchanged(criterion, nn.MSELoss):
        return 2 / output.numel() if criterion.reduction == "mean" else 2.0
    if getattr(criterion, "identity_hessian", False):
        return 1 / len(output) if getattr(criterion, "reduction", "") == "mean" else 1.0
    return None


def _unchanged(criterion: nn.Module, kind: type[nn.Module]) -> bool:
    return type(criterion).forward is kind.forward and "forward" not in vars(criterion)


def _cross_entropy(
    criterion: nn.CrossEntropyLoss, call: TerminalCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, gradient and mass of cross-entropy, classes last.

    The loss of a row is ``-sum_c q_c log p_c`` with class weights, label smoothing and the
    reduction's factor inside q; its gradient is ``mass p - q`` and its Hessian
    ``mass (diag p - p p^T)`` with ``mass = sum_c q_c``.

    Returns:
        p (rows, C), gradient (rows, C), mass (rows,) or a number; an ignored row has mass zero.
    """
    logits = _classes_last(call.output)
    classes = logits.shape[-1]
    logits = logits.reshape(-1, classes).to(to_float(logits.dtype))
    p = logits.softmax(-1)
    target: Tensor = call.args[0] if call.args else call.kwargs["target"]
    smoothing = criterion.label_smoothing
    weight = criterion.weight
    if (
        weight is None
        and not smoothing
        and target.device.type == "cpu"
        and _plain(criterion, target)
    ):
        share = 1 / p.shape[0] if criterion.reduction == "mean" else 1.0
        labels = target.reshape(-1, 1).long()
        g = p.scatter_add(1, labels, p.new_full((1, 1), -1.0).expand_as(labels))
        return p, g.mul_(share), torch.as_tensor(share, dtype=p.dtype)
    if target.is_floating_point():
        q = _classes_last(target).reshape(-1, classes).to(p.dtype)
        if smoothing:
            q = q * (1 - smoothing) + smoothing / classes
        if weight is not None:
            q = q * weight.to(p.dtype)
        total: Tensor | float = float(q.shape[0])
    else:
        labels = target.reshape(-1).long()
        kept = labels != criterion.ignore_index
        labels = labels.where(kept, 0)
        q = torch.zeros_like(p).scatter_(1, labels.unsqueeze(1), 1 - smoothing)
        if smoothing:
            q += smoothing / classes
        if weight is not None:
            q = q * weight.to(p.dtype)
            row_weight = weight.to(p.dtype)[labels] * kept
        else:
            row_weight = kept.to(p.dtype)
        q = q * kept.unsqueeze(1)
        total = row_weight.sum()
    if criterion.reduction == "mean":
        q = q / total
    mass = q.sum(-1)
    return p, mass.unsqueeze(-1) * p - q, mass


def _plain(criterion: nn.CrossEntropyLoss, target: Tensor) -> bool:
    """Whether all targets are labels and none is ignored."""
    if target.is_floating_point() or criterion.ignore_index >= 0:
        return False
    return bool(target.min() >= 0)


def _classes_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.dim() > 2 else x


def _classes_back(rows: Tensor, like: Tensor) -> Tensor:
    if like.dim() <= 2:
        return rows.reshape(like.shape)
    shape = (like.shape[0], *like.shape[2:], like.shape[1])
    return rows.reshape(shape).movedim(-1, 1)
