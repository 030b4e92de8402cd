"""DINO R18 without distillation: same schedule, seed and start as the student of DINO R50."""
_base_ = './_base_/students/dino_r18.py'
