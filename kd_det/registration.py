"""Makes configs of this package known as ``kd_det::folder/file.py`` to MMEngine's configs, hub and registries."""
from mmengine.config.utils import MODULE2PACKAGE


def register_config_scope() -> None:
    """Adds ``kd_det`` to the packages whose configs MMEngine finds.

    MMEngine keeps a fixed table from scope to distribution and looks up where that distribution is installed, which
    fails in an editable install. Where there is no distribution of that name it imports the module instead and takes
    its folder: the name of this module leads to the package however it is installed. Configs of MMDetection
    (``mmdet::…``) need no help: by the same rule they are found under any distribution that provides the module
    ``mmdet``.
    """
    MODULE2PACKAGE.setdefault('kd_det', __name__)
