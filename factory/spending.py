"""`factory journal stats`: what each run has spent on each model, and what for."""

import sqlite3
from pathlib import Path
from typing import Any

from factory.ledger import reading

# what a draw cost is its even share of its request
STATS = """
WITH filed AS (SELECT attempt, count(*) AS answers, sum(finish = 'length') AS cut FROM answer GROUP BY attempt),
paid AS (
    SELECT id, run, identity, status, keys, prompt_tokens, completion_tokens, seconds, length(body) AS bytes,
        CAST(usd AS REAL) AS usd, prompt_tokens + completion_tokens AS tokens, coalesce(answers, 0) AS answers,
        status = 'failed' AS failed,
        CASE WHEN status = 'read' AND keys <> '' THEN 1.0 / (1 + length(keys) - length(replace(keys, ' ', ''))) END AS share,
        coalesce(cut, 0) AS cut
    FROM attempt LEFT JOIN filed ON filed.attempt = attempt.id)
SELECT run, identity AS model, count(*) AS requests, sum(answers) AS answers, sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens, total(usd) AS usd, total(seconds) AS seconds,
    sum(status = 'sent') AS unknown, sum(status = 'stored') AS unread, sum(keys = '') AS forgotten,
    coalesce(sum(bytes), 0) AS body_bytes,
    total(failed * usd) AS failed_usd, total(failed * tokens) AS failed_tokens,
    total(cut * share * usd) AS truncated_usd, total(cut * share * tokens) AS truncated_tokens,
    total((1 - answers * share) * usd) AS superseded_usd, total((1 - answers * share) * tokens) AS superseded_tokens
FROM paid GROUP BY run, identity ORDER BY min(id)
"""
WASTE = ("failed", "truncated", "superseded")


def stats(path: Path) -> dict[str, Any]:
    """What each run spent on each model, and for what: as JSON-encodable data.

    `unknown` requests count at their worst case. `wasted` is what failed requests cost, what truncated answers cost, and
    what draws cost that no stored answer comes from: superseded by a later one, or lacking in the body.
    """
    with reading(path) as db:
        db.row_factory = sqlite3.Row
        groups = [dict(row) for row in db.execute(STATS)]
        reasons = db.execute(
            "SELECT run, identity, reason, count(*) FROM attempt WHERE status = 'failed' GROUP BY 1, 2, 3 ORDER BY 4 DESC, 3"
        ).fetchall()
    for group in groups:
        group["failures"] = {
            r: count for run, model, r, count in reasons if (run, model) == (group["run"], group["model"])
        }
        group["usd"], group["seconds"] = round(group["usd"], 9), round(group["seconds"], 3)
        group["wasted"] = {
            why: {"usd": round(group.pop(f"{why}_usd"), 9), "tokens": round(group.pop(f"{why}_tokens"))}
            for why in WASTE
        }
    size = sum(p.stat().st_size for p in (path, path.with_name(path.name + "-wal")) if p.exists())
    return {"journal": str(path), "bytes": size, "groups": groups}


def as_text(counted: dict[str, Any]) -> str:
    """What `stats` found, for people."""
    lines = [f"{counted['journal']}: {_size(counted['bytes'])}"]
    for g in counted["groups"]:
        lines += [
            f"\nrun {g['run']}, model {g['model']}",
            f"  {g['requests']} requests, {g['answers']} stored answers, {_size(g['body_bytes'])}",
            f"  {g['prompt_tokens']} tokens in, {g['completion_tokens']} out, {g['usd']:.6f} usd, {g['seconds']:.1f} s of compute",
        ]
        if g["failures"]:
            lines.append("  failed: " + ", ".join(f"{reason} {count}" for reason, count in g["failures"].items()))
        odd = [
            f"{g[name]} {words}"
            for name, words in (
                ("unknown", "with unknown outcome or in flight, counted at the worst case"),
                ("unread", "stored but not read"),
                ("forgotten", "forgotten"),
            )
            if g[name]
        ]
        lines += ["  " + "; ".join(odd)] if odd else []
        waste = [
            f"{why} {w['usd']:.6f} usd, {w['tokens']} tokens"
            for why, w in g["wasted"].items()
            if w["usd"] or w["tokens"]
        ]
        lines += ["  wasted: " + "; ".join(waste)] if waste else []
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
