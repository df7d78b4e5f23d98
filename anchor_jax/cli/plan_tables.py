"""What `anchor-jax plan` prints: tables of the reports' plain values."""

from collections.abc import Mapping, Sequence
from typing import Any

_GB = 10**9
_TERA = 10**12
_HEADER = (
    "  program                 compile s  inputs GB  outputs GB  working GB  peak GB"
    "  fused"
)
_SENT = (
    "  collectives, of a chip            number  arrays GB  sent near GB"
    "  to other nodes GB  seconds"
)


def training_table(title: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines that show a `TrainingReport.summary()`."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in summary["mesh"].items() if n > 1)
    chip, memory = summary["chip"], summary["memory"] / _GB
    made = summary["programs"]
    is_refused = any("reason" in one for one in made.values())
    those = " (only programs that fit are counted)" if is_refused else ""
    those = those if made else " (working memory by formula)"
    fits = "fits" if summary["fits"] else "does not fit"
    if is_refused:
        fits = "a program is refused"
    fits += ", but within the formula's error" if summary["is_close"] else ""
    lines = [
        f"{title}: {chip}, {memory:.0f} GB, {mesh or 'one chip'}",
        *_programs(made),
        _resident(summary),
        f"  needed per chip: {summary['needed'] / _GB:.1f} GB{those}: {fits}",
    ]
    if summary["formula"]:
        lines += _formula(summary)
    return lines + [f"  problem: {line}" for line in summary["problems"]]


def _programs(made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the rows of compiled programs, and what their chips send."""
    if not made:
        return []
    rows = [_HEADER, *[_row(part, one) for part, one in made.items()]]
    sent = []
    for part, one in made.items():
        sent += [_sent(f"{part}: {row['kind']}", row) for row in one.get("traffic", ())]
    return rows + ([_SENT, *sent] if sent else [])


def _sent(name: str, row: Mapping[str, float]) -> str:
    sizes = (row[key] / _GB for key in ("nbytes", "inside", "between"))
    arrays, inside, between = sizes
    return (
        f"  {name:<33} {row['count']:6.0f}  {arrays:9.2f}  {inside:12.2f}"
        f"  {between:17.2f}  {row['seconds']:7.3f}"
    )


def _formula(summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines about a mean step by formula."""
    step = summary["formula"]
    links = sum(one["seconds"] for one in step["traffic"])
    lines = [
        f"  mean step: {step['seconds']:.2f} s; products"
        f" {step['compute']:.2f} s at an assumed {100 * step['efficiency']:.0f} % of"
        f" the peak, reading weights {step['memory']:.2f} s beside them, collectives"
        f" {links:.2f} s after them: {100 * step['mfu']:.0f} % MFU",
        f"  operations: {step['flops'] / _TERA:,.0f} TFLOP,"
        f" {step['again'] / _TERA:,.0f} repeated to save memory",
    ]
    if seconds := summary.get("seconds_compiler"):
        lines.append(
            f"  mean step by the compiler's estimate: at most {seconds:.2f} s, with"
            " attention by formula and every early exit passed"
        )
    if step["traffic"]:
        lines.append(_SENT)
        title = "mean step" if step["has_programs"] else "formula"
        lines += [_sent(f"{title}: {one['kind']}", one) for one in step["traffic"]]
    if cost := summary.get("cost"):
        lines.append(_cost(cost, summary.get("paper")))
    return lines


def _cost(cost: Mapping[str, Any], paper: Mapping[str, Any] | None) -> str:
    line = (
        f"  {cost['steps']:,} steps on {cost['chips']} chips: {cost['hours']:.1f} h,"
        f" {cost['chip_hours']:,.0f} chip-hours"
    )
    line += _priced(cost)
    if paper:
        line += (
            f"; the paper: {paper['chip_hours']:,} {paper['chip']}-hours for"
            f" {paper['batch']} videos per step"
        )
    return line


def _priced(cost: Mapping[str, Any], digits: int = 0) -> str:
    """Returns the end of a line that says a cost, or nothing without a price."""
    if cost["total"] is None:
        return ""
    return f", {cost['total']:,.{digits}f} at {cost['price']:g} per chip-hour"


def _resident(summary: Mapping[str, Any]) -> str:
    parts = [f"{part} {n / _GB:.2f}" for part, n in summary["resident"].items()]
    return f"  stays in memory, GB: {', '.join(parts)}"


def table(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines that show a `StreamReport.summary()`."""
    memory = summary["memory"]
    percent = 100 * summary.get("efficiency", 0.4)
    those = "" if summary["programs"] else " (working memory by formula)"
    freed = summary["needed_encoder_freed"] / _GB
    lines = [
        f"{name}: {summary['chip']}, {memory / _GB:.0f} GB",
        *_programs(summary["programs"]),
        _resident(summary),
        f"  needed: {summary['needed'] / _GB:.1f} GB;"
        f" {freed:.1f} GB with text_encoder=free{those}",
        f"  roofline: {summary['frames_per_second_peak']:.1f} frames/s at full speed"
        f" without decoding; {summary['frames_per_second']:.1f} frames/s at"
        f" {percent:.0f} % with decoding, prompt switch"
        f" {summary['switch_seconds']:.2f} s,"
        f" first block {summary['first_seconds']:.2f} s",
        f"  seconds at {percent:.0f} %: {_times(summary['seconds'])}",
    ]
    if summary["seconds_compiler"]:
        times = _times(summary["seconds_compiler"])
        lines.append(
            f"  seconds by the compiler's estimate, attention by formula: {times}"
        )
    if cost := summary.get("cost"):
        hours = f"{cost['chip_hours']:.2f} chip-hours{_priced(cost, digits=2)}"
        lines.append(f"  an hour of video at {percent:.0f} %: {hours}")
    return lines + [f"  problem: {line}" for line in summary["problems"]]


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())


def _row(part: str, made: Mapping[str, Any]) -> str:
    if "reason" in made:
        return f"  {part:<23} {made['reason']}"
    sizes = (made[key] / _GB for key in ("arguments", "outputs", "temporaries", "peak"))
    inputs, outputs, working, peak = sizes
    fused = "-" if made["fused"] is None else made["fused"]
    return (
        f"  {part:<23} {made['seconds']:9.1f}  {inputs:9.2f}  {outputs:10.2f}"
        f"  {working:10.2f}  {peak:7.2f}  {fused:>5}"
    )


def ranking(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines of a sweep: what fits, and how many faster ones do not."""
    fitting = [row for row in rows if row["fits"]]
    others = [row for row in rows if not row["fits"]]
    lines = ["  s/step  GB per chip  by formula", *map(_ranked, fitting)]
    if others:
        fastest = " ".join(_ranked(others[0]).split())
        lines.append(
            f"  {len(others)} faster ones do not fit; the fastest of them: {fastest}"
        )
    return lines


def _ranked(row: Mapping[str, Any]) -> str:
    return f"  {row['seconds']:6.2f}  {row['needed'] / _GB:11.1f}  {row['name']}"
