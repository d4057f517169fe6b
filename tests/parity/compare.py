"""Step 3 of `make parity`: print what TRL computed beside what is computed here.

    python tests/parity/compare.py FOLDER

It runs in the project's environment, from the same weights and tokens. A line is "equal" within
1e-9, or the difference is explained: the functions here, given TRL's choice, give TRL's number
within 1e-9. Anything else ends with an error. Relative differences, of the largest element where it
is a tensor.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import frozen

import goose_lora.functional as F
from goose_lora.functional import Moments, token_rewards
from goose_lora.generation.sampling import response_mask
from goose_lora.models.role_outputs import before_response
from goose_lora.models.shared_base import SharedBase

TOLERANCE = 1e-9
EPSILON = 1e-7  # TRL divides logits by temperature + 1e-7
POLICY, HEAD = "policy.", "value_model.score.weight"


class Table:
    """Lines of the comparison, checked as they are added."""

    def __init__(self):
        self.lines, self.failed = [], 0

    def equal(self, name, ours, trl):
        gap = distance(ours, trl)
        self._add(name, ours, trl, "equal" if gap <= TOLERANCE else "NOT EQUAL", gap)

    def explained(self, name, ours, trl, with_their_choice, choice):
        """``ours`` differs, and ``with_their_choice`` does not."""
        gap, left = distance(ours, trl), distance(with_their_choice, trl)
        good = gap > TOLERANCE and left <= TOLERANCE
        self._add(name, ours, trl, choice if good else f"NOT EXPLAINED ({left:.1e} left by: {choice})", gap)

    def explained_if(self, choice, name, ours, trl, with_their_choice):
        """Add a line that ``choice`` explains, or an equal one where there is none."""
        if choice:
            self.explained(name, ours, trl, with_their_choice, choice)
        else:
            self.equal(name, ours, trl)

    def _add(self, name, ours, trl, verdict, gap):
        self.failed += verdict.startswith("NOT")
        self.lines.append((name, show(ours), show(trl), f"{gap:.1e}", verdict))

    def print(self, title):
        print(f"\n{title}\n{'quantity':34} {'here':>12} {'TRL 1.12':>12} {'difference':>11}  verdict")
        for name, ours, trl, gap, verdict in self.lines:
            print(f"{name:34} {ours:>12} {trl:>12} {gap:>11}  {verdict}")
        self.lines = []


def distance(a, b):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()  # a loss of 1e-18 is 0


def show(x):
    x = torch.as_tensor(x, dtype=torch.float64)
    return f"{x.item():.6f}" if x.numel() == 1 else f"|{x.norm().item():.6f}|"


class Ours:
    """The shared base with given weights, and what it says of the frozen replies in TRL's order."""

    def __init__(self, folder, facts, case, order):
        self.case, self.facts = case, facts
        self.shared: SharedBase = frozen.build_shared(folder)
        self.restore(load_file(folder / "adapters.safetensors"))
        ids = load_file(folder / "rollouts.safetensors")[case["replies"].replace(" ", "_")]
        self.ids = ids if order is None else ids[order]
        self.prompt = facts["prompt_tokens"]
        replies = self.ids[:, self.prompt :]
        self.mask, self.ended = response_mask(replies, [facts["eos"]])
        self.attention = torch.cat(
            [(self.ids[:, : self.prompt] != facts["pad"]).long(), self.mask.long()], dim=1
        )
        self.places = torch.arange(replies.shape[1])

    def restore(self, weights):
        parameters = dict(self.shared.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)

    def after(self, record, step):
        """The weights that TRL had at its update number ``step``."""
        prefix = f"update {step}/weight/"
        named = {
            name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)
        }
        self.restore({named_here(name): value for name, value in named.items()})

    def everything(self, mask, temperature):
        """Return log-probabilities, the reference's, value states, and scores of what counts."""
        attention = torch.cat(
            [self.attention[:, : self.prompt], self.attention[:, self.prompt :] & mask.long()], dim=1
        )
        policy, value = (self.shared.hidden(role, self.ids, self.attention) for role in ("policy", "value"))
        logprobs, _ = self.shared.logprobs(policy, self.ids, mask, temperature=temperature)
        reference, _ = self.shared.logprobs(
            self.shared.hidden("reference", self.ids, self.attention), self.ids, mask, temperature=temperature
        )
        return logprobs, reference, value, self.shared.scores(self.ids, attention)

    def values(self, hidden, mask):
        return torch.where(mask, self.shared.apply_head("value", before_response(hidden, mask)), 0.0)

    def one_further(self, mask):
        """TRL's padding_mask_p1: the position after each reply counts too, where there is one."""
        return self.places <= mask.sum(-1)[:, None]


