"""Golden values for the maths of SRPPO, from plain Python loops in fp64 (lists and `math`, nothing of the package).

`python tests/goldens/make.py` rewrites the json files beside it. Rows are ragged: they hold the counted positions only,
`width` is the padded length T, and the test fills the rest with garbage. Inputs are rounded to fp32, so that fp32 and
fp64 runs see the same numbers. The slow, direct form of a formula is used where there is one (GAE as a double sum, a
deviation in two passes), not the recursion that an implementation would use. JSON has no infinity: it is "-inf" here.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 20251021
COMMAND = "python tests/goldens/make.py"

Row = list[float]
Rows = list[Row]
Case = dict[str, Any]

# name: (width T, response lengths). A row of length T never ended, one of length 1 ended at once, 0 is fully masked.
SHAPES: dict[str, tuple[int, list[int]]] = {
    "ragged": (5, [5, 1, 3, 0, 2]),
    "ends at once": (4, [1, 1, 1]),
    "never ends": (4, [4, 4, 4]),
    "one column": (1, [1, 0, 1]),
    "wide padding": (9, [2, 4, 3]),
    "one row": (6, [4]),
}
NOTHING_COUNTS = (3, [0, 0])


def fp32(x: float) -> float:
    """x rounded to fp32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def draw(rng: random.Random, lengths: list[int], low: float, high: float) -> Rows:
    return [[fp32(rng.uniform(low, high)) for _ in range(n)] for n in lengths]


def near(rng: random.Random, rows: Rows, reach: float) -> Rows:
    """Each value moved by at most `reach`."""
    return [[fp32(x + rng.uniform(-reach, reach)) for x in row] for row in rows]


def flat(rows: Rows) -> Row:
    return [x for row in rows for x in row]


def each(fn: Callable[..., float], *ragged: Rows) -> Rows:
    """fn at every counted position."""
    return [[fn(*xs) for xs in zip(*rows, strict=True)] for rows in zip(*ragged, strict=True)]


# Kernels


def log_softmax(logits: Row, temperature: float) -> Row:
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    lse = math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [(z - top) - lse for z in scaled]


def kernel_logits(rng: random.Random) -> dict[str, list[Row]]:
    """Rows of logits by case; bf16 holds values that bf16 represents exactly."""
    return {
        "moderate": draw(rng, [11] * 6, -6, 6),
        "one entry": [[fp32(rng.uniform(-3, 3))] for _ in range(2)],
        "flat": [[0.75] * 8, [-2.5] * 8],
        "wide vocabulary": draw(rng, [130] * 2, -4, 4),
        "offset 1e4": [[round(rng.uniform(-8, 8) * 64) / 64 + shift for _ in range(9)] for shift in (1e4, -1e4, 0.0)],
        "saturated": [[90.0, 0.0, -5.0, 3.0], [-90.0, -90.0, 0.0, -90.0], [1e4, -1e4, 0.0, 9990.0]],
        "leading -inf": [[-math.inf] * 8 + draw(rng, [4], -3, 3)[0], draw(rng, [4], -3, 3)[0] + [-math.inf] * 8],
        "bf16": [[round(rng.uniform(-4, 4) * 16) / 16 for _ in range(16)] for _ in range(4)],
    }


def likely_tokens(rng: random.Random, logits: list[Row]) -> list[int]:
    """A token a row, never one whose logit is -inf."""
    return [rng.choice([v for v, z in enumerate(row) if z > -math.inf]) for row in logits]


