"""goose-lora label --judge: pairs by a judge behind a server, of a file's replies or a policy's."""

import pytest
import tiny
from judge_server import completion, impatient_server, longer, question

from goose_lora.cli.commands import COMMANDS, command_line
from goose_lora.data.rows import load_rows
from goose_lora.errors import UserError
from goose_lora.files import read_jsonl, write_jsonl

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tea?"}]


@pytest.fixture
def server(monkeypatch):
    with impatient_server(monkeypatch, retries=1) as served:
        yield served


def label(server, out, *words):
    given = ["label", "--judge", "openai:m", "--judge_base_url", server.url, "--out", str(out), *words]
    arguments = command_line().parse_args(given)
    COMMANDS["label"](arguments)


def test_two_columns_become_pairs_that_the_reward_stage_reads(server, tmp_path, capsys, caplog):
    rows = [
        {"prompt": "one", "a": " long one", "b": " no", "note": 1},
        {"prompt": "two", "a": " no", "b": " long one", "note": 2},
        {"prompt": "alike", "a": " same", "b": " same", "note": 3},
        {"prompt": "tie", "a": " this", "b": " that", "note": 4},
    ]
    write_jsonl(tmp_path / "replies.jsonl", rows)
    out = tmp_path / "new" / "pairs.jsonl"
    label(server, out, "--replies", str(tmp_path / "replies.jsonl"), "--columns", "a", "b")
    wanted = [{"prompt": name, "chosen": " long one", "rejected": " no"} for name in ("one", "two")]
    assert read_jsonl(out) == wanted
    assert load_rows(str(out), stage="reward").to_list() == wanted
    assert "ignored: note" in caplog.text
    said = capsys.readouterr().out
    assert "3 prompts, 3 pairs of replies: at most 6 calls" in said
    assert "2 pairs of 3 that were compared; left out: 1 ties and contradictions, 0 without" in said
    assert "1 prompts without two different replies" in said and "7 calls, 0 answers" in said
    assert len(server.bodies) == 7


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (3, 3), (4, 6), (6, 12)])
def test_lists_of_replies_are_compared_whole_or_with_neighbours(count, pairs, server, tmp_path):
    replies = ["x" * length for length in (3, 9, 1, 5, 2, 7)[:count]]
    write_jsonl(tmp_path / "replies.jsonl", [{"prompt": "p", "completions": [*replies, replies[0]]}])
    label(server, tmp_path / "pairs.jsonl", "--replies", str(tmp_path / "replies.jsonl"))
    found = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(found) == pairs and len(server.bodies) == 1 + 2 * pairs
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in found)
    assert len({(row["chosen"], row["rejected"]) for row in found}) == pairs


