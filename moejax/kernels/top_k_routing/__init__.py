"""Top-k routing: from the router's logits to everything that dispatch needs, in one pass."""

from moejax.kernels.top_k_routing.api import Implementation, route_tokens, routing_implementation, top_k_routing
from moejax.kernels.top_k_routing.contract import Routing, RoutingSums

__all__ = ["Implementation", "Routing", "RoutingSums", "route_tokens", "routing_implementation", "top_k_routing"]
