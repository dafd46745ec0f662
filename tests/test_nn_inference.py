"""Evaluation mode: folded and fused it gives what the layers give one by one, and never a result of old parameters."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import nn
from tilewise.nn.models.blocks import NamedResidual


class Doubled(nn.Module):
    """x as float64, which a convolution of float32 cannot add."""

    def forward(self, x):
        return x.astype(np.float64)


# network, shape of x, terms of the longest sum, times the layers that it goes through
NETWORKS = {
    "mlp": ("mlp((6, 8, 5), batch_norm=True, rng=rng)", (4, 6), 16),
    "lenet5": ("lenet5(activation='tanh', pool='avg', rng=rng)", (2, 1, 32, 32), 400 * 5),
    "vgg11": ("vgg11(5, width=8, hidden=16, rng=rng)", (2, 3, 32, 32), 576 * 11),
    "vgg16 with batch norm": ("vgg16(5, width=4, hidden=16, batch_norm=True, rng=rng)", (2, 3, 32, 32), 288 * 16),
    "resnet18": ("resnet18(5, width=8, rng=rng)", (2, 3, 65, 64), 576 * 18),
    "resnet50": ("resnet50(5, width=4, rng=rng)", (1, 3, 64, 65), 288 * 50),
    "googlenet": ("googlenet(5, width=16, transform_input=True, rng=rng)", (2, 3, 33, 48), 432 * 22),
    "mobilenet_v2": ("mobilenet_v2(5, width_mult=0.25, rng=rng)", (2, 3, 64, 64), 1280 * 53),
}
ACTIVATIONS = ("Identity()", "ReLU()", "ReLU6()", "LeakyReLU()", "LeakyReLU(0.3)", "Sigmoid()", "Tanh()", "Softmax(1)")
CONVOLUTIONS = {
    "no bias": "Conv2d(6, 6, 3, padding=1, bias=False, rng=0)",
    "bias": "Conv2d(6, 6, 3, padding=1, rng=0)",
    "groups": "Conv2d(6, 6, 3, padding=1, groups=2, rng=0)",
    "depthwise": "Conv2d(6, 6, 3, padding=1, groups=6, bias=False, rng=0)",
    "1x1": "Conv2d(6, 6, 1, rng=0)",
    "dilated": "Conv2d(6, 6, 3, padding='same', dilation=2, rng=0)",
    "reflect": "Conv2d(6, 6, 3, padding=1, padding_mode='reflect', rng=0)",
    "circular": "Conv2d(6, 6, 3, padding=1, padding_mode='circular', bias=False, rng=0)",
    "padded by a value": "Conv2d(6, 6, 3, padding=1, padding_value=2.0, rng=0)",
}
TERMS = 6 * 9 * 4


def with_statistics(model, rng):
    """Nothing about its batch norms is trivial."""
    for _, module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean[...] = rng.uniform(-0.5, 0.5, module.num_features)
            module.running_var[...] = rng.uniform(0.5, 2, module.num_features)
            if module.weight is not None:
                module.weight.data[...] = rng.uniform(-1.5, 1.5, module.num_features)
                module.bias.data[...] = rng.uniform(-0.5, 0.5, module.num_features)
    return model


def one_by_one(module, x):
    """The layers' own results, of a copy: what is prepared in the module itself stays as it is."""
    return _layer_by_layer(copy.deepcopy(module).eval(), x)


def _layer_by_layer(module, x):
    if isinstance(module, NamedResidual):
        module = module._residual()
    if isinstance(module, nn.Residual):
        y = _layer_by_layer(module.main, x)
        y = y + (x if module.shortcut is None else _layer_by_layer(module.shortcut, x))
        return y if module.activation is None else _layer_by_layer(module.activation, y)
    if isinstance(module, nn.Concat):
        return np.concatenate([_layer_by_layer(branch, x) for branch in module], module.axis)
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = _layer_by_layer(layer, x)
        return x
    return module(x)


