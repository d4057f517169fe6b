"""Labelling: what is chosen is on the disk and trains a reward model, nothing is asked twice, and
nobody is in anybody's way."""

import json
import logging
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from datasets import Dataset

from goose_lora.apps.label import LabelQueue, choose_two, open_queue, row_of
from goose_lora.apps.label_file import ChoiceFile, key_of
from goose_lora.apps.session import SampledReply
from goose_lora.data.rows import load_rows
from goose_lora.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [f"prompt {number}" for number in range(6)]
CHAT = [[{"role": "user", "content": f"question {number}"}] for number in range(3)]


def reply(text, score=None):
    return SampledReply(text, 2, True, score)


def two(number):
    return reply(f" left {number}"), reply(f" right {number}")


def queue(folder, prompts=PROMPTS, make=two, **options):
    return LabelQueue(prompts, make, ChoiceFile(folder / "pairs.jsonl"), policy="p1", **options)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# What is written


def test_choices_of_text_are_pairs_that_the_reward_stage_takes_and_ties_and_skips_lie_beside_them(tmp_path):
    asked = queue(tmp_path)
    for choice in ("left", "right", "tie", "skip", "left", "right"):
        pair = asked.next("a")
        assert asked.record("a", pair.key, choice)
    assert asked.next("a") is None and asked.progress() == {"prompts": 6, "pairs": 4, "passed": 2, "alike": 0}
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert {row["prompt"][-1] + row["chosen"] + row["rejected"] for row in rows} <= {
        f"{n} {a} {n} {b} {n}" for n in range(6) for a, b in (("left", "right"), ("right", "left"))
    }
    assert sum(row["chosen"].startswith(" left") for row in rows) == 2
    passed = read_jsonl(tmp_path / "pairs.passed.jsonl")
    assert [row["choice"] for row in passed] == ["tie", "skip"] and passed[0]["replies"][0].startswith(
        " left"
    )
    taken = load_rows(str(tmp_path / "pairs.jsonl"), stage="reward")
    assert len(taken) == 4 and {"prompt", "chosen", "rejected"} <= set(taken.column_names)


def test_choices_of_chat_messages_are_messages(tmp_path):
    asked = queue(tmp_path, prompts=CHAT)
    pair = asked.next("a")
    asked.record("a", pair.key, "right")
    (row,) = load_rows(str(tmp_path / "pairs.jsonl"), stage="reward")
    assert row["prompt"] == pair.prompt and row["chosen"] == [
        {"role": "assistant", "content": pair.right.text}
    ]


def test_an_edited_reply_is_chosen_over_the_one_that_it_was_made_from(tmp_path):
    asked = queue(tmp_path)
    pair = asked.next("a")
    same = "the same as before"
    for better, says in (
        ("", "is empty"),
        (" ", "is empty"),
        (pair.right.text.strip(), same),
        (pair.right.text, same),
    ):
        with pytest.raises(ValueError, match=says):
            asked.record("a", pair.key, "right", better)
    with pytest.raises(ValueError, match="goes with left or right, not with tie"):
        asked.record("a", pair.key, "tie", "x")
    assert not (tmp_path / "pairs.jsonl").exists()
    assert asked.record("a", pair.key, "right", "a better one"), (
        "the space before its first word is the prompt's need"
    )
    (row,) = read_jsonl(tmp_path / "pairs.jsonl")
    assert (row["chosen"], row["rejected"], row["edited"]) == (" a better one", pair.right.text, True)


def test_a_choice_that_is_none_and_a_pair_that_nobody_was_given_are_refused(tmp_path):
    asked = queue(tmp_path)
    key = asked.next("a").key
    with pytest.raises(ValueError, match="choice 'middle': there are left, right, tie, skip"):
        asked.record("a", key, "middle")
    with pytest.raises(ValueError, match="there is no pair 'x'"):
        asked.record("a", "x", "left")


# Nothing is lost, nothing is asked twice


def test_a_reload_shows_the_same_pair_and_a_new_start_makes_it_again(tmp_path):
    first = queue(tmp_path).next("a")
    again = queue(tmp_path)
    assert again.next("a") == first and again.next("a") == first and again.next("another name") != first


def test_what_is_labelled_is_not_shown_by_a_new_start_and_is_again_for_another_policy(tmp_path):
    asked = queue(tmp_path, prompts=PROMPTS[:2])
    done = asked.next("a")
    asked.record("a", done.key, "tie")
    again = queue(tmp_path, prompts=PROMPTS[:2])
    assert again.next("a").prompt != done.prompt and again.progress()["passed"] == 1
    other = LabelQueue(PROMPTS[:2], two, ChoiceFile(tmp_path / "pairs.jsonl"), policy="p2")
    assert other.progress()["passed"] == 0 and other.next("a").prompt == done.prompt


def test_a_choice_that_is_sent_twice_is_written_once(tmp_path):
    asked = queue(tmp_path)
    pair = asked.next("a")
    assert [asked.record("a", pair.key, "left"), asked.record("a", pair.key, "right")] == [True, False]
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == 1


