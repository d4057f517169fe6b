"""Plant one bug at a time in a copy of functional/ and ppo/kl_control.py, and run their tests.

    python tests/policy/mutants.py [TEXT]

With TEXT, only the bugs that are planted where it stands. Prints a line for each bug and exits 1 if
a test run passes with one of them. The sources in place are never touched. 6 minutes of one core.
"""

import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile

import beartype  # noqa: F401
import hypothesis  # noqa: F401
import jaxtyping  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[2]
MASKED, ADVANTAGES, LOSSES, KL, LOGPROBS = (
    f"functional/{name}.py" for name in ("masked", "advantages", "losses", "kl", "logprobs")
)
CONTROL = "ppo/kl_control.py"
TESTS = {"functional": "functional", CONTROL: "ppo/test_kl_control.py"}

# (file, what stands there, the bug); only its first occurrence is replaced.
MUTANTS = [
    # masks
    (MASKED, "torch.where(mask, _upcast(x), 0.0)", "_upcast(x) * mask"),
    (MASKED, "return x if x.dtype == torch.float64 else x.float()", "return x"),
    (MASKED, "return x if x.dtype == torch.float64 else x.float()", "return x.float()"),
    (MASKED, "masked_sum(x, mask) / num_tokens", "masked_sum(x, mask) / mask.sum()"),
    (MASKED, "masked_sum(x, mask) / num_tokens", "masked_sum(x, mask) / mask.numel()"),
    (MASKED, "if num_tokens == 0:", "if num_tokens < 0:"),
    (MASKED, "elif num_tokens <= 0:", "elif num_tokens < 0:"),
    # moments and whitening
    (MASKED, "    x = _select(x, mask)\n    mean = masked_mean(x, mask)", "    mean = masked_mean(x, mask)"),
    (
        MASKED,
        "masked_mean((x - mean).square(), mask))",
        "masked_sum((x - mean).square(), mask) / (mask.sum() - 1))",
    ),
    (
        MASKED,
        "(counts * (variances + (means - mean).square())).sum() / count",
        "(counts * variances).sum() / count",
    ),
    (MASKED, "mean = (counts * means).sum() / count", "mean = means.mean()"),
    (MASKED, "    x = _select(x, mask)\n    _, mean, var", "    _, mean, var"),
    (MASKED, "moments(x, mask) if statistics is None else statistics", "moments(x, mask)"),
    (MASKED, "torch.rsqrt(var + eps)", "1 / (var.sqrt() + eps)"),
    (MASKED, "whitened if shift_mean else whitened + mean", "whitened"),
    (
        MASKED,
        "return _select(whitened if shift_mean else whitened + mean, mask)",
        "return whitened if shift_mean else whitened + mean",
    ),
    # advantages
    (ADVANTAGES, "rewards, values = _upcast(rewards), _upcast(values)", ""),
    (ADVANTAGES, "advantages.new_zeros(len(advantages))", "values[:, -1]"),
    (ADVANTAGES, "rewards[:, t] + gamma * value_ahead", "rewards[:, t] + value_ahead"),
    (ADVANTAGES, "td_error + gamma * lam * advantage_ahead", "td_error + lam * advantage_ahead"),
    (ADVANTAGES, "td_error + gamma * lam * advantage_ahead", "td_error + gamma * advantage_ahead"),
    (
        ADVANTAGES,
        "td_error + gamma * lam * advantage_ahead, advantage_ahead)",
        "td_error + gamma * lam * advantage_ahead, 0.0)",
    ),
    (
        ADVANTAGES,
        "torch.where(mask[:, t], td_error + gamma * lam * advantage_ahead, advantage_ahead)",
        "td_error + gamma * lam * advantage_ahead",
    ),
    (ADVANTAGES, "torch.where(mask[:, t], values[:, t], value_ahead)", "values[:, t]"),
    (ADVANTAGES, "return _select(advantages, mask)", "return advantages"),
    # groups
    (
        ADVANTAGES,
        "(groups.sum(-1, keepdim=True) - groups) / (group_size - 1)",
        "groups.mean(-1, keepdim=True)",
    ),
    (
        ADVANTAGES,
        "(groups.sum(-1, keepdim=True) - groups) / (group_size - 1)",
        "(groups.sum() - groups) / (group_size - 1)",
    ),
    (ADVANTAGES, "return (groups - others).flatten()", "return (others - groups).flatten()"),
    (ADVANTAGES, "return (groups - others).flatten()", "return (groups - others).T.flatten()"),
    (ADVANTAGES, "groups = _groups(_upcast(returns), group_size)", "groups = _groups(returns, group_size)"),
    (ADVANTAGES, "groups.std(-1, keepdim=True) + eps", "groups.std(-1, keepdim=True, correction=0) + eps"),
    (ADVANTAGES, "groups.std(-1, keepdim=True) + eps", "groups.std() + eps"),
    (ADVANTAGES, "groups.std(-1, keepdim=True) + eps", "groups.std(-1, keepdim=True)"),
    (ADVANTAGES, "if group_size < 2 or", "if group_size < 1 or"),
    (ADVANTAGES, "if group_size < 2 or len(returns) % group_size:", "if group_size < 2:"),
    # policy loss
    (
        LOSSES,
        "_select(logprobs, mask) - _select(old_logprobs, mask).detach()",
        "_upcast(logprobs - old_logprobs.detach())",
    ),
    (LOSSES, "log_ratio = _select(logprobs, mask)", "log_ratio = -_select(logprobs, mask)"),
    (
        LOSSES,
        "_select(logprobs, mask) - _select(old_logprobs, mask).detach()",
        "_select(logprobs, mask) - _select(old_logprobs, mask)",
    ),
    (LOSSES, "advantages = _select(advantages, mask).detach()", "advantages = _upcast(advantages).detach()"),
    (LOSSES, "advantages = _select(advantages, mask).detach()", "advantages = _select(advantages, mask)"),
    (LOSSES, "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)"),
    (LOSSES, "torch.maximum(plain, clipped)", "clipped"),
    (LOSSES, "plain, clipped = -advantages * ratio", "plain, clipped = advantages * ratio"),
    (LOSSES, "ratio.clamp(1 - cliprange, 1 + high)", "ratio.clamp(max=1 + high)"),
    (LOSSES, "ratio.clamp(1 - cliprange, 1 + high)", "ratio.clamp(1 - cliprange)"),
    (LOSSES, "ratio.clamp(1 - cliprange, 1 + high)", "ratio.clamp(1 - high, 1 + high)"),
    (LOSSES, "(clipped > plain)", "(clipped >= plain)"),
    (LOSSES, "(clipped > plain)", "((ratio - 1).abs() > cliprange)"),
    (LOSSES, "log_ratio.expm1() - log_ratio", "log_ratio.expm1() + log_ratio"),
    (LOSSES, "log_ratio.expm1() - log_ratio", "ratio - 1 - log_ratio"),
    (
        LOSSES,
        '"policy/ratio_mean": masked_mean(ratio, mask, num_tokens=num_tokens)',
        '"policy/ratio_mean": masked_mean(ratio, mask)',
    ),
    # value loss
    (LOSSES, "loss = 0.5 * masked_mean(torch.maximum(error", "loss = masked_mean(torch.maximum(error"),
    (LOSSES, "torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)"),
    (LOSSES, "torch.maximum(error, clipped_error)", "clipped_error"),
    (LOSSES, "values.clamp(old_values - cliprange_value, old", "values.clamp(returns - cliprange_value, old"),
    (LOSSES, "values.clamp(old_values - cliprange_value, old", "values.clamp(old_values, old"),
    (
        LOSSES,
        "values.clamp(old_values - cliprange_value, old_values + cliprange_value)",
        "(old_values + (values - old_values).clamp(-cliprange_value, cliprange_value))",
    ),
    (LOSSES, "_select(old_values, mask).detach()", "_select(old_values, mask)"),
    (LOSSES, "_select(returns, mask).detach()", "_select(returns, mask)"),
    (LOSSES, "(clipped_error > error)", "(clipped_error < error)"),
    (LOSSES, '"value/error": masked_mean(error', '"value/error": masked_mean(clipped_error'),
    # estimates of the KL, entropy, log-probabilities
    (KL, "_upcast(logprobs) - _upcast(ref_logprobs)", "_upcast(ref_logprobs) - _upcast(logprobs)"),
    (KL, "return 0.5 * difference.square()", "return difference.square()"),
    (KL, "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference"),
    (KL, "torch.expm1(-difference) + difference", "torch.exp(-difference) - 1 + difference"),
    (KL, "(p * torch.where(p > 0, log_p - log_q, 0.0))", "(p * (log_p - log_q))"),
    (
        KL,
        "(p * torch.where(p > 0, log_p - log_q, 0.0))",
        "(log_q.exp() * torch.where(p > 0, log_p - log_q, 0.0))",
    ),
    (LOGPROBS, "-(p * torch.where(p > 0, log_p, 0.0))", "-(p * log_p)"),
    (LOGPROBS, "-(p * torch.where(p > 0, log_p, 0.0))", "torch.special.entr(p)"),
    (LOGPROBS, "(_upcast(logits) / temperature)", "(_upcast(logits) * temperature)"),
    (
        LOGPROBS,
        "(_upcast(logits) / temperature).log_softmax(-1)",
        "_upcast(logits).log_softmax(-1) / temperature",
    ),
    (LOGPROBS, "(_upcast(logits) / temperature)", "_upcast(logits / temperature)"),
    (LOGPROBS, "if not temperature > 0:", "if temperature < 0:"),
    # explained variance, the pairwise and the ranking loss
    (ADVANTAGES, "torch.where(is_constant, 0.0, 1 - unexplained / total)", "1 - unexplained / total"),
    (ADVANTAGES, "is_constant = returns[mask].min() == returns[mask].max()", "is_constant = total == 0"),
    (ADVANTAGES, "moments(residual, mask).var", "masked_mean(residual.square(), mask)"),
    (ADVANTAGES, "@torch.no_grad()\ndef explained_variance", "def explained_variance"),
    (
        LOSSES,
        "losses = -torch.nn.functional.logsigmoid(difference)",
        "-torch.sigmoid(difference).log().mean()",
    ),
    (
        LOSSES,
        "losses = -torch.nn.functional.logsigmoid(difference)",
        "-torch.nn.functional.logsigmoid(difference).sum()",
    ),
    (LOSSES, "difference - _upcast(margin)", "difference + _upcast(margin)"),
    (
        LOSSES,
        "index_add(0, place[better], losses) / pair_counts).mean()",
        "index_add(0, place[better], losses)).sum() / pair_counts.sum()",
    ),
    (LOSSES, "(ranks[:, None] < ranks)", "(ranks[:, None] <= ranks)"),
    (LOSSES, "(ranks[:, None] < ranks)", "(ranks[:, None] > ranks)"),
    (LOSSES, "(prompts[:, None] == prompts) & (ranks", "(ranks"),
    (LOSSES, "if not len(names) or not pair_counts.all():", "if not len(names):"),
    (LOSSES, "_upcast(scores)[better] - _upcast(scores)[worse]", "scores[better] - scores[worse]"),
    (LOSSES, "import torch\n", "import datasets\nimport torch\n"),
    # the coefficient
    (CONTROL, "kl / self.target - 1", "1 - kl / self.target"),
    (CONTROL, "kl / self.target - 1", "kl - self.target"),
    (CONTROL, "-0.2), 0.2)", "-0.2), 0.25)"),
    (CONTROL, "-0.2), 0.2)", "-1.0), 0.2)"),
    (CONTROL, "min(n_sequences / self.horizon, 1.0)", "n_sequences / self.horizon"),
    (CONTROL, "min(n_sequences / self.horizon, 1.0)", "1.0"),
    (CONTROL, "if not math.isfinite(kl):", "if math.isnan(kl):"),
    (CONTROL, "if not math.isfinite(kl):", "if math.isinf(kl):"),
    (CONTROL, "if n_sequences <= 0:", "if n_sequences < 0:"),
    (CONTROL, "if not (math.isfinite(value) and value > 0):", "if not value > 0:"),
    (
        CONTROL,
        "if not (math.isfinite(self.coef) and self.coef >= 0):",
        "if not (math.isfinite(self.coef) and self.coef > 0):",
    ),
    (CONTROL, "0 <= coef <= sys.float_info.max", "0 <= coef"),
    (CONTROL, "0 <= coef <= sys.float_info.max", "coef <= sys.float_info.max"),
    (CONTROL, " and not isinstance(coef, bool)", ""),
    (CONTROL, "or (coef == 0 and not zero_is_fine)", ""),
    (CONTROL, "import math\n", "import math\nimport torch\n"),
]


