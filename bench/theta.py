"""One Adam step of the theta fit against the textbook step, at the size of a real model.

The textbook step recomputes the base logits `W h + b` and lets autograd find the gradient; this project's records the
base once and uses the analytic gradient in blocks (`ws.theta.fit`). Both run here, on the same data, in the same
process. Prints their ratio (at least 4 is wanted at V = 151,936, d = 1024, D = 64, 1,000 tokens), how far the two
thetas are apart, the peak memory of each, the memory of a step as the tokens grow, and the time to the optimum beside
30 Adam steps.

    python bench/theta.py [--tokens 1000] [--repeats 3] [--skip-optimum]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from ratios import told
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ws.theta import base as base_of  # noqa: E402
from ws.theta.adam import adam  # noqa: E402
from ws.theta.base import record_base  # noqa: E402
from ws.theta.fit import FitConfig, fit_adam, make_problem  # noqa: E402
from ws.theta.heads import cvh  # noqa: E402
from ws.theta.optimum import fit_optimum  # noqa: E402
from ws.theta.recorded import Recorded  # noqa: E402
from ws.theta.states import States  # noqa: E402

V, d, D = 151_936, 1024, 64


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def data(tokens: int):
    """Hidden states and an unembedding whose base entropy is like a language model's (about 4 nats)."""
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(V, d, generator=gen) / d**0.5
    h = 3.5 * torch.randn(tokens, d, generator=gen)
    y = torch.cat([(part @ W.T / 0.5).argmax(1) for part in h.split(128)])
    return h, torch.where(torch.rand(tokens, generator=gen) < 0.5, y, torch.randint(V, (tokens,), generator=gen)), W


def textbook(h, y, W, head, cfg: FitConfig, steps: int):
    """Adam as one would first write it: base logits at every step, autograd through the head."""
    theta = torch.zeros(head.D, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=cfg.lr)
    C, times = head.readout(W), []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = h @ W.T
        steered = logits + cfg.gamma * (head.alpha * (theta * (h @ head.A.T)) @ C.T)
        ce = F.cross_entropy(steered, y, reduction="sum")
        log_base, log_steered = logits.log_softmax(-1), steered.log_softmax(-1)
        kl = (log_base.exp() * (log_base - log_steered)).sum()
        loss = (ce + cfg.beta * kl) / len(h) + cfg.lam * theta.square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([theta], cfg.grad_clip)
        optimizer.step()
        with torch.no_grad():
            theta *= (cfg.theta_clip / theta.norm().clamp(min=1e-30)).clamp(max=1.0)
        times.append(time.perf_counter() - start)
    return theta.detach(), times


def memory_only(tokens: int) -> None:
    """Child process: peak memory of three steps, base on disk, beyond what the data themselves take."""
    h, y, W = data(tokens)
    base_of.BASE_MB = 0
    problem = make_problem(record_base(h, y, W), cvh(d, D), W)
    private_before = private_mb()
    most = [private_before]
    register_optimizer_step_post_hook(lambda *_: most.append(private_mb()))
    fit_adam(problem, FitConfig(steps=3))
    print(f"{max(most) - private_before:.0f}")


def private_mb() -> float:
    """Anonymous resident memory (the memory-mapped base is page cache, not counted)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-optimum", action="store_true")
    parser.add_argument("--memory-only", action="store_true")
    args = parser.parse_args()
    if args.memory_only:
        memory_only(args.tokens)
        return
    h, y, W = data(args.tokens)
    head, cfg = cvh(d, D), FitConfig()
    print(
        f"V = {V}, d = {d}, D = {D}, {args.tokens} tokens, {torch.get_num_threads()} threads; data {peak_mb():.0f} MB"
    )

    start = time.perf_counter()
    base = record_base(h, y, W)
    problem = make_problem(base, head, W)
    once = time.perf_counter() - start
    marks = [time.perf_counter()]
    hook = register_optimizer_step_post_hook(lambda *_: marks.append(time.perf_counter()))
    ours = fit_adam(problem, FitConfig(steps=args.repeats))[0]
    hook.remove()
    ours_times = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    print(f"this project : {statistics.median(ours_times):6.3f} s per step, once {once:.2f} s, peak {peak_mb():.0f} MB")
    theirs, theirs_times = textbook(h, y, W, head, cfg, args.repeats)
    print(f"textbook     : {statistics.median(theirs_times):6.3f} s per step, peak {peak_mb():.0f} MB")
    ratio = told("one step of Adam", statistics.median(theirs_times), statistics.median(ours_times))
    whole = 30 * statistics.median(theirs_times) / (once + 30 * statistics.median(ours_times))
    print(f"ratio of one step {ratio:.1f} (wanted >= 4); of a whole fit of 30 steps, recording included, {whole:.1f}")
    print(
        f"|theta - textbook theta| / |theta| after {args.repeats} steps:"
        f" {float((ours.theta - theirs).norm() / theirs.norm()):.1e}"
    )

    start = time.perf_counter()
    train = Recorded({"user": States(h, y, torch.zeros_like(y))}, W)
    fits, _ = adam(train.problem(head), cfg)
    by_expansion = time.perf_counter() - start
    whole = fit_adam(problem, cfg)[0].theta
    told("a whole fit by an expansion", 30 * statistics.median(theirs_times), by_expansion)
    print(
        f"30 steps by an expansion, recording, moments and checks included: {by_expansion:.1f} s,"
        f" {30 * statistics.median(theirs_times) / by_expansion:.1f} times as fast, theta"
        f" {float((fits[0].theta - whole).norm() / whole.norm()):.1e} off"
    )

    for tokens in (250, args.tokens):
        command = [sys.executable, __file__, "--memory-only", "--tokens", str(tokens)]
        more = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"memory of a step beyond the recorded data, {tokens} tokens: {more} MB")

    if not args.skip_optimum:
        start = time.perf_counter()
        best = fit_optimum(problem, cfg)[0]
        took = time.perf_counter() - start
        print(
            f"optimum: {took:.1f} s, {best.iterations} iterations, {best.hessians} Hessians, gradient norm"
            f" {best.gradient_ratio:.1e} of the start's, condition number {best.condition:.1f};"
            f" 30 Adam steps: {30 * statistics.median(ours_times):.1f} s"
        )


if __name__ == "__main__":
    main()
