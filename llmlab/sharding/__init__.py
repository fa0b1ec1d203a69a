"""Where arrays live: the device mesh and the rules that map logical axis names onto it.

Nothing outside this room and the experiments knows a mesh axis by name. Layers say what a dimension *is*
("embed", "heads", "mlp"); the rules say where it goes.
"""

from llmlab.sharding.mesh import Mesh
from llmlab.sharding.rules import DEFAULT_RULES, Placement, Rules, activate, shard, spec

__all__ = ["DEFAULT_RULES", "Mesh", "Placement", "Rules", "activate", "shard", "spec"]
