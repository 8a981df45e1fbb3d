"""Simulated coverage of the t and the crossed-bootstrap interval at S = 3, 5, 10, as a Markdown table.

.venv/bin/python bench/coverage.py
"""

import time

from ws.stability.intervals import coverage_table

INTERVALS = ("t", "boot", "crossed_t")
COLUMNS = [f"{interval}_{what}" for what in ("these_topics", "all_topics", "width") for interval in INTERVALS]


def main() -> None:
    start = time.perf_counter()
    table = coverage_table()
    titles = [
        f"{i}, {what}" for what in ("these topics", "all topics", "width") for i in ("t", "bootstrap", "crossed t")
    ]
    print(f"| noise (sd of seed, topic, crossing; nats) | S | {' | '.join(titles)} |")
    print("|---" * (2 + len(titles)) + "|")
    for row in table.iter_rows(named=True):
        noise = f"{row['noise']} ({row['seed_sd']:g}, {row['topic_sd']:g}, {row['cross_sd']:g})"
        print(f"| {noise} | {row['S']} | " + " | ".join(f"{row[name]:.3f}" for name in COLUMNS) + " |")
    print(f"\nnominal 0.95; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
