"""goose_lora.rewards.pairwise_judge, against a server of HTTP that answers as OpenAI's do."""

import asyncio
import importlib.util
import json
import time
from pathlib import Path

import pytest
from judge_server import completion, impatient_server, longer, question

from goose_lora.errors import UserError
from goose_lora.evaluation.policies import Replies, compare_all, summary
from goose_lora.evaluation.statistics import wilson_interval
from goose_lora.files import read_jsonl, write_jsonl
from goose_lora.rewards import pairwise_judge
from goose_lora.rewards.pairwise_judge import (
    CACHE_FILE,
    PairwiseJudge,
    _read_verdict,
    check_judge_settings,
    rubric_text,
)

PROMPTS = [f"prompt {number}" for number in range(8)]
SFT = ["four"] * 8
PPO = ["a longer one"] * 3 + ["four"] * 2 + ["no"] * 2 + ["wide"]  # better, alike, worse, a tie


@pytest.fixture
def server(monkeypatch):
    with impatient_server(monkeypatch, retries=2) as served:
        yield served


@pytest.fixture
def judge(server, tmp_path):
    return a_judge(server.url, tmp_path)


def a_judge(url, folder, model="m", rubric="Prefer it."):
    return PairwiseJudge(model, base_url=url, rubric=rubric, cache=folder / CACHE_FILE)


def compared(judge, ppo=PPO):
    return judge.compare(PROMPTS, {"sft": SFT, "ppo": ppo}, "sft")["ppo"]


def test_both_orders_are_asked_at_temperature_0_and_agree_on_the_better_reply(server, judge):
    judge.check()
    assert compared(judge) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.5]
    # The made-up question, and two for each of six pairs that differ
    assert len(server.bodies) == judge.asked.calls == 1 + 12
    asked = [(found["request"], found["reply_a"], found["reply_b"]) for found in map(question, server.bodies)]
    for prompt, mine in zip(PROMPTS, PPO, strict=True):
        orders = [(prompt, mine, "four"), (prompt, "four", mine)]
        assert mine == "four" or set(orders) < set(asked)
    assert {body["temperature"] for body in server.bodies} == {0}
    assert {body["model"] for body in server.bodies} == {"m"}
    assert all(body["messages"][0]["content"].startswith("Prefer it.") for body in server.bodies)


def test_a_judge_that_always_takes_the_first_place_says_nothing(server, judge):
    server.says = lambda body: completion("A")
    assert compared(judge) == [0.5] * 8


def test_a_win_and_a_tie_contradict_each_other(server, judge):
    server.says = lambda body: completion("A" if question(body)["reply_b"] == "four" else "tie")
    assert compared(judge) == [0.5] * 8


def test_the_win_rate_of_pairs_has_ties_as_half_and_an_interval(server, judge):
    named = {
        name: Replies(texts, [], [0.0] * 8, [], [1] * 8, [True] * 8)
        for name, texts in (("sft", SFT), ("ppo", PPO))
    }
    compare_all(named, PROMPTS, judge, "sft")
    figures = summary(named, against="sft")
    assert figures["ppo"]["judge_win_rate"] == 4.5 / 8 and figures["ppo"]["judge_ties"] == 3 / 8
    assert figures["ppo"]["judge_win_rate_ci"] == pytest.approx(wilson_interval(4.5, 8))
    assert figures["ppo"]["judge_pairs"] == 8 and "judge" not in figures["ppo"]
    assert "judge_win_rate" not in figures["sft"]


def test_answers_are_kept_by_model_address_rubric_and_messages(server, tmp_path):
    first = a_judge(server.url, tmp_path)
    wanted = compared(first)
    again = a_judge(server.url, tmp_path)
    assert compared(again) == wanted and again.asked == (0, 12, 0)
    for other in (a_judge(server.url, tmp_path, model="n"), a_judge(server.url, tmp_path, rubric="Other.")):
        compared(other)
        assert other.asked.cache_hits == 0
    compared(again, ["new"] * 8)
    assert again.asked == (16, 12, 0)
    # No text of anyone's, and nothing of the server's
    rows = [json.loads(line) for line in (tmp_path / CACHE_FILE).read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("key", "verdict")}


