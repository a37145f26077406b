"""Statistics of batch norm for averaged weights."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsetrain.modes import evaluating
from sparsetrain.soups.members import COUNT, STATISTICS


@torch.no_grad()
def recalibrate(
    module: nn.Module, batches: Iterable[Tensor], *, images: int | None = None, frozen: Collection[nn.Module] = ()
) -> None:
    """Compute the running statistics of batch norm anew: the mean over `batches`, each counting alike.

    Batch norm alone is in training mode meanwhile: dropout is off, other layers are as in evaluation. Nothing but
    the running statistics changes, and after an error these have not either. A module without batch norm is left alone,
    and so are layers that no batch reaches, such as those of a teacher or of a head that `forward` does not call.

    Args:
        module: is called with each batch.
        batches: inputs on the module's device, such as those of a loader with a fixed seed; the same ones for every
            model that is compared, and on every rank.
        images: ends with the batch in which so many inputs have been seen; None takes all batches.
        frozen: layers whose statistics stay, too.

    Raises:
        ValueError: no batch.

    Source: Zimmer et al. 2024, arXiv:2306.16788; Izmailov et al. 2018, arXiv:1803.05407.
    Differs: the authors' code leaves the momentum of the layers as it is, so that late batches count more.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    norms = [layer for layer in norms if layer not in frozen]
    if not norms:
        return
    momentum = [layer.momentum for layer in norms]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in norms]
    seen = 0
    try:
        with evaluating(module):
            for layer in norms:
                layer.training, layer.momentum = True, None  # None: the mean over all batches
                layer.reset_running_stats()
            for batch in batches:
                module(batch)
                seen += len(batch)
                if images is not None and seen >= images:
                    break
        if not seen:
            raise ValueError("There is no batch to recalibrate batch norm with. Give at least one.")
        unchanged = [not int(layer.get_buffer(COUNT)) for layer in norms]
    except BaseException:
        unchanged = [True] * len(norms)
        raise
    finally:
        for layer, buffers, stays in zip(norms, before, unchanged, strict=True):
            for name in STATISTICS if stays else ():
                layer.get_buffer(name).copy_(buffers[name])
        for layer, was_momentum, buffers in zip(norms, momentum, before, strict=True):
            layer.momentum = was_momentum
            layer.get_buffer(COUNT).copy_(buffers[COUNT])
