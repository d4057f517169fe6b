"""Bad input for those who chat with a run and label its replies."""

import json

from bad_case import Case, own_copy


def run(**changes):
    """``sft`` becomes the folder of a run: it has a lineage, of which some is changed."""

    def change(folder):
        base = {"id": str(folder / "base"), "quantization": "none", "dtype": "float32"}
        lineage = {
            "stage": "sft",
            "base": base,
            "parents": {},
            "settings": {"max_prompt_tokens": 3},
            "data": [],
        }
        lineage |= {key: base | value if key == "base" else value for key, value in changes.items()}
        (own_copy(folder, "sft") / "goose_lora.json").write_text(json.dumps(lineage))
        return {}

    return change


def chat(name, change, says, *line):
    return Case(f"chat: {name}", "goose-lora", change, says, ("chat", *line))


def label(name, change, says, *line, prompts="prompts.jsonl", out="output/pairs.jsonl"):
    files = ("--policy", "{folder}/sft", "--prompts", f"{{folder}}/{prompts}", "--out", f"{{folder}}/{out}")
    return Case(f"label: {name}", "goose-lora", change, says, ("label", *files, *line))


CASES = [
    chat("nothing", {}, ("arguments are required: RUN_OR_HUB_ID", "--help lists what there is")),
    chat("no such run", {}, ("./none: no such run", "Give the output_dir"), "./none"),
    chat(
        "no such run on the Hub",
        {},
        ("org/none is no folder here", "could not be had from the Hub", "Give the output_dir"),
        "org/none",
    ),
    chat(
        "a run without a lineage",
        {},
        ("sft has no goose_lora.json", "Give the output_dir of a stage"),
        "{folder}/sft",
    ),
    chat(
        "a reward model",
        run(stage="reward"),
        ("is what reward left, and no policy's adapter", "Give the output_dir"),
        "{folder}/sft",
    ),
    chat(
        "a base that is gone",
        run(base={"id": "/gone/base"}),
        ("base was the folder /gone/base", "neither here", "--base PATH_OR_HUB_ID"),
        "{folder}/sft",
    ),
    chat(
        "a base that is gone and is on the Hub",
        run(base={"id": "/gone/base", "hub_id": "org/base"}),
        ("base was the folder /gone/base", "On the Hub it is org/base", "--base"),
        "{folder}/sft",
    ),
    chat(
        "a base that is not where it is said to be",
        run(),
        ("/gone: no such folder", "Check the path"),
        "{folder}/sft",
        "--base",
        "/gone",
    ),
    chat(
        "a lineage that does not tell the quantization",
        run(base={"quantization": None}),
        ("does not say what the base's quantization was", "train it again"),
        "{folder}/sft",
    ),
    chat(
        "a role that the run lacks",
        run(),
        ("--roles base,ppo", "has no ppo", "There are base, sft"),
        "{folder}/sft",
        "--roles",
        "base,ppo",
    ),
    chat(
        "a negative temperature",
        {},
        ("--temperature -1", "or 0 for greedy replies"),
        "x",
        "--temperature",
        "-1",
    ),
    chat(
        "a temperature that is no number",
        {},
        ("--temperature nan", "a number above 0"),
        "x",
        "--temperature",
        "nan",
    ),
    chat("replies of no tokens", {}, ("--max_new_tokens 0", "1 or more"), "x", "--max_new_tokens", "0"),
    chat(
        "replies longer than the context",
        run(),
        ("make 128 tokens", "context of 127"),
        "{folder}/sft",
        "--max_new_tokens",
        "128",
    ),
    chat("a port and no page", {}, ("--port 7860 is the page's", "Add --serve"), "x", "--port", "7860"),
    chat("a port that is none", {}, ("--port 70000", "from 1 to 65535"), "x", "--serve", "--port", "70000"),
    label("no such run", {}, ("./none: no such run", "Give the output_dir"), "--policy", "./none"),
    label("no such prompts", run(), ("none.jsonl: no such file", "Check the path"), prompts="none.jsonl"),
    label(
        "prompts that are none",
        run(),
        ("text.jsonl: has the columns", "ppo takes", "Rename yours"),
        prompts="text.jsonl",
    ),
    label("a file of prompts without rows", run(), ("nothing.jsonl: no rows",), prompts="nothing.jsonl"),
    label(
        "prompts that are all too long",
        run(settings={"max_prompt_tokens": 1}),
        ("no prompt has between 1 and max_prompt_tokens=1",),
    ),
    label(
        "prompts for the pairs",
        run(),
        ("prompts.jsonl: has a line with prompt", "Give another file"),
        out="prompts.jsonl",
    ),
    label("pairs that are no .jsonl", run(), ("pairs.csv", "ends in .jsonl"), out="pairs.csv"),
    label(
        "a folder for the pairs",
        lambda folder: run()(folder) | ((folder / "x.jsonl").mkdir() or {}),
        ("is no file", "another"),
        out="x.jsonl",
    ),
    label(
        "uncertainty of no reward model",
        run(),
        ("--choose uncertain asks the reward model", "Use --choose random"),
        "--choose",
        "uncertain",
    ),
    label("an unknown way to choose", run(), ("invalid choice: 'best'", "--help"), "--choose", "best"),
    label("one candidate", {}, ("--candidates 1", "2 or more"), "--candidates", "1"),
    label("greedy replies", {}, ("--temperature 0: must be a number above 0.",), "--temperature", "0"),
]
