"""What ``mmcv.utils.collect_env`` prints about the compiler of the operators."""


def get_compiler_version() -> str:
    return 'none (operators served by torchvision)'


def get_compiling_cuda_version() -> str:
    return 'none (operators served by torchvision)'
