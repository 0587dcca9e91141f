"""What the test run says at its end: the faults that it tried, and what came of them."""

CAMPAIGNS = {  # what a test tries, by its name; or by a property that it records, with its number
    "test_a_fault_is_refused_by_name": "bad arguments of functions",
    "test_a_bad_option_is_refused": "bad options of commands",
    "kills": "kills at random moments",
    "other troubles": "full disks, deleted folders, little memory, second processes",
    "loads": "loads beside two savers",
    "edited files": "edited files",
}


def count_faults(report):
    """How many faults of each campaign a test has tried."""
    name = report.nodeid.split("::")[-1].split("[")[0]
    counts = {name: 1} if name in CAMPAIGNS else {}
    return counts | {name: n for name, n in report.user_properties if name in CAMPAIGNS}


def pytest_terminal_summary(terminalreporter):
    """How many faults were tried, and how many tests say that one was not met as promised."""
    tried, n_failed = dict.fromkeys(CAMPAIGNS, 0), 0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            found = count_faults(report) if report.when == "call" else {}
            n_failed += bool(found) and outcome == "failed"
            for name, n in found.items():
                tried[name] += n
    if any(tried.values()):
        listed = "; ".join(f"{n:,} {CAMPAIGNS[name]}" for name, n in tried.items() if n)
        total = sum(tried.values())
        terminalreporter.write_line(f"faults tried: {total:,} ({listed}); tests that failed: {n_failed}")
