"""goose_lora.rewards.group_judge: shares of wins by a judge behind a server, as a reward."""

import threading
import time

import pytest
from judge_server import completion, impatient_server, longer, question

from goose_lora.cli.judging import check_reward_judges
from goose_lora.errors import TimeLimitError, UserError
from goose_lora.files import read_jsonl
from goose_lora.rewards.classifier import reward_function, reward_sources
from goose_lora.rewards.group_judge import calls_for, compared_pairs, served_judge
from goose_lora.rewards.pairwise_judge import CACHE_FILE
from goose_lora.rewards.sources import RewardMix

NAME = "openai:org/m"


@pytest.fixture
def server(monkeypatch):
    with impatient_server(monkeypatch, retries=1) as served:
        yield served


def a_judge(server, folder, **changes):
    return served_judge(NAME, base_url=server.url, rubric=None, cache=folder / CACHE_FILE, **changes)


def shares(judge, groups, prompts=None, **options):
    """Scores of groups of replies, each group to a prompt of its own."""
    prompts = prompts or [f"prompt {number}" for number in range(len(groups))]
    asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    mix = RewardMix([judge], **options)
    return mix(None, prompts=asked, completions=[reply for group in groups for reply in group])


def settled(server):
    """How many questions there are once a while has passed without another."""
    asked = None
    while asked != len(server.bodies):
        asked = len(server.bodies)
        time.sleep(1.5)
    return asked


def by_definition(lengths, place):
    """The share of the others that a reply is longer than, ties half."""
    others = [length for other, length in enumerate(lengths) if other != place]
    return sum((lengths[place] > x) + 0.5 * (lengths[place] == x) for x in others) / len(others)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 16])
def test_each_reply_meets_all_others_or_four_and_none_twice(count):
    pairs = compared_pairs(count)
    met = [{a + b - one for a, b in pairs if one in (a, b)} for one in range(count)]
    assert [len(others) for others in met] == [min(count - 1, 4)] * count
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == sum(map(len, met)) / 2
    assert not any(one in others for one, others in enumerate(met))
    assert calls_for(count) == 2 * len(pairs) <= 4 * count


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_reply_scores_the_share_of_the_others_that_it_beats(count, server, tmp_path):
    lengths = [3, 9, 3, 12, 1][:count]
    judge = a_judge(server, tmp_path)
    # Replies of one length are other texts, those of the second group are one text
    groups = [["abcde"[place] * n for place, n in enumerate(lengths)], ["same"] * count]
    found = shares(judge, groups).total.tolist()
    wanted = [by_definition(lengths, place) for place in range(count)]
    assert found == pytest.approx([*wanted, *[0.5] * count])
    assert sum(found[:count]) == pytest.approx(count / 2)
    assert len(server.bodies) == judge.last.calls == calls_for(count)


def test_in_a_large_group_a_reply_meets_its_neighbours(server, tmp_path):
    lengths = [5, 2, 7, 1, 9, 4, 3, 8]
    found = shares(a_judge(server, tmp_path), [["x" * n for n in lengths]]).total.tolist()
    near = [[lengths[(place + step) % 8] for step in (-2, -1, 1, 2)] for place in range(8)]
    assert found == [sum(own > other for other in near[i]) / 4 for i, own in enumerate(lengths)]
    assert len(server.bodies) == 32 == calls_for(8)


def test_a_judge_that_takes_a_place_decides_nothing(server, tmp_path):
    server.says = lambda body: completion("B")
    judge = a_judge(server, tmp_path)
    assert shares(judge, [["a", "bb", "ccc"]]).total.tolist() == [0.5] * 3
    assert judge.last.agreement([1.0, 2.0, 3.0]) == (0.0, 0)


def test_rows_of_one_prompt_belong_together_with_system_turns_and_all(server, tmp_path):
    turns = [[{"role": "system", "content": say}, {"role": "user", "content": "?"}] for say in ("x", "y")]
    found = shares(a_judge(server, tmp_path), [["a", "bb"], ["ccc", "d"]], turns).total.tolist()
    assert found == [0.0, 1.0, 1.0, 0.0]
    assert [question(body)["request"] for body in server.bodies].count(turns[0]) == 2
    # One prompt may come in text, and a group of any size beside another
    assert shares(a_judge(server, tmp_path), [["a", "bb", "ccc"], ["d"]]).total.tolist() == [0.0, 0.5, 1, 0.5]


