"""Around any rule: `Lars`, `SlowMo`, and `Layer`, of which a new one is made; around messages: `Codec`s."""

from .compression import Codec, Int4, Int8, TopK
from .lars import Lars
from .layer import Layer
from .slowmo import SlowMo

__all__ = ["Codec", "Int4", "Int8", "Lars", "Layer", "SlowMo", "TopK"]
