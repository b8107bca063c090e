"""Bundles on disk: the same after a round trip, and a clear error for everything that is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from chimera_predictors import predictor
from chimera_predictors.bundle import BundleError, read_bundle, write_bundle
from chimera_predictors.records import StageQuery
from tiny_bundle import Trained


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.folder, tmp_path / "copy"))


def test_round_trip(trained: Trained) -> None:
    again = read_bundle(trained.folder)
    for one, other in zip(again.weights, trained.bundle.weights, strict=True):
        assert (one == other).all()
    assert again.info.models == ("large", "small")
    assert again.info.heads_sha256


def test_loaded_from_disk_predicts_the_same(trained: Trained) -> None:
    loaded = predictor.load(trained.folder, device="cpu")
    one, other = (loaded.predict([StageQuery(task_text="simple sum")]) for _ in range(2))
    assert one == other
    assert loaded.cache.hits == 1


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "bundle.json"
        content = msgspec.json.decode(path.read_bytes())
        change(content)
        path.write_bytes(msgspec.json.encode(content))

    return apply


def cut_off(folder: Path) -> None:
    path = folder / "heads.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "cut off or changed"),
        (lambda f: (f / "heads.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "bundle.json").unlink(), "chimera train"),
        (lambda f: (f / "bundle.json").write_bytes(b"{"), "not a bundle's description"),
        (lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe"), "bundle.json"),
        (edit(lambda c: c.update(schema=99)), "schema version 99"),
        (edit(lambda c: c.update(features=["other"])), "other features"),
        (edit(lambda c: c.update(levels=[0.5, 0.1, 0.9])), "must rise"),
        (edit(lambda c: c.update(models=["large"])), "do not fit"),
        (edit(lambda c: c.update(kinds=["code"])), "not float32"),
        (edit(lambda c: c.pop("gates")), "gates"),
        (edit(lambda c: c["encoder"].update(digest="0" * 64)), "other weights"),
        (edit(lambda c: c["encoder"].update(name="/nowhere/at/all")), "encoder"),
    ],
)
def test_a_damaged_bundle_is_named_and_explained(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=message):
        predictor.load(copy, device="cpu")


def test_values_that_are_not_finite_are_refused(trained: Trained, tmp_path: Path) -> None:
    weights = trained.bundle.weights
    broken = weights._replace(out_bias=weights.out_bias * np.nan)
    bundle = msgspec.structs.replace(trained.bundle, weights=broken)
    with pytest.raises(BundleError, match="out_bias holds values that are not finite"):
        read_bundle(write_bundle(bundle, tmp_path / "broken"))


def test_a_folder_with_other_things_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        write_bundle(trained.bundle, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_replacing_leaves_no_trace_of_the_old_one(trained: Trained, tmp_path: Path) -> None:
    write_bundle(trained.bundle, tmp_path / "b", trained.encoder.save)
    write_bundle(trained.bundle, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "bundle.json",
        "heads.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_encoder_inside_the_bundle_is_found_wherever_it_is_moved(
    trained: Trained, tmp_path: Path
) -> None:
    info = msgspec.structs.replace(
        trained.bundle.info,
        encoder=msgspec.structs.replace(trained.bundle.info.encoder, name="gone", included=True),
    )
    bundle = msgspec.structs.replace(trained.bundle, info=info)
    write_bundle(bundle, tmp_path / "b", trained.encoder.save)
    shutil.move(tmp_path / "b", tmp_path / "elsewhere")
    loaded = predictor.load(tmp_path / "elsewhere", device="cpu")
    assert loaded.predict([StageQuery(task_text="simple sum")])[0].keys() == {"large", "small"}
