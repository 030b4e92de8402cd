"""The registry scope ``kd_det``, which MMEngine gives to what it reads from ``kd_det::…`` configs.

Modules of this package are registered into MMDetection's registries, so that type names work under its scope. Each node
here is an empty child of MMDetection's: whatever is looked up in it is found there.
"""
import mmdet.registry
from mmdet.utils import register_all_modules
from mmengine.registry import Registry

# A child looks into its parents' tables but does not trigger their lazy imports.
register_all_modules(init_default_scope=False)

SCOPE = 'kd_det'
NODES = {
    name: Registry(node.name, parent=node, scope=SCOPE, locations=[SCOPE])
    for name, node in vars(mmdet.registry).items() if isinstance(node, Registry) and node.scope == 'mmdet'
}
