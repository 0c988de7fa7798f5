"""The native CPU executor: loads a model into the library, runs each step as one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagoda.arch import memory
from pagoda.arch.registry import bind
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Done, Limits, Progress
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.program import Program
from pagoda.types import StepPlan, StepResult
from pagoda.weights.source import Tensor, TensorSource
