import pytest
import torch

from sparsetrain.models import LeNet300100


def test_lenet_has_the_266_200_weights_of_the_lottery_ticket_paper():
    network = LeNet300100()
    assert sum(p.numel() for p in network.parameters() if p.ndim > 1) == 784 * 300 + 300 * 100 + 100 * 10 == 266_200
    assert sum(p.numel() for p in network.parameters() if p.ndim == 1) == 300 + 100 + 10


def test_lenet_is_three_matrix_products_with_relu_between():
    network = LeNet300100(input_shape=(1, 8, 8), num_classes=3)
    images = torch.randn(5, 1, 8, 8)
    w = dict(network.named_parameters())
    hidden = (images.reshape(5, 64) @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)
    hidden = (hidden @ w["fc2.weight"].T + w["fc2.bias"]).clamp(min=0)
    torch.testing.assert_close(network(images), hidden @ w["fc3.weight"].T + w["fc3.bias"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": ()}, "positive sizes"),
        ({"input_shape": (1, 0, 28)}, "positive sizes"),
        ({"num_classes": 1}, "at least 2 classes"),
    ],
)
def test_lenet_refuses_sizes_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        LeNet300100(**arguments)


def test_lenet_names_both_shapes_when_a_batch_has_another():
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*\(1, 8, 8\)"):
        LeNet300100()(torch.zeros(2, 1, 8, 8))
