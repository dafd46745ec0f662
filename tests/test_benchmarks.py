"""The benchmarks' measuring, checking and reporting."""

import json
import re
from functools import partial

import numba
import numpy as np
import pytest
from installation import ROOT

import tilewise
from tilewise import nn
from tilewise.benchmarks import dtypes, engines, models, peers, report, suite, table, timing
from tilewise.benchmarks.cases import ALL
from tilewise.benchmarks.timing import Comparison, Timing


def comparison(op="relu", layer="resnet50.relu1", ours=1e-3, numpy=4e-3) -> Comparison:
    case = ALL[f"{op} {layer}"]
    times = Timing(ours, ours * 1.1, 0.05, 9), Timing(numpy, numpy * 1.2, 0.1, 3)
    return Comparison(op, layer, case.shape, "float32", case.flops, case.bytes(4), case.rate_unit, *times)


def test_measure_times_each_engine_in_blocks():
    order = []
    engines = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = timing.measure(engines, seconds=0.01)
    turns = re.sub(r"(a+|b+)", lambda run: run[0][0], "".join(order))
    assert turns == "ab" * (1 + timing.BLOCKS)  # the calls that set the number of calls, then the blocks
    for of in timings.values():
        assert 0 < of.best <= of.median
        assert of.samples >= timing.BLOCKS


def test_measure_tells_a_slow_engine_from_a_fast_one():
    array = np.ones(200_000)
    timings = timing.measure({"once": array.sum, "ten times": lambda: [array.sum() for _ in range(10)]}, seconds=0.1)
    assert 5 < timings["ten times"].best / timings["once"].best < 20


@pytest.mark.parametrize("wrong", [lambda y: y + 1e-3, lambda y: y * np.nan, lambda y: y[:, ::-1]])
def test_a_wrong_result_is_not_timed(wrong, monkeypatch):
    right = tilewise.softmax

    def softmax(x, axis):
        from tilewise.kernels import settings

        y = right(x, axis)
        return y if settings.active().backend == "reference" else wrong(y)

    monkeypatch.setattr(tilewise, "softmax", softmax)
    case = ALL["softmax resnet50.classes"].with_batch(3)
    with pytest.raises(AssertionError, match=r"softmax resnet50.classes float32: off by"):
        timing.compare(case, "float32")
    monkeypatch.setattr(tilewise, "softmax", right)
    timing.checked(case, "float32")


def test_operands_are_the_same_each_time():
    case = ALL["batch_norm resnet50.conv5.bn3.train"].with_batch(2)
    first, second = timing.prepared(case, "float32"), timing.prepared(case, "float32")
    np.testing.assert_array_equal(first(), second())


def test_row_of_the_table():
    cells = table.row(comparison())
    assert cells[:4] == ("relu", "resnet50.relu1", "8x64x112x112", "float32")
    assert cells[4:] == ("1.00 ms", "51.4 GB/s", "4.00 ms", "4.0x", "5%, 10%")
    assert table.row(comparison(ours=8e-3))[7] == "0.50x"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.1234, "123 ms"), (1.5e-3, "1.50 ms"), (42e-6, "42.0 us"), (3e-7, "0.300 us")],
)
def test_duration(seconds, text):
    assert table.duration(seconds) == text


def test_tables_without_rich():
    lines = table.text([("a", "1"), ("bb", "22")], ("name", "n"), left=1).splitlines()
    assert lines == ["name   n", "----  --", "a      1", "bb    22"]
    assert table.markdown([("a", "1")], ("name", "n"), left=1).splitlines() == [
        "| name | n |",
        "| :-- | --: |",
        "| a | 1 |",
    ]


def test_records_come_back_in_order_and_the_latest_wins(tmp_path, monkeypatch):
    file = tmp_path / "records.jsonl"
    monkeypatch.setenv("TILEWISE_BENCH_RECORDS", str(file))
    later = comparison("matmul", "square.128", ours=2e-3)
    for one in (comparison(), comparison("matmul", "square.128"), later):
        suite.keep(one)
    assert report.read_records(file) == [later, comparison()]
    assert report.read_records(tmp_path / "none") == []


