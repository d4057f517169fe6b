"""Reward functions are strangers: whatever one does ends in one line with its name, and harms
neither the run nor the other functions."""

import asyncio
import decimal
import logging
import os
import re

import numpy as np
import pytest
import torch

from goose_lora.errors import UserError
from goose_lora.rewards.scale import score_scale
from goose_lora.rewards.sources import RewardMix

REPLIES = {
    "prompts": ["a", "b"],
    "completions": ["x", "yy"],
    "completion_ids": [[1], [2, 2]],
    "label": [5, 6],
}


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Wordless:
    """A number that is none, and cannot be shown."""

    def __float__(self):
        raise OSError("no float")

    def __repr__(self):
        raise ValueError("no repr")


class Lying(list):
    def __iter__(self):
        raise KeyError("no items")


def raises(error):
    def stranger(**replies):
        raise error

    return stranger


def awaits(error):
    async def stranger(**replies):
        await asyncio.sleep(0)
        raise error

    return stranger


def returns(answer):
    def stranger(**replies):
        return answer

    return stranger


def positional(prompt, reply, /):
    return [0.0]


def two_names(prompts, completions):
    return [0.0] * len(prompts)


def another_name(prompts, completions, completion_ids, label, answer):
    return [0.0] * len(prompts)


class Judge:
    def __call__(self, prompts, completions, **columns):
        return [1.0] * len(prompts)

    def method(self, prompts, **columns):
        return [1.0] * len(prompts)


STRANGERS = {
    "sys.exit": (raises(SystemExit(3)), "raised SystemExit"),
    "exit without a code": (raises(SystemExit()), "raised SystemExit"),
    "GeneratorExit": (raises(GeneratorExit()), "raised GeneratorExit"),
    "CancelledError": (raises(asyncio.CancelledError()), "raised CancelledError"),
    "StopIteration": (raises(StopIteration()), "raised StopIteration"),
    "its own timeout": (raises(TimeoutError("server")), "raised TimeoutError .*server"),
    "MemoryError": (raises(MemoryError()), "raised MemoryError"),
    "a group of errors": (raises(BaseExceptionGroup("many", [SystemExit()])), "raised BaseExceptionGroup"),
    "an error without words": (raises(Mute()), "raised Mute .*whose text cannot be had"),
    "an error with many words": (raises(ValueError("x" * 10**6)), r"raised ValueError .*xxx\.\.\.$"),
    "async sys.exit": (awaits(SystemExit(3)), "raised SystemExit"),
    "async CancelledError": (awaits(asyncio.CancelledError()), "raised CancelledError"),
    "async GeneratorExit": (awaits(GeneratorExit()), "raised GeneratorExit"),
    "async error without words": (awaits(Mute()), "raised Mute"),
    "10**400": (returns([0.0, 10**400]), "too large for reply 1: 1000"),
    "10**5000": (returns([10**5000, 0.0]), "too large for reply 0: a int whose text cannot be had"),
    "1e39, beyond float32": (returns([1e39, 0.0]), "returned 1e\\+39 for reply 0"),
    "a decimal that is none": (returns([decimal.Decimal("sNaN"), 0]), "no number for reply 0"),
    "a number whose float fails": (returns([Wordless(), 0]), "no number for reply 0: a Wordless whose text"),
    "a complex number": (returns([1j, 0]), "no number for reply 0: 1j"),
    "numbers as text": (returns(["1", "2"]), "no number for reply 0: 1"),
    "one text for all": (returns("12"), "returned str for 2 replies"),
    "bytes": (returns(b"ab"), "returned bytes for 2 replies"),
    "a mapping": (returns({0: 1.0, 1: 2.0}), "returned dict for 2 replies"),
    "a generator": (returns(number for number in (1.0, 2.0)), "returned generator for 2 replies"),
    "a tensor of no dimension": (returns(torch.tensor(1.0)), "returned Tensor for 2 replies"),
    "a list that cannot be read": (returns(Lying([1.0, 2.0])), "raised KeyError"),
    "a class": (Judge, r"Judge cannot be called: .*unexpected keyword"),
    "positions alone": (positional, "positional cannot be called: .*def positional"),
    "two names": (
        two_names,
        "two_names cannot be called: got an unexpected keyword argument 'completion_ids'",
    ),
    "a column that is not there": (another_name, "cannot be called: missing a required argument: 'answer'"),
    "a function of C": (len, "len cannot be called|raised TypeError"),
}


