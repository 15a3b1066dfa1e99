"""Evaluation of a model on a cohort.

`evaluate` predicts a cohort with leakage control and computes metrics, `calibrate` and `fuse` write a model that was
calibrated or combined with clinical values on a cohort. `check_leakage` finds the folds that may predict
each patient. `validation` computes the figures of an external validation, and `report` writes them. `summary` reduces
an evaluation to counts and sums, and `pooling` combines those of several hospitals. `predictions` reads and writes the
table of predictions. `localization` compares saliency maps with lesion masks. `faithfulness` tests whether maps follow
the network. The package knows no study.
"""

from ichprog.evaluation.calibrate import calibrate
from ichprog.evaluation.cohort_predictions import SEVERAL_FOLDS
from ichprog.evaluation.evaluate import Evaluation, evaluate
from ichprog.evaluation.faithfulness import deletion_insertion, parameter_randomisation
from ichprog.evaluation.fuse import Fused, FusedTask, fuse
from ichprog.evaluation.leakage import LeakageReport, check_leakage
from ichprog.evaluation.localization import MapMetrics, measure_maps, summarise_maps
from ichprog.evaluation.pooling import PooledEvaluation, PooledTask, pool_summaries
from ichprog.evaluation.predictions import SPLITS, Predictions, TaskPredictions, align
from ichprog.evaluation.validation import EventValidation, ModelComparison, Recalibration

__all__ = [
    "SEVERAL_FOLDS",
    "SPLITS",
    "Evaluation",
    "EventValidation",
    "Fused",
    "FusedTask",
    "LeakageReport",
    "MapMetrics",
    "ModelComparison",
    "PooledEvaluation",
    "PooledTask",
    "Predictions",
    "Recalibration",
    "TaskPredictions",
    "align",
    "calibrate",
    "check_leakage",
    "deletion_insertion",
    "evaluate",
    "fuse",
    "measure_maps",
    "parameter_randomisation",
    "pool_summaries",
    "summarise_maps",
]
