"""Results of three variants as plain data, with names that need escaping."""

VARIANTS = ["one_task", "two & tasks", "<all>"]


def interval(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half}


METRICS = {
    "one_task": {"prognosis": {"auroc": interval(0.7123), "brier": interval(0.21)}},
    "two & tasks": {"prognosis": {"auroc": interval(0.7654), "brier": interval(0.19)}, "gcs": {"mae": interval(0.6)}},
    "<all>": {"prognosis": {"auroc": None, "brier": {"value": 0.25, "low": None, "high": None}}},
}


def full_record(patient="P1", scan="scans/one.nii.gz", model="compact.prognosis_gcs3_age_clinical"):
    """Return a result with everything that `ichprog predict` can write, as plain data."""
    notice = "Trained on simulated patients only. For research only, not for patient care."
    variable = {"name": "volume_ml", "value": 8.9, "source": "CT", "interval": [0.4, 18.0], "probability": None}
    score = {
        "name": "ICH", "low": 1, "high": 2, "outcome": "death within 30 days", "share_low": 0.13, "share_high": 0.26,
        "source": "Hemphill et al. 2001", "variables": [variable | {"choices": []}],
    }  # fmt: skip
    blood = {
        "scan": scan, "model": "compact.haemorrhage", "probability": 0.974, "threshold": 0.51, "is_present": True,
        "regions": {"parenchymal": 1, "ventricular": 2},
        "volume_ml": {"total": 13.7, "parenchymal": 9.0, "ventricular": 4.7},
        "intervals_ml": {"total": [10.9, 48.5], "parenchymal": [0.4, 18.0], "ventricular": None}, "side": "left",
        "location": "lobar", "intraventricular": 0.355, "infratentorial": 0.02, "midline_shift_mm": 0.7,
        "midline_shift_interval_mm": [0.0, 3.4], "midline_shift_reason": None, "limits": ["Volumes are uncertain."],
        "warnings": [], "provenance": {},
    }  # fmt: skip
    return {
        "patient": patient, "scan": scan, "model": model,
        "tasks": {
            "prognosis": {
                "label": "poor", "probabilities": {"good": 0.296, "poor": 0.704}, "logits": [0.87],
                "std": {"good": 0.052, "poor": 0.052}, "calibrated": {"good": 0.32, "poor": 0.68},
                "label_set": ["good", "poor"],
            },
            "gcs": {
                "label": "13-15", "probabilities": {"13-15": 0.59, "9-12": 0.24, "3-8": 0.17}, "logits": [0, 0],
                "std": None,
            },
        },
        "warnings": [{
            "code": "spacing", "message": "slices are thick", "measured": 7.5, "expected": "0.5 to 6", "unit": "mm",
        }],
        "coverage": 0.8, "abstained": {"prognosis": "every label is possible at a coverage of 80%"},
        "clinical": {
            "used": {"age": 71.0, "gcs": 14.0}, "missing": ["nihss"],
            "contributions": {"prognosis": {"age": 0.31, "gcs": -0.12}},
        },
        "provenance": {
            "notice": notice, "weights": [{"fold": 0, "source": "/home/x/fold0.safetensors", "sha256": "ab"}],
        },
        "haemorrhage": blood,
        "scores": {"ich": score, "func": None, "notes": ["For spontaneous haemorrhages."]},
    }  # fmt: skip