def test_a_reply_that_stands_alone_is_asked_about_by_nobody(server, tmp_path):
    judge = a_judge(server, tmp_path)
    RewardMix([judge]).check("prompt", {"answer": "4"}, [1, 2])
    assert shares(judge, [["a"], ["bb"]]).total.tolist() == [0.5, 0.5]
    mix = RewardMix([judge, len_of], [1.0, 2.0]).without_judges()
    said = mix(None, prompts=["p"] * 2, completions=["a", "bb"])
    assert said.total.tolist() == [2.5, 4.5] and list(said.by_source) == ["m", "len_of"]
    assert server.bodies == []


def len_of(completions, **columns):
    return [float(len(text)) for text in completions]


def test_it_answers_while_other_functions_run(server, tmp_path):
    asked = threading.Event()
    server.says = lambda body: asked.set() or longer(body)

    def waits_for_the_question(completions, **columns):
        assert asked.wait(20), "the judge was not asked before this function had ended"
        return [0.0] * len(completions)

    async def is_async(completions, **columns):
        return [float(text == "bb") for text in completions]

    mix = RewardMix([waits_for_the_question, is_async, a_judge(server, tmp_path)], [1.0, 1.0, 1.0])
    said = mix(None, prompts=["p"] * 2, completions=["a", "bb"])
    assert said.total.tolist() == [0.0, 2.0]
    assert [name for name in said.by_source] == ["waits_for_the_question", "is_async", "m"]


def test_a_time_limit_ends_it_and_nothing_more_is_asked(server, tmp_path):
    # The first ones at once, the others a second after another, four at a time
    server.says = lambda body: (len(server.bodies) > 8 and time.sleep(1)) or longer(body)
    judge = a_judge(server, tmp_path)
    with pytest.raises(TimeLimitError, match=r"reward function m has not answered for 3 s.*latest"):
        shares(judge, [["x" * n for n in range(1, 9)]], timeout=3)
    assert settled(server) < 32
    # What was answered counts next time
    again = a_judge(server, tmp_path)
    server.says = longer
    shares(again, [["x" * n for n in range(1, 9)]])
    assert again.judge.asked.cache_hits > 0 and sum(again.judge.asked) == 32


def test_where_another_function_fails_nothing_more_is_asked(server, tmp_path):
    server.says = lambda body: time.sleep(0.2) or longer(body)

    def broken(completions, **columns):
        raise RuntimeError("broken")

    mix = RewardMix([broken, a_judge(server, tmp_path)])
    with pytest.raises(UserError, match="broken"):
        mix(None, prompts=["p"] * 8, completions=["x" * n for n in range(8)])
    assert settled(server) < 32


def test_a_resumed_run_asks_nothing_twice_and_hears_the_same(server, tmp_path):
    groups = [["x" * n for n in (4, 2, 9)], ["y" * n for n in range(1, 9)]]
    # One question is refused, and would be answered the next time
    refused = []

    def refuses_one(body):
        if question(body)["reply_a"] == "xxxx" and question(body)["reply_b"] == "xx":
            refused.append(body)
            return completion("I would rather not.")
        return longer(body)

    server.says = refuses_one
    first = a_judge(server, tmp_path)
    wanted = shares(first, groups).total.tolist()
    # 4 meets 9 alone, and 2 likewise: what was not answered is left out
    assert wanted[:3] == [0.0, 0.0, 1.0] and len(refused) == 1
    assert first.judge.asked == (38, 0, 1) and "No verdict on 1" in first.judge.told()
    server.says = longer
    again = a_judge(server, tmp_path)
    assert shares(again, groups).total.tolist() == wanted and again.judge.asked == (0, 38, 0)
    assert len(server.bodies) == 38
    assert [row["verdict"] for row in read_jsonl(tmp_path / CACHE_FILE)].count("none") == 1


def test_a_pair_without_an_answer_is_no_verdict_on_either(server, tmp_path):
    server.says = lambda body: completion("Hm.")
    assert shares(a_judge(server, tmp_path), [["a", "bb"]]).total.tolist() == [0.5, 0.5]


