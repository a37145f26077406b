"""A shrunk network is an ordinary one: exported to ONNX, it computes the same in onnxruntime, at any batch size."""

import math

import pytest
import timm
import torch

from sparsetrain.export import shrink, silence, units
from sparsetrain.models import CifarResNet

TOLERANCE = 1e-4


def vision_transformer():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: CifarResNet(8, 3, width=4), (3, 8, 8)), (vision_transformer, (3, 32, 32))],
    ids=["channels of a residual network", "heads and hidden units of a transformer"],
)
def test_onnxruntime_computes_what_the_network_with_silent_units_does(make, shape):
    import onnxruntime  # late: it takes a while to load, and no other test needs it

    torch.manual_seed(0)
    model, example = make().eval(), torch.randn(2, *shape)
    images = torch.randn(5, *shape)
    with torch.no_grad():
        dense = model(images)
        chosen = units(model, example)[1::3]
        silence(model, chosen)
        silent = model(images)
    small = shrink(model, chosen, example)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(small, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)

    exported = program.model_proto
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert (torch.from_numpy(made) - silent).abs().max() <= TOLERANCE
    assert (dense - silent).abs().max() > 100 * TOLERANCE
    values = sum(math.prod(tensor.dims) for tensor in exported.graph.initializer)
    assert values < 0.8 * sum(parameter.numel() for parameter in model.parameters())
