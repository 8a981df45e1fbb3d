"""What pyproject.toml cannot say: the notebooks of nbs/ are the package's data under ws/nbs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["ws", "ws.*"]), "ws.nbs"], package_dir={"ws.nbs": "nbs"})