def images(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


@pytest.fixture
def no_batch_norm(monkeypatch):
    """Batch norms of images must not be computed: they are folded."""

    def forward(self, x):
        raise AssertionError("a batch norm was not folded")

    monkeypatch.setattr(nn.BatchNorm2d, "forward", forward)


def unit(rng, activation="ReLU()", convolution=CONVOLUTIONS["no bias"]):
    layers = [eval(f"nn.{text}") for text in (convolution, "BatchNorm2d(6)", activation)]
    return with_statistics(nn.Sequential(*layers), rng).eval()


class TestFolded:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_networks(self, rng, network):
        text, shape, terms = NETWORKS[network]
        model = with_statistics(eval(f"nn.models.{text}", {"nn": nn, "rng": rng}), rng).eval()
        x = images(rng, *shape)
        assert_close(model(x), one_by_one(model, x), terms)

    @pytest.mark.parametrize("network", ["vgg16 with batch norm", "resnet18", "resnet50", "googlenet", "mobilenet_v2"])
    def test_no_batch_norm_is_left(self, rng, no_batch_norm, network):
        text, shape, _ = NETWORKS[network]
        eval(f"nn.models.{text}", {"nn": nn, "rng": rng}).eval()(images(rng, *shape))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("convolution", CONVOLUTIONS)
    def test_units(self, rng, activation, convolution):
        model, x = unit(rng, activation, CONVOLUTIONS[convolution]), 20 * images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    @pytest.mark.parametrize("shortcut", ["none", "convolution", "activated"])
    def test_residual_blocks(self, rng, activation, shortcut):
        main = nn.Sequential(unit(rng), unit(rng, "Identity()"))
        other = {"none": None, "convolution": unit(rng, "Dropout()"), "activated": unit(rng)}[shortcut]
        last = activation and eval(f"nn.{activation}")
        model = nn.Sequential(nn.Residual(main, other, last), nn.ReLU()).eval()
        x = images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), 2 * TERMS)

    @pytest.mark.parametrize("last", ["ReLU()", "MaxPool2d(3, 1, 1)"])
    def test_residual_block_whose_branch_ends_otherwise(self, rng, last):
        model, x = nn.Residual(unit(rng, last), activation=nn.ReLU()).eval(), images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), TERMS)

    def test_batch_norm_after_the_sum_is_not_folded_into_a_branch(self, rng):
        block = nn.Residual(nn.Conv2d(6, 6, 3, padding=1, rng=0))
        model = with_statistics(nn.Sequential(block, nn.BatchNorm2d(6)), rng).eval()
        x = images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("later", ["NNRN", "RN"])
    def test_two_batch_norms_and_one_after_the_activation(self, rng, later):
        layers = [nn.Conv2d(6, 6, 3, rng=0), *(nn.BatchNorm2d(6) if kind == "N" else nn.ReLU() for kind in later)]
        model, x = with_statistics(nn.Sequential(*layers), rng).eval(), images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), TERMS)

    def test_branches(self, rng):
        model = nn.Concat(unit(rng), nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(rng, "Tanh()"))).eval()
        x = images(rng, 2, 6, 7, 8)
        assert_close(model(x), one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_dtypes(self, rng, dtype):
        """float16 is rounded once, at the end, so that it is as near to float32 as one rounding is."""
        model, wide = (
            nn.Sequential(nn.Conv2d(6, 5, 3, rng=0, dtype=d), nn.BatchNorm2d(5, dtype=d), nn.ReLU()).eval()
            for d in (dtype, np.float32 if dtype == np.float16 else dtype)
        )
        wide.load_state_dict(with_statistics(model, rng).state_dict())
        x = images(rng, 2, 6, 7, 8, dtype=dtype)
        assert model(x).dtype == dtype
        assert_close(model(x), one_by_one(wide, x.astype(wide[0].weight.dtype)), TERMS)

    def test_nhwc_and_a_batch_norm_of_another_layout(self, rng):
        x = images(rng, 2, 6, 6, 6)
        for layout in ("NHWC", "NCHW"):
            layers = nn.Conv2d(6, 6, 3, padding=1, layout="NHWC", rng=0), nn.BatchNorm2d(6, layout=layout), nn.ReLU()
            model = with_statistics(nn.Sequential(*layers), rng).eval()
            assert_close(model(x), one_by_one(model, x), TERMS)

    def test_batch_norm_without_affine(self, rng, no_batch_norm):
        model = nn.Sequential(nn.Conv2d(6, 6, 3, rng=0), nn.BatchNorm2d(6, affine=False)).eval()
        model[1].running_var[...] = 4
        x = images(rng, 2, 6, 7, 8)
        assert_close(model(x), model[0](x) / np.sqrt(np.float32(4 + 1e-5)), TERMS)

    def test_layers_of_other_classes_are_called(self, rng):
        class Doubled(nn.ReLU):
            def forward(self, x):
                return 2 * super().forward(x)

        class Halved(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) / 2

        class Twice(nn.Sequential):
            def forward(self, x):
                return super().forward(super().forward(x))

        inner = Twice(Halved(6, 6, 3, padding=1, rng=0), nn.BatchNorm2d(6), Doubled())
        model, x = nn.Sequential(with_statistics(inner, rng), nn.ReLU()).eval(), images(rng, 2, 6, 7, 8)
        expected = x
        for _ in range(2):
            for layer in inner:
                expected = layer(expected)
        assert_close(model(x), np.maximum(expected, 0), TERMS * 2)


def large(rng):
    """A weight of which evaluation looks at a sample only."""
    layers = [nn.Conv2d(6, 120, 3, padding=1, rng=0), nn.BatchNorm2d(120), nn.LeakyReLU(), nn.Dropout(0.5, rng=0)]
    return with_statistics(nn.Sequential(nn.Residual(nn.Sequential(*layers), nn.Conv2d(6, 120, 1, rng=1))), rng).eval()


def _other_array(model):
    """An array that differs in a single number that is not in the sample."""
    data = model[0].main[0].weight.data.copy()
    data[0, 0, 0, 1] += 5
    model[0].main[0].weight.data = data


def _step_of_one_number(model):
    """An update of a single number that is not in the sample."""
    weight = model[0].main[0].weight
    weight.grad = np.zeros_like(weight.data)
    weight.grad[0, 0, 0, 1] = 5
    nn.SGD([weight], 1.0).step()


def _state(model):
    state = model.state_dict()
    state["0.main.0.weight"][0, 0, 0, 1] += 5
    model.load_state_dict(state)


CHANGES = {
    "a parameter in place": lambda main: main[0].weight.data.__imul__(np.float32(2)),
    "a bias in place": lambda main: main[0].bias.data.__setitem__(3, 7),
    "a parameter assigned": lambda main: setattr(main[0].weight, "data", main[0].weight.data + 1),
    "a running mean in place": lambda main: main[1].running_mean.__setitem__(119, 5),
    "a running variance assigned": lambda main: setattr(main[1], "running_var", main[1].running_var * 4),
    "batch norm's weight": lambda main: main[1].weight.data.__setitem__(0, -9),
    "batch norm's bias": lambda main: main[1].bias.data.fill(3),
    "eps": lambda main: setattr(main[1], "eps", 0.5),
    "dilation": lambda main: (setattr(main[0], "dilation", (2, 2)), setattr(main[0], "padding", ((2, 2), (2, 2)))),
    "slope": lambda main: setattr(main[2], "negative_slope", 0.5),
    "activation replaced": lambda main: main.__setitem__(2, nn.Tanh()),
    "convolution replaced": lambda main: main.__setitem__(0, nn.Conv2d(6, 120, 3, padding=1, rng=5)),
    "batch norm replaced": lambda main: main.__setitem__(1, nn.BatchNorm2d(120).eval()),
}

SET = {
    "a parameter's array": lambda main: (main[0].weight, "data", main[0].weight.data + 1),
    "a statistic": lambda main: (main[1], "running_var", main[1].running_var * 4),
    "an option": lambda main: (main[1], "eps", 0.5),
    "an activation's option": lambda main: (main[2], "negative_slope", 0.5),
    "a method": lambda main: (main[2], "forward", np.tanh),
    "a module": lambda main: (main, "2", nn.Tanh().eval()),
}


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES)
    def test_changes_in_evaluation_mode(self, rng, change):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        before = model(x)
        CHANGES[change](model[0].main)
        model.eval()
        assert not np.array_equal(model(x), before)
        assert_close(model(x), one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("place", SET)
    def test_a_single_attribute_set(self, rng, place):
        """All is made before, and nothing else is set, such as the mode by eval()."""
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        owner, name, value = SET[place](model[0].main)
        before = model(x)
        setattr(owner, name, value)
        after = model(x)
        assert not np.array_equal(after, before)
        assert_close(after, one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("change", [_step_of_one_number, _other_array, _state])
    def test_changes_that_no_sample_shows(self, rng, change):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        before = model(x)
        change(model)
        assert not np.array_equal(model(x), before)
        assert_close(model(x), one_by_one(model, x), TERMS)

    def test_release_is_for_single_numbers_of_large_weights(self, rng):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        model(x)
        model[0].main[0].weight.data[0, 0, 0, 1] += 5
        model.release()
        assert_close(model(x), one_by_one(model, x), TERMS)

    def test_parts_of_a_residual_block_replaced(self, rng):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        main, shortcut = (nn.Conv2d(6, 120, 1, rng=seed) for seed in (7, 8))
        for name, part in {"shortcut": shortcut, "activation": nn.Sigmoid(), "main": main}.items():
            model(x)
            setattr(model[0], name, part.eval())
            assert_close(model(x), one_by_one(model, x), TERMS)

    def test_a_part_in_training_mode_trains(self, rng):
        model, x = large(rng), images(rng, 2, 6, 5, 5)
        settled = model(x)
        model[0].main[3].train()  # dropout at inference, as for Monte Carlo
        assert not np.array_equal(model(x), model(x))
        model[0].main[1].train()
        mean = model[0].main[1].running_mean.copy()
        model(x)
        assert not np.array_equal(model[0].main[1].running_mean, mean)
        model.eval()
        model[0].main[1].running_mean[...] = mean
        assert not np.array_equal(model(x), settled)  # the variance has moved
        assert_close(model(x), one_by_one(model, x), TERMS)

    @pytest.mark.parametrize("shape", [(512, 128, 1, 1), (2048, 8, 1, 1), (1024, 4, 3, 3)], ids=str)
    def test_any_filter_set_to_zero_is_noticed(self, rng, shape):
        outputs, channels, size, _ = shape
        layer = nn.Conv2d(channels, outputs, size, bias=False, rng=0).eval()
        x = images(rng, 1, channels, size, size)
        layer(x)
        for i in (0, 1, outputs // 3, outputs // 2 + 1, outputs - 1, *rng.integers(0, outputs, 20)):
            layer.weight.data[i] = 0
            assert layer(x)[0, i] == 0

    def test_a_filter_of_a_view_set_to_zero_is_noticed(self, rng):
        layer = nn.Conv2d(64, 128, 1, bias=False, rng=0).eval()
        layer.weight.data = rng.standard_normal((128, 128, 1, 1), dtype=np.float32)[:, ::2]
        x = images(rng, 1, 64, 3, 3)
        layer(x)
        layer.weight.data[77] = 0
        assert layer(x)[0, 77].max() == 0

    def test_a_filter_among_interleaved_ones_set_to_zero_is_noticed(self, rng):
        layer = nn.Conv2d(64, 280, 1, bias=False, rng=0).eval()
        layer.weight.data = rng.standard_normal((1, 1, 64, 280), dtype=np.float32).transpose(3, 2, 0, 1)
        x = images(rng, 1, 64, 3, 3)
        layer(x)
        for i in (1, 2, 77, 279):
            layer.weight.data[i] = 0
            assert layer(x)[0, i].max() == 0

    def test_no_longer_used_it_goes_at_once(self, rng):
        model = nn.models.resnet18(3, width=8, rng=0).eval()
        model(images(rng, 1, 3, 32, 32))
        weight = weakref.ref(model.conv1.weight)
        gc.disable()
        try:
            del model
            assert weight() is None
        finally:
            gc.enable()

    def test_what_only_layers_one_by_one_can_compute_is_told(self, rng):
        model = nn.Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, rng=0)), Doubled()).eval()
        x = images(rng, 1, 6, 5, 5)
        with pytest.warns(RuntimeWarning, match="layer by layer"):
            y = model(x)
        assert y.dtype == np.float64

    def test_a_forward_of_an_instance_is_called(self, rng):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        model(x)
        model[0].main[1].forward = np.zeros_like
        assert_close(model(x), one_by_one(model[0].shortcut, x), TERMS)
        del model[0].main[1].forward
        assert_close(model(x), one_by_one(model, x), TERMS)

    def test_a_slice_and_its_network_alternate(self, rng):
        model, x = unit(rng), images(rng, 1, 6, 5, 5)
        for _ in range(2):
            assert_close(model(x), one_by_one(model, x), TERMS)
            assert_close(model[:1](x), one_by_one(model[0], x), TERMS)

    def test_copies_and_pickles_go_without(self, rng):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        names = list(model.state_dict())
        y = model(x)
        assert list(model.state_dict()) == names
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other._program is None
            other[0].main[0].weight.data += 1
            assert not np.array_equal(other(x), y)
        np.testing.assert_array_equal(model(x), y)