@pytest.mark.parametrize(("function", "says"), STRANGERS.values(), ids=STRANGERS)
def test_whatever_a_function_does_is_one_line_with_its_name(function, says):
    name = function.__name__
    with pytest.raises(UserError, match=rf"^the reward function {name} {says}|{says}") as told:
        RewardMix([function])(None, **REPLIES)
    assert name in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 500


@pytest.mark.parametrize(("function", "says"), STRANGERS.values(), ids=STRANGERS)
def test_it_is_found_on_one_reply(function, says):
    if "reply 1" in says or "2 replies" in says or "a generator" in says:
        pytest.skip("says something of the second reply")
    with pytest.raises(UserError, match=function.__name__):
        RewardMix([function]).check("a", {"label": 5}, [1])


def test_ctrl_c_is_no_error_of_the_function():
    with pytest.raises(KeyboardInterrupt):
        RewardMix([raises(KeyboardInterrupt())])(None, **REPLIES)


@pytest.mark.parametrize("judge", [Judge(), Judge().method], ids=["object", "method"])
@pytest.mark.parametrize("column", ["self", "by_adapter"])
def test_a_column_may_have_any_name(judge, column):
    def plain(**columns):
        return [float(number) for number in columns[column]]

    replies = REPLIES | {column: [3, 4]}
    assert RewardMix([plain])(None, **replies).total.tolist() == [3, 4]
    if column == "self":
        if judge.__class__ is Judge:
            judge.__name__ = "judge"
        with pytest.raises(
            UserError, match=r"cannot be called: multiple values for argument 'self'.*column_mapping"
        ):
            RewardMix([judge])(None, **replies)
    else:
        assert RewardMix([judge])(None, **replies).total.tolist() == [1, 1]


@pytest.mark.parametrize("is_async", [False, True])
def test_the_working_directory_is_what_it_was(tmp_path, monkeypatch, caplog, is_async):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def wanders(prompts, **replies):
        os.chdir("elsewhere")
        return [1.0] * len(prompts)

    async def wanders_off(prompts, **replies):
        return wanders(prompts)

    with caplog.at_level(logging.WARNING):
        RewardMix([wanders_off if is_async else wanders])(None, **REPLIES)
    assert os.getcwd() == str(tmp_path) and "has left the working directory" in caplog.text


def test_what_a_function_does_to_its_lists_concerns_nobody_else():
    def spoils(completions, completion_ids, label, **replies):
        completion_ids[0].clear()
        for values in (completions, completion_ids, label):
            values.clear()
        return [1.0, 2.0]

    def counts(completions, completion_ids, label, **replies):
        return [float(len(ids) + number) for ids, number in zip(completion_ids, label, strict=True)]

    replies = {name: list(values) for name, values in REPLIES.items()}
    assert RewardMix([spoils, counts])(None, **replies).total.tolist() == [1 + 6, 2 + 8]
    assert replies == REPLIES


def test_a_plain_function_may_have_an_event_loop_of_its_own():
    async def one():
        return 1.0

    def loops(prompts, **replies):
        return [asyncio.run(one()) for _ in prompts]

    assert RewardMix([loops])(None, **REPLIES).total.tolist() == [1, 1]


def test_arrays_of_numpy_are_answers():
    assert RewardMix([returns(np.array([1.5, 2]))])(None, **REPLIES).total.tolist() == [1.5, 2]
    assert RewardMix([returns([np.float32(1.5), np.int64(2)])])(None, **REPLIES).total.tolist() == [1.5, 2]


def test_functions_of_texts_alone_are_given_nothing_else():
    mix = RewardMix([two_names])
    mix.check("a")
    assert mix.numbers(prompts=["a"], completions=["b"]) == [0.0]


@pytest.mark.parametrize(
    ("names", "whose"), [(["judge"], "what scores (judge)"), (["adapter"], "the reward model")]
)
def test_a_constant_function_is_blamed_as_such(names, whose):
    with pytest.raises(UserError, match=re.escape(f"the scores of {whose} cannot be normalised")) as told:
        score_scale(torch.full((4,), 0.5), names)
    assert "standard deviation of 0, all the same" in str(told.value)
    assert ("verdict" in str(told.value)) == (names == ["adapter"])
