import pytest
import torch

from sparsetrain.models import timm_model


def test_a_timm_model_gets_its_classes_and_channels():
    network = timm_model("resnet10t", num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.1).eval()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_options_left_at_none_are_the_models_own():
    assert timm_model("vit_tiny_patch16_224", num_classes=2).patch_embed.img_size == (224, 224)
    assert timm_model("vit_tiny_patch16_224", num_classes=2, img_size=32).patch_embed.img_size == (32, 32)


def test_an_unknown_name_is_an_error_that_lists_near_names():
    with pytest.raises(ValueError, match=r"'resnet5O'.*Near names: .*resnet50"):
        timm_model("resnet5O", num_classes=10)
    with pytest.raises(ValueError, match=r"See timm.list_models\(\)"):
        timm_model("?", num_classes=10)


def test_zero_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes=0"):
        timm_model("resnet10t", num_classes=0)


def test_weights_that_cannot_be_downloaded_are_an_error_with_the_remedy(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(RuntimeError, match=r"'resnet10t'.*no route.*pretrained=false"):
        timm_model("resnet10t", num_classes=10, pretrained=True)
