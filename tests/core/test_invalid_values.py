"""What pydantic refused, in words."""

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from visionaccel.core.invalid_values import problems_of


class Inner(BaseModel):
    number: int


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner(number=1)

    @model_validator(mode="after")
    def _even(self):
        if self.inner.number % 2 == 0:
            raise ValueError("it must be odd")
        return self


def refused(document):
    with pytest.raises(ValidationError) as caught:
        Document.model_validate(document)
    return caught.value


def test_a_problem_is_named_with_its_place_and_without_the_value():
    words = problems_of(refused({"inner": {"number": "secret"}}))
    assert words.startswith("inner.number: Input should be a valid integer")
    assert "secret" not in words


def test_a_problem_of_the_whole_has_no_place():
    assert problems_of(refused({"inner": {"number": 2}})) == "Value error, it must be odd"


def test_five_problems_are_named_and_the_others_counted():
    words = problems_of(refused({f"extra{number}": 0 for number in range(7)}))
    assert words.count("Extra inputs are not permitted") == 5
    assert words.endswith("; and 2 more")


def test_problems_may_be_described_with_their_values():
    error = refused({"inner": {"number": "seven"}})
    assert problems_of(error, lambda problem: f"{problem['input']} is wrong") == "seven is wrong"


def test_another_error_says_what_it_says():
    assert problems_of(OSError("no such file")) == "no such file"
