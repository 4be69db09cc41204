"""Weightings: from the Gramian G of a step's objectives to their weights w.

They also work alone, on any Gramian: `UPGradWeighting()(gramian)`. `WEIGHTINGS` is the only list of the methods.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from hf_jd.weighting.aligned_mtl import AlignedMTLWeighting
from hf_jd.weighting.base import Flattening, GeneralizedWeighting, LossWeighting, Names, Weighting
from hf_jd.weighting.cagrad import CAGradWeighting
from hf_jd.weighting.conflict_free import ConFIGWeighting
from hf_jd.weighting.constant import ConstantWeighting
from hf_jd.weighting.cosmos import COSMOSWeighting
from hf_jd.weighting.cr_mogm import CRMOGMWeighting
from hf_jd.weighting.dualproj import DualProjWeighting
from hf_jd.weighting.dwa import DWAWeighting
from hf_jd.weighting.fairgrad import FairGradWeighting
from hf_jd.weighting.famo import FAMOWeighting
from hf_jd.weighting.gapo import GAPOWeighting
from hf_jd.weighting.geometric_mean import GeometricMeanWeighting
from hf_jd.weighting.gradvac import GradVacWeighting
from hf_jd.weighting.group_dro import GroupDROWeighting
from hf_jd.weighting.imtl_g import IMTLGWeighting
from hf_jd.weighting.imtl_l import IMTLLWeighting
from hf_jd.weighting.krum import KrumWeighting
from hf_jd.weighting.mean import MeanWeighting
from hf_jd.weighting.mgda import MGDAWeighting
from hf_jd.weighting.modo import MoDoWeighting
from hf_jd.weighting.nash_mtl import NashMTLWeighting
from hf_jd.weighting.pbi import PBIWeighting
from hf_jd.weighting.pcd import PCDWeighting
from hf_jd.weighting.pcgrad import PCGradWeighting
from hf_jd.weighting.raco import RACOWeighting
from hf_jd.weighting.random import RandomWeighting, RLWWeighting
from hf_jd.weighting.sdmgrad import SDMGradWeighting
from hf_jd.weighting.stateful import Stateful
from hf_jd.weighting.stch import STCHWeighting
from hf_jd.weighting.sum import SumWeighting
from hf_jd.weighting.uncertainty import UncertaintyWeighting
from hf_jd.weighting.upgrad import UPGradWeighting

WEIGHTINGS: dict[str, type[Weighting]] = {
    "upgrad": UPGradWeighting,
    "dualproj": DualProjWeighting,
    "mgda": MGDAWeighting,
    "gapo": GAPOWeighting,
    "cagrad": CAGradWeighting,
    "raco": RACOWeighting,
    "aligned_mtl": AlignedMTLWeighting,
    "imtl_g": IMTLGWeighting,
    "config": ConFIGWeighting,
    "nash_mtl": NashMTLWeighting,
    "fairgrad": FairGradWeighting,
    "pcgrad": PCGradWeighting,
    "gradvac": GradVacWeighting,
    "pcd": PCDWeighting,
    "cr_mogm": CRMOGMWeighting,
    "modo": MoDoWeighting,
    "sdmgrad": SDMGradWeighting,
    "krum": KrumWeighting,
    "random": RandomWeighting,
    "constant": ConstantWeighting,
    "mean": MeanWeighting,
    "sum": SumWeighting,
    "uncertainty": UncertaintyWeighting,
    "dwa": DWAWeighting,
    "rlw": RLWWeighting,
    "stch": STCHWeighting,
    "group_dro": GroupDROWeighting,
    "famo": FAMOWeighting,
    "imtl_l": IMTLLWeighting,
    "geometric_mean": GeometricMeanWeighting,
    "cosmos": COSMOSWeighting,
    "pbi": PBIWeighting,
}

__all__ = [
    "WEIGHTINGS",
    "AlignedMTLWeighting",
    "CAGradWeighting",
    "CRMOGMWeighting",
    "ConFIGWeighting",
    "ConstantWeighting",
    "DWAWeighting",
    "DualProjWeighting",
    "FairGradWeighting",
    "Flattening",
    "GeneralizedWeighting",
    "GradVacWeighting",
    "GroupDROWeighting",
    "IMTLGWeighting",
    "KrumWeighting",
    "LossWeighting",
    "MGDAWeighting",
    "MeanWeighting",
    "Names",
    "NashMTLWeighting",
    "PCDWeighting",
    "PCGradWeighting",
    "RLWWeighting",
    "RandomWeighting",
    "STCHWeighting",
    "Stateful",
    "SumWeighting",
    "UPGradWeighting",
    "UncertaintyWeighting",
    "FAMOWeighting",
    "IMTLLWeighting",
    "GeometricMeanWeighting",
    "COSMOSWeighting",
    "PBIWeighting",
    "RACOWeighting",
    "GAPOWeighting",
    "SDMGradWeighting",
    "MoDoWeighting",
    "Weighting",
    "build_weighting",
]


def build_weighting(name: str, **arguments: Any) -> Weighting:
    """Build a weighting from its name in `WEIGHTINGS`.

    Args:
        name: A key of `WEIGHTINGS`.
        **arguments: The method's parameters.

    Raises:
        ValueError: The name or an argument is unknown, or a required argument is missing; the message lists the
            allowed ones, closest match first.
    """
    if name not in WEIGHTINGS:
        raise ValueError(f"Unknown weighting {name!r}. Choose one of {_closest_first(name, WEIGHTINGS)}.")
    parameters = inspect.signature(WEIGHTINGS[name]).parameters
    for argument in arguments:
        if argument not in parameters:
            allowed = f"takes {_closest_first(argument, parameters)}" if parameters else "takes no arguments"
            raise ValueError(f"Unknown argument {argument!r}: the weighting {name!r} {allowed}.")
    for argument, parameter in parameters.items():
        if parameter.default is parameter.empty and argument not in arguments:
            raise ValueError(f"The weighting {name!r} needs the argument {argument!r}.")
    return WEIGHTINGS[name](**arguments)


CRMOGMWeighting.by_name = staticmethod(build_weighting)


def _closest_first(word: str, names: Iterable[str]) -> str:
    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, word.lower(), other.lower()).ratio()

    return ", ".join(sorted(names, key=likeness, reverse=True))
