"""ATSS R18 without distillation: same schedule, seed and start as the student of ATSS R101."""
_base_ = './_base_/students/atss_r18.py'
