"""Does run B differ from run A by more than noise? `tuwen bench compare A.json B.json`.

For every load that both measured: the ratio B / A of throughput and of latencies, each with a confidence interval
from the repeats, and a verdict.

The rule. Ratios are of geometric means, because noise of speeds is multiplicative, and a mean of three uses all three
where a median uses one. The interval is Student's, at 99 %, of the difference of logarithms, with the spread of both
runs' repeats pooled. (Welch's lets each keep its own; with three repeats and noise of 5 % it finds a loss of 20 % in
56 of 100 simulated comparisons, this one in 74, and false alarms stay below 1 in 100 figures with both.)
A figure differs if the interval leaves out 1 and the ratio is at least 10 % from it; the first keeps chance out, the
second some of what repeats cannot see, because they share a server and an hour. Both runs need two repeats or more of
a load.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from perf.analyzer import Loop
from perf.scenario import StreamKind
from perf.summary import Point, Summary
from tuwen.errors import InvalidInput, MissingDependency

Verdict = Literal["faster", "slower", "no difference beyond noise", "too few repeats"]

CONFIDENCE = 0.99
# The interval knows the noise within a run, not what changes from one run to the next: see docs/benchmarks.md for two
# runs of one build.
MIN_EFFECT = 0.10
# Arrival rates further apart than this are different loads, whose latencies say nothing about each other.
_SAME_RATE = 0.02
# An open loop's throughput is the rate it was asked for, so its latency alone is compared.
_FIGURES: dict[Loop, tuple[str, ...]] = {"closed": ("throughput", "p50", "p99"), "open": ("p50", "p99")}
# What differs between machines and makes a comparison one of machines.
_MACHINE_KEYS = ("cpu", "cores")


@dataclass(frozen=True)
class Ratio:
    """B / A with its confidence interval; 0 and infinity where the repeats cannot tell."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One figure of one load."""

    load: str
    stream: StreamKind
    figure: str
    a: float
    b: float
    ratio: Ratio
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All findings, and what a reader must know beside them."""

    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]

    @property
    def has_regression(self) -> bool:
        return any(finding.verdict == "slower" for finding in self.findings)


def compare(a: Summary, b: Summary, min_effect: float = MIN_EFFECT) -> Comparison:
    """Every load common to both.

    Args:
        min_effect: a smaller change is none, however sure; 0.1 is 10 %.
    Raises:
        InvalidInput: there is none.
        MissingDependency: scipy is not installed.
    """
    pairs, warnings = [], list(_differences(a, b))
    by_name = {point.name: point for point in b.points}
    for point in a.points:
        other = by_name.get(point.name)
        if other is None:
            continue
        if reason := _not_the_same(point, other):
            warnings.append(f"{point.name} is left out: {reason}")
            continue
        pairs.append((point, other))
    findings = [finding for pair in pairs for finding in _compare_point(*pair, min_effect)]
    if not findings:
        raise InvalidInput("the two runs have no load in common that both measured; use the same scenario for both")
    return Comparison(tuple(findings), tuple(warnings))


def _compare_point(a: Point, b: Point, min_effect: float) -> Iterator[Finding]:
    for stream in a.levels:
        if not (a.measured(stream) and b.measured(stream)):
            continue
        for figure in _FIGURES[a.loop]:
            if figure == "throughput":
                rows = (a.throughputs(stream), b.throughputs(stream))
            else:
                rows = (a.latencies(stream, figure), b.latencies(stream, figure))
            ratio = ratio_of(*rows)
            middle_a, middle_b = (statistics.median(row) for row in rows)
            verdict = judge(ratio, figure == "throughput", min_effect)
            yield Finding(a.name, stream, figure, middle_a, middle_b, ratio, verdict)


def ratio_of(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """B / A of geometric means, with Student's interval on logarithms; without bounds for fewer than two values each.

    Raises:
        MissingDependency: scipy is not installed.
    """
    logs_a, logs_b = ([math.log(value) for value in row] for row in (a, b))
    difference = statistics.fmean(logs_b) - statistics.fmean(logs_a)
    if min(len(a), len(b)) < 2:
        return Ratio(math.exp(difference), 0.0, math.inf)
    freedom = len(a) + len(b) - 2
    squares = sum(statistics.variance(logs) * (len(logs) - 1) for logs in (logs_a, logs_b))
    error = math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))
    reach = _student_quantile(0.5 + confidence / 2, freedom) * error
    return Ratio(math.exp(difference), math.exp(difference - reach), math.exp(difference + reach))


def _student_quantile(probability: float, freedom: int) -> float:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingDependency("comparing needs scipy: pip install 'tuwen[bench]'") from error
    return float(t.ppf(probability, freedom))


def judge(ratio: Ratio, higher_is_better: bool, min_effect: float = MIN_EFFECT) -> Verdict:
    """By the rule this module states."""
    if ratio.high == math.inf:
        return "too few repeats"
    is_beyond_noise = ratio.low > 1 or ratio.high < 1
    if not is_beyond_noise or 1 / (1 + min_effect) < ratio.value < 1 + min_effect:
        return "no difference beyond noise"
    return "faster" if (ratio.value > 1) == higher_is_better else "slower"


def _not_the_same(a: Point, b: Point) -> str:
    """Why the loads of one name are not one load; empty if they are."""
    for stream, level in a.levels.items():
        other = b.levels.get(stream)
        if other is None:
            return f"B sent no {stream} there"
        if abs(other / level - 1) > _SAME_RATE:
            unit = "/s" if a.loop == "open" else " under way"
            return (
                f"{level:g}{unit} in A, {other:g}{unit} in B; `tuwen bench run --rates-of A` asks for A's rates again"
            )
    failed = [name for name, point in (("A", a), ("B", b)) if not all(point.measured(one) for one in point.levels)]
    return f"{' and '.join(failed)} could not measure it" if failed else ""


def _differences(a: Summary, b: Summary) -> Iterator[str]:
    """What makes this a comparison of something else than two builds."""
    for key in _MACHINE_KEYS:
        if a.machine.get(key) != b.machine.get(key):
            yield f"the machines differ: {key} is {a.machine.get(key)} in A, {b.machine.get(key)} in B"
    for key in sorted(a.versions.keys() & b.versions.keys() - {"checkout", "tuwen"}):
        if a.versions[key] != b.versions[key]:
            yield f"{key} is {a.versions[key]} in A, {b.versions[key]} in B"
    if a.model != b.model:
        yield f"A measured {a.model}, B {b.model}"
    sent = [(one.scenario.text, one.scenario.image, one.scenario.seed) for one in (a, b)]
    if sent[0] != sent[1]:
        yield "the scenarios send different texts or pictures"
    if a.scenario.measure != b.scenario.measure:
        yield "the scenarios measure in different windows"