def make_kernels() -> dict[str, Any]:
    rng = random.Random(f"{SEED} kernels")
    token_cases: list[Case] = []
    for name, logits in kernel_logits(rng).items():
        temperatures = (1.0, 0.7, 2.0) if name == "moderate" else (1.0,)
        for temperature in temperatures:
            tokens = likely_tokens(rng, logits)
            rows = [log_softmax(row, temperature) for row in logits]
            upstream = draw(rng, [len(logits)], -2, 2)[0]
            grads = [
                [g * ((v == token) - math.exp(lp)) / temperature for v, lp in enumerate(row)]
                for g, token, row in zip(upstream, tokens, rows, strict=True)
            ]
            token_cases.append(
                {
                    "name": f"{name}, temperature {temperature}",
                    "logits": logits,
                    "tokens": tokens,
                    "temperature": temperature,
                    "upstream": upstream,
                    "expected": [row[token] for row, token in zip(rows, tokens, strict=True)],
                    "expected_grad": grads,
                }
            )
    diff_cases: list[Case] = []
    bases = kernel_logits(rng)
    for name, sft in kernel_logits(rng).items():
        base = bases[name]
        if name == "offset 1e4":  # one model only: the difference must not see it
            base = [[z - round(z / 1e4) * 1e4 for z in row] for row in base]
        tokens = likely_tokens(rng, sft)
        diff_cases.append(
            {
                "name": name,
                "sft_logits": sft,
                "base_logits": base,
                "tokens": tokens,
                "expected": [
                    log_softmax(s, 1.0)[token] - log_softmax(b, 1.0)[token]
                    for s, b, token in zip(sft, base, tokens, strict=True)
                ],
            }
        )
    return {
        "token_logprobs": {
            "what": "log-probability of each token, and the gradient of sum(upstream * log-prob) in the logits",
            "formula": "z = logits / temperature; z_t - max z - log sum exp(z - max z); "
            "gradient upstream * (1[v = t] - p_v) / temperature",
            "source": "softmax at a temperature, by definition",
            "cases": token_cases,
        },
        "logprob_diff": {
            "what": "log pi_sft(t) - log pi_base(t) of one token a row",
            "formula": "log_softmax(sft)_t - log_softmax(base)_t at temperature 1",
            "source": "SRPPO, arXiv 2510.21090, the coherent reward's summand",
            "cases": diff_cases,
        },
    }


# Advantages


def gae(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    """The double sum: A_t = sum_l (gamma lam)^l delta_(t+l)."""
    out = []
    for r, v in zip(rewards, values, strict=True):
        after = [*v[1:], 0.0]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        out.append([math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))])
    return out


def whiten(rows: Rows) -> Rows:
    xs = flat(rows)
    if not xs:
        return rows
    mean = math.fsum(xs) / len(xs)
    var = math.fsum((x - mean) ** 2 for x in xs) / len(xs)
    return each(lambda x: (x - mean) / math.sqrt(var + 1e-8), rows)


def make_advantage() -> dict[str, Any]:
    rng = random.Random(f"{SEED} advantage")
    gae_cases: list[Case] = []

    def add_gae(name: str, width: int, rewards: Rows, values: Rows, gamma: float, lam: float) -> None:
        expected = gae(rewards, values, gamma, lam)
        inputs = {"width": width, "rewards": rewards, "values": values, "gamma": gamma, "lam": lam}
        gae_cases.append({"name": f"{name}, gamma {gamma}, lam {lam}", **inputs, "expected": expected})

    for name, (width, lengths) in SHAPES.items():
        for gamma, lam in ((1.0, 0.95), (0.9, 0.6), (0.99, 0.0), (1.0, 1.0)):
            add_gae(name, width, draw(rng, lengths, -2, 2), draw(rng, lengths, -3, 3), gamma, lam)
    width, lengths = SHAPES["ragged"]
    at_eos = [[0.0] * (n - 1) + [fp32(rng.uniform(-5, 5))] if n else [] for n in lengths]
    add_gae("reward at eos only", width, at_eos, draw(rng, lengths, -1, 1), 1.0, 0.95)
    add_gae("extreme", width, draw(rng, lengths, -1e4, 1e4), draw(rng, lengths, -1e3, 1e3), 1.0, 0.95)
    add_gae("nothing counts", NOTHING_COUNTS[0], [[], []], [[], []], 1.0, 0.95)

    whiten_cases: list[Case] = []

    def add_whiten(name: str, width: int, x: Rows) -> None:
        whiten_cases.append({"name": name, "width": width, "x": x, "expected": whiten(x)})

    for name, (width, lengths) in SHAPES.items():
        add_whiten(name, width, draw(rng, lengths, -2, 5))
    width, lengths = SHAPES["ragged"]
    add_whiten("extreme", width, draw(rng, lengths, -1e6, 1e6))
    add_whiten("variance near the epsilon", width, draw(rng, lengths, -2e-4, 2e-4))
    add_whiten("constant", 3, [[0.5, 0.5, 0.5], [0.5]])
    add_whiten("one value", 3, [[], [7.25], []])
    add_whiten("nothing counts", NOTHING_COUNTS[0], [[], []])
    return {
        "gae": {
            "what": "GAE(lambda) advantages of each response; the value after the last counted token is 0",
            "formula": "delta_t = r_t + gamma V_(t+1) - V_t; A_t = sum_(l >= 0) (gamma lam)^l delta_(t+l)",
            "source": "Schulman et al. 2015, arXiv 1506.02438, eq. 16; PPO, arXiv 1707.06347, eq. 11-12",
            "cases": gae_cases,
        },
        "whiten": {
            "what": "advantages to mean 0 and variance 1 over the counted positions of the whole batch",
            "formula": "(x - mean) / sqrt(var + 1e-8), population variance in two passes",
            "source": "the project's specification of whiten",
            "cases": whiten_cases,
        },
    }


