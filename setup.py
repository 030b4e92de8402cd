"""Packages kd_det; its configs and tools travel inside the wheel, under kd_det/.mim (links in the source tree).

Beside the package lie a copy of kd_det/compat/startup.py and a .pth file by which Python runs it at its start.
"""
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / 'README.md'
VERSION = re.compile(r"^__version__ = '(.+?)'", re.MULTILINE)
# One line, as Python wants it; what went wrong in it would be printed whenever Python starts.
PTH = r"exec('try:\n import kd_det_startup\n kd_det_startup.install()\nexcept Exception:\n pass')"

BACKBONES = ['timm>=1.0.20']  # brings safetensors
DEPLOY = ['onnx', 'onnxruntime', 'openvino', 'torch-pruning']
TEST = [*BACKBONES, *DEPLOY, 'hypothesis', 'ipykernel', 'nbclient', 'nbformat', 'pytest', 'pytest-timeout',
        'pytest-xdist', 'setuptools<81', 'tensorboard', 'wheel']
LINT = ['ruff>=0.17,<0.18', 'mypy>=2.4,<2.5']
DOCS = ['mkdocs>=1.6,<2', 'mkdocs-material>=9.6,<10', 'mkdocstrings[python]>=1,<2']


class BuildWithStartup(build_py):
    """Also writes the start-up file, into the wheel and into that of an editable install."""

    def run(self):
        super().run()
        install = self.get_finalized_command('install')
        folder = Path(install.install_lib if self.editable_mode else self.build_lib)
        self.mkpath(str(folder))
        self.copy_file(str(ROOT / 'kd_det' / 'compat' / 'startup.py'), str(folder / 'kd_det_startup.py'))
        (folder / 'kd_det_startup.pth').write_text(f'import sys; {PTH}\n', encoding='ascii')


setup(
    name='kd-det',
    version=VERSION.search((ROOT / 'kd_det' / '__init__.py').read_text(encoding='utf-8')).group(1),
    description='Knowledge distillation for object detectors, inside MMDetection 3.x',
    long_description=README.read_text(encoding='utf-8') if README.is_file() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='knowledge distillation, object detection, MMDetection, PyTorch',
    python_requires='>=3.10',
    packages=find_packages(include=['kd_det', 'kd_det.*']),
    package_data={'kd_det': ['py.typed', '.mim/*', '.mim/**/*'], 'kd_det.study.report': ['*.html', '*.css', '*.js']},
    exclude_package_data={'': ['__pycache__/*', '*.pyc']},
    cmdclass={'build_py': BuildWithStartup},
    zip_safe=False,
    install_requires=['torch>=2.4', 'torchvision>=0.19', 'numpy', 'scipy', 'filelock', 'rich', 'matplotlib', 'jinja2',
                      'shtab', 'pydantic>=2.7', 'annotated-types', 'typing_extensions', 'submitit>=1.5', 'safetensors'],
    extras_require={
        'mmdet': [
            'mmengine>=0.10,<0.11',
            'mmdet==3.3.0',
            'mmcv-lite>=2.0.1,<2.2',
            'setuptools<81',  # mmengine imports pkg_resources
        ],
        'backbones': BACKBONES,
        'browser': ['playwright'],  # drives an installed Chromium in the tests of the report
        'deploy': DEPLOY,
        'dev': [*TEST, *LINT, *DOCS, 'pre-commit'],
        'docs': DOCS,
        'lint': LINT,
        'test': TEST,
    },
    entry_points={'console_scripts': ['kd-det = kd_det.cli.main:main']},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ])
