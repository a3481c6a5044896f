"""What `off_policy.py` reports: B5 beside the truth, the headline numbers, and what is unexpected in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

EXACT = 1e-12
"""A regret below this is 0 up to rounding."""
PARTS = ("mixing", "replay", "samples", "verifier")
Rows = list[dict[str, Any]]


def beside(regret: Tensor, certificate: Tensor) -> dict[str, Any]:
    """B5 beside the truth: how large it is where there is a regret, and what it says where there is none."""
    regret, certificate = regret.flatten(), certificate.flatten()
    exact = regret <= EXACT
    ratio = (certificate / regret)[~exact]
    return {
        "runs": len(regret),
        "exact": int(exact.sum()),
        "exact_certificate": certificate[exact].max().item() if exact.any() else None,
        "ratio": [ratio.min().item(), ratio.median().item(), ratio.max().item()] if len(ratio) else None,
        "too_low": int((certificate < regret * (1 - 1e-9) - EXACT).sum()),
    }


def summarise(rows: Rows, seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    parts = {part: [row for row in rows if row["cell"].startswith(part)] for part in PARTS}
    noisy = [row for row in parts["samples"] if row["noise"] > 0]
    exact = [row for row in parts["samples"] if row["noise"] == 0]
    settled = [row for row in noisy if row["identified"][-1] == row["data_sets"]]
    summary = {
        "certificates": {part: _together(parts[part]) for part in PARTS},
        "slopes": {row["cell"]: row["slope"] for row in noisy},
        "over_constant": {row["cell"]: _over_constant(row) for row in settled},
        "not_identified": {
            row["cell"]: 1 - row["identified"][-1] / row["data_sets"] for row in noisy if row not in settled
        },
        "best_data": _best_data(noisy),
        "identified_regret": max((_identified_regret(row) for row in exact), default=0.0),
        "b6_over_regret": {
            row["cell"]: [row[key][-1] / row["mean"][-1] for key in ("theorem2", "fast")] for row in noisy
        },
        "mixing": {row["family"]: _mixing_regrets(row) for row in parts["mixing"]},
        "replay": {
            row["cell"]: dict(zip(map(str, row["ages"]), row["reached"], strict=True)) for row in parts["replay"]
        },
        "verifier_error": max((_verifier_error(row) for row in parts["verifier"]), default=0.0),
        "verifier_spread": {
            key: max((_spread(row["reports"], key) for row in parts["verifier"]), default=0.0)
            for key in ("regret", "certificate", "centred")
        },
    }
    bad = _unexpected(rows, noisy, settled)
    bad += [f"{row['cell']}: regret without noise" for row in exact if _identified_regret(row) > EXACT]
    bad += [f"{row['cell']}: not O7's regret" for row in parts["verifier"] if _verifier_error(row) > 1e-9]
    verdict = "as predicted" if not bad else "NOT as predicted"
    return summary | {"unexpected": bad, "verdict": verdict, "seconds": round(seconds, 1)}


def _unexpected(rows: Rows, noisy: Rows, settled: Rows) -> list[str]:
    bad = [f"{row['cell']}: a certificate below the regret" for row in rows if any(r["too_low"] for r in _besides(row))]
    bad += [f"{row['cell']}: B6 below the regret" for row in noisy if _b6_fails(row)]
    bad += [
        f"{row['cell']}: slope" for row in noisy if row["slope"] and (row["slope"][2] < -1.25 or row["slope"][1] > -0.8)
    ]
    for row in settled:
        ratio, error = _over_constant(row)
        if abs(ratio - 1) > min(4 * error, 0.15) + 0.05:
            bad.append(f"{row['cell']}: {ratio:.3f} of the constant")
    return bad


def _best_data(noisy: Rows) -> dict[str, float]:
    """On problems where the best data are known, the constant of each over theirs."""
    best = {row["family"]: row["constant"] for row in noisy if row["data"] == "best"}
    return {row["cell"]: row["constant"] / best[row["family"]] for row in noisy if row["family"] in best}


def _identified_regret(row: dict[str, Any]) -> float:
    return max((float(regret) for regret in row["identified_regret"] if regret is not None), default=0.0)


def _mixing_regrets(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median regret over the start's, by number of updates, with the anti-optimum's data, the reference's and the optimum's."""
    found: dict[str, dict[str, float]] = {}
    for update, curve in row["regret"].items():
        medians = {f"{x:g}": values[1] / row["start"] for x, values in zip(row["distance"], curve, strict=True)}
        found[update] = {x: medians[x] for x in ("-1", "0", "1") if x in medians}
    return found


