"""Packages kd_det; its configs and tools travel inside the wheel, under kd_det/.mim (links in the source tree)."""
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / 'README.md'

setup(
    name='kd-det',
    version=runpy.run_path(str(ROOT / 'kd_det' / 'version.py'))['__version__'],
    description='Knowledge distillation for object detectors, inside MMDetection 3.x',
    long_description=README.read_text(encoding='utf-8') if README.is_file() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='knowledge distillation, object detection, MMDetection, PyTorch',
    python_requires='>=3.8',
    packages=find_packages(include=['kd_det', 'kd_det.*']),
    package_data={'kd_det': ['.mim/*', '.mim/**/*'], 'kd_det.report': ['*.html', '*.css', '*.js']},
    exclude_package_data={'': ['__pycache__/*', '*.pyc']},
    zip_safe=False,
    install_requires=['torch', 'torchvision', 'numpy', 'scipy', 'filelock', 'rich', 'matplotlib', 'jinja2'],
    extras_require={
        'mmdet': [
            'mmengine>=0.10,<0.11',
            'mmdet==3.3.0',
            'mmcv-lite>=2.0.1,<2.2',
            'setuptools<81',  # mmengine imports pkg_resources
        ],
        'browser': ['playwright'],  # drives an installed Chromium in the tests of the report
        'test': ['pytest', 'pytest-timeout', 'pytest-xdist', 'setuptools<81', 'tensorboard', 'wheel'],
    },
    entry_points={'console_scripts': ['kd-det = kd_det.cli.main:main']},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ])