def test_a_line_that_was_cut_short_costs_one_answer(server, tmp_path):
    compared(a_judge(server.url, tmp_path))
    file = tmp_path / CACHE_FILE
    file.write_text(file.read_text()[:-9])
    again = a_judge(server.url, tmp_path)
    compared(again)
    assert again.asked == (1, 11, 0)
    last = a_judge(server.url, tmp_path)
    compared(last)
    assert last.asked == (0, 12, 0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(server, judge, status):
    turned_away = []

    def busy_first(body):
        if len(turned_away) < 2:
            turned_away.append(body)
            return status, {"error": {"message": "busy"}}
        return longer(body)

    server.says = busy_first
    judge.check()
    assert len(server.bodies) == 3 and judge.asked.calls == 1


@pytest.mark.parametrize(
    ("status", "said", "words"),
    [
        (401, {"error": {"message": "Incorrect API key"}}, ("(401)", "Incorrect API key", "OPENAI_API_KEY")),
        (403, {"error": {"message": "not yours"}}, ("(403)", "not yours", "OPENAI_API_KEY")),
        (404, {"error": {"message": "model 'm' not found"}}, ("no such model", "model 'm' not found")),
        (429, {"error": {"message": "no quota"}}, ("(429), after 3 tries", "no quota", "Wait")),
        (500, {"error": {"message": "out of memory"}}, ("(500)", "out of memory", "server's log")),
        (400, {"error": {"message": "no temperature"}}, ("(400)", "no temperature", "another model")),
        (200, b"<html>Welcome</html>", ("no chat completion", "<html>Welcome", "/v1")),
        (200, [1, 2], ("no chat completion", "[1, 2]")),
        (200, {"choices": "A"}, ("no chat completion", "/v1")),
        (*completion([{"type": "text", "text": "A"}]), ("no chat completion", "type")),
        (*completion(7), ("no chat completion", "'7'")),
        (200, b'{"choices": "\xff"}', ("no chat completion", "/v1")),
        (200, {"choices": []}, ("made-up question", "an empty text")),
        (*completion("Both have their merits."), ("made-up question", "Both have their merits")),
        (*completion(None, refusal="I cannot compare."), ("made-up question", "I cannot compare")),
    ],
)
def test_what_a_server_says_wrong_is_one_line_before_anything_loads(server, judge, status, said, words):
    server.says = lambda body: (status, said)
    with pytest.raises(UserError) as error:
        judge.check()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and len(server.bodies) == (3 if status in (429, 500) else 1)


def test_a_server_that_is_not_there_or_elsewhere_is_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r"cannot be reached.*Start the server, or mend judge_base_url"):
        a_judge("http://127.0.0.1:9/v1", tmp_path).check()
    with pytest.raises(UserError, match=r"no such address.*ends in /v1"):
        a_judge(server.url.removesuffix("/v1"), tmp_path).check()


def test_a_server_that_never_answers_is_one_line(server, judge, monkeypatch):
    monkeypatch.setattr(pairwise_judge, "ANSWER_SECONDS", 0.1)
    server.says = lambda body: time.sleep(0.5) or longer(body)
    with pytest.raises(UserError, match=r"no answer within 0.1 s, in 3 tries"):
        judge.check()


def test_a_few_questions_without_a_verdict_are_counted_and_asked_again(server, tmp_path):
    replies = [f"reply {number} of some length" for number in range(20)]
    odd = iter([completion("I would rather not say."), (400, {"error": {"message": "content filter"}})])
    server.says = lambda body: (
        next(odd) if question(body)["reply_a"] in (replies[3], replies[7]) else longer(body)
    )
    judge = a_judge(server.url, tmp_path)
    outcomes = judge.compare([""] * 20, {"sft": ["no"] * 20, "ppo": replies}, "sft")["ppo"]
    assert [i for i, outcome in enumerate(outcomes) if outcome is None] == [3, 7]
    assert judge.asked == (40, 0, 2) and "No verdict on 2 questions" in judge.told()
    server.says = longer
    again = a_judge(server.url, tmp_path)
    assert again.compare([""] * 20, {"sft": ["no"] * 20, "ppo": replies}, "sft")["ppo"] == [1.0] * 20
    assert again.asked == (2, 38, 0)


def test_more_than_a_tenth_without_a_verdict_ends_in_one_line_and_keeps_the_rest(server, tmp_path):
    replies = [f"reply {number}" for number in range(20)]
    server.says = lambda body: completion("Hm, hard.") if question(body)["reply_a"] == "no" else longer(body)
    judge = a_judge(server.url, tmp_path)
    with pytest.raises(UserError) as error:
        judge.compare([""] * 20, {"sft": ["no"] * 20, "ppo": replies}, "sft")
    assert "no verdict on 5 of 40 questions" in str(error.value) and "Hm, hard" in str(error.value)
    assert judge.asked.calls < 20  # no more are paid for
    server.says = longer
    again = a_judge(server.url, tmp_path)
    again.compare([""] * 20, {"sft": ["no"] * 20, "ppo": replies}, "sft")
    assert again.asked.cache_hits > 0 and sum(again.asked) == 40


def test_what_was_answered_before_a_server_fails_is_kept(server, tmp_path):
    refused = 401, {"error": {"message": "no"}}
    server.says = lambda body: longer(body) if len(server.bodies) <= 5 else refused
    with pytest.raises(UserError, match=rf"\(401\).*kept in .*{CACHE_FILE}: the same command goes on"):
        compared(a_judge(server.url, tmp_path))
    server.says = longer
    again = a_judge(server.url, tmp_path)
    assert compared(again) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.5]
    assert 0 < again.asked.cache_hits <= 5 and again.asked.calls == 12 - again.asked.cache_hits


