"""Every model of timm, by name."""

import difflib

from torch import nn


def timm_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    in_chans: int = 3,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    img_size: int | None = None,
) -> nn.Module:
    """The timm model called `name`, with a classifier of `num_classes` logits.

    None leaves an option at the model's own default; not every model takes each option (only those with position
    embeddings take `img_size`), and one that does not says so by a TypeError.

    Args:
        name: a name of `timm.list_models()`, with or without a tag, such as "resnet50" or "resnet50.a1_in1k".
        num_classes: number of logits, at least 1.
        pretrained: load timm's weights, which are downloaded unless they are in the local cache.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, in [0, 1).
        drop_path_rate: largest rate of stochastic depth, in [0, 1).
        img_size: height and width of the images in pixels.

    Raises:
        ValueError: no model has that name; near names are listed.
        RuntimeError: the pretrained weights could not be had.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        hint = f"Near names: {', '.join(near)}." if near else "See timm.list_models()."
        raise ValueError(f"timm {timm.__version__} has no model {name!r}. {hint}")
    if num_classes < 1:
        raise ValueError(f"timm_model needs at least 1 class; got num_classes={num_classes}.")
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
        )
    except OSError as error:  # the hub's own errors for "offline", "not cached" and failed requests are OSErrors
        raise RuntimeError(
            f"The pretrained weights of {name!r} could not be loaded ({type(error).__name__}: {error}). Run once with "
            "a connection so that they are cached, or set pretrained=false."
        ) from error
    return model
