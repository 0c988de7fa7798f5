"""What keeps a state of constant size for a request in place of keys and values."""

from __future__ import annotations

from pagoda.arch.delta import DeltaNet
from pagoda.arch.mamba import Mamba
from pagoda.arch.short_conv import ShortConv

Recurrence = DeltaNet | ShortConv | Mamba
