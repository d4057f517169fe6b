"""Ready rewards by name give what TRL's own functions, re, jsonschema and a count give."""

import re
import signal

import jsonschema
import pytest
import trl.rewards

from goose_lora.errors import UserError
from goose_lora.rewards import named
from goose_lora.rewards.classifier import check_sources, reward_sources
from goose_lora.rewards.sources import RewardMix

REPLIES = [
    "<think>so</think> it is \\boxed{4}",
    "ok",
    "\\boxed{5}",
    "a b a b a b a b",
    "<think>\n<think></think>",
]
IDS = [[1, 2, 3, 4], [1], [5, 5, 5, 5, 5], list(range(12)), [7, 8] * 5]
SOLUTIONS = ["4", "$4$", "\\boxed{5}", "nothing", "$x^2$"]
MESSAGES = [[{"role": "assistant", "content": reply}] for reply in REPLIES]


def scores(spec, replies=tuple(REPLIES), ids=tuple(IDS), **columns):
    mix = RewardMix(reward_sources(spec, has_adapter=False))
    asked = {"prompts": ["p"] * len(replies), "completions": list(replies), "completion_ids": list(ids)}
    return mix(None, **asked, **columns).total.tolist()


@pytest.mark.parametrize(
    ("spec", "function"),
    [
        ("trl:accuracy_reward", trl.rewards.accuracy_reward),
        ("trl:think_format_reward", trl.rewards.think_format_reward),
        ("trl:reasoning_accuracy_reward", trl.rewards.reasoning_accuracy_reward),
        (
            "trl:get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=6)",
            trl.rewards.get_soft_overlong_punishment(10, 6),
        ),
        (
            "trl:repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)",
            trl.rewards.get_repetition_penalty_reward(2, -0.5),
        ),
        ("trl:cosine_scaled_reward(max_len=8)", trl.rewards.get_cosine_scaled_reward(8)),
    ],
)
def test_a_reward_of_trl_gives_what_trl_gives(spec, function):
    said = function(completions=MESSAGES, completion_ids=IDS, solution=SOLUTIONS)
    rows = [row for row, score in enumerate(said) if score is not None]
    replies, ids, solution = ([every[row] for row in rows] for every in (REPLIES, IDS, SOLUTIONS))
    given = scores(spec, replies, ids, solution=solution)
    assert given == pytest.approx([said[row] for row in rows]) and len(set(given)) > 1


def test_every_reward_that_trl_offers_is_listed_where_a_name_is_unknown():
    offered = [name for name in dir(trl.rewards) if "reward" in name or "punishment" in name]
    offered = [name for name in offered if callable(getattr(trl.rewards, name))]
    with pytest.raises(UserError) as error:
        reward_sources("trl:accurate", has_adapter=False)
    assert len(offered) >= 6 and all(name in str(error.value) for name in offered)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("trl:think_format_reward(strict=True)", "no argument strict"),
        ("trl:accuracy_reward(solution=", "write NAME"),
        ("trl:accuracy_reward(completions=[])", "no argument completions"),
        ("trl:soft_overlong_punishment(256, 32)", "write NAME"),
        ("trl:soft_overlong_punishment(max_completion_len=256)", "soft_punish_cache"),
        ("trl:soft_overlong_punishment(max_completion_len=print(1), soft_punish_cache=2)", "write NAME"),
        ("trl:repetition_penalty_reward(max_penalty=2)", "max_penalty 2"),
        ("trl:repetition_penalty_reward(**{'ngram_size': 2})", "no argument **"),
        ("trl:os.system", "write NAME"),
        ("check:json", "json_schema, length_within, matches_regex"),
        ("check:matches_regex(regex='x')", "no argument regex; it has pattern"),
    ],
)
def test_what_is_not_known_is_refused_by_name(spec, told):
    with pytest.raises(UserError, match=re.escape(told)):
        reward_sources(spec, has_adapter=False)


@pytest.mark.parametrize(
    ("spec", "columns", "told"),
    [
        ("trl:accuracy_reward", {}, "solution"),
        ("check:matches_regex", {"answer": "4"}, "pattern"),
        ("check:matches_regex(pattern='(')", {}, "no regular expression"),
        ("check:matches_regex(pattern='a')", {"pattern": "b"}, "both an argument and a column"),
        ("check:json_schema(schema={'type': 'nonsense'})", {}, "no JSON schema"),
        ("check:length_within(minimum=3, maximum=2)", {}, "0 <= minimum <= maximum"),
        ("check:length_within(minimum=1, maximum=2, unit='lines')", {}, "words, characters, tokens"),
    ],
)
def test_a_fault_that_one_row_shows_is_told_before_anything_loads(spec, columns, told):
    sources = reward_sources(spec, has_adapter=False)
    with pytest.raises(UserError, match=told):
        check_sources(sources, {"prompt": "p", "input_ids": [1], **columns}, [1])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(named.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="math-verify"):
        reward_sources("trl:accuracy_reward", has_adapter=False)


def test_a_regular_expression_is_pythons_from_yaml_or_from_the_row():
    assert scores(r"check:matches_regex(pattern='^.k$')") == [0, 1, 0, 0, 0]
    patterns = ["4", "^k", "5.$", "(?i)B A", "x"]
    expected = [float(bool(re.search(one, reply))) for one, reply in zip(patterns, REPLIES, strict=True)]
    assert scores("check:matches_regex", pattern=patterns) == expected == [1, 0, 1, 1, 0]


def test_a_json_schema_is_jsonschemas_and_fetches_nothing():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    replies = ['{"n": 3}', '{"n": "3"}', '{"n": 3', ' {"n": 3}\n', '{"n": NaN}', "[" * 100_000]
    found = scores(f"check:json_schema(schema={schema})", replies, [[1]] * 6)
    assert found == [1, 0, 0, 1, 0, 0]
    jsonschema.validate({"n": 3}, schema)
    remote = {"$ref": "https://example.com/schema.json"}
    with pytest.raises(UserError, match="example\\.com"):
        scores(f"check:json_schema(schema={remote})", ["1"], [[1]])


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("words", [1, 0, 0, 0, 1]), ("characters", [0, 1, 0, 0, 0]), ("tokens", [1, 0, 0, 0, 0])],
)
def test_a_length_is_counted_in_the_unit_that_is_asked_for(unit, expected):
    assert scores(f"check:length_within(minimum=2, maximum=4, unit='{unit}')") == expected


def test_two_arguments_are_two_rewards_and_change_what_a_run_is_made_of():
    one, two = (
        RewardMix(
            reward_sources(f"check:length_within(minimum=1, maximum={most})", has_adapter=False)
        ).made_of()
        for most in (5, 6)
    )
    assert one.keys() == two.keys() and one != two


def test_an_alarm_of_the_run_outlives_the_alarms_of_math_verify():
    source = reward_sources("trl:accuracy_reward", has_adapter=False)[0]
    before = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        source(prompts=["p"], completions=["\\boxed{4}"], completion_ids=[[1]], solution=["4"])
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_accuracy_takes_the_last_number_of_an_answer_of_gsm8k_and_the_boxed_one_of_a_reply():
    solution = "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    replies = ["In all \\boxed{72}.", "In May \\boxed{24}.", "In all 72.", ""]
    found = scores("trl:accuracy_reward", replies, [[1]] * 4, solution=[solution] * 4)
    assert found == [1.0, 0.0, 0.0, 0.0]
