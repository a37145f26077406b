import copy
import functools
import math
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import nn

from sparsetrain.models import Classifier, Cosine, LinearDecay, MultiStep
from sparsetrain.steps import RunLength

# The Classifier can validate; most of these fits have no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Batches:
    """A loader: Lightning takes a plain list for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def batches(count, *, size=4, classes=10, shape=(1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, *shape, generator=generator)
    labels = torch.randint(classes, (count, size), generator=generator)
    return Batches(list(zip(images, labels, strict=True)))


def linear(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes))


def convolutional(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
    )


def trainer(tmp_path, callbacks=(), **arguments):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **(defaults | arguments))


graphs = []


@torch._dynamo.register_backend(name="counting")
def counting(graph, example_inputs):
    graphs.append(graph)
    return graph.forward


class Rates(Callback):
    """The learning rate with which each optimizer step was made."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("arguments", "steps_per_epoch", "steps"),
    [
        ({"max_epochs": 3}, 5, 15),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 3, 9),
        ({"max_epochs": 3, "limit_train_batches": 2}, 2, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 2, 6),
        ({"max_steps": 7}, 5, 7),
        ({"max_epochs": 3, "max_steps": 7, "accumulate_grad_batches": 2}, 3, 7),
    ],
)
@pytest.mark.parametrize("policy", [MultiStep(("1ep",), gamma=0.5), Cosine(warmup="2it"), LinearDecay(warmup=0)])
def test_every_optimizer_step_is_made_at_the_policys_rate(tmp_path, policy, arguments, steps_per_epoch, steps):
    rates = Rates()
    model = Classifier(linear(), optimizer=SGD, lr_policy=policy, num_classes=10)
    trainer(tmp_path, [rates], **arguments).fit(model, batches(5))
    run = RunLength(steps_per_epoch=steps_per_epoch, total_steps=steps)
    assert rates.rates == pytest.approx([0.1 * policy.factor(step, run) for step in range(steps)])