def test_report_saves_under_the_device_s_name_and_fills_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.cases, "suite", lambda: {"relu resnet50.relu1": ALL["relu resnet50.relu1"]})
    records, readme = tmp_path / "records.jsonl", tmp_path / "README.md"
    records.write_text(json.dumps(comparison().as_dict()) + "\n")
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\ntail\n")
    results = ["--results", str(tmp_path)]
    assert report.main(["--records", str(records), *results]) == 0
    (saved,) = tmp_path.glob("*.json")
    device = tilewise.devices()[0].name
    assert saved.name.startswith(re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-"))
    assert json.loads(saved.read_text())["device"].startswith(device)
    assert report.main(["--readme", str(readme), *results]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n" + report.BEGIN)
    assert text.endswith(f"{report.END}\n\ntail\n")
    assert "old" not in text
    assert "| relu | resnet50.relu1 | 8x64x112x112 | float32 | 1.00 ms | 51.4 GB/s | 4.00 ms | 4.0x |" in text
    assert device in text
    capsys.readouterr()


def test_processors_of_one_name_have_records_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CPU_NAME", "znver3")
    third = report.machine()
    monkeypatch.setattr(numba.config, "CPU_NAME", "znver4")
    fourth = report.machine()
    assert third["device"].endswith(" (znver3)")
    assert report.result_file(third, tmp_path) != report.result_file(fourth, tmp_path)


def test_report_fails_for_a_case_without_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report.cases, "suite", lambda: {"relu resnet50.relu1": None})
    assert report.main(["--records", str(tmp_path / "none"), "--results", str(tmp_path)]) == 1
    assert "1 cases have no result (see asv's output above): relu resnet50.relu1" in capsys.readouterr().err


def test_report_says_what_is_not_measured_and_why(capsys):
    report.print_devices()
    printed = capsys.readouterr().out
    for device in tilewise.devices():
        assert device.name in printed
        assert all(why in printed for why in device.backends.values() if why)


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="the README must have the markers"):
        report.fill("no markers", [])


def test_readme_has_the_markers():
    assert report.BEGIN in report.fill((ROOT / "README.md").read_text(encoding="utf-8"), [])


def test_float64_is_compared_with_float32_by_its_own_algorithm(planned_anew):
    """Both gradients of a layer that float32 takes by Winograd."""
    from tilewise.kernels import operation
    from tilewise.kernels.cpu import conv_pass, conv_transposed, conv_weight_gradient

    class Winograd(Exception):
        pass

    def refuse(*arguments):
        if arguments[-1] == "gemm":
            return conv_pass.prepare_pass(*arguments)
        raise Winograd

    planned_anew(conv_weight_gradient, "_Winograd", refuse)
    planned_anew(conv_transposed, "prepare_pass", refuse)
    (case,) = (c for c in ALL.values() if c.key == "conv2d_backward resnet50.conv4.3x3")
    call = engines.ours(case.with_batch(1))[engines.OURS]
    for needs in (("x",), ("weight",)):
        gradient = partial(call, needs=needs)
        with tilewise.using(backend="cpu"):
            operation.forget_plans()
            with pytest.raises(Winograd):
                gradient()
            dtypes._pinned(case, gradient, np.dtype(np.float64))()


def test_prepared_convolutions_beside_the_peers():
    case = ALL["conv2d lenet5.conv2"].with_batch(2)
    with tilewise.using(backend="reference"):
        (ours,) = engines.as_arrays(engines.OURS, case, engines.ours(case)[engines.OURS]())
        prepared = engines.prepared(case)
        assert list(prepared) == [engines.OURS_PREPARED, engines.OURS_LAST_PREPARED]
        for name, call in prepared.items():
            np.testing.assert_allclose(engines.as_arrays(name, case, call())[0], ours, rtol=1e-5, atol=1e-4)
    assert engines.prepared(ALL["conv2d_backward lenet5.conv1"]) == {}
    assert engines.prepared(ALL["relu lenet5.relu3"]) == {}
    seconds = {engines.OURS: 2e-3, engines.TORCH: 4e-3} | dict.fromkeys(prepared, 1e-3)
    assert peers._prepared_cells(peers.Result(case, 1, seconds)) == ("1", "1", "4.00", "4.00")
    assert peers._prepared_cells(peers.Result(case, 1, {engines.OURS: 2e-3})) == ()


