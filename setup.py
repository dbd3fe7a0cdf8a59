"""Packaging. `recap_fast/kernels` is a symlink to `kernels/`, which setuptools follows."""

from setuptools import find_namespace_packages, setup

setup(
    name="recap-fast",
    version="0.1.0",
    packages=find_namespace_packages(include=["recap_fast", "recap_fast.*"]),
    python_requires=">=3.10",
    entry_points={"console_scripts": ["recap-fast=recap_fast.cli:main"]},
)