class TestTraining:
    def steps(self, rng, evaluate: bool):
        model = nn.models.resnet18(3, width=8, rng=0)
        optimizer, loss = nn.SGD(model.parameters(), 0.1, momentum=0.9), nn.CrossEntropyLoss()
        x, y = images(rng, 4, 3, 32, 32), np.array([0, 1, 2, 0])
        for _ in range(2):
            if evaluate:
                model.eval()(x[:1])
            loss(model.train()(x), y)
            if evaluate:
                model.eval()(x[:1])  # between forward and backward
            optimizer.zero_grad()
            model.backward_parameters(loss.backward())
            optimizer.step()
        return model

    def test_after_evaluation_equals_training_without(self):
        plain, evaluated = (self.steps(np.random.default_rng(1), evaluate) for evaluate in (False, True))
        for (name, a), b in zip(plain.state_dict().items(), evaluated.state_dict().values(), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)

    @pytest.mark.parametrize("call", ["backward", "backward_parameters"])
    def test_backward_after_evaluation_is_refused(self, rng, call):
        model = nn.models.resnet18(3, width=8, rng=0).eval()
        y = model(images(rng, 1, 3, 32, 32))
        with pytest.raises(RuntimeError, match="nothing to go back from; call forward in training mode first"):
            getattr(model, call)(y)


