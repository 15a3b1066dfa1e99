"""Results of three variants as plain data, with names that need escaping."""

VARIANTS = ["one_task", "two & tasks", "<all>"]


def interval(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half}


METRICS = {
    "one_task": {"prognosis": {"auroc": interval(0.7123), "brier": interval(0.21)}},
    "two & tasks": {"prognosis": {"auroc": interval(0.7654), "brier": interval(0.19)}, "gcs": {"mae": interval(0.6)}},
    "<all>": {"prognosis": {"auroc": None, "brier": {"value": 0.25, "low": None, "high": None}}},
}