def test_more_than_a_tenth_of_a_runs_questions_without_a_verdict_end_it(server, tmp_path):
    server.says = lambda body: completion("Hm.")
    judge = a_judge(server, tmp_path)
    with pytest.raises(UserError, match=r"no verdict on 6 of 50 questions.*resume_from_checkpoint latest"):
        shares(judge, [[f"{n}", f"{n} a"] for n in range(10)])
    assert len(server.bodies) < 12


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_server_that_fails_in_the_middle_of_a_run_is_one_line_with_the_way_on(server, tmp_path, status):
    server.says = lambda body: (status, {"error": {"message": "no"}})
    with pytest.raises(UserError) as error:
        shares(a_judge(server, tmp_path), [["a", "bb"]])
    said = str(error.value)
    assert f"({status})" in said and "--resume_from_checkpoint latest" in said and "\n" not in said
    assert CACHE_FILE in said


def test_processes_write_files_of_their_own(server, tmp_path):
    for process, group in enumerate((["a", "bb"], ["ccc", "d"])):
        shares(a_judge(server, tmp_path, process=process), [group])
    assert {path.name for path in tmp_path.iterdir()} == {CACHE_FILE, "judge_cache_1.jsonl"}
    again = a_judge(server, tmp_path, process=1)
    shares(again, [["ccc", "d"]])
    assert again.judge.asked == (0, 2, 0)


def test_agreement_is_of_the_pairs_that_are_decided(server, tmp_path):
    judge = a_judge(server, tmp_path)
    scores = shares(judge, [["a", "bb", "cc", "dddd"]])
    # Decided: all but bb against cc
    assert judge.last.agreement([1.0, 2.0, 3.0, 4.0]) == (5.0, 5)
    assert judge.last.agreement([4.0, 3.0, 2.0, 1.0]) == (0.0, 5)
    assert judge.last.agreement([1.0, 1.0, 1.0, 1.0]) == (2.5, 5)
    assert judge.last.agreement([9.0, 2.0, 3.0, 4.0]) == (2.0, 5)
    # Of the rest of what is paid: here nothing, and beside a source that likes short replies
    assert RewardMix([judge]).judged(scores) == {"m": (12, 0.0, 0)}

    def shorter(completions, **columns):
        return [-float(len(text)) for text in completions]

    for weights in ([1.0, 0.0], [1.0, 0.7]):
        mix = RewardMix([shorter, judge], weights)
        said = mix(None, prompts=["p"] * 3, completions=["a", "bb", "ccc"])
        assert mix.judged(said)["m"][1:] == (0.0, 3)


def test_it_is_another_source_by_its_model_and_rubric(server, tmp_path):
    made = RewardMix([a_judge(server, tmp_path)]).made_of()
    (tmp_path / "rubric.txt").write_text("Shorter is better.")
    other = served_judge(
        NAME, base_url=server.url, rubric=str(tmp_path / "rubric.txt"), cache=tmp_path / CACHE_FILE
    )
    assert set(made) == {"rewards", "reward m"}
    assert RewardMix([other]).made_of()["reward m"] != made["reward m"]
    same = served_judge(NAME, base_url=server.url, rubric=None, cache=tmp_path / "elsewhere.jsonl")
    assert RewardMix([same]).made_of() == made


def test_a_name_becomes_a_judge_where_a_run_has_groups(server, tmp_path):
    made = reward_sources(["adapter", NAME], has_adapter=True, judge=lambda name: a_judge(server, tmp_path))
    assert made[0] == "adapter" and RewardMix(made).judges.keys() == {"m"}
    with pytest.raises(UserError, match="stands twice"):
        reward_sources([NAME, NAME], has_adapter=False, judge=lambda name: a_judge(server, tmp_path))
    with pytest.raises(UserError, match=r"judge of recipes/evaluate\.py and reward_function of recipes/ppo"):
        reward_function(NAME)


@pytest.mark.parametrize(
    ("names", "url", "rubric", "words"),
    [
        (None, "http://x/v1", None, "Set reward_function: openai:MODEL beside it"),
        (["adapter", "m:f"], None, "r.txt", "reward_function is adapter, m:f"),
        (["adapter", "openai:"], None, None, "reward_function=openai:: names no model"),
        ("openai:m", "localhost:1", None, "judge_base_url=localhost:1: is no address"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(names, url, rubric, words):
    with pytest.raises(UserError) as error:
        check_reward_judges(names, url, rubric)
    assert words in str(error.value)
    check_reward_judges(["adapter", "openai:m"], "http://x/v1", None)
