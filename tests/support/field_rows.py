"""Rows of the field's data sets, and what each stage reads in them.

They are written here, in the columns of the data sets that each is named after; the right reading
is what those columns say there.
"""

import json

from tiny import assistant, system, user

Q, GOOD, BAD = "Who feeds it?", "The farmer.", "No one."


def asked(*before):
    return [*before, user(Q)]


BOTH = {"chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}
PAIR = {"prompt": asked(), **BOTH}
WHOLE = {"chosen": [*asked(), assistant(GOOD)], "rejected": [*asked(), assistant(BAD)]}
TEXTS = {"prompt": Q, "chosen": f" {GOOD}", "rejected": f" {BAD}"}
REPLY = {"prompt": asked(), "completion": [assistant(GOOD)]}
CHAT = {"messages": [*asked(), assistant(GOOD)]}
LIST = {"prompt": asked(), "completions": [[assistant(BAD)], [assistant(GOOD)]], "ranks": [2, 1]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a goose"}}}
TLDR = "SUBREDDIT: r/geese\n\nPOST: It honked.\n\nTL;DR:"
HH = "\n\nHuman: Who?\n\nAssistant:"


def rated(text, score):
    return {"response": text, "overall_score": score, "model": "m", "custom_system_prompt": "Be kind."}


# name, stage, row, what the stage reads in it
SHAPES = [
    (
        "RewardBench 2's right and wrong replies",
        "reward",
        {
            "prompt": Q,
            "chosen": [GOOD],
            "rejected": [BAD, "No."],
            "num_correct": 1,
            "models": ["a", "b", "c"],
        },
        {"prompt": Q, "completions": [GOOD, BAD, "No."], "ranks": [1, 2, 2]},
    ),
    (
        "UltraFeedback binarized",
        "reward",
        {"prompt": Q, **WHOLE, "score_chosen": 8.5, "score_rejected": 4.0},
        PAIR,
    ),
    ("UltraFeedback binarized for PPO", "ppo", {"prompt": Q, **WHOLE, "messages": WHOLE["chosen"]}, asked()),
    (
        "Argilla's cleaned",
        "reward",
        {"prompt": Q, **WHOLE, "chosen-rating": 4.5, "rejected-rating": 2.0},
        PAIR,
    ),
    ("a prompt of messages and whole lists", "reward", {"prompt": asked(), **WHOLE}, PAIR),
    (
        "a system message beside",
        "reward",
        {"system": "Be.", "prompt": Q, **WHOLE},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    ("Tulu 3 preference", "reward", {"id": "x", "prompt": Q, **WHOLE, "source": "s"}, PAIR),
    ("TRL's implicit prompt", "reward", WHOLE, PAIR),
    ("a prompt of text, turns of the assistant", "reward", {"prompt": Q, **BOTH}, PAIR),
    (
        "a prompt of messages, replies of text",
        "reward",
        {"prompt": asked(), "chosen": GOOD, "rejected": BAD},
        PAIR,
    ),
    (
        "one message each",
        "reward",
        {"prompt": asked(), "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        PAIR,
    ),
    ("TRL's text", "reward", TEXTS, TEXTS),
    (
        "replies that hold the prompt",
        "reward",
        {"prompt": Q, "chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"},
        TEXTS,
    ),
    (
        "Orca DPO pairs",
        "reward",
        {"system": "Be.", "question": Q, "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    (
        "truthy DPO",
        "reward",
        {"system": "Be.", "prompt": Q, "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": asked(system("Be."))},
    ),
    (
        "hh-rlhf",
        "reward",
        {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        {"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    ),
    ("hh-rlhf with an empty reply", "ppo", {"chosen": f"{HH} {GOOD}", "rejected": HH}, HH),
    (
        "LLaMA-Factory's ranking, Alpaca",
        "reward",
        {"instruction": Q, "input": "Now.", "chosen": GOOD, "rejected": BAD},
        {**PAIR, "prompt": [user(f"{Q}\n\nNow.")]},
    ),
    (
        "LLaMA-Factory's ranking, ShareGPT",
        "reward",
        {
            "conversations": [{"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        PAIR,
    ),
    (
        "OpenAI's preferences",
        "reward",
        {
            "input": {"messages": asked(), "tools": [TOOL]},
            "preferred_output": [assistant(GOOD)],
            "non_preferred_output": [assistant(BAD)],
        },
        {**PAIR, "tools": [TOOL]},
    ),
    (
        "Stack Exchange paired",
        "reward",
        {"qid": 1, "question": Q, "response_j": GOOD, "response_k": BAD},
        PAIR,
    ),
    (
        "PKU-SafeRLHF",
        "reward",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        PAIR,
    ),
    (
        "SHP",
        "reward",
        {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 1, "score_B": 2},
        PAIR,
    ),
    (
        "SHP the other way",
        "reward",
        {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
        PAIR,
    ),
    (
        "HelpSteer2 preference",
        "reward",
        {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        PAIR,
    ),
    (
        "HelpSteer3",
        "reward",
        {"context": asked(), "response1": GOOD, "response2": BAD, "overall_preference": -3},
        PAIR,
    ),
    (
        "the arena",
        "reward",
        {"winner": "model_b", "conversation_a": WHOLE["rejected"], "conversation_b": WHOLE["chosen"]},
        PAIR,
    ),
    (
        "the arena of 55k",
        "reward",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([BAD]),
            "response_b": json.dumps([GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        PAIR,
    ),
    (
        "the arena of 55k for PPO",
        "ppo",
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([BAD]),
            "response_b": json.dumps([GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        asked(),
    ),
    (
        "AlpacaFarm",
        "reward",
        {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2},
        PAIR,
    ),
    (
        "Argilla's records",
        "reward",
        {"instruction": Q, "response1": BAD, "response2": GOOD, "preference.responses": ["response2"]},
        PAIR,
    ),
    (
        "Label Studio",
        "reward",
        {
            "data": {"prompt": Q, "text1": BAD, "text2": GOOD},
            "annotations": [
                {"was_cancelled": False, "result": [{"type": "pairwise", "value": {"selected": "right"}}]}
            ],
        },
        PAIR,
    ),
    (
        "UltraFeedback's rated lists",
        "reward",
        {"instruction": Q, "completions": [rated(BAD, 3.0), rated(GOOD, 9.0)]},
        LIST,
    ),
    (
        "Nectar",
        "reward",
        {"prompt": HH, "answers": [{"answer": f" {BAD}", "rank": 2.0}, {"answer": f" {GOOD}", "rank": 1.0}]},
        {"prompt": HH, "completions": [f" {BAD}", f" {GOOD}"], "ranks": [2, 1]},
    ),
    (
        "distilabel's ratings",
        "reward",
        {"instruction": Q, "generations": [BAD, GOOD], "ratings": [2.0, 4.5]},
        LIST,
    ),
    (
        "responses with rewards",
        "reward",
        {"prompt": Q, "responses": [BAD, GOOD], "rewards": [-1.5, 2.0]},
        LIST,
    ),
    (
        "completions with scores",
        "reward",
        {"prompt": Q, "completions": [" a", " b"], "scores": [1.0, 9.0]},
        {"prompt": Q, "completions": [" a", " b"], "ranks": [2, 1]},
    ),
    (
        "ranks from zero",
        "reward",
        {"prompt": Q, "completions": [" a", " b"], "ranks": [1, 0]},
        {"prompt": Q, "completions": [" a", " b"], "ranks": [2, 1]},
    ),
    (
        "OpenAI's summaries",
        "reward",
        {
            "info": {"post": "It honked.", "title": "A goose", "subreddit": "geese"},
            "summaries": [{"text": " No."}, {"text": " Honk."}],
            "choice": 1,
        },
        {
            "prompt": "SUBREDDIT: r/geese\n\nTITLE: A goose\n\nPOST: It honked.\n\nTL;DR:",
            "chosen": " Honk.",
            "rejected": " No.",
        },
    ),
    ("Alpaca", "sft", {"instruction": Q, "input": "", "output": GOOD}, REPLY),
    (
        "Alpaca with an input",
        "sft",
        {"instruction": Q, "input": "Now.", "output": GOOD},
        {**REPLY, "prompt": [user(f"{Q}\n\nNow.")]},
    ),
    ("Alpaca for PPO", "ppo", {"instruction": Q, "input": "Now.", "output": GOOD}, [user(f"{Q}\n\nNow.")]),
    (
        "Dolly",
        "sft",
        {"instruction": Q, "context": "A farm.", "response": GOOD, "category": "qa"},
        {**REPLY, "prompt": [user(f"{Q}\n\nA farm.")]},
    ),
    (
        "LLaMA-Factory's Alpaca",
        "sft",
        {"instruction": Q, "input": "", "output": GOOD, "system": "Be.", "history": [["Hi", "Ho"]]},
        {**REPLY, "prompt": asked(system("Be."), user("Hi"), assistant("Ho"))},
    ),
    (
        "OpenOrca",
        "sft",
        {"system_prompt": "Be.", "question": Q, "response": GOOD},
        {**REPLY, "prompt": asked(system("Be."))},
    ),
    ("GSM8K", "sft", {"question": Q, "answer": GOOD}, REPLY),
    ("distilabel's generations", "sft", {"instruction": Q, "generation": GOOD, "model_name": "m"}, REPLY),
    (
        "Dahoas rm-static",
        "sft",
        {"prompt": HH, "response": f" {GOOD}", "chosen": " a", "rejected": " b"},
        {"prompt": HH, "completion": f" {GOOD}"},
    ),
    (
        "TRL's prompt and completion",
        "sft",
        {"prompt": Q, "completion": f" {GOOD}"},
        {"prompt": Q, "completion": f" {GOOD}"},
    ),
    (
        "a prompt of text and a reply of messages",
        "sft",
        {"prompt": Q, "completion": [assistant(GOOD)]},
        REPLY,
    ),
    (
        "ShareGPT",
        "sft",
        {"id": "x", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]},
        CHAT,
    ),
    (
        "ShareGPT with system and tools",
        "sft",
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "18"},
                {"from": "gpt", "value": GOOD},
            ],
            "system": "Be.",
            "tools": json.dumps([TOOL["function"]]),
        },
        {
            "messages": [
                system("Be."),
                user(Q),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ],
            "tools": [TOOL],
        },
    ),
    (
        "roles with a capital",
        "sft",
        {"messages": [{"role": "User", "content": Q}, {"role": "Assistant", "content": GOOD}]},
        CHAT,
    ),
    ("UltraChat's list of texts", "sft", {"id": "x", "data": [Q, GOOD]}, CHAT),
    ("UltraChat for PPO", "ppo", {"prompt": Q, "messages": CHAT["messages"]}, asked()),
    (
        "parts of text",
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, assistant(GOOD)]},
        CHAT,
    ),
    ("messages as JSON text", "sft", {"messages": json.dumps(CHAT["messages"])}, CHAT),
    ("messages as Python prints them", "sft", {"messages": str(CHAT["messages"])}, CHAT),
    (
        "pairs as JSON text",
        "reward",
        {"prompt": Q, "chosen": json.dumps(WHOLE["chosen"]), "rejected": json.dumps(WHOLE["rejected"])},
        PAIR,
    ),
    (
        "OpenAI's argument text",
        "sft",
        {
            "messages": [
                user(Q),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "look", "arguments": '{"at": "a goose"}'}}
                    ],
                },
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ]
        },
        {
            "messages": [
                user(Q),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "18"},
                assistant(GOOD),
            ]
        },
    ),
    (
        "a text with ids of another tokenizer",
        "sft",
        {"text": "ba", "input_ids": [5, 6], "attention_mask": [1, 1]},
        {"text": "ba"},
    ),
    ("a text with a class", "sft", {"text": "ba", "label": 1, "labels": 1}, {"text": "ba"}),
    ("OpenRLHF's context", "ppo", {"context_messages": asked(), "dataset": "x"}, asked()),
    (
        "verl's prompts",
        "ppo",
        {"data_source": "x", "prompt": asked(), "reward_model": {"ground_truth": "0"}},
        asked(),
    ),
    ("a prompt and its truth", "ppo", {"prompt": Q, "answer": "7"}, Q),
    ("KTO, a good one", "sft", {"prompt": asked(), "completion": [assistant(GOOD)], "label": True}, REPLY),
    (
        "UltraFeedback binarized for SFT",
        "sft",
        {
            "prompt": Q,
            "prompt_id": "0",
            **WHOLE,
            "messages": WHOLE["chosen"],
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        },
        CHAT,
    ),
    ("TL;DR", "sft", {"prompt": TLDR, "completion": f" {GOOD}"}, {"prompt": TLDR, "completion": f" {GOOD}"}),
    ("TL;DR for PPO", "ppo", {"prompt": TLDR, "completion": f" {GOOD}"}, TLDR),
    (
        "TL;DR preferences",
        "reward",
        {"prompt": TLDR, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": TLDR, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    ),
    (
        "CarperAI's comparisons",
        "reward",
        {"prompt": "POST: It honked.", "chosen": f"TL;DR: {GOOD}", "rejected": f"TL;DR: {BAD}"},
        {"prompt": "POST: It honked.", "chosen": f"TL;DR: {GOOD}", "rejected": f"TL;DR: {BAD}"},
    ),
    (
        "hh-rlhf by TRL, helpful",
        "reward",
        {"prompt": asked(user("Hi"), assistant("Ho")), **BOTH},
        {**PAIR, "prompt": asked(user("Hi"), assistant("Ho"))},
    ),
    (
        "hh-rlhf by TRL, helpful, for PPO",
        "ppo",
        {"prompt": asked(user("Hi"), assistant("Ho")), **BOTH},
        asked(user("Hi"), assistant("Ho")),
    ),
    (
        "Guanaco",
        "sft",
        {"text": f"### Human: {Q}### Assistant: {GOOD}"},
        {"text": f"### Human: {Q}### Assistant: {GOOD}"},
    ),
    (
        "HelpSteer2 for PPO",
        "ppo",
        {
            "prompt": Q,
            "response": GOOD,
            "helpfulness": 4,
            "correctness": 4,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        },
        asked(),
    ),
    (
        "HelpSteer3 for PPO",
        "ppo",
        {"context": asked(), "response1": GOOD, "response2": BAD, "overall_preference": -2},
        asked(),
    ),
    ("Skywork", "reward", {**WHOLE, "source": "s"}, PAIR),
    (
        "Dahoas rm-static, pairs",
        "reward",
        {"prompt": HH, "response": f" {GOOD}", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    ),
    (
        "Nectar for PPO",
        "ppo",
        {"prompt": HH, "answers": [{"answer": " a", "rank": 1.0}, {"answer": " b", "rank": 2.0}]},
        HH,
    ),
    ("Tulu 3 SFT", "sft", {"id": "x", "messages": CHAT["messages"], "source": "s"}, CHAT),
    (
        "Capybara",
        "sft",
        {"source": "s", "messages": [*CHAT["messages"], user("Why?"), assistant("So.")], "num_turns": 2},
        {"messages": [*CHAT["messages"], user("Why?"), assistant("So.")]},
    ),
    ("UltraChat 200k", "sft", {"prompt": Q, "prompt_id": "0", "messages": CHAT["messages"]}, CHAT),
    ("UltraFeedback's prompts", "ppo", {"prompt": asked()}, asked()),
    ("conversations of role and content", "sft", {"conversations": CHAT["messages"], "source": "s"}, CHAT),
    (
        "OpenAI's fine-tuning, a turn of weight 1",
        "sft",
        {"messages": [*asked(), {**assistant(GOOD), "weight": 1}]},
        {"messages": [*asked(), {**assistant(GOOD), "weight": 1}]},
    ),
]

# What no stage understands, and what to do instead
REFUSED = [
    (
        "PRM800K",
        "reward",
        {"prompt": Q, "completions": ["First.", "Then."], "labels": [True, False]},
        "give prompt, chosen and rejected",
    ),
    (
        "OpenAssistant's messages",
        "sft",
        {
            "message_id": "a",
            "parent_id": None,
            "text": Q,
            "role": "prompter",
            "labels": {"name": ["spam"], "value": [0.1]},
        },
        "dataset_name: timdettmers/openassistant-guanaco",
    ),
    (
        "OpenAssistant's trees",
        "sft",
        {"message_tree_id": "a", "prompt": {"text": Q, "role": "prompter", "replies": []}},
        "dataset_name: timdettmers/openassistant-guanaco",
    ),
]
