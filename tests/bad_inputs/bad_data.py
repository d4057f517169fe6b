"""Bad data: files, encodings, columns, rows, chat messages."""

from bad_case import Case, edited, file, path_to, rows, without

USER = '{"prompt": "ba be"}\n'
HUGE = "ba " * 400_000


def _messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def _both(*changes):
    return lambda folder: {name: value for change in changes for name, value in change(folder).items()}


REFUSING = (
    "{{ raise_exception('no system messages here') if messages[0]['role'] == 'system' else '' }}"
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
)


def _empty_folder(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"")
    return {"dataset_name": str(folder / "pictures")}


CASES = [
    # Files
    Case(
        "a file that is not there",
        "ppo",
        path_to("dataset_name", "none.jsonl"),
        ("none.jsonl: no such file", "Check the path"),
    ),
    Case(
        "a folder without a file of rows",
        "sft",
        _empty_folder,
        ("pictures: cannot read this kind of file", "Use .jsonl", "a folder of them"),
    ),
    Case(
        "a file of another kind",
        "sft",
        file("rows.xml", "<a/>"),
        ("rows.xml: cannot read this kind of file", "Use .jsonl"),
    ),
    Case(
        "an empty file", "ppo", file("empty.jsonl", ""), ("empty.jsonl: the file is empty", "or give another")
    ),
    Case(
        "a file of blank lines",
        "ppo",
        file("blank.jsonl", "\n\n\n"),
        ("blank.jsonl: no rows", "Was it written to its end?"),
    ),
    Case(
        "JSON that breaks off",
        "ppo",
        file("r.jsonl", USER + '{"prompt": "b\n'),
        ("r.jsonl: line 2 is not JSON", "Each line must be one object"),
    ),
    Case(
        "JSON with something behind it",
        "sft",
        file("r.jsonl", '{"text": "a"}\n{"text": "b"} x\n'),
        ("line 2 is not JSON", "Each line must be one object"),
    ),
    Case(
        "a line that is a list",
        "ppo",
        file("r.jsonl", USER + '["ba"]\n'),
        ("line 2 is a JSON list", "with columns as keys"),
    ),
    Case(
        "bytes that are not UTF-8",
        "ppo",
        file("r.jsonl", USER.encode() + b'{"prompt": "caf\xe9"}\n'),
        ("line 2 is not UTF-8", "Save the file as UTF-8"),
    ),
    Case(
        "UTF-16",
        "sft",
        file("r.jsonl", '{"text": "ba"}\n'.encode("utf-16")),
        ("line 1 is not UTF-8", "Save the file as UTF-8"),
    ),
    Case(
        "a BOM and broken JSON",
        "ppo",
        file("r.jsonl", b"\xef\xbb\xbf" + USER.encode() + b"{\n"),
        ("line 2 is not JSON", "Each line must be one object"),
    ),
    Case(
        "a NUL byte",
        "ppo",
        file("r.jsonl", USER + "\0\n"),
        ("line 2 is not JSON", "Each line must be one object"),
    ),
    Case(
        "JSON nested without end",
        "ppo",
        file("r.jsonl", '{"prompt": ' + "[" * 100_000),
        ("r.jsonl: line 1 is JSON nested too deep", "Each line must be one object"),
    ),
    Case(
        "one JSON object in many lines",
        "sft",
        file("r.jsonl", '{\n"text":\n"ba"\n'),
        ("r.jsonl: line 1 is not JSON", "Each line must be one object"),
    ),
    Case(
        "csv without the column",
        "ppo",
        file("r.csv", "q,r\na,b\n"),
        ("has the columns q, r", "column_mapping"),
    ),
    Case(
        "csv with a row too long",
        "sft",
        file("r.csv", "text\na\nb,c,d\n"),
        ("r.csv", "Expected 1 fields in line 3, saw 3", "Mend the file"),
    ),
    Case(
        "csv with a header alone",
        "sft",
        file("r.csv", "text\n"),
        ("r.csv: no rows", "Was it written to its end?"),
    ),
    Case(
        "csv that is not UTF-8",
        "sft",
        file("r.csv", b"text\ncaf\xe9\n"),
        ("line 2 is not UTF-8", "Save the file as UTF-8"),
    ),
    Case(
        "parquet that is none", "ppo", file("r.parquet", "prompt"), ("r.parquet", "arquet", "Mend the file")
    ),
    Case(
        "an embedded name that is not there",
        "ppo",
        {"dataset_name": "embedded/nothing"},
        ("embedded/nothing: no such embedded data", "There are embedded/"),
    ),
    Case(
        "a Hub dataset offline",
        "ppo",
        {"dataset_name": "org/no-such-data"},
        ("org/no-such-data: no file here", "Unset HF_HUB_OFFLINE, or give a file"),
    ),
    # Columns
    Case(
        "wrong columns for SFT",
        "sft",
        rows({"q": "a", "r": "b"}),
        ("sft takes prompt+completion or messages or text", "column_mapping: [q=prompt, r=completion]"),
    ),
    Case(
        "wrong columns for the reward model",
        "reward",
        rows({"prompt": "a", "chosen": "b"}),
        ("reward takes prompt+chosen+rejected", "They suit"),
    ),
    Case(
        "preferences for SFT",
        "sft",
        rows({"chosen": "a b", "rejected": "a c"}),
        ("has the columns chosen, rejected", "They suit reward and ppo"),
    ),
    Case(
        "a column to rename that is not there",
        "ppo",
        {"column_mapping": ["q=prompt"]},
        ("there is no column q", "There are prompt"),
    ),
    Case(
        "a rename onto another column",
        "sft",
        {"column_mapping": ["prompt=completion"]},
        ("a column completion already", "completion=old_completion"),
    ),
    Case(
        "held-out rows of another kind",
        "reward",
        rows({"text": "a"}, setting="eval_dataset_name"),
        ("has the columns text", "They suit sft"),
    ),
    Case(
        "texts for PPO-ptx without text",
        "ppo",
        rows({"prompt": "a"}, setting="ptx_dataset_name", ptx_coef=0.1),
        ("has the columns prompt; sft takes", "messages or text"),
    ),
    # Rows
    Case(
        "prompts that are all empty",
        "ppo",
        rows({"prompt": ""}, {"prompt": "  "}),
        ("none of 2 rows is left", "prompt is empty", "Mend the rows"),
    ),
    Case(
        "prompts that are numbers",
        "ppo",
        rows({"prompt": 7}),
        ("row 1: prompt is int", "expected text or a list of chat messages"),
    ),
    Case(
        "prompts of two kinds",
        "ppo",
        file("r.jsonl", USER + '{"prompt": ["ba"]}\n'),
        ("r.jsonl: row 2", "Write all as text or all as messages"),
    ),
    Case(
        "a column of nothing",
        "ppo",
        rows({"prompt": None}),
        ("there is nothing in the column prompt", "column_mapping"),
    ),
    Case(
        "one huge prompt",
        "ppo",
        rows({"prompt": HUGE}),
        ("no prompt has between 1 and max_prompt_tokens=512 tokens", "Raise max_prompt_tokens"),
    ),
    Case(
        "one huge pair",
        "reward",
        rows({"prompt": "a", "chosen": HUGE, "rejected": "b"}),
        ("of at most max_length=", "Raise max_length"),
    ),
    Case(
        "a reply that equals the other",
        "reward",
        rows({"prompt": "a", "chosen": " b", "rejected": " b"}),
        ("none of 1 rows is left", "the same"),
    ),
    Case(
        "more ranks than completions",
        "reward",
        rows({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}),
        ("row 1: 1 ranks for 2 completions", "give one to each"),
    ),
    Case(
        "ranks that are scores",
        "reward",
        rows({"prompt": "a", "completions": ["b", "c"], "ranks": [0.1, 0.7]}),
        ("row 1", "Scores are not ranks"),
    ),
    Case(
        "too few prompts for a rollout",
        "ppo",
        rows({"prompt": "ba"}),
        ("1 prompts do not fill one rollout of 4 prompts", "Add prompts, or lower"),
    ),
    Case(
        "a margin that is text",
        "reward",
        rows({"prompt": "a", "chosen": " b", "rejected": " c", "margin": "big"}),
        ("row 1: margin is 'big'", "use_margin: false"),
    ),
    # Chat messages
    Case(
        "a role that is unknown",
        "ppo",
        rows({"prompt": _messages(("narrator", "a"))}),
        ("row 1", "the role 'narrator'; known are system"),
    ),
    Case(
        "a prompt that ends with a reply",
        "ppo",
        rows({"prompt": _messages(("user", "a"), ("assistant", "b"))}),
        ("ends with a turn of the user", "messages"),
    ),
    Case(
        "ShareGPT's messages of a role that is unknown",
        "sft",
        rows({"messages": [{"from": "narrator", "value": "a"}]}),
        ("row 1", "the role 'narrator'", "Rename it in the rows"),
    ),
    Case(
        "messages without content",
        "sft",
        rows({"messages": [{"role": "user"}]}),
        ("row 1", "Each message needs role and content"),
    ),
    Case(
        "messages that the template refuses, SFT",
        "sft",
        _both(
            edited("base", "chat_template.jinja", REFUSING),
            rows({"messages": _messages(("system", "a"), ("user", "b"), ("assistant", "c"))}),
        ),
        (
            "row 1",
            "refuses messages of system, user, assistant: no system messages here",
            "use another template",
        ),
    ),
    Case(
        "messages that the template refuses, PPO",
        "ppo",
        _both(
            edited("sft", "chat_template.jinja", REFUSING),
            rows({"prompt": _messages(("system", "a"), ("user", "b"))}),
        ),
        ("row 1", "no system messages here", "Change the rows"),
    ),
    Case(
        "a template that is broken",
        "reward",
        _both(
            edited("base", "chat_template.jinja", "{% for m in %}"),
            rows(
                {
                    "prompt": _messages(("user", "b")),
                    "chosen": _messages(("assistant", "c")),
                    "rejected": _messages(("assistant", "d")),
                }
            ),
        ),
        ("the tokenizer's chat template refuses messages of user, assistant", "use another template"),
    ),
    Case(
        "messages without a template",
        "sft",
        _both(
            without("base", "chat_template.jinja"),
            rows({"messages": _messages(("user", "b"), ("assistant", "c"))}),
        ),
        ("no chat template", "Use a chat model, or text"),
    ),
]