def test_a_loader_without_length_serves_policies_in_steps_and_refuses_the_others(tmp_path):
    class Unsized:
        def __iter__(self):
            return iter(batches(5))

    by_steps = Classifier(linear(), optimizer=SGD, lr_policy=Cosine(warmup="1it"), num_classes=10)
    by_epochs = Classifier(linear(), optimizer=SGD, lr_policy=MultiStep(("1ep",)), num_classes=10)
    rates = Rates()
    trainer(tmp_path, [rates], max_steps=4, max_epochs=2).fit(by_steps, Unsized())
    run = RunLength(steps_per_epoch=None, total_steps=4)
    assert rates.rates == pytest.approx([0.1 * Cosine(warmup="1it").factor(step, run) for step in range(4)])
    with pytest.raises(ValueError, match="'1ep' counts epochs"):
        trainer(tmp_path, max_steps=4, max_epochs=2).fit(by_epochs, Unsized())
    with pytest.raises(ValueError, match="Set max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=2).fit(by_steps, Unsized())


def test_a_changing_accumulation_is_refused_where_a_policy_needs_the_number_of_steps(tmp_path):
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    by_policy = Classifier(linear(), optimizer=SGD, lr_policy=Cosine(), num_classes=10)
    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler.*lr_policy=None"):
        trainer(tmp_path, [changing], max_epochs=2).fit(by_policy, batches(2))
    trainer(tmp_path, [changing], max_epochs=2).fit(Classifier(linear(), optimizer=SGD, num_classes=10), batches(2))


def test_without_a_policy_the_rate_is_constant(tmp_path):
    rates = Rates()
    model = Classifier(linear(), optimizer=SGD, num_classes=10)
    trainer(tmp_path, [rates], max_epochs=1).fit(model, batches(3))
    assert rates.rates == [0.1] * 3


def test_training_is_the_plain_torch_loop(tmp_path):
    model = Classifier(linear(), optimizer=SGD, lr_policy=Cosine(warmup=0), num_classes=10, label_smoothing=0.1)
    trainer(tmp_path, max_epochs=2).fit(model, batches(3))

    network = linear()
    optimizer = SGD(network.parameters())
    for step, (images, labels) in enumerate([*batches(3), *batches(3)]):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        log_p = network(images).log_softmax(1)
        (-(0.9 * log_p[range(4), labels] + 0.1 * log_p.mean(1)).mean()).backward()
        optimizer.step()
    for trained, expected in zip(model.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(trained, expected)


def test_logged_values_are_those_of_a_loop_over_the_data(tmp_path):
    data = Batches([*batches(3, size=6), *batches(1, size=2, seed=1)])  # the last batch is smaller
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    model = Classifier(linear(), optimizer=SGD, num_classes=10, label_smoothing=0.3, top_k=(1, 3))
    logged = trainer(tmp_path).validate(model, data, verbose=False)[0]
    logged |= trainer(tmp_path).test(model, data, verbose=False)[0]

    with torch.no_grad():
        logits = linear()(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (ranks < 1).float().mean().item(),
        "top3": (ranks < 3).float().mean().item(),
    }
    assert logged == pytest.approx({f"{stage}/{name}": v for stage in ("val", "test") for name, v in expected.items()})


def test_a_fit_logs_loss_and_accuracy_of_train_and_val(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Classifier(linear(), optimizer=SGD, num_classes=10), batches(3), batches(2, seed=1))
    assert set(run.callback_metrics) == {f"{s}/{n}" for s in ("train", "val") for n in ("loss", "accuracy", "top5")}


@pytest.mark.parametrize(("classes", "names"), [(2, {"accuracy"}), (5, {"accuracy"}), (6, {"accuracy", "top5"})])
def test_a_top_k_that_no_guess_could_miss_is_left_out(tmp_path, classes, names):
    model = Classifier(linear(classes), optimizer=SGD, num_classes=classes, top_k=(5,))
    logged = trainer(tmp_path).test(model, batches(1, classes=classes), verbose=False)[0]
    assert set(logged) == {"test/loss"} | {f"test/{name}" for name in names}


def test_a_checkpoint_loads_with_weights_only_and_resumes(tmp_path):
    def model():
        return Classifier(linear(), optimizer=SGD, lr_policy=Cosine(warmup="1it"), num_classes=10)

    data, path = batches(3), tmp_path / "half.ckpt"
    whole, half, resumed = model(), model(), model()
    trainer(tmp_path, max_epochs=2).fit(whole, data)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)
            trainer.should_stop = True

    trainer(tmp_path, [Stop()], max_epochs=2).fit(half, data)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"network.{name}" for name in linear().state_dict()}
    trainer(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=path)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

    loaded = Classifier.load_from_checkpoint(path, network=linear(), optimizer=SGD, num_classes=10)
    for a, b in zip(half.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_decay_spares_exactly_biases_and_norms():
    optimizer = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    model = Classifier(convolutional(), optimizer=optimizer, num_classes=10, no_decay=True)
    groups = model.configure_optimizers().param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [sorted(p.ndim for p in group["params"]) for group in groups] == [[2, 4], [1, 1, 1, 1]]

    plain = Classifier(convolutional(), optimizer=optimizer, num_classes=10).configure_optimizers()
    assert [(group["weight_decay"], len(group["params"])) for group in plain.param_groups] == [(0.5, 6)]


def test_frozen_parameters_are_not_given_to_the_optimizer():
    network = convolutional()
    network[0].requires_grad_(False)
    optimizer = Classifier(network, optimizer=SGD, num_classes=10).configure_optimizers()
    given = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert given == {id(p) for p in network.parameters() if p.requires_grad}


def test_channels_last_reaches_weights_and_images_and_outlives_a_checkpoint():
    model = Classifier(convolutional(), optimizer=SGD, num_classes=10, channels_last=True)
    seen = []
    model.network[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.load_state_dict(Classifier(convolutional(), optimizer=SGD, num_classes=10).state_dict())
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model.eval()(images), convolutional().eval()(images))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.network[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_compile_runs_the_given_backend_and_keeps_the_parameter_names(tmp_path, again):
    graphs.clear()
    torch.compiler.reset()
    model = again(Classifier(linear(), optimizer=SGD, num_classes=10, compile="counting"))
    assert [name for name, _ in model.named_parameters()] == ["network.1.weight", "network.1.bias"]
    trainer(tmp_path, max_epochs=1).fit(model, batches(3))
    assert len(graphs) == 1

    plain = Classifier(linear(), optimizer=SGD, num_classes=10)
    trainer(tmp_path, max_epochs=1).fit(plain, batches(3))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, "reduce-overhead"])
def test_compile_trains_with_torchs_default_backend_in_a_mode(tmp_path, compiler):
    model = Classifier(linear(), optimizer=SGD, num_classes=10, compile=compiler)
    trainer(tmp_path, max_epochs=1).fit(model, batches(2))
    plain = Classifier(linear(), optimizer=SGD, num_classes=10)
    trainer(tmp_path, max_epochs=1).fit(plain, batches(2))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "at least 2 classes"),
        ({"num_classes": 10, "label_smoothing": 1.0}, r"\[0, 1\); got 1.0"),
        ({"num_classes": 10, "top_k": (0,)}, r"at least 1; got \(0,\)"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classifier(linear(), optimizer=SGD, **arguments)