def named_here(name):
    return (
        name.removeprefix(POLICY)
        if name.startswith(POLICY)
        else "base_model.model.score.modules_to_save.value.weight"
    )


def bessel(x, mask):
    """Return moments with the variance divided by n - 1, as TRL's ``masked_var``."""
    # Its n / (n - 1) is a quotient of integers and so fp32.
    count, mean, var = F.moments(x, mask)
    return Moments(count, mean, var * (count / (count - 1)))


def compare_rollout(table, ours, record, case):
    """Log-probabilities to advantages. Returns TRL's advantages and returns, for the losses."""
    trl = {
        name.removeprefix("rollout/"): value for name, value in record.items() if name.startswith("rollout/")
    }
    mask, further = ours.mask, ours.one_further(ours.mask)
    with torch.no_grad():
        plain, plain_reference, _, _ = ours.everything(mask, case["temperature"])
        logprobs, reference, hidden, scores = ours.everything(mask, case["temperature"] + EPSILON)
        values, values_further = ours.values(hidden, mask), ours.values(hidden, further)
    table.explained(
        "log-probs of the rollout",
        plain,
        torch.where(mask, trl["logprobs"], 0.0),
        logprobs,
        "logits / (temperature + 1e-7)",
    )
    table.explained(
        "log-probs of the reference",
        plain_reference,
        torch.where(mask, trl["ref_logprobs"], 0.0),
        reference,
        "the same",
    )
    kl = torch.where(mask, F.kl_per_token(logprobs, reference, estimator=case["kl_estimator"]), 0.0)
    table.equal(f"KL a token ({case['kl_estimator']})", kl, trl["kl"])
    table.equal("values", values, torch.where(mask, trl["values"], 0.0))
    if case["missing_eos_penalty"] is not None:
        scores = torch.where(ours.ended, scores, scores - case["missing_eos_penalty"])
    table.equal("scores, penalty taken off", scores, trl["scores"])

    rewards = token_rewards(scores, kl, mask, kl_coef=case["kl_coef"])
    their_rewards = token_rewards(scores, kl, further, kl_coef=case["kl_coef"])
    if case["whiten_rewards"]:
        before = record["before whitening/rewards"]
        table.equal("rewards before whitening", rewards, before)
        their_rewards = F.whiten(rewards, further, shift_mean=False, statistics=bessel(rewards, further))
        rewards = F.whiten(rewards, mask, shift_mean=False)
        table.explained("rewards, whitened", rewards, trl["rewards"], their_rewards, "variance / (n - 1)")
    elif torch.equal(mask, further):
        table.equal("rewards", rewards, trl["rewards"])
    else:
        table.explained(
            "rewards", rewards, trl["rewards"], their_rewards, "the score one position late, on the pad"
        )
    settings = {"gamma": case["gamma"], "lam": case["lam"]}
    advantages = F.gae(rewards, values, mask, **settings)
    theirs = F.gae(their_rewards, values_further, further, **settings)
    found = {"returns": advantages + values, "whitened": F.whiten(advantages, mask)}
    statistics = bessel(theirs, mask)
    chosen = {"returns": theirs + values_further, "whitened": F.whiten(theirs, mask, statistics=statistics)}
    late = "bootstrapped from the value after the end"
    for name, label, why in (
        ("returns", "returns", ""),
        ("whitened", "advantages, whitened", "variance / (n - 1)"),
    ):
        trls = torch.where(mask, trl[name], 0.0)
        here, with_choice = found[name], torch.where(mask, chosen[name], 0.0)
        reasons = {
            late: not torch.equal(mask, further),
            why: bool(why),
            "rewards as above": case["whiten_rewards"],
        }
        choice = ", ".join(reason for reason, applies in reasons.items() if applies)
        table.explained_if(choice, label, here, trls, with_choice)
    return {
        "logprobs": logprobs,
        "values": values,
        "values_further": values_further,
        "here": found,
        "trl": chosen,
        "further": further,
    }


