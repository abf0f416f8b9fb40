"""Choices in the order of their times, and what is no time."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest

from triform.data import store
from triform.data.datasets import InteractionsConfig
from triform.runtime.errors import DataError


def histories(path, **fields):
    """The source of a log with times."""
    cache = str(path.parent / "cache")
    made = InteractionsConfig(source=str(path), cache_dir=cache, time="time", **fields)
    made.validate()
    return store.origin(made, str(path))


# Of 2019, of two zones and none, which is UTC, and of 2020.
DATES = ["2020-03-01", "2019-12-31T23:30:00-02:00", "2020-01-01 01:00", "2019-01-01"]


@pytest.mark.parametrize("end", ["csv", "txt", "parquet"])
def test_dates_are_in_order_whatever_their_form_and_zone(tmp_path, end):
    path, items = tmp_path / f"x.{end}", [*"dcba"]
    if end == "parquet":  # in which they have a type
        moments = [datetime.datetime.fromisoformat(x) for x in DATES]
        zone = datetime.UTC
        times = [x if x.tzinfo else x.replace(tzinfo=zone) for x in moments]
        table = {"user": ["u"] * 4, "item": items, "time": times}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    else:
        mark, dates = (
            {"csv": ",", "txt": " "}[end],
            [x.replace(" ", "T") for x in DATES],
        )
        rows = [mark.join(["u", *x]) for x in zip(items, dates, strict=True)]
        head = ["user,item,time"] if end == "csv" else []
        path.write_text("\n".join([*head, *rows]))
    (user,) = histories(path).examples("test")
    assert user["item"] == [*"abcd"]


def test_numbers_are_numbers_and_equal_times_keep_the_order_of_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user,item,time\nu,d,1e2\nu,b,9\nu,c,10.5\nu,a,9\n")
    (user,) = histories(path).examples("test")
    assert user["item"] == [*"bacd"] and user["time"] == [9, 9, 10.5, 100]


@pytest.mark.parametrize(
    ("times", "parts"),
    [
        (["3/12/2020", "1/1/2021"], ("'3/12/2020'", "neither", "2020-12-31")),
        (["nan", "1"], ("nan is no time", "remove it")),
        (["", "1"], ("line 2", "is empty", "remove it")),
        (["1", "2020-01-01"], ("'1'", "neither", "write all times so")),
    ],
)
def test_what_has_no_order_in_time_is_told(tmp_path, times, parts):
    path = tmp_path / "x.csv"
    path.write_text("user,item,time\n" + "".join(f"u,a,{x}\n" for x in times))
    with pytest.raises(DataError) as caught:
        histories(path).log  # noqa: B018
    assert all(part in str(caught.value) for part in ("data.time", *parts))


def test_every_item_of_a_user_has_its_time(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"item": [1, 2], "time": [1]}, {"item": [1], "time": [1, 2]}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match="line 1: 1 values in data.time.* 2 items"):
        histories(path, user="").log  # noqa: B018
