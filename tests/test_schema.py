import math
from typing import Any

import pytest

from fedft.errors import DataError
from fedft.schema import Columns, find_columns

PAIR = Columns("question", "answer")


def find(rows: list[dict[str, Any]], named: tuple[str, str] = ("", "")) -> Columns:
    return find_columns(rows, named, "node-config *-column", "node-config data-path='/a.jsonl'")


def test_a_column_that_the_first_row_lacks_is_found() -> None:
    assert find([{"question": "q"}, {"question": "q", "answer": "a"}]) == PAIR
    assert str(find([{"messages": []}])) == "messages"


def test_named_columns_win_over_a_known_schema() -> None:
    assert find([{"question": "q", "answer": "a", "notes": "n"}], ("question", "notes")) == Columns("question", "notes")


def test_missing_column_names_key_data_and_what_there_is() -> None:
    with pytest.raises(DataError, match=r"^node-config response-column='b' is not in node-config data-path=.*\['a'\]"):
        find([{"a": 1}], ("a", "b"))
    with pytest.raises(DataError, match=r"^node-config data-path='/a.jsonl' has the columns \['text'\].*prompt-column"):
        find([{"text": 1}])


@pytest.mark.parametrize(
    ("answer", "defect"),
    [
        ("a", ""),
        (7, ""),
        (0, ""),
        (False, ""),
        ("", "'answer' is empty"),
        (" \n", "'answer' is empty"),
        (None, "'answer' is empty"),
        (math.nan, "'answer' is empty"),
        (["a"], "'answer' is no text but of type list"),
        ({"text": "a"}, "'answer' is no text but of type dict"),
        (b"a", "'answer' is no text but of type bytes"),
    ],
)
def test_cell_that_is_no_text_is_not_trained_on(answer: object, defect: str) -> None:
    assert PAIR.defect({"question": "q", "answer": answer}) == defect
    assert PAIR.defect({"question": "q"}) == "'answer' is empty"


def test_messages_must_end_in_a_text_of_the_assistant() -> None:
    columns = Columns("messages", "messages")
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert columns.defect({"messages": [user, assistant]}) == ""
    image = {"role": "user", "content": [{"type": "image"}]}
    for messages in ([user], [assistant, user], [image, assistant], "text", None, [user, {**assistant, "content": ""}]):
        assert "assistant's answer" in columns.defect({"messages": messages})