@pytest.mark.parametrize(
    "torn", ['{"prompt": "prompt 1", "chosen": " le', '{"prompt": "pr\u00fc'.encode()[:-1], "{"]
)
def test_a_last_line_that_was_cut_off_is_taken_away_and_the_others_stay(torn, tmp_path, caplog):
    asked = queue(tmp_path)
    asked.record("a", asked.next("a").key, "left")
    path = tmp_path / "pairs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + (torn if isinstance(torn, bytes) else torn.encode()))
    with caplog.at_level(logging.WARNING):
        again = queue(tmp_path)
    assert path.read_bytes() == whole and "cut off in the middle" in caplog.text
    again.record("a", again.next("a").key, "right")
    assert len(read_jsonl(path)) == 2


def test_a_last_line_without_its_end_that_was_written_by_hand_is_kept(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "x", "chosen": " a", "rejected": " b"}')
    asked = queue(tmp_path)
    asked.record("a", asked.next("a").key, "left")
    assert [row["prompt"] == "x" for row in read_jsonl(path)] == [True, False]


def test_a_disk_that_is_full_leaves_the_file_whole_and_the_pair_open(tmp_path, monkeypatch):
    asked = queue(tmp_path)
    asked.record("a", asked.next("a").key, "left")
    whole, pair = (tmp_path / "pairs.jsonl").read_bytes(), asked.next("a")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goose_lora.apps.label_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        asked.record("a", pair.key, "left")
    assert (tmp_path / "pairs.jsonl").read_bytes() == whole
    monkeypatch.undo()
    assert asked.next("a") == pair and asked.record("a", pair.key, "left")