def _verifier_error(row: dict[str, Any]) -> float:
    return max(abs(float(report["regret"] - report["tempered"])) for report in row["reports"])


def _besides(row: dict[str, Any]) -> Rows:
    """All records of :func:`beside` in a row."""
    found = row["beside"]
    if isinstance(found, list):
        return found
    return list(found.values()) if row["cell"].startswith("mixing") else [found]


def _together(rows: Rows) -> dict[str, Any]:
    """Of all records; their medians are put together by the median, since single runs are not kept."""
    records = [record for row in rows for record in _besides(row)]
    ratios = [[float(number) for number in record["ratio"]] for record in records if record["ratio"]]
    bounds_there = [float(r["exact_certificate"]) for r in records if r["exact_certificate"] is not None]
    return {
        "runs": sum(record["runs"] for record in records),
        "exact": sum(record["exact"] for record in records),
        "exact_certificate": max(bounds_there, default=None),
        "ratio": [min(r[0] for r in ratios), float(np.median([r[1] for r in ratios])), max(r[2] for r in ratios)]
        if ratios
        else None,
    }


def _over_constant(row: dict[str, Any]) -> list[float]:
    """``N · mean regret`` at the largest ``N`` over the constant, and its standard error."""
    return [row["sizes"][-1] * row[key][-1] / row["constant"] for key in ("mean", "error")]


def _b6_fails(row: dict[str, Any]) -> bool:
    """A regret above the bound, of minimisers that are in its class."""
    return any(
        inside == row["data_sets"] and largest > min(slow, fast)
        for inside, largest, slow, fast in zip(row["inside"], row["largest"], row["theorem2"], row["fast"], strict=True)
    )


def _spread(reports: Rows, key: str) -> float:
    """The largest difference between reports with the same ``a + b``."""
    groups: dict[float, list[float]] = {}
    for report in reports:
        groups.setdefault(round(report["a"] + report["b"], 9), []).append(report[key])
    return max((max(values) - min(values) for values in groups.values()), default=0.0)


def views(rows: Rows, summary: dict[str, Any]) -> list[Table]:
    """The certificates, and the 1/N law."""
    first = Table("part", "runs", "regret 0", "B5 there", "B5 over regret: least", "median", "largest")
    for part, record in summary["certificates"].items():
        ratio = [f"{number:.4g}" for number in record["ratio"]] if record["ratio"] else [""] * 3
        there = "" if record["exact_certificate"] is None else f"{record['exact_certificate']:.1e}"
        first.add_row(part, str(record["runs"]), str(record["exact"]), there, *ratio)
    second = Table(
        "noisy returns", "constant", "slope", "interval", "N·regret over constant", "B6 over regret: Thm 2", "fast"
    )
    for row in rows:
        if row["cell"] in summary["slopes"]:
            slope, over = row["slope"], summary["over_constant"].get(row["cell"])
            second.add_row(
                row["cell"].removeprefix("samples/"),
                f"{float(row['constant']):.4g}",
                f"{slope[0]:.3f}" if slope else "",
                f"{slope[1]:.3f} to {slope[2]:.3f}" if slope else "",
                f"{over[0]:.3f} ± {over[1]:.3f}" if over else "not identified",
                *(f"{ratio:.3g}" for ratio in summary["b6_over_regret"][row["cell"]]),
            )
    return [first, second]