def run_tests(directory: pathlib.Path, *files: str) -> tuple[int, str]:
    """Run these tests in the copy; return their exit status and output.

    In a fork, which has torch and pytest already: importing them takes longer than the tests. No
    .pyc, since two mutants of one size within a second would share it. -c keeps the project's
    configuration out.
    """
    log = directory / "log"
    arguments = [
        "-x",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-c",
        "none.ini",
        "--rootdir=.",
        "--import-mode=importlib",
    ]

    def child() -> None:
        os.chdir(directory)
        sys.dont_write_bytecode = True
        sys.path[0] = str(directory)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = pytest.main([*arguments, *(f"tests/{file}" for file in files)])
        sys.stdout.flush()
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def main() -> int:
    survivors, chosen = 0, [mutant for mutant in MUTANTS if "".join(sys.argv[1:2]) in mutant[1]]
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        shutil.copytree(ROOT / "goose_lora" / "functional", directory / "goose_lora" / "functional")
        (directory / "goose_lora" / "ppo").mkdir()
        shutil.copy(ROOT / "goose_lora" / CONTROL, directory / "goose_lora" / CONTROL)
        # Those of the frozen head ask a whole model, which the copy does not have.
        left_out = shutil.ignore_patterns("test_logprobs.py", "__pycache__")
        shutil.copytree(ROOT / "tests" / "functional", directory / "tests" / "functional", ignore=left_out)
        (directory / "tests" / "ppo").mkdir()
        shutil.copy(ROOT / "tests" / TESTS[CONTROL], directory / "tests" / TESTS[CONTROL])
        shutil.copy(ROOT / "tests" / "conftest.py", directory / "tests" / "conftest.py")
        (directory / "tests" / "support").mkdir()
        for name in ("reference.py", "strategies.py", "closeness.py"):
            shutil.copy(ROOT / "tests" / "support" / name, directory / "tests" / "support" / name)
        # Without these the copy is a namespace package, and an installed goose_lora comes before it
        # on the path.
        (directory / "goose_lora" / "__init__.py").touch()
        (directory / "goose_lora" / "ppo" / "__init__.py").touch()
        (directory / "none.ini").write_text("[pytest]\npythonpath = tests/support\n")
        status, output = run_tests(directory, *TESTS.values())
        if status:
            sys.exit(f"The tests fail without a bug; run pytest first.\n{output}")
        for file, old, new in chosen:
            source = (ROOT / "goose_lora" / file).read_text()
            (directory / "goose_lora" / file).write_text(source.replace(old, new, 1))
            status, output = run_tests(directory, TESTS.get(file, "functional"))
            (directory / "goose_lora" / file).write_text(source)
            # Only a test that failed kills; a mutant that cannot even be imported shows nothing
            # about the tests.
            killed = status == pytest.ExitCode.TESTS_FAILED
            killers = [
                line.split("::")[-1].split(" - ")[0]
                for line in output.splitlines()
                if line.startswith("FAILED")
            ]
            survivors += not killed
            by = " ".join(killers) or f"exit status {status}"
            print(f"{'killed  ' if killed else 'SURVIVED'} | {old!r} -> {new!r} | {by}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
