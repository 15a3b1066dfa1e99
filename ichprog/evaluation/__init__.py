"""Evaluation of a model on a cohort.

`evaluate` predicts a cohort with leakage control and computes metrics. `check_leakage` finds the folds that may predict
each patient. `predictions` reads and writes the table of predictions. `localization` compares saliency maps with lesion
masks. `faithfulness` tests whether maps follow the network. The package knows no study.
"""

from ichprog.evaluation.evaluate import SEVERAL_FOLDS, Evaluation, evaluate
from ichprog.evaluation.faithfulness import deletion_insertion, parameter_randomisation
from ichprog.evaluation.leakage import LeakageReport, check_leakage
from ichprog.evaluation.localization import MapMetrics, measure_maps, summarise_maps
from ichprog.evaluation.predictions import SPLITS, Predictions, TaskPredictions, align

__all__ = [
    "SEVERAL_FOLDS",
    "SPLITS",
    "Evaluation",
    "LeakageReport",
    "MapMetrics",
    "Predictions",
    "TaskPredictions",
    "align",
    "check_leakage",
    "deletion_insertion",
    "evaluate",
    "measure_maps",
    "parameter_randomisation",
    "summarise_maps",
]
