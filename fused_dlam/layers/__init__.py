"""Around any rule: `Lars`, `SlowMo`, and `Layer`, of which a new one is made."""

from .lars import Lars
from .layer import Layer
from .slowmo import SlowMo

__all__ = ["Lars", "Layer", "SlowMo"]
