"""Sum up the turns of a benchmark: median tokens a second, and the suite's ratio to each competitor."""

import statistics
from collections import defaultdict


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["summary"] = summary([b for b in benchmarks if b.extra_info.get("tokens")])


def pytest_terminal_summary(terminalreporter, config):
    benchmarks = [b for b in config._benchmarksession.benchmarks if b.extra_info.get("tokens")]
    for row in summary(benchmarks):
        terminalreporter.write_line(
            f"{row['size']:<6} {row['name']:<20} {row['tokens_per_second']:>9,.0f} tokens/s   "
            f"the suite takes {row['suite_over_this']:.3f} of its time [{row['low']:.2f}, {row['high']:.2f}]"
        )


def summary(benchmarks: list) -> list[dict]:
    """Per size and competitor: median speed, and the quartiles of the suite's time over its time, turn by turn."""
    seconds, tokens = defaultdict(list), {}
    for b in benchmarks:
        info = b.extra_info
        seconds[info["size"], info["name"]].append(b.stats.min)
        tokens[info["size"]] = info["tokens"]
    rows = []
    for (size, name), times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds[size, "suite"], times, strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        speed = tokens[size] / statistics.median(times)
        rows.append({"size": size, "name": name, "tokens_per_second": speed, "suite_over_this": middle, "low": low})
        rows[-1]["high"] = high
    return rows