def compare_update(table, ours, record, step, case, rollout):
    """Losses and gradients of one update of all rows, with the weights that TRL had there."""
    rows = record[f"update {step}/micro_batch_inds"]
    ours.after(record, step)
    ours.shared.set_trainable(("policy", "value"))
    trl = {
        name.removeprefix(f"update {step}/"): value
        for name, value in record.items()
        if name.startswith(f"update {step}/")
    }
    where = ours.mask, rollout["further"]

    def losses(advantages, returns, value_mask, old_values):
        logprobs, _, hidden, _ = ours.everything(ours.mask, case["temperature"] + EPSILON)
        policy, _ = F.policy_loss(
            logprobs, rollout["logprobs"], advantages, where[0], cliprange=case["cliprange"]
        )
        value, _ = F.value_loss(
            ours.values(hidden, value_mask),
            old_values,
            returns,
            value_mask,
            cliprange_value=case["cliprange_value"],
        )
        ours.shared.zero_grad()
        (policy + case["vf_coef"] * value).backward()
        gradients = {name: p.grad.clone() for name, p in ours.shared.named_parameters() if p.grad is not None}
        ratio = (logprobs - rollout["logprobs"]).exp().detach()
        return policy.detach(), value.detach(), gradients, ratio

    here = losses(rollout["here"]["whitened"], rollout["here"]["returns"], where[0], rollout["values"])
    theirs = losses(
        rollout["trl"]["whitened"], rollout["trl"]["returns"], where[1], rollout["values_further"]
    )
    label = f"update {step + 1}: "
    ratio_back = torch.where(where[0][rows], trl["ratio"], 1.0)
    table.equal(label + "ratio", torch.where(where[0], here[3], 1.0)[rows], ratio_back)
    differs = "the advantages above"
    value_choice = "returns above, and trains the value after the end"
    full = torch.equal(*where)
    if step == 0 and full_like(here[3], ours.mask):
        table.equal(label + "policy loss", here[0], trl["pg_loss"])  # minus the mean of whitened advantages
    else:
        table.explained(label + "policy loss", here[0], trl["pg_loss"], theirs[0], differs)
    if full and not case["whiten_rewards"]:
        table.equal(label + "value loss", here[1], trl["vf_loss"])
    else:
        table.explained(
            label + "value loss",
            here[1],
            trl["vf_loss"],
            theirs[1],
            "the returns above" if full else value_choice,
        )
    names = [name for name in trl if name.startswith("gradient/") and POLICY in name]

    def pick(found):
        return torch.cat([found[named_here(name.removeprefix("gradient/"))].flatten() for name in names])

    trl_policy = torch.cat([trl[name].flatten() for name in names])
    table.explained(
        f"{label}gradient, {len(names)} of policy", pick(here[2]), trl_policy, pick(theirs[2]), differs
    )
    head = f"gradient/{HEAD}"
    head_here, head_theirs = here[2][named_here(HEAD)], theirs[2][named_here(HEAD)]
    if full and not case["whiten_rewards"]:
        table.equal(label + "gradient, value head", head_here, trl[head])
    else:
        table.explained(
            label + "gradient, value head", head_here, trl[head], head_theirs, "the value loss above"
        )


def full_like(ratio, mask):
    """Whether nothing has moved since the rollout."""
    return bool((ratio[mask] - 1).abs().max() < TOLERANCE)


def compare_microbatches(table, ours, record, case, rollout):
    """Cut into microbatches, TRL's loss is the mean of their means."""
    ours.after(record, 0)
    ours.shared.set_trainable(("policy", "value"))
    cuts = [record[f"update {step}/micro_batch_inds"] for step in range(case["accumulation"])]
    policy, _, _, _ = ours.everything(ours.mask, case["temperature"] + EPSILON)
    advantages = rollout["trl"]["whitened"]  # TRL's, so that the cut alone is compared
    arguments = (policy, rollout["logprobs"], advantages, ours.mask)
    whole, _ = F.policy_loss(*arguments, cliprange=case["cliprange"])
    parts = [F.policy_loss(*(x[rows] for x in arguments), cliprange=case["cliprange"])[0] for rows in cuts]
    trls = torch.stack([record[f"update {step}/pg_loss"] for step in range(len(cuts))])
    table.explained(
        "policy loss of the step",
        whole.detach(),
        trls.mean(),
        torch.stack(parts).mean().detach(),
        "mean of the microbatches' means",
    )
    last = f"update {len(cuts) - 1}/gradient/"
    names = [name for name in record if name.startswith(last + POLICY)]
    trl_gradient = torch.cat([record[name].flatten() for name in names])

    def gradient(loss):
        parameters = dict(ours.shared.named_parameters())
        wanted = [parameters[named_here(name.removeprefix(last))] for name in names]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, retain_graph=True)])

    table.explained(
        f"its gradient, {len(names)} of policy",
        gradient(whole),
        trl_gradient,
        gradient(torch.stack(parts).mean()),
        "the same",
    )
    tokens = [int(ours.mask[rows].sum()) for rows in cuts]
    print(f"(tokens in TRL's microbatches: {tokens})")