def test_a_line_is_on_the_disk_when_record_returns(tmp_path, monkeypatch):
    written = []
    asked = queue(tmp_path)
    pair = asked.next("a")
    monkeypatch.setattr(
        "goose_lora.apps.label_file.os.fsync",
        lambda descriptor: written.append((tmp_path / "pairs.jsonl").read_bytes()),
    )
    asked.record("a", pair.key, "left")
    assert len(written) == 1 and json.loads(written[0])["prompt"] == pair.prompt


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pairs.txt", None, "ends in .jsonl"),
        (
            "pairs.jsonl",
            '{"prompt": "x"}\n',
            "has a line with prompt, and choices have prompt, chosen, rejected. Give another file",
        ),
        ("pairs.jsonl", "[1]\n{}\n", "has a line with no JSON object"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(name, content, says, tmp_path):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        ChoiceFile(tmp_path / name)
    assert content is None or (tmp_path / name).read_text() == content


# Several at once


def test_two_labelers_have_different_pairs_until_a_lease_runs_out(tmp_path):
    clock = Clock()
    asked = queue(tmp_path, prompts=PROMPTS[:2], lease_seconds=60.0, clock=clock)
    first, second = asked.next("a"), asked.next("b")
    assert first.key != second.key and asked.next("c") is None
    clock.now = 59.0
    assert asked.next("b") == second, "looking again prolongs it"
    clock.now = 61.0
    assert asked.next("c") == first and asked.next("a") is None
    assert asked.record("a", first.key, "left") and not asked.record("c", first.key, "right"), (
        "who is first counts"
    )
    clock.now = 118.0
    assert asked.next("c") is None
    clock.now = 120.0
    assert asked.next("c") == second


def test_many_threads_label_each_prompt_once(tmp_path):
    prompts = [f"prompt {number}" for number in range(40)]
    asked = queue(tmp_path, prompts=prompts)
    seen = []

    def work(name):
        while (pair := asked.next(name)) is not None:
            seen.append(pair.key)
            assert asked.record(name, pair.key, "left")

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == len(set(seen)) == 40
    assert sorted(row["prompt"] for row in read_jsonl(tmp_path / "pairs.jsonl")) == sorted(prompts)


APPENDS = """
import sys
from goose_lora.apps.label_file import ChoiceFile
file = ChoiceFile(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(30):
    file.append(f"prompt {number}", {"chosen": sys.argv[2] * 3000, "rejected": ""}, policy="p1", pair=True)
"""


def test_two_processes_on_one_file_write_whole_lines_and_no_prompt_twice(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", APPENDS, str(tmp_path / "pairs.jsonl")]
    processes = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert sorted(row["prompt"] for row in rows) == sorted(f"prompt {number}" for number in range(30))
    assert {len(row["chosen"]) for row in rows} == {3000}


def test_a_process_that_is_killed_has_lost_no_choice_that_it_acknowledged(tmp_path):
    path = tmp_path / "pairs.jsonl"
    endless = APPENDS.replace("range(30)", "range(10**6)") + "    print(number, flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", endless, str(path), "a"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        acknowledged = [process.stdout.readline() for _ in range(20)]
        process.kill()
        acknowledged += process.stdout.readlines()
    ChoiceFile(path)
    written = [row["prompt"] for row in read_jsonl(path)]
    assert (
        written[: len(acknowledged)] == [f"prompt {int(number)}" for number in acknowledged]
        and len(written) <= len(acknowledged) + 1
    )


def test_what_another_process_has_labelled_meanwhile_is_not_shown_and_not_written_again(tmp_path):
    ours, theirs = queue(tmp_path, prompts=PROMPTS[:3]), queue(tmp_path, prompts=PROMPTS[:3])
    first = theirs.next("b")
    assert ours.next("a") == first, "they do not know of each other's pairs"
    assert theirs.record("b", first.key, "left") and not ours.record("a", first.key, "right")
    second = theirs.next("b")
    theirs.record("b", second.key, "left")
    assert ours.next("a").key not in (first.key, second.key) and ours.progress()["pairs"] == 2
    assert queue(tmp_path, prompts=PROMPTS, seed=1)._order != queue(tmp_path, prompts=PROMPTS, seed=2)._order


# Which two are shown


def test_the_uncertain_pair_is_the_one_with_the_smallest_difference_of_scores():
    replies = [
        reply("a", 3.0),
        reply("b", -1.0),
        reply("c", 0.5),
        reply("d", 0.8),
        reply("d ", 0.79),
        reply(" ", 0.6),
    ]
    for seed in range(8):
        assert {one.text.strip() for one in choose_two(replies, "uncertain", random.Random(seed))} == {
            "c",
            "d",
        }
    shown = {choose_two(replies, "uncertain", random.Random(seed))[0].text.strip() for seed in range(20)}
    assert shown == {"c", "d"}, "which of them is on the left is chance"
    assert (
        len({choose_two(replies, "random", random.Random(seed))[0].text.strip() for seed in range(40)}) == 4
    )


def test_a_prompt_without_two_different_replies_is_passed_over_and_counted(tmp_path):
    def make(number):
        return (
            two(number) if number == 1 else choose_two([reply("a"), reply("a ")], "random", random.Random(0))
        )

    asked = queue(tmp_path, prompts=PROMPTS[:3], make=make)
    pair = asked.next("a")
    assert pair.prompt == PROMPTS[1] and asked.record("a", pair.key, "left") and asked.next("a") is None
    assert asked.progress() == {"prompts": 3, "pairs": 1, "passed": 0, "alike": 2}


def test_a_pair_that_could_not_be_made_is_tried_again(tmp_path):
    tries = []

    def make(number):
        tries.append(number)
        if len(tries) == 1:
            raise MemoryError("once")
        return two(number)

    asked = queue(tmp_path, prompts=PROMPTS[:1], make=make)
    with pytest.raises(MemoryError):
        asked.next("a")
    assert asked.next("b").prompt == PROMPTS[0]


def test_a_prompt_is_one_thing_however_its_keys_are_ordered_and_row_of_needs_no_queue(tmp_path):
    rows = Dataset.from_list([{"prompt": [{"content": "x", "role": "user"}]}])
    assert (
        key_of(rows[0]["prompt"], "p") == key_of([{"role": "user", "content": "x"}], "p") != key_of("x", "p")
    )
    asked = queue(tmp_path)
    assert row_of(asked.next("a"), "skip")["choice"] == "skip"


# A real policy


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", tiny.prompts(4))


def test_a_tiny_policys_replies_go_on_from_the_prompt_and_a_second_start_makes_them_again(
    adapter_chain, prompt_file, tmp_path
):
    asked = open_queue(
        adapter_chain / "ppo", prompt_file, tmp_path / "pairs.jsonl", choose="uncertain", max_new_tokens=5
    )
    pair = asked.next("a")
    assert pair.left.text != pair.right.text and {pair.left.tokens, pair.right.tokens} <= set(range(1, 6))
    assert pair.left.text[0] == " ", (
        "the tokenizer has a token a word; after a prompt a word has a space before it"
    )
    assert pair.left.score != pair.right.score
    again = open_queue(
        adapter_chain / "ppo", prompt_file, tmp_path / "other.jsonl", choose="uncertain", max_new_tokens=5
    )
    assert again.next("a") == pair


def test_a_policy_that_only_was_fine_tuned_can_be_labelled_and_has_no_uncertainty(
    adapter_chain, prompt_file, tmp_path
):
    asked = open_queue(adapter_chain / "sft", prompt_file, tmp_path / "pairs.jsonl", max_new_tokens=3)
    assert asked.next("a").left.score is None
    with pytest.raises(
        ValueError, match=r"--choose uncertain asks the reward model, and .*sft has none. Use --choose random"
    ):
        open_queue(adapter_chain / "sft", prompt_file, tmp_path / "pairs.jsonl", choose="uncertain")


def test_the_example_in_the_documentation_labels_all_prompts(adapter_chain, prompt_file, tmp_path, capsys):
    page = (ROOT / "docs" / "labeling.md").read_text(encoding="utf-8")
    # The other example asks a judge (tests/rewards/test_pairwise_judge.py)
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "runs/mine" in code]
    for name, place in (
        ("runs/demo/sft", adapter_chain / "sft"),
        ("my_prompts.jsonl", prompt_file),
        ("runs/mine", tmp_path / "new"),
    ):
        assert name in code
        code = code.replace(name, str(place))
    exec(code, {})
    assert (
        "'prompts': 4, 'pairs': 4" in capsys.readouterr().out
        and len(read_jsonl(tmp_path / "new" / "pairs.jsonl")) == 4
    )
