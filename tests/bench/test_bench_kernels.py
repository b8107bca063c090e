"""`chimera bench kernels` without a GPU: formulas, gate, rows, tables, plot, and what is refused.

Kernels run in the interpreter; the clock, graphs and torch.compile of a GPU are stand-ins.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton import knobs  # noqa: E402

from chimera_bench import gpu_timing, kernel_bench, kernel_cases, kernels, roofline  # noqa: E402
from chimera_bench import kernel_served as served  # noqa: E402
from chimera_bench.gpu_timing import Times  # noqa: E402
from chimera_bench.roofline import Ceilings, Cost, Shape, encoder_cost, parse_shape  # noqa: E402
from chimera_daemon.config import ConfigError  # noqa: E402
from chimera_kernels import encoder as encoders  # noqa: E402
from chimera_kernels.encoder import Tile, TritonEncoder  # noqa: E402

CEILINGS = Ceilings(4e12, 8e14)
SMALL_HEADS = kernel_cases.MINT._replace(D=48, N=5, G=2, P=3, O=2, M=3, C=9, H=40)
TIMES = Times(9.0, 10.0, 11.0, 12.0, 20.0, 30)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Everything but the clock is real; a graph is its work, and compiling does nothing."""

    class Timer:
        def __init__(self, seconds: float) -> None:
            pass

        def times(self, work: Callable[[], object], load: Callable[[int], None]) -> Times:
            load(1)
            work()
            return TIMES

    monkeypatch.setattr(kernels, "device_for", lambda check: device)
    monkeypatch.setattr(kernel_bench, "Timer", Timer)
    monkeypatch.setattr(kernel_bench, "captured", lambda work: work)
    monkeypatch.setattr(kernel_cases, "compiled", lambda call, mode: call)
    monkeypatch.setattr(kernel_cases, "MINT", SMALL_HEADS)
    monkeypatch.setattr(kernel_bench, "_MOST_PASSES", 1)
    monkeypatch.setattr(kernel_bench, "_FEWEST_PASSES", 1)
    monkeypatch.setattr(kernel_bench, "_PASS_WARM_UPS", 1)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake H200")


class Test_shapes:
    @pytest.mark.parametrize("text", kernels.SHAPES)
    def test_are_written_as_they_are_read(self, text: str) -> None:
        assert str(parse_shape(text)) == text

    @pytest.mark.parametrize(
        "text", ["minilm", "minilm:3", "minilm:0x3", "minilm:2x513", "minilm:2x9..3", "gpt:1x1"]
    )
    def test_wrong_ones(self, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            parse_shape(text)
        with pytest.raises(SystemExit):
            arguments("--shapes", text)

    def test_mixed_lengths_are_those_of_the_seed(self) -> None:
        shape = parse_shape("minilm:32x16..128")
        assert shape.lengths(1) == shape.lengths(1) != shape.lengths(2)
        assert 16 <= min(shape.lengths(1)) < max(shape.lengths(1)) <= 128


class Test_formulas:
    @pytest.mark.parametrize("tokens", [1, 4, 9])
    @pytest.mark.parametrize("window", [0, 1, 3, 8, 9, 20, None])
    def test_pairs_that_see_each_other(self, tokens: int, window: int | None) -> None:
        reach = tokens if window is None else window
        wanted = sum(abs(i - j) <= reach for i in range(tokens) for j in range(tokens))
        assert roofline.seen_pairs(tokens, window) == wanted

    def test_one_token_of_minilm(self) -> None:
        matrices = 6 * (3 * 384 * 384 + 384 * 384 + 2 * 384 * 1536)
        cost = encoder_cost(roofline.MODELS["minilm"], [1])
        assert cost.flops == 2 * matrices + 6 * 4 * 384
        assert cost.bytes == 2 * (matrices + 3 * 384) + 4 * 4

    @pytest.mark.parametrize("name", ["tiny", "tiny-modernbert"])
    def test_linears_are_those_of_the_weights(self, name: str) -> None:
        model = roofline.MODELS[name]
        weights = kernel_cases.random_weights(model, "cpu")
        elements = sum(
            linear.weight.numel()
            for layer in weights.layers
            for linear in (layer.qkv, layer.out, layer.up, layer.down)
        )
        seen = sum(roofline.seen_pairs(n, window) for window in model.windows for n in (90, 7))
        assert encoder_cost(model, [90, 7]).flops == 97 * 2 * elements + 4 * model.width * seen

    def test_floor_is_the_longer_one(self) -> None:
        assert roofline.floor_us(Cost(4_000_000, 8), CEILINGS) == pytest.approx(1.0)
        assert roofline.floor_us(Cost(4, 800_000_000), CEILINGS) == pytest.approx(1.0)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 1), (0.2, 1), (0.5, 3), (0.8, 4), (0.99, 5)])
def test_percentile(share: float, wanted: int) -> None:
    assert gpu_timing.percentile([5, 3, 1, 4, 2], share) == wanted