def test_chat_stays_chat_and_keeps_its_tools(server, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    said = [[{"role": "assistant", "content": text}] for text in ("Yes, please.", "No.")]
    rows = [{"prompt": TURNS, "completions": said, "tools": tools}]
    write_jsonl(tmp_path / "turns.jsonl", rows)
    write_jsonl(tmp_path / "texts.jsonl", [{"prompt": TURNS, "completions": ["Yes, please.", "No."]}])
    label(server, tmp_path / "a.jsonl", "--replies", str(tmp_path / "turns.jsonl"))
    label(server, tmp_path / "b.jsonl", "--replies", str(tmp_path / "texts.jsonl"))
    wanted = {"prompt": TURNS, "chosen": said[0], "rejected": said[1]}
    assert read_jsonl(tmp_path / "b.jsonl") == [wanted]
    ((row, kept),) = [(row, row.pop("tools")) for row in read_jsonl(tmp_path / "a.jsonl")]
    assert row == wanted and kept[0]["function"]["name"] == "f"
    asked = [question(body) for body in server.bodies[1:3]]
    assert all(found["request"] == TURNS for found in asked)
    assert {found["reply_a"] for found in asked} == {"Yes, please.", "No."}


def test_after_a_failure_the_same_command_goes_on_and_the_key_is_nowhere(
    server, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", "Zq7planted33Value")
    rows = [{"prompt": f"p{n}", "completions": ["a" * n, "b" * 20]} for n in range(1, 9)]
    write_jsonl(tmp_path / "replies.jsonl", rows)
    no = 401, {"error": {"message": "no Zq7planted33Value here"}}
    server.says = lambda body: longer(body) if len(server.bodies) <= 9 else no
    words = ("--replies", str(tmp_path / "replies.jsonl"))
    with pytest.raises(UserError, match=r"\(401\).*pairs\.judge_cache\.jsonl: the same command goes on"):
        label(server, tmp_path / "pairs.jsonl", *words)
    assert not (tmp_path / "pairs.jsonl").exists()
    server.says, before = longer, len(server.bodies)
    label(server, tmp_path / "pairs.jsonl", *words)
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == 8
    assert len(server.bodies) - before <= 1 + 16 - 8 + 4
    assert "Zq7planted33Value" not in "".join(capfd.readouterr())
    assert not [path for path in tmp_path.iterdir() if b"Zq7planted33" in path.read_bytes()]


def test_contradictions_and_silence_are_counted_and_are_no_pairs(server, tmp_path, capsys):
    rows = [{"prompt": f"p{n}", "completions": ["aa", "b"]} for n in range(3)]
    write_jsonl(tmp_path / "replies.jsonl", rows)

    def odd(body):
        request = question(body)["request"]
        return completion("A") if request == "p0" else completion("Hm.") if request == "p1" else longer(body)

    server.says = odd
    label(server, tmp_path / "pairs.jsonl", "--replies", str(tmp_path / "replies.jsonl"))
    assert [row["prompt"] for row in read_jsonl(tmp_path / "pairs.jsonl")] == ["p2"]
    said = capsys.readouterr().out
    assert "left out: 1 ties and contradictions, 1 without an answer" in said
    server.says = lambda body: completion("tie")
    with pytest.raises(UserError, match=r"no pair is decided, and .*other\.jsonl is not written"):
        label(server, tmp_path / "other.jsonl", "--replies", str(tmp_path / "replies.jsonl"))


@pytest.mark.parametrize(
    ("row", "words", "says"),
    [
        ({"prompt": "p", "chosen": "a"}, (), "has the columns prompt, chosen, and not completions"),
        ({"question": "p", "completions": ["a", "b"]}, (), "and not prompt"),
        ({"prompt": "p", "completions": "a"}, (), "row 1 has no list in completions"),
        ({"prompt": "", "completions": ["a", "b"]}, (), "row 1 has no prompt"),
        ({"prompt": "p", "completions": ["a", "a"]}, (), "no row has two different replies"),
        ({"prompt": "p", "completions": [1, 2]}, (), "row 1 has a reply that is neither text"),
        ({"prompt": "p", "completions": [TURNS, TURNS]}, (), "row 1 has a reply that is neither text"),
        ({"prompt": TURNS, "completions": [TURNS, TURNS]}, (), "row 1 has a reply that is neither text"),
        ({"prompt": "p", "completions": ["a", "b"]}, ("--policy", "x"), "--policy is of a policy"),
        ({"prompt": "p", "completions": ["a", "b"]}, ("--seed", "3"), "--seed is of a policy"),
        ({"prompt": "p", "completions": ["a", "b"]}, ("--port", "3"), "--port is of the page"),
        ({"prompt": "p", "completions": ["a", "b"]}, ("--judge", "m:f"), "--judge m:f: write openai:MODEL"),
        ({"prompt": "p", "completions": ["a", "b"]}, ("--judge_rubric", "no.txt"), "judge_rubric: no.txt"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anybody_is_asked(row, words, says, server, tmp_path):
    write_jsonl(tmp_path / "replies.jsonl", [row])
    with pytest.raises(UserError) as error:
        label(server, tmp_path / "pairs.jsonl", "--replies", str(tmp_path / "replies.jsonl"), *words)
    assert says in str(error.value) and server.bodies == []


def test_options_that_do_not_go_together_are_refused(server, tmp_path):
    def given(*words):
        COMMANDS["label"](command_line().parse_args(["label", "--out", str(tmp_path / "p.jsonl"), *words]))

    for words, says in (
        (("--replies", "x.jsonl"), "--replies is of a judge. Set --judge openai:MODEL"),
        (("--judge_rubric", "x", "--policy", "x", "--prompts", "x"), "--judge_rubric is of a judge"),
        (("--columns", "a", "b", "--policy", "x", "--prompts", "x"), "--columns is of --replies"),
        (("--policy", "x"), "arguments are required: --prompts"),
        (("--judge", "openai:m"), "arguments are required: --policy, --prompts; or --replies"),
    ):
        with pytest.raises(UserError) as error:
            given(*words)
        assert says in str(error.value)
    (tmp_path / "pairs.jsonl").write_text("mine")
    write_jsonl(tmp_path / "replies.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    for out, says in (("pairs.jsonl", "is there already"), ("pairs.csv", "ends in .jsonl")):
        with pytest.raises(UserError, match=says):
            label(server, tmp_path / out, "--replies", str(tmp_path / "replies.jsonl"))
    assert (tmp_path / "pairs.jsonl").read_text() == "mine" and server.bodies == []


def test_a_policys_replies_are_labelled_and_a_second_call_asks_nothing(
    adapter_chain, server, tmp_path, capsys
):
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(4))
    words = ("--policy", str(adapter_chain / "ppo"), "--prompts", prompts, "--max_new_tokens", "5")
    out = tmp_path / "pairs.jsonl"
    label(server, out, *words)
    pairs = read_jsonl(out)
    passed = read_jsonl(tmp_path / "pairs.passed.jsonl") if len(pairs) < 4 else []
    assert pairs and len(pairs) + len(passed) == 4
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    assert all(len(row["replies"][0]) == len(row["replies"][1]) for row in passed)
    assert "of 4 prompts" in capsys.readouterr().out
    asked = len(server.bodies)
    label(server, out, *words)
    assert len(server.bodies) == asked + 1 and read_jsonl(out) == pairs  # the made-up question