# Losses


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def policy_loss(new: Rows, old: Rows, adv: Rows, clip: float, count: int) -> Case:
    def terms(n: float, o: float, a: float) -> tuple[float, float]:
        ratio = math.exp(n - o)
        return -a * ratio, -a * clamp(ratio, 1 - clip, 1 + clip)

    def slope(n: float, o: float, a: float) -> float:
        plain, clipped = terms(n, o, a)
        return 0.0 if clipped > plain else -a * math.exp(n - o) / count  # the clipped branch is constant

    pairs = [terms(*xs) for xs in zip(flat(new), flat(old), flat(adv), strict=True)]
    return {
        "loss": math.fsum(max(pair) for pair in pairs) / count,
        "clip_share": sum(clipped > plain for plain, clipped in pairs) / count,
        "approx_kl": math.fsum(math.expm1(n - o) - (n - o) for n, o in zip(flat(new), flat(old), strict=True)) / count,
        "grad": each(slope, new, old, adv),
    }


def value_loss(values: Rows, old: Rows, returns: Rows, clip: float | None, count: int) -> Case:
    def squares(v: float, o: float, r: float) -> tuple[float, float]:
        plain = (v - r) ** 2
        return plain, plain if clip is None else (clamp(v, o - clip, o + clip) - r) ** 2

    def slope(v: float, o: float, r: float) -> float:
        plain, clipped = squares(v, o, r)
        return 0.0 if clipped > plain else (v - r) / count

    pairs = [squares(*xs) for xs in zip(flat(values), flat(old), flat(returns), strict=True)]
    assert all(plain == clipped or abs(plain - clipped) > 1e-4 for plain, clipped in pairs), "a near tie"
    return {
        "loss": 0.5 * math.fsum(max(pair) for pair in pairs) / count,
        "clip_share": sum(clipped > plain for plain, clipped in pairs) / count,
        "grad": each(slope, values, old, returns),
    }


def kl_row(form: str, lp: Row, ref: Row) -> tuple[float, Row]:
    """The penalty of one response and its gradient: k2 of the response's log ratio, k3 summed over its tokens."""
    if form == "k2":
        gap = math.fsum(x - y for x, y in zip(lp, ref, strict=True))
        return 0.5 * gap**2, [gap] * len(lp)
    terms = [math.expm1(y - x) - (y - x) for x, y in zip(lp, ref, strict=True)]
    return math.fsum(terms), [-math.expm1(y - x) for x, y in zip(lp, ref, strict=True)]


def explained_variance(values: Rows, returns: Rows) -> float:
    def var(xs: Row) -> float:
        mean = math.fsum(xs) / len(xs) if xs else 0.0
        return math.fsum((x - mean) ** 2 for x in xs) / len(xs) if xs else 0.0

    total = var(flat(returns))
    return 1 - var(flat(each(lambda r, v: r - v, returns, values))) / total if total > 0 else 0.0


def off_the_edges(new: Rows, old: Rows, clip: float) -> Rows:
    """New log-probs moved until no ratio is within 0.01 of an edge, where fp32 and fp64 could disagree on a branch."""

    def move(n: float, o: float) -> float:
        while any(abs(math.exp(n - o) - edge) < 0.01 for edge in (1 - clip, 1 + clip)):
            n = fp32(n + 0.03)
        return n

    return each(move, new, old)


