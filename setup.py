"""The list of packages, for setuptools; all else is in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["sslvit", "sslvit.*"]), "sslvit.configs"])
