"""`chimera bench overhead`, with and without predictions: what rows say, and what is refused."""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from chimera_bench import overhead
from chimera_daemon.config import ConfigError

SHORT = ("--in-flight", "2", "--seconds", "0.4", "--runs", "2")


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "WARM_UP_STAGES", 64)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    overhead.add_arguments(parser)
    return parser.parse_args(given)


def rows_of(folder: Path, *given: str) -> list[dict[str, Any]]:
    out = folder / "rows.jsonl"
    assert overhead.run(arguments(*SHORT, *given, "--out", str(out))) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(row: dict[str, Any]) -> None:
    """What every row says."""
    assert (row["bench"], row["policy"], row["in_flight"]) == ("overhead", "chimera", 2)
    assert (row["runs"], row["seconds"]) == (2, 0.4)
    for field in ("p50_us", "p99_us", "stages_per_s", "daemon_cpu_us"):
        assert 0 < row[f"{field}_min"] <= row[field] <= row[f"{field}_max"], field
    assert row["p50_us"] < row["p99_us"]


def test_without_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of(tmp_path)
    check(row)
    assert row["prediction"] == "prior"
    assert "learned_share" not in row
    assert "learned" not in capsys.readouterr().out


def test_with_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prior, learned = rows_of(tmp_path, "--predict", "--device", "cpu", "--prompt-tokens", "40")
    for row in (prior, learned):
        check(row)
        assert row["prompt_tokens"] == 40
    assert (prior["prediction"], learned["prediction"]) == ("prior", "learned")
    assert "learned_share" not in prior
    assert 0.0 < learned["learned_share"] <= 1.0
    # Every stage has one of the two; over two runs the medians are means.
    assert learned["learned_share"] + learned["fallback_share"] == pytest.approx(1.0)
    assert (learned["fallback_share"] > 0) == (learned["late"] + learned["shed"] > 0)
    assert learned["added_p50_us"] == pytest.approx(learned["p50_us"] - prior["p50_us"])
    assert (learned["encoder"], learned["encoder_dim"]) == ("testbed", 64)
    assert learned["runs_on"] == "cpu, plain torch: no GPU"
    assert "fallback" in capsys.readouterr().out


def test_levels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a word about them, and with; no process is started for it."""
    seen: list[list[int]] = []

    async def measure(
        sides: list[overhead.Side], prompts: object, levels: list[int], chosen: object
    ) -> list[dict[str, Any]]:
        seen.append(levels)
        return []

    class Started:
        def __init__(self, *given: object) -> None:
            pass

        def __enter__(self) -> tuple[str, int]:
            return ("ipc://nowhere", 0)

        def __exit__(self, *given: object) -> None:
            pass

    monkeypatch.setattr(overhead, "_measure", measure)
    monkeypatch.setattr(overhead, "_daemon", Started)
    for given in ([], ["--predict"], ["--predict", "--in-flight", "3"]):
        assert overhead.run(arguments(*given)) == 0
    assert seen == [[1, 32, 128], [1, 32, 256], [3]]


def test_prompts_are_novel_and_as_long_as_they_say() -> None:
    pytest.importorskip("torch")
    from chimera_predictors.encoder import load_encoder

    texts = [m["content"] for (m,) in itertools.islice(overhead.novel(128), 300)]
    assert texts == [m["content"] for (m,) in itertools.islice(overhead.novel(128), 300)]
    assert len(set(texts)) == 300
    tokenizer = load_encoder(str(overhead.BUNDLE / "encoder"), max_tokens=256, device="cpu")
    lengths = [len(tokenizer.tokenizer.encode([text]).ids) for text in texts]
    assert 126 < statistics.median(lengths) < 136  # the first word has no space before it


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_no_prompt_without_tokens(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--predict", "--prompt-tokens", number)
    assert "--prompt-tokens" in capsys.readouterr().err


def test_no_such_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--predict: .* is not a bundle"):
        overhead.run(arguments(*SHORT, "--predict", str(tmp_path)))


def test_a_daemon_that_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="ended at once"):
        overhead.run(arguments(*SHORT, "--policy", "no such policy"))
    assert "no such policy" in capfd.readouterr().err
