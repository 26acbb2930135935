"""Calibration and search: a checkpoint whose int8 loses less, and the plans that measured sensitivity and cost propose.

Unlike loading and generating, everything here may trace and compile.
"""
