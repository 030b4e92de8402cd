"""The registry scope ``kd_det``, which MMEngine gives to what it reads from ``kd_det::…`` configs.

Modules of this package are registered into MMDetection's registries, so that type names work under its scope.
"""
from kd_det.scopes import add_nodes

SCOPE = 'kd_det'
NODES = add_nodes(SCOPE)