def make_losses() -> dict[str, Any]:
    rng = random.Random(f"{SEED} losses")
    policy_cases: list[Case] = []
    value_cases: list[Case] = []
    kl_cases: list[Case] = []
    k1_cases: list[Case] = []
    ev_cases: list[Case] = []

    def add_policy(
        name: str, width: int, new: Rows, old: Rows, adv: Rows, clip: float, token_count: int | None = None
    ) -> None:
        expected = policy_loss(new, old, adv, clip, token_count or len(flat(new)))
        inputs = {"width": width, "logprobs": new, "old_logprobs": old, "advantages": adv, "clip": clip}
        policy_cases.append({"name": name, **inputs, "token_count": token_count, "expected": expected})

    def add_value(
        name: str, width: int, values: Rows, old: Rows, returns: Rows, clip: float | None, token_count: int | None
    ) -> None:
        expected = value_loss(values, old, returns, clip, token_count or len(flat(values)))
        inputs = {"width": width, "values": values, "old_values": old, "returns": returns, "clip": clip}
        value_cases.append({"name": name, **inputs, "token_count": token_count, "expected": expected})

    def add_kl(name: str, width: int, lp: Rows, anchor: Rows, form: str, token_count: int | None = None) -> None:
        count = token_count or len(flat(lp))
        rows = [kl_row(form, x, ref) for x, ref in zip(lp, anchor, strict=True)]
        grad = [[slope / count for slope in slopes] for _, slopes in rows]
        expected = {"loss": math.fsum(term for term, _ in rows) / count, "grad": grad}
        inputs = {"width": width, "logprobs": lp, "anchor_logprobs": anchor, "form": form}
        kl_cases.append({"name": f"{form}, {name}", **inputs, "token_count": token_count, "expected": expected})

    for name, (width, lengths) in SHAPES.items():
        for clip, token_count in ((0.2, None), (0.1, 40)):
            title = f"{name}, clip {clip}, token_count {token_count}"
            old = draw(rng, lengths, -6, -0.5)
            new = off_the_edges(near(rng, old, 0.5), old, clip)
            add_policy(title, width, new, old, draw(rng, lengths, -2, 2), clip, token_count)
            values = draw(rng, lengths, -2, 2)
            add_value(title, width, values, near(rng, values, 0.6), draw(rng, lengths, -2, 2), clip, token_count)
        for form in ("k2", "k3"):
            for token_count in (None, 33):
                lp = draw(rng, lengths, -6, 0)
                add_kl(f"{name}, token_count {token_count}", width, lp, near(rng, lp, 1.5), form, token_count)
        values = draw(rng, lengths, -2, 2)
        add_value(f"{name}, no clip", width, values, near(rng, values, 0.6), draw(rng, lengths, -2, 2), None, None)
        lp = draw(rng, lengths, -6, 0)
        anchor = near(rng, lp, 2.0)
        expected = each(lambda x, ref: x - ref, lp, anchor)
        k1_cases.append({"name": name, "width": width, "logprobs": lp, "anchor_logprobs": anchor, "expected": expected})
        returns = draw(rng, lengths, -3, 3)
        values = near(rng, returns, 1.0)
        expected_ev = explained_variance(values, returns)
        ev_cases.append({"name": name, "width": width, "values": values, "returns": returns, "expected": expected_ev})

    # Every quadrant of (advantage, ratio), and advantage 0: only (+, above) and (-, below) are clipped.
    quadrants = [[1.5, 1.5, 1.5, -0.5, -0.5, -0.5, 0.0, 0.0]]
    moved = [[fp32(x) for x in (-1.5, -2.0, -2.5, -1.5, -2.0, -2.5, -1.5, -2.5)]]
    add_policy("quadrants", 8, moved, [[-2.0] * 8], quadrants, 0.2)
    old = [[-20.0, -30.0, -1.0], [-12.0], [-0.001, -25.0]]
    new = [[-8.0, -42.0, -9.0], [-0.25], [-10.0, -25.0]]
    add_policy("extreme ratios", 4, new, old, [[1e3, -1e3, 2.0], [-50.0], [-1e3, 1e3]], 0.2)
    add_policy("nothing counts", NOTHING_COUNTS[0], [[], []], [[], []], [[], []], 0.2, 7)
    # Below, inside and above the clip range, with the return on either side.
    add_value(
        "value sides",
        6,
        [[1.0, 1.0, -1.0, -1.0, 0.125, 0.0]],
        [[0.0] * 6],
        [[2.0, -2.0, 2.0, -2.0, 3.0, 0.0]],
        0.25,
        None,
    )
    add_value(
        "extreme values", 3, [[1e3, -1e3, 3.0], [5e3]], [[0.0, 0.0, 1e3], [5e3]], [[-1e4, 1e4, 50.0], [0.0]], 0.2, None
    )
    add_value("nothing counts", NOTHING_COUNTS[0], [[], []], [[], []], [[], []], 0.2, 7)
    for form in ("k2", "k3"):
        add_kl("extreme", 3, [[-1.0, -14.0, -30.0], [-0.001]], [[-15.0, -2.0, -30.0], [-9.0]], form)
        add_kl("nothing counts", NOTHING_COUNTS[0], [[], []], [[], []], form, 7)
    for name, values, returns in (
        ("perfect", [[1.0, 2.0], [4.0]], [[1.0, 2.0], [4.0]]),
        ("a constant offset explains all", [[2.0, 3.0], [5.0]], [[1.0, 2.0], [4.0]]),
        ("worse than nothing", [[-4.0, 4.0], [-8.0]], [[1.0, 2.0], [4.0]]),
        ("constant returns", [[1.0, 2.0], [4.0]], [[0.5, 0.5], [0.5]]),
        ("constant returns, inexact in binary", [[1.0, 2.0, 0.0], [4.0, 3.0]], [[fp32(0.1)] * 3, [fp32(0.1)] * 2]),
        ("one value", [[1.0], []], [[3.0], []]),
        ("nothing counts", [[], []], [[], []]),
    ):
        expected_ev = explained_variance(values, returns)
        ev_cases.append({"name": name, "width": 3, "values": values, "returns": returns, "expected": expected_ev})
    return {
        "clipped_policy_loss": {
            "what": "clipped surrogate as a loss, its gradient in the log-probs, clip share and the k3 estimate of KL",
            "formula": "ratio = exp(new - old); sum max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) / token_count; "
            "clip_share: -A clamp > -A ratio strictly; approx_kl: mean of (ratio - 1) - log ratio",
            "source": "PPO, arXiv 1707.06347, eq. 7; k3: Schulman, Approximating KL Divergence, 2020",
            "cases": policy_cases,
        },
        "clipped_value_loss": {
            "what": "clipped value loss, its gradient in the values, and the share where the clipped square is larger",
            "formula": "0.5 sum max((v - R)^2, (clamp(v, old - clip, old + clip) - R)^2) / token_count; "
            "clip null: 0.5 sum (v - R)^2 / token_count",
            "source": "OpenAI baselines ppo2; Engstrom et al. 2020, arXiv 2005.12729, section 3",
            "cases": value_cases,
        },
        "kl_penalty": {
            "what": "the k2 and k3 penalties on KL(policy, anchor), and their gradients in the policy's log-probs",
            "formula": "d_t = log ref - log pi; k2: 0.5 (sum_t d_t)^2 of each response, which has the gradient of "
            "the KL between responses; k3: exp(d_t) - 1 - d_t at each token; summed / token_count",
            "source": "Schulman, Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html",
            "cases": kl_cases,
        },
        "k1": {
            "what": "the k1 estimate of KL at each token",
            "formula": "log pi - log ref, 0 where masked",
            "source": "Schulman, Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html",
            "cases": k1_cases,
        },
        "explained_variance": {
            "what": "share of the returns' variance that the critic explains",
            "formula": "1 - Var(R - V) / Var(R) over counted positions, 0 when Var(R) = 0",
            "source": "OpenAI baselines common/math_util.py",
            "cases": ev_cases,
        },
    }