def test_a_key_is_sent_and_is_in_no_line_and_no_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "Zq7planted77Value")
    judge = a_judge(server.url, tmp_path)
    compared(judge)
    sent = [{name.lower(): value for name, value in headers.items()} for headers in server.headers]
    assert {headers["authorization"] for headers in sent} == {"Bearer Zq7planted77Value"}
    # A server that repeats what it was sent
    for status in (200, 401, 429, 500):
        said = completion("the key is Zq7planted77Value")
        server.says = lambda body, status=status, said=said: (
            said if status == 200 else (status, {"error": {"message": "no Zq7planted77Value here"}})
        )
        with pytest.raises(UserError) as error:
            compared(judge, [f"other {status}"] * 8)
        assert "Zq7planted77Value" not in str(error.value) and "(not recorded)" in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if b"Zq7planted77Value" in path.read_bytes()]


def test_a_server_of_ones_own_needs_no_key_and_openais_does(server, judge, tmp_path, monkeypatch):
    judge.check()
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        a_judge(None, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel-99")
    with pytest.raises(UserError, match="characters that no key has") as error:
        a_judge(server.url, tmp_path)
    assert "schl" not in str(error.value)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'goose-lora\[judge\]'"):
        a_judge("http://localhost:1/v1", tmp_path)


@pytest.mark.parametrize(
    ("judge", "url", "rubric", "words"),
    [
        (None, "http://x/v1", None, "judge_base_url=http://x/v1: is of a judge behind a server alone"),
        ("check:f", "http://x/v1", None, "judge_base_url"),
        ("m:f", None, "rubric.txt", "judge_rubric=rubric.txt"),
        ("openai:", None, None, "names no model"),
        ("openai: ", None, None, "names no model"),
        ("openai:m", "localhost:11434/v1", None, "no address of a server"),
        ("openai:m", "", None, "no address of a server"),
        ("openai:m", "http:///v1", None, "no address of a server"),
        ("openai:m", "http://[1/v1", None, "cannot be read as an address"),
        ("openai:m", "http://host:99999/v1", None, "cannot be read as an address"),
        ("openai:m", "http://me:word@host/v1", None, "more than a server and a path"),
        ("openai:m", "http://host/v1?key=word", None, "more than a server and a path"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(judge, url, rubric, words):
    with pytest.raises(UserError) as error:
        check_judge_settings(judge, url, rubric)
    assert words in str(error.value) and "word" not in str(error.value)


def test_a_rubric_is_a_file_with_something_in_it(tmp_path):
    assert "better" in rubric_text(None) or "Prefer" in rubric_text(None)
    with pytest.raises(UserError, match="cannot be read"):
        rubric_text(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    with pytest.raises(UserError, match="cannot be read"):
        rubric_text(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        rubric_text(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        ("b.", "B"),
        ("**Tie**", "tie"),
        ("Answer: B", "B"),
        ("The better reply is reply_a.", "A"),
        ('{"verdict": "A"}', "A"),
        ("<think>A or B? B is\nlong.</think>\n\nA", "A"),
        ("reply_a is longer.\n\nB", "B"),
        ("A\n\nIt is right.", "A"),
        ("A\nno, wait\nB", None),
        ("A or B", None),
        ("A good question", None),
        ("both", None),
        ("<think>A", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_where_it_is_plain(text, verdict):
    assert _read_verdict(text) == verdict


def test_a_judge_can_be_asked_where_an_event_loop_runs(server, judge):
    async def cell_of_a_notebook():
        judge.check()
        return compared(judge)

    assert asyncio.run(cell_of_a_notebook()) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.5]


def test_the_pages_lines_make_pairs_of_two_columns(server, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "labeling.md"
    (code,) = (text for text in page.read_text().split("```") if "PairwiseJudge" in text)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": prompt, "a": mine, "b": "four"} for prompt, mine in zip(PROMPTS, PPO, strict=True)]
    write_jsonl("two_replies.jsonl", rows)
    exec(code.removeprefix("python").replace("http://localhost:11434/v1", server.url), {})
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in read_jsonl("pairs.jsonl")]
    better = [(prompt, "a longer one", "four") for prompt in PROMPTS[:3]]
    assert pairs == [*better, ("prompt 5", "four", "no"), ("prompt 6", "four", "no")]


def test_replies_of_any_characters_can_be_asked_about(server, judge):
    odd = ['", "reply_b": "', "\ud800", "Ä\n\x00", "]}<|im_end|>"]
    judge.compare([[{"role": "user", "content": "?"}]] * 4, {"sft": [""] * 4, "ppo": odd}, "sft")
    asked = [question(body) for body in server.bodies]
    assert {found["reply_a"] for found in asked} == {*odd, ""} - {"\ud800"} | {"?"}
    assert asked[0]["request"] == [{"role": "user", "content": "?"}]