class Test_ranking:
    def test_clear_swaps_count_and_near_ones_do_not(self) -> None:
        wanted = np.array([[0.5, 0.6], [0.5, 0.505], [0.5, 0.6], [0.5, 0.6]])
        found = np.array([[0.6, 0.5], [0.506, 0.5], [0.52, 0.55], [np.nan, 0.6]])
        assert served.same_ranking(found, wanted) == (0.5, 0.25)


class Test_refused:
    @pytest.mark.usefixtures("no_gpu")
    def test_timing_without_a_gpu(self) -> None:
        with pytest.raises(ConfigError, match="--check"):
            kernels.run(arguments())

    @pytest.mark.usefixtures("no_gpu")
    def test_checking_without_gpu_and_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(knobs.runtime, "interpret", False)
        with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
            kernels.run(arguments("--check"))

    @pytest.mark.parametrize("stages", ["0", "257"])
    def test_stages(self, stages: str) -> None:
        with pytest.raises(ConfigError, match="256"):
            kernels.run(arguments("--stages", stages))

    @pytest.mark.usefixtures("fake_gpu")
    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--bundle"):
            kernels.run(arguments("--parts", "heads", "--bundle", str(tmp_path)))


@pytest.mark.usefixtures("fake_gpu")
class Test_gate:
    CHECK = ("--check", "--stages", "2", "--shapes", "tiny:2x9", "tiny-modernbert:1x5..80")

    def test_green(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert kernels.run(arguments(*self.CHECK, "--parts", "encoder", "heads")) == 0
        assert capsys.readouterr().out.count(", error ") == 4  # layered twice, persistent, heads

    @pytest.mark.parametrize("check", [True, False])
    def test_red(
        self, check: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Rows that nobody wrote are NaN; no figures then."""
        monkeypatch.setattr(TritonEncoder, "_embed", lambda self, batch: None)
        given = arguments("--parts", "encoder", "--shapes", "tiny:2x9", "--only", "layered")
        given.check = check
        assert kernels.run(given) == 1
        out = capsys.readouterr().out
        assert "WRONG" in out
        assert "p50" not in out

    def test_a_launch_that_fails_is_red(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("no room\nat all")

        monkeypatch.setattr(TritonEncoder, "_embed", fail)
        assert kernels.run(arguments(*self.CHECK, "--parts", "encoder", "--only", "layered")) == 1
        assert capsys.readouterr().out.count("WRONG, RuntimeError: no room\n") == 2

    def test_wrong_heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = kernel_cases.HeadsCase.ours
        monkeypatch.setattr(kernel_cases.HeadsCase, "ours", lambda self: ours(self) * 1.001)
        assert kernels.run(arguments(*self.CHECK, "--parts", "heads")) == 1


def rows_of(folder: Path, *given: str) -> list[dict[str, Any]]:
    out = folder / "rows.jsonl"
    assert kernels.run(arguments(*given, "--out", str(out))) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("fake_gpu")
class Test_rows:
    def test_of_the_encoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(kernel_bench.GOALS_US, "tiny:2x3..9", 5.0)
        plot = tmp_path / "roofline.png"
        rows = rows_of(
            tmp_path, "--parts", "encoder", "--shapes", "tiny:2x3..9", "--plot", str(plot)
        )
        assert [row["contestant"] for row in rows] == [
            *("layered", "layered, graph", "persistent", "persistent, graph"),
            *("transformers", "transformers, sdpa", "compile, own graph", "compile"),
        ]
        cost = encoder_cost(roofline.MODELS["tiny"], parse_shape("tiny:2x3..9").lengths(0))
        floor = roofline.floor_us(cost, CEILINGS)
        for row in rows:
            assert row["error"] < kernel_bench._OTHERS_BOUND, row["contestant"]
            assert (row["p20_us"], row["p50_us"], row["p80_us"]) == TIMES[:3]
            assert (row["bytes"], row["flops"]) == cost
            assert row["of_floor"] == pytest.approx(floor / TIMES.p50_us)
            assert row["against_compile"] == 1.0
            assert (row["bytes_per_s"], row["flops_per_s"]) == CEILINGS
            assert row["bench"] == "kernels"
            assert "triton" in row["versions"]
            graph = row["contestant"] in ("layered, graph", "persistent, graph")
            assert row.get("reached") == (False if graph else None)
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_of_heads(self, tmp_path: Path) -> None:
        rows = rows_of(tmp_path, "--parts", "heads", "--stages", "2")
        assert [row["contestant"] for row in rows] == [
            *("heads", "heads, graph", "reference", "compile, own graph", "compile")
        ]
        assert all(row["error"] < kernel_bench.HEADS_BOUND for row in rows)

    def test_of_pass_and_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = rows_of(
            tmp_path, "--parts", "text", "pass", "--stages", "1", "--bundle", str(kernels.TESTBED)
        )
        assert [row["part"] for row in rows] == ["text", "tokeniser", "pass"]
        assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)
        assert all("goal_us" not in row for row in rows)  # those are of MiniLM
        assert "ranked alike 1.0000" in capsys.readouterr().out

    def test_compiling_ends_with_the_deadline(self, tmp_path: Path) -> None:
        rows = rows_of(
            tmp_path, "--parts", "encoder", "--shapes", "tiny:1x4", "--deadline", "0",
            "--only", "layered", "compile",
        )  # fmt: skip
        skipped = [row["contestant"] for row in rows if "skipped" in row]
        assert skipped == ["compile, own graph", "compile"]
        assert all("p50_us" in row for row in rows if "skipped" not in row)

    def test_others_that_fail_or_err_are_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other(call: Callable[[], torch.Tensor], mode: str) -> Callable[[], torch.Tensor]:
            if mode == "max-autotune":
                raise RuntimeError("no compiler")
            return lambda: call() * 1.1

        monkeypatch.setattr(kernel_cases, "compiled", other)
        rows = rows_of(
            tmp_path, "--parts", "encoder", "--shapes", "tiny:1x4", "--only", "layered", "compile"
        )
        said = {row["contestant"]: row.get("skipped") for row in rows}
        assert said["compile, own graph"] == "computes something else"
        assert said["compile"] == "RuntimeError: no compiler"
        assert said["layered, graph"] is None
        assert all("against_compile" not in row for row in rows)

    def test_are_kept_if_it_ends_early(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measure(*_: object) -> Iterator[dict[str, Any]]:
            yield {"part": "text", "shape": "1 stages", "contestant": "x", "p50_us": 1.0}
            raise KeyboardInterrupt

        monkeypatch.setattr(kernel_bench, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            rows_of(tmp_path, "--parts", "heads", "--stages", "1")
        assert json.loads((tmp_path / "rows.jsonl").read_text())["p50_us"] == 1.0


class Test_judging:
    ROW = {"part": "encoder", "shape": "s", "contestant": "layered, graph", "p50_us": 50.0}

    def test_the_best_of_torch_compile_at_this_shape(self) -> None:
        others = [
            self.ROW | {"contestant": "compile", "p50_us": 100.0},
            self.ROW | {"contestant": "compile, own graph", "p50_us": 75.0},
            self.ROW | {"contestant": "compile", "shape": "other", "p50_us": 1.0},
            self.ROW | {"contestant": "transformers", "p50_us": 1.0},
        ]
        assert kernels.judge(self.ROW, others, True)["against_compile"] == 1.5

    @pytest.mark.parametrize(
        ("more", "reached"),
        [
            ({"goal_us": 50.0}, True),
            ({"goal_us": 49.0}, False),
            ({"goal_us": 60.0, "p99_us": 3.0, "goal_p99_us": 2.0}, False),
            ({"goal_us": 60.0, "p99_us": 2.0, "goal_p99_us": 2.0}, True),
            ({}, None),
        ],
    )
    def test_goals(self, more: dict[str, Any], reached: bool | None) -> None:
        assert kernels.judge(self.ROW | more, [], True).get("reached") == reached
        assert "reached" not in kernels.judge(self.ROW | more, [], False)

    def test_table(self) -> None:
        row = kernels.judge(self.ROW | {"goal_us": 80.0, "of_floor": 0.125}, [], True)
        [text] = kernels.tables([row, self.ROW | {"contestant": "compile", "skipped": "why"}])
        head, _, ours, other, *_ = text.splitlines()
        assert [head.split()[0], head.split()[-2:]] == ["shape", ["left", "out"]]
        assert "12.5" in ours
        assert "80 reached" in ours
        assert other.endswith("why")


@pytest.mark.usefixtures("fake_gpu")
class Test_sweep:
    def test_tries_all_and_leaves_nothing_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = encoders.tile_for, encoders._NORM_BY_READER_TOKENS
        monkeypatch.setattr(encoders, "_TILES", (Tile(16, 64, 64, 4, 2),))
        monkeypatch.setattr(kernel_bench, "_SWEPT_TOKENS", (4,))
        rows = rows_of(tmp_path, "--sweep", "--shapes", "tiny:1x4")
        assert (encoders.tile_for, encoders._NORM_BY_READER_TOKENS) == before
        assert [(row["contestant"], row["setting"]) for row in rows] == [
            ("", ""),
            *((f"{n} wide", str(tuple(t))) for n in (48, 72, 144) for t in encoders._TILES),
            *(("norm", "by a launch"), ("norm", "by reader"), ("kernel", "persistent")),
        ]
        assert all(row["error"] < kernel_bench.ENCODER_BOUND for row in rows)
        assert "persistent" in capsys.readouterr().out

    def test_a_tile_is_of_the_linears_it_is_meant_for(self) -> None:
        tile = Tile(16, 16, 16, 1, 1)
        usual = encoders.tile_for(64, 384, "", 132)
        with kernel_bench._tile(1152, tile):
            assert encoders.tile_for(64, 1152, "", 132) == tile
            assert encoders.tile_for(64, 384, "", 132) == usual != tile

    def test_small_batches_of_each_bert_come_on_top(self) -> None:
        shapes = kernel_bench.sweep_shapes([Shape("bert-base", 1, 128, 128)])
        assert list(map(str, shapes)) == [
            *("bert-base:1x128", "bert-base:1x64", "bert-base:2x128", "bert-base:4x128")
        ]