# Reward


def make_reward() -> dict[str, Any]:
    rng = random.Random(f"{SEED} reward")
    coherent_cases: list[Case] = []
    place_cases: list[Case] = []

    def add(name: str, width: int, log_ratio: Rows) -> None:
        sums = [math.fsum(row) for row in log_ratio]
        coherent_cases.append({"name": name, "width": width, "log_ratio": log_ratio, "expected": sums})
        at_eos = [[0.0] * (len(row) - 1) + [total] if row else [] for row, total in zip(log_ratio, sums, strict=True)]
        for at, expected in (("eos", at_eos), ("token", log_ratio)):
            place_cases.append(
                {"name": f"{name}, at {at}", "width": width, "log_ratio": log_ratio, "at": at, "expected": expected}
            )

    for name, (width, lengths) in SHAPES.items():
        add(name, width, draw(rng, lengths, -3, 3))
    add("extreme", 4, [[110.0, -80.5, 30.25], [-1e4, 5.0, 0.0, 1.0], [], [1e4]])
    add("nothing counts", NOTHING_COUNTS[0], [[], []])

    running_cases: list[Case] = []
    for name, batches in (
        ("several batches", draw(rng, [4, 1, 7, 2], -3, 6)),
        ("far from zero", draw(rng, [5, 5], 9999.0, 10001.0)),
        ("two values", [[1.0], [4.0]]),
        ("one value", [[3.5]]),
        ("nothing seen", []),
        ("constant", [[2.0, 2.0], [2.0]]),
        ("constant, inexact in binary", [[fp32(0.1)] * 3, [fp32(0.1)] * 7]),
        ("extreme", draw(rng, [3, 6], -1e6, 1e6)),
    ):
        stds = []
        for seen in range(1, len(batches) + 1):
            xs = flat(batches[:seen])
            mean = math.fsum(xs) / len(xs)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in xs) / len(xs))
            stds.append(std if len(xs) >= 2 and std > 0 else 1.0)
        running_cases.append({"name": name, "batches": batches, "expected": [1.0, *stds]})
    return {
        "coherent_reward": {
            "what": "reward of each response",
            "formula": "r(x, y) = sum_t [log pi_sft(y_t) - log pi_base(y_t)] over counted tokens",
            "source": "SRPPO, arXiv 2510.21090, the coherent reward",
            "cases": coherent_cases,
        },
        "place_reward": {
            "what": "the reward on the time axis: the sum at the last counted token, or each term at its own",
            "formula": "eos: 0, ..., 0, sum; token: the terms; 0 where masked; a row without counted tokens is all 0",
            "source": "SRPPO, arXiv 2510.21090 (reward at EOS); per-token placement is the project's",
            "cases": place_cases,
        },
        "running_std": {
            "what": "standard deviation of every value seen, before and after each batch",
            "formula": "sqrt(mean((x - mean)^2)) in two passes over all values; 1 before two values or when zero",
            "source": "the definition that Chan, Golub and LeVeque 1979 update",
            "cases": running_cases,
        },
    }


