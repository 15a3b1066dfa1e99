"""Prognosis after intracranial haemorrhage (ICH) from one head CT: `load_model`, `predict`, `explain`.

Each public name is imported on first use, so that `import ichprog` takes milliseconds.

For research only, not for patient care.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ichprog.cohort import Cohort as Cohort
    from ichprog.errors import CohortError as CohortError
    from ichprog.errors import IchprogError as IchprogError
    from ichprog.errors import InvalidValueError as InvalidValueError
    from ichprog.errors import PluginError as PluginError
    from ichprog.errors import RunError as RunError
    from ichprog.errors import ScanError as ScanError
    from ichprog.errors import ScanWarning as ScanWarning
    from ichprog.errors import SpecError as SpecError
    from ichprog.errors import UnknownNameError as UnknownNameError
    from ichprog.errors import WeightsError as WeightsError
    from ichprog.model import Model as Model
    from ichprog.model import brain_mask as brain_mask
    from ichprog.model import explain as explain
    from ichprog.model import haemorrhage as haemorrhage
    from ichprog.model import load_model as load_model
    from ichprog.model import predict as predict
    from ichprog.registry import register_backbone as register_backbone
    from ichprog.registry import register_brain_extractor as register_brain_extractor
    from ichprog.registry import register_fusion as register_fusion
    from ichprog.registry import register_head as register_head
    from ichprog.registry import register_saliency as register_saliency
    from ichprog.reporting.overlay import plot as plot
    from ichprog.reporting.prediction_report import save_report as save_report
    from ichprog.results import Haemorrhage as Haemorrhage
    from ichprog.results import Prediction as Prediction
    from ichprog.results import Saliency as Saliency
    from ichprog.results import to_frame as to_frame
    from ichprog.scan import Scan as Scan
    from ichprog.spec import ModelSpec as ModelSpec
    from ichprog.zoo import list_models as list_models
    from ichprog.zoo import register_model as register_model

_MODULE_OF = {
    "list_models": "zoo",
    "load_model": "model",
    "predict": "model",
    "explain": "model",
    "haemorrhage": "model",
    "brain_mask": "model",
    "plot": "reporting.overlay",
    "save_report": "reporting.prediction_report",
    "register_backbone": "registry",
    "register_brain_extractor": "registry",
    "register_fusion": "registry",
    "register_head": "registry",
    "register_saliency": "registry",
    "register_model": "zoo",
    "Cohort": "cohort",
    "Model": "model",
    "ModelSpec": "spec",
    "Haemorrhage": "results",
    "Prediction": "results",
    "Saliency": "results",
    "to_frame": "results",
    "Scan": "scan",
    "CohortError": "errors",
    "IchprogError": "errors",
    "InvalidValueError": "errors",
    "PluginError": "errors",
    "RunError": "errors",
    "ScanError": "errors",
    "ScanWarning": "errors",
    "SpecError": "errors",
    "UnknownNameError": "errors",
    "WeightsError": "errors",
}

__all__ = list(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ichprog' has no attribute {name!r}")
    return getattr(import_module(f"ichprog.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