class TestCalls:
    def test_wrong_x_is_refused_by_the_layer(self, rng):
        model = nn.models.resnet18(3, width=8, rng=0).eval()
        with pytest.raises(ValueError, match="weight expects 3 channels") as caught:
            model(images(rng, 1, 4, 32, 32))
        assert caught.value.__notes__ == ["in layer conv1 (Conv2d), called with x of shape (1, 4, 32, 32)"]
        with pytest.raises(ValueError, match="BatchNorm2d: x must have 4 dimensions"):
            unit(rng)(images(rng, 6, 5, 5))
        with pytest.raises(TypeError, match="float64"):
            model(np.zeros((1, 3, 32, 32)))

    def test_branches_that_do_not_fit_are_refused(self, rng):
        x = images(rng, 1, 6, 5, 5)
        with pytest.raises(ValueError, match="Residual: main gives shape"):
            nn.Residual(nn.Conv2d(6, 5, 1, rng=0)).eval()(x)
        with pytest.raises(ValueError, match="Residual: main gives shape"):
            nn.Residual(nn.AdaptiveAvgPool2d(1)).eval()(x)
        with pytest.raises(ValueError, match="Concat: the branches' shapes must agree"):
            nn.Concat(nn.Conv2d(6, 5, 1, rng=0), nn.MaxPool2d(2)).eval()(x)

    def test_threads_share_a_network(self, rng):
        model, x = large(rng), images(rng, 1, 6, 5, 5)
        expected = one_by_one(model, x)
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(model, [x] * 8):
                assert_close(y, expected, TERMS)

    def test_the_input_is_left_as_it_was(self, rng):
        x = images(rng, 1, 6, 5, 5) * 10
        before = x.copy()
        for model in (nn.Sequential(nn.Identity(), nn.ReLU6()), nn.Residual(nn.Identity(), None, nn.ReLU6())):
            model.eval()(x)
            np.testing.assert_array_equal(x, before)

    def test_the_reference_backend_gives_the_same(self, rng):
        model, x = unit(rng), images(rng, 1, 6, 5, 5)
        with tilewise.using(backend="reference"):
            expected = model(x)
        assert_close(model(x), expected, TERMS)
