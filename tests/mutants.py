"""Does the suite notice? Plants one bug at a time in a copy of ppo_math and kl_control, and runs their tests on it.

    python tests/mutants.py [TEXT]    # with TEXT, only the bugs that are planted where it stands

Prints a line for each bug and exits 1 if a test run passes with one of them. The sources in place are never touched.
6 minutes of one core.
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

ROOT = pathlib.Path(__file__).resolve().parents[1]
MATH, CONTROL = "ppo_math.py", "kl_control.py"

# (file, what stands there, the bug); only its first occurrence is replaced.
MUTANTS = [
    # masks
    (MATH, "torch.where(mask, _upcast(x), 0.0)", "_upcast(x) * mask"),
    (MATH, "return x if x.dtype == torch.float64 else x.float()", "return x"),
    (MATH, "return x if x.dtype == torch.float64 else x.float()", "return x.float()"),
    (MATH, "masked_sum(x, mask) / num_tokens", "masked_sum(x, mask) / mask.sum()"),
    (MATH, "masked_sum(x, mask) / num_tokens", "masked_sum(x, mask) / mask.numel()"),
    (MATH, "if num_tokens == 0:", "if num_tokens < 0:"),
    (MATH, "elif num_tokens <= 0:", "elif num_tokens < 0:"),
    # moments and whitening
    (MATH, "    x = _select(x, mask)\n    mean = masked_mean(x, mask)", "    mean = masked_mean(x, mask)"),
    (MATH, "masked_mean((x - mean).square(), mask))", "masked_sum((x - mean).square(), mask) / (mask.sum() - 1))"),
    (MATH, "(counts * (variances + (means - mean).square())).sum() / count", "(counts * variances).sum() / count"),
    (MATH, "mean = (counts * means).sum() / count", "mean = means.mean()"),
    (MATH, "    x = _select(x, mask)\n    _, mean, var", "    _, mean, var"),
    (MATH, "moments(x, mask) if statistics is None else statistics", "moments(x, mask)"),
    (MATH, "torch.rsqrt(var + eps)", "1 / (var.sqrt() + eps)"),
    (MATH, "whitened if shift_mean else whitened + mean", "whitened"),
    (MATH, "return _select(whitened if shift_mean else whitened + mean, mask)", "return whitened if shift_mean else whitened + mean"),
    # advantages
    (MATH, "rewards, values = _upcast(rewards), _upcast(values)", ""),
    (MATH, "advantages.new_zeros(len(advantages))", "values[:, -1]"),
    (MATH, "rewards[:, t] + gamma * value_ahead", "rewards[:, t] + value_ahead"),
    (MATH, "td_error + gamma * lam * advantage_ahead", "td_error + lam * advantage_ahead"),
    (MATH, "td_error + gamma * lam * advantage_ahead", "td_error + gamma * advantage_ahead"),
    (MATH, "td_error + gamma * lam * advantage_ahead, advantage_ahead)", "td_error + gamma * lam * advantage_ahead, 0.0)"),
    (MATH, "torch.where(mask[:, t], td_error + gamma * lam * advantage_ahead, advantage_ahead)",
     "td_error + gamma * lam * advantage_ahead"),
    (MATH, "torch.where(mask[:, t], values[:, t], value_ahead)", "values[:, t]"),
    (MATH, "return _select(advantages, mask)", "return advantages"),
    # groups
    (MATH, "(groups.sum(-1, keepdim=True) - groups) / (group_size - 1)", "groups.mean(-1, keepdim=True)"),
    (MATH, "(groups.sum(-1, keepdim=True) - groups) / (group_size - 1)", "(groups.sum() - groups) / (group_size - 1)"),
    (MATH, "return (groups - others).flatten()", "return (others - groups).flatten()"),
    (MATH, "return (groups - others).flatten()", "return (groups - others).T.flatten()"),
    (MATH, "groups = _groups(_upcast(returns), group_size)", "groups = _groups(returns, group_size)"),
    (MATH, "groups.std(-1, keepdim=True) + eps", "groups.std(-1, keepdim=True, correction=0) + eps"),
    (MATH, "groups.std(-1, keepdim=True) + eps", "groups.std() + eps"),
    (MATH, "groups.std(-1, keepdim=True) + eps", "groups.std(-1, keepdim=True)"),
    (MATH, "if group_size < 2 or", "if group_size < 1 or"),
    (MATH, "if group_size < 2 or len(returns) % group_size:", "if group_size < 2:"),
    # policy loss
    (MATH, "_select(logprobs, mask) - _select(old_logprobs, mask).detach()", "_upcast(logprobs - old_logprobs.detach())"),
    (MATH, "log_ratio = _select(logprobs, mask)", "log_ratio = -_select(logprobs, mask)"),
    (MATH, "_select(logprobs, mask) - _select(old_logprobs, mask).detach()", "_select(logprobs, mask) - _select(old_logprobs, mask)"),
    (MATH, "advantages = _select(advantages, mask).detach()", "advantages = _upcast(advantages).detach()"),
    (MATH, "advantages = _select(advantages, mask).detach()", "advantages = _select(advantages, mask)"),
    (MATH, "torch.maximum(plain, clipped)", "torch.minimum(plain, clipped)"),
    (MATH, "torch.maximum(plain, clipped)", "clipped"),
    (MATH, "plain, clipped = -advantages * ratio", "plain, clipped = advantages * ratio"),
    (MATH, "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(max=1 + cliprange)"),
    (MATH, "ratio.clamp(1 - cliprange, 1 + cliprange)", "ratio.clamp(1 - cliprange)"),
    (MATH, "(clipped > plain)", "(clipped >= plain)"),
    (MATH, "(clipped > plain)", "((ratio - 1).abs() > cliprange)"),
    (MATH, "log_ratio.expm1() - log_ratio", "log_ratio.expm1() + log_ratio"),
    (MATH, "log_ratio.expm1() - log_ratio", "ratio - 1 - log_ratio"),
    (MATH, '"policy/ratio_mean": masked_mean(ratio, mask, num_tokens=num_tokens)', '"policy/ratio_mean": masked_mean(ratio, mask)'),
    # value loss
    (MATH, "loss = 0.5 * masked_mean(torch.maximum(error", "loss = masked_mean(torch.maximum(error"),
    (MATH, "torch.maximum(error, clipped_error)", "torch.minimum(error, clipped_error)"),
    (MATH, "torch.maximum(error, clipped_error)", "clipped_error"),
    (MATH, "values.clamp(old_values - cliprange_value, old", "values.clamp(returns - cliprange_value, old"),
    (MATH, "values.clamp(old_values - cliprange_value, old", "values.clamp(old_values, old"),
    (MATH, "(values.clamp(old_values - cliprange_value, old_values + cliprange_value)",
     "(old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)"),
    (MATH, "_select(old_values, mask).detach()", "_select(old_values, mask)"),
    (MATH, "_select(returns, mask).detach()", "_select(returns, mask)"),
    (MATH, "(clipped_error > error)", "(clipped_error < error)"),
    (MATH, '"value/error": masked_mean(error', '"value/error": masked_mean(clipped_error'),
    # estimates of the KL, entropy, log-probabilities
    (MATH, "_upcast(logprobs) - _upcast(ref_logprobs)", "_upcast(ref_logprobs) - _upcast(logprobs)"),
    (MATH, "return 0.5 * difference.square()", "return difference.square()"),
    (MATH, "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference"),
    (MATH, "torch.expm1(-difference) + difference", "torch.exp(-difference) - 1 + difference"),
    (MATH, "(p * torch.where(p > 0, log_p - log_q, 0.0))", "(p * (log_p - log_q))"),
    (MATH, "(p * torch.where(p > 0, log_p - log_q, 0.0))", "(log_q.exp() * torch.where(p > 0, log_p - log_q, 0.0))"),
    (MATH, "-(p * torch.where(p > 0, log_p, 0.0))", "-(p * log_p)"),
    (MATH, "-(p * torch.where(p > 0, log_p, 0.0))", "torch.special.entr(p)"),
    (MATH, "(_upcast(logits) / temperature)", "(_upcast(logits) * temperature)"),
    (MATH, "(_upcast(logits) / temperature).log_softmax(-1)", "_upcast(logits).log_softmax(-1) / temperature"),
    (MATH, "(_upcast(logits) / temperature)", "_upcast(logits / temperature)"),
    (MATH, "if not temperature > 0:", "if temperature < 0:"),
    # explained variance, the pairwise and the ranking loss
    (MATH, "torch.where(is_constant, 0.0, 1 - unexplained / total)", "1 - unexplained / total"),
    (MATH, "is_constant = returns[mask].min() == returns[mask].max()", "is_constant = total == 0"),
    (MATH, "moments(residual, mask).var", "masked_mean(residual.square(), mask)"),
    (MATH, "@torch.no_grad()\ndef explained_variance", "def explained_variance"),
    (MATH, "-torch.nn.functional.logsigmoid(difference).mean()", "-torch.sigmoid(difference).log().mean()"),
    (MATH, "-torch.nn.functional.logsigmoid(difference).mean()", "-torch.nn.functional.logsigmoid(difference).sum()"),
    (MATH, "difference - _upcast(margin)", "difference + _upcast(margin)"),
    (MATH, "index_add(0, place[better], losses) / pair_counts).mean()", "index_add(0, place[better], losses)).sum() / pair_counts.sum()"),
    (MATH, "(ranks[:, None] < ranks)", "(ranks[:, None] <= ranks)"),
    (MATH, "(ranks[:, None] < ranks)", "(ranks[:, None] > ranks)"),
    (MATH, "(prompts[:, None] == prompts) & (ranks", "(ranks"),
    (MATH, "if not len(names) or not pair_counts.all():", "if not len(names):"),
    (MATH, "_upcast(scores)[better] - _upcast(scores)[worse]", "scores[better] - scores[worse]"),
    (MATH, "import torch\n", "import datasets\nimport torch\n"),
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
    (CONTROL, "if not (math.isfinite(self.coef) and self.coef >= 0):", "if not (math.isfinite(self.coef) and self.coef > 0):"),
    (CONTROL, "0 <= coef <= sys.float_info.max", "0 <= coef"),
    (CONTROL, "0 <= coef <= sys.float_info.max", "coef <= sys.float_info.max"),
    (CONTROL, " and not isinstance(coef, bool)", ""),
    (CONTROL, "or (coef == 0 and not zero_is_fine)", ""),
    (CONTROL, "import math\n", "import math\nimport torch\n"),
]  # fmt: skip


def run_tests(directory: pathlib.Path, *files: str) -> tuple[int, str]:
    """Exit status and output of the tests of these modules, in the copy.

    In a fork, which has torch and pytest already: importing them takes longer than the tests. No .pyc, since two mutants of one size
    within a second would share it. -c keeps the project's configuration out.
    """
    log = directory / "log"
    arguments = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-c", "none.ini", "--rootdir=."]

    def child() -> None:
        os.chdir(directory)
        sys.dont_write_bytecode = True
        sys.path[0] = str(directory)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = pytest.main([*arguments, *(f"tests/test_{file}" for file in files)])
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
        tests = ("conftest.py", "reference.py", "strategies.py", f"test_{MATH}", f"test_{CONTROL}")
        for folder, names in (("goose_lora", (MATH, CONTROL)), ("tests", tests)):
            (directory / folder).mkdir()
            for name in names:
                shutil.copy(ROOT / folder / name, directory / folder / name)
        # Without it the copy is a namespace package, and an installed goose_lora comes before it wherever it is on the path.
        (directory / "goose_lora" / "__init__.py").touch()
        (directory / "none.ini").write_text("[pytest]\n")
        status, output = run_tests(directory, MATH, CONTROL)
        if status:
            sys.exit(f"The tests fail without a bug; run pytest first.\n{output}")
        for file, old, new in chosen:
            source = (ROOT / "goose_lora" / file).read_text()
            (directory / "goose_lora" / file).write_text(source.replace(old, new, 1))
            status, output = run_tests(directory, file)
            (directory / "goose_lora" / file).write_text(source)
            # Only a test that failed kills; a mutant that cannot even be imported shows nothing about the tests.
            killed = status == pytest.ExitCode.TESTS_FAILED
            killers = [line.split("::")[-1].split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")]
            survivors += not killed
            by = " ".join(killers) or f"exit status {status}"
            print(f"{'killed  ' if killed else 'SURVIVED'} | {old!r} -> {new!r} | {by}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
