"""What the test run says at its end."""


def pytest_terminal_summary(terminalreporter):
    """How many faults the campaign tried, and how many were not refused by name."""
    tried = {
        outcome: sum(
            "test_a_fault_is_refused_by_name" in report.nodeid
            for report in terminalreporter.getreports(outcome)
        )
        for outcome in ("passed", "failed")
    }
    if sum(tried.values()):
        refused = f"{tried['passed']} refused by name, {tried['failed']} not"
        terminalreporter.write_line(f"faults tried: {sum(tried.values())} ({refused})")
