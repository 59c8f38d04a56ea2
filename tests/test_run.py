"""Run folders: what was trained comes back, conditions hold in every row, damage is refused."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load as load_tensors
from tiny import HERE, ROWS, SCHEMA, frame, recipe, seat, table

from dpsynth.artifacts import FORMAT, MANIFEST
from dpsynth.checks import UsageError
from dpsynth.codec import NumericCoder
from dpsynth.data import Table
from dpsynth.randomness import stream
from dpsynth.sampling import parse_where, sample_table
from dpsynth.schema import Column
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import FAMILIES, Seat
from dpsynth.training.run import Run

MODELS = HERE
FILES = {"config.yaml", "schema.json", "codec.json", "ledger.json", "model.safetensors", MANIFEST}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """One run a family, with ε = 1."""
    return {
        model: Run.of(train_fleet(recipe(model), [seat(1.0, 0)])[0], data="tiny")
        for model in MODELS
    }


@pytest.fixture(scope="module")
def free() -> dict[str, Run]:
    """The same without privacy."""
    return {model: Run.of(train_fleet(recipe(model), [seat()])[0]) for model in MODELS}


@pytest.fixture(scope="module")
def saved(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for model, run in runs.items():
        run.save(folder / model)
    return {model: folder / model for model in MODELS}


@pytest.fixture
def folder(runs: dict[str, Run], tmp_path: Path) -> Path:
    """A fresh folder of one run, to be damaged."""
    runs["vae"].save(tmp_path / "run")
    return tmp_path / "run"


# Round trips


@pytest.mark.parametrize("model", MODELS)
def test_a_run_comes_back(model: str, runs: dict[str, Run], saved: dict[str, Path]) -> None:
    run, back = runs[model], Run.load(saved[model])
    assert (back.recipe, back.plan, back.seed) == (run.recipe, run.plan, run.seed)
    assert back.executed == run.executed == (5 if FAMILIES[model].trained else 0)
    assert back.ledger.events == run.ledger.events
    assert back.epsilon == run.epsilon <= 1.0
    assert back.schema == run.schema == SCHEMA
    assert back.codec.to_dict() == run.codec.to_dict()
    assert back.lineage == run.lineage
    first, second = run.generator.state_dict(), back.generator.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(parameter.requires_grad for parameter in back.generator.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_is_the_same_table_before_and_after(
    model: str, runs: dict[str, Run], saved: dict[str, Path]
) -> None:
    run, back = runs[model], Run.load(saved[model])
    made = run.sample(300, rng=5)
    pd.testing.assert_frame_equal(made, back.sample(300, rng=5))
    pd.testing.assert_frame_equal(made, back.generate(300, rng=5))
    assert not made.equals(run.sample(300, rng=6))
    assert not run.sample(300).equals(run.sample(300)), "without a seed each draw is fresh"


@pytest.mark.parametrize("model", MODELS)
def test_samples_keep_to_the_schema(model: str, runs: dict[str, Run]) -> None:
    made = runs[model].sample_table(500, rng=1)
    assert len(made) == 500
    again = Table.from_frame(made.frame, SCHEMA)  # strict
    pd.testing.assert_frame_equal(again.frame, made.frame)
    assert list(made.frame.index) == list(range(500))


def test_many_rows_come_in_chunks(runs: dict[str, Run]) -> None:
    for model in MODELS:
        assert len(runs[model].sample(9000, rng=0)) == 9000


def test_a_run_of_infinite_epsilon_comes_back(tmp_path: Path) -> None:
    run = Run.of(train_fleet(recipe("independent"), [seat(math.inf, None)])[0])
    run.save(tmp_path / "run")
    back = Run.load(tmp_path / "run")
    assert back.epsilon == back.plan.epsilon == math.inf
    assert back.seed is None


def test_a_run_tells_where_it_comes_from(runs: dict[str, Run]) -> None:
    lineage = runs["vae"].lineage
    assert lineage["data"] == "tiny"
    assert {"dpsynth", "torch", "opacus", "dp-accounting"} <= set(lineage["versions"])
    assert lineage["created"].endswith("+00:00")


# The folder


@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_these_files(model: str, saved: dict[str, Path]) -> None:
    assert {path.name for path in saved[model].iterdir()} == FILES
    assert {path.name for path in saved[model].parent.iterdir()} == set(MODELS)


def test_extra_files_are_kept_beside_and_checked_too(runs: dict[str, Run], tmp_path: Path) -> None:
    runs["vae"].save(tmp_path / "run", {"notes.txt": b"hello"})
    assert (tmp_path / "run" / "notes.txt").read_bytes() == b"hello"
    Run.load(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_bytes(b"hullo")
    with pytest.raises(UsageError, match=r"notes\.txt differs"):
        Run.load(tmp_path / "run")


def test_what_is_not_weights_can_be_read_by_anyone(saved: dict[str, Path]) -> None:
    for path in saved.values():
        config = yaml.safe_load((path / "config.yaml").read_text())
        assert config["plan"]["epsilon"] == 1.0
        ledger = json.loads((path / "ledger.json").read_text())
        assert ledger["delta"] == 1e-5 and ledger["events"]
        assert json.loads((path / "schema.json").read_text())["target"] == "rich"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_byte_is_refused(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    for place in np.linspace(0, len(content) - 1, 60).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(UsageError):
            Run.load(folder)
    (folder / name).write_bytes(content)
    Run.load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=name):
        Run.load(folder)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Run.load(tmp_path / "nowhere")


def test_a_newer_format_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with pytest.raises(UsageError, match=f"format {FORMAT + 1}"):
        Run.load(folder)


@pytest.mark.parametrize("name", sorted(FILES - {MANIFEST}))
def test_a_manifest_that_leaves_a_file_out_is_refused(
    name: str, runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {k: v for k, v in runs["vae"]._files().items() if k != name}
    monkeypatch.setattr(Run, "_files", lambda _: files)
    runs["vae"].save(tmp_path / "run")
    with pytest.raises(UsageError, match=f"{name} is missing"):
        Run.load(tmp_path / "run")


def other_weights(runs: dict[str, Run], model: str) -> bytes:
    return runs[model]._files()["model.safetensors"]


def test_weights_of_another_family_are_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    """With hashes that hold, as an ill-meaning packer would make them."""
    for model in MODELS:
        for other in set(MODELS) - {model, "independent", "naive_bayes"}:
            strange = {"model.safetensors": other_weights(runs, other)}
            runs[model].save(tmp_path / "run", strange)
            with pytest.raises(UsageError, match="weights do not fit"):
                Run.load(tmp_path / "run")


def test_weights_of_another_width_are_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    (wide,) = train_fleet(recipe("vae", options={"hidden": [9, 9]}), [seat()])
    strange = Run.of(wide)._files()["model.safetensors"]
    runs["vae"].save(tmp_path / "run", {"model.safetensors": strange})
    with pytest.raises(UsageError, match="weights do not fit"):
        Run.load(tmp_path / "run")


SCHEMAS = {
    "renamed": replace(SCHEMA, columns=(replace(SCHEMA["age"], name="old"), *SCHEMA.columns[1:])),
    "one level more": replace(
        SCHEMA, columns=(*SCHEMA.columns[:3], Column("rich", "categorical", ("a", "b", "c")))
    ),
    "one column less": SCHEMA.drop(["job"]),
    "another kind": replace(
        SCHEMA, columns=(Column("age", "categorical", ("a", "b")), *SCHEMA.columns[1:])
    ),
}
DAMAGE = {
    **{
        f"schema {name}": {"schema.json": schema.to_json().encode()}
        for name, schema in SCHEMAS.items()
    },
    "no schema": {"schema.json": b"[]"},
    "no weights": {"model.safetensors": b"not weights"},
    "no text": {"codec.json": b"\xff\xfe"},
    "no JSON": {"ledger.json": b"{"},
    "no object": {"codec.json": b"[]"},
    "no YAML": {"config.yaml": b"a: [b"},
    "no mapping": {"config.yaml": b"5"},
    "no recipe": {"config.yaml": b"plan: {}"},
    "unknown setting": {"config.yaml": b"recipe: {model: vae, colour: red}"},
    "unknown mechanism": {
        "ledger.json": b'{"format": 1, "unit": "record", "relation": "add_remove", "delta": 1e-5,'
        b' "events": [{"what": "x", "mechanism": "magic"}]}'
    },
    "a newer ledger": {"ledger.json": b'{"format": 2}'},
}


@pytest.mark.parametrize("files", DAMAGE.values(), ids=DAMAGE)
def test_parts_that_do_not_fit_are_refused_in_one_line(
    files: dict[str, bytes], runs: dict[str, Run], tmp_path: Path
) -> None:
    """With hashes that hold."""
    runs["vae"].save(tmp_path / "run", files)
    with pytest.raises(UsageError, match="run '") as error:
        Run.load(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_loading_executes_nothing(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("code or pickles were run")

    for module, names in {pickle: ("load", "loads", "Unpickler"), torch: ("load",)}.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for name in ("eval", "compile"):
        monkeypatch.setattr(builtins, name, refuse)
    for model in MODELS:
        Run.load(saved[model]).sample(5, rng=0)


def test_a_tag_that_would_run_code_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    config = f"recipe: !!python/object/apply:os.mkdir [{str(mark)!r}]"
    runs["vae"].save(tmp_path / "run", {"config.yaml": config.encode()})
    with pytest.raises(UsageError):
        Run.load(tmp_path / "run")
    assert not mark.exists()


def test_saving_again_replaces_the_whole_folder(runs: dict[str, Run], tmp_path: Path) -> None:
    runs["vae"].save(tmp_path / "run", {"old.txt": b"old"})
    runs["gan"].save(tmp_path / "run")
    assert Run.load(tmp_path / "run").recipe.model == "gan"
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# What a folder must not tell


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON or YAML tree."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def figures(folder: Path) -> set[float]:
    found: set[float] = set()
    for path in folder.iterdir():
        if path.suffix in (".json", ".yaml"):
            found |= set(numbers(yaml.safe_load(path.read_text())))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_private_run_tells_neither_digest_nor_size(model: str, tmp_path: Path) -> None:
    rows = Table(replace(SCHEMA, expected_rows=None), table(397).frame)
    (trained,) = train_fleet(recipe(model), [Seat(rows, 1.0, 0)])
    Run.of(trained).save(tmp_path / "run")
    text = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    values = hashlib.sha256(rows.frame.to_csv(index=False).encode()).hexdigest()
    for digest in (rows.digest(), table(397).digest(), values):
        assert digest.encode() not in text
    found = figures(tmp_path / "run")
    assert not {397.0, 1 / 397, 32 / 397} & found
    assert float(trained.plan.rows) in found, "the noisy count is what is published"


def away_from_counts(run: Run) -> np.ndarray:
    """How far each mass and share of a run, times the rows, is from a whole number."""
    coders = [coder for coder in run.codec.coders if isinstance(coder, NumericCoder)]
    shares = run.generator.prior_logits.double().softmax(-1)[0].numpy()
    if run.generator.components:  # those of a mixture that agrees with many tables, none of them
        shares = shares[:0]
    # Leaves whose masses were pooled share one noisy number, which counts once.
    masses = [np.unique(coder.mass[coder.mass > 0]) for coder in coders]
    held = np.concatenate([shares, *masses]) * ROWS
    return np.abs(held - held.round())


@pytest.mark.parametrize("model", MODELS)
def test_masses_and_shares_are_noisy(model: str, runs: dict[str, Run]) -> None:
    """One in 500 noisy numbers comes as near to a whole one by chance."""
    apart = away_from_counts(runs[model])
    assert len(apart) > 10
    assert (apart < 1e-3).sum() <= 1


@pytest.mark.parametrize("model", MODELS)
def test_without_privacy_the_same_figures_are_counts(model: str, free: dict[str, Run]) -> None:
    """What makes the test above one."""
    assert away_from_counts(free[model]).max() < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_one_extreme_record_moves_nothing_but_noisy_figures(model: str, tmp_path: Path) -> None:
    """Two neighbouring tables: the public parts of the two folders are the same bytes."""
    extreme = pd.DataFrame({"age": [90], "job": ["nurse"], "pay": [100.0], "rich": ["no"]})
    with_one = Table.from_frame(pd.concat([frame(), extreme], ignore_index=True), SCHEMA)
    folders = []
    for name, rows in {"without": table(), "with": with_one}.items():
        (trained,) = train_fleet(recipe(model), [Seat(rows, 1.0, 0)])
        Run.of(trained, data="tiny").save(tmp_path / name)
        folders.append(tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first.keys() == second.keys() == FILES
    assert first["schema.json"] == second["schema.json"]
    assert first["config.yaml"] == second["config.yaml"]
    ledgers = [json.loads(files["ledger.json"]) for files in (first, second)]
    for event in ledgers[0]["events"] + ledgers[1]["events"]:
        event.pop("when"), event.pop("chain")
    for ledger in ledgers:  # hashes of weights, which are noisy
        ledger.pop("seal"), ledger.pop("head")
    assert ledgers[0] == ledgers[1]
    weights = [load_tensors(files["model.safetensors"]) for files in (first, second)]
    assert {k: v.shape for k, v in weights[0].items()} == {
        k: v.shape for k, v in weights[1].items()
    }
    assert len(first["model.safetensors"]) == len(second["model.safetensors"])
    codecs = [json.loads(files["codec.json"])["columns"] for files in (first, second)]
    for name, state in codecs[0].items():
        assert state.keys() == codecs[1][name].keys()
        assert {k: state.get(k) for k in ("bins", "slots")} == {
            k: codecs[1][name].get(k) for k in ("bins", "slots")
        }


# Conditions


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "where",
    [
        {"rich": "yes"},
        {"rich": "no", "job": "cook"},
        {"job": "nurse"},
        {"age": 30},
        {"age": 30, "rich": "no"},
        {"job": None},
        {"pay": math.nan, "rich": "no"},
    ],
    ids=str,
)
def test_a_condition_holds_in_every_row(
    model: str, where: dict[str, Any], free: dict[str, Run]
) -> None:
    if model == "copula" and "pay" in where:
        # A copula has missing values at one end of a column, which here is where all are rich.
        where = {"pay": math.nan, "rich": "yes"}
    made = free[model].sample(80, where=where, rng=2)
    assert len(made) == 80
    for name, value in where.items():
        missing = value is None or value != value
        assert (made[name].isna() if missing else made[name] == value).all()
    assert "age" in where or made["age"].nunique() > 10, "the rest is still drawn"
    pd.testing.assert_frame_equal(made, free[model].sample(80, where=where, rng=2))


def test_a_condition_may_be_text(free: dict[str, Run]) -> None:
    made = free["diffusion"].sample(40, where="rich='yes' and age=40.0", rng=0)
    assert (made["rich"] == "yes").all() and (made["age"] == 40).all()
    pd.testing.assert_frame_equal(
        made, free["diffusion"].sample(40, where={"rich": "yes", "age": 40}, rng=0)
    )


def test_every_column_can_be_fixed_where_there_is_no_target() -> None:
    rows = Table(replace(SCHEMA, target=None), table().frame)
    (trained,) = train_fleet(recipe("diffusion"), [Seat(rows, math.inf, 0)])
    assert trained.generator.conditions() == frozenset(range(4))
    where = {"rich": "yes", "job": "cook"}
    made = sample_table(trained.generator, trained.codec, 50, where=where, rng=0).frame
    assert all((made[name] == value).all() for name, value in where.items())


def test_whole_numbers_name_levels_without_their_point() -> None:
    """`1.0` names the level `1`, as it does in a table."""
    schema = replace(
        SCHEMA, columns=(*SCHEMA.columns[:3], Column("rich", "categorical", ("0", "1")))
    )
    coded = frame().assign(rich=lambda rows: (rows["rich"] == "yes").astype(int))
    rows = Table.from_frame(coded, schema)
    (trained,) = train_fleet(recipe("independent"), [Seat(rows, math.inf, 0)])
    for value in (1, 1.0, "1"):
        made = sample_table(trained.generator, trained.codec, 20, where={"rich": value}, rng=0)
        assert (made.frame["rich"] == "1").all()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"colour": "red"}, "colour"),
        ({"rich": "maybe"}, "maybe"),
        ({"job": "pilot"}, "pilot"),
        ({"age": 200}, "200"),
        ({"age": "abc"}, "abc"),
        ({"age": 30.5}, "age"),
        ({"age": None}, "age"),
        ({"rich": math.nan}, "rich"),
        ({"age": math.inf}, "age"),
        ("rich", "where="),
        ("rich='yes' and rich='no'", "twice"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["vae", "independent"])
def test_an_unknown_condition_is_refused_before_a_row_is_drawn(
    model: str,
    where: Any,
    words: str,
    runs: dict[str, Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a row was drawn")

    monkeypatch.setattr(type(runs[model].generator), "sample", refuse)
    with pytest.raises(UsageError, match=words):
        runs[model].sample(10, where=where)


def test_a_condition_that_is_never_met_is_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(UsageError, match="met by 0 of the rows"):
        runs["independent"].sample(5, where={"pay": 12.345678}, rng=0)


@pytest.mark.parametrize("rows", [0, -1, 2.5, math.nan, math.inf, "abc"])
def test_a_number_of_rows_is_one(rows: Any, runs: dict[str, Run]) -> None:
    with pytest.raises(UsageError, match="rows="):
        runs["independent"].sample(rows)


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("a=b", {"a": "b"}),
        ("  a = b  ", {"a": "b"}),
        ("a='b c'", {"a": "b c"}),
        ('a="b c"', {"a": "b c"}),
        ("a=''", {"a": ""}),
        ("income='>50K' and sex=Male", {"income": ">50K", "sex": "Male"}),
        ("income=>50K", {"income": ">50K"}),
        ("a='x and y' and b=1", {"a": "x and y", "b": "1"}),
        ('a="it\'s" and b=\'a "quoted" word\'', {"a": "it's", "b": 'a "quoted" word'}),
        ("marital status='x' and b=-1.5", {"marital status": "x", "b": "-1.5"}),
        ("rock and roll=yes and a=b", {"rock and roll": "yes", "a": "b"}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_conditions_are_read(text: str, conditions: dict[str, str]) -> None:
    assert parse_where(text) == conditions


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "a=", "=b", "a==b", "a>5", "a<5", "a=b c", "a=b and", "a=b or c=d", "a='b",
     "a=b, c=d", "a='b'c", "a=1 and a=1"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="where="):
        parse_where(text)


def test_the_codec_of_a_run_mends_nothing(runs: dict[str, Run]) -> None:
    """Decoding draws only inside a level, so encoding what was decoded gives the code back."""
    codec = runs["vae"].codec
    codes = codec.encode(table())
    assert torch.equal(codec.encode(codec.decode(codes, stream(0, "decode"))), codes)
