"""Our callbacks by name, for scripts and YAML configs that cannot pass `callbacks=` to a trainer.

    TrainingArguments(..., report_to=["moe_telemetry", "router_loss", "finite_check"])

| name | callback |
| --- | --- |
| moe_telemetry | MoETelemetryCallback; stands first |
| router_loss | RouterLossCallback |
| global_router_loss | GlobalRouterLossCallback |
| token_counts | TokenCountCallback |
| finite_check | FiniteCheckCallback, a wait for the device in every tenth step |
| keep_routing | KeepRoutingCallback |
| accumulate_in_place | AccumulateInPlaceCallback |
"""

from __future__ import annotations

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from . import telemetry
from .accumulation import AccumulateInPlaceCallback
from .finite import FiniteCheckCallback
from .losses import GlobalRouterLossCallback, RouterLossCallback
from .recompute import KeepRoutingCallback
from .token_counts import TokenCountCallback


def register() -> None:
    """Make the names above known to transformers. Idempotent."""
    telemetry.register()
    INTEGRATION_TO_CALLBACK["router_loss"] = RouterLossCallback
    INTEGRATION_TO_CALLBACK["global_router_loss"] = GlobalRouterLossCallback
    INTEGRATION_TO_CALLBACK["token_counts"] = TokenCountCallback
    INTEGRATION_TO_CALLBACK["finite_check"] = FiniteCheckCallback
    INTEGRATION_TO_CALLBACK["keep_routing"] = KeepRoutingCallback
    INTEGRATION_TO_CALLBACK["accumulate_in_place"] = AccumulateInPlaceCallback