def test_a_place_for_the_record_that_cannot_be_is_told_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "peaks", lambda threads: pytest.fail("timed"))
    for place in (tmp_path, tmp_path / "no such folder" / "record.json"):
        with pytest.raises(SystemExit):
            peers.main(["--only", "relu", "--json", str(place)])
        assert "--json" in capsys.readouterr().err


NETWORKS = (
    models.Work("small ResNet", partial(nn.models.resnet18, 10, width=8), (1, 3, 32, 32)),
    models.Work("small GoogLeNet", partial(nn.models.googlenet, 10, width=16), (2, 3, 33, 33)),
    models.Work("small MobileNet", partial(nn.models.mobilenet_v2, 10, width_mult=0.25), (1, 3, 32, 32)),
    models.Work("LSTM", models._lstm, (3, 2, 64)),
    models.Work("LSTM", models._lstm, (3, 2, 64), training=True),
    models.Work("LeNet-5", nn.models.lenet5, (2, 1, 32, 32), training=True),
)


class TestNetworks:
    """Every engine has the same network."""

    @pytest.mark.parametrize("work", NETWORKS, ids=lambda work: work.network)
    def test_engines_agree(self, work):
        pytest.importorskip("torch")
        pytest.importorskip("onnxruntime")
        times = models.measured(work, 1, 0)
        expected = list(models.ENGINES)[: 2 if work.network == "LSTM" else 3 if work.training else 4]
        assert list(times) == expected

    def test_another_network_is_noticed(self):
        calls = {engines.OURS: lambda: np.ones(3), engines.TORCH: lambda: np.array([1, 1, np.nan])}
        with pytest.raises(AssertionError, match="torch is off by nan of the largest result"):
            models.agree(NETWORKS[0], calls)

    def test_a_step_that_learns_otherwise_is_noticed(self):
        calls = {name: iter(losses).__next__ for name, losses in ((engines.OURS, (2, 1)), (engines.TORCH, (2, 1.1)))}
        with pytest.raises(AssertionError, match=r"torch is off by 0\.1"):
            models.agree(NETWORKS[-1], calls)

    def test_a_step_that_does_not_learn_is_noticed(self):
        """Its losses are nearly right, as a step moves them by little."""
        calls = {name: iter((2, loss)).__next__ for name, loss in ((engines.OURS, 1.9999), (engines.TORCH, 2))}
        with pytest.raises(AssertionError, match=r"torch's step moves the loss by 0, ours by -0\.0001"):
            models.agree(NETWORKS[-1], calls)

    def test_wrong_places_are_told_before_anything_is_timed(self, tmp_path, capsys):
        page = tmp_path / "page.md"
        page.write_text("no markers")
        wrong = (
            ["--json", "--only", "LSTM"],
            ["--json", str(page)],
            ["--readme", str(page)],
            ["--readme", str(tmp_path)],
        )
        for options in wrong:
            with pytest.raises(SystemExit):
                models.main(options)
            assert options[0] in capsys.readouterr().err

    def test_page_has_the_rows_of_the_most_threads(self, tmp_path):
        seconds = {engines.OURS: 0.002, engines.TORCH: 0.006, engines.TORCH_LAST: 0.004, engines.ONNX: 0.001}
        spread = dict.fromkeys(seconds, 0.01)
        records = [
            {"network": "N", "work": f"inference {threads}", "threads": threads, "seconds": seconds, "spread": spread}
            for threads in (1, 2)
        ]
        result = report.machine() | {"command": "make bench-models", "models": records}
        (tmp_path / "one.json").write_text(json.dumps(result), encoding="utf-8")
        page = models.fill(f"{models.BEGIN}{models.END}", tmp_path)
        assert "| N | inference 2 | 2 | 2 | 6 | 4 | 1 | 2.00 | 0.50 | 1% |" in page
        assert "inference 1" not in page
        assert result["device"] in page
