"""AuxiliaryLoss: the weighted sum and its gradients, and trainings with it."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import nn

LOSSES = {
    "classes": (lambda of, r: of.CrossEntropyLoss(reduction=r), lambda rng: rng.integers(0, 5, 4)),
    "numbers": (lambda of, r: of.MSELoss(reduction=r), lambda rng: rng.standard_normal((4, 5))),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("loss", "target"), LOSSES.values(), ids=LOSSES)
def test_equals_pytorchs_sum(torch, rng, loss, target, reduction):
    outputs, target = tuple(rng.standard_normal((3, 4, 5))), target(rng)
    ours, theirs = nn.AuxiliaryLoss(loss(nn, reduction), (0.3, 0.2)), loss(torch.nn, reduction)
    tensors = [torch.tensor(y, requires_grad=True) for y in outputs]
    expected = sum(w * theirs(y, torch.tensor(target)) for w, y in zip((1, 0.3, 0.2), tensors, strict=True))
    cotangent = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(cotangent))
    assert_close(np.asarray(ours(outputs, target)), expected.detach().numpy(), 60)
    grads = ours.backward(cotangent if reduction == "none" else float(cotangent))
    assert len(grads) == 3
    for grad, tensor in zip(grads, tensors, strict=True):
        assert_close(grad, tensor.grad.numpy(), 60)
    with pytest.raises(RuntimeError, match=r"AuxiliaryLoss\.backward: call the loss first"):
        ours.backward()


def test_of_an_array_it_is_the_loss_alone(rng):
    logits, target = rng.standard_normal((4, 3)), np.array([0, 1, -100, 2])
    alone, loss = nn.CrossEntropyLoss([1.0, 2.0, 3.0]), nn.AuxiliaryLoss(nn.CrossEntropyLoss([1.0, 2.0, 3.0]))
    assert loss(logits, target) == alone(logits, target)
    assert loss.samples(target) == alone.samples(target) == 6
    np.testing.assert_array_equal(loss.backward(), alone.backward())


class Heads(nn.Module):
    """A dense layer and two heads beside it, as GoogLeNet has them."""

    def __init__(self):
        self.main, self.aux2, self.aux1 = (nn.Linear(6, 3, rng=seed) for seed in range(3))

    def forward(self, x) -> Any:
        return (self.main(x), self.aux2(x), self.aux1(x)) if self.training else self.main(x)

    def backward(self, grad) -> Any:
        layers = (self.main, self.aux2, self.aux1)
        return sum(layer.backward(part) for layer, part in zip(layers, grad, strict=True))


class TestFit:
    X = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    Y = X[:, :3].argmax(1)

    def fit(self, loss, **options):
        model = Heads()
        options = {"epochs": 2, "batch_size": 16, "shuffle": False, "progress": False} | options
        return model, nn.fit(model, loss, nn.SGD(model.parameters(), 0.5), self.X, self.Y, **options)

    def test_every_head_learns_at_its_weight(self):
        """The heads share no layer, so each is trained as alone, with a learning rate of its weight's share."""
        metrics = {"top2": nn.top_k_accuracy(2)}
        model, history = self.fit(nn.AuxiliaryLoss(nn.CrossEntropyLoss()), metrics=metrics, validation=(self.X, self.Y))
        sums = np.zeros(2)
        for name, share in (("main", 1.0), ("aux2", 0.3), ("aux1", 0.3)):
            head = getattr(Heads(), name)
            expected = nn.fit(
                head, nn.CrossEntropyLoss(), nn.SGD(head.parameters(), 0.5 * share), self.X, self.Y, epochs=2,
                batch_size=16, shuffle=False, progress=False, metrics=metrics, validation=(self.X, self.Y),
            )  # fmt: skip
            assert_close(getattr(model, name).weight.data, head.weight.data, 200)
            sums += share * np.array(expected.loss)
            if name == "main":
                assert history.accuracy == expected.accuracy
                assert history["top2"] == expected["top2"]
                assert_close(np.array(history.val_loss), np.array(expected.val_loss), 200, dtype=np.float32)
        assert_close(np.array(history.loss), sums, 200, dtype=np.float32)

    def test_googlenet(self, rng):
        model = nn.models.googlenet(2, width=16, aux_logits=True, rng=0)
        before = model.state_dict()
        x, y = rng.standard_normal((4, 3, 32, 32)).astype(np.float32), np.array([0, 1, 0, 1])
        loss, optimizer = nn.AuxiliaryLoss(nn.CrossEntropyLoss()), nn.SGD(model.parameters(), 0.1)
        with tilewise.using(backend="reference"):
            history = nn.fit(model, loss, optimizer, x, y, epochs=1, validation=(x, y), progress=False)
            assert nn.evaluate(model, loss, x, y).loss == pytest.approx(history.val_loss[0])
        assert history.loss[0] > 1.4 * history.val_loss[0]
        after = model.state_dict()
        assert all((after[f"{name}.weight"] != before[f"{name}.weight"]).any() for name in ("aux1.fc2", "aux2.fc2"))

    def test_wrong_classes_are_found_before_the_first_step(self):
        model, y = Heads(), np.where(np.arange(40) == 39, 9, self.Y)
        loss, optimizer = nn.AuxiliaryLoss(nn.CrossEntropyLoss()), nn.SGD(model.parameters(), 0.5)
        with pytest.raises(ValueError, match="classes must be from 0 to 2, got 0 to 9"):
            nn.fit(model, loss, optimizer, self.X, y, epochs=1, batch_size=16, shuffle=False, progress=False)
        np.testing.assert_array_equal(model.aux1.weight.data, Heads().aux1.weight.data)

    def test_without_it_the_error_names_it(self):
        with pytest.raises(TypeError, match=r"array, got a tuple of 3 \(tuple\); AuxiliaryLoss takes several"):
            self.fit(nn.CrossEntropyLoss())
        with pytest.raises(TypeError, match="CrossEntropyLoss: prediction must be an array, got a tuple of 3"):
            nn.CrossEntropyLoss()(Heads()(self.X), self.Y)

    def test_a_checkpoint_knows_its_options(self, tmp_path):
        path = tmp_path / "training.npz"
        self.fit(nn.AuxiliaryLoss(nn.CrossEntropyLoss(label_smoothing=0.1)), checkpoint=path)
        self.fit(nn.AuxiliaryLoss(nn.CrossEntropyLoss(label_smoothing=0.1)), checkpoint=path, epochs=3)
        for loss, message in (
            (nn.AuxiliaryLoss(nn.CrossEntropyLoss(label_smoothing=0.2)), "label_smoothing is 0.1 there and 0.2 here"),
            (nn.AuxiliaryLoss(nn.CrossEntropyLoss(label_smoothing=0.1), (0, 1)), r"weights \(0\.3, 0\.3\) there"),
            (nn.AuxiliaryLoss(nn.NLLLoss()), "of NLLLoss with"),
        ):
            with pytest.raises(ValueError, match=message):
                self.fit(loss, checkpoint=path, epochs=4)


def test_copies_and_repr():
    loss = nn.AuxiliaryLoss(nn.MSELoss("sum"), [1])
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.copy(loss)):
        assert repr(other) == "AuxiliaryLoss(MSELoss(reduction='sum'), weights=(1.0,))"
    assert not hasattr(loss, "ignore_index")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.AuxiliaryLoss(np.mean), TypeError, "AuxiliaryLoss: loss must be a Loss"),
        (lambda: nn.AuxiliaryLoss(nn.MSELoss(), 0.3), TypeError, "weights must be a sequence of numbers, got 0.3"),
        (lambda: nn.AuxiliaryLoss(nn.MSELoss(), "ab"), TypeError, "weights must be a sequence of numbers, got 'ab'"),
        (lambda: nn.AuxiliaryLoss(nn.MSELoss(), [-1]), ValueError, "weights must be at least 0 and finite, got -1"),
        (
            lambda: nn.AuxiliaryLoss(nn.MSELoss())((np.ones(2), np.ones(2)), np.ones(2)),
            ValueError,
            "prediction must be a tuple of 3, one more than weights, got one of 2",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