def compare_figures(table, ours, record, metrics, case, rollout):
    """What is logged: TRL averages over padding."""
    if torch.equal(ours.mask, rollout["further"]):
        return
    ours.after(record, 1)
    with torch.no_grad():
        logprobs, _, _, _ = ours.everything(ours.mask, case["temperature"] + EPSILON)
    log_ratio = logprobs - rollout["logprobs"]  # 0 on padding, as TRL has it
    for name, each in (("policy/approxkl_avg", log_ratio.square() / 2), ("val/ratio", log_ratio.exp())):
        first = 0.0 if "kl" in name else 1.0
        here, there = (first + F.masked_mean(each, ours.mask)) / 2, (first + each.mean()) / 2
        # The statistics of TRL are fp32.
        gap, left = distance(here, metrics[name]), distance(there, metrics[name])
        verdict = "mean over padding too (logged in fp32)" if left < 1e-6 else "NOT EXPLAINED"
        table._add(name, here, metrics[name], verdict, gap)


def compare_pad_inside(table, ours, record, case):
    """TRL takes a pad id that was sampled for the end of the reply."""
    cut = (
        ours.places
        < torch.where((ours.ids[:, ours.prompt :] == ours.facts["pad"]).any(-1), 3, len(ours.places))[:, None]
    )
    counted = (~record["rollout/padding_mask"]).sum()
    table.explained("tokens that count", ours.mask.sum(), counted, cut.sum(), "a pad id ends the reply")
    with torch.no_grad():
        whole, short = (ours.everything(mask, case["temperature"] + EPSILON) for mask in (ours.mask, cut))
    table.explained("scores", whole[3], record["rollout/scores"], short[3], "the same")


def compare_steps(summary, cases):
    print(
        f"\n{'optimizer steps a rollout':34} {'wanted':>12} {'TRL 1.12':>24}  val/ratio logged (1 is right)"
    )
    for name, case in cases.items():
        if name.startswith("steps"):
            ratios = [round(row["val/ratio"], 3) for row in summary["metrics"][name]]
            print(
                f"{name.removeprefix('steps, '):34} {case['mini_batches']:>12} {summary['steps'][name]!s:>24}"
                f"  {ratios}"
            )


def main():
    folder = Path(sys.argv[1])
    facts, summary = (json.loads((folder / name).read_text()) for name in ("facts.json", "trl.json"))
    torch.set_num_threads(1)
    table = Table()
    for number, (name, case) in enumerate(facts["cases"].items()):
        record = load_file(folder / f"trl_{number}.safetensors")
        if name.startswith("steps"):
            continue
        ours = Ours(folder, facts, case, record["order"])
        if name == "a pad id sampled inside":
            compare_pad_inside(table, ours, record, case)
        else:
            rollout = compare_rollout(table, ours, record, case)
            if case["accumulation"] > 1:
                compare_microbatches(table, ours, record, case, rollout)
            else:
                for step in range(case["epochs"]):
                    compare_update(table, ours, record, step, case, rollout)
                compare_figures(table, ours, record, summary["metrics"][name][0], case, rollout)
        table.print(f"== {name} ==")
    compare_steps(summary, facts["cases"])
    if table.failed:
        sys.exit(f"{table.failed} differences are not explained")
    print(f"\nEvery number is TRL {summary['trl']}'s within {TOLERANCE:g}, or is with TRL's choice put in.")


if __name__ == "__main__":
    main()