def encode(x: Any) -> Any:
    """The same with infinities as strings."""
    if isinstance(x, float) and math.isinf(x):
        return str(x)
    if isinstance(x, list):
        return [encode(y) for y in x]
    if isinstance(x, dict):
        return {k: encode(y) for k, y in x.items()}
    return x


def build() -> dict[str, dict[str, Any]]:
    """File name to content: function name to provenance and cases."""
    parts = {
        "kernels": make_kernels(),
        "advantage": make_advantage(),
        "losses": make_losses(),
        "reward": make_reward(),
    }
    out: dict[str, dict[str, Any]] = {}
    for part, functions in parts.items():
        out[f"{part}.json"] = {
            name: {
                "provenance": {key: body[key] for key in ("what", "formula", "source")}
                | {"made_by": f"{COMMAND}: plain Python fp64 loops", "seed": f"{SEED} {part}"},
                "cases": encode(body["cases"]),
            }
            for name, body in functions.items()
        }
    return out


def dump(content: dict[str, Any]) -> str:
    """JSON with one case a line."""
    blocks = []
    for name, body in content.items():
        provenance = json.dumps(body["provenance"], indent=2).replace("\n", "\n    ")
        cases = ",\n".join("      " + json.dumps(case, allow_nan=False) for case in body["cases"])
        blocks.append(f'  "{name}": {{\n    "provenance": {provenance},\n    "cases": [\n{cases}\n    ]\n  }}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    for file, content in build().items():
        Path(__file__).with_name(file).write_text(dump(content))


if __name__ == "__main__":
    main()
